"""A draft model on vLLM's V2 runner drafts as many tokens as are planned for a step, and none where none are planned.

``StandaloneARSpeculator.propose`` receives the planned number and ignores it: it always drafts
``num_speculative_tokens``. Here a step with ``k`` planned tokens runs ``k`` forward passes of the draft model. With
``k = 0`` it runs one, over the tokens of this step and without sampling, so that its KV cache stays complete: under
asynchronous scheduling the host does not know the accepted tokens from which a skipped draft model could catch up.

EAGLE heads and MTP layers honour the number themselves. Data-parallel ranks with collectives in their layers never get
here with different numbers: ``draft_lengths.fixed_length_reason`` keeps ``num_speculative_tokens`` for them.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.names import V2_DRAFT_MODEL, V2_NGRAM


def _propose(propose: Any, speculator: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Draft tokens, int64 ``[num_reqs, num_speculative_tokens]``; valid are the first ``num_speculative_tokens=``."""
    planned = kwargs.get("num_speculative_tokens")
    configured = speculator.num_speculative_steps
    if planned is None or planned >= configured or kwargs.get("dummy_run"):
        return propose(input_batch, *args, **kwargs)
    drafts = speculator.draft_tokens[: input_batch.num_reqs]
    speculator.num_speculative_steps = max(1, planned)
    if planned == 0:
        # The first forward pass runs for its keys and values; its logits are of no use.
        speculator.sample_draft = lambda *_args, **_kwargs: drafts[:, 0]
    try:
        propose(input_batch, *args, **kwargs)
    finally:
        speculator.num_speculative_steps = configured
        vars(speculator).pop("sample_draft", None)
    return drafts


def _propose_ngram(propose: Any, speculator: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """No lookup in a step without drafts; vLLM replaces what is returned by placeholders."""
    if kwargs.get("num_speculative_tokens") == 0:
        return speculator.drafts[: input_batch.num_reqs]
    return propose(input_batch, *args, **kwargs)


_FILE = "v1/worker/gpu/spec_decode/standalone_ar/speculator.py"
_CLASS = "StandaloneARSpeculator"
_NGRAM_FILE = "v1/worker/gpu/spec_decode/ngram/speculator.py"

PATCH = VllmPatch(
    name="v2_draft_model",
    purpose="vLLM's V2 draft model and n-gram lookup run no more than is planned",
    requirements=(
        HasSignature(_FILE, f"{_CLASS}.propose", ("self", "input_batch")),
        References(_FILE, f"{_CLASS}.propose", ("num_speculative_steps", "draft_tokens", "_prefill")),
        References(_FILE, f"{_CLASS}._prefill", ("sample_draft", "draft_tokens")),
        References(_FILE, f"{_CLASS}._multi_step_decode", ("num_speculative_steps", "draft_tokens")),
        HasSignature(_NGRAM_FILE, "NgramGPUSpeculator.propose", ("self", "input_batch")),
        References(_NGRAM_FILE, "NgramGPUSpeculator.propose", ("drafts",)),
        References(
            "v1/worker/gpu/model_runner.py",
            "GPUModelRunner.sample_tokens",
            ("propose", "num_spec_tokens", "num_speculative_steps"),
        ),
    ),
    slots=("speculation",),
    optional=True,
    wraps={
        f"{V2_DRAFT_MODEL}:{_CLASS}.propose": _propose,
        f"{V2_NGRAM}:NgramGPUSpeculator.propose": _propose_ngram,
    },
)
