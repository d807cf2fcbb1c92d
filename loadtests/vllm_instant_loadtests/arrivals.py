"""Due times of requests: random arrivals that follow a rate over time, independent of the server."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
_PARTS = 256
"""Number of parts of each linear piece of the rate's curve, for interpolating its integral."""


def due(
    rate: float | Sequence[tuple[float, float]],
    seconds: float,
    random: np.random.Generator,
    process: str = "poisson",
    cv: float = 2.0,
) -> Times:
    """Arrival times in ``[0, seconds)``, float64 ``[n]``, in order.

    Args:
        rate: arrivals per second, or points ``(second, rate)`` with linear interpolation; outside of them the first
            and the last rate apply.
        seconds: length of the timeline.
        random: generator of the gaps.
        process: ``poisson``; ``gamma``, with ``cv``; or ``even`` (equal gaps).
        cv: coefficient of variation of the gaps of ``gamma``.

    """
    when, expected = _cumulated(rate, seconds)
    total = expected[-1]
    # Time rescaling: arrivals at rate one, mapped through the inverse of the rate's integral.
    arrivals = np.empty(0)
    while not len(arrivals) or arrivals[-1] < total:
        more = np.cumsum(_gaps(process, cv, int(total * 1.2) + 16, random))
        arrivals = np.concatenate([arrivals, more + (arrivals[-1] if len(arrivals) else 0.0)])
    found: Times = np.interp(arrivals[arrivals < total], expected, when)
    return found


def traced(file: Path, seconds: float, speed: float = 1.0) -> Times:
    """The arrival times of a file, one per line in seconds, relative to the first; raises ValueError or OSError."""
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    try:
        times = np.sort(np.array([float(line) for line in lines if line]))
    except ValueError as error:
        raise ValueError(f"{file} should have one arrival time in seconds per line: {error}") from None
    if not len(times):
        raise ValueError(f"{file} has no arrival times: write one in seconds per line")
    played: Times = (times - times[0]) / speed
    return played[played < seconds]


def _cumulated(rate: float | Sequence[tuple[float, float]], seconds: float) -> tuple[Times, Times]:
    points = [(0.0, rate)] if isinstance(rate, int | float) else list(rate)
    points = [(0.0, points[0][1]), *points, (max(seconds, points[-1][0]), points[-1][1])]
    when, expected = [np.zeros(1)], [np.zeros(1)]
    for (begin, low), (end, high) in itertools.pairwise(points):
        if end <= begin:
            continue
        part = np.linspace(0.0, 1.0, _PARTS + 1)[1:]
        when.append(begin + (end - begin) * part)
        expected.append(expected[-1][-1] + (end - begin) * (low * part + (high - low) * part**2 / 2))
    all_when, all_expected = np.concatenate(when), np.concatenate(expected)
    inside = all_when < seconds
    end_value = np.interp(seconds, all_when, all_expected)
    return np.append(all_when[inside], seconds), np.append(all_expected[inside], end_value)


def _gaps(process: str, cv: float, count: int, random: np.random.Generator) -> Times:
    if process == "even":
        return np.ones(count)
    if process == "gamma":
        return random.gamma(1 / cv**2, cv**2, count)
    return random.exponential(1.0, count)
