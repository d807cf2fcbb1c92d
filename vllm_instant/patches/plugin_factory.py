"""Build plugins from a deployment and vLLM's configuration."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.resolved import drafter_arguments, installed_plugin, plugin_options
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.deployment.watchdog import watch
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.drafter import DeviceDrafter
from vllm_instant.interfaces.plugins import PluginContext
from vllm_instant.patches.compat import HasAttribute, VllmPatch
from vllm_instant.patches.draft_lengths import drafts_on_device
from vllm_instant.patches.full_graphs import full_graphs_of, verifies_adaptively


class PluginStartError(Exception):
    """A chosen plugin cannot start; the message is for the person who wrote the deployment file."""


def context_of(vllm_config: Any, deployment: Deployment | None = None) -> PluginContext:
    """The context of plugins from vLLM's ``VllmConfig`` and the deployment."""
    speculative = vllm_config.speculative_config
    own_drafter = deployment is not None and speculative is not None and uses_drafter_plugin(deployment, speculative)
    drafter = installed_plugin(deployment, "drafter").plugin if deployment is not None and own_drafter else None
    # The number of tokens to verify is fixed before a drafter on the device has proposed any.
    on_host = not (drafts_on_device(speculative) or vllm_config.use_v2_model_runner)
    return PluginContext(
        model=vllm_config.model_config.model,
        max_model_len=vllm_config.model_config.max_model_len,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        vocab_size=vllm_config.model_config.get_vocab_size(),
        num_speculative_tokens=speculative.num_speculative_tokens if speculative is not None else 0,
        device=str(vllm_config.device_config.device_type),
        confident_drafts=drafter is not None and drafter.confident and on_host,
        self_calibrating_drafts=drafter is not None and drafter.self_calibrating and on_host,
        full_graphs=full_graphs_of(vllm_config),
        adaptive_verification=verifies_adaptively(vllm_config),
        itl_slo_ms=deployment.slots["speculation"].options.get("itl_slo_ms") if deployment is not None else None,
        tokenizer="" if vllm_config.model_config.skip_tokenizer_init else vllm_config.model_config.tokenizer or "",
        identity=_identity(vllm_config, deployment if own_drafter else None),
    )


def uses_drafter_plugin(deployment: Deployment, speculative_config: Any) -> bool:
    """Whether the server uses its drafter plugin's method; the command line may have chosen another one."""
    chosen = drafter_arguments(deployment).get("speculative_config", {})
    if speculative_config.method == "custom_class" or drafts_on_device(speculative_config):
        return bool(speculative_config.model == chosen.get("model"))
    return bool(speculative_config.method == chosen.get("method"))


def _identity(vllm_config: Any, drafting: Deployment | None) -> dict[str, str]:
    """Everything that the time of a step depends on; ``drafting`` is the deployment if it brings the drafter.

    The load of the host is not part of it, because it changes while a server runs.
    """
    model, parallel, speculative = vllm_config.model_config, vllm_config.parallel_config, vllm_config.speculative_config
    attention = vllm_config.attention_config.backend
    identity = {
        "device": _device_name(str(vllm_config.device_config.device_type)),
        "model": model.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(model.quantization),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "compiled": str(not model.enforce_eager),
        "graphs": _name(vllm_config.compilation_config.cudagraph_mode),
        "attention": _name(attention),
        "runner": "V2" if vllm_config.use_v2_model_runner else "V1",
        "scheduling": "asynchronous" if vllm_config.scheduler_config.async_scheduling else "synchronous",
        "parallel": "x".join(
            str(size)
            for size in (
                parallel.tensor_parallel_size,
                parallel.pipeline_parallel_size,
                parallel.data_parallel_size,
                parallel.decode_context_parallel_size,
            )
        ),
        "experts": str(parallel.enable_expert_parallel),
        "vllm": version("vllm"),
    }
    if speculative is not None:
        identity["drafter"] = f"{speculative.method} {speculative.model or ''}".strip()
        if drafting is not None:
            identity["drafter"] += f" {drafting.slots['drafter'].plugin}"
        identity["draft_tokens"] = str(speculative.num_speculative_tokens)
        if verifies_adaptively(vllm_config):
            identity["verification"] = "adaptive"
    return identity


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))


