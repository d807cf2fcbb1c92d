"""The tables of ``docs/results.md`` and of the README: one function per table, from the runs of one result file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_instant.tools.bench.plan import BASELINE, OURS
from vllm_instant.tools.bench.report import current_format, format_effect, format_floor, format_number
from vllm_instant.tools.bench.rows import BenchRow

Run = Mapping[str, Any]
Cell = Mapping[str, Any]
Show = Callable[[Sequence[Run]], str]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join(line)} |".replace("|  |", "| |").replace("| --- ", "|---").strip() for line in lines
    )


def runs_table(runs: Sequence[Run]) -> str:
    """What each run of a file belongs to: conditions, command, date, commit, device, versions."""
    rows = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        row = [run["name"], f"`{run['command']}`", run["date"], run["commit"] or "unknown", run["device"], versions]
        rows.append(row)
    return table(["run", "command", "date", "commit", "device", "versions"], rows)


def cells_of(runs: Sequence[Run], name: str | None = None) -> Iterator[Cell]:
    """The cells of all runs, or of those of one name, each with its run's name and device."""
    for run in runs:
        if name in (None, run["name"]):
            for cell in run["measured"]:
                yield {"run": run["name"], "device": run["device"], **cell}


def interval(value: Mapping[str, float] | None, digits: int = 2, scale: float = 1.0) -> str:
    """A median and its interval; the median alone where one round was measured, which has no interval."""
    if value is None:
        return ""
    middle = value["median"] if "median" in value else value.get("mean", value.get("ratio"))
    assert middle is not None
    if value["low"] == middle == value["high"] and middle:
        return f"{scale * middle:.{digits}f}"
    return f"{scale * middle:.{digits}f} [{scale * value['low']:.{digits}f}, {scale * value['high']:.{digits}f}]"


def regret(runs: Sequence[Run]) -> str:
    """Speed relative to the best fixed length, to no speculation and to our own process without drafts."""
    names = {"hopeless": "random tokens", "oracle": "recorded answers", "pair": "draft model", "mixed": "mixed traffic"}
    columns = {
        "ours_to_best": "ours / best vLLM arm",
        "ours_to_off": "ours / no speculation",
        "ours_to_best_pinned": "ours / best pinned arm of the same process",
        "noise_floor": "a second vLLM server / the first",
        "p99_itl_off_to_ours": "p99 time between tokens, no speculation / ours",
    }
    order = ["hopeless", "oracle", "pair", "mixed", "mixed hybrid"]
    cells = sorted(
        cells_of(runs), key=lambda cell: (order.index(cell["drafter"]), cell["model"], cell["run"], cell["users"])
    )
    rows = []
    for cell in cells:
        drafts = names.get(cell["drafter"], "mixed traffic, `hybrid`") + (f", {cell['run']}" if cell["run"] else "")
        asked = [cell["model"], cell["prompts"]]
        rows.append(
            [*asked, drafts, str(cell["users"]), cell["best_arm"], *(interval(cell.get(key)) for key in columns)]
        )
    return table(["model", "prompts", "drafts", "users", "best vLLM arm", *columns.values()], rows)


def cold_start(runs: Sequence[Run]) -> str:
    """The first 200 tokens of each user on servers that have learned nothing, relative to no drafts."""
    names = {"suffix": "`suffix`", "hopeless": "random tokens", "trained": "draft model", "oracle": "recorded answers"}
    rows = []
    for cell in sorted(cells_of(runs), key=lambda cell: (list(names).index(cell["drafter"]), cell["users"])):
        text = "code" if cell["drafter"] == "oracle" else "free text" + (" after code" if cell["after_code"] else "")
        compared = ("to_off_usual", "to_off", "noise_floor", "to_best_fixed")
        relative = [f"{cell[key]['median']:.2f}, {cell[key]['worst']:.2f}" if key in cell else "" for key in compared]
        rows.append(
            [
                names[cell["drafter"]],
                text + (", seeded" if cell["seeded"] else ""),
                cell["stored_costs"],
                str(cell["users"]),
                str(cell["starts"]),
                *relative,
                f"{cell['first_token_to_off']['median']:.2f}",
                " → ".join(f"{cell['slowest_step'][arm]:.1f}" for arm in ("off", "decided")),
                f"{max(cell['drafted_per_user']):.0f} ({max(cell['accepted_per_user']):.0f})",
            ]
        )
    headings = ["drafts", "text", "stored costs", "users", "starts", "decided / off at usual step times: median, worst"]
    headings += [
        "decided / off as measured",
        "off again / off",
        "decided / best fixed number",
        "first token, decided / off",
        "longest of the first 100 steps / median step, off → decided",
        "most drafts per user (accepted)",
    ]
    return table(headings, rows)


