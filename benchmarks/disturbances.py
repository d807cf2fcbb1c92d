"""Servers that are disturbed on purpose, at known times, under open-loop traffic.

Every disturbance works on stock vLLM. What is recorded is what a load test records
(``vllm_instant_loadtests.run_recorder``), with the disturbances as its events.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from vllm_instant.tools.demo import assets
from vllm_instant.tools.measure.open_loop import OpenLoopRequest, OpenLoopResult, follow_all, open_client
from vllm_instant.tools.measure.prompts import snippets
from vllm_instant.tools.measure.servers import Server
from vllm_instant_loadtests import causes
from vllm_instant_loadtests.prompts import creative, long
from vllm_instant_loadtests.run_recorder import Disturbance, GeneratorSample, RecordedRequest, RecordedRun, RunRecorder

MODEL = "demo"
WARM_UP = 12.0
"""Seconds of undisturbed traffic before the first disturbance."""
QUIET = (6.5, 9.0)
"""Seconds between the end of a disturbance and the next."""
TIMER, READING = 0.05, 0.5


@dataclass(frozen=True)
class Life:
    """A kind of server, its traffic, and the disturbances that it can show."""

    arguments: tuple[str, ...]
    rate: float
    """Requests per second."""
    tokens: tuple[int, int]
    causes: tuple[str, ...]
    drafts: int = 0


LIVES = {
    "drafting": Life(
        ("--max-num-seqs", "24"),
        1.0,
        (90, 130),
        (causes.ACCEPTANCE, causes.BATCH, causes.PREFILL, causes.STOPPED, causes.CLIENT, causes.DISCONNECTS),
        drafts=3,
    ),
    "few seats": Life(
        ("--max-num-seqs", "4"),
        1.2,
        (40, 64),
        (causes.QUEUEING, causes.PREFILL, causes.STOPPED, causes.CLIENT),
    ),
    "little cache": Life(
        ("--max-num-seqs", "16", "--num-gpu-blocks-override", "40", "--max-model-len", "1024"),
        1.2,
        (40, 64),
        (causes.MEMORY, causes.STOPPED, causes.CLIENT),
    ),
}


@dataclass
class Plan:
    """Requests and disturbances of one run, on the run's clock."""

    requests: list[OpenLoopRequest]
    actions: list[Disturbance] = field(default_factory=list)
    """Disturbances that are not requests: pauses."""
    events: list[tuple[str, float, float, str]] = field(default_factory=list)
    """All disturbances: cause, when it begins, when it was meant to end, and the kind of its requests."""
    seconds: float = 0.0


def server(name: str, folder: Path) -> Server:
    """A stock server of the demo's target for one of the lives."""
    life, pair = LIVES[name], assets.prepare()
    arguments = [
        *("--served-model-name", MODEL, "--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching"),
        *(() if "--max-model-len" in life.arguments else ("--max-model-len", "2048")),
        *life.arguments,
    ]
    if life.drafts:
        drafting = {"method": "draft_model", "model": str(pair.draft), "num_speculative_tokens": life.drafts}
        arguments += ["-sc", json.dumps(drafting | {"draft_sample_method": "probabilistic"})]
    return Server(pair.target, arguments, log=folder / f"{name}.log")


def undisturbed(name: str, seconds: float, seed: str) -> Plan:
    """Steady traffic and nothing else: one request in each slot of time, at a random moment of it.

    Poisson's arrivals make bursts by chance, which are spikes in truth and in no list of what was done.
    """
    life, choose = LIVES[name], random.Random(seed)
    prompts = snippets("structured", 0.0, int(life.rate * seconds * 2) + 40, seed)
    requests = [
        _due((slot + choose.random()) / life.rate, "steady", prompts[slot].text, choose.randint(*life.tokens), choose)
        for slot in range(round(life.rate * seconds))
    ]
    return Plan(requests, seconds=seconds)


