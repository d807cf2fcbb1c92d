"""The deployment file as settings: what a user may write, and what a server then runs with.

Layers, the later ones winning: defaults, the deployment file (TOML), environment variables
(``INSTANT_SPECULATION__PLUGIN=off``), the command line (``--instant-set speculation.plugin=off``). ``resolve`` merges
them, remembers where each value came from, and either returns a ``Deployment`` or raises ``DeploymentError`` with
everything that is wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from vllm_instant.deployment.config_sources import (
    DeploymentFile,
    Layer,
    Table,
    merge,
    read_environment,
    read_file,
    read_overrides,
)
from vllm_instant.deployment.errors import DeploymentError, Problem, choices, shown
from vllm_instant.deployment.plugin_manager import PluginManager, plugin_manager
from vllm_instant.deployment.resolved import engine_arguments, installed_plugin, is_default_drafter
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.interfaces.deployment import Deployment, SlotChoice
from vllm_instant.interfaces.plugins import PluginOptions

CONFIG_VARIABLE = "INSTANT_CONFIG"
"""Names the deployment file when the command line does not."""
DEFAULT_ORIGIN = "default"


def resolve(
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    manager: PluginManager | None = None,
) -> Deployment:
    """Merge all layers and check them; ``file`` falls back to the variable ``INSTANT_CONFIG``, then to no file.

    Raises:
        DeploymentError: with every problem of the deployment, none of them found by starting an engine.

    """
    file = file or os.environ.get(CONFIG_VARIABLE) or None
    layers: list[Layer] = []
    problems: list[Problem] = []
    for read in (
        *((lambda: read_file(file),) if file is not None else ()),
        read_environment,
        lambda: read_overrides(overrides),
    ):
        try:
            layers.append(read())
        except DeploymentError as error:
            problems += error.problems
    if problems:
        raise DeploymentError(problems)

    for layer in layers:
        for name, table in layer.tables.items():
            if name not in DeploymentFile.model_fields:
                problems.append(
                    Problem(
                        layer.source_of(name),
                        f"[{name}]",
                        f"there is no such table; {choices(name, DeploymentFile.model_fields)}",
                    )
                )
            elif not isinstance(table, dict):
                problems.append(
                    Problem(
                        layer.source_of(name),
                        name,
                        f"must be a table, [{name}] with keys below it; found {shown(table)}",
                    )
                )
    if problems:
        raise DeploymentError(problems)

    merged: Table = {}
    origins: dict[str, str] = {}
    for layer in layers:
        merge(merged, layer, layer.tables, origins)
    deployment = _check(merged, origins, str(file) if file else None, manager or plugin_manager())
    return deployment


def _check(merged: Table, origins: dict[str, str], file: str | None, manager: PluginManager) -> Deployment:
    where = file or "deployment"
    problems: list[Problem] = []
    slots: dict[str, SlotChoice] = {}
    for slot in SLOTS.values():
        table = merged.get(slot.name, {})
        # Who configures vLLM's own drafter has named one.
        natively = slot.name == "drafter" and "speculative_config" in merged.get("vllm", {})
        choice, found = _check_slot(slot.name, table, "native" if natively else slot.default, origins, where, manager)
        problems += found
        if choice is not None:
            slots[slot.name] = choice
    if problems:
        raise DeploymentError(problems)
    deployment = Deployment(
        file=str(Path(file).resolve()) if file else None, slots=slots, vllm=merged.get("vllm", {}), origins=origins
    )
    problems += [Problem(where, "", sentence) for sentence in validate(deployment, manager)]
    if not problems:
        problems += [Problem(where, "", sentence) for sentence in _plugin_validation_errors(deployment, manager)]
    if problems:
        raise DeploymentError(problems)
    return deployment


def _plugin_validation_errors(deployment: Deployment, manager: PluginManager) -> list[str]:
    """What plugins say against a deployment, a failure of their own code included."""
    try:
        engine_arguments(deployment, manager)
    # Plugin code: whatever it raises is a sentence for the user and not a traceback.
    except Exception as error:
        return [f"a plugin cannot say which engine arguments it needs: {type(error).__name__}: {error}"]
    return manager.validation_errors(deployment)


def _check_slot(
    slot: str, table: Table, default: str, origins: Mapping[str, str], where: str, manager: PluginManager
) -> tuple[SlotChoice | None, list[Problem]]:
    def source(key: str) -> str:
        return origins.get(f"{slot}.{key}", where)

    name = table.get("plugin", default)
    if not isinstance(name, str):
        return None, [
            Problem(source("plugin"), f"[{slot}] plugin", f"expected the name of a plugin, found {shown(name)}")
        ]
    offers = manager.find(slot, name)
    if not offers:
        message = f"there is no plugin {name!r} for this slot; {choices(name, manager.names(slot))}"
        if manager.broken:
            message += "; moreover " + "; ".join(str(broken) for broken in manager.broken)
        return None, [Problem(source("plugin"), f"[{slot}] plugin", message)]
    if len(offers) > 1:
        rivals = " and ".join(offer.distribution for offer in offers)
        return None, [Problem(source("plugin"), f"[{slot}] plugin", f"{name!r} is offered by {rivals}: uninstall one")]
    plugin = offers[0].plugin
    given = {key: value for key, value in table.items() if key != "plugin"}
    try:
        # JSON rules: strict about types ("4" is no number), yet lists may fill tuples and strings paths.
        options = plugin.options.model_validate_json(json.dumps(given, default=str), strict=True)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            message = _sentence(dict(detail), slot, plugin.name, plugin.options, manager)
            problems.append(Problem(source(key), f"[{slot}] {key}".rstrip(), message))
        return None, problems
    return SlotChoice(plugin=plugin.name, options=options.model_dump(mode="json")), []


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "tuple_type": "a list",
}


def _sentence(detail: Table, slot: str, plugin: str, options: type[PluginOptions], manager: PluginManager) -> str:
    """One of pydantic's errors in the words of a deployment file."""
    kind, found = detail["type"], shown(detail.get("input"))
    key = str(detail["loc"][-1]) if detail["loc"] else ""
    if kind == "extra_forbidden":
        if key in manager.names(slot) and isinstance(detail.get("input"), dict):
            return f"the options of a plugin stand directly in [{slot}], not in [{slot}.{key}]"
        owners = sorted(
            {
                o.plugin.name
                for o in manager.installed_plugins()
                if o.plugin.slot == slot and key in o.plugin.options.model_fields
            }
        )
        if owners:
            return f"is an option of {' and '.join(owners)}, not of {plugin}, which fills this slot"
        if not options.model_fields:
            return f"the plugin {plugin} has no options; found {found}"
        return f"the plugin {plugin} has no such option; {choices(key, options.model_fields)}"
    if kind == "missing":
        return f"the plugin {plugin} needs this option"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {found}"
    message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return f"expected {message}, found {found}" if message != detail["msg"] else f"{message}; found {found}"


def validate(deployment: Deployment, manager: PluginManager) -> Iterator[str]:
    """Choices that exclude each other, whichever plugins they name."""
    drafter = installed_plugin(deployment, "drafter", manager).plugin
    brings_drafter = drafter.build is not None or drafter.engine_arguments is not None
    if brings_drafter and not is_default_drafter(deployment) and "speculative_config" in deployment.vllm:
        yield (
            f"[drafter] plugin = {drafter.name!r} and [vllm] speculative_config both choose a drafter: keep one of them"
        )
    if drafter.build is not None and "num_speculative_tokens" not in deployment.slots["drafter"].options:
        yield f"[drafter] plugin = {drafter.name!r} must derive its options from vllm_instant.DrafterOptions"
    if "scheduler_cls" in deployment.vllm:
        served = {"speculation": "off", "batching": "fcfs"}
        remedies = [f"[{s}] plugin = {off!r}" for s, off in served.items() if deployment.slots[s].plugin != off]
        if remedies:
            yield (
                "[vllm] scheduler_cls replaces the scheduler that serves the deployment's policies: "
                f"remove it, or set {' and '.join(remedies)}"
            )
