"""Real ``vllm serve`` processes on 127.0.0.1: started, watched, and stopped without leaving a process behind."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import httpx

from vllm_instant.deployment.deployment_env import REPORT_DRAFTS
from vllm_instant.deployment.secrets import is_secret
from vllm_instant.tools.measure.guarded_process import start_guarded, stop_group
from vllm_instant.tools.measure.http_client import get
from vllm_instant.tools.measure.server_metrics import metric_totals

START_TIMEOUT = 600.0
"""Seconds without a new line in a server's log after which its start has failed."""
SAY_SECONDS = 10.0
"""Time between two reports on what a start is waiting for."""
PORTS = range(20_000, 32_000)
"""Ports of servers: below the range that Linux gives to connections."""
SETTLE_SECONDS = 1.3
CORES_PER_START = 8
"""With fewer cores per server, starts would slow each other down and are made one after the other."""

Say = Callable[[str], None]


class ServerError(RuntimeError):
    """A server did not start or died; the message ends with the last lines of its log, ``log`` has all of it."""

    def __init__(self, message: str, server: Server) -> None:
        super().__init__(f"{message}:\n{server.log_tail()}")
        self.log = server.log_text() if server.log.exists() else ""


class Server:
    """One ``vllm serve`` process group; a context manager that waits for health and leaves no process behind.

    Args:
        model: the model to serve.
        arguments: further words of the command line.
        log: file for the server's output.
        environment: variables to set (or, with None, to remove) for the server.
        start_timeout: seconds without a new line in the log after which the start has failed.
        name: how messages call it.

    """

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str] = (),
        *,
        log: Path,
        environment: Mapping[str, str | None] | None = None,
        start_timeout: float = START_TIMEOUT,
        name: str = "the server",
    ) -> None:
        self.model = str(model)
        self.arguments, secrets = secrets_as_environment(arguments)
        self.log = log
        self.start_timeout = start_timeout
        self.name = name
        self.port = _free_port()
        self._environment = {**secrets, **(environment or {})}
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
        """The command line; its address comes last, so that no other argument changes it."""
        vllm = Path(sys.executable).parent / "vllm"
        return [str(vllm), "serve", self.model, *self.arguments, "--host", "127.0.0.1", "--port", str(self.port)]

    def launch(self) -> None:
        """Start the process without waiting for it."""
        environment = serving_environment()
        for name, value in self._environment.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._output = self.log.open("wb")
        self._launched = time.monotonic()
        self._process = start_guarded(self.command, output=self._output, environment=environment)

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

    def wait(self, seconds: float | None = None, say: Say = lambda text: None) -> None:
        """Block until the server is healthy, as long as its log grows.

        Args:
            seconds: limit for the time without a new line; ``start_timeout`` by default.
            say: called now and then with the last line of the log.

        Raises:
            ServerError: when it dies, or when its log has not grown for too long.

        """
        limit = self.start_timeout if seconds is None else seconds
        progress = _LogProgress(self.log, limit)
        said = time.monotonic()
        while not self.healthy():
            if progress.stalled():
                raise ServerError(
                    f"{self.name} did not start: no new line in its log for {limit:.0f} s (--start-timeout)", self
                )
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                say(f"waiting for {self.name}, {said - self._launched:.0f} s: {self.log_tail(1)[-100:]}")
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
        """The model name in requests."""
        models = get(self.url, "/v1/models").json()["data"]
        return str(models[0]["id"])

    def stop(self) -> None:
        """End the whole process group, by SIGTERM and then by SIGKILL; idempotent."""
        process, self._process = self._process, None
        if process is not None:
            stop_group(process)
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


