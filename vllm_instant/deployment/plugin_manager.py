"""Finds the installed plugins, by slot and name, and reports distributions that cannot be loaded."""

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
    """A distribution with plugins that could not be loaded."""

    distribution: str
    entry_point: str
    reason: str

    def __str__(self) -> str:
        return f"{self.distribution} (entry point {self.entry_point}) could not be loaded: {self.reason}"


class PluginManager:
    """The plugins of all installed distributions, by slot and name.

    Args:
        found: The entry points of the group ``vllm_instant``.

    """

    def __init__(self, found: Iterable[EntryPoint]) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self._plugins: dict[tuple[str, str], list[InstalledPlugin]] = defaultdict(list)
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
            plugins = self._plugins_of(name)
        # A foreign module can fail in any way; the others must still load, and the failure is reported by name.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._pluggy.unregister(name=f"{distribution}:{entry_point.name}")
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.broken.append(BrokenDistribution(distribution, entry_point.name, reason))
            return
        for plugin in plugins:
            self._plugins[plugin.slot, plugin.name].append(InstalledPlugin(plugin, distribution, version))

    def _plugins_of(self, name: str | None) -> list[Plugin]:
        plugins: list[Plugin] = []
        for implementation in self._pluggy.hook.instant_plugins.get_hookimpls():
            if implementation.plugin_name == name:
                plugins.extend(cast(Iterable[Plugin], implementation.function()))
        for plugin in plugins:
            if not isinstance(plugin, Plugin):
                raise TypeError(f"instant_plugins() must return Plugin objects, not {type(plugin).__name__}")
            if plugin.slot not in SLOTS:
                raise ValueError(
                    f"plugin {plugin.name} names an unknown slot {plugin.slot!r}; slots: {', '.join(SLOTS)}"
                )
        return plugins

    def installed_plugins(self) -> Iterator[InstalledPlugin]:
        """Yield every plugin, by slot in the order of the deployment file, then by name."""
        order = list(SLOTS)
        for key in sorted(self._plugins, key=lambda pair: (order.index(pair[0]), pair[1])):
            yield from self._plugins[key]

    def names(self, slot: str) -> list[str]:
        """Return the names that a deployment can choose for a slot."""
        return sorted({name for plugin_slot, name in self._plugins if plugin_slot == slot})

    def find(self, slot: str, name: str) -> list[InstalledPlugin]:
        """Return the plugins of one name: none, one, or several if distributions collide."""
        return self._plugins.get((slot, name), [])

    def get(self, slot: str, name: str) -> InstalledPlugin:
        """Return the plugin of a name that was resolved before; raises LookupError if there is none, or several."""
        found = self.find(slot, name)
        if len(found) != 1:
            raise LookupError(f"{len(found)} installed plugins are called {name!r} in slot {slot!r}")
        return found[0]

    def validation_errors(self, deployment: Deployment) -> list[str]:
        """Return the errors that installed distributions find in a deployment; a check that raises is an error too."""
        sentences: list[str] = []
        for implementation in self._pluggy.hook.instant_check.get_hookimpls():
            try:
                sentences += cast(Iterable[str], _call(implementation, deployment=deployment) or ())
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                sentences.append(f"{implementation.plugin_name} cannot check this deployment: {reason}")
        return sentences

    def announce_failure(self, slot: str, plugin: str, hook: str, error: BaseException) -> None:
        """Call every distribution's ``instant_plugin_failed``; exceptions are logged and do not affect the others."""
        for implementation in self._pluggy.hook.instant_plugin_failed.get_hookimpls():
            try:
                _call(implementation, slot=slot, plugin=plugin, hook=hook, error=error)
            except Exception:
                logger.exception("%s raised in instant_plugin_failed", implementation.plugin_name)


def _call(implementation: pluggy.HookImpl, **arguments: Any) -> object:
    """Call one implementation with the arguments that it declares, as pluggy would.

    pluggy's own call stops at the first implementation that raises; here the others must be called too.
    """
    return implementation.function(*(arguments[name] for name in implementation.argnames))


@cache
def plugin_manager() -> PluginManager:
    """Return the plugins that are installed in this environment."""
    return PluginManager(entry_points(group=hookspecs.PROJECT))
