"""Expert parallelism: a placement of experts on devices that lowers the traffic between devices.

A token's hidden state is sent once to every device that holds one of its experts. Experts that are picked together are
placed on one device, which lowers the number of devices per token; popular experts are placed apart, which balances the
load. Every device gets the same number of experts, as vLLM requires.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from vllm_instant.moe.routing_trace import Trace, TraceError
from vllm_instant.tools.moe.expert_grouping import ConfidenceInterval, co_activation
from vllm_instant.tools.moe.grouping import balanced_groups

Devices = npt.NDArray[np.int64]
"""``[layers, experts]``, the device of each expert."""

BALANCE_WEIGHT = 1.0
"""Weight of the load imbalance (mean squared deviation of the devices' relative loads from 1) against the fraction of
separated pairs."""
_MAX_SWAPS = 500
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class PlacementTraffic:
    """Traffic and load balance of a placement on a trace.

    Attributes:
        devices_touched: mean number of devices per token and layer.
        transfers: mean number of copies of a token's hidden state per layer that leave its own device, if requests are
            spread evenly over the devices.
        imbalance: load of the busiest device relative to the mean, averaged over layers; 1 is best.

    """

    devices_touched: ConfidenceInterval
    transfers: ConfidenceInterval
    imbalance: float


@dataclass(frozen=True)
class PlacementComparison:
    """Default and learned placement on the same requests, which the learned one was not derived from."""

    devices: int
    default: PlacementTraffic
    learned: PlacementTraffic
    saved: ConfidenceInterval
    """Fraction of the transfers that the learned placement saves."""

    def to_record(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        record: dict[str, Any] = _COMPARISON.dump_python(self, mode="json")
        return record


_COMPARISON = TypeAdapter(PlacementComparison)


def contiguous(layers: int, experts: int, devices: int) -> Devices:
    """The default placement of vLLM ("linear"): contiguous ranges of experts."""
    return np.tile(np.arange(experts) * devices // experts, (layers, 1))


def place(trace: Trace, devices: int, seed: int = 0) -> Devices:
    """A placement with few devices per token and balanced load.

    Starts from balanced clusters of co-activation and from the default, and swaps pairs of experts between devices
    (Kernighan and Lin 1970) with the load in the objective; the better result is kept, per layer.

    Args:
        trace: natively routed tokens.
        devices: number of devices; it must divide the number of experts.
        seed: seed of the clustering.

    Raises:
        TraceError: if the experts cannot be divided equally.

    """
    model = trace.model
    if devices < 1 or model.experts % devices:
        raise TraceError(f"{model.experts} experts cannot be placed on {devices} devices equally")
    default = contiguous(model.layers, model.experts, devices)
    if devices == 1:
        return default
    placed = []
    for pairs, linear in zip(co_activation(trace), default, strict=True):
        use = np.diag(pairs).copy()
        load = use / max(use.sum(), 1.0) * devices  # relative to the mean load of a device
        # Fractions of all pairs of different experts.
        apart = pairs - np.diag(use)
        apart /= max(apart.sum(), 1.0)
        scale = np.sqrt(np.maximum(use, 1.0))
        starts = [balanced_groups(pairs / np.outer(scale, scale), devices, seed, starts=2), linear]
        candidates = [_swap_pairs(apart, load, start, devices) for start in starts]
        best = min(candidates, key=lambda labels: _cost(apart, load, labels, devices))
        placed.append(best)
    return np.stack(placed)


def _cost(apart: npt.NDArray[np.float64], load: npt.NDArray[np.float64], labels: Any, devices: int) -> float:
    separated = float(apart[labels[:, None] != labels[None]].sum())
    loads = np.bincount(labels, weights=load, minlength=devices)
    return separated + BALANCE_WEIGHT * float(((loads - 1) ** 2).mean())


def _swap_pairs(
    apart: npt.NDArray[np.float64], load: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], devices: int
) -> npt.NDArray[np.int64]:
    """Swap the pair of experts that lowers the cost most, until no swap lowers it."""
    labels = labels.copy()
    for _ in range(_MAX_SWAPS):
        member = np.eye(devices)[labels]
        pull = apart @ member  # pairs of each expert with the experts of each device
        loads = load @ member
        own = pull[np.arange(len(labels)), labels]
        # Swapping a and b gains for both their pairs on the other's device minus their pairs on their own; the pair
        # (a, b) itself stays separated. Each pair counts twice in the symmetric matrix.
        towards = pull[:, labels]
        gain = 2 * (towards - own[:, None] + towards.T - own[None] - 2 * apart)
        shift = load[None] - load[:, None]  # additional load of the device of a
        before = (loads[labels][:, None] - 1) ** 2 + (loads[labels][None] - 1) ** 2
        after = (loads[labels][:, None] + shift - 1) ** 2 + (loads[labels][None] - shift - 1) ** 2
        gain = gain + BALANCE_WEIGHT * (before - after) / devices
        gain[labels[:, None] == labels[None]] = -np.inf
        a, b = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[a, b] <= 1e-12:
            break
        labels[a], labels[b] = labels[b], labels[a]
    return labels


def compare(trace: Trace, learned: Devices, devices: int, seed: int = 0) -> PlacementComparison:
    """Compare default and learned placement on a trace that the learned one was not derived from.

    Confidence intervals are from resampled requests.
    """
    model = trace.model
    requests, row = np.unique(trace.request, return_inverse=True)
    counts = np.bincount(row)
    touched, imbalance = [], []
    for placed in (contiguous(model.layers, model.experts, devices), learned):
        per_token = np.zeros(len(trace))
        for layer in range(model.layers):
            hit = np.zeros((len(trace), devices), bool)
            np.put_along_axis(hit, placed[layer][trace.experts[:, layer]], True, axis=1)
            per_token += hit.sum(1)
        touched.append(np.bincount(row, weights=per_token / model.layers))
        imbalance.append(_imbalance(trace, placed, devices))
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(requests), (NUM_RESAMPLES, len(requests)))
    samples = [sums[drawn].sum(1) / counts[drawn].sum(1) for sums in touched]
    values = [float(sums.sum() / counts.sum()) for sums in touched]
    # With requests spread evenly, the own device is any of the devices with probability 1 / devices.
    away = 1 - 1 / devices
    traffic = [
        PlacementTraffic(
            ConfidenceInterval.of(value, sample), ConfidenceInterval.of(value * away, sample * away), balance
        )
        for value, sample, balance in zip(values, samples, imbalance, strict=True)
    ]
    saved = ConfidenceInterval.of(1 - values[1] / values[0], 1 - samples[1] / samples[0])
    return PlacementComparison(devices, traffic[0], traffic[1], saved)


def _imbalance(trace: Trace, placed: Devices, devices: int) -> float:
    loads = [
        np.bincount(placed[layer][trace.experts[:, layer]].ravel(), minlength=devices)
        for layer in range(trace.model.layers)
    ]
    return float(np.mean([load.max() / load.mean() for load in loads]))


def physical_to_logical(placed: Sequence[Sequence[int]] | Devices) -> npt.NDArray[np.int64]:
    """The placement as vLLM's EPLB represents it: int64 ``[layers, physical experts]``, the logical expert of each.

    Device ``d`` of ``n`` holds the physical experts from ``d * experts / n``. Every row is a permutation: there are no
    redundant experts. An EPLB policy's ``rebalance_experts`` returns such a table; vLLM 0.32 and 0.33 read none from a
    file.
    """
    return np.argsort(np.asarray(placed, np.int64), axis=1, kind="stable")
