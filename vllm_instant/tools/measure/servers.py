"""Real ``vllm serve`` processes on 127.0.0.1, started together, stopped for certain."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import httpx

from vllm_instant.tools.measure.http_client import get
from vllm_instant.tools.measure.server_metrics import metric_totals

STOP_SECONDS = 10.0
SETTLE_SECONDS = 1.3


class ServerError(RuntimeError):
    """A server did not start or died; the message ends with the last lines of its log, ``log`` has all of it."""

    def __init__(self, message: str, server: Server) -> None:
        super().__init__(f"{message}:\n{server.log_tail()}")
        self.log = server.log_text() if server.log.exists() else ""


class Server:
    """One ``vllm serve`` process group; a context manager that waits for health and leaves no process behind.

    Args:
        model: what to serve.
        arguments: further words of the command line.
        log: file for the server's output.
        environment: variables to set (or, with None, to remove) for the server.

    """

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str] = (),
        *,
        log: Path,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self.model = str(model)
        self.arguments = list(arguments)
        self.log = log
        self.port = _free_port()
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self.started_in: float | None = None
        """Seconds from launch to health."""

    @property
    def url(self) -> str:
        """The base address, without ``/v1``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        """The command line."""
        vllm = Path(sys.executable).parent / "vllm"
        return [str(vllm), "serve", self.model, "--host", "127.0.0.1", "--port", str(self.port), *self.arguments]

    def launch(self) -> None:
        """Start the process without waiting, so that several servers can load at the same time."""
        environment = serving_environment()
        for name, value in self._environment.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._output = self.log.open("wb")
        self._launched = time.monotonic()
        # A session of its own: Ctrl-C reaches us alone, and the whole group can be stopped.
        self._process = subprocess.Popen(
            self.command, stdout=self._output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def healthy(self) -> bool:
        """Whether it answers now; raises ServerError when it has died."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is not None:
            raise ServerError(f"{' '.join(self.command)} ended with exit code {code}", self)
        try:
            answered = get(self.url, "/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False
        if answered and self.started_in is None:
            self.started_in = time.monotonic() - self._launched
        return answered

    @property
    def pid(self) -> int:
        """Process id of the front end; its children are the engine core and the workers."""
        if self._process is None:
            raise ServerError("the server does not run", self)
        return self._process.pid

    def wait(self, seconds: float = 300) -> None:
        """Block until the server is healthy; raises ServerError when it dies or takes too long."""
        deadline = time.monotonic() + seconds
        while not self.healthy():
            if time.monotonic() > deadline:
                raise ServerError(f"no health after {seconds:.0f} s", self)
            time.sleep(0.25)

    def log_tail(self, lines: int = 25) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def log_text(self) -> str:
        """The whole log so far."""
        return self.log.read_text(errors="replace")

    def metrics(self) -> dict[str, float]:
        """The samples on ``/metrics``, summed over labels, by name."""
        return metric_totals(get(self.url, "/metrics").text)

    def served_model(self) -> str:
        """The name that requests call the model by."""
        models = get(self.url, "/v1/models").json()["data"]
        return str(models[0]["id"])

    def stop(self) -> None:
        """End the whole process group: politely, then not; idempotent."""
        process, self._process = self._process, None
        if process is not None:
            for stop_signal in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, stop_signal)
                except ProcessLookupError:
                    break
                deadline = time.monotonic() + STOP_SECONDS
                while time.monotonic() < deadline and _group_lives(process):
                    time.sleep(0.1)
            process.wait()
        if self._output is not None:
            self._output.close()
            self._output = None

    def __enter__(self) -> Self:
        if self._process is None:
            self.launch()
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()


def settle() -> None:
    """Wait until servers that were just busy have become quiet; call it before the other arm's turn.

    vLLM's workers spin for one second after their last message (``busy_loop_s`` in ``shm_broadcast.py``). On a small
    machine two servers share cores, and a first token measured within that second comes a second late. The wait also
    covers the second in which our API server polls its engine for the metrics.
    """
    time.sleep(SETTLE_SECONDS)


@contextmanager
def terminable() -> Iterator[None]:
    """Let a plain ``kill`` end a command as Ctrl-C does, with its servers stopped."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def running(*servers: Server) -> Any:
    """Launch all servers at once, wait for all, stop all, whatever happens between, a plain ``kill`` included."""
    # Only the main thread may say what a signal does.
    in_main_thread = threading.current_thread() is threading.main_thread()
    with terminable() if in_main_thread else nullcontext():
        try:
            for server in servers:
                server.launch()
            for server in servers:
                server.wait()
            yield servers
        finally:
            stop_all(*servers)


def stop_all(*servers: Server) -> None:
    """Stop several servers at the same time."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        list(pool.map(Server.stop, servers))


def serving_environment() -> dict[str, str]:
    """The environment that every server here gets: offline, little KV cache on the CPU, Intel's OpenMP if installed.

    vLLM's CPU build asks for its OpenMP library in LD_PRELOAD and runs speculation slowly without it.
    """
    environment = dict(os.environ)
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    openmp = Path(sysconfig.get_path("data")) / "lib" / "libiomp5.so"
    if openmp.exists():
        # vLLM preloads GNU's OpenMP in a process that used its CPU platform, and refuses to run with both.
        preloaded = [name for name in environment.get("LD_PRELOAD", "").split(":") if name and "libgomp" not in name]
        environment["LD_PRELOAD"] = ":".join([*preloaded, str(openmp)])
    for name in ("INSTANT_SETTINGS", "INSTANT_CONFIG", "VLLM_PLUGINS"):
        environment.pop(name, None)
    return environment


def words_of(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments, as a deployment file's ``[vllm]`` table has them, as words for ``vllm serve``."""
    words = []
    for key, value in arguments.items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)] if value else []
        else:
            words += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