def _device_name(device_type: str) -> str:
    from vllm.platforms import current_platform

    if device_type == "cpu":
        return f"{_processor()} {len(os.sched_getaffinity(0))} cores"
    return str(current_platform.get_device_name())


def _processor() -> str:
    """The processor's model; machines of one architecture may share a home folder, and with it the stored costs."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def build_guarded(
    slot: str, deployment: Deployment, context: PluginContext, on_device: bool = False
) -> GuardedPlugin[Any] | None:
    """Build the plugin of a slot behind its breaker; None when the slot keeps vLLM's own behaviour.

    With ``on_device`` a drafter's ``build_on_device`` is used.

    Raises:
        PluginStartError: when the plugin's ``build`` fails or returns something that its slot cannot use.

    """
    plugin = installed_plugin(deployment, slot).plugin
    build = plugin.build_on_device if on_device else plugin.build
    if build is None:
        return None
    try:
        instance = build(plugin_options(deployment, slot), context)
    except Exception as error:
        raise PluginStartError(
            f"plugin {plugin.name} of slot {slot} cannot start: {type(error).__name__}: {error}"
        ) from error
    contract = DeviceDrafter if on_device else SLOTS[slot].protocol
    if not isinstance(instance, contract):
        missing = [
            name
            for name in vars(contract)
            if not name.startswith("_") and callable(vars(contract)[name]) and not hasattr(instance, name)
        ]
        raise PluginStartError(
            f"plugin {plugin.name} of slot {slot} cannot start: its {type(instance).__name__} has no "
            f"{', '.join(missing)}; derive it from vllm_instant.{contract.__name__}"
        )
    guarded = GuardedPlugin(slot, plugin.name, instance, is_timed=_is_timed(slot, context))
    if not _must_agree(slot, context):
        watch(guarded)
    return guarded


def _is_timed(slot: str, context: PluginContext) -> bool:
    """Whether slow calls disable the plugin; kernels compile when new shapes come, several times in a row."""
    return slot != "attention" and not _must_agree(slot, context)


def _must_agree(slot: str, context: PluginContext) -> bool:
    """Whether several ranks run the plugin and must go on to do the same: a clock may not disable it on one of them."""
    if slot in ("speculation", "batching", "streaming", "guard", "escalation"):
        return False
    return set(context.identity.get("parallel", "1").split("x")) != {"1"}


PATCH = VllmPatch(
    name="plugin_factory",
    purpose="tells plugins about the model and the engine",
    requirements=(
        HasAttribute("config/vllm.py", "VllmConfig.speculative_config"),
        HasAttribute("config/vllm.py", "VllmConfig.device_config"),
        HasAttribute("config/scheduler.py", "SchedulerConfig.max_num_seqs"),
        HasAttribute("config/model.py", "ModelConfig.max_model_len"),
        HasAttribute("config/model.py", "ModelConfig.get_vocab_size"),
        HasAttribute("config/model.py", "ModelConfig.enforce_eager"),
        HasAttribute("config/model.py", "ModelConfig.tokenizer"),
        HasAttribute("config/model.py", "ModelConfig.skip_tokenizer_init"),
        HasAttribute("config/model.py", "ModelConfig.quantization"),
        HasAttribute("config/cache.py", "CacheConfig.cache_dtype"),
        HasAttribute("config/parallel.py", "ParallelConfig.tensor_parallel_size"),
        HasAttribute("config/parallel.py", "ParallelConfig.decode_context_parallel_size"),
        HasAttribute("config/parallel.py", "ParallelConfig.enable_expert_parallel"),
        HasAttribute("config/attention.py", "AttentionConfig.backend"),
        HasAttribute("config/compilation.py", "CompilationConfig.cudagraph_mode"),
        HasAttribute("config/scheduler.py", "SchedulerConfig.async_scheduling"),
        HasAttribute("config/vllm.py", "VllmConfig.use_v2_model_runner"),
    ),
    slots=("speculation", "drafter", "batching"),
)
