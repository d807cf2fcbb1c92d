"""Tables of streaming, experts, kernels, distillation, spikes and verdicts, and the README's table of all of it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence

import result_tables
import result_tables_of_capacity
import result_tables_of_escalation
import result_tables_of_faults
import result_tables_of_guard
import result_tables_of_lookup
import result_tables_of_remote
from result_tables import Cell, Run, Show, cells_of, interval, table

from vllm_instant.tools.measure.statistics import ratio_interval


def streaming(runs: Sequence[Run]) -> str:
    """Prompts that are read while they are typed, beside the same kind of prompts sent whole."""
    parts = {(cell["plugin"], cell["part"]): cell for cell in cells_of(runs)}
    rows = []
    typed = parts["chunked", "typed"]
    for arm, found in typed["ms_after_commit"].items():
        ratio = interval(typed["after_commit_to_whole"].get(arm), 3)
        case = f"{typed.get('tokens', 700)} tokens typed over 10 s: commit to first token"
        rows.append([case, arm, f"{interval(found, 0)} ms", ratio])
    for plugin in ("chunked", "resumable"):
        for arm, found in parts[plugin, "short"]["ms_in_server"].items():
            rows.append([f"at most 50 tokens, `{plugin}`: commit to first token", arm, f"{interval(found, 1)} ms", ""])
    beside = parts["chunked", "background"]
    for arm, found in beside["itl_p99_ms"].items():
        ratio = interval(beside["p99_streamed_to_whole"]) if arm == "streamed" else ""
        rows.append(["p99 time between tokens of 4 decoders beside 4 typists", arm, f"{interval(found, 0)} ms", ratio])
    for arm, found in beside["tokens_per_second"].items():
        ratio = interval(beside["speed_streamed_to_whole"]) if arm == "streamed" else ""
        rows.append(["their tokens per second", arm, interval(found, 0), ratio])
    neighbour = parts["chunked", "neighbour"]
    for arm, found in neighbour["ttft_ms"].items():
        ratio = interval(neighbour["ratio"]) if arm != "alone" else ""
        rows.append(["another request's time to first token", arm, f"{interval(found, 0)} ms", ratio])
    same = parts["chunked", "identity"]
    rows.append(
        ["answers equal to those of whole prompts", "typed with edits", f"{same['identical']} of {same['prompts']}", ""]
    )
    abuse = parts["chunked", "abuse"]["others_ttft_ms"]
    for when in ("before", "during"):
        case = f"{when} 200 sessions that disconnect"
        rows.append(["another request's time to first token", case, f"{interval(abuse[when], 0)} ms", ""])
    return table(["", "", "measured", "ratio to whole prompts, or to alone"], rows)


def experts(runs: Sequence[Run]) -> str:
    """Distinct experts, time and divergence of decoding steps, by budget."""
    cells = [cell for cell in cells_of(runs) if cell["part"] != "gate" and cell["budget"] < 1]
    rows = [
        [
            cell["part"],
            str(cell["batch"]),
            f"{cell['budget']:.2f}",
            f"{cell['native_experts']:.1f} → {cell['routed_experts']:.1f}",
            interval({"median": cell["time"]["ratio"], **cell["time"]}),
            f"{cell['kept_mass']:.3f}",
            f"{cell['kl_nats']:.4f}",
        ]
        for cell in sorted(cells, key=lambda cell: (cell["part"], cell["batch"], -cell["budget"]))
    ]
    headings = ["mode", "requests", "budget", "distinct experts per layer", "step time / native", "router mass kept"]
    return table([*headings, "KL divergence, nats per token"], rows)


def expert_gate(runs: Sequence[Run]) -> str:
    """Whether the quality gate notices a file of experts that fit no text."""
    rows = [
        [
            "on" if cell["gate"] else "off",
            f"{cell['first_240_steps_kl']:.3f}",
            f"{cell['later_kl']:.3f}",
            ", ".join(f"step {change['step']} to {change['budget']:.0%}" for change in cell["changes"]) or "none",
        ]
        for cell in cells_of(runs)
        if cell["part"] == "gate"
    ]
    return table(["gate", "KL divergence, first 240 steps", "later", "changes of the budget"], rows)


def expert_frontier(runs: Sequence[Run]) -> str:
    """Loss of quality by budget and batch, on held-out text, with shared budgets."""
    [run] = runs
    rows = []
    for point in run["measured"]["points"]:
        if point["form"] == "budget" and point["keep"] == 1 and not point["cohesion"]:
            saved, perplexity = ([f"{100 * value:.1f}" for value in point[key]] for key in ("saved", "perplexity"))
            rows.append(
                [
                    str(point["batch"]),
                    str(point["budget"]),
                    f"{point['distinct'][0]:.1f}",
                    f"{saved[0]} % [{saved[1]}, {saved[2]}]",
                    f"{perplexity[0]} % [{perplexity[1]}, {perplexity[2]}]",
                    f"{point['kl'][0]:.4f} [{point['kl'][1]:.4f}, {point['kl'][2]:.4f}]",
                ]
            )
    return table(["requests", "budget", "distinct experts", "saved", "perplexity", "KL divergence, nats"], rows)


def machine_code(runs: Sequence[Run]) -> str:
    """Registers, spills and shared memory of every kernel on compute capability 9.0."""
    [run] = runs
    rows = [
        [
            f"`{row['kernel']}`",
            row["case"],
            str(row["registers"]),
            str(row["spilled"]),
            f"{row['shared']:,}",
            ", ".join(f"{width} B: {count}" for width, count in row["loads"].items()),
        ]
        for row in run["measured"]["rows"]
        if row["capability"] == 90
    ]
    return table(["kernel", "case", "registers", "spilled", "shared memory, B", "loads by width"], rows)


def spikes(runs: Sequence[Run]) -> str:
    """Disturbances that were found and named, and runs without one that had a spike."""
    [found] = cells_of(runs, "attribution")
    rows = [
        [
            row["cause"],
            str(row["events"]),
            str(row["found_and_named"]),
            str(row["spikes_named_so"]),
            str(row["rightly"]),
        ]
        for row in found["by_cause"]
    ]
    [alarms] = cells_of(runs, "false alarms")
    high = alarms["share_95"][1]
    return (
        table(["cause", "disturbances", "found and rightly named", "spikes named so", "rightly"], rows)
        + f"\n\nOf {alarms['runs_made']} undisturbed runs, {alarms['runs_with_spikes']} had a spike "
        f"(at most {high:.0%} of such runs, 95 % confidence)."
    )


def verdicts(runs: Sequence[Run]) -> str:
    """How often the bench finds a difference that is there, and one that is not."""
    [simulated] = [run["measured"] for run in runs if run["name"] == "simulated"]
    rows = []
    for cell in simulated["cells"]:
        effect = cell["planted_difference"]
        right = "" if cell["runs_with_the_right_verdict"] is None else str(cell["runs_with_the_right_verdict"])
        said = str(cell["runs_with_a_verdict"])
        case = f"{effect:+.0%}" if effect else "none"
        rows.append([case, str(cell["starts"]), str(cell["rounds"]), str(cell["rows"]), str(cell["runs"]), said, right])
    served = list(cells_of(runs, "servers"))
    false = sum(bool(run["false_verdicts"]) for run in served)
    headings = ["simulated difference", "starts", "rounds", "rows", "runs", "runs with a verdict", "with the right one"]
    return (
        f"{table(headings, rows)}\n\nLive, three vLLM servers without a difference: {false} of {len(served)} runs have "
        "a row with a verdict."
    )


def distill(runs: Sequence[Run]) -> str:
    """Acceptance of distilled draft models on held-out text, by class."""
    rows = []
    for run in runs:
        made = run["measured"]
        by_temperature = {t: [row for row in made["acceptance"] if row["temperature"] == t] for t in (0.0, 1.0)}
        first = ", ".join(f"{row['text']} {row['by_position'][0]:.2f}" for row in by_temperature[1.0])
        of_all = ", ".join(f"{row['text']} {row['mean_length']:.2f}" for row in by_temperature[0.0])
        size = f"{made['draft_parameters'] / 1e6:.2f}M of {made['target_parameters'] / 1e6:.2f}M"
        training = f"{made['training']['steps']:,} steps, {made['seconds']:.0f} s"
        rows.append([run["name"], size, training, first, of_all])
    headings = ["draft", "parameters", "training", "first draft token accepted, temperature 1"]
    return table([*headings, "accepted of 8 draft tokens, greedy"], rows)


def quality(runs: Sequence[Run]) -> str:
    """What lossy deployments change in the model's numbers and in whole answers."""
    rows = []
    for cell in cells_of(runs):
        start = [cell["model"], f"{cell['arm']}", f"{cell['temperature']:g}"]
        if "refused" in cell:
            rows.append([*start, f"does not start: {cell['refused']}", "", "", "", ""])
            continue
        measured, equality = cell.get("quality"), cell["tasks"]["equality"]
        counted = sum(row["answers"] for row in equality)
        equal = sum(row["answers"] * row["equal"]["mean"] for row in equality)
        rows.append(
            [
                *start,
                *(_distributions(measured) if measured else ["not measured"] * 3),
                f"{equal:.0f} of {counted}" if equality else "by chance",
                f"{cell['accepted']:.0f} of {cell['drafted']:.0f}" if cell["drafted"] else "",
            ]
        )
    headings = ["model", "deployment", "temperature", "perplexity", "KL divergence, nats"]
    headings += ["vLLM's log-probability of its answers, nats per token", "answers equal to vLLM's", "accepted drafts"]
    return table(headings, rows)


