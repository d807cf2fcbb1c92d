"""What a worker tells the scheduler about its drafting, beside the drafts: how far it went, and failures of plugins.

It travels with the drafts. Asking the workers for it now and then would keep them from going to sleep: a vLLM worker
watches its queue without a pause for a second after each message, which takes a core.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_instant.deployment.circuit_breaker import failure_counts
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.drafter import PluginDrafter
from vllm_instant.patches.hybrid_drafting import SHARER_ATTRIBUTE, HybridDraftRunner
from vllm_instant.patches.import_hooks import when_imported
from vllm_instant.patches.rejection_sampler import SAMPLER_ATTRIBUTE
from vllm_instant.patches.scheduler import REPORT_ATTRIBUTE
from vllm_instant.speculation.draft_plan import DraftReport

MODEL_RUNNER_MODULE = "vllm.v1.worker.gpu_model_runner"


def report_of(runner: Any) -> DraftReport | None:
    """The report of a model runner; None when no plugin of ours drafts or verifies there."""
    sampler = getattr(getattr(runner, "rejection_sampler", None), SAMPLER_ATTRIBUTE, None)
    sharer = getattr(runner, SHARER_ATTRIBUTE, None)
    if isinstance(sharer, HybridDraftRunner):
        return DraftReport(sharer.draft_steps, sharer.uncached_tokens, failure_counts(sharer.drafter, sampler))
    drafter = getattr(runner, "drafter", None)
    if isinstance(drafter, PluginDrafter):
        return DraftReport(failures=failure_counts(drafter.drafter, sampler))
    return None if sampler is None else DraftReport(failures=failure_counts(sampler))


def _wrap(module: ModuleType) -> None:
    original = module.GPUModelRunner.take_draft_token_ids

    @functools.wraps(original)
    def take_draft_token_ids(self: Any) -> Any:
        taken = original(self)
        report = report_of(self) if taken is not None else None
        if report is not None:
            setattr(taken, REPORT_ATTRIBUTE, report)
        return taken

    module.GPUModelRunner.take_draft_token_ids = take_draft_token_ids


def install() -> None:
    """Wrap the model runner when it is loaded."""
    when_imported(MODEL_RUNNER_MODULE, _wrap)


PATCH = VllmPatch(
    name="draft reports",
    purpose="failures of plugins in workers and passes of a shared draft model reach the metrics and the policy",
    requirements=(
        HasSignature("v1/worker/gpu_model_runner.py", "GPUModelRunner.take_draft_token_ids", ("self",), exact=True),
        References("v1/engine/core.py", "EngineCore.post_step", ("take_draft_token_ids", "update_draft_token_ids")),
        HasAttribute("v1/outputs.py", "DraftTokenIds.draft_token_ids"),
    ),
    slots=("drafter", "rejection_sampler"),
    optional=True,
)