class _LogProgress:
    """Whether a log still grows.

    Args:
        log: the file.
        limit: seconds without growth that count as a standstill.
        clock: in seconds.

    """

    def __init__(self, log: Path, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._limit, self._clock = log, limit, clock
        self._size, self._grown_at = -1, clock()

    def stalled(self) -> bool:
        """Whether the log has not grown for longer than the limit."""
        size = self._log.stat().st_size if self._log.exists() else 0
        if size != self._size:
            self._size, self._grown_at = size, self._clock()
        return self._clock() - self._grown_at > self._limit


def settle() -> None:
    """Wait until servers that were just busy are idle; call it before another arm is measured.

    vLLM's workers spin for one second after their last message (``busy_loop_s`` in ``shm_broadcast.py``). On a small
    machine two servers share cores, and a first token measured within that second comes a second late. The wait also
    covers the second in which our API server polls its engine for the metrics.
    """
    time.sleep(SETTLE_SECONDS)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, with its servers stopped."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def share_cores(servers: int) -> bool:
    """Whether starting ``servers`` servers at once would slow each of them down."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores < servers * CORES_PER_START


@contextmanager
def running(*servers: Server, say: Say = lambda text: None) -> Any:
    """Start servers, wait for all, and stop all in every case, SIGTERM included.

    Where they would share cores they start one after the other; the later ones then find what the first has compiled
    in vLLM's cache. Everywhere else they start at the same time.

    Args:
        *servers: not yet started.
        say: called now and then with what is being waited for.

    """
    # Only the main thread may set signal handlers.
    in_main_thread = threading.current_thread() is threading.main_thread()
    with terminable() if in_main_thread else nullcontext():
        try:
            start_all(*servers, say=say)
            yield servers
        finally:
            stop_all(*servers)


def start_all(*servers: Server, say: Say = lambda text: None) -> None:
    """Start servers and wait for all, see ``running``; what has been started keeps running if one fails."""
    one_by_one = share_cores(len(servers))
    for server in () if one_by_one else servers:
        server.launch()
    for server in servers:
        if one_by_one:
            server.launch()
        say(f"waiting for {server.name}")
        server.wait(say=say)
        say(f"{server.name} is ready after {server.started_in or 0:.0f} s")


def stop_all(*servers: Server) -> None:
    """Stop several servers at the same time."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        list(pool.map(Server.stop, servers))


def serving_environment() -> dict[str, str]:
    """The environment of every server here: offline, a small KV cache on the CPU, Intel's OpenMP if installed.

    All servers share vLLM's compile cache (``VLLM_CACHE_ROOT`` is inherited). vLLM's CPU build expects its OpenMP
    library in LD_PRELOAD and runs speculation slowly without it.
    """
    environment = dict(os.environ)
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault(REPORT_DRAFTS, "1")
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    openmp = Path(sysconfig.get_path("data")) / "lib" / "libiomp5.so"
    if openmp.exists():
        # vLLM preloads GNU's OpenMP in a process that used its CPU platform, and refuses to run with both.
        preloaded = [name for name in environment.get("LD_PRELOAD", "").split(":") if name and "libgomp" not in name]
        environment["LD_PRELOAD"] = ":".join([*preloaded, str(openmp)])
    for name in ("INSTANT_SETTINGS", "INSTANT_CONFIG", "VLLM_PLUGINS"):
        environment.pop(name, None)
    return environment


_VARIABLES = {"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"}
"""Environment variables of vLLM that stand for options with secrets."""


def secrets_as_environment(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words of ``vllm serve`` without secrets, which other users of a machine could read, and variables with them.

    Of several API keys the first one becomes the server's, because a variable holds one.
    """
    left: list[str] = []
    variables: dict[str, str] = {}
    pending: str | None = None
    for word in words:
        option, equals, value = word.partition("=")
        path, _, setting = value.partition("=")
        if not word.startswith("-") and pending is not None:
            variables.setdefault(pending, word)
        elif option in _VARIABLES:
            pending = None if equals else _VARIABLES[option]
            if equals:
                variables.setdefault(_VARIABLES[option], value)
        elif option == "--instant-set" and is_secret(path):
            pending = None
            variables["INSTANT_" + path.strip().replace("-", "_").replace(".", "__").upper()] = setting
        else:
            pending = None
            left.append(word)
    return left, variables


def words_of(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments of a deployment file's ``[vllm]`` table, as words for ``vllm serve``."""
    words = []
    for key, value in arguments.items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += _list_words(option, value)
        else:
            words += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


_JSON_LISTS = ("allowed-origins", "allowed-methods", "allowed-headers")
_REPEATED = ("middleware",)


def _list_words(option: str, values: list[Any]) -> list[str]:
    """A list as vLLM's parser takes it: as JSON, by repeating the option, or item by item."""
    if option in _JSON_LISTS:
        return [f"--{option}", json.dumps(values)]
    items = [value if isinstance(value, str) else json.dumps(value) for value in values]
    if option in _REPEATED:
        return [word for item in items for word in (f"--{option}", item)]
    return [f"--{option}", *items] if items else []


def _free_port() -> int:
    """A port that is free, and that the system gives to no connection until a server listens there.

    Ports for connections come from a range of their own, which a server that starts beside others uses by the dozen.
    """
    for port in random.sample(PORTS, 50):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        anywhere: int = probe.getsockname()[1]
        return anywhere