def _distributions(measured: Cell) -> list[str]:
    loss = [f"{100 * (measured['perplexity_ratio'][key] - 1):+.2f}" for key in ("mean", "low", "high")]
    gap = interval(measured["answer_gap"], 3)
    return [f"{loss[0]} % [{loss[1]}, {loss[2]}]", interval(measured["divergence"], 4), gap]


def quality_tasks(runs: Sequence[Run]) -> str:
    """How often answers are right, vLLM → ours, and the difference in points."""
    marks = [("facts", "valid JSON"), ("facts", "the keys asked for"), ("facts", "right values")]
    marks += [("tools", "valid JSON"), ("tools", "right values"), ("HumanEval", "pass@1")]
    rows = []
    for cell in cells_of(runs):
        if "refused" in cell:
            continue
        found = {(row["task"], row["mark"]): row for row in cell["tasks"]["marks"]}
        name = cell["arm"] if cell["model"].startswith("SmolLM2") else f"{cell['arm']} (mixture)"
        counts = ", ".join(str(found[mark]["answers"]) for mark in (marks[0], marks[3], marks[5]) if mark in found)
        rows.append([name, f"{cell['temperature']:g}", counts, *(_judged(found.get(mark)) for mark in marks)])
    return table(
        ["deployment", "temperature", "mails, tool questions, problems", *(f"{task}: {mark}" for task, mark in marks)],
        rows,
    )


