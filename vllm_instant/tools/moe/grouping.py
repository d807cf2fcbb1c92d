"""Balanced spectral clustering: groups of equal size with large affinity within them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MAX_ITERATIONS = 20
"""Of k-means, per start."""


def balanced_groups(
    affinity: npt.NDArray[np.floating], groups: int, seed: int = 0, starts: int = 4
) -> npt.NDArray[np.int64]:
    """Partition items so that affinity within groups is large and group sizes differ by at most one.

    The rows of the leading eigenvectors of the normalised affinity (Ng, Jordan and Weiss 2001) are clustered by
    k-means with an optimal assignment to a fixed number of places per group (Bradley, Bennett and Demiriz 2000). Of
    several starts the one with the largest affinity within groups is kept.

    Args:
        affinity: ``[items, items]``, symmetric, non-negative; the diagonal is ignored.
        groups: number of groups, at most the number of items.
        seed: seed of the starts.
        starts: number of starts.

    Returns:
        The group of each item, int64 ``[items]``; groups are numbered by their smallest member.

    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import kmeans_plusplus

    num_items = len(affinity)
    if not 1 <= groups <= num_items:
        raise ValueError(f"{num_items} items cannot be partitioned into {groups} groups")
    if groups == 1 or groups == num_items:
        return np.zeros(num_items, np.int64) if groups == 1 else np.arange(num_items)
    points = _embedding(affinity, groups)
    # Every group has the same number of places; the first ones have one more if the items do not divide evenly.
    sizes = np.full(groups, num_items // groups)
    sizes[: num_items % groups] += 1
    places = np.repeat(np.arange(groups), sizes)
    best, best_within = np.empty(0, np.int64), -np.inf
    for start in range(starts):
        centres = kmeans_plusplus(points, groups, random_state=seed * 1009 + start)[0]
        labels = np.full(num_items, -1)
        for _ in range(_MAX_ITERATIONS):
            distances = ((points[:, None] - centres[None]) ** 2).sum(-1)
            rows, columns = linear_sum_assignment(distances[:, places])
            new = np.empty(num_items, np.int64)
            new[rows] = places[columns]
            if np.array_equal(new, labels):
                break
            labels = new
            centres = np.stack([points[labels == group].mean(0) for group in range(groups)])
        within = affinity_within(affinity, labels)
        if within > best_within:
            best, best_within = labels, within
    return numbered_by_smallest(best)


def affinity_within(affinity: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> float:
    """The sum of the affinity between different items of one group."""
    same = labels[:, None] == labels[None]
    np.fill_diagonal(same, False)
    return float(affinity[same].sum())


def numbered_by_smallest(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same partition with groups numbered in order of their smallest members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]


def _embedding(affinity: npt.NDArray[np.floating], dimensions: int) -> npt.NDArray[np.float64]:
    """Unit rows of the leading eigenvectors of D^(-1/2) A D^(-1/2)."""
    matrix = np.array(affinity, np.float64)
    np.fill_diagonal(matrix, 0.0)
    degree = matrix.sum(1)
    scale = 1.0 / np.sqrt(np.maximum(degree, max(degree.max(), 1e-300) * 1e-9))
    _, vectors = np.linalg.eigh(scale[:, None] * matrix * scale[None])
    points = vectors[:, -dimensions:]
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.maximum(norms, 1e-12), np.float64)
