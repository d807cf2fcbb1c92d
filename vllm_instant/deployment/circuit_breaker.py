"""Disables a plugin that raises while serving; vLLM's own behavior takes over."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from vllm_instant.deployment.plugin_manager import plugin_manager

logger = logging.getLogger("vllm.instant")

Instance = TypeVar("Instance")
Result = TypeVar("Result")


class ContractError(Exception):
    """A plugin returned what its protocol does not allow."""


@dataclass
class GuardedPlugin(Generic[Instance]):
    """The object of one plugin, disabled permanently at its first exception."""

    slot: str
    plugin: str
    instance: Instance
    disabled: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    """Number of failures by method."""

    def call(self, hook: str, run: Callable[[Instance], Result], otherwise: Result) -> Result:
        """Return ``run(instance)``, or ``otherwise`` if the plugin is disabled or raises.

        Args:
            hook: The method's name, for the log and the metrics.
            run: Calls the method; raises ``ContractError`` for a result that the protocol does not allow.
            otherwise: The result without the plugin.

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


def failure_counts(*plugins: GuardedPlugin[Any] | None) -> list[dict[str, Any]]:
    """Return the failures so far as plain data: ``slot``, ``plugin``, ``hook``, ``count``."""
    return [
        {"slot": guarded.slot, "plugin": guarded.plugin, "hook": hook, "count": count}
        for guarded in plugins
        if guarded is not None
        for hook, count in guarded.failures.items()
    ]
