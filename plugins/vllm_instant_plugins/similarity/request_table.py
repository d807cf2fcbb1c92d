"""The live requests of the ``similarity`` policy: facts and predictions, in arrays by ``RequestState.index``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_instant import RequestState
from vllm_instant.scheduling.request_registry import hinted_output_tokens

Array = npt.NDArray[np.float64]

MIN_PREFIX_TOKENS = 128
"""Prompts that agree in this many first tokens share a prefix worth keeping in the cache."""


def hinted_tokens(request: RequestState) -> float:
    """The output length that the client sent as a hint; NaN if it sent none or an invalid one."""
    try:
        hint = hinted_output_tokens(request.extra_args)
    except ValueError:
        hint = None
    return float("nan") if hint is None else min(hint, float(request.max_tokens))


def prefix_group(request: RequestState) -> int:
    """A hash shared by requests with the same ``MIN_PREFIX_TOKENS`` first prompt tokens; 0 for shorter prompts."""
    if len(request.prompt_token_ids) < MIN_PREFIX_TOKENS:
        return 0
    return hash((request.cache_salt, *request.prompt_token_ids[:MIN_PREFIX_TOKENS]))


class RequestTable:
    """One row per live request; all times are in seconds.

    Args:
        size: initial number of rows; the table grows as needed.

    """

    def __init__(self, size: int) -> None:
        self.arrival: Array = np.zeros(size)
        self.started: Array = np.full(size, np.nan)
        """Time of the first start; NaN before it."""
        self.prompt_tokens: Array = np.zeros(size)
        self.hinted_tokens: Array = np.full(size, np.nan)
        """Output length sent by the client; NaN if none."""
        self.predicted_tokens: Array = np.zeros(size)
        """Predicted output length of a waiting request."""
        self.bin_cost: Array = np.zeros(size)
        """Predicted service time of the request's bin."""
        self.deadline: Array = np.zeros(size)
        """Time by which the request should have started."""
        self.prefix_group: npt.NDArray[np.int64] = np.zeros(size, np.int64)

    def __len__(self) -> int:
        return len(self.arrival)

    def add(self, request: RequestState, patience: float) -> None:
        """Fill the row of a new request; ``patience`` seconds after its arrival is its provisional deadline."""
        index = request.index
        if index >= len(self):
            more = max(index + 1, 2 * len(self)) - len(self)
            for name, array in vars(self).items():
                setattr(self, name, np.pad(array, (0, more)))
        self.arrival[index] = request.arrival_time
        self.started[index] = np.nan
        self.prompt_tokens[index] = request.num_prompt_tokens
        self.hinted_tokens[index] = hinted_tokens(request)
        self.predicted_tokens[index] = self.bin_cost[index] = 0.0
        self.deadline[index] = request.arrival_time + patience
        self.prefix_group[index] = prefix_group(request)
