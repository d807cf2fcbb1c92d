"""Steps without drafts sample like a server without speculation (V1 runner, synchronous scheduling).

As soon as a server has a speculative method, vLLM's model runner sends every step through its rejection sampler, also
one in which nobody drafted anything: the ordinary sampler runs inside it, with index bookkeeping, copies and a
verification of nothing around it. A policy that stops drafting because it does not pay must not keep paying for that.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.import_hooks import when_imported

MODEL_RUNNER_MODULE = "vllm.v1.worker.gpu_model_runner"


def _wrap(module: ModuleType) -> None:
    original = module.GPUModelRunner._sample

    @functools.wraps(original)
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        # Under asynchronous scheduling what follows expects the rejection sampler's padded width.
        plain = (
            spec_decode_metadata is not None
            and not self.use_async_scheduling
            and not any(spec_decode_metadata.num_draft_tokens)
        )
        return original(self, logits, None if plain else spec_decode_metadata)

    module.GPUModelRunner._sample = _sample


def install() -> None:
    """Wrap the model runner when it is loaded."""
    when_imported(MODEL_RUNNER_MODULE, _wrap)


_RUNNER = "v1/worker/gpu_model_runner.py"

PATCH = VllmPatch(
    name="plain sampling",
    purpose="steps without drafts are sampled without the rejection sampler",
    requirements=(
        HasSignature(_RUNNER, "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata"), exact=True),
        References(_RUNNER, "GPUModelRunner._sample", ("sampler", "rejection_sampler", "sampling_metadata")),
        References(_RUNNER, "GPUModelRunner._bookkeeping_sync", ("max_gen_len", "use_async_scheduling")),
        HasAttribute("v1/spec_decode/metadata.py", "SpecDecodeMetadata.num_draft_tokens"),
    ),
    slots=("speculation",),
    optional=True,
)