def _judged(row: Cell | None) -> str:
    if row is None:
        return ""
    change = [f"{100 * row['difference'][key]:+.1f}" for key in ("mean", "low", "high")]
    return f"{100 * row['baseline']:.1f} → {100 * row['ours']:.1f} % ({change[0]} [{change[1]}, {change[2]}])"


def demo(runs: Sequence[Run]) -> str:
    """The demo's prompts: speed of vLLM alone and of ours, and drafts."""
    rows = []
    for cell in cells_of(runs):
        speeds = [f"{cell['tokens_per_second'][arm]['median']:.1f}" for arm in ("vllm", "ours")]
        first = " → ".join(f"{cell['ttft_ms'][arm]['median']:.0f}" for arm in ("vllm", "ours"))
        ratio = interval(cell["ratio"]).replace(" [", "× [")
        drafts = f"{cell['accepted']:.0f} of {cell['proposed']:.0f}"
        same = f"{cell['equal_answers']} of {cell['rounds']}"
        rows.append([cell["prompt"], cell["dtype"], *speeds, ratio, f"{first} ms", drafts, same])
    headings = ["prompt", "arithmetic", "vLLM, tokens/s", "vllm-instant, tokens/s", "ratio", "time to first token"]
    return table([*headings, "accepted drafts", "same answer as vLLM"], rows)


def demo_answers(runs: Sequence[Run]) -> str:
    """The answers that the demo printed."""
    parts = [
        f"{cell['prompt']}:\n\n````text\n{cell['answer'].strip()}\n````"
        for cell in cells_of(runs)
        if cell["dtype"] == "bfloat16"
    ]
    return "\n\n".join(parts)


