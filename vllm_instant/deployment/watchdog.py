"""Ends calls of plugins that do not return, by an exception inside the call.

A thread looks at the calls in progress every second. A signal to the main thread, whose handler raises ``HangError``,
interrupts Python code as well as waiting system calls (sleeps, locks, sockets). In other threads the exception is
raised at the next instruction of Python code. Native code that never returns to the interpreter cannot be ended within
its process.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakSet

from vllm_instant.deployment.circuit_breaker import Call, GuardedPlugin, HangError

logger = logging.getLogger("vllm.instant")

HANG_SECONDS = 10.0
"""A call that takes longer does not return."""
FIRST_HANG_SECONDS = 120.0
"""As ``HANG_SECONDS`` for the first call of a hook, which may compile or load something."""
POLL_SECONDS = 1.0
SIGNAL = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGALRM
"""A signal that neither vLLM nor timers of test runners use."""


class Watchdog:
    """Watches the calls of guarded plugins in this process.

    Args:
        clock: Time in seconds, the clock of the plugins.

    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._plugins: WeakSet[GuardedPlugin[Any]] = WeakSet()
        self._condemned: Call | None = None
        self._has_handler = False
        self._thread: threading.Thread | None = None

    def watch(self, plugin: GuardedPlugin[Any]) -> None:
        """Watch the calls of a plugin from now on."""
        self._plugins.add(plugin)
        if self._thread is None:
            self._install_handler()
            self._thread = threading.Thread(target=self._run, name="vllm-instant watchdog", daemon=True)
            self._thread.start()

    def _install_handler(self) -> None:
        """Take the signal if nothing else uses it; only the main thread may."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(SIGNAL) is signal.SIG_DFL:
            signal.signal(SIGNAL, self._on_signal)
            self._has_handler = True

    def release(self) -> None:
        """Give the signal back."""
        if self._has_handler:
            signal.signal(SIGNAL, signal.SIG_DFL)
            self._has_handler = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        condemned, self._condemned = self._condemned, None
        # The call may have returned since the signal was sent.
        if condemned is not None and any(plugin.current is condemned for plugin in self._plugins):
            raise HangError(_sentence(condemned))

    def _run(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            self.look()

    def look(self) -> None:
        """End the calls that have taken too long."""
        now = self._clock()
        for plugin in list(self._plugins):
            call = plugin.current
            if call is None:
                continue
            hook, began, _ = call
            if now - began > (HANG_SECONDS if hook in plugin.slow_calls else FIRST_HANG_SECONDS):
                logger.error("Plugin %s in slot %s: %s", plugin.plugin, plugin.slot, _sentence(call))
                self._end(call)

    def _end(self, call: Call) -> None:
        thread = call[2]
        if thread == threading.main_thread().ident and self._has_handler:
            self._condemned = call
            signal.pthread_kill(thread, SIGNAL)
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(HangError))


def _sentence(call: Call) -> str:
    return f"{call[0]} has not returned"


_WATCHDOG = Watchdog()


def watch(plugin: GuardedPlugin[Any]) -> None:
    """Watch the calls of a plugin in this process from now on."""
    _WATCHDOG.watch(plugin)
