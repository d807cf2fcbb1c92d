"""What a client may ask of us for one request, checked in the API server: there a refusal is an HTTP 400."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_instant.patches.compat import HasAttribute, HasSignature, VllmPatch
from vllm_instant.patches.import_hooks import when_imported
from vllm_instant.scheduling.request_registry import hinted_output_tokens
from vllm_instant.speculation.draft_budget import requested_num_draft_tokens

MODULE = "vllm.v1.engine.input_processor"


def _wrap(module: ModuleType) -> None:
    process_inputs = module.InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def checked(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            extra_args = getattr(params, "extra_args", None)
            requested_num_draft_tokens(extra_args)
            hinted_output_tokens(extra_args)
        except ValueError as error:
            from vllm.exceptions import VLLMValidationError

            # Any other exception would be an internal server error here.
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        return process_inputs(self, request_id, prompt, params, *args, **kwargs)

    module.InputProcessor.process_inputs = checked


def install() -> None:
    """Check requests once vLLM's input processor is loaded."""
    when_imported(MODULE, _wrap)


PATCH = VllmPatch(
    name="request options",
    purpose="a client's wrong vllm_xargs are refused",
    requirements=(
        HasSignature(
            "v1/engine/input_processor.py", "InputProcessor.process_inputs", ("self", "request_id", "prompt", "params")
        ),
        HasAttribute("exceptions.py", "VLLMValidationError"),
    ),
    slots=("speculation", "batching"),
    optional=True,
)
