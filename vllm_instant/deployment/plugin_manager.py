"""Finds plugins, resolves the names of a deployment, reports what cannot be loaded."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy

from vllm_instant.deployment.slots import SLOTS
from vllm_instant.interfaces import hookspecs
from vllm_instant.interfaces.deployment import Deployment, InstalledPlugin
from vllm_instant.interfaces.plugins import Plugin

logger = logging.getLogger("vllm.instant")


@dataclass(frozen=True)
class BrokenDistribution:
    """A distribution that registered in the group but could not be loaded."""

    distribution: str
    entry_point: str
    reason: str

    def __str__(self) -> str:
        return f"{self.distribution} (entry point {self.entry_point}) could not be loaded: {self.reason}"


class PluginManager:
    """The plugins of all installed distributions, by slot and name."""

    def __init__(self, found: Iterable[EntryPoint]) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self._origin: dict[str, tuple[str, str]] = {}
        self._offers: dict[tuple[str, str], list[InstalledPlugin]] = defaultdict(list)
        self.broken: list[BrokenDistribution] = []
        for entry_point in found:
            self._load(entry_point)

    def _load(self, entry_point: EntryPoint) -> None:
        distribution = entry_point.dist.name if entry_point.dist else "unknown distribution"
        version = entry_point.dist.version if entry_point.dist else "?"
        try:
            module = entry_point.load()
            name = self._pluggy.register(module, name=f"{distribution}:{entry_point.name}")
            self._pluggy.check_pending()
            offers = self._ask(name)
        # Anyone's module may fail in any way; the others must still load, and the failure must have a name.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._pluggy.unregister(name=f"{distribution}:{entry_point.name}")
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.broken.append(BrokenDistribution(distribution, entry_point.name, reason))
            return
        for plugin in offers:
            self._offers[plugin.slot, plugin.name].append(InstalledPlugin(plugin, distribution, version))

    def _ask(self, name: str | None) -> list[Plugin]:
        offered: list[Plugin] = []
        for implementation in self._pluggy.hook.instant_plugins.get_hookimpls():
            if implementation.plugin_name == name:
                offered.extend(cast(Iterable[Plugin], implementation.function()))
        for plugin in offered:
            if not isinstance(plugin, Plugin):
                raise TypeError(f"instant_plugins() must return Plugin objects, not {type(plugin).__name__}")
            if plugin.slot not in SLOTS:
                raise ValueError(
                    f"plugin {plugin.name} names an unknown slot {plugin.slot!r}; slots: {', '.join(SLOTS)}"
                )
        return offered

    def installed_plugins(self) -> Iterator[InstalledPlugin]:
        """Every offer, by slot in the order of the deployment file, then by name."""
        order = list(SLOTS)
        for key in sorted(self._offers, key=lambda pair: (order.index(pair[0]), pair[1])):
            yield from self._offers[key]

    def names(self, slot: str) -> list[str]:
        """The names that a deployment may choose for a slot."""
        return sorted({name for offered_slot, name in self._offers if offered_slot == slot})

    def find(self, slot: str, name: str) -> list[InstalledPlugin]:
        """The offers of one name: none, one, or several when distributions collide."""
        return self._offers.get((slot, name), [])

    def get(self, slot: str, name: str) -> InstalledPlugin:
        """The one offer of a name that was resolved before; raises LookupError otherwise."""
        found = self.find(slot, name)
        if len(found) != 1:
            raise LookupError(f"{len(found)} installed plugins are called {name!r} in slot {slot!r}")
        return found[0]

    def validation_errors(self, deployment: Deployment) -> list[str]:
        """What the installed distributions say against a deployment; a check that fails is an objection, too."""
        sentences: list[str] = []
        for implementation in self._pluggy.hook.instant_check.get_hookimpls():
            try:
                sentences += cast(Iterable[str], _call(implementation, deployment=deployment) or ())
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                sentences.append(f"{implementation.plugin_name} cannot check this deployment: {reason}")
        return sentences

    def announce_failure(self, slot: str, plugin: str, hook: str, error: Exception) -> None:
        """Tell every distribution that a plugin was disabled; a listener that fails is logged and keeps nobody else."""
        for implementation in self._pluggy.hook.instant_plugin_failed.get_hookimpls():
            try:
                _call(implementation, slot=slot, plugin=plugin, hook=hook, error=error)
            except Exception:
                logger.exception("%s failed to hear of a disabled plugin", implementation.plugin_name)


def _call(implementation: pluggy.HookImpl, **arguments: Any) -> object:
    """Call one implementation by itself, with those arguments that it asks for, as pluggy would.

    pluggy's own call stops at the first implementation that raises; here one must not silence the others.
    """
    return implementation.function(*(arguments[name] for name in implementation.argnames))


@cache
def plugin_manager() -> PluginManager:
    """The plugins installed in this process's environment."""
    return PluginManager(entry_points(group=hookspecs.PROJECT))