FIXED = ("off", "suffix", "draft model")
OURS, OURS_WITH_DRAFT = "ours", "ours with the draft model"


def promise(runs: Sequence[Run], part: str) -> str:
    """Bursts of the public model's prompts: every arm's speed, and ours beside the best other one."""
    order = ["edit", "extract", "story", "mixed"]
    found = [cell for cell in cells_of(runs) if cell["part"] == part]
    rows = []
    for cell in sorted(found, key=lambda cell: (cell["users"], order.index(cell["prompts"]))):
        speeds = [_fastest(cell, name) for name in (*FIXED, OURS, OURS_WITH_DRAFT)]
        ours = cell["ours"]
        ratios = [interval(ours["ours"][key]) for key in ("to_off", "to_best", "latency_best_to_ours")]
        with_draft = interval(ours[OURS_WITH_DRAFT]["to_best"]) if OURS_WITH_DRAFT in ours else ""
        times = [
            " → ".join(f"{cell['arms'][arm][key]['median']:.0f}" for arm in ("off", "ours"))
            for key in ("p50_itl_ms", "p99_itl_ms", "ttft_ms")
        ]
        case = [cell["prompts"], str(cell["users"]), str(len(cell["rounds"]["ours"]))]
        rows.append([*case, *speeds, *ratios, with_draft, *times])
    headings = ["prompts", "users", "rounds", "off, tokens/s", "fixed `suffix`", "fixed draft model", "ours"]
    headings += ["ours with the draft model", "ours / off", "ours / best", "latency, best / ours"]
    headings += ["ours with the draft model / best", "p50 between tokens, ms, off → ours", "p99", "first token"]
    return table(headings, rows)


def _fastest(cell: Cell, name: str) -> str:
    """Speed and length of the fastest arm of a drafter."""
    speeds = {arm: found["tokens_per_second"]["median"] for arm, found in cell["arms"].items()}
    same = [arm for arm in speeds if arm.partition(",")[0] == name]
    if not same:
        return ""
    fastest = max(same, key=speeds.__getitem__)
    length = fastest.partition(", ")[2]
    return f"{speeds[fastest]:.0f}{f' ({length})' if length else ''}"


def speeds_by_users(runs: Sequence[Run], part: str, arm: str = OURS) -> dict[int, dict[str, list[float]]]:
    """Tokens per second of one of our arms (``ours``), of the ``best`` other and of ``off`` by users, by round."""
    found: dict[int, dict[str, list[float]]] = {}
    cells = [cell for cell in cells_of(runs) if cell["part"] == part and arm in cell["ours"]]
    for cell in sorted(cells, key=lambda cell: cell["users"]):
        speeds = found.setdefault(cell["users"], {"ours": [], "best": [], "off": []})
        for number, best in enumerate(cell["ours"][arm]["best_by_round"]):
            for name, other in (("ours", arm), ("best", best), ("off", "off")):
                speeds[name].append(cell["rounds"][other][number]["tokens_per_second"])
    return found


def promise_by_users(runs: Sequence[Run], part: str) -> str:
    """Ours beside the best other arm, over all rounds of all classes of prompts."""
    rows = []
    with_draft = ", " in part
    for arm in (OURS, OURS_WITH_DRAFT) if with_draft else (OURS,):
        for users, speeds in speeds_by_users(runs, part, arm).items():
            ratios = [interval(vars(ratio_interval(speeds["ours"], speeds[other]))) for other in ("off", "best")]
            rows.append([arm, str(users), str(len(speeds["ours"])), *ratios])
    return table(["", "users", "rounds of all prompts", "/ off", "/ best"], rows)


def promise_first(runs: Sequence[Run]) -> str:
    """Time to the first token beside vLLM without speculation, and of a second such server."""
    rows = []
    for cell in cells_of(runs):
        if cell["part"] == "first":
            times = [f"{interval(cell['arms'][arm]['ttft_ms'], 0)} ms" for arm in ("off", "ours")]
            ratios = [interval(cell["ttft_to_off"][arm], 3) for arm in ("ours", "off again")]
            rows.append([cell["prompts"], str(cell["users"]), str(len(cell["rounds"]["ours"])), *times, *ratios])
    return table(
        ["prompts", "users", "rounds", "vLLM", "ours", "ours / vLLM", "a second vLLM server / the first"], rows
    )


