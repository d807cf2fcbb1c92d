"""Keeps the process of a classifier alive, and brings texts to it and scores back, without blocking its caller."""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("vllm.instant.guard")

WORKER = Path(__file__).with_name("classifier_worker.py")
"""Run as a file: it needs nothing of this package, which would load for seconds."""
START_SECONDS = 300.0
"""How long a process may take to load its model."""
MAX_RESTARTS = 5
"""Number of restarts within ``RESTART_WINDOW`` seconds after which the classifier counts as failed."""
RESTART_WINDOW = 60.0


@dataclass
class _Item:
    text: str
    on_score: Callable[[float, float], None]
    sent: float


class ClassifierProcess:
    """A classifier in a process of its own, which is restarted where it dies or does not answer.

    Args:
        arguments: Of ``classifier_worker.Classifier``.
        max_seconds: Time without an answer after which the process is killed and started again.
        command: The process; by default this package's worker.

    """

    def __init__(self, arguments: Mapping[str, Any], max_seconds: float, command: list[str] | None = None) -> None:
        self._arguments = dict(arguments)
        self._max_seconds = max_seconds
        self._command = command or [sys.executable, "-P", str(WORKER)]
        self._lock = threading.Lock()
        self._items: dict[int, _Item] = {}
        self._count = 0
        self._restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
        self.num_restarts = 0
        self.has_failed = False
        self._closed = threading.Event()
        self._is_ready = threading.Event()
        self._start()
        threading.Thread(target=self._watch, daemon=True, name="guard-classifier-watch").start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait for the model; raises ValueError, with one sentence, where it cannot be loaded."""
        deadline = time.monotonic() + seconds
        while not self._is_ready.wait(0.05):
            if self.has_failed or time.monotonic() > deadline:
                self.close()
                model = self._arguments.get("model")
                raise ValueError(f"the classifier {model!r} does not start; see its messages above")

    def submit(self, text: str, on_score: Callable[[float, float], None]) -> None:
        """Classify a text. ``on_score`` is called, in another thread, with the score and the seconds that it took."""
        with self._lock:
            self._count += 1
            number = self._count
            self._items[number] = _Item(text, on_score, time.monotonic())
        self._outgoing.put((number, text))

    def close(self) -> None:
        self._closed.set()
        self._process.kill()

    # ------------------------------------------------------------------------------------- threads

    def _start(self) -> None:
        self._is_ready.clear()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # an interrupt from the keyboard is for the server
        )
        self._outgoing: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        with self._lock:
            now = time.monotonic()
            for number, item in self._items.items():
                item.sent = now
                self._outgoing.put((number, item.text))
        self._started = time.monotonic()
        for target in (self._write, self._read):
            arguments = (self._process, self._outgoing)
            threading.Thread(target=target, args=arguments, daemon=True, name="guard-classifier").start()

    def _write(self, process: subprocess.Popen[str], outgoing: queue.SimpleQueue[tuple[int, str] | None]) -> None:
        stdin = process.stdin
        assert stdin is not None  # noqa: S101
        try:
            stdin.write(json.dumps(self._arguments) + "\n")
            stdin.flush()
            while (item := outgoing.get()) is not None:
                stdin.write(json.dumps({"id": item[0], "text": item[1]}) + "\n")
                stdin.flush()
        except (OSError, ValueError):
            return  # the reader sees the end of the process, too

    def _read(self, process: subprocess.Popen[str], outgoing: queue.SimpleQueue[tuple[int, str] | None]) -> None:
        stdout = process.stdout
        assert stdout is not None  # noqa: S101
        for line in stdout:
            try:
                answer = json.loads(line)
            except ValueError:
                break
            if answer.get("ready"):
                self._is_ready.set()
                continue
            with self._lock:
                item = self._items.pop(answer["id"], None)
            if item is not None:
                item.on_score(float(answer["score"]), time.monotonic() - item.sent)
        outgoing.put(None)
        process.kill()
        process.wait()
        if not self._closed.is_set():
            self._restart(process.returncode)

    def _restart(self, code: int) -> None:
        now = time.monotonic()
        if len(self._restarts) == MAX_RESTARTS and now - self._restarts[0] < RESTART_WINDOW:
            self._fail("it was restarted too often")
            return
        if not self._is_ready.is_set():
            self._fail("it does not start")
            return
        self._restarts.append(now)
        self.num_restarts += 1
        logger.error("The guard's classifier ended (exit code %s) and is started again", code)
        self._start()

    def _fail(self, reason: str) -> None:
        self.has_failed = True
        logger.error("The guard's classifier has failed: %s", reason)
        with self._lock:
            items = list(self._items.values())
            self._items.clear()
        for item in items:
            item.on_score(1.0, 0.0)

    def _watch(self) -> None:
        """Kill a process that does not answer; the thread that reads from it starts the next one."""
        while not self._closed.wait(min(0.05, self._max_seconds / 4)):
            with self._lock:
                oldest = min((item.sent for item in self._items.values()), default=None)
            if oldest is None or not self._is_ready.is_set():
                continue
            if time.monotonic() - oldest > self._max_seconds:
                self._process.kill()
