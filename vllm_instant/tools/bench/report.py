"""The result of a run as JSON types, and its numbers as text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_instant.tools.bench.checkpoint import BenchCheckpoint
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, OLD_NAMES, BadInputError, BenchPlan, HourlyPrice
from vllm_instant.tools.bench.rows import (
    AGREEMENT,
    DIVERGENCE,
    KV_CACHE,
    LIKELIHOOD,
    PERPLEXITY,
    QUALITY,
    QUALITY_MARGINS,
    BenchRow,
    bench_rows,
    verdicts,
)
from vllm_instant.tools.measure.environment_info import environment_info
from vllm_instant.tools.measure.significance import Contrast, margin_for

FORMAT, OLD_FORMAT = "vllm-instant bench 2", "vllm-instant bench 1"
OLD_ROWS = {
    "greedy answers equal to stock's": AGREEMENT,
    "perplexity by stock's": PERPLEXITY,
    "KL divergence from stock": DIVERGENCE,
    "stock's log-probability of sampled answers, less of its own": LIKELIHOOD,
}
"""Names of rows in results of format 1."""
_QUANTILES = [0.005, *(i / 40 for i in range(1, 40)), 0.99, 0.995]


def bench_record(
    plan: BenchPlan,
    state: BenchCheckpoint,
    *,
    command: str,
    price: HourlyPrice | None,
    margin: float | None,
    local: bool,
    deployments: Mapping[str, str],
    rounds: int | None = None,
    further: Sequence[BenchRow] = (),
) -> dict[str, Any]:
    """The complete result of a run.

    Args:
        plan: of the measurement.
        state: the measurements.
        command: the user's command line.
        price: per hour.
        margin: the user's own stated margin.
        local: whether the servers run on this machine.
        deployments: each arm's command line, or the text of its deployment file.
        rounds: number of rounds so far; None for those of the plan's first stage.
        further: rows that were measured elsewhere.

    """
    stated = margin_for(plan.starts) if margin is None else margin
    about = environment_info(command)
    if not local:
        about["device"] = f"unknown machines, measured from {about['device']}"
    done = rounds or plan.rounds
    places = {users: [state.arm_rounds[number, users] for number in range(done)] for users in plan.concurrency}
    found = about | {
        "format": FORMAT,
        "model": state.served[BASELINE]["name"].rstrip("/").rpartition("/")[2],
        "setup": plan.setup() | {"salt": state.salt, "rounds": done},
        "margin": stated,
        "arms": {arm: state.served[arm] | {"deployment": deployments.get(arm, "")} for arm in state.arms},
        "rows": [row.plain() for row in [*bench_rows(plan, state, price, margin, done), *further]],
        "tokens_per_second_by_round": {
            str(users): {
                arm: [round(by_arm[arm].tokens / by_arm[arm].seconds, 2) for by_arm in taken] for arm in state.arms
            }
            for users, taken in places.items()
        },
        "itl_ms_quantiles": {
            str(users): {arm: _quantiles([by_arm[arm] for by_arm in taken]) for arm in state.arms}
            for users, taken in places.items()
        },
        "notes": notes(plan, state, local),
    }
    return dict(_without_home(found))


def notes(plan: BenchPlan, state: BenchCheckpoint, local: bool) -> list[str]:
    """Limitations of the measurement that a reader must know."""
    said = []
    served = state.served
    if served[BASELINE_AGAIN]["url"] == served[BASELINE]["url"]:
        said.append(
            "The second vLLM server is the first one, measured twice: it shows the noise between rounds, but not the "
            "difference of two processes (--baseline-again URL would)."
        )
    if plan.starts == 1:
        said.append(
            "Each server is one process, which may be some percent faster or slower than another one of its kind: the "
            "stated margin covers that."
        )
    if state.attempt:
        said.append(f"The run was interrupted and resumed {_times(state.attempt)}.")
    if plan.repeats() > 1:
        said.append(
            f"There are fewer prompts than requests: each was sent about {plan.repeats():.0f} times, so prefix caches "
            "may have held it."
        )
    for key, what in (("version", "versions of vLLM"), ("max_model_len", "values of max_model_len")):
        if len({served[arm][key] for arm in state.arms}) > 1:
            said.append(f"The servers have different {what}: {_listed({arm: served[arm][key] for arm in state.arms})}.")
    if local:
        said.append("Energy is that of the whole machine, including everything else that ran on it.")
    return said


def read_record(path: Path) -> dict[str, Any]:
    """A saved result, of this format or of format 1; raises BadInputError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = current_format(found)
        if found["format"] != FORMAT:
            raise KeyError
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise BadInputError(f"{path} is not a result of `vllm-instant bench`") from None
    return dict(found)


