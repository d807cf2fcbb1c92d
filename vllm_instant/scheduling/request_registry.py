"""The requests that an engine core holds, as all of its policies see them: one ``RequestState`` each, shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from vllm_instant.interfaces.requests import RequestState

PROMPT_HEAD = 32
"""Prompts that share so many tokens at their beginning (a system prompt) are of one class."""


def prompt_group(token_ids: Sequence[int] | npt.NDArray[np.int32]) -> int:
    """What ``RequestState.prompt_group`` is for a prompt; the same in every process."""
    head = token_ids[:PROMPT_HEAD]
    return hash(tuple(head) if isinstance(head, list) else tuple(int(token) for token in head))


OUTPUT_TOKENS_KEY = "instant_output_tokens"
"""What a client that knows how long its answer will be writes into ``vllm_xargs``: a number of tokens."""


def hinted_output_tokens(extra_args: Mapping[str, Any] | None) -> float | None:
    """How many tokens a client expects of its answer; None when it says nothing.

    Raises:
        ValueError: when it is no positive number.

    """
    value = (extra_args or {}).get(OUTPUT_TOKENS_KEY)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise ValueError(f"vllm_xargs: {OUTPUT_TOKENS_KEY} must be a number of tokens from 1, found {value!r}")


class LazyRequestStates(Sequence[RequestState]):
    """States that are gathered when somebody looks: most decisions need their number only.

    Args:
        count: how many there are.
        gather: all of them.

    """

    def __init__(self, count: int, gather: Callable[[], list[RequestState]]) -> None:
        self._count, self._gather = count, gather
        self._found: list[RequestState] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> RequestState: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[RequestState]: ...
    def __getitem__(self, place: int | slice) -> RequestState | Sequence[RequestState]:
        return self._look()[place]

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._look())

    def _look(self) -> list[RequestState]:
        if self._found is None:
            self._found = self._gather()
        return self._found


class RequestRegistry:
    """Registry of live requests; gives each its class and an index that is free."""

    def __init__(self) -> None:
        self.states: dict[str, RequestState] = {}
        self._free_indices: list[int] = []

    def admit(self, state: RequestState) -> None:
        """A request entered the engine."""
        if self.states.get(state.request_id) is state:
            return
        state.prompt_group = prompt_group(state.prompt_token_ids)
        state.index = self._free_indices.pop() if self._free_indices else len(self.states)
        self.states[state.request_id] = state

    def forget(self, request_id: str) -> None:
        """It is gone; its index goes to the next one."""
        state = self.states.pop(request_id, None)
        if state is not None:
            state.prompt_token_ids = ()  # whoever keeps the state shall not keep the prompt
            self._free_indices.append(state.index)
