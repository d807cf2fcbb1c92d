"""Acceptance rates of draft tokens, estimated by request and position.

For each request and draft position j the probability that token j is accepted, given that the tokens before it were, is
a beta-Bernoulli estimate with exponential forgetting. The priors form a hierarchy: a request's prior is the estimate of
similar requests (same kind of sampling, same beginning of the prompt), theirs is the estimate of the same kind of
sampling, and that one's is the estimate of all requests. How much a class tells of its requests is learned, too: two
weights of the prior predict every draft token beforehand, and count by how well they did. Acceptance falls with the
position, so that where a class has not drafted that far yet, its estimate continues with its parent's ratio from one
position to the next.

A class has a long and a short memory. When the short one contradicts the long one by more than chance explains, the
drafter has changed (or the text that it drafts): the long memory is cut down to the short one for the whole class, so
that what one request showed counts for the others at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.acceptance_kernels import (
    estimate_class,
    estimate_survival,
    learn_classes,
    learn_requests,
    refresh_classes,
)

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

REQUEST_MEMORY = 0.95
CLASS_MEMORY = 0.995
SHORT_MEMORY = 0.75
"""Factor of a memory per further observation; about 1 / (1 - factor) observations count."""
IDLE_MEMORY = 0.97
"""The same per step in which a request drafts nothing: bad luck must not exclude it forever."""
REQUEST_PRIOR, ALIKE_PRIOR = 8.0, 64.0
CLASS_PRIOR = 2.0
"""Weight of a prior, in observations; of a class whose requests are alike ``ALIKE_PRIOR`` for each of them."""
ALIKE_MEMORY, MAX_ALIKE = 0.995, 4.0
"""Factor of the log odds that requests of a class are alike per further observation, and their limit."""
OPTIMISM = 0.7
"""Acceptance of the first draft token before anything was observed: high, so that drafting is tried."""
CHANGE_SIGMAS = 3.0
STALE_OBSERVATIONS = 0.25
"""Limit of the observations that a class remembers when a class above it has changed."""
CHANGED_MEMORY = 0.2
"""Factor of a request's own memory when its class has changed."""
MAX_KINDS = 31
MAX_SIMILAR = 96
_REFRESHED_PER_STEP = 8


class _Level:
    """Statistics of request classes, or of requests: one row each, one column per draft position."""

    def __init__(self, rows: int, positions: int) -> None:
        self.trials: Array = np.zeros((rows, positions))
        self.hits: Array = np.zeros((rows, positions))

    def grow(self, rows: int) -> None:
        """Make room for ``rows``."""
        missing = rows - len(self.trials)
        if missing > 0:
            padding = ((0, max(missing, len(self.trials))), (0, 0))
            self.trials, self.hits = np.pad(self.trials, padding), np.pad(self.hits, padding)


