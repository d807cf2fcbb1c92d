"""Disables a plugin that fails while serving; vLLM's own behavior takes over.

A plugin fails if it raises anything, returns what its protocol does not allow, takes too long three times in a row, or
does not return (``deployment.watchdog``).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import get_ident
from types import TracebackType
from typing import Any, Generic, TypeVar

from vllm_instant.deployment.plugin_manager import plugin_manager

logger = logging.getLogger("vllm.instant")

Instance = TypeVar("Instance")
Result = TypeVar("Result")

SLOW_SECONDS = 1.0
"""A call that takes longer is slow; the first call of each hook may, because it may compile."""
MAX_SLOW_CALLS = 3
"""Number of slow calls of one hook in a row after which the plugin is disabled."""


class ContractError(Exception):
    """A plugin returned what its protocol does not allow, or took too long."""


class HangError(BaseException):
    """Raised by the watchdog inside a call that does not return; a plugin's ``except Exception`` does not catch it."""


Call = tuple[str, float, int]
"""A call in progress: hook, begin on the breaker's clock, and the caller's thread (``get_ident``).

A tuple, since one is made for every call; a call is told from others by identity.
"""


@dataclass(eq=False)
class GuardedPlugin(Generic[Instance]):
    """The object of one plugin, disabled permanently at its first failure."""

    slot: str
    plugin: str
    instance: Instance
    disabled: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    """Number of failures by method."""
    is_timed: bool = True
    """Whether slow calls count. Ranks that must do the same may not decide by their own clocks."""
    clock: Callable[[], float] = time.perf_counter
    """Time in seconds."""
    current: Call | None = None
    """The call in progress."""
    slow_calls: dict[str, int] = field(default_factory=dict)
    """Slow calls in a row by method; a method is missing until its first call returned."""

    def call(self, hook: str, run: Callable[[Instance], Result], otherwise: Result) -> Result:
        """Return ``run(instance)``, or ``otherwise`` if the plugin is disabled or fails.

        Args:
            hook: The method's name, for the log and the metrics.
            run: Calls the method and returns a copy of plain types; raises ``ContractError`` for a result that the
                protocol does not allow. All that may fail because of the result belongs here.
            otherwise: The result without the plugin.

        """
        if self.disabled:
            return otherwise
        outer = self.current
        try:
            began = self.clock()
            self.current = (hook, began, get_ident())
            result = run(self.instance)
            self.current = outer
            seconds = self.clock() - began
            if seconds > SLOW_SECONDS and self.is_timed:
                self._count_slow(hook, seconds)
            elif self.slow_calls.get(hook, 1):
                self.slow_calls[hook] = 0
        except BaseException as error:
            self.current = outer
            if isinstance(error, KeyboardInterrupt) or _is_of_a_signal(error):
                raise
            self._fail(hook, error)
            return otherwise
        return result

    def _count_slow(self, hook: str, seconds: float) -> None:
        if hook not in self.slow_calls:
            self.slow_calls[hook] = 0
            return
        self.slow_calls[hook] += 1
        if self.slow_calls[hook] >= MAX_SLOW_CALLS:
            raise ContractError(f"{MAX_SLOW_CALLS} calls in a row took more than {SLOW_SECONDS:g} s ({seconds:.1f} s)")

    def _fail(self, hook: str, error: BaseException) -> None:
        self.disabled = True
        self.failures[hook] += 1
        try:
            logger.error(
                "Plugin %s in slot %s raised in %s and is disabled; vLLM's own behaviour takes over. %s: %s",
                self.plugin,
                self.slot,
                hook,
                type(error).__name__,
                _text_of(error),
                exc_info=not isinstance(error, ContractError),
            )
            plugin_manager().announce_failure(self.slot, self.plugin, hook, error)
        except BaseException as another:  # of a subscriber, or of an exception that cannot be printed
            if isinstance(another, KeyboardInterrupt) or _is_of_a_signal(another):
                raise
            logger.error("The failure of plugin %s could not be reported: %s", self.plugin, type(another).__name__)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as another:
        return f"(its text raises {type(another).__name__})"


def _is_of_a_signal(error: BaseException) -> bool:
    """Whether vLLM's handler of a signal raised this inside the call: its workers end by ``SystemExit``.

    The innermost frame is then the handler's. ``sys.exit`` is no Python function, so that a plugin's own exit has a
    frame of the plugin there.
    """
    if not isinstance(error, SystemExit):
        return False
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__", "")).startswith("vllm.")


def failure_counts(*plugins: GuardedPlugin[Any] | None) -> list[dict[str, Any]]:
    """Return the failures so far as plain data: ``slot``, ``plugin``, ``hook``, ``count``."""
    return [
        {"slot": guarded.slot, "plugin": guarded.plugin, "hook": hook, "count": count}
        for guarded in plugins
        if guarded is not None
        for hook, count in guarded.failures.items()
    ]
