"""FULL CUDA graphs for decoding steps with fewer draft tokens than the maximum.

vLLM captures a decoding step as one graph only for the maximum number of draft tokens; other steps run in pieces. Its
V2 model runner also captures the numbers that ``num_speculative_tokens_per_batch_size`` names. So that table is filled
in here: its batch sizes are of no importance, because this package's scheduler sets the number of each step. On the V1
runner the same table would cost the server all of its FULL graphs. There drafters on the host, whose drafts always
differ in number, get the graphs of steps without drafts instead.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.interfaces.plugins import FullGraphs
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.draft_lengths import fixed_length_reason
from vllm_instant.patches.names import CONFIG, MODEL_RUNNER, QUALIFIED_NAME

HOST_DRAFTER = "custom_class"
"""vLLM's speculative method of drafter plugins on the V1 runner."""


def tiers(num_speculative_tokens: int) -> tuple[int, ...]:
    """The numbers of draft tokens that get a graph: 0, the powers of two, and the maximum."""
    powers = (1 << exponent for exponent in range(num_speculative_tokens.bit_length()))
    return (0, *sorted({*powers, num_speculative_tokens}))


def table_of(num_speculative_tokens: int, max_num_seqs: int) -> list[tuple[int, int, int]]:
    """A table for ``num_speculative_tokens_per_batch_size`` that names every tier, as (first, last batch size, number).

    Each number needs a batch size of its own. The largest batch sizes are taken, so that vLLM's capture sizes, which
    follow the widest batch of a number, cover all batches. With fewer batch sizes than tiers some are left out.
    """
    last, *others = reversed(tiers(num_speculative_tokens))
    named = [*others[: max_num_seqs - 2], 0] if max_num_seqs > 1 else []
    named = list(dict.fromkeys(named))
    first = max_num_seqs - len(named)
    return [(1, first, last)] + [(first + i, first + i, number) for i, number in enumerate(named, 1)]


def full_graphs_of(vllm_config: Any) -> FullGraphs | None:
    """The decoding steps that run as one CUDA graph where others do not; None where there is no difference."""
    speculative, compilation = vllm_config.speculative_config, vllm_config.compilation_config
    mode, max_rows = compilation.cudagraph_mode, compilation.max_cudagraph_capture_size
    if speculative is None or mode is None or not (mode.has_full_cudagraphs() and mode.separate_routine()):
        return None
    if verifies_adaptively(vllm_config):
        return None  # captured for any number of tokens, so that trimmed steps are graphs
    maximum = speculative.num_speculative_tokens
    lengths = {maximum}
    if vllm_config.use_v2_model_runner:
        if speculative.num_speculative_tokens_per_batch_size:
            from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

            seqs = vllm_config.scheduler_config.max_num_seqs
            table = speculative.num_speculative_tokens_per_batch_size
            lengths = set(build_dynamic_sd_schedule_lookup(table, seqs, maximum)[1:])
    elif speculative.method == HOST_DRAFTER:
        lengths = {0}
    return FullGraphs(tuple(sorted(lengths)), max_rows or 0)


def verifies_adaptively(vllm_config: Any) -> bool:
    """Whether vLLM's V2 model runner trims the drafts of a step before it verifies them."""
    speculative = vllm_config.speculative_config
    return bool(
        speculative is not None and speculative.enable_adaptive_verification and vllm_config.use_v2_model_runner
    )


def _disable_for_data_parallel(disable: Any, vllm_config: Any) -> None:
    """Name the tiers where nothing is named, before vLLM decides whether this configuration may use such a table."""
    if _names_tiers(vllm_config):
        speculative = vllm_config.speculative_config
        speculative.num_speculative_tokens_per_batch_size = table_of(
            speculative.num_speculative_tokens, vllm_config.scheduler_config.max_num_seqs
        )
    disable()


def _names_tiers(vllm_config: Any) -> bool:
    speculative, mode = vllm_config.speculative_config, vllm_config.compilation_config.cudagraph_mode
    deployment = deployment_env.get_deployment()
    return (
        deployment is not None
        and speculative is not None
        and not speculative.num_speculative_tokens_per_batch_size
        and not speculative.enable_adaptive_verification
        and vllm_config.scheduler_config.scheduler_cls == QUALIFIED_NAME
        and installed_plugin(deployment, "speculation").plugin.build is not None
        and mode is not None
        and mode.has_full_cudagraphs()
        and vllm_config.parallel_config.data_parallel_size == 1
        and bool(vllm_config.use_v2_model_runner)
        and fixed_length_reason(vllm_config) is None
    )


def _init(init: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """Capture decoding steps without drafts where a drafter on the host makes drafts of different numbers."""
    init(*args, **kwargs)
    speculative = runner.speculative_config
    if speculative is not None and speculative.method == HOST_DRAFTER:
        runner.uniform_decode_query_len = 1
        runner.cudagraph_dispatcher.uniform_decode_query_len = 1


_CONFIG, _RUNNER = "config/vllm.py", "v1/worker/gpu_model_runner.py"

PATCH = VllmPatch(
    name="full_graphs",
    purpose="FULL CUDA graphs for fewer draft tokens",
    requirements=(
        HasSignature(_CONFIG, "VllmConfig._maybe_disable_dynamic_sd_for_data_parallel", ("self",), exact=True),
        References(
            _CONFIG,
            "VllmConfig.__post_init__",
            ("_maybe_disable_dynamic_sd_for_data_parallel", "_set_cudagraph_sizes"),
        ),
        HasAttribute("config/speculative.py", "SpeculativeConfig.num_speculative_tokens_per_batch_size"),
        HasAttribute("config/speculative.py", "SpeculativeConfig.enable_adaptive_verification"),
        HasAttribute("config/compilation.py", "CompilationConfig.max_cudagraph_capture_size"),
        HasSignature(
            "v1/spec_decode/dynamic/utils.py",
            "build_dynamic_sd_schedule_lookup",
            ("num_speculative_tokens_per_batch_size", "vllm_max_batch_size", "vllm_num_speculative_tokens"),
        ),
        References(
            "v1/worker/gpu/cudagraph_utils.py",
            "CudaGraphManager._init_candidates",
            ("uses_dynamic_speculative_decoding", "build_dynamic_sd_schedule_lookup"),
        ),
        References(_RUNNER, "GPUModelRunner.__init__", ("uniform_decode_query_len", "cudagraph_dispatcher")),
        References("v1/cudagraph_dispatcher.py", "CudagraphDispatcher.__init__", ("uniform_decode_query_len",)),
    ),
    slots=("speculation",),
    optional=True,
    wraps={
        f"{CONFIG}:VllmConfig._maybe_disable_dynamic_sd_for_data_parallel": _disable_for_data_parallel,
        f"{MODEL_RUNNER}:GPUModelRunner.__init__": _init,
    },
)
