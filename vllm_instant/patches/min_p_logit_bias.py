"""Requests with ``min_p`` or ``logit_bias`` are served beside speculation: they get no drafts.

vLLM refuses them on a server that speculates, because its rejection sampler applies neither to draft tokens. A request
without drafts needs neither there: its one token a step is sampled by the ordinary sampler, which applies both if the
processors are loaded. So they are loaded, the refusal is lifted, and ``patches.scheduler`` gives such requests no
drafts.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.import_hooks import when_imported

INPUT_PROCESSOR_MODULE = "vllm.v1.engine.input_processor"
MODEL_RUNNER_MODULE = "vllm.v1.worker.gpu_model_runner"
MIN_MIN_P = 1e-5
"""vLLM ignores smaller values (``_SAMPLING_EPS``)."""

_served = False
"""Whether this process's engine serves such requests."""


def needs_no_drafts(sampling: Any) -> bool:
    """Whether vLLM's rejection sampler cannot verify drafts for these ``SamplingParams``; None counts as no."""
    return sampling is not None and (sampling.min_p > MIN_MIN_P or bool(sampling.logit_bias))


def _lift_refusal(module: ModuleType) -> None:
    processor, params = module.InputProcessor, module.SamplingParams
    initialize, validate = processor.__init__, params._validate_spec_decode

    @functools.wraps(initialize)
    def initialize_and_ask(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        global _served
        initialize(self, vllm_config, *args, **kwargs)
        _served = _served_by(vllm_config)

    @functools.wraps(validate)
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not _served:
            validate(self, speculative_config)

    processor.__init__ = initialize_and_ask
    params._validate_spec_decode = _validate_spec_decode


def _served_by(vllm_config: Any) -> bool:
    """Whether the engine of this configuration has our scheduler and the V1 runner."""
    from vllm_instant.patches.scheduler import QUALIFIED_NAME

    return (
        deployment_env.get_deployment() is not None
        and vllm_config.scheduler_config.scheduler_cls == QUALIFIED_NAME
        and not vllm_config.use_v2_model_runner
    )


def _load_processors(module: ModuleType) -> None:
    build = module.build_logitsprocs

    @functools.wraps(build)
    def build_logitsprocs(
        vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom_logitsprocs: Any = ()
    ) -> Any:
        if is_pooling_model or custom_logitsprocs or not _served_by(vllm_config):
            return build(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

        return LogitsProcessors(kind(vllm_config, device, is_pin_memory) for kind in BUILTIN_LOGITS_PROCESSORS)

    module.build_logitsprocs = build_logitsprocs  # type: ignore[attr-defined]


def install() -> None:
    """Change the input processor and the model runner when they are loaded."""
    when_imported(INPUT_PROCESSOR_MODULE, _lift_refusal)
    when_imported(MODEL_RUNNER_MODULE, _load_processors)


_PROCESSORS = "v1/sample/logits_processor/__init__.py"

PATCH = VllmPatch(
    name="undrafted sampling",
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
)
