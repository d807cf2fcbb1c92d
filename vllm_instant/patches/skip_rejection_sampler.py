"""Sample steps without drafts as a server without speculation does (V1 runner, synchronous scheduling).

Once a server has a speculative method, vLLM's model runner sends every step through its rejection sampler, including
steps without drafts: the ordinary sampler runs inside it, surrounded by index bookkeeping, copies and an empty
verification. A policy that stops drafting because drafts do not pay off should not keep this overhead.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.names import MODEL_RUNNER


def _sample(sample: Any, runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
    has_no_drafts = (
        spec_decode_metadata is not None
        # Under asynchronous scheduling the code after it expects the rejection sampler's padded width.
        and not runner.use_async_scheduling
        and not any(spec_decode_metadata.num_draft_tokens)
    )
    return sample(logits, None if has_no_drafts else spec_decode_metadata)


_RUNNER = "v1/worker/gpu_model_runner.py"

PATCH = VllmPatch(
    name="skip_rejection_sampler",
    purpose="steps without drafts are sampled without the rejection sampler",
    requirements=(
        HasSignature(_RUNNER, "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata"), exact=True),
        References(_RUNNER, "GPUModelRunner._sample", ("sampler", "rejection_sampler", "sampling_metadata")),
        References(_RUNNER, "GPUModelRunner._bookkeeping_sync", ("max_gen_len", "use_async_scheduling")),
        HasAttribute("v1/spec_decode/metadata.py", "SpecDecodeMetadata.num_draft_tokens"),
    ),
    slots=("speculation",),
    optional=True,
    wraps={f"{MODEL_RUNNER}:GPUModelRunner._sample": _sample},
)
