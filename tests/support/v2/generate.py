"""Generate with a chosen model runner and scheduling on the CPU; prints a line of JSON for each job.

    python -m v2.generate '{"model": …, "runner": "V2", "asynchronous": true, "deployment": …, "prompts": […]}' …

Without a deployment vLLM alone answers. Kernels run in Triton's interpreter: a step takes about 0.2 s.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
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
    """Whether every second request is sampled with a seed, at temperature 1."""
    completions: int = 1
    """Completions per prompt."""
    cache_salt: str | None = None
    """Cache salt of all requests."""
    kv_blocks: int | None = None
    """Blocks of 32 tokens in the KV cache; few of them make the scheduler preempt."""
    max_num_seqs: int = 4
    aborted: list[int] = field(default_factory=list)
    """Prompts whose requests are aborted after ``ABORT_AFTER`` steps."""


ABORT_AFTER = 6
OURS = ("/vllm_instant/", "/vllm_instant_plugins/", "/vllm_instant_kernels/")


@dataclass
class Result:
    """What was served and answered."""

    runner: str
    scheduler: str
    asynchronous: bool
    token_ids: list[list[int]]
    totals: dict[str, Any] | None
    draft_model_calls: int = 0
    draft_samples: int = 0
    """Times that the V2 runner's draft model sampled tokens."""
    planned: list[int] = field(default_factory=list)
    """Draft tokens per request that each step was to make; a step in flight at the end is among them."""
    steps: list[int] = field(default_factory=list)
    """Draft tokens to verify, of each step."""
    proposed: int = 0
    """Draft tokens that the runner verified, read off the scheduler's messages."""
    accepted: int = 0
    sampler_failures: int = 0
    drafter_failures: int = 0
    """Failures of a drafter plugin on the device."""
    preempted: int = 0
    host_syncs: list[str] = field(default_factory=list)
    """Operations of this package that would wait for the device in a step."""
    asked_own: int = 0
    """Drafts that a plugin was asked for beside a draft model."""
    used_own: int = 0
    """Those of them that replaced the model's."""
    drafts: str = ""
    """Digest of all drafts that a plugin on the device proposed."""


def main() -> None:
    """Run the jobs, one per argument, each in a fork of this process, which has imported vLLM once."""
    jobs = [Job(**json.loads(word)) for word in sys.argv[1:]]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "vllm_instant",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        # The compiler would trace into interpreted kernels.
        "TORCHDYNAMO_DISABLE": "1",
    }
    from v2 import interpreter

    interpreter.offer()
    import vllm.entrypoints.llm
    import vllm.v1.engine.core  # noqa: F401

    for job in jobs:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
            print(json.dumps(process.submit(_run, job).result()), flush=True)


def _run(job: Job) -> dict[str, Any]:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if job.runner == "V2" else "0"
    _keep_asynchronous_scheduling(job.asynchronous)
    return asdict(_generate(job))


