"""The rejection samplers as plugins."""

from __future__ import annotations

from pydantic import Field

from vllm_instant import Plugin, PluginContext, PluginOptions
from vllm_instant_plugins.samplers import residuals
from vllm_instant_plugins.samplers.block import BlockSampler
from vllm_instant_plugins.samplers.relaxed import RelaxedSampler
from vllm_instant_plugins.samplers.token import TokenSampler


class RelaxedOptions(PluginOptions):
    """Options of ``relaxed``."""

    epsilon: float = Field(
        ge=0, le=1, description="Total variation by which each token's distribution may differ from the model's."
    )


def _block(options: PluginOptions, context: PluginContext) -> BlockSampler:
    residuals.compile_for(context.device)
    return BlockSampler()


def _relaxed(options: RelaxedOptions, context: PluginContext) -> RelaxedSampler:
    residuals.compile_for(context.device)
    return RelaxedSampler(options.epsilon)


PLUGINS = (
    Plugin(
        slot="rejection_sampler",
        name="block",
        summary="a draft is verified as a whole, which keeps more of it; lossless",
        build=_block,
    ),
    Plugin(
        slot="rejection_sampler",
        name="token",
        summary="token by token; lossless",
        build=lambda options, context: TokenSampler(),
    ),
    Plugin(
        slot="rejection_sampler",
        name="relaxed",
        summary="keeps more, within a total variation of epsilon of the model for each token",
        lossy=True,
        options=RelaxedOptions,
        build=_relaxed,
    ),
)
