"""Report the numbers of an experts plugin from the workers to the engine core, and pass settings the other way.

Numbers travel with the output of a step (see ``patches.worker_reports`` for why). Settings are rare and use vLLM's
``collective_rpc``.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.interfaces.experts import ExpertCount
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.moe import is_chosen
from vllm_instant.patches.names import EXPERTS_ATTRIBUTE, SCHEDULER, WORKER_BASE

REPORT = "instant_experts_report"
"""On a scheduler: the newest report of its workers."""
METHOD = "instant_experts"
"""The method that is added to vLLM's workers."""


def instant_experts(self: Any, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Pass settings to this worker's experts plugin; returns its description and numbers, None without a plugin."""
    serving = getattr(self.model_runner, EXPERTS_ATTRIBUTE, None)
    return None if serving is None else serving.control(dict(settings))


def count_in(model_runner_output: Any) -> ExpertCount | None:
    """The number of distinct experts that a worker counted in a step; None if it did not count."""
    report = getattr(model_runner_output, EXPERTS_ATTRIBUTE, None)
    count = report and report["count"]
    return ExpertCount(**count) if count else None


def _update_from_output(update: Any, scheduler: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
    report = getattr(model_runner_output, EXPERTS_ATTRIBUTE, None)
    if report is not None and "totals" in report:
        setattr(scheduler, REPORT, report)
    return update(scheduler_output, model_runner_output)


def _extend_worker(module: Any) -> None:
    setattr(module.WorkerBase, METHOD, instant_experts)


PATCH = VllmPatch(
    name="moe_reports",
    purpose="numbers of experts plugins for the metrics, and settings for them",
    requirements=(
        HasSignature(
            "v1/core/sched/scheduler.py",
            "Scheduler.update_from_output",
            ("self", "scheduler_output", "model_runner_output"),
            exact=True,
        ),
        HasAttribute("v1/worker/worker_base.py", "WorkerBase"),
        References("v1/worker/gpu_worker.py", "Worker.load_model", ("model_runner",)),
        References("v1/worker/cpu_worker.py", "CPUWorker.init_device", ("model_runner",)),
        HasSignature("v1/engine/async_llm.py", "AsyncLLM.collective_rpc", ("self", "method", "timeout", "args")),
        HasAttribute("v1/outputs.py", "ModelRunnerOutput.sampled_token_ids"),
    ),
    slots=("experts",),
    optional=True,
    wraps={f"{SCHEDULER}:Scheduler.update_from_output": _update_from_output},
    on_import={WORKER_BASE: _extend_worker},
    is_wanted=is_chosen,
)