def _keep_asynchronous_scheduling(asynchronous: bool) -> None:
    """VLLM's CPU platform switches it off; its streams and events have stand-ins, so that it works all the same."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = asynchronous

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _generate(job: Job) -> Result:
    from vllm import LLM

    from vllm_instant.patches.v2_drafter import own_drafts

    arguments: dict[str, Any] = {"max_num_seqs": job.max_num_seqs}
    if job.kv_blocks is not None:
        arguments |= {"num_gpu_blocks_override": job.kv_blocks, "block_size": 32}
    with tempfile.TemporaryDirectory() as folder:
        if job.deployment is not None:
            file = Path(folder) / "deploy.toml"
            file.write_text(job.deployment)
            arguments["additional_config"] = {"vllm_instant": str(file)}
        if job.speculative_config is not None:
            arguments["speculative_config"] = job.speculative_config
        llm = LLM(job.model, enforce_eager=True, max_model_len=256, dtype="float32", **arguments)
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
    runner = core.model_executor.driver_worker.worker.model_runner
    _record_host_syncs(runner, result)
    _count_own_drafts(result)
    digest = _record_drafts(runner)
    own = own_drafts(getattr(runner, "speculator", None))
    drafter = own.drafter if own is not None else None
    if drafter is not None:
        drafter.is_timed = False  # calls in Triton's interpreter, beside other tests, are slow
    result.token_ids = _answers(llm.llm_engine, job)
    result.drafts = digest.hexdigest()
    totals = getattr(core.scheduler, "instant_totals", None)
    result.totals = totals() if totals is not None else None
    result.sampler_failures = _failures_of_samplers(runner)
    result.drafter_failures = sum(drafter.failures.values()) if drafter is not None else 0
    return result


def _answers(engine: Any, job: Job) -> list[list[int]]:
    """Token ids of all completions, prompt by prompt; those of aborted requests are left out."""
    from vllm import SamplingParams
    from vllm.inputs import TextPrompt
    from vllm.sampling_params import RequestOutputKind

    for number, prompt in enumerate(job.prompts):
        seed = number if job.seeded and number % 2 else None
        parameters = SamplingParams(
            n=1 if seed is None else job.completions,  # greedy requests have one completion
            temperature=job.temperature if seed is None else 1.0,
            max_tokens=job.max_tokens,
            ignore_eos=True,
            seed=seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        salted = {} if job.cache_salt is None else {"cache_salt": job.cache_salt}
        engine.add_request(str(number), TextPrompt(prompt=prompt, **salted), parameters)
    finished: dict[str, Any] = {}
    steps = 0
    while engine.has_unfinished_requests():
        finished |= {answer.request_id: answer for answer in engine.step() if answer.finished}
        steps += 1
        if steps == ABORT_AFTER and job.aborted:
            engine.abort_request([str(number) for number in job.aborted])
    return [
        list(completion.token_ids)
        for number in range(len(job.prompts))
        if number not in job.aborted
        for completion in finished[str(number)].outputs
    ]


def _record_host_syncs(runner: Any, result: Result) -> None:
    from v2.host_syncs import HostSyncs

    def watched(method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with HostSyncs(OURS) as syncs:
                returned = method(*arguments, **options)
            result.host_syncs += syncs.calls
            return returned

        return call

    for name in ("execute_model", "sample_tokens"):
        setattr(runner, name, watched(getattr(runner, name)))


def _record_drafts(runner: Any) -> Any:
    """A digest to which the drafts of each step are added."""
    from vllm_instant.patches.v2_drafter import PluginSpeculator

    digest = hashlib.sha256()
    speculator = getattr(runner, "speculator", None)
    if isinstance(speculator, PluginSpeculator):
        propose = speculator.propose

        def recorded(*arguments: Any, **options: Any) -> Any:
            drafts = propose(*arguments, **options)
            digest.update(drafts.numpy().tobytes())
            return drafts

        speculator.propose = recorded
    return digest


def _count_own_drafts(result: Result) -> None:
    from vllm_instant.patches import v2_hybrid

    mixed = v2_hybrid.mixed

    def counted(drafts: Any, own: Any, chosen: Any, *arguments: Any) -> Any:
        result.asked_own += len(chosen)
        result.used_own += int(chosen.numpy().sum())
        return mixed(drafts, own, chosen, *arguments)

    v2_hybrid.mixed = counted


def _failures_of_samplers(runner: Any) -> int:
    """Failures of the V1 runner's rejection sampler plugin; they reach no metric under asynchronous scheduling."""
    guarded = getattr(getattr(runner, "rejection_sampler", None), "instant_plugin", None)
    return int(sum(getattr(guarded, "failures", {}).values())) if guarded is not None else 0


def _count_draft_model_calls(result: Result) -> None:
    """Of the V2 runner's draft model; V1's is counted by the patches' own tests."""
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator

    run, sample = speculator.StandaloneARSpeculator._run_model, speculator.StandaloneARSpeculator.sample_draft

    def run_counted(self: Any, *arguments: Any, **options: Any) -> Any:
        result.draft_model_calls += 1
        return run(self, *arguments, **options)

    def sample_counted(self: Any, *arguments: Any, **options: Any) -> Any:
        result.draft_samples += 1
        return sample(self, *arguments, **options)

    speculator.StandaloneARSpeculator._run_model = run_counted
    speculator.StandaloneARSpeculator.sample_draft = sample_counted


def _record_steps(scheduler: Any, result: Result) -> None:
    update, schedule = scheduler.update_from_output, scheduler.schedule

    def scheduled_step(*arguments: Any) -> Any:
        output = schedule(*arguments)
        if output.total_num_scheduled_tokens:
            result.planned.append(output.num_spec_tokens_to_schedule)
        return output

    def recorded(scheduler_output: Any, runner_output: Any) -> Any:
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        result.steps.append(sum(map(len, scheduled.values())))
        result.preempted += len(scheduler_output.preempted_req_ids or ())
        for request_id, drafts in scheduled.items():
            if request_id in scheduler.requests:
                sampled = runner_output.sampled_token_ids[runner_output.req_id_to_index[request_id]]
                result.proposed += len(drafts)
                result.accepted += len(sampled) - 1
        return update(scheduler_output, runner_output)

    scheduler.schedule = scheduled_step
    scheduler.update_from_output = recorded


if __name__ == "__main__":
    main()
