"""Report the passes of a draft model and failures of plugins from the workers to the scheduler.

Reports travel with the drafts. Periodic requests to the workers would keep them awake: a vLLM worker polls its queue
for a second after each message, which takes a CPU core.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.deployment.circuit_breaker import failure_counts
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.drafter import PluginDrafter
from vllm_instant.patches.hybrid_drafting import HYBRID_ATTRIBUTE, HybridDraftRunner
from vllm_instant.patches.names import MODEL_RUNNER, REPORT_ATTRIBUTE
from vllm_instant.patches.rejection_sampler import SAMPLER_ATTRIBUTE
from vllm_instant.speculation.draft_plan import DraftReport


def report_of(runner: Any) -> DraftReport | None:
    """The report of a model runner; None if no plugin drafts or verifies there."""
    sampler = getattr(getattr(runner, "rejection_sampler", None), SAMPLER_ATTRIBUTE, None)
    hybrid = getattr(runner, HYBRID_ATTRIBUTE, None)
    if isinstance(hybrid, HybridDraftRunner):
        return DraftReport(hybrid.draft_steps, hybrid.uncached_tokens, failure_counts(hybrid.drafter, sampler))
    drafter = getattr(runner, "drafter", None)
    if isinstance(drafter, PluginDrafter):
        return DraftReport(failures=failure_counts(drafter.drafter, sampler))
    return None if sampler is None else DraftReport(failures=failure_counts(sampler))


def _take_draft_token_ids(take: Any, runner: Any) -> Any:
    taken = take()
    report = report_of(runner) if taken is not None else None
    if report is not None:
        setattr(taken, REPORT_ATTRIBUTE, report)
    return taken


PATCH = VllmPatch(
    name="worker_reports",
    purpose="the metrics and the policy learn of failures in workers and of passes of a hybrid drafter's model",
    requirements=(
        HasSignature("v1/worker/gpu_model_runner.py", "GPUModelRunner.take_draft_token_ids", ("self",), exact=True),
        References("v1/engine/core.py", "EngineCore.post_step", ("take_draft_token_ids", "update_draft_token_ids")),
        HasAttribute("v1/outputs.py", "DraftTokenIds.draft_token_ids"),
    ),
    slots=("drafter", "rejection_sampler"),
    optional=True,
    wraps={f"{MODEL_RUNNER}:GPUModelRunner.take_draft_token_ids": _take_draft_token_ids},
)
