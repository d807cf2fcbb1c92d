"""What a worker process tells about failures of its plugins."""

from __future__ import annotations

from typing import Any

from vllm_instant.containment import failure_counts
from vllm_instant.seams.draft_sharing import SHARER_ATTRIBUTE, DraftSharer
from vllm_instant.seams.drafter import PluginDrafter


def read_failures(worker: Any) -> list[dict[str, Any]]:
    """For ``collective_rpc``: the failures of this worker's drafter plugin."""
    runner = getattr(worker, "model_runner", None)
    holders = (getattr(runner, "drafter", None), getattr(runner, SHARER_ATTRIBUTE, None))
    return failure_counts(*(holder.drafter for holder in holders if isinstance(holder, PluginDrafter | DraftSharer)))
