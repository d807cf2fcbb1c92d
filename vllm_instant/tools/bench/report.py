"""The record of a run as JSON types, and its numbers as words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_instant.tools.bench.checkpoint import BenchCheckpoint
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, BadInputError, BenchPlan, HourlyPrice
from vllm_instant.tools.bench.rows import BenchRow, bench_rows, verdicts
from vllm_instant.tools.measure.environment_info import environment_info
from vllm_instant.tools.measure.significance import Contrast, margin_for

FORMAT = "vllm-instant bench 1"
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
) -> dict[str, Any]:
    """Everything that is saved.

    Args:
        plan: what was measured.
        state: what came out.
        command: what the user ran.
        price: of an hour.
        margin: the user's own stated margin.
        local: whether the servers run on this machine.
        deployments: what each arm serves, in words or as the text of its deployment file.

    """
    stated = margin_for(plan.starts) if margin is None else margin
    about = environment_info(command)
    if not local:
        about["device"] = f"the servers' machines are not known; asked from {about['device']}"
    places = {users: [state.turns[number, users] for number in range(plan.rounds)] for users in plan.concurrency}
    found = about | {
        "format": FORMAT,
        "model": state.served[BASELINE]["name"].rstrip("/").rpartition("/")[2],
        "setup": plan.setup() | {"salt": state.salt},
        "margin": stated,
        "arms": {arm: state.served[arm] | {"deployment": deployments.get(arm, "")} for arm in state.arms},
        "rows": [row.plain() for row in bench_rows(plan, state, price, margin)],
        "tokens_per_second_by_round": {
            str(users): {
                arm: [round(turns[arm].tokens / turns[arm].seconds, 2) for turns in taken] for arm in state.arms
            }
            for users, taken in places.items()
        },
        "itl_ms_quantiles": {
            str(users): {arm: _quantiles([turns[arm] for turns in taken]) for arm in state.arms}
            for users, taken in places.items()
        },
        "notes": notes(plan, state, local),
    }
    return dict(_without_home(found))


def notes(plan: BenchPlan, state: BenchCheckpoint, local: bool) -> list[str]:
    """What a reader should know before believing a row."""
    said = []
    served = state.served
    if served[BASELINE_AGAIN]["url"] == served[BASELINE]["url"]:
        said.append(
            "The second stock server is the first one, asked again: it shows the noise between turns, and not how much "
            "two processes differ (--stock-again URL would)."
        )
    if plan.starts == 1:
        said.append(
            "Each server is one process, which may be some percent faster or slower than another one of its kind: the "
            "stated margin stands for that."
        )
    if state.attempt:
        said.append(f"The run was interrupted and went on {_times(state.attempt)}.")
    if plan.repeats() > 1:
        said.append(
            f"There are fewer prompts than requests: each was asked about {plan.repeats():.0f} times, so prefix caches "
            "may have known it."
        )
    for key, what in (("version", "versions of vLLM"), ("max_model_len", "values of max_model_len")):
        if len({served[arm][key] for arm in state.arms}) > 1:
            said.append(f"The servers have different {what}: {_listed({arm: served[arm][key] for arm in state.arms})}.")
    if local:
        said.append("Energy is that of the whole machine, with everything that ran on it.")
    return said


def read_record(path: Path) -> dict[str, Any]:
    """A record that was saved; raises BadInputError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise KeyError
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise BadInputError(f"{path} is no result of `vllm-instant bench`") from None
    return dict(found)


def summary(lines: Sequence[BenchRow], arm: str) -> str:
    """How many rows got which verdict."""
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
    """The second stock server's with its interval."""
    return _interval(contrast, "floor")


def _interval(contrast: Contrast, which: str) -> str:
    found = getattr(contrast, which)
    if contrast.scale == "ratio":
        return f"{found.mean:.2f}× [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _quantiles(turns: Sequence[Any]) -> list[list[float]]:
    """``[share of tokens, milliseconds]`` of the time between tokens; empty if all came at once."""
    gaps = np.concatenate([answer.inter_token_latencies() for turn in turns for answer in turn.answers])
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
    """Results are shown to others: no path says whose they are."""
    if isinstance(value, str):
        return value.replace(str(Path.home()), "~")
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    return value
