"""Groups of equal size of things that like each other: balanced spectral clustering."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 20


def balanced_groups(
    affinity: npt.NDArray[np.floating], groups: int, seed: int = 0, starts: int = 4
) -> npt.NDArray[np.int64]:
    """Group things so that affinity within groups is large and sizes differ by at most one.

    The rows of the leading eigenvectors of the normalised affinity are clustered by k-means whose assignment step is
    an optimal one with a fixed number of places in each group (Ng, Jordan and Weiss 2001 for the embedding, Bradley,
    Bennett and Demiriz 2000 for the balanced assignment). The best of several starts is kept, judged by the affinity
    within groups.

    Args:
        affinity: ``[things, things]``, symmetric, not negative; the diagonal is ignored.
        groups: how many groups, at most as many as things.
        seed: of the starts.
        starts: how many starts are tried.

    Returns:
        The group of each thing, int64 ``[things]``, numbered by their smallest member.

    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import kmeans_plusplus

    things = len(affinity)
    if not 1 <= groups <= things:
        raise ValueError(f"{things} things cannot be put into {groups} groups")
    if groups == 1 or groups == things:
        return np.zeros(things, np.int64) if groups == 1 else np.arange(things)
    points = _embedding(affinity, groups)
    # Every group has the same number of places, one more in the first ones where that does not come out even.
    sizes = np.full(groups, things // groups)
    sizes[: things % groups] += 1
    places = np.repeat(np.arange(groups), sizes)
    best, best_within = np.empty(0, np.int64), -np.inf
    for start in range(starts):
        centres = kmeans_plusplus(points, groups, random_state=seed * 1009 + start)[0]
        labels = np.full(things, -1)
        for _ in range(_ROUNDS):
            distances = ((points[:, None] - centres[None]) ** 2).sum(-1)
            rows, columns = linear_sum_assignment(distances[:, places])
            new = np.empty(things, np.int64)
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
    """The sum of affinity between different things of the same group."""
    same = labels[:, None] == labels[None]
    np.fill_diagonal(same, False)
    return float(affinity[same].sum())


def numbered_by_smallest(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same grouping with groups numbered in the order of their smallest members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]


def _embedding(affinity: npt.NDArray[np.floating], dimensions: int) -> npt.NDArray[np.float64]:
    """Rows of unit length in the space of the leading eigenvectors."""
    matrix = np.array(affinity, np.float64)
    np.fill_diagonal(matrix, 0.0)
    degree = matrix.sum(1)
    scale = 1.0 / np.sqrt(np.maximum(degree, max(degree.max(), 1e-300) * 1e-9))
    _, vectors = np.linalg.eigh(scale[:, None] * matrix * scale[None])
    points = vectors[:, -dimensions:]
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.maximum(norms, 1e-12), np.float64)