def disturbed(name: str, wanted: Sequence[str], seed: str) -> Plan:
    """Steady traffic with these disturbances in random order at random times."""
    choose = random.Random(f"{seed}/disturbed")
    order = choose.sample(list(wanted), len(wanted))
    found, at = Plan([]), WARM_UP + choose.uniform(0, 2)
    for number, cause in enumerate(order):
        at = _disturb(found, cause, at, f"{seed}/{number}", choose, LIVES[name]) + choose.uniform(*QUIET)
    plan = undisturbed(name, at, seed)
    swaps = [(begin, end, kind) for cause, begin, end, kind in found.events if cause == causes.ACCEPTANCE]
    kept = [due for due in plan.requests if not any(begin <= due.at < end for begin, end, _ in swaps)]
    found.requests = sorted([*kept, *found.requests], key=lambda due: due.at)
    found.seconds = at
    return found


def _disturb(plan: Plan, cause: str, at: float, seed: str, choose: random.Random, life: Life) -> float:
    """Add one disturbance; returns when it is meant to be over."""
    kind = f"{cause} {len(plan.events)}"
    if cause in (causes.STOPPED, causes.CLIENT):
        seconds = choose.uniform(1.2, 2.4)
        whole = choose.random() < 0.5
        note = "" if cause == causes.CLIENT else "all processes" if whole else "engine core"
        plan.actions.append(Disturbance(MODEL, cause, at, at + seconds, note))
        plan.events.append((cause, at, at + seconds, ""))
        return at + seconds
    if cause == causes.ACCEPTANCE:
        seconds = choose.uniform(4.5, 6.0)
        made, when = creative(60, seed), at
        while when < at + seconds:
            plan.requests.append(_due(when, kind, made.pop(), choose.randint(*life.tokens), choose, temperature=1.0))
            when += choose.uniform(0.5, 1.5) / life.rate
    elif cause == causes.PREFILL:
        seconds = choose.uniform(2.0, 3.0)
        for number, text in enumerate(long(3, seed, 3600)):
            plan.requests.append(_due(at + number * seconds / 3, kind, text, 4, choose))
    elif cause == causes.BATCH:
        seconds = choose.uniform(1.5, 2.5)
        for prompt in snippets("structured", 0.0, 14, seed):
            plan.requests.append(_due(at + choose.uniform(0, seconds), kind, prompt.text, 96, choose))
    elif cause == causes.QUEUEING:
        seconds = choose.uniform(0.5, 1.0)
        for prompt in snippets("structured", 0.0, 10, seed):
            plan.requests.append(_due(at + choose.uniform(0, seconds), kind, prompt.text, 56, choose))
    elif cause == causes.MEMORY:
        seconds = choose.uniform(0.5, 1.0)
        for prompt in snippets("code", 0.0, 9, seed)[:8]:
            plan.requests.append(_due(at + choose.uniform(0, seconds), kind, prompt.text, 220, choose))
    else:  # disconnects
        seconds = choose.uniform(3.0, 4.0)
        for prompt in snippets("structured", 0.0, 36, seed):
            due = _due(at + choose.uniform(0, seconds), kind, prompt.text, 96, choose, leave=choose.randint(2, 16))
            plan.requests.append(due)
    plan.events.append((cause, at, at + seconds, kind))
    # What it leaves behind takes time, too.
    return at + seconds + {causes.MEMORY: 6.0, causes.QUEUEING: 4.0, causes.BATCH: 3.0}.get(cause, 1.5)


def play(target: Server, plan: Plan, folder: Path, about: dict[str, Any]) -> RecordedRun:
    """Send and do all of a plan, record it in ``folder``, and read it again."""
    clock = time.perf_counter() + 1.5
    server_about = {"name": MODEL, "url": target.url, "model": MODEL, "deployment": " ".join(target.arguments)}
    segment = {"server": MODEL, "began": 0.0, "ended": plan.seconds, "from": 0.0, "until": plan.seconds, "number": 0}
    recorder = RunRecorder(folder, about | {"servers": [server_about], "segments": [segment], "clock": clock})
    watching = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm_instant_loadtests.metrics_poller", str(folder)),
            *(f"{MODEL}={target.url}", "--clock", str(clock), "--every", "0.25"),
        ]
    )
    ours = [psutil.Process(), psutil.Process(watching.pid), *_family(target)]
    before = _busy(ours)
    try:
        asyncio.run(_play(target, plan, recorder, clock))
        used, others = (after - earlier for after, earlier in zip(_busy(ours), before, strict=True))
    finally:
        watching.terminate()
        watching.wait()
        recorder.close()
    run = RecordedRun.read(folder)
    run.about["cores_used"] = {"here": round(used / plan.seconds, 3), "elsewhere": round(others / plan.seconds, 3)}
    return run


