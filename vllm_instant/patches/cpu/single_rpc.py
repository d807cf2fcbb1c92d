"""One message to the workers a step, where vLLM sends two or three (CPU, synchronous scheduling).

vLLM's engine core asks its workers to run the model, then to sample, then for the drafts, and waits each time. On a GPU
the first question returns before the device is done. On a CPU each of them is a pause: the worker has nothing to do
until the engine core has read one answer and written the next question, and both compete for cores with whoever watches
a queue. So a worker samples as soon as the model has run, unless a grammar's bitmask is on its way, and its drafts
travel with the tokens.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.import_hooks import when_imported

RUNNER_MODULE = "vllm.v1.worker.cpu_model_runner"
CORE_MODULE = "vllm.v1.engine.core"
SCHEDULER_MODULE = "vllm.v1.core.sched.scheduler"
DRAFTS = "instant_drafts"
"""On a ``ModelRunnerOutput``, and then on the scheduler until they are fetched: a step's ``DraftTokenIds``, or None."""
NOT_SENT = object()


def _wrap_runner(module: ModuleType) -> None:
    runner_class = module.CPUModelRunner
    execute, sample = runner_class.execute_model, runner_class.sample_tokens

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        output = execute(self, scheduler_output, *args, **kwargs)
        waits_for_sampling = output is None and self.execute_model_state is not None
        if waits_for_sampling and _may_sample(self) and not scheduler_output.has_structured_output_requests:
            return self.sample_tokens(None)
        return output

    @functools.wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample(self, *args, **kwargs)
        if self.num_spec_tokens and _may_sample(self) and hasattr(output, "sampled_token_ids"):
            setattr(output, DRAFTS, self.take_draft_token_ids())
        return output

    runner_class.execute_model, runner_class.sample_tokens = execute_model, sample_tokens


def _may_sample(runner: Any) -> bool:
    """Whether nobody counts on two questions.

    Overlapping batches (asynchronous scheduling, pipeline parallelism) are asked for their tokens in any case, and what
    each worker of a KV connector answers to both is collected.
    """
    config = runner.vllm_config
    return bool(config.max_concurrent_batches == 1 and config.kv_transfer_config is None)


def _wrap_scheduler(module: ModuleType) -> None:
    update = module.Scheduler.update_from_output

    @functools.wraps(update)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        setattr(self, DRAFTS, getattr(model_runner_output, DRAFTS, NOT_SENT))
        return update(self, scheduler_output, model_runner_output)

    module.Scheduler.update_from_output = update_from_output


def _wrap_core(module: ModuleType) -> None:
    post_step = module.EngineCore.post_step

    @functools.wraps(post_step)
    def post_step_with_what_came(self: Any, model_executed: bool) -> None:
        drafts = getattr(self.scheduler, DRAFTS, NOT_SENT)
        if drafts is NOT_SENT or not model_executed:
            post_step(self, model_executed)
            return
        setattr(self.scheduler, DRAFTS, NOT_SENT)
        if drafts is not None and not getattr(self.scheduler, "instant_nothing_to_draft", False):
            self.scheduler.update_draft_token_ids(drafts)

    module.EngineCore.post_step = post_step_with_what_came


def install() -> None:
    """Change the CPU's model runner, the scheduler and the engine core when they are loaded."""
    when_imported(RUNNER_MODULE, _wrap_runner)
    when_imported(SCHEDULER_MODULE, _wrap_scheduler)
    when_imported(CORE_MODULE, _wrap_core)


_RUNNER = "v1/worker/gpu_model_runner.py"
_CORE = "v1/engine/core.py"

PATCH = VllmPatch(
    name="worker messages",
    purpose="one message a step to the workers of the CPU build",
    requirements=(
        HasAttribute("v1/worker/cpu_model_runner.py", "CPUModelRunner"),
        HasSignature(_RUNNER, "GPUModelRunner.execute_model", ("self", "scheduler_output")),
        HasSignature(_RUNNER, "GPUModelRunner.sample_tokens", ("self", "grammar_output"), exact=True),
        HasSignature(_RUNNER, "GPUModelRunner.take_draft_token_ids", ("self",), exact=True),
        References(_RUNNER, "GPUModelRunner.sample_tokens", ("execute_model_state", "propose_draft_token_ids")),
        References(_RUNNER, "GPUModelRunner.execute_model", ("execute_model_state",)),
        References(_CORE, "EngineCore.step", ("execute_model", "sample_tokens", "model_output", "get_grammar_bitmask")),
        HasSignature(_CORE, "EngineCore.post_step", ("self", "model_executed"), exact=True),
        References(_CORE, "EngineCore.post_step", ("take_draft_token_ids", "update_draft_token_ids")),
        HasSignature(
            "v1/core/sched/scheduler.py",
            "Scheduler.update_from_output",
            ("self", "scheduler_output", "model_runner_output"),
            exact=True,
        ),
        HasAttribute("config/vllm.py", "VllmConfig.max_concurrent_batches"),
        HasAttribute("v1/core/sched/output.py", "SchedulerOutput.has_structured_output_requests"),
        HasAttribute("v1/outputs.py", "ModelRunnerOutput.sampled_token_ids"),
    ),
    optional=True,
)
