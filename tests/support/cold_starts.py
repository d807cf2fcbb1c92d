"""Fresh servers in the simulator: one policy from its first step on, beside fixed draft lengths on the same server."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_instant import SpeculationPolicy
from vllm_instant.tools.measure.simulator import HostNoise, RequestClass, StepCost, roofline, simulate, steady
from vllm_instant_plugins.speculation import Fixed

TOKENS = 200
MAX_DRAFT_TOKENS = 8

BUSY = HostNoise(
    jitter=0.05, hiccups=0.01, bursts=0.02, burst_steps=(10, 60), burst_load=(0.2, 0.6), first_steps=(2.5, 1.6, 1.3)
)
"""As measured on two shared cores: other processes' load for tens of steps, slow first steps, log-normal jitter."""


def _relative(base: float, rows: list[tuple[int, float]], draft_step: float) -> StepCost:
    """Rows and draft steps in units of a step without drafts for one request."""
    return StepCost(
        [(size, base * factor) for size, factor in rows],
        context_second=2e6,
        draft_pass=base * draft_step,
        draft_pass_request=base * draft_step / 20,
        draft_start=base * 0.04,
        missed_second=20_000 / base * 0.03,
    )


CURVES = {
    # Matrix units: rows are nearly free up to a tile of 16.
    "amx": _relative(0.032, [(1, 1.0), (2, 1.03), (8, 1.08), (16, 1.15), (32, 1.5), (64, 2.3), (160, 4.5)], 0.05),
    # Vector units: each row costs.
    "avx": _relative(0.020, [(1, 1.0), (2, 1.2), (4, 1.45), (8, 1.95), (16, 2.9), (32, 4.8), (160, 20.0)], 0.06),
    "gpu": roofline(8e9),
}
CURVES["amx lookup"] = replace(CURVES["amx"], draft_pass=0.0, draft_pass_request=0.0, draft_start=0.0)
CURVES["avx lookup"] = replace(CURVES["avx"], draft_pass=0.0, draft_pass_request=0.0, draft_start=0.0)
DRAFTS = {
    "hopeless": steady(0.02),
    "mediocre": steady(0.45, 0.9),
    "oracle": steady(1.0),
}


@dataclass(frozen=True)
class Start:
    """Outcome of one start, over the first ``TOKENS`` tokens of each user."""

    speed: float
    """Tokens per second without noise."""
    drafted: int
    """Draft tokens per user."""
    accepted: int
    """Accepted ones per user."""


def start(
    policy: Callable[[Callable[[], float]], SpeculationPolicy],
    curve: str,
    drafts: str,
    users: int = 1,
    seed: int = 0,
    noise: HostNoise = BUSY,
    stated: float | None = None,
    delay: int = 0,
) -> Start:
    """Serve the first requests of a fresh server."""
    report = simulate(
        policy,
        [RequestClass(DRAFTS[drafts], temperature=1.0, output_tokens=(TOKENS, TOKENS), stated=stated)],
        CURVES[curve],
        concurrency=users,
        requests=users,
        max_draft_tokens=MAX_DRAFT_TOKENS,
        feedback_delay=delay,
        noise=noise,
        seed=seed,
    )
    return Start(report.tokens / report.noiseless_seconds, report.drafted // users, report.accepted // users)


@functools.cache
def fixed_speed(curve: str, drafts: str, users: int, length: int, seed: int) -> float:
    """Speed of a fixed draft length."""
    return start(lambda clock: Fixed(length, None), curve, drafts, users, seed).speed


def best_fixed_speed(curve: str, drafts: str, users: int, seed: int) -> float:
    """Speed of the best fixed draft length."""
    return max(fixed_speed(curve, drafts, users, length, seed) for length in (0, 1, 2, 4, 8))


def relative_speeds(
    policy: Callable[[Callable[[], float]], SpeculationPolicy],
    curve: str,
    drafts: str,
    users: int,
    seeds: range,
    **options: object,
) -> tuple[np.ndarray, np.ndarray]:
    """Speeds relative to no drafts (hopeless) or to the best fixed length, and draft tokens per user, by seed."""
    speeds, drafted = [], []
    for seed in seeds:
        found = start(policy, curve, drafts, users, seed, **options)  # type: ignore[arg-type]
        reference = (
            fixed_speed(curve, drafts, users, 0, seed)
            if drafts == "hopeless"
            else best_fixed_speed(curve, drafts, users, seed)
        )
        speeds.append(found.speed / reference)
        drafted.append(found.drafted)
    return np.array(speeds), np.array(drafted)


class Store:
    """Stored costs in memory."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state

    def load(self) -> dict[str, Any] | None:
        """The state."""
        return copy.deepcopy(self.state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state."""
        self.state = dict(state)

    save_in_background = save


def _scaled(factor: float) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["weights"] = [factor * weight for weight in state["weights"]]
        state["covariance"] = [[factor**2 * entry for entry in row] for row in state["covariance"]]

    return change


def _right(state: dict[str, Any]) -> None:
    """As they were measured."""


def _sawtooth(state: dict[str, Any]) -> None:
    """Each second number of rows is far cheaper than its neighbours."""
    for index in range(len(state["knots"])):
        state["weights"][index] *= 1.3 if index % 2 == 0 else 0.8


def _falling(state: dict[str, Any]) -> None:
    """The more rows, the less time."""
    count = len(state["knots"])
    state["weights"][:count] = state["weights"][:count][::-1]


def _free_drafts(state: dict[str, Any]) -> None:
    """Drafts cost nothing, and a step without them is too long by two fifths."""
    count = len(state["knots"])
    state["weights"][count + 1 :] = [0.0] * len(state["weights"][count + 1 :])
    state["weights"][0] *= 1.4


def _other_length(state: dict[str, Any]) -> None:
    """From a server with another limit of draft tokens."""
    state["knots"], state["weights"] = state["knots"][:-2], state["weights"][:-2]


PLANTED: dict[str, Callable[[dict[str, Any]], None]] = {
    "right": _right,
    "too short": _scaled(0.3),
    "too long": _scaled(3.0),
    "sawtooth": _sawtooth,
    "falling": _falling,
    "free drafts": _free_drafts,
    "another length": _other_length,
}
"""Changes of a stored state, in place: what a server may find that was measured under other conditions."""
