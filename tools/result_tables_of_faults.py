"""Tables of equal answers, injected faults, kills and the soak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from result_tables import Run, Show, cells_of, table


def same_answers(runs: Sequence[Run]) -> str:
    """Pairs of servers with the same flags: how many answered, and how many requests got another answer."""
    rows = []
    for run in runs:
        cells = list(cells_of([run]))
        served = [cell for cell in cells if "requests" in cell]
        refused = [cell for cell in cells if "refused" in cell]
        rows.append(
            [
                {"single": "one flag", "pairs": "many flags, in pairs"}[run["name"]],
                str(len(cells)),
                str(sum("vllm_refused" in cell for cell in cells)),
                f"{sum(cell['refused']['sentence'] for cell in refused)} of {len(refused)}",
                f"{sum(cell['requests'] for cell in served):,}",
                f"{sum(cell['equal'] for cell in served):,}",
                str(sum(len(cell["varying"]) for cell in served)),
                f"{sum(cell['drafts'] for cell in served):,.0f}",
                str(sum(not cell["alive"] for cell in served)),
            ]
        )
    headings = ["servers with", "pairs of servers", "refused by vLLM itself", "refused by ours, in a sentence"]
    headings += ["requests", "equal answers", "not compared: vLLM's own vary", "draft tokens", "died"]
    return table(headings, rows)


def same_answers_differences(runs: Sequence[Run]) -> str:
    """Each request that got another answer, with the flags, and each start that ours refused."""
    rows = []
    for cell in cells_of(runs):
        if "refused" in cell:
            rows.append([cell["row"], "start refused", cell["refused"]["said"].replace("|", "\\|")])
        found = Counter(one["feature"] for one in cell.get("different", ()))
        rows += [[cell["row"], feature, f"differs {count} of 2 times"] for feature, count in found.items()]
    return table(["flags", "request", ""], rows) if rows else "None."


def faults(runs: Sequence[Run]) -> str:
    """Faults of each kind over all runs, and what the steady streams beside them saw in each."""
    kinds: Counter[str] = Counter()
    rows = []
    for run in runs:
        for cell in cells_of([run]):
            if "by_kind" not in cell:
                continue
            kinds.update(cell["by_kind"])
            name = f"{run['name']}: {'alive' if cell['engine_alive'] else 'an engine died'}"
            numbers = (cell["faults"], len(cell["unacceptable"]))
            seen = (cell[key] for key in ("others_equal", "others_changed", "others_failed"))
            rows.append([name, *(f"{number:,}" for number in (*numbers, *seen))])
    headings = ["run, engines", "faults", "unacceptable reactions", "answers to others: equal", "changed", "failed"]
    by_kind = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    return f"{table(headings, rows)}\n\nBy kind: {by_kind}."


def kills(runs: Sequence[Run]) -> str:
    """What each signal left behind."""
    rows = [
        [
            row["killed"],
            row["signal"],
            "" if row["answers_as_before"] is None else "yes" if row["answers_as_before"] else "no",
            str(row["others_changed"]),
            "yes" if row["clients_hang"] else "no",
            str(len(row["processes_left_after_10_s"])),
            "yes" if row["port_free"] else "no",
        ]
        for cell in cells_of(runs, "kills")
        for row in cell["kills"]
    ]
    headings = ["process", "signal", "next server answers as before", "changed answers", "clients hang"]
    return table([*headings, "processes left after 10 s", "port free"], rows)


def soak(runs: Sequence[Run]) -> str:
    """Each quantity at the start, after the warm-up, at the end, and its slope."""
    rows = []
    for cell in cells_of(runs):
        for row in cell["slopes"]:
            digits = 1 if row["quantity"].endswith("MiB") else 0
            values = [f"{row[key]:,.{digits}f}" for key in ("start", "after_warm_up", "highest", "end")]
            slope = f"{row['per_hour']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if "per_hour" in row else ""
            limit = f"{row['limit_per_hour']:.2f}"
            rows.append([row["quantity"], *values, slope, limit, "yes" if row.get("flat") else "no"])
        done = f"{sum(cell['activities'].values()):,} activities in {cell['minutes']:.0f} minutes"
        rows.append([done, "", "", "", f"{len(cell['unacceptable'])} wrong", "", "", "yes" if cell["passed"] else "no"])
    headings = ["", "start", "after the warm-up", "highest after that", "end", "slope per hour", "limit", "passed"]
    return table(headings, rows)


TABLES: dict[str, tuple[str, Show]] = {
    "same_answers": ("same_answers", same_answers),
    "same_answers_differences": ("same_answers", same_answers_differences),
    "faults": ("chaos", faults),
    "kills": ("chaos", kills),
    "soak": ("soak", soak),
}
