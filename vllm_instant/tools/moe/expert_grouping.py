"""From routing traces to groups of experts: which experts are used together, and whether more than by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import PlainSerializer, TypeAdapter

from vllm_instant.moe.expert_groups import SuperExperts
from vllm_instant.moe.routing_trace import Trace, TraceError
from vllm_instant.tools.moe.grouping import balanced_groups

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
"""``[layers, experts]``."""

TRAINING_FRACTION = 0.7
"""Fraction of the requests from which clusters are learned; they are evaluated on the others."""
MIN_REQUESTS = 8
"""With fewer requests neither a split nor a confidence interval is meaningful."""
NUM_RESAMPLES = 1000
ROWS_PER_PART = 65_536
"""Tokens counted at a time, which bounds the memory."""
MODULARITY_TOLERANCE = 0.05
"""Relative loss of modularity that is accepted for a larger number of clusters."""
MIN_STABILITY = 0.1
"""Adjusted Rand index above which clusters count as reproducible."""


_Rounded = Annotated[float, PlainSerializer(lambda value: round(value, 5), return_type=float)]


class ConfidenceInterval(NamedTuple):
    """An estimate with its 95 % bootstrap interval; a list of three numbers in JSON."""

    value: _Rounded
    low: _Rounded
    high: _Rounded

    @classmethod
    def of(cls, value: float, resampled: npt.NDArray[np.float64]) -> ConfidenceInterval:
        """The percentile interval (Efron 1979) from the estimates of resampled data."""
        low, high = np.quantile(resampled, [0.025, 0.975])
        return cls(value, float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ClusterEvaluation:
    """Measures of clusters on requests that they were not learned from.

    Attributes:
        together: fraction of the pairs of experts picked by one token that lie within one cluster, relative to its
            expectation for random clusters of the same sizes; 1 means chance.
        beyond_popularity: the same relative to independent picks with the measured popularity of every expert; 1 means
            that clusters only collect popular experts.
        best_cluster: fraction of a token's router weight in its best cluster, minus the same for random clusters.
        stability: adjusted Rand index between clusters learned from two halves of the requests, mean over layers:
            0 for unrelated clusters, 1 for the same.
        by_layer: ``together`` of each layer.

    """

    together: ConfidenceInterval
    beyond_popularity: ConfidenceInterval
    best_cluster: ConfidenceInterval
    stability: float
    by_layer: tuple[float, ...]

    @property
    def structured(self) -> bool:
        """Whether the clusters exceed chance and popularity and are reproduced from other requests."""
        return self.together.low > 1.0 and self.beyond_popularity.low > 1.0 and self.stability > MIN_STABILITY

    def to_record(self) -> dict[str, Any]:
        """The measures as a JSON object."""
        return {
            **_EVALUATION.dump_python(self, mode="json", exclude={"stability", "by_layer"}),
            "stability": round(self.stability, 4),
        }

    def summary(self) -> str:
        """The result in one sentence."""
        if not self.structured:
            return (
                "no structure: on held-out requests these clusters are no better than random ones "
                f"({self.together} times their pairs, {self.beyond_popularity} relative to popularity, "
                f"stability {self.stability:.2f})"
            )
        return (
            f"experts of one cluster are picked together {self.together} times as often as in random clusters "
            f"({self.beyond_popularity} relative to popularity); stability {self.stability:.2f}"
        )


_EVALUATION = TypeAdapter(ClusterEvaluation)


def co_activation(trace: Trace) -> Floats:
    """Tokens that picked both of two experts, ``[layers, experts, experts]``; the diagonal counts their use."""
    return np.stack([_pairs(trace.experts[:, layer], trace.model.experts) for layer in range(trace.model.layers)])


def _pairs(picks: npt.NDArray[np.int16], experts: int) -> Floats:
    """The co-activation of one layer."""
    pairs = np.zeros((experts, experts))
    for start in range(0, len(picks), ROWS_PER_PART):
        part = picks[start : start + ROWS_PER_PART].astype(np.int64)
        use = np.zeros((len(part), experts), np.float32)
        np.put_along_axis(use, part, 1.0, axis=1)
        pairs += use.T @ use
    return pairs


def clusters_of(pairs: Floats, clusters: int, seed: int = 0) -> Labels:
    """Balanced clusters of every layer, ``[layers, experts]``, from ``co_activation``.

    The similarity of two experts is the cosine of their use, which does not grow with their popularity.
    """
    labels = []
    for matrix in pairs:
        use = np.maximum(np.diag(matrix), 1.0)
        labels.append(balanced_groups(matrix / np.sqrt(use[:, None] * use[None]), clusters, seed))
    return np.stack(labels)


def best_num_clusters(trace: Trace, seed: int = 0) -> tuple[int, dict[int, float]]:
    """The number of clusters with the best modularity on held-out requests.

    Modularity (Newman 2006) is the fraction of pairs within clusters minus the fraction expected from popularity alone;
    it has no bias towards large or small clusters. Within ``MODULARITY_TOLERANCE`` of the best the largest number is
    taken, because more clusters carry more information.

    Returns:
        The number, and the modularity of each candidate (powers of two, clusters of at least two).

    """
    first, second = trace.split(TRAINING_FRACTION, seed)
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
    return max(number for number, value in tried.items() if value >= best - MODULARITY_TOLERANCE * abs(best)), tried


def modularity(pairs: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Fraction of pairs within clusters minus its expectation for independent picks, for one layer."""
    within, expected = _within_and_expected(pairs, labels)
    return within - expected


