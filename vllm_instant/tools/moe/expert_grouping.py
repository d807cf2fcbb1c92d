"""From traces to super-experts: which experts are used together, and whether that is more than chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.moe.expert_groups import SuperExperts
from vllm_instant.moe.routing_trace import Trace, TraceError
from vllm_instant.tools.moe.grouping import balanced_groups

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
"""``[layers, experts]``."""

LEARN_SHARE = 0.7
"""Share of the requests that clusters are learned from; the others say what they are worth."""
MIN_REQUESTS = 8
"""With fewer requests neither a split nor an interval means anything."""
RESAMPLES = 1000
ROWS = 65_536
NEARLY = 0.05
"""How much less modularity a larger number of clusters may have."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, requests resampled."""

    value: float
    low: float
    high: float

    def plain(self) -> list[float]:
        """Value, lower and upper end."""
        return [round(number, 5) for number in (self.value, self.low, self.high)]

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Judgement:
    """What clusters are worth on requests that they were not learned from.

    Attributes:
        together: of all pairs of experts that one token chose, the share within one cluster, over what clusters of the
            same sizes drawn at random have on average; 1 means chance.
        beyond_popularity: the same over what would be if every expert were as popular as it is, but chosen without
            regard to the others: 1 means that clusters only collect popular experts.
        best_cluster: the share of a token's router weight that lies in its best cluster, minus the same for random
            clusters.
        stability: adjusted Rand index between clusters learned from two halves of the requests, mean over layers:
            0 for unrelated clusters, 1 for the same.
        by_layer: ``together`` for each layer.

    """

    together: Interval
    beyond_popularity: Interval
    best_cluster: Interval
    stability: float
    by_layer: tuple[float, ...]

    @property
    def structured(self) -> bool:
        """Whether experts form clusters at all: beyond chance and popularity, and found again in other requests."""
        return self.together.low > 1.0 and self.beyond_popularity.low > 1.0 and self.stability > STABLE

    def sentence(self) -> str:
        """The verdict, for people."""
        if not self.structured:
            return (
                "no structure: on requests not learned from, these clusters are no better than random ones "
                f"({self.together} times their pairs, {self.beyond_popularity} beyond popularity, "
                f"stability {self.stability:.2f})"
            )
        return (
            f"experts of one cluster are chosen together {self.together} times as often as in random clusters "
            f"({self.beyond_popularity} beyond popularity); stability {self.stability:.2f}"
        )


STABLE = 0.1


def co_activation(trace: Trace) -> Floats:
    """How often two experts were chosen by one token: ``[layers, experts, experts]``, the diagonal is their use."""
    return np.stack([_pairs(trace.experts[:, layer], trace.model.experts) for layer in range(trace.model.layers)])


def _pairs(chosen: npt.NDArray[np.int16], experts: int) -> Floats:
    """One layer's pairs, some ten thousand tokens at a time: a table of tokens and experts can be large."""
    found = np.zeros((experts, experts))
    for start in range(0, len(chosen), ROWS):
        part = chosen[start : start + ROWS].astype(np.int64)
        use = np.zeros((len(part), experts), np.float32)
        np.put_along_axis(use, part, 1.0, axis=1)
        found += use.T @ use
    return found


def clusters_of(pairs: Floats, clusters: int, seed: int = 0) -> Labels:
    """Balanced clusters of every layer, from ``co_activation``; ``[layers, experts]``.

    Two experts are alike by the cosine of their use, so that popular ones do not attract each other for being popular.
    """
    found = []
    for matrix in pairs:
        use = np.maximum(np.diag(matrix), 1.0)
        found.append(balanced_groups(matrix / np.sqrt(use[:, None] * use[None]), clusters, seed))
    return np.stack(found)


def choose_clusters_count(trace: Trace, seed: int = 0) -> tuple[int, dict[int, float]]:
    """The number of clusters that explains requests best which were not learned from.

    Modularity (Newman 2006) is the share of pairs within clusters minus what popularity alone would give; it does not
    grow by itself with larger or with smaller clusters. Of numbers that are nearly as good as the best, the largest is
    taken: more clusters say more.

    Returns:
        The number, and the modularity of each number that was tried (powers of two, clusters of at least two).

    """
    first, second = trace.split(LEARN_SHARE, seed)
    learned, other = co_activation(first), co_activation(second)
    tried: dict[int, float] = {}
    count = 2
    while count * 2 <= trace.model.experts:
        labels = clusters_of(learned, count, seed)
        tried[count] = float(np.mean([modularity(m, row) for m, row in zip(other, labels, strict=True)]))
        count *= 2
    if not tried:
        return 1, {}
    best = max(tried.values())
    return max(number for number, value in tried.items() if value >= best - NEARLY * abs(best)), tried


