"""``hybrid`` as a plugin: its options, and how it is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from vllm_instant import Deployment, Plugin, PluginContext
from vllm_instant_plugins import draft_folder
from vllm_instant_plugins.hybrid.drafter import LookupHybridDrafter
from vllm_instant_plugins.suffix.plugin import SuffixOptions
from vllm_instant_plugins.suffix.plugin import build as build_lookup


class HybridOptions(SuffixOptions):
    """Options of ``hybrid``."""

    model: str = Field(description="Draft model: a folder or a Hugging Face name; same tokenizer as the target.")
    num_speculative_tokens: int = Field(
        8, ge=1, le=128, description="Maximum number of draft tokens per request and step."
    )
    draft_sample_method: Literal["greedy", "probabilistic"] | None = Field(
        None, description="How the draft model's tokens are chosen at temperature > 0; vLLM's default if not set."
    )


def _engine_arguments(options: HybridOptions) -> Mapping[str, Any]:
    speculative: dict[str, Any] = {
        "method": "draft_model",
        "model": options.model,
        "num_speculative_tokens": options.num_speculative_tokens,
    }
    if options.draft_sample_method is not None:
        speculative["draft_sample_method"] = options.draft_sample_method
    # The lookup needs each step's tokens on the host before the next one begins.
    return {"speculative_config": speculative, "async_scheduling": False}


def _build(options: HybridOptions, context: PluginContext) -> LookupHybridDrafter:
    return LookupHybridDrafter(build_lookup(options, context), context.num_speculative_tokens)


def validate(deployment: Deployment) -> Iterable[str]:
    """A draft model that is written as a path must exist."""
    choice = deployment.slots["drafter"]
    if choice.plugin == PLUGIN.name:
        yield from draft_folder.validate_option(choice.options["model"])


PLUGIN = Plugin(
    slot="drafter",
    name="hybrid",
    summary="lookup or draft model, for each request and step whichever is expected to gain more",
    options=HybridOptions,
    build=_build,
    engine_arguments=_engine_arguments,
    confident=True,
)