def seeds(runs: Sequence[Run]) -> str:
    """Accepted drafts of seeded and unseeded requests, and seeded answers beside those without drafts."""
    rows = [
        [
            cell["prompts"],
            f"temperature {cell['temperature']}, top-p {cell['top_p']}",
            *(interval(cell["accepted_per_draft"][arm]) for arm in ("unseeded", "seeded")),
            interval(cell["kept"]),
            f"{cell['equal_answers']} of {cell['requests']}",
        ]
        for cell in cells_of(runs)
    ]
    headings = ["prompts", "sampling", "accepted per draft, unseeded", "seeded", "seeded / unseeded"]
    return table([*headings, "seeded answers equal to those without drafts"], rows)


def pace_bound(runs: Sequence[Run]) -> str:
    """Total speed, pace by class and time between tokens at several bounds, relative to no drafts."""
    columns = {
        "total as measured": "total speed as measured",
        "total": "at usual step times",
        "pace, free": "pace of free text",
        "pace, code": "of code",
        "pace, structured": "of structured text",
        "pace, slowest request": "of the slowest request",
        "p95 between pieces": "p95 between pieces",
        "p99 between pieces": "p99",
    }
    rows = [
        [cell["bound"], str(cell["users"]), str(cell["rounds"]), *(interval(cell[key]) for key in columns)]
        for cell in cells_of(runs)
    ]
    return table(["bound", "users", "rounds", *columns.values()], rows)


SOURCES = ("suffix", "model", "hybrid")


def drafters(runs: Sequence[Run]) -> str:
    """Accepted draft tokens per step and tokens per second, by class of prompt."""
    rows = []
    for cell in cells_of(runs):
        accepted = []
        for source in SOURCES:
            shares = [f"{cell['acceptance_by_position'][source][place]:.2f}" for place in (0, 1, 3, 7)]
            accepted.append(f"{cell['accepted_per_step'][source]:.2f} ({' '.join(shares)})")
        speeds = [f"{cell['tokens_per_second'][arm]['median']:.0f}" for arm in ("off", *SOURCES)]
        steps = cell.get("ms_per_step", {})
        times = " → ".join(f"{steps[arm]:.0f}" for arm in ("off", "model") if arm in steps)
        draft = cell["run"] or "the model's own"
        rows.append(
            [cell["model"], draft, cell["class"], *accepted, times, *speeds, interval(cell["hybrid_to_better"])]
        )
    return table(
        [
            *("model", "draft model", "prompts", *(f"`{source}` accepts per step" for source in SOURCES)),
            *("ms per step, none → 8 drafts of `model`", "tokens/s without drafts"),
            *(*(f"`{source}`" for source in SOURCES), "`hybrid` / the better of the two"),
        ],
        rows,
    )


def samplers_acceptance(runs: Sequence[Run]) -> str:
    """Accepted tokens of the same drafts, ``token`` → ``block``."""
    lengths = (2, 4, 6, 8)
    cells = {(cell["text"], cell["draft_length"]): cell for cell in cells_of(runs, "acceptance")}
    rows = [[text, *(_gain(cells[text, length]) for length in lengths)] for text in ("code", "structured")]
    return table(["draft length", *map(str, lengths)], rows)


def _gain(cell: Cell) -> str:
    percent = {key: 100 * (value - 1) for key, value in cell["gain"].items()}
    return (
        f"{cell['kept_by_token']:.2f} → {cell['kept_by_block']:.2f} "
        f"(+{percent['mean']:.1f} % [{percent['low']:.1f}, {percent['high']:.1f}])"
    )


