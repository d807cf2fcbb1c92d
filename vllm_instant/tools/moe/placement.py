"""Expert parallelism: which expert lies on which device, so that tokens travel less.

A token's hidden state is sent once to every device that has one of its experts. Placing experts that are chosen
together on one device lowers how many devices a token needs; placing popular experts apart keeps devices equally
busy. Every device gets equally many experts, as vLLM wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.moe.routing_trace import Trace, TraceError
from vllm_instant.tools.moe.expert_grouping import Interval, co_activation
from vllm_instant.tools.moe.grouping import balanced_groups

Devices = npt.NDArray[np.int64]
"""``[layers, experts]``, the device of each expert."""

BALANCE = 1.0
"""What unequal load costs beside separated pairs: the mean square of a device's load relative to the mean, minus 1."""
_SWAPS = 500
RESAMPLES = 1000


@dataclass(frozen=True)
class Traffic:
    """What a placement costs on a trace.

    Attributes:
        devices_touched: devices that a token needs in one layer, mean.
        transfers: copies of a token's hidden state that leave its own device in one layer, mean, for requests that are
            spread over the devices evenly.
        imbalance: load of the busiest device over the mean, averaged over layers; 1 is best.
        imbalance_step: the same within one step, for decode steps of the trace with at least as many tokens as devices.

    """

    devices_touched: Interval
    transfers: Interval
    imbalance: float
    imbalance_step: float | None

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        values = asdict(self)
        return values | {name: getattr(self, name).plain() for name in ("devices_touched", "transfers")}


@dataclass(frozen=True)
class Comparison:
    """Default and learned placement on the same requests, which the learned one has not seen."""

    devices: int
    default: Traffic
    learned: Traffic
    saved: Interval
    """Share of the transfers that the learned placement saves."""

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "devices": self.devices,
            "default": self.default.plain(),
            "learned": self.learned.plain(),
            "saved": self.saved.plain(),
        }


def contiguous(layers: int, experts: int, devices: int) -> Devices:
    """The default of vLLM ("linear"): the first experts on the first device, and so on."""
    return np.tile(np.arange(experts) * devices // experts, (layers, 1))


def place(trace: Trace, devices: int, seed: int = 0) -> Devices:
    """A placement that lowers how many devices a token touches and keeps load even.

    Starts from balanced clusters of co-activation and improves by swapping pairs of experts between devices (Kernighan
    and Lin 1970), with the load of devices in the objective. A layer keeps the default where that is no worse.

    Args:
        trace: natively routed tokens.
        devices: how many; must divide the number of experts.
        seed: of the clustering.

    Raises:
        TraceError: when the experts cannot be divided equally.

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
        load = use / max(use.sum(), 1.0) * devices  # a device's share, 1 for the mean
        apart = pairs - np.diag(use)
        apart /= max(apart.sum(), 1.0)
        scale = np.sqrt(np.maximum(use, 1.0))
        starts = [balanced_groups(pairs / np.outer(scale, scale), devices, seed, starts=2), linear]
        found = [_improved(apart, load, start, devices) for start in starts]
        best = min(found, key=lambda labels: _cost(apart, load, labels, devices))
        placed.append(best)
    return np.stack(placed)


def _cost(apart: npt.NDArray[np.float64], load: npt.NDArray[np.float64], labels: Any, devices: int) -> float:
    separated = float(apart[labels[:, None] != labels[None]].sum())
    loads = np.bincount(labels, weights=load, minlength=devices)
    return separated + BALANCE * float(((loads - 1) ** 2).mean())


def _improved(
    apart: npt.NDArray[np.float64], load: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], devices: int
) -> npt.NDArray[np.int64]:
    """Swap the pair that lowers the cost most, until none does."""
    labels = labels.copy()
    for _ in range(_SWAPS):
        member = np.eye(devices)[labels]
        pull = apart @ member  # pairs of each expert with each device
        loads = load @ member
        own = pull[np.arange(len(labels)), labels]
        # Swapping a and b: what both gain on the other's device, without the pair of themselves.
        towards = pull[:, labels]
        gain = 2 * (towards - own[:, None] + towards.T - own[None] - 2 * apart)
        shift = load[None] - load[:, None]  # what a's device gets more
        before = (loads[labels][:, None] - 1) ** 2 + (loads[labels][None] - 1) ** 2
        after = (loads[labels][:, None] + shift - 1) ** 2 + (loads[labels][None] - shift - 1) ** 2
        gain = gain + BALANCE * (before - after) / devices
        gain[labels[:, None] == labels[None]] = -np.inf
        a, b = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[a, b] <= 1e-12:
            break
        labels[a], labels[b] = labels[b], labels[a]
    return labels


def compare(trace: Trace, learned: Devices, devices: int, seed: int = 0) -> Comparison:
    """Default and learned placement on a trace that the learned one has not seen; intervals by resampling requests."""
    model = trace.model
    requests, row = np.unique(trace.request, return_inverse=True)
    counts = np.bincount(row)
    touched, means = [], []
    for placed in (contiguous(model.layers, model.experts, devices), learned):
        per_token = np.zeros(len(trace))
        for layer in range(model.layers):
            hit = np.zeros((len(trace), devices), bool)
            np.put_along_axis(hit, placed[layer][trace.experts[:, layer]], True, axis=1)
            per_token += hit.sum(1)
        touched.append(np.bincount(row, weights=per_token / model.layers))
        means.append(_balance(trace, placed, devices))
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(requests), (RESAMPLES, len(requests)))
    samples = [sums[drawn].sum(1) / counts[drawn].sum(1) for sums in touched]
    values = [float(sums.sum() / counts.sum()) for sums in touched]
    # The token's own device is one of those it touches with the same chance for each: 1 of `devices`.
    away = 1 - 1 / devices
    traffic = [
        Traffic(_interval(value, sample), _interval(value * away, sample * away), *balance)
        for value, sample, balance in zip(values, samples, means, strict=True)
    ]
    saved = _interval(1 - values[1] / values[0], 1 - samples[1] / samples[0])
    return Comparison(devices, traffic[0], traffic[1], saved)


def _interval(value: float, sample: npt.NDArray[np.float64]) -> Interval:
    low, high = np.quantile(sample, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _balance(trace: Trace, placed: Devices, devices: int) -> tuple[float, float | None]:
    decode = trace.decode()
    _, row, counts = np.unique(decode.step, return_inverse=True, return_counts=True)
    large = counts >= devices
    overall, steps = [], []
    for layer in range(trace.model.layers):
        load = np.bincount(placed[layer][trace.experts[:, layer]].ravel(), minlength=devices)
        overall.append(load.max() / load.mean())
        if large.any():
            table = np.zeros((len(counts), devices))
            np.add.at(table, (row[:, None], placed[layer][decode.experts[:, layer]]), 1.0)
            steps.append(float((table[large].max(1) / table[large].mean(1)).mean()))
    return float(np.mean(overall)), float(np.mean(steps)) if steps else None


def physical_to_logical(placed: Sequence[Sequence[int]] | Devices) -> npt.NDArray[np.int64]:
    """The placement in the form of vLLM's EPLB: int64 ``[layers, physical experts]``, the expert in each place.

    Device ``d`` of ``n`` has the places ``d * experts / n`` and on. Every row is a permutation: there are no redundant
    experts. An EPLB policy's ``rebalance_experts`` returns such a table; vLLM 0.32 and 0.33 read none from a file.
    """
    return np.argsort(np.asarray(placed, np.int64), axis=1, kind="stable")