def modularity(pairs: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Share of pairs within clusters minus the share that popularity gives, for one layer."""
    within, expected = _within_and_expected(pairs, labels)
    return within - expected


def _within_and_expected(pairs: Floats, labels: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Share of pairs of different experts within clusters, and the same if experts were chosen independently."""
    use = np.diag(pairs)
    independent = np.outer(use, use)
    same = labels[:, None] == labels[None]
    shares = []
    for matrix in (pairs, independent):
        apart = matrix - np.diag(np.diag(matrix))
        shares.append(float((apart * same).sum() / max(apart.sum(), 1e-300)))
    return shares[0], shares[1]


def judge(trace: Trace, labels: Labels, stability: float, seed: int = 0) -> Judgement:
    """What clusters are worth on a trace that they were not learned from."""
    model, generator = trace.model, np.random.default_rng(seed)
    random = np.stack([generator.permuted(row) for row in labels])
    requests = trace.requests
    # One row of sums for each request: resampling requests is then resampling rows.
    pairs = np.empty((len(requests), model.layers, 2))
    masses = np.empty((len(requests), 3))
    trace = trace.select(np.argsort(trace.request, kind="stable"))
    ends = np.searchsorted(trace.request, requests, side="right")
    for row, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        own = trace.select(slice(start, end))
        for layer in range(model.layers):
            counted = _pairs(own.experts[:, layer], model.experts)
            apart = counted - np.diag(np.diag(counted))
            same = labels[layer][:, None] == labels[layer][None]
            pairs[row, layer] = (apart * same).sum(), apart.sum()
        masses[row] = _best_mass(own, labels), _best_mass(own, random), len(own) * model.layers
    by_chance = np.array([_pairs_by_chance(row) for row in labels])
    # Popularity is a property of all requests together; its own uncertainty is small beside that of pairs.
    popular = np.array(
        [_within_and_expected(m, row)[1] for m, row in zip(co_activation(trace), labels, strict=True)], np.float64
    )

    def values(chosen: npt.NDArray[np.int64]) -> tuple[Floats, list[float]]:
        sums = pairs[chosen].sum(0)
        within = sums[:, 0] / np.maximum(sums[:, 1], 1.0)
        mass = masses[chosen].sum(0)
        by_layer = within / np.maximum(by_chance, 1e-300)
        beyond = float(np.mean(within / np.maximum(popular, 1e-300)))
        return by_layer, [float(by_layer.mean()), beyond, float((mass[0] - mass[1]) / mass[2])]

    every = np.arange(len(requests))
    layers, central = values(every)
    drawn = np.array([values(generator.choice(every, len(every)))[1] for _ in range(RESAMPLES)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    together, beyond, mass = (Interval(value, float(low[i]), float(high[i])) for i, value in enumerate(central))
    return Judgement(together, beyond, mass, stability, tuple(layers.tolist()))


def _pairs_by_chance(labels: npt.NDArray[np.int64]) -> float:
    """The share of pairs within clusters when experts are dealt to them at random: exact, for any use."""
    sizes = np.bincount(labels)
    return float((sizes * (sizes - 1)).sum() / (len(labels) * (len(labels) - 1)))


def _best_mass(trace: Trace, labels: Labels) -> float:
    """The sum over tokens and layers of the weight share in the token's best cluster."""
    total = 0.0
    for layer in range(trace.model.layers):
        weights = trace.weights[:, layer].astype(np.float64)
        table = np.zeros((len(trace), int(labels[layer].max()) + 1))
        cluster = labels[layer][trace.experts[:, layer]]
        np.add.at(table, (np.arange(len(trace))[:, None], cluster), weights)
        total += float((table.max(1) / np.maximum(weights.sum(1), 1e-9)).sum())
    return total


def stability(trace: Trace, clusters: int, seed: int = 0, splits: int = 3) -> float:
    """Adjusted Rand index between the clusters of two halves of the requests, mean over layers and splits."""
    from sklearn.metrics import adjusted_rand_score

    found: list[float] = []
    for split in range(splits):
        halves = [clusters_of(co_activation(half), clusters, seed) for half in trace.split(0.5, seed + split)]
        found.extend(adjusted_rand_score(a, b) for a, b in zip(*halves, strict=True))
    return float(np.mean(found))


def affinity_by_class(trace: Trace, labels: Labels) -> dict[str, tuple[tuple[float, ...], ...]]:
    """For each prompt class the share of its router weight that each cluster gets, ``[layers][clusters]``."""
    found = {}
    for code, name in enumerate(trace.classes):
        own = trace.select(trace.prompt_group == code)
        if not len(own):
            continue
        layers = []
        for layer in range(trace.model.layers):
            shares = np.bincount(
                labels[layer][own.experts[:, layer]].ravel(),
                weights=own.weights[:, layer].astype(np.float64).ravel(),
                minlength=int(labels[layer].max()) + 1,
            )
            layers.append(tuple((shares / shares.sum()).tolist()))
        found[name] = tuple(layers)
    return found


def class_distance(affinity: dict[str, tuple[tuple[float, ...], ...]]) -> float:
    """How differently prompt classes use the clusters: total variation distance, mean over layers and pairs; 0..1."""
    names = list(affinity)
    found = [
        0.5 * float(np.abs(np.subtract(a, b)).sum())
        for i, first in enumerate(names)
        for second in names[i + 1 :]
        for a, b in zip(affinity[first], affinity[second], strict=True)
    ]
    return float(np.mean(found)) if found else 0.0


def strength(trace: Trace) -> Floats:
    """The weight that an expert has when it is chosen, relative to the layer's mean, 0.5 to 2: ``[layers, experts]``.

    An expert that is only ever chosen as the seventh or eighth is missed less than its demand says.
    """
    found = []
    for layer in range(trace.model.layers):
        chosen = trace.experts[:, layer].ravel().astype(np.int64)
        weights = trace.weights[:, layer].ravel().astype(np.float64)
        use = np.bincount(chosen, minlength=trace.model.experts)
        mean = np.bincount(chosen, weights=weights, minlength=trace.model.experts) / np.maximum(use, 1)
        # An expert that was never chosen is worth as much as others: nothing is known of it.
        mean[use == 0] = mean[use > 0].mean()
        found.append(np.clip(mean / mean.mean(), 0.5, 2.0))
    return np.stack(found)


def learn(trace: Trace, clusters: int | None = None, seed: int = 0) -> tuple[SuperExperts, Judgement]:
    """Super-experts of every layer, and what they are worth on requests that were kept back.

    The clusters that are returned are learned from all requests; the judgement is that of clusters learned in the same
    way from a part of them.

    Args:
        trace: natively routed tokens, of at least 8 requests.
        clusters: how many a layer gets; by default the number with the largest modularity.
        seed: of splits, starts and resampling.

    Raises:
        TraceError: when there are too few requests, or more clusters than experts.

    """
    model = trace.model
    if len(trace.requests) < MIN_REQUESTS:
        raise TraceError(f"{len(trace.requests)} requests are too few to learn from: at least {MIN_REQUESTS}")
    if clusters is not None and not 1 <= clusters <= model.experts:
        raise TraceError(f"{clusters} clusters of {model.experts} experts: valid are 1 to {model.experts}")
    tried: dict[int, float] = {}
    if clusters is None:
        clusters, tried = choose_clusters_count(trace, seed)
    kept, back = trace.split(LEARN_SHARE, seed)
    judged = judge(back, clusters_of(co_activation(kept), clusters, seed), stability(trace, clusters, seed), seed)
    labels = clusters_of(co_activation(trace), clusters, seed)
    affinity = affinity_by_class(trace, labels)
    notes: dict[str, Any] = {
        "tokens": len(trace),
        "requests": len(trace.requests),
        "classes": list(trace.classes),
        "clusters": clusters,
        "modularity": {str(count): round(value, 4) for count, value in tried.items()},
        "together": judged.together.plain(),
        "beyond_popularity": judged.beyond_popularity.plain(),
        "best_cluster": judged.best_cluster.plain(),
        "stability": round(judged.stability, 4),
        "class_distance": round(class_distance(affinity), 4),
        "structured": judged.structured,
    }
    found = SuperExperts(
        model,
        tuple(tuple(row) for row in labels.tolist()),
        tuple(tuple(row) for row in strength(trace).tolist()),
        affinity,
        learned_from=notes,
    )
    return found, judged