def promise_pinned(runs: Sequence[Run]) -> str:
    """Ours, and the same server without drafts, beside vLLM."""
    rows = []
    for cell in cells_of(runs):
        if cell["part"] == "pinned":
            arms = ("off", "ours, K=0", "ours")
            speeds = {arm: [burst["tokens_per_second"] for burst in cell["rounds"][arm]] for arm in arms}
            ratios = [
                interval(vars(ratio_interval(speeds[one], speeds[other])))
                for one, other in (("ours", "off"), ("ours, K=0", "off"), ("ours", "ours, K=0"))
            ]
            case = [cell["prompts"], str(cell["users"]), str(len(speeds["ours"]))]
            times = [" → ".join(f"{cell['arms'][arm]['p99_itl_ms']['median']:.0f}" for arm in ("off", "ours"))]
            rows.append([*case, *(f"{statistics.median(speeds[arm]):.0f}" for arm in arms), *ratios, *times])
    headings = ["prompts", "users", "rounds", "vLLM, tokens/s", "ours, pinned to no drafts", "ours", "ours / vLLM"]
    headings += ["pinned / vLLM", "ours / pinned", "p99 between tokens, ms, vLLM → ours"]
    return table(headings, rows)


def bench_serve(runs: Sequence[Run]) -> str:
    """What vLLM's own client measures of vLLM alone and of ours."""
    names = {
        "output_throughput": "output tokens per second",
        "median_ttft_ms": "median time to first token, ms",
        "p99_ttft_ms": "p99 time to first token, ms",
        "mean_tpot_ms": "mean time per output token, ms",
        "median_itl_ms": "median time between messages, ms",
        "p99_itl_ms": "p99 time between messages, ms",
    }
    rows = []
    for cell in cells_of(runs):
        lengths = "different" if cell.get("spread") else "equal"
        case = [cell["model"], cell["prompts"], lengths, str(cell["users"]), str(cell["pairs"])]
        for key, name in names.items():
            arms = [f"{cell['arms'][arm][key]['median']:.1f}" for arm in ("vllm", "ours")]
            rows.append([*case, name, *arms, interval(cell["ratio"][key])])
    headings = ["model", "prompts", "largest lengths of answers", "users", "pairs", "", "vLLM", "ours", "ours / vLLM"]
    return table(headings, rows)


TABLES: dict[str, tuple[str, Show]] = {
    "demo": ("demo", demo),
    "quality": ("quality", quality),
    "quality_tasks": ("quality", quality_tasks),
    "demo_answers": ("demo", demo_answers),
    "promise_warm": ("promise", functools.partial(promise, part="warm")),
    "promise_by_users": ("promise", functools.partial(promise_by_users, part="warm")),
    "promise_draft": ("promise", functools.partial(promise, part="warm, draft model")),
    "promise_draft_by_users": ("promise", functools.partial(promise_by_users, part="warm, draft model")),
    "promise_cold": ("promise", functools.partial(promise, part="cold")),
    "promise_cold_by_users": ("promise", functools.partial(promise_by_users, part="cold")),
    "promise_first": ("promise", promise_first),
    "promise_pinned": ("promise", promise_pinned),
    "bench_serve": ("bench_serve", bench_serve),
    "streaming": ("streaming", streaming),
    "experts": ("experts", experts),
    "expert_gate": ("experts", expert_gate),
    "expert_frontier": ("expert_frontier", expert_frontier),
    "machine_code": ("machine_code", machine_code),
    "spikes": ("spikes", spikes),
    "verdicts": ("bench_verdicts", verdicts),
    "distill": ("distill", distill),
}
ALL_TABLES = (
    result_tables.TABLES
    | TABLES
    | result_tables_of_capacity.TABLES
    | result_tables_of_escalation.TABLES
    | result_tables_of_faults.TABLES
    | result_tables_of_guard.TABLES
    | result_tables_of_lookup.TABLES
    | result_tables_of_remote.TABLES
)
