"""The rejection samplers as plugins."""

from __future__ import annotations

from pydantic import Field

from vllm_instant import Plugin, PluginContext, PluginOptions, RejectionSampler


class RelaxedOptions(PluginOptions):
    """Options of ``relaxed``."""

    epsilon: float = Field(
        ge=0, le=1, description="Limit of the total variation between each token's distribution and the model's."
    )


# PyTorch takes a second to import, which commands that only list plugins do not need.


def _token(options: PluginOptions, context: PluginContext) -> RejectionSampler:
    from vllm_instant_plugins.samplers.token import TokenSampler

    return TokenSampler()


def _block(options: PluginOptions, context: PluginContext) -> RejectionSampler:
    from vllm_instant_plugins.samplers import block, residuals

    residuals.compile_for(context.device)
    return block.BlockSampler()


def _relaxed(options: RelaxedOptions, context: PluginContext) -> RejectionSampler:
    from vllm_instant_plugins.samplers import relaxed, residuals

    residuals.compile_for(context.device)
    return relaxed.RelaxedSampler(options.epsilon)


PLUGINS = (
    Plugin(
        slot="rejection_sampler",
        name="block",
        summary="block verification: a draft is verified as a whole, which accepts more tokens; lossless",
        build=_block,
    ),
    Plugin(
        slot="rejection_sampler",
        name="token",
        summary="verification token by token; lossless",
        build=_token,
    ),
    Plugin(
        slot="rejection_sampler",
        name="relaxed",
        summary="accepts more, within a total variation of epsilon of the model for each token",
        lossy=True,
        options=RelaxedOptions,
        build=_relaxed,
    ),
)
