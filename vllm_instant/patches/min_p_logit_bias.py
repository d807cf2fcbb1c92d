"""Serve requests with ``min_p`` or ``logit_bias`` beside speculation, without drafts (V1 runner).

vLLM refuses them on a server that speculates, because its rejection sampler applies neither to draft tokens. A request
without drafts does not need that: its one token per step is sampled by the ordinary sampler, which applies both if the
logits processors are loaded. So they are loaded, the refusal is lifted, and ``patches.scheduler`` gives such requests
no drafts.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.names import INPUT_PROCESSOR, MODEL_RUNNER, QUALIFIED_NAME

_served = False
"""Whether this process's engine serves such requests."""


def _init_processor(initialize: Any, processor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    global _served
    initialize(vllm_config, *args, **kwargs)
    _served = _served_by(vllm_config)


def _validate_spec_decode(validate: Any, params: Any, speculative_config: Any) -> None:
    if not _served:
        validate(speculative_config)


def _served_by(vllm_config: Any) -> bool:
    """Whether the engine of this configuration has this package's scheduler and the V1 runner."""
    return (
        deployment_env.get_deployment() is not None
        and vllm_config.scheduler_config.scheduler_cls == QUALIFIED_NAME
        and not vllm_config.use_v2_model_runner
    )


def _build_logitsprocs(
    build: Any, vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom_logitsprocs: Any = ()
) -> Any:
    """Load vLLM's own processors, which it leaves out on a server that speculates."""
    if is_pooling_model or custom_logitsprocs or not _served_by(vllm_config):
        return build(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

    return LogitsProcessors(kind(vllm_config, device, is_pin_memory) for kind in BUILTIN_LOGITS_PROCESSORS)


_PROCESSORS = "v1/sample/logits_processor/__init__.py"

PATCH = VllmPatch(
    name="min_p_logit_bias",
    purpose="requests with min_p or logit_bias are served beside speculation, without drafts",
    requirements=(
        HasSignature("v1/engine/input_processor.py", "InputProcessor.__init__", ("self", "vllm_config")),
        HasSignature("sampling_params.py", "SamplingParams._validate_spec_decode", ("self", "speculative_config")),
        References("sampling_params.py", "SamplingParams._validate_spec_decode", ("min_p", "logit_bias")),
        HasSignature(
            _PROCESSORS,
            "build_logitsprocs",
            ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
            exact=True,
        ),
        HasAttribute(_PROCESSORS, "BUILTIN_LOGITS_PROCESSORS"),
        References("v1/sample/rejection_sampler.py", "RejectionSampler.forward", ("sampler", "bonus_logits")),
    ),
    slots=("speculation",),
    optional=True,
    wraps={
        f"{INPUT_PROCESSOR}:InputProcessor.__init__": _init_processor,
        f"{INPUT_PROCESSOR}:SamplingParams._validate_spec_decode": _validate_spec_decode,
        f"{MODEL_RUNNER}:build_logitsprocs": _build_logitsprocs,
    },
)
