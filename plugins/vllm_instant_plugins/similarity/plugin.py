"""The ``similarity`` plugin: its options and how the policy is built from them."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from vllm_instant import Plugin, PluginContext, PluginOptions, RequestState, SchedulerSnapshot
from vllm_instant_plugins.similarity.itl_chunking import ItlChunkingPolicy
from vllm_instant_plugins.similarity.policy import SimilarityPolicy
from vllm_instant_plugins.state_store import PersistentState, default_folder


class SimilarityOptions(PluginOptions):
    """Options of ``similarity``."""

    wait_ratio: float = Field(
        2.0,
        ge=1,
        description="Upper bound on a request's wait, as a multiple of its wait first come, first served; wait_seconds "
        "is added to it.",
    )
    wait_seconds: float = Field(
        1.0, ge=0, description="Seconds added to the upper bound on a request's wait that wait_ratio sets."
    )
    itl_slo_ms: float | None = Field(
        None,
        gt=0,
        description="Goal for the time between tokens, in milliseconds: long prompts are split into chunks that keep "
        "it. By default the itl_slo_ms of [speculation], if that is set.",
    )
    keep_lengths: bool = Field(
        True, description="Whether the learned output lengths are saved to disk for the next start."
    )
    lengths_folder: str | None = Field(
        None, description="Folder of the saved output lengths; by default in the user's cache folder."
    )


def warm_up() -> None:
    """Compile the numba loops, or load them from numba's cache, before the first request arrives."""
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
        # Output lengths depend on the model alone; the time per token is learned again within a few requests.
        store = PersistentState(folder, {"model": context.identity.get("model", context.model)}, "lengths")
    itl_slo_ms = options.itl_slo_ms if options.itl_slo_ms is not None else context.itl_slo_ms
    max_num_seqs, ratio, seconds = context.max_num_seqs, options.wait_ratio, options.wait_seconds
    if itl_slo_ms is None:
        return SimilarityPolicy(max_num_seqs, ratio, seconds, store)
    return ItlChunkingPolicy(max_num_seqs, itl_slo_ms / 1e3, wait_ratio=ratio, wait_seconds=seconds, store=store)


PLUGIN = Plugin(
    slot="batching",
    name="similarity",
    summary="shortest predicted job first, by learned output lengths, with a bounded wait relative to first come, "
    "first served",
    options=SimilarityOptions,
    build=_build,
)
