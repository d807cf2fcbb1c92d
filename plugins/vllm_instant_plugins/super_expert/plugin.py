"""The plugins ``super_expert`` and ``observed``: their options and how they are built."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from vllm_instant import Plugin, PluginContext, PluginOptions
from vllm_instant.interfaces.experts import ExpertRouter


class SuperExpertOptions(PluginOptions):
    """Options of ``super_expert``."""

    budget: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Maximum fraction of a layer's experts that the decoding tokens of one step may use together.",
    )
    keep: int = Field(1, ge=0, description="Number of top-ranked experts per token that the budget never drops.")
    clusters: str | None = Field(
        None, description="Path of the expert-groups file written by `vllm-instant experts learn`; optional."
    )
    cohesion: float = Field(
        0.0,
        ge=0,
        description="Weight with which the demand for an expert's group (from the clusters file) adds to the demand "
        "for the expert itself.",
    )
    max_kl: float = Field(
        0.02,
        gt=0,
        description="Quality budget: maximum mean KL divergence of the next-token distribution from the model's own "
        "routing, in nats per token. If it is exceeded, more experts are allowed.",
    )
    min_kept_mass: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Further quality budget: minimum fraction of the router's weights that the experts in use must "
        "keep; 0 for no limit.",
    )
    gate: bool = Field(
        True, description="Whether the quality budget is enforced; set it to false only to measure without it."
    )
    shadow_every: int = Field(
        100,
        ge=0,
        description="Interval, in steps, of the reference passes that run the model with its own routing to measure "
        "the KL divergence; 0 for none, which leaves min_kept_mass as the only quality budget.",
    )
    adjustable: bool = Field(
        False, description="Whether POST /v1/instant/experts may change budget and shadow_every while serving."
    )


class ObservedOptions(PluginOptions):
    """Options of ``observed``."""

    trace: str | None = Field(
        None, description="Path of the file to which the picked experts are recorded; by default nothing is recorded."
    )
    tokens: int = Field(
        100_000, ge=1, description="Maximum number of tokens in the trace; recording ends when it is full."
    )
    share: float = Field(1.0, gt=0, le=1, description="Fraction of the decoded tokens that is recorded.")
    prefill_share: float = Field(0.1, ge=0, le=1, description="Fraction of the prompt tokens that is recorded.")
    adjustable: bool = Field(
        False, description="Whether POST /v1/instant/experts may write the trace or reset numbers while serving."
    )


# The routers are imported when they are built: PyTorch takes a second to load, which listing plugins does not need.


def _super_expert(options: SuperExpertOptions, context: PluginContext) -> ExpertRouter:
    from vllm_instant.moe.expert_groups import SuperExperts
    from vllm_instant_plugins.super_expert.quality_gate import QualityGate
    from vllm_instant_plugins.super_expert.router import SuperExpertRouter

    clusters = SuperExperts.read(Path(options.clusters).expanduser()) if options.clusters else None
    return SuperExpertRouter(
        options.budget,
        options.keep,
        QualityGate(options.budget, options.max_kl, options.min_kept_mass) if options.gate else None,
        clusters,
        options.cohesion,
        options.shadow_every,
        options.adjustable,
    )


def _observed(options: ObservedOptions, context: PluginContext) -> ExpertRouter:
    from vllm_instant_plugins.super_expert.trace_recorder import TraceRecorder

    file = Path(options.trace).expanduser() if options.trace else None
    return TraceRecorder(file, options.tokens, options.share, options.prefill_share, context.model)


PLUGINS = (
    Plugin(
        slot="experts",
        name="super_expert",
        summary="fewer distinct experts per step within a measured quality budget; an answer depends on the other "
        "requests of its batch",
        lossy=True,
        options=SuperExpertOptions,
        build=_super_expert,
    ),
    Plugin(
        slot="experts",
        name="observed",
        summary="the model's own routing, counted for the metrics and for `goodput`, and optionally recorded to a file",
        options=ObservedOptions,
        build=_observed,
    ),
)
