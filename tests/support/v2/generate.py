"""Generate with a chosen model runner and scheduling on the CPU, in this process; prints JSON.

    python -m v2.generate '{"model": …, "runner": "V2", "asynchronous": true, "deployment": …, "prompts": […]}'

Without a deployment vLLM alone answers. Kernels run in Triton's interpreter: a step takes about 0.2 s.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What to serve and what to ask."""

    model: str
    prompts: list[str]
    runner: str = "V2"
    asynchronous: bool = True
    deployment: str | None = None
    speculative_config: dict[str, Any] | None = None
    max_tokens: int = 24
    temperature: float = 0.0
    seeded: bool = False


@dataclass
class Result:
    """What was served and answered."""

    runner: str
    scheduler: str
    asynchronous: bool
    token_ids: list[list[int]]
    totals: dict[str, Any] | None
    draft_model_calls: int = 0
    steps: list[int] = field(default_factory=list)
    """Draft tokens to verify, of each step."""
    proposed: int = 0
    """Draft tokens that the runner verified, read off the scheduler's messages."""
    accepted: int = 0
    sampler_failures: int = 0


def main() -> None:
    """Run the job of the only argument."""
    job = Job(**json.loads(sys.argv[1]))
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "vllm_instant",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if job.runner == "V2" else "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        # The compiler would trace into interpreted kernels.
        "TORCHDYNAMO_DISABLE": "1",
    }
    from v2 import interpreter

    interpreter.offer()
    _keep_asynchronous_scheduling(job.asynchronous)
    print(json.dumps(asdict(_generate(job))))


def _keep_asynchronous_scheduling(asynchronous: bool) -> None:
    """VLLM's CPU platform switches it off; its streams and events have stand-ins, so that it works all the same."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = asynchronous

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _generate(job: Job) -> Result:
    from vllm import LLM, SamplingParams

    arguments: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if job.deployment is not None:
            file = Path(folder) / "deploy.toml"
            file.write_text(job.deployment)
            arguments["additional_config"] = {"vllm_instant": str(file)}
        if job.speculative_config is not None:
            arguments["speculative_config"] = job.speculative_config
        llm = LLM(job.model, enforce_eager=True, max_model_len=256, max_num_seqs=4, dtype="float32", **arguments)
    core = llm.llm_engine.engine_core.engine_core
    result = Result(
        type(core.model_executor.driver_worker.worker.model_runner).__module__,
        type(core.scheduler).__name__,
        bool(core.vllm_config.scheduler_config.async_scheduling),
        [],
        None,
    )
    _count_draft_model_calls(result)
    _record_steps(core.scheduler, result)
    parameters = [
        SamplingParams(
            temperature=job.temperature,
            max_tokens=job.max_tokens,
            ignore_eos=True,
            seed=number if job.seeded else None,
        )
        for number in range(len(job.prompts))
    ]
    answers = llm.generate(job.prompts, parameters, use_tqdm=False)
    result.token_ids = [list(answer.outputs[0].token_ids) for answer in answers]
    totals = getattr(core.scheduler, "instant_totals", None)
    result.totals = totals() if totals is not None else None
    result.sampler_failures = _failures_of_samplers(core.model_executor.driver_worker.worker.model_runner)
    return result


def _failures_of_samplers(runner: Any) -> int:
    """Failures of the V1 runner's rejection sampler plugin; they reach no metric under asynchronous scheduling."""
    guarded = getattr(getattr(runner, "rejection_sampler", None), "instant_plugin", None)
    return int(sum(getattr(guarded, "failures", {}).values())) if guarded is not None else 0


def _count_draft_model_calls(result: Result) -> None:
    """Of the V2 runner's draft model; V1's is counted by the patches' own tests."""
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator

    run = speculator.StandaloneARSpeculator._run_model

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        result.draft_model_calls += 1
        return run(self, *arguments, **options)

    speculator.StandaloneARSpeculator._run_model = counted


def _record_steps(scheduler: Any, result: Result) -> None:
    update = scheduler.update_from_output

    def recorded(scheduler_output: Any, runner_output: Any) -> Any:
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        result.steps.append(sum(map(len, scheduled.values())))
        for request_id, drafts in scheduled.items():
            if request_id in scheduler.requests:
                sampled = runner_output.sampled_token_ids[runner_output.req_id_to_index[request_id]]
                result.proposed += len(drafts)
                result.accepted += len(sampled) - 1
        return update(scheduler_output, runner_output)

    scheduler.update_from_output = recorded


if __name__ == "__main__":
    main()
