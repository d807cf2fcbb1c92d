"""What a worker says of an experts plugin reaches the engine core beside the step's tokens; settings go the other way.

Numbers travel with the output of a step. Asking the workers for them now and then would keep them from going to sleep:
a vLLM worker watches its queue without a pause for a second after each message, which takes a core. Settings are rare,
and take vLLM's own way to the workers.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_instant.interfaces.experts import ExpertCount
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.import_hooks import when_imported
from vllm_instant.patches.moe import SERVING, chosen

SCHEDULER_MODULE = "vllm.v1.core.sched.scheduler"
WORKER_MODULE = "vllm.v1.worker.worker_base"
REPORT = "instant_experts_report"
"""On a scheduler: the newest report of its workers."""
METHOD = "instant_experts"
"""The method that workers get."""


def instant_experts(self: Any, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Hand settings to this worker's experts plugin; what it is and measured, None without one."""
    serving = getattr(self.model_runner, SERVING, None)
    return None if serving is None else serving.control(dict(settings))


def count_in(model_runner_output: Any) -> ExpertCount | None:
    """The distinct experts that a worker counted in a step, if its output says so."""
    report = getattr(model_runner_output, SERVING, None)
    count = report and report["count"]
    return ExpertCount(**count) if count else None


def _wrap_scheduler(module: ModuleType) -> None:
    update = module.Scheduler.update_from_output

    @functools.wraps(update)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        report = getattr(model_runner_output, SERVING, None)
        if report is not None and "totals" in report:
            setattr(self, REPORT, report)
        return update(self, scheduler_output, model_runner_output)

    module.Scheduler.update_from_output = update_from_output


def _extend_worker(module: ModuleType) -> None:
    setattr(module.WorkerBase, METHOD, instant_experts)


def install() -> None:
    """Change the scheduler and the worker when they are loaded, if the deployment names an experts plugin."""
    if chosen() is None:
        return
    when_imported(SCHEDULER_MODULE, _wrap_scheduler)
    when_imported(WORKER_MODULE, _extend_worker)


PATCH = VllmPatch(
    name="expert reports",
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
)
