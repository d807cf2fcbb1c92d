"""``goodput`` as a plugin: its options, and how it is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_instant import FullGraphs, Plugin, PluginContext, PluginOptions, RequestState, StepOutcome, UpcomingStep
from vllm_instant_plugins.goodput.latency_slo import LatencySlo
from vllm_instant_plugins.goodput.policy import GoodputPolicy
from vllm_instant_plugins.state_store import PersistentState, default_folder


class GoodputOptions(PluginOptions):
    """Options of ``goodput``."""

    itl_slo_ms: float | None = Field(
        None, gt=0, description="Goal for a request's mean time between tokens, in milliseconds; none by default."
    )
    ttft_slo_ms: float | None = Field(
        None, gt=0, description="Goal for the time to the first token, in milliseconds; none by default."
    )
    slowest_request: float = Field(
        0.95,
        ge=0,
        le=1,
        description="Lower bound on any request's speed relative to no speculation; 0 maximizes total throughput.",
    )
    log_decisions: bool = Field(False, description="Log every change between drafting and not drafting, with reasons.")
    keep_costs: bool = Field(True, description="Store learned step times on disk for the next start.")
    costs_folder: str | None = Field(
        None, description="Folder of the stored step times; in the user's cache folder by default."
    )
    calibrating: bool = Field(
        False, description="Draft random numbers of tokens to learn all step times, as `vllm-instant calibrate` does."
    )


def warm_up() -> None:
    """Compile the inner loops, or load what was compiled, before the first request."""
    for graphs in (None, FullGraphs((2,), 4)):
        policy = GoodputPolicy(2, 2, LatencySlo(1.0, 1.0), confident_drafts=True, graphs=graphs)
        state = RequestState("warm-up", 1, 8, 0.0)
        policy.enter(state)
        for number in (1, 2, 3):
            [num_draft_tokens] = policy.get_num_draft_tokens(UpcomingStep([state], 2, number=number))
            policy.observe(StepOutcome([state], [1], [1], 2, 1e-3, 1, number, num_draft_tokens))
        policy.costs.estimate(policy.costs.features(1, 8, 0, 0, 1))


def _build(options: GoodputOptions, context: PluginContext) -> GoodputPolicy:
    warm_up()
    slo = None
    if options.itl_slo_ms is not None or options.ttft_slo_ms is not None:
        slo = LatencySlo(_seconds(options.itl_slo_ms), _seconds(options.ttft_slo_ms))
    store = None
    if options.keep_costs:
        folder = Path(options.costs_folder).expanduser() if options.costs_folder else default_folder("costs")
        store = PersistentState(folder, context.identity)
    return GoodputPolicy(
        context.num_speculative_tokens,
        context.max_num_seqs,
        slo,
        store,
        calibrating=options.calibrating,
        log_changes=options.log_decisions,
        confident_drafts=context.confident_drafts,
        self_calibrating=context.self_calibrating_drafts,
        slowest_request=options.slowest_request,
        graphs=context.full_graphs,
        adaptive_verification=context.adaptive_verification,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _calibration_options(options: GoodputOptions) -> Mapping[str, Any]:
    if not options.keep_costs:
        raise ValueError("[speculation] keep_costs = false: what is learned would be lost")
    return {"calibrating": True}


PLUGIN = Plugin(
    slot="speculation",
    name="goodput",
    summary="as many draft tokens as yield more tokens per second, for each request; none where none do",
    options=GoodputOptions,
    build=_build,
    calibration_options=_calibration_options,
)
