"""The plugins of the slot ``experts``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from vllm_instant import Plugin, PluginContext, PluginOptions
from vllm_instant.interfaces.experts import ExpertRouter


class SuperExpertOptions(PluginOptions):
    """Options of ``super_expert``."""

    budget: float = Field(
        0.5, gt=0, le=1, description="Experts that the tokens of a step may use in a layer, as a share of all."
    )
    keep: int = Field(1, ge=0, description="Of its own best experts no token is refused so many, whatever the budget.")
    clusters: str | None = Field(
        None, description="What `vllm-instant experts learn` found out about the model; its file. Goes without."
    )
    cohesion: float = Field(
        0.0, ge=0, description="How much the demand for an expert's cluster adds to the demand for itself."
    )
    max_kl: float = Field(
        0.02,
        gt=0,
        description="The quality budget: mean divergence of the next token's distribution from the model's own, in "
        "nats a token. Beyond it the budget of experts is loosened.",
    )
    min_kept_mass: float = Field(
        0.0, ge=0, le=1, description="Quality budget, too: the share of the router's weights that must be kept."
    )
    gate: bool = Field(True, description="Whether the quality budget is enforced; false only to measure.")
    shadow_every: int = Field(
        100,
        ge=0,
        description="One step of so many is run once more with the model's own routing, to measure the divergence; "
        "0 for none, which leaves the gate with the kept mass.",
    )
    adjustable: bool = Field(False, description="Whether POST /v1/instant/experts may change budget and shadow_every.")


class ObservedOptions(PluginOptions):
    """Options of ``observed``."""

    trace: str | None = Field(None, description="The file to write which experts were used into; none by default.")
    tokens: int = Field(100_000, ge=1, description="Tokens that the trace holds; recording ends when it is full.")
    share: float = Field(1.0, gt=0, le=1, description="Share of the answers' tokens that is recorded.")
    prefill_share: float = Field(0.1, ge=0, le=1, description="The same for tokens of prompts.")


# PyTorch takes a second to load, which who only lists plugins need not wait for.


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
    from vllm_instant_plugins.super_expert.trace_recorder import Recorder

    file = Path(options.trace).expanduser() if options.trace else None
    return Recorder(file, options.tokens, options.share, options.prefill_share, context.model)


PLUGINS = (
    Plugin(
        slot="experts",
        name="super_expert",
        summary="fewer distinct experts a step, held to a quality budget by a gate that measures; an answer depends on "
        "what else is in its batch",
        lossy=True,
        options=SuperExpertOptions,
        build=_super_expert,
    ),
    Plugin(
        slot="experts",
        name="observed",
        summary="the model's own routing, counted for the metrics and for `goodput`, and traced into a file if one is "
        "named",
        options=ObservedOptions,
        build=_observed,
    ),
)
