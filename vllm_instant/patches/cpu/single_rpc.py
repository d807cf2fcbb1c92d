"""One message to the workers per step, where vLLM sends two or three (CPU, synchronous scheduling).

vLLM's engine core requests the forward pass from its workers, then the sampling, then the drafts, and waits each time.
On a GPU the first request returns before the device is done. On a CPU each request is a pause: the worker is idle until
the engine core has read one answer and written the next request, and both compete for cores with processes that poll a
queue. So a worker samples as soon as the model has run, unless a grammar's bitmask will follow, and its drafts travel
with the tokens.
"""

from __future__ import annotations

from typing import Any

from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.names import CPU_MODEL_RUNNER, ENGINE_CORE, SCHEDULER

DRAFTS = "instant_drafts"
"""On a ``ModelRunnerOutput``, and then on the scheduler until they are fetched: a step's ``DraftTokenIds``, or None."""
NOT_SENT = object()


def _execute_model(execute: Any, runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    """Sample at once where vLLM would wait for the engine core's request to do so."""
    output = execute(scheduler_output, *args, **kwargs)
    waits_for_sampling = output is None and runner.execute_model_state is not None
    if waits_for_sampling and _may_sample(runner) and not scheduler_output.has_structured_output_requests:
        return runner.sample_tokens(None)
    return output


def _sample_tokens(sample: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the drafts with the tokens."""
    output = sample(*args, **kwargs)
    if runner.num_spec_tokens and _may_sample(runner) and hasattr(output, "sampled_token_ids"):
        setattr(output, DRAFTS, runner.take_draft_token_ids())
    return output


def _may_sample(runner: Any) -> bool:
    """Whether sampling may follow the forward pass without a request of its own.

    Overlapping batches (asynchronous scheduling, pipeline parallelism) are asked for their tokens in any case, and with
    a KV connector the answers of all workers to both requests are collected.
    """
    config = runner.vllm_config
    return bool(config.max_concurrent_batches == 1 and config.kv_transfer_config is None)


def _update_from_output(update: Any, scheduler: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
    setattr(scheduler, DRAFTS, getattr(model_runner_output, DRAFTS, NOT_SENT))
    return update(scheduler_output, model_runner_output)


def _post_step(post_step: Any, core: Any, model_executed: bool) -> None:
    """Use the drafts that came with the tokens; without any, let vLLM fetch them."""
    drafts = getattr(core.scheduler, DRAFTS, NOT_SENT)
    if drafts is NOT_SENT or not model_executed:
        post_step(model_executed)
        return
    setattr(core.scheduler, DRAFTS, NOT_SENT)
    if drafts is not None and not getattr(core.scheduler, "instant_nothing_to_draft", False):
        core.scheduler.update_draft_token_ids(drafts)


_RUNNER = "v1/worker/gpu_model_runner.py"
_CORE = "v1/engine/core.py"

PATCH = VllmPatch(
    name="cpu_single_rpc",
    purpose="one message per step to the workers of the CPU build",
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
    wraps={
        f"{CPU_MODEL_RUNNER}:CPUModelRunner.execute_model": _execute_model,
        f"{CPU_MODEL_RUNNER}:CPUModelRunner.sample_tokens": _sample_tokens,
        f"{SCHEDULER}:Scheduler.update_from_output": _update_from_output,
        f"{ENGINE_CORE}:EngineCore.post_step": _post_step,
    },
)
