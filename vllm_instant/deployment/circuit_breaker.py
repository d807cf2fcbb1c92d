"""A plugin that raises while serving is disabled, and the server goes on as stock vLLM would."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from vllm_instant.deployment.plugin_manager import plugin_manager

logger = logging.getLogger("vllm.instant")

Contract = TypeVar("Contract")
Result = TypeVar("Result")


class ContractError(Exception):
    """A plugin returned what its contract does not allow."""


@dataclass
class GuardedPlugin(Generic[Contract]):
    """One plugin's object behind a breaker that opens at the first exception and stays open."""

    slot: str
    plugin: str
    instance: Contract
    disabled: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    """Number of failures by method name."""

    def call(self, hook: str, run: Callable[[Contract], Result], otherwise: Result) -> Result:
        """``run(instance)``, or ``otherwise`` when the plugin is disabled or raises now.

        ``hook`` names the method in the log record; ``run`` may check the result and raise ContractError.
        """
        if self.disabled:
            return otherwise
        try:
            return run(self.instance)
        except Exception as error:
            self.disabled = True
            self.failures[hook] += 1
            logger.error(
                "Plugin %s in slot %s raised in %s and is disabled; vLLM's own behaviour takes over. %s: %s",
                self.plugin,
                self.slot,
                hook,
                type(error).__name__,
                error,
                exc_info=not isinstance(error, ContractError),
            )
            plugin_manager().announce_failure(self.slot, self.plugin, hook, error)
            return otherwise


def failure_counts(*contained: GuardedPlugin[Any] | None) -> list[dict[str, Any]]:
    """The failures so far as plain data: ``slot``, ``plugin``, ``hook``, ``count``."""
    return [
        {"slot": c.slot, "plugin": c.plugin, "hook": hook, "count": count}
        for c in contained
        if c is not None
        for hook, count in c.failures.items()
    ]