def samplers_time(runs: Sequence[Run]) -> str:
    """Milliseconds of verification by vocabulary and sampler."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for cell in cells_of(runs, "time"):
        top_p = "off" if cell["top_p"] is None else str(cell["top_p"])
        row = rows.setdefault((f"{cell['vocabulary']:,}", cell["drafts"], top_p), [])
        ratio = "" if cell["sampler"] == "vllm" else f" ({interval(cell['of_vllm'])}×)"
        row.append(f"{cell['milliseconds']['median']:.1f} ms{ratio}")
    headings = ["vocabulary", "drafts", "top-p", "vLLM", "`token`", "`block`", "`relaxed`"]
    return table(headings, [[*case, *row] for case, row in rows.items()])


def scheduling(runs: Sequence[Run]) -> str:
    """``similarity`` relative to first come, first served in the same server."""
    keys = ("mean_latency", "mean_ttft", "p99_latency", "p99_itl", "throughput")
    rows = []
    for cell in cells_of(runs):
        ratios = cell["against_fcfs"]["similarity"]
        device = cell["device"].partition(",")[0].replace("(R)", "")
        over = max(cell["max_seconds_over_the_bound"]["similarity"])
        seconds = [cell["arms"][arm]["mean_latency"]["median"] for arm in ("fcfs", "similarity")]
        held = "held" if over <= 0 else f"{over:.2f} s over"
        # Earlier runs do not say it: their model was the demo target.
        model = cell.get("model", "demo target")
        sizes = [cell["traffic"], model, str(cell["requests"]), str(cell["rounds"]), device]
        latency = f"{seconds[0]:.1f} → {seconds[1]:.1f} s"
        rows.append([*sizes, latency, *(interval(ratios[key]) for key in keys), held])
    headings = ["traffic", "model", "requests", "rounds", "processor", "mean latency", "ratio"]
    return table(
        [
            *headings,
            "mean time to first token",
            "p99 latency",
            "p99 time between tokens",
            "throughput",
            "bound on waiting",
        ],
        rows,
    )


def simulated_load(runs: Sequence[Run]) -> str:
    """``similarity`` in a simulated server by load."""
    keys = ("mean_latency", "mean_wait", "p99_latency")
    rows = [
        [f"{cell['load']:.1f}", *(f"{cell[key]:.2f} (worst {cell[f'worst_{key}']:.2f})" for key in keys)]
        for cell in cells_of(runs, "load")
    ]
    return table(["share of the capacity", "mean latency", "mean wait", "p99 latency"], rows)


def simulated_bound(runs: Sequence[Run]) -> str:
    """``similarity`` in a simulated burst by bound on waiting."""
    keys = ("mean_latency", "mean_wait", "p99_latency")
    rows = []
    for cell in cells_of(runs, "bound"):
        over = cell["max_seconds_over_2x_plus_1"]
        row = [cell["bound"], cell["lengths"], *(f"{cell[key]:.2f}" for key in keys)]
        rows.append([*row, "held" if over <= 0 else f"{over:.1f} s over"])
    return table(["bound", "lengths", "mean latency", "mean wait", "p99 latency", "2× + 1 s"], rows)


def policy(runs: Sequence[Run]) -> str:
    """Microseconds of planning and learning of the ``goodput`` policy."""
    rows = []
    for cell in cells_of(runs, "policy"):
        hopeless = cell["hopeless_drafts"]
        figures = [part[key]["median"] for part in (cell, hopeless) for key in ("planning_us", "learning_us")]
        rows.append([str(cell["requests"]), *(f"{figure:.0f} µs" for figure in figures)])
    headings = ["requests", "planning", "learning", "planning, no draft accepted", "learning, no draft accepted"]
    return table(headings, rows)


def schedulers(runs: Sequence[Run]) -> str:
    """Milliseconds per step of vLLM's scheduler and ours, with budgets and with the queue."""
    rows = []
    for cell in [*cells_of(runs, "scheduler"), *cells_of(runs, "queue")]:
        if "drafts" in cell:
            case = f"draft budgets, {cell['running']} running, {cell['drafts']} drafts each"
        else:
            case = f"`similarity`, {cell['running']} running, {cell['waiting']:,} waiting, lengths {cell['lengths']}"
            case += ", caches emptied between steps" if cell["between"] == "model" else ""
        times = [f"{cell[key]['median'] / 1e3:.2f} ms" for key in ("stock_us", "ours_us")]
        rows.append([case, cell["scheduling"], *times, interval(cell["ratio"])])
    return table(["case", "scheduling", "vLLM, per step", "ours", "ratio"], rows)


