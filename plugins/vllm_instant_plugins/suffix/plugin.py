"""``suffix`` as a plugin: its options, and how it is built."""

from __future__ import annotations

from pydantic import Field

from vllm_instant import DrafterOptions, Plugin, PluginContext
from vllm_instant_plugins.suffix.drafter import SuffixDrafter


class SuffixOptions(DrafterOptions):
    """Options of ``suffix``."""

    num_speculative_tokens: int = Field(
        16, ge=1, le=128, description="Maximum number of draft tokens per request and step."
    )
    history_tokens: int = Field(
        1_000_000, ge=0, description="Tokens of ended requests' outputs that are searched, too; 0 for none."
    )
    across_tenants: bool = Field(
        False, description="Search the outputs of requests with another cache_salt as well; they may shine through."
    )


def build(options: SuffixOptions, context: PluginContext) -> SuffixDrafter:
    """The drafter, with its compiled parts ready."""
    drafter = SuffixDrafter(context.max_model_len, options.history_tokens, options.across_tenants)
    drafter.warm_up()
    return drafter


PLUGIN = Plugin(
    slot="drafter",
    name="suffix",
    summary="what followed the newest tokens before, in the request or in earlier outputs; needs no draft model",
    options=SuffixOptions,
    build=build,
    confident=True,
)
