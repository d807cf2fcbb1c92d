"""What a deployment resolves to: the installed plugin of a slot, its options, and vLLM's engine arguments."""

from __future__ import annotations

from typing import Any

from vllm_instant.deployment.plugin_manager import PluginManager, plugin_manager
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.interfaces.deployment import Deployment, InstalledPlugin
from vllm_instant.interfaces.plugins import PluginOptions

PLUGIN_DRAFTER = "vllm_instant.patches.drafter.PluginDrafter"
"""The class that vLLM instantiates for a drafter plugin."""
ATTENTION_ARGUMENTS = {"attention_backend": "CUSTOM", "kv_cache_dtype": "fp8_per_token_head"}
"""The engine arguments with which vLLM uses an attention plugin (``patches.attention``)."""


def installed_plugin(deployment: Deployment, slot: str, manager: PluginManager | None = None) -> InstalledPlugin:
    """Return the installed plugin that fills a slot.

    Raises:
        LookupError: when it is not installed here, or several distributions install one of this name.

    """
    return (manager or plugin_manager()).get(slot, deployment.slots[slot].plugin)


def plugin_options(deployment: Deployment, slot: str, manager: PluginManager | None = None) -> PluginOptions:
    """Return the options of the plugin that fills a slot, as that plugin's own model."""
    options = installed_plugin(deployment, slot, manager).plugin.options
    return options.model_validate(deployment.slots[slot].options)


def is_default_drafter(deployment: Deployment) -> bool:
    """Whether the deployment names no drafter: the default one serves only where it costs no other feature.

    ``patches.default_drafter`` decides that when the engine arguments are known.
    """
    slot = SLOTS["drafter"]
    return deployment.slots[slot.name].plugin == slot.default and f"{slot.name}.plugin" not in deployment.origins


def drafter_arguments(deployment: Deployment, manager: PluginManager | None = None) -> dict[str, Any]:
    """Return the engine arguments that make vLLM use the deployment's drafter."""
    plugin = installed_plugin(deployment, "drafter", manager).plugin
    if plugin.engine_arguments is not None:
        return dict(plugin.engine_arguments(plugin_options(deployment, "drafter", manager)))
    if plugin.build is None:
        return {}
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": PLUGIN_DRAFTER,
            "num_speculative_tokens": deployment.slots["drafter"].options["num_speculative_tokens"],
        }
    }


def engine_arguments(deployment: Deployment, manager: PluginManager | None = None) -> dict[str, Any]:
    """Return vLLM's engine arguments: the plugins' own, overridden by the ``[vllm]`` table.

    With ``[speculation] plugin = "off"`` there is no drafter either, so that no unused draft model is loaded.
    """
    arguments: dict[str, Any] = {}
    speculating = deployment.slots["speculation"].plugin != "off"
    for slot in SLOTS:
        plugin = installed_plugin(deployment, slot, manager).plugin
        if slot == "drafter":
            if speculating and not is_default_drafter(deployment):
                arguments.update(drafter_arguments(deployment, manager))
        elif plugin.engine_arguments is not None:
            arguments.update(plugin.engine_arguments(plugin_options(deployment, slot, manager)))
        if slot == "attention" and plugin.build is not None:
            arguments.update(ATTENTION_ARGUMENTS)
    arguments.update(deployment.vllm)
    if not speculating:
        arguments.pop("speculative_config", None)
    drafting = arguments.get("speculative_config")
    if (
        isinstance(drafting, dict)
        and drafting.get("method") != "custom_class"
        and installed_plugin(deployment, "attention", manager).plugin.build is not None
    ):
        # A draft model shares the dtype of the KV cache, and vLLM does not pass the backend on to it.
        backend = ATTENTION_ARGUMENTS["attention_backend"]
        arguments["speculative_config"] = {"attention_backend": backend, **drafting}
    return arguments
