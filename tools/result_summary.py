"""The README's table: the main results, each with its conditions in one line."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from result_tables import Cell, cells_of, interval, runs_of, table
from result_tables_by_part import speeds_by_users

from vllm_instant.tools.measure.statistics import ratio_interval


def summary(folder: Path) -> str:
    """What a plugin brings, in vLLM's figure and ours, with model, device and date."""
    rows = [
        *_promise(folder),
        _regret(folder),
        _queue(folder),
        *_streaming(folder),
        _sampler(folder),
        _experts(folder),
        _capacity(folder),
    ]
    return table(["", "vLLM", "vllm-instant", "ratio", "conditions"], rows)


def _conditions(run: Mapping[str, Any], what: str) -> str:
    return f"{what}; {run['device']}; {run['date']}"


def _one(folder: Path, file: str, **wanted: Any) -> tuple[Mapping[str, Any], Cell]:
    """The newest cell of a result file with these values, and its run."""
    found = [
        (run, cell)
        for run in runs_of(folder, file)
        for cell in cells_of([run])
        if all(cell.get(key) == value for key, value in wanted.items())
    ]
    return found[-1]


def _promise(folder: Path) -> list[list[str]]:
    runs = runs_of(folder, "promise")
    run = [run for run in runs if any(cell["part"] == "warm" for cell in run["measured"])][-1]
    rows = []
    for users, speeds in speeds_by_users(runs, "warm").items():
        figures = [f"{statistics.median(speeds[arm]):.0f} tokens/s" for arm in ("off", "ours")]
        to_off, to_best = (interval(vars(ratio_interval(speeds["ours"], speeds[arm]))) for arm in ("off", "best"))
        name = f"output of {users} user{'s' if users > 1 else ''}: edits, facts as JSON, stories, mixed"
        case = f"SmolLM2-135M-Instruct, default deployment; {to_best} of the best fixed length"
        rows.append([name, *figures, to_off.replace(" [", "× ["), _conditions(run, case)])
    return rows


def _regret(folder: Path) -> list[str]:
    run, cell = _one(folder, "regret", drafter="hopeless", users=8)
    speeds = [f"{cell['arms'][arm]['tokens_per_second']['median']:.0f} tokens/s" for arm in ("off", "ours")]
    ratio = _times(cell["ours_to_off"])
    return ["the same with a useless drafter, 8 users", *speeds, ratio, _conditions(run, "demo target, random drafts")]


def _queue(folder: Path) -> list[str]:
    run, cell = _one(folder, "scheduling", traffic="chat burst", requests=150)
    seconds = [f"{cell['arms'][arm]['mean_latency']['median']:.1f} s" for arm in ("fcfs", "similarity")]
    ratio = _times(cell["against_fcfs"]["similarity"]["mean_latency"])
    name = "mean latency in a burst of 150 chat requests"
    return [name, *seconds, ratio, _conditions(run, "demo target, `similarity`, 8 at a time")]


def _streaming(folder: Path) -> list[list[str]]:
    run, typed = _one(folder, "streaming", plugin="chunked", part="typed")
    arm = "typed, committed at once"
    times = [f"{typed['ms_after_commit'][name]['median']:.0f} ms" for name in ("whole", arm)]
    ratio = _times(typed["after_commit_to_whole"][arm])
    name = f"first token after {typed.get('tokens', 700)} typed tokens"
    first = [name, *times, ratio, _conditions(run, f"{typed.get('model', 'demo target')}, `chunked`")]
    run, beside = _one(folder, "streaming", plugin="chunked", part="background")
    times = [f"{beside['itl_p99_ms'][name]['median']:.0f} ms" for name in ("whole", "streamed")]
    ratio = _times(beside["p99_streamed_to_whole"])
    name = "p99 time between tokens beside 4 such typists"
    return [first, [name, *times, ratio, _conditions(run, f"{beside.get('model', 'demo target')}, `chunked`")]]


def _sampler(folder: Path) -> list[str]:
    case = {"vocabulary": 32_000, "drafts": "sampled", "top_p": None}
    run, vllm = _one(folder, "samplers", sampler="vllm", **case)
    _, block = _one(folder, "samplers", sampler="block", **case)
    times = [f"{cell['milliseconds']['median']:.1f} ms" for cell in (vllm, block)]
    name = "verification of 16 requests with 8 drafts each"
    return [name, *times, _times(block["of_vllm"]), _conditions(run, "no model, vocabulary 32,000, `block`")]


def _experts(folder: Path) -> list[str]:
    run, cell = _one(folder, "experts", part="eager", batch=16, budget=0.5)
    counts = [f"{cell[key]:.1f} experts" for key in ("native_experts", "routed_experts")]
    time = _times({"median": cell["time"]["ratio"], **cell["time"]})
    name = "distinct experts per layer, 16 requests (lossy)"
    return [name, *counts, f"step time {time}", _conditions(run, "demo mixture of experts, `super_expert`")]


def _capacity(folder: Path) -> list[str]:
    [run] = [run for run in runs_of(folder, "startup") if run["name"] == "capacity"]
    by_cache = {row["cache"]: row for row in run["measured"]["rows"]}
    ours = by_cache["fp8_fused"]
    figures = [f"{row['concurrency']:.1f}" for row in (by_cache["BF16 (stock)"], ours)]
    name = "requests of 2,048 tokens in 1 GiB of KV cache (lossy)"
    return [name, *figures, f"{ours['times_bf16']:.2f}×", _conditions(run, "vLLM's start-up figure, `fp8_fused`")]


def _times(value: Mapping[str, float]) -> str:
    return interval(value).replace(" [", "× [")
