"""The policy as a plugin: its options, and how it is built."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from vllm_instant import Plugin, PluginContext, PluginOptions, RequestState, SchedulerSnapshot
from vllm_instant_plugins.similarity.itl_chunking import PacedSimilarityPolicy
from vllm_instant_plugins.similarity.policy import SimilarityPolicy
from vllm_instant_plugins.state_store import PersistentState, default_folder


class SimilarityOptions(PluginOptions):
    """Options of ``similarity``."""

    wait_ratio: float = Field(
        2.0,
        ge=1,
        description="A request waits at most so many times what it would have waited first come, first served",
    )
    wait_seconds: float = Field(1.0, ge=0, description="and so many seconds more.")
    itl_slo_ms: float | None = Field(
        None,
        gt=0,
        description="Goal for the time between tokens, in milliseconds: prompts are read in pieces that keep it. "
        "By default the one of [speculation], if that has one.",
    )
    keep_lengths: bool = Field(True, description="Keep what was learned about output lengths, for the next start.")
    lengths_folder: str | None = Field(None, description="Where it is kept; the user's cache folder by default.")


def warm_up() -> None:
    """Compile the inner loops, or load what was compiled, now: not while a request waits."""
    policy = SimilarityPolicy(2)
    states = [RequestState(f"warm-up {n}", 4, 8, 0.0, index=n, extra_args={"instant_output_tokens": 4}) for n in (0, 1)]
    for state in states:
        policy.enter(state)
    policy.admit(SchedulerSnapshot(states, (), 0.0, 2, 1024))
    policy.started(states[0], 0.0)
    policy.background_work(SchedulerSnapshot(states[1:], states[:1], 0.0, 2, 1024))
    states[0].num_output_tokens = 4
    policy.finished(states[0], 0.1, True)
    policy.close()


def _build(options: SimilarityOptions, context: PluginContext) -> SimilarityPolicy:
    warm_up()
    store = None
    if options.keep_lengths:
        folder = Path(options.lengths_folder).expanduser() if options.lengths_folder else default_folder("lengths")
        # How long answers are depends on the model alone; how long they take is learned again soon.
        store = PersistentState(folder, {"model": context.identity.get("model", context.model)}, "lengths")
    goal = options.itl_slo_ms if options.itl_slo_ms is not None else context.itl_slo_ms
    places, ratio, seconds = context.max_num_seqs, options.wait_ratio, options.wait_seconds
    if goal is None:
        return SimilarityPolicy(places, ratio, seconds, store)
    return PacedSimilarityPolicy(places, goal / 1e3, wait_ratio=ratio, wait_seconds=seconds, store=store)


PLUGIN = Plugin(
    slot="batching",
    name="similarity",
    summary="short and alike first, by learned output lengths; nobody waits much longer than first come, first served",
    options=SimilarityOptions,
    build=_build,
)
