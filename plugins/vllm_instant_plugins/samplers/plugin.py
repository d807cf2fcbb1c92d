"""The rejection samplers as plugins."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_instant import Plugin, PluginContext, PluginOptions, RejectionSampler


class RelaxedOptions(PluginOptions):
    """Options of ``relaxed``."""

    epsilon: float = Field(
        ge=0, le=1, description="Limit of the total variation between each token's distribution and the model's."
    )


class CascadeOptions(RelaxedOptions):
    """Options of ``cascade``."""

    rule: Literal["chow", "opt", "token"] = Field(
        "opt",
        description="Where the draft model is kept: where its confidence is at least 1 - alpha (chow), where the "
        "target gains at most alpha per rejection (opt), or for tokens with at least 1 - alpha of the target's highest "
        "probability (token).",
    )
    alpha: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="How readily the draft model is kept; higher keeps it more often."
    )
    greedy: Literal["exact", "cascade"] = Field(
        "exact",
        description="Whether greedy requests keep the model's first choices only, or also draft tokens that lack at "
        "most epsilon of the first choice's probability.",
    )
    seeded: Literal["exact", "cascade"] = Field(
        "exact",
        description="Whether a seed gives the same answer each time, or its requests are sampled like others.",
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


def _cascade(options: CascadeOptions, context: PluginContext) -> RejectionSampler:
    from vllm_instant_plugins.samplers import cascade, residuals

    residuals.compile_for(context.device)
    sampler = cascade.CascadeSampler if options.greedy == "exact" else cascade.GreedyCascadeSampler
    return sampler(options.rule, options.alpha, options.epsilon, keeps_seeds=options.seeded == "exact")


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
    Plugin(
        slot="rejection_sampler",
        name="cascade",
        summary="keeps the draft model's tokens where a deferral rule trusts them, within epsilon as relaxed",
        lossy=True,
        options=CascadeOptions,
        build=_cascade,
    ),
)