class AcceptanceModel:
    """Acceptance estimates of the live requests.

    Args:
        positions: limit of a request's draft tokens.
        alike_prior: weight of the prior of a request whose class is alike; ``REQUEST_PRIOR``: classes count the same.

    """

    def __init__(self, positions: int, alike_prior: float = ALIKE_PRIOR) -> None:
        self.positions = positions
        self._alike_prior = alike_prior
        self._requests = _Level(64, positions)
        self._class_of: Indices = np.zeros(64, np.intp)
        # Row 0 is all requests; then come the kinds of sampling, then the classes of similar prompts.
        rows = 1 + MAX_KINDS + MAX_SIMILAR
        self._classes = _Level(rows, positions)
        self._short_trials: Array = np.zeros(rows)
        self._short_hits: Array = np.zeros(rows)
        self._parent: Indices = np.zeros(rows, np.intp)
        self._kinds: dict[Hashable, int] = {}
        self._similar: OrderedDict[Hashable, int] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        """Beginnings of prompts that were seen once: they become a class when they are seen again."""
        self._class_estimate: Array = np.full((rows, positions), OPTIMISM)
        self._class_alike: Array = np.zeros(rows)
        """Log odds that a request accepts as its class does, rather than at a rate of its own."""
        self._stale: Indices = np.zeros(rows, np.intp)
        """Order in which out-of-date class estimates are refreshed, the lowest first; 0: up to date."""
        self._changed: Indices = np.zeros(rows, np.intp)
        # A step's observations by class; the arrays are reused each step.
        self._news_count: Array = np.zeros(rows)
        self._news = _Level(rows, positions)
        self._refresh(0)

    # ------------------------------------------------------------------------------------- requests, classes

    def enter(self, index: int, kind: Hashable, similar: Hashable) -> None:
        """Add a request. ``kind``: how it samples; ``similar``: what prompts of its class have in common."""
        self._requests.grow(index + 1)
        if index >= len(self._class_of):
            self._class_of = np.pad(self._class_of, (0, len(self._requests.trials) - len(self._class_of)))
        self._class_of[index] = self._similar_class((kind, similar), self._kind_class(kind))
        self._requests.trials[index] = 0.0
        self._requests.hits[index] = 0.0

    def _kind_class(self, kind: Hashable) -> int:
        row = self._kinds.get(kind)
        if row is None:
            if len(self._kinds) == MAX_KINDS:
                return 0
            row = self._kinds[kind] = 1 + len(self._kinds)
            self._refresh(row)
        return row

    def _similar_class(self, key: Hashable, kind_row: int) -> int:
        row = self._similar.get(key)
        if row is not None:
            self._similar.move_to_end(key)
            # Possibly no request of the class has drafted since its parent learned something.
            self._refresh(row)
            return row
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > 16 * MAX_SIMILAR:
                self._seen.popitem(last=False)
            return kind_row
        if len(self._similar) < MAX_SIMILAR:
            row = 1 + MAX_KINDS + len(self._similar)
        else:
            _, row = self._similar.popitem(last=False)
            # Requests of the evicted class continue in its parent.
            self._class_of[self._class_of == row] = self._parent[row]
        self._similar[key] = row
        self._parent[row] = kind_row
        for array in (self._classes.trials, self._classes.hits, self._short_trials, self._short_hits):
            array[row] = 0.0
        self._class_alike[row] = self._class_alike[kind_row]
        self._refresh(row)
        return row

    # ------------------------------------------------------------------------------------------- estimates

    def survival(self, indices: Indices) -> Array:
        """Probability that draft token j and all before it are accepted, ``[requests, positions]``; falls with j."""
        level = self._requests
        survival: Array = np.empty((len(indices), self.positions))
        estimate_survival(
            indices,
            level.hits,
            level.trials,
            self._class_of,
            self._class_estimate,
            self._class_alike,
            REQUEST_PRIOR,
            self._alike_prior,
            survival,
        )
        return survival

    # ------------------------------------------------------------------------------------------- learning

    def observe(self, indices: npt.ArrayLike, drafted: npt.ArrayLike, accepted: npt.ArrayLike) -> None:
        """Learn from one step: each request's index, draft tokens and accepted tokens.

        Requests without draft tokens ``fade``.
        """
        requests, classes, news, count = self._requests, self._classes, self._news, self._news_count
        drafting = learn_requests(
            np.asarray(indices, np.intp),
            np.asarray(drafted, np.intp),
            np.asarray(accepted, np.intp),
            REQUEST_MEMORY,
            IDLE_MEMORY,
            self._class_of,
            self._class_estimate,
            ALIKE_MEMORY,
            MAX_ALIKE,
            REQUEST_PRIOR,
            self._alike_prior,
            requests.trials,
            requests.hits,
            count,
            news.trials,
            news.hits,
            self._class_alike,
        )
        if not drafting:
            return
        changed = learn_classes(
            self._parent,
            MAX_KINDS,
            CLASS_MEMORY,
            SHORT_MEMORY,
            CHANGE_SIGMAS,
            count,
            news.trials,
            news.hits,
            classes.trials,
            classes.hits,
            self._short_trials,
            self._short_hits,
            self._changed,
        )
        for row in self._changed[:changed].tolist():
            self._cut(row, np.flatnonzero(count))
        refresh_classes(
            count,
            MAX_KINDS,
            len(count) if changed else _REFRESHED_PER_STEP,
            classes.trials,
            classes.hits,
            self._parent,
            CLASS_PRIOR,
            OPTIMISM,
            self._stale,
            self._class_estimate,
        )

    def fade(self, indices: Indices) -> None:
        """Let requests that drafted nothing in a step become more like their class again."""
        self._requests.trials[indices] *= IDLE_MEMORY
        self._requests.hits[indices] *= IDLE_MEMORY

    def _cut(self, row: int, touched: Indices) -> None:
        """Shorten the long memory of a class that has changed to its short one, and its requests' own memories."""
        classes = self._classes
        short = self._short_trials[row]
        share = short / classes.trials[row, 0]
        classes.trials[row] *= share
        classes.hits[row] *= share
        classes.hits[row, 0] = self._short_hits[row]
        # Classes below it that draft observe the change themselves; the others would keep outdated estimates.
        # Not below row 0: there, a change may only mean that another kind of requests has arrived.
        below = np.flatnonzero(self._parent == row) if row else np.empty(0, np.intp)
        below = np.setdiff1d(below, touched)
        left = np.minimum(1.0, STALE_OBSERVATIONS / np.maximum(classes.trials[below, 0], 1e-9))
        classes.trials[below] *= left[:, None]
        classes.hits[below] *= left[:, None]
        self._short_trials[below] *= left
        self._short_hits[below] *= left
        news = below[classes.trials[below, 0] > 0]
        self._stale[news] = np.maximum(self._stale[news], 1)
        parent = self._parent[self._class_of]
        members = np.flatnonzero((self._class_of == row) | (parent == row) | (row == 0))
        self._requests.trials[members] *= CHANGED_MEMORY
        self._requests.hits[members] *= CHANGED_MEMORY

    def _refresh(self, row: int) -> None:
        """Recompute the estimate of a class from its parent's, which must be up to date."""
        classes = self._classes
        estimate_class(row, classes.trials, classes.hits, self._parent, CLASS_PRIOR, OPTIMISM, self._class_estimate)
        self._stale[row] = 0
