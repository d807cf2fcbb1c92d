"""What the ``similarity`` policy notes down of each live request, in arrays by ``RequestState.index``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_instant import RequestState, hinted_output_tokens
from vllm_instant_plugins.similarity.features import prefix_group

Array = npt.NDArray[np.float64]


def told_tokens(request: RequestState) -> float:
    """The output length that the client told; NaN when it told none, or nonsense where nobody refused it."""
    try:
        told = hinted_output_tokens(request.extra_args)
    except ValueError:
        told = None
    return float("nan") if told is None else min(told, float(request.max_tokens))


class Ledger:
    """Facts and expectations.

    Args:
        size: a first size; it grows.

    """

    def __init__(self, size: int) -> None:
        self.arrival: Array = np.zeros(size)
        self.started: Array = np.full(size, np.nan)
        """When it started first; NaN before. Seconds, as all times here."""
        self.prompt: Array = np.zeros(size)
        """Prompt tokens."""
        self.told: Array = np.full(size, np.nan)
        """Output tokens that its client told; NaN: none."""
        self.tokens: Array = np.zeros(size)
        """Output tokens that are expected, of those that wait."""
        self.cost: Array = np.zeros(size)
        """Seconds that its bin costs."""
        self.due: Array = np.zeros(size)
        """When its patience is at its end."""
        self.prefix: npt.NDArray[np.int64] = np.zeros(size, np.int64)

    def __len__(self) -> int:
        return len(self.arrival)

    def enter(self, request: RequestState, patience: float) -> None:
        """A new request, with a first idea of its patience."""
        index = request.index
        if index >= len(self):
            more = max(index + 1, 2 * len(self)) - len(self)
            for name, array in vars(self).items():
                setattr(self, name, np.pad(array, (0, more)))
        self.arrival[index] = request.arrival
        self.started[index] = np.nan
        self.prompt[index] = request.num_prompt_tokens
        self.told[index] = told_tokens(request)
        self.tokens[index] = self.cost[index] = 0.0
        self.due[index] = request.arrival + patience
        self.prefix[index] = prefix_group(request)
