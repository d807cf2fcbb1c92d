"""pydantic's errors of plugin options, in the words of a deployment file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_instant.deployment.errors import choices, shown
from vllm_instant.deployment.plugin_manager import PluginManager
from vllm_instant.interfaces.plugins import Plugin

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


def option_error(detail: Mapping[str, Any], plugin: Plugin, manager: PluginManager) -> str:
    """Return what is wrong with one option, what was found and what would be valid, as one sentence.

    Args:
        detail: An entry of pydantic's ``ValidationError.errors()``.
        plugin: The plugin that fills the slot.
        manager: The installed plugins.

    """
    kind, found = detail["type"], shown(detail.get("input"))
    if kind == "extra_forbidden":
        return _unknown_option(str(detail["loc"][-1]), detail.get("input"), plugin, manager)
    if kind == "missing":
        return f"the plugin {plugin.name} needs this option"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {found}"
    message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return f"expected {message}, found {found}" if message != detail["msg"] else f"{message}; found {found}"


def _unknown_option(key: str, value: Any, plugin: Plugin, manager: PluginManager) -> str:
    if key in manager.names(plugin.slot) and isinstance(value, dict):
        return f"the options of a plugin stand directly in [{plugin.slot}], not in [{plugin.slot}.{key}]"
    others = (found.plugin for found in manager.installed_plugins() if found.plugin.slot == plugin.slot)
    owners = sorted({other.name for other in others if key in other.options.model_fields})
    if owners:
        return f"is an option of {' and '.join(owners)}, not of {plugin.name}, which fills this slot"
    if not plugin.options.model_fields:
        return f"the plugin {plugin.name} has no options; found {shown(value)}"
    return f"the plugin {plugin.name} has no such option; {choices(key, plugin.options.model_fields)}"