def _within_and_expected(pairs: Floats, labels: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Fraction of the pairs of different experts within clusters, and the same for independent picks."""
    use = np.diag(pairs)
    independent = np.outer(use, use)
    same = labels[:, None] == labels[None]
    fractions = []
    for matrix in (pairs, independent):
        apart = matrix - np.diag(np.diag(matrix))
        fractions.append(float((apart * same).sum() / max(apart.sum(), 1e-300)))
    return fractions[0], fractions[1]


def evaluate(trace: Trace, labels: Labels, stability: float, seed: int = 0) -> ClusterEvaluation:
    """Evaluate clusters on a trace that they were not learned from."""
    model, generator = trace.model, np.random.default_rng(seed)
    random = np.stack([generator.permuted(row) for row in labels])
    requests = trace.requests
    # One row of sums per request, so that resampling requests is resampling rows.
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
    # Popularity is taken from all requests: its uncertainty is small compared with that of pairs.
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
    by_layer, estimates = values(every)
    resampled = np.array([values(generator.choice(every, len(every)))[1] for _ in range(NUM_RESAMPLES)])
    together, beyond, mass = map(ConfidenceInterval.of, estimates, resampled.T)
    return ClusterEvaluation(together, beyond, mass, stability, tuple(by_layer.tolist()))


def _pairs_by_chance(labels: npt.NDArray[np.int64]) -> float:
    """Expected fraction of pairs within random clusters of the same sizes, whatever the popularity of experts.

    sum_c n_c (n_c - 1) / (n (n - 1)): the probability that two different experts are in one cluster.
    """
    sizes = np.bincount(labels)
    return float((sizes * (sizes - 1)).sum() / (len(labels) * (len(labels) - 1)))


def _best_mass(trace: Trace, labels: Labels) -> float:
    """Sum over tokens and layers of the fraction of router weight in the token's best cluster."""
    total = 0.0
    for layer in range(trace.model.layers):
        weights = trace.weights[:, layer].astype(np.float64)
        table = np.zeros((len(trace), int(labels[layer].max()) + 1))
        cluster = labels[layer][trace.experts[:, layer]]
        np.add.at(table, (np.arange(len(trace))[:, None], cluster), weights)
        total += float((table.max(1) / np.maximum(weights.sum(1), 1e-9)).sum())
    return total


def stability(trace: Trace, clusters: int, seed: int = 0, splits: int = 3) -> float:
    """Adjusted Rand index between clusters of two halves of the requests, mean over layers and splits."""
    from sklearn.metrics import adjusted_rand_score

    found: list[float] = []
    for split in range(splits):
        halves = [clusters_of(co_activation(half), clusters, seed) for half in trace.split(0.5, seed + split)]
        found.extend(adjusted_rand_score(a, b) for a, b in zip(*halves, strict=True))
    return float(np.mean(found))


def affinity_by_class(trace: Trace, labels: Labels) -> dict[str, tuple[tuple[float, ...], ...]]:
    """For each prompt class the fraction of its router weight that each cluster gets, ``[layers][clusters]``."""
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
    """Total variation distance between the cluster use of prompt classes, mean over layers and pairs of classes."""
    names = list(affinity)
    found = [
        0.5 * float(np.abs(np.subtract(a, b)).sum())
        for i, first in enumerate(names)
        for second in names[i + 1 :]
        for a, b in zip(affinity[first], affinity[second], strict=True)
    ]
    return float(np.mean(found)) if found else 0.0


def strength(trace: Trace) -> Floats:
    """Mean weight of an expert when picked, relative to the layer's mean, 0.5 to 2: ``[layers, experts]``.

    An expert that is mostly picked as the last of a token's picks loses less when refused than its demand suggests.
    """
    found = []
    for layer in range(trace.model.layers):
        chosen = trace.experts[:, layer].ravel().astype(np.int64)
        weights = trace.weights[:, layer].ravel().astype(np.float64)
        use = np.bincount(chosen, minlength=trace.model.experts)
        mean = np.bincount(chosen, weights=weights, minlength=trace.model.experts) / np.maximum(use, 1)
        # An expert that was never picked gets the mean.
        mean[use == 0] = mean[use > 0].mean()
        found.append(np.clip(mean / mean.mean(), 0.5, 2.0))
    return np.stack(found)


def learn(trace: Trace, clusters: int | None = None, seed: int = 0) -> tuple[SuperExperts, ClusterEvaluation]:
    """Learn clusters of every layer, and evaluate them on held-out requests.

    The returned clusters are learned from all requests; the evaluation is of clusters learned from a part of them.

    Args:
        trace: natively routed tokens of at least ``MIN_REQUESTS`` requests.
        clusters: clusters per layer; by default by modularity.
        seed: seed of splits, starts and resampling.

    Raises:
        TraceError: if there are too few requests, or more clusters than experts.

    """
    model = trace.model
    if len(trace.requests) < MIN_REQUESTS:
        raise TraceError(f"{len(trace.requests)} requests are too few to learn from: at least {MIN_REQUESTS}")
    if clusters is not None and not 1 <= clusters <= model.experts:
        raise TraceError(f"{clusters} clusters of {model.experts} experts: valid are 1 to {model.experts}")
    tried: dict[int, float] = {}
    if clusters is None:
        clusters, tried = best_num_clusters(trace, seed)
    training, held_out = trace.split(TRAINING_FRACTION, seed)
    evaluation = evaluate(
        held_out, clusters_of(co_activation(training), clusters, seed), stability(trace, clusters, seed), seed
    )
    labels = clusters_of(co_activation(trace), clusters, seed)
    affinity = affinity_by_class(trace, labels)
    notes: dict[str, Any] = {
        "tokens": len(trace),
        "requests": len(trace.requests),
        "classes": list(trace.classes),
        "clusters": clusters,
        "modularity": {str(count): round(value, 4) for count, value in tried.items()},
        **evaluation.to_record(),
        "class_distance": round(class_distance(affinity), 4),
        "structured": evaluation.structured,
    }
    groups = SuperExperts(
        model,
        tuple(tuple(row) for row in labels.tolist()),
        tuple(tuple(row) for row in strength(trace).tolist()),
        affinity,
        learned_from=notes,
    )
    return groups, evaluation