def _busy(ours: Sequence[psutil.Process]) -> tuple[float, float]:
    """Processor seconds of these processes and of all others, so far: whether the machine was otherwise quiet."""
    times = psutil.cpu_times()
    used = sum(one.cpu_times().user + one.cpu_times().system for one in ours)
    return used, times.user + times.nice + times.system - used


def _family(target: Server) -> list[psutil.Process]:
    front = psutil.Process(target.pid)
    return [front, *front.children(recursive=True)]


async def _play(target: Server, plan: Plan, recorder: RunRecorder, clock: float) -> None:
    ends: dict[str, float] = {}

    def record(followed: OpenLoopResult) -> None:
        ends[followed.kind] = max(ends.get(followed.kind, 0.0), followed.due + followed.ended)
        recorder.add(_request(followed))

    watch = asyncio.create_task(_watch_itself(recorder, clock))
    done = [asyncio.create_task(_act(target, action, clock)) for action in plan.actions]
    async with open_client(target.url, timeout=60.0) as client:
        await follow_all(client, plan.requests, clock, record)
    await asyncio.gather(*done)
    await asyncio.sleep(max(0.0, clock + plan.seconds - time.perf_counter()))
    watch.cancel()
    notes = {action.began: action.note for action in plan.actions}
    for cause, began, ended, kind in plan.events:
        event = Disturbance(MODEL, cause, began, max(ended, ends.get(kind, 0.0)), notes.get(began, ""))
        recorder.add(event)


async def _act(target: Server, action: Disturbance, clock: float) -> None:
    await asyncio.sleep(max(0.0, clock + action.began - time.perf_counter()))
    seconds = action.ended - action.began
    if action.cause == causes.CLIENT:
        time.sleep(seconds)
        return
    family = _family(target)
    if action.note != "all processes":
        family = [process for process in family if "EngineCore" in process.name()]
    if not family:
        raise SystemExit("the engine core has no process of its own that could be paused")
    try:
        for process in family:
            os.kill(process.pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
    finally:
        for process in family:
            os.kill(process.pid, signal.SIGCONT)


async def _watch_itself(recorder: RunRecorder, clock: float) -> None:
    worst, read_at, used = 0.0, time.perf_counter(), time.process_time()
    while True:
        due = time.perf_counter() + TIMER
        await asyncio.sleep(TIMER)
        now = time.perf_counter()
        worst = max(worst, now - due)
        if now - read_at >= READING:
            cpu = time.process_time()
            recorder.add(
                GeneratorSample(round(now - clock, 4), round(worst, 5), round((cpu - used) / (now - read_at), 4))
            )
            worst, read_at, used = 0.0, now, cpu


def _due(
    at: float,
    kind: str,
    prompt: str,
    tokens: int,
    choose: random.Random,
    temperature: float = 0.0,
    leave: int | None = None,
) -> OpenLoopRequest:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "temperature": temperature,
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": choose.getrandbits(31),
    }
    return OpenLoopRequest(at, body, kind, leave)


def _request(followed: OpenLoopResult) -> RecordedRequest:
    due = followed.due
    return RecordedRequest(
        id=followed.id,
        server=MODEL,
        kind=followed.kind,
        route="completions",
        due=round(due, 5),
        sent=round(due + followed.late, 5),
        arrivals=[(due + when, tokens) for when, tokens in followed.arrivals],
        ended=round(due + followed.ended, 5),
        prompt_tokens=followed.prompt_tokens,
        error=followed.error,
        left=followed.left,
        segment=0,
    )
