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
        description="Draft tokens a request gets in every step; all that the drafter can by default.",
    )
    max_batch_size: int | None = Field(
        None, ge=1, description="Draft only while at most this many requests decode together; always by default."
    )


class Fixed(SpeculationPolicy):
    """The same draft length for every request, optionally only in small batches."""

    def __init__(self, num_draft_tokens: int | None, max_batch_size: int | None) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.max_batch_size = max_batch_size

    def get_num_draft_tokens(self, step: UpcomingStep) -> Sequence[int]:
        """The fixed length, or 0 for all when the batch is too large."""
        length = step.max_draft_tokens
        if self.num_draft_tokens is not None:
            length = min(length, self.num_draft_tokens)
        if self.max_batch_size is not None and len(step.requests) > self.max_batch_size:
            length = 0
        return [length] * len(step.requests)


def _build(options: FixedOptions, context: PluginContext) -> Fixed:
    return Fixed(options.num_draft_tokens, options.max_batch_size)


def validate(deployment: Deployment) -> Iterable[str]:
    """``fixed`` cannot hand out more than the drafter can draft."""
    if deployment.slots["speculation"].plugin != "fixed":
        return
    wanted = deployment.slots["speculation"].options.get("num_draft_tokens")
    speculative = engine_arguments(deployment).get("speculative_config")
    most = speculative.get("num_speculative_tokens") if isinstance(speculative, dict) else None
    if isinstance(wanted, int) and isinstance(most, int) and wanted > most:
        yield (
            f"[speculation] num_draft_tokens = {wanted} is more than the {most} that the drafter makes: "
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
