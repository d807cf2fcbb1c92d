"""``hybrid`` as a plugin: its options, and how it is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from vllm_instant import Deployment, Plugin, PluginContext
from vllm_instant_plugins import draft_folder
from vllm_instant_plugins.hybrid.drafter import LookupHybridDrafter
from vllm_instant_plugins.suffix.cache_salt_groups import CacheSaltGroups
from vllm_instant_plugins.suffix.plugin import SuffixOptions, device_lookup
from vllm_instant_plugins.suffix.plugin import build as build_lookup

if TYPE_CHECKING:
    from vllm_instant_plugins.hybrid.device_drafter import LookupHybridDeviceDrafter


MODEL_ACCEPTANCE = 0.7
"""Assumed probability that a token of the draft model is accepted if those before it are, until some were verified."""


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
    return {"speculative_config": speculative}


def _build(options: HybridOptions, context: PluginContext) -> LookupHybridDrafter:
    return LookupHybridDrafter(build_lookup(options, context), context.num_speculative_tokens)


def _build_on_device(options: HybridOptions, context: PluginContext) -> LookupHybridDeviceDrafter:
    """The lookup on the device, with its kernels compiled."""
    from vllm_instant_kernels.draft_source import DraftSource
    from vllm_instant_plugins.hybrid.device_drafter import LookupHybridDeviceDrafter

    drafter = LookupHybridDeviceDrafter(
        device_lookup(options, context),
        CacheSaltGroups(options.share_across_cache_salts),
        context.device,
        DraftSource(context.max_num_seqs, context.num_speculative_tokens, MODEL_ACCEPTANCE, context.device),
    )
    drafter.warm_up()
    return drafter


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
    build_on_device=_build_on_device,
    engine_arguments=_engine_arguments,
    confident=True,
)