def breaker(runs: Sequence[Run]) -> str:
    """Microseconds per step with the circuit breaker and with plain calls in its place."""
    rows = []
    for cell in cells_of(runs, "breaker"):
        times = [f"{interval(cell[key], 0)} µs" for key in ("plain_us", "guarded_us")]
        ratios = [interval(cell[key], 3) for key in ("ratio", "floor")]
        rows.append([str(cell["running"]), f"{cell['calls_per_step']:.1f}", *times, *ratios])
    headings = ["running requests", "calls of plugins per step", "step with plain calls", "with the circuit breaker"]
    return table([*headings, "ratio", "the same again / the first time"], rows)


def startup(runs: Sequence[Run]) -> str:
    """Seconds from launch to health, and of our own code."""
    names = {
        "stock_to_health_seconds": "launch to health, vLLM",
        "ours_to_health_seconds": "launch to health, ours",
        "difference_seconds": "difference",
        "front_end_seconds": "our own code in the front end",
        "engine_core_or_worker_seconds": "our own code in an engine core or worker",
    }
    [run] = [run for run in runs if run["name"] == "seconds"]
    return table(["", "seconds"], [[name, interval(run["measured"][key])] for key, name in names.items()])


def capacity(runs: Sequence[Run]) -> str:
    """Tokens and requests that fit into the same KV cache memory."""
    [run] = [run for run in runs if run["name"] == "capacity"]
    rows = [
        [row["cache"], f"{row['tokens']:,}", f"{row['concurrency']:.2f}", f"{row['bytes_of_bf16']:.3f}"]
        for row in run["measured"]["rows"]
    ]
    length = run["measured"]["max_model_len"]
    return table(["cache", "tokens", f"requests of {length:,} tokens", "bytes per token, of BF16's"], rows)


def bench(runs: Sequence[Run]) -> str:
    """What `vllm-instant bench` found."""
    [run] = runs
    rows = []
    for row in map(BenchRow.read, current_format(dict(run))["rows"]):
        contrast = row.contrasts.get(OURS)
        values = [
            format_number(row.values[arm].mean, row.unit) if arm in row.values else "" for arm in (BASELINE, OURS)
        ]
        why = f"not measured: {row.missing or 'a value is zero'}"
        judged = (
            ["", "", why] if contrast is None else [format_effect(contrast), format_floor(contrast), contrast.verdict]
        )
        rows.append([f"{row.group}: {row.name}", *values, *judged])
    headings = ["", "vLLM", "ours", "ours / vLLM [95 %]", "a second vLLM server / the first [95 %]", "verdict"]
    setup = run["setup"]
    rounds = f"{setup['rounds']} rounds, every server started {setup['starts']} times."
    return f"{rounds}\n\n{table(headings, rows)}"


TABLES: dict[str, tuple[str, Show]] = {
    "regret": ("regret", regret),
    "cold_start": ("cold_start", cold_start),
    "pace_bound": ("pace_bound", pace_bound),
    "seeds": ("seeds", seeds),
    "drafters": ("drafters", drafters),
    "samplers_acceptance": ("samplers", samplers_acceptance),
    "samplers_time": ("samplers", samplers_time),
    "scheduling": ("scheduling", scheduling),
    "scheduling_load": ("scheduling_simulated", simulated_load),
    "scheduling_bound": ("scheduling_simulated", simulated_bound),
    "policy": ("overheads", policy),
    "schedulers": ("overheads", schedulers),
    "breaker": ("overheads", breaker),
    "startup": ("startup", startup),
    "capacity": ("startup", capacity),
    "bench": ("bench_demo", bench),
}
"""By the name in the markers: result file and function."""


def runs_of(folder: Path, file: str) -> Sequence[Run]:
    """The runs of a result file; a record of `vllm-instant bench` is one run."""
    record = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
    return list(record.get("runs", [{"name": "", "commit": None, **record}]))