def current_format(found: dict[str, Any]) -> dict[str, Any]:
    """A result in the current format; in format 1 the baseline is called stock, and contrasts have no margin."""
    if found["format"] != OLD_FORMAT:
        return found

    def renamed(by_arm: dict[str, Any]) -> dict[str, Any]:
        return {OLD_NAMES.get(arm, arm): value for arm, value in by_arm.items()}

    def upgraded(row: dict[str, Any]) -> dict[str, Any]:
        name = OLD_ROWS.get(row["name"], row["name"])
        limits: dict[str, Any] = {}
        if row["group"] == QUALITY:
            limits = {"margin": QUALITY_MARGINS[name]}
        elif row["group"] != KV_CACHE:
            limits = {"margin": 1 + found["margin"], "rounds": found["setup"]["rounds"]}
        contrasts = {arm: contrast | limits for arm, contrast in row["contrasts"].items()}
        return row | {"name": name, "values": renamed(row["values"]), "contrasts": contrasts}

    over_time = {
        key: {users: renamed(by_arm) for users, by_arm in found[key].items()}
        for key in ("tokens_per_second_by_round", "itl_ms_quantiles")
    }
    rows = [upgraded(row) for row in found["rows"]]
    return found | over_time | {"format": FORMAT, "arms": renamed(found["arms"]), "rows": rows}


def summary(lines: Sequence[BenchRow], arm: str) -> str:
    """Number of rows by verdict."""
    return f"{arm}: " + ", ".join(f"{count} {name}" for name, count in verdicts(lines, arm).items())


def format_number(value: float, unit: str) -> str:
    """Three significant digits with the unit."""
    if unit in ("share", "ratio"):
        return f"{value:.3f}"
    if value == 0:
        shown = "0"
    elif abs(value) >= 100:
        shown = f"{value:,.0f}"
    elif abs(value) >= 1:
        shown = f"{value:.3g}"
    else:
        shown = f"{value:.2g}"
    return f"{shown} {unit}"


def format_effect(contrast: Contrast) -> str:
    """The effect with its interval."""
    return _interval(contrast, "effect")


def format_floor(contrast: Contrast) -> str:
    """The second baseline server compared with the first, with its interval."""
    return _interval(contrast, "floor")


def _interval(contrast: Contrast, which: str) -> str:
    found = getattr(contrast, which)
    if contrast.scale == "ratio":
        return f"{found.mean:.2f}× [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _quantiles(rounds: Sequence[Any]) -> list[list[float]]:
    """``[share of tokens, milliseconds]`` of the time between tokens; empty if all came at once."""
    gaps = np.concatenate([answer.inter_token_latencies() for arm_round in rounds for answer in arm_round.answers])
    if not len(gaps):
        return []
    return [
        [share, round(float(value), 3)]
        for share, value in zip(_QUANTILES, np.quantile(gaps * 1e3, _QUANTILES), strict=True)
    ]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _without_home(value: Any) -> Any:
    """Results are shared: paths must not name the user.

    Only whole path components are replaced, and nothing if the home folder is ``/`` or unknown, as in containers with
    an arbitrary user id.
    """
    if isinstance(value, str):
        home = os.path.expanduser("~")
        return re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w.-])", "~", value) if len(home) > 1 else value
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    return value


def verdict(contrast: Contrast) -> str:
    """The verdict, with the number of rounds that would decide an undecided row."""
    if contrast.verdict != "undecided":
        return contrast.verdict
    needed = contrast.rounds_to_decide()
    if needed is not None:
        return f"undecided (about {needed} more rounds)"
    return "undecided (more rounds would not decide it)" if contrast.rounds else "undecided"
