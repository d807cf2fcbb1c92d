"""The live requests of an engine core: one ``RequestState`` each, shared by all policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from vllm_instant.interfaces.requests import RequestState

PROMPT_HEAD = 32
"""Number of leading tokens that prompts of one group share, for example of a system prompt."""


def prompt_group(token_ids: Sequence[int] | npt.NDArray[np.int32]) -> int:
    """Return ``RequestState.prompt_group`` of a prompt; the same in every process."""
    head = token_ids[:PROMPT_HEAD]
    return hash(tuple(head) if isinstance(head, list) else tuple(int(token) for token in head))


MAX_HINT = 1e300
"""Maximum of a client's hint, in tokens."""
OUTPUT_TOKENS_KEY = "instant_output_tokens"
"""Key of a client's ``vllm_xargs``: the number of output tokens that it expects."""


def hinted_output_tokens(extra_args: Mapping[str, Any] | None) -> float | None:
    """Return the number of output tokens that a client expects; None without a hint.

    Raises:
        ValueError: The hint is not a positive number.

    """
    value = (extra_args or {}).get(OUTPUT_TOKENS_KEY)
    if value is None:
        return None
    # Compared before it is converted: a larger whole number has no float.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_HINT:
        return float(value)
    raise ValueError(f"vllm_xargs: {OUTPUT_TOKENS_KEY} must be a number of tokens from 1, found {value!r}")


class LazyRequestStates(Sequence[RequestState]):
    """States that are gathered at the first access: most decisions need only their number.

    Args:
        count: Number of states.
        gather: Returns the states.

    """

    def __init__(self, count: int, gather: Callable[[], list[RequestState]]) -> None:
        self._count, self._gather = count, gather
        self._states: list[RequestState] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> RequestState: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[RequestState]: ...
    def __getitem__(self, place: int | slice) -> RequestState | Sequence[RequestState]:
        return self._gathered()[place]

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._gathered())

    def _gathered(self) -> list[RequestState]:
        if self._states is None:
            self._states = self._gather()
        return self._states


class RequestRegistry:
    """The live requests; assigns each its prompt group and a free index."""

    def __init__(self) -> None:
        self.states: dict[str, RequestState] = {}
        self._free_indices: list[int] = []
        # Not read from the states, which policies could change: two live requests would share an index.
        self._indices: dict[str, int] = {}

    def admit(self, state: RequestState) -> None:
        """A request entered the engine."""
        if self.states.get(state.request_id) is state:
            return
        state.prompt_group = prompt_group(state.prompt_token_ids)
        state.index = self._free_indices.pop() if self._free_indices else len(self.states)
        self.states[state.request_id] = state
        self._indices[state.request_id] = state.index

    def forget(self, request_id: str) -> None:
        """A request left the engine; its index is reused."""
        state = self.states.pop(request_id, None)
        if state is not None:
            # A policy that keeps the state must not keep what a client sent.
            state.prompt_token_ids, state.extra_args = (), {}
            self._free_indices.append(self._indices.pop(request_id))
