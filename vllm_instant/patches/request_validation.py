"""Check a request's ``vllm_xargs`` in the API server, where a refusal is an HTTP 400."""

from __future__ import annotations

from typing import Any

from vllm_instant.patches.compat import HasAttribute, HasSignature, VllmPatch
from vllm_instant.patches.names import INPUT_PROCESSOR
from vllm_instant.scheduling.request_registry import hinted_output_tokens
from vllm_instant.speculation.draft_budget import requested_num_draft_tokens
from vllm_instant.speculation.pushed_drafts import draft_key_of


def _process_inputs(
    process: Any, processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    try:
        extra_args = getattr(params, "extra_args", None)
        requested_num_draft_tokens(extra_args)
        hinted_output_tokens(extra_args)
        draft_key_of(extra_args)
    except ValueError as error:
        from vllm.exceptions import VLLMValidationError

        # Any other exception would be an internal server error here.
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    return process(request_id, prompt, params, *args, **kwargs)


PATCH = VllmPatch(
    name="request_validation",
    purpose="invalid vllm_xargs of this package are refused",
    requirements=(
        HasSignature(
            "v1/engine/input_processor.py", "InputProcessor.process_inputs", ("self", "request_id", "prompt", "params")
        ),
        HasAttribute("exceptions.py", "VLLMValidationError"),
    ),
    slots=("speculation", "batching"),
    optional=True,
    wraps={f"{INPUT_PROCESSOR}:InputProcessor.process_inputs": _process_inputs},
)
