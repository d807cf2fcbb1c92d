"""The deployment file as settings: resolves what a user wrote into a checked deployment.

Sources, later ones winning: defaults, the deployment file (TOML), environment variables
(``INSTANT_SPECULATION__PLUGIN=off``), the command line (``--instant-set speculation.plugin=off``). ``resolve`` merges
them, records the origin of each value, and returns a ``Deployment`` or raises ``DeploymentError`` with every problem.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_instant.deployment.config_sources import (
    TABLES,
    ConfigSource,
    MergedSources,
    Table,
    read_environment,
    read_file,
    read_overrides,
)
from vllm_instant.deployment.errors import DeploymentError, Problem, choices, shown
from vllm_instant.deployment.option_errors import option_error
from vllm_instant.deployment.plugin_manager import PluginManager, plugin_manager
from vllm_instant.deployment.resolved import engine_arguments, installed_plugin, is_default_drafter
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.interfaces.deployment import Deployment, InstalledPlugin, SlotChoice
from vllm_instant.interfaces.plugins import Plugin, PluginOptions

CONFIG_VARIABLE = "INSTANT_CONFIG"
"""The variable with the path of the deployment file, where the command line names none."""
DEFAULT_ORIGIN = "default"


def resolve(
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    manager: PluginManager | None = None,
) -> Deployment:
    """Merge all sources and check the result, without vLLM.

    Args:
        file: The deployment file; by default that of ``INSTANT_CONFIG``, or none.
        overrides: Values of ``--instant-set``, each ``TABLE.KEY=VALUE``.
        manager: The installed plugins; by default those of this environment.

    Raises:
        DeploymentError: With every problem of the deployment.

    """
    file = file or os.environ.get(CONFIG_VARIABLE) or None
    path = Path(os.path.expanduser(file)) if file else None
    merged = MergedSources()
    for source in _read_sources(path, overrides):
        merged.add(source)
    merged.tables = _with_home(merged.tables)
    return _check(merged, str(path) if path else None, manager or plugin_manager())


def _read_sources(path: Path | None, overrides: Sequence[str]) -> list[ConfigSource]:
    readers: list[Callable[[], ConfigSource]] = [read_environment, lambda: read_overrides(overrides)]
    if path is not None:
        readers.insert(0, lambda: read_file(path))
    sources: list[ConfigSource] = []
    problems: list[Problem] = []
    for read in readers:
        try:
            sources.append(read())
        except DeploymentError as error:
            problems += error.problems
    problems = problems or [problem for source in sources for problem in _table_problems(source)]
    if problems:
        raise DeploymentError(problems)
    return sources


def _table_problems(source: ConfigSource) -> Iterator[Problem]:
    for name, table in source.tables.items():
        origin = source.origin_of(name)
        if name not in TABLES:
            yield Problem(origin, f"[{name}]", f"there is no such table; {choices(name, TABLES)}")
        elif not isinstance(table, dict):
            yield Problem(origin, name, f"must be a table, [{name}] with keys below it; found {shown(table)}")


def _with_home(value: Any) -> Any:
    """Expand ``~/`` at the beginning of strings, as a shell does on the command line."""
    if isinstance(value, dict):
        return {key: _with_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _check(merged: MergedSources, file: str | None, manager: PluginManager) -> Deployment:
    where = file or "deployment"
    problems: list[Problem] = []
    slots: dict[str, SlotChoice] = {}
    for slot in SLOTS.values():
        # [vllm] speculative_config configures vLLM's own drafter, and so chooses it.
        is_native = slot.name == "drafter" and "speculative_config" in merged.tables.get("vllm", {})
        check = _SlotCheck(slot.name, "native" if is_native else slot.default, merged, where, manager)
        try:
            slots[slot.name] = check.run()
        except DeploymentError as error:
            problems += error.problems
    if problems:
        raise DeploymentError(problems)
    deployment = Deployment(
        file=str(Path(file).resolve()) if file else None,
        slots=slots,
        vllm=merged.tables.get("vllm", {}),
        origins=merged.origins,
    )
    sentences = list(validate(deployment, manager)) or _plugin_validation_errors(deployment, manager)
    if sentences:
        raise DeploymentError([Problem(where, "", sentence) for sentence in sentences])
    return deployment


def _plugin_validation_errors(deployment: Deployment, manager: PluginManager) -> list[str]:
    """The errors that plugins find in a deployment, including failures of their own code."""
    try:
        engine_arguments(deployment, manager)
    # Plugin code: any exception becomes a sentence for the user instead of a traceback.
    except Exception as error:
        return [f"a plugin cannot say which engine arguments it needs: {type(error).__name__}: {error}"]
    return manager.validation_errors(deployment)


class _SlotCheck:
    """Checks one slot's table: the plugin's name, then its options."""

    def __init__(self, slot: str, default: str, merged: MergedSources, where: str, manager: PluginManager) -> None:
        self._slot = slot
        self._default = default
        self._table: Table = merged.tables.get(slot, {})
        self._origins: Mapping[str, str] = merged.origins
        self._texts = merged.texts
        self._where = where
        self._manager = manager

    def run(self) -> SlotChoice:
        plugin = self._installed().plugin
        given = {key: value for key, value in self._table.items() if key != "plugin"}
        try:
            options = self._validated(plugin, given)
        except ValidationError as error:
            problems = []
            for detail in error.errors():
                key = ".".join(str(part) for part in detail["loc"])
                message = option_error(dict(detail), plugin, self._manager)
                problems.append(Problem(self._origin(key), f"[{self._slot}] {key}".rstrip(), message))
            raise DeploymentError(problems) from None
        return SlotChoice(plugin=plugin.name, options=options.model_dump(mode="json"))

    def _origin(self, key: str) -> str:
        return self._origins.get(f"{self._slot}.{key}", self._where)

    def _installed(self) -> InstalledPlugin:
        name = self._table.get("plugin", self._default)
        if not isinstance(name, str):
            raise self._plugin_error(f"expected the name of a plugin, found {shown(name)}")
        found = self._manager.find(self._slot, name)
        if not found:
            message = f"there is no plugin {name!r} for this slot; {choices(name, self._manager.names(self._slot))}"
            if self._manager.broken:
                message += "; moreover " + "; ".join(str(broken) for broken in self._manager.broken)
            raise self._plugin_error(message)
        if len(found) > 1:
            distributions = " and ".join(plugin.distribution for plugin in found)
            raise self._plugin_error(f"{name!r} is installed by {distributions}: uninstall one")
        return found[0]

    def _plugin_error(self, message: str) -> DeploymentError:
        return DeploymentError([Problem(self._origin("plugin"), f"[{self._slot}] plugin", message)])

    def _validated(self, plugin: Plugin, given: Table) -> PluginOptions:
        """The options; a value that was written as text counts as a string where the option takes no number."""
        try:
            return _validate_options(plugin, given)
        except ValidationError as error:
            failed = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
            texts = {key: self._texts[f"{self._slot}.{key}"] for key in failed if f"{self._slot}.{key}" in self._texts}
            try:
                return _validate_options(plugin, given | texts)
            except ValidationError:
                raise error from None


def _validate_options(plugin: Plugin, given: Table) -> PluginOptions:
    # JSON's rules are strict on types ("4" is no number), and yet lists may fill tuples, and strings paths.
    return plugin.options.model_validate_json(json.dumps(given, default=str), strict=True)


def validate(deployment: Deployment, manager: PluginManager) -> Iterator[str]:
    """Yield one sentence per contradiction between slots, whichever plugins fill them."""
    drafter = installed_plugin(deployment, "drafter", manager).plugin
    has_drafter = drafter.build is not None or drafter.engine_arguments is not None
    if has_drafter and not is_default_drafter(deployment) and "speculative_config" in deployment.vllm:
        yield (
            f"[drafter] plugin = {drafter.name!r} and [vllm] speculative_config both choose a drafter: keep one of them"
        )
    if drafter.build is not None and "num_speculative_tokens" not in deployment.slots["drafter"].options:
        yield f"[drafter] plugin = {drafter.name!r} must derive its options from vllm_instant.DrafterOptions"
    if "scheduler_cls" in deployment.vllm:
        neutral = {"speculation": "off", "batching": "fcfs"}
        remedies = [f"[{s}] plugin = {off!r}" for s, off in neutral.items() if deployment.slots[s].plugin != off]
        if remedies:
            yield (
                "[vllm] scheduler_cls replaces the scheduler that serves the deployment's policies: "
                f"remove it, or set {' and '.join(remedies)}"
            )
