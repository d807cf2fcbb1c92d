"""Speculation policies that do not adapt: ``fixed`` and ``off``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import Field

from vllm_instant import Deployment, Plugin, PluginContext, PluginOptions, SpeculationPolicy, UpcomingStep
from vllm_instant.deployment.resolved import engine_arguments


class FixedOptions(PluginOptions):
    """Options of ``fixed``."""

    num_draft_tokens: int | None = Field(
        None,
        ge=0,
        le=128,
        description="Draft tokens of each request in every step; the drafter's limit by default.",
    )
    max_batch_size: int | None = Field(
        None, ge=1, description="Limit of requests that decode together while drafts are made; no limit by default."
    )


class Fixed(SpeculationPolicy):
    """The same number of draft tokens for every request, optionally only in small batches."""

    def __init__(self, num_draft_tokens: int | None, max_batch_size: int | None) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.max_batch_size = max_batch_size

    def get_num_draft_tokens(self, step: UpcomingStep) -> Sequence[int]:
        """The fixed number, or 0 for all when the batch is too large."""
        num_draft_tokens = step.max_draft_tokens
        if self.num_draft_tokens is not None:
            num_draft_tokens = min(num_draft_tokens, self.num_draft_tokens)
        if self.max_batch_size is not None and len(step.requests) > self.max_batch_size:
            num_draft_tokens = 0
        return [num_draft_tokens] * len(step.requests)


def _build(options: FixedOptions, context: PluginContext) -> Fixed:
    return Fixed(options.num_draft_tokens, options.max_batch_size)


def validate(deployment: Deployment) -> Iterable[str]:
    """``fixed`` cannot grant more draft tokens than the drafter makes."""
    if deployment.slots["speculation"].plugin != "fixed":
        return
    num_draft_tokens = deployment.slots["speculation"].options.get("num_draft_tokens")
    speculative = engine_arguments(deployment).get("speculative_config")
    limit = speculative.get("num_speculative_tokens") if isinstance(speculative, dict) else None
    if isinstance(num_draft_tokens, int) and isinstance(limit, int) and num_draft_tokens > limit:
        yield (
            f"[speculation] num_draft_tokens = {num_draft_tokens} is more than the {limit} that the drafter makes: "
            "raise num_speculative_tokens or lower num_draft_tokens"
        )


PLUGINS = (
    Plugin(
        slot="speculation",
        name="fixed",
        summary="the same number of draft tokens for every request",
        options=FixedOptions,
        build=_build,
    ),
    Plugin(slot="speculation", name="off", summary="no speculation; a configured drafter is not even loaded"),
)
