"""Drafts that clients send for their own requests, on their way from the API server to the workers.

A client gives its request a key that it made up (``vllm_xargs``) and sends drafts under that key: without
the key no request is reached, and the key says nothing about others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_instant.interfaces.drafter import PushedTail

KEY = "instant_draft_key"
"""Key of a client's ``vllm_xargs``: the secret under which it sends drafts for the request."""
MIN_KEY_CHARACTERS, MAX_KEY_CHARACTERS = 16, 128
MAX_TAILS = 8
"""Maximum number of tails per request and step, the newest ones."""


def draft_key_of(extra_args: Mapping[str, Any] | None) -> str | None:
    """Return the key of a request's drafts; None without one.

    Raises:
        ValueError: The key is not a string of 16 to 128 characters.

    """
    key = (extra_args or {}).get(KEY)
    if key is None or (isinstance(key, str) and MIN_KEY_CHARACTERS <= len(key) <= MAX_KEY_CHARACTERS):
        return key
    # The value is not quoted: it is a secret.
    raise ValueError(f"vllm_xargs: {KEY} must be a string of {MIN_KEY_CHARACTERS} to {MAX_KEY_CHARACTERS} characters")


class PushedDrafts:
    """The live requests that have a key, and the tails that wait for their next step."""

    def __init__(self) -> None:
        self._request_of: dict[str, str] = {}
        self._key_of: dict[str, str] = {}
        self._tails: dict[str, deque[PushedTail]] = {}

    def admit(self, request_id: str, extra_args: Mapping[str, Any] | None) -> None:
        """A request entered the engine; of several with one key the first has the drafts."""
        try:
            key = draft_key_of(extra_args)
        except ValueError:
            return  # ``patches.request_validation`` refuses it in the API server
        if key is not None and key not in self._request_of:
            self._request_of[key] = request_id
            self._key_of[request_id] = key

    def forget(self, request_id: str) -> None:
        """A request left the engine."""
        key = self._key_of.pop(request_id, None)
        if key is not None:
            del self._request_of[key]
            self._tails.pop(request_id, None)

    def push(self, pushed: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """Add tails by key; each has the fields of ``PushedTail``. Those of unknown keys are dropped."""
        for key, tails in pushed.items():
            request_id = self._request_of.get(key)
            if request_id is not None:
                waiting = self._tails.setdefault(request_id, deque(maxlen=MAX_TAILS))
                waiting.extend(PushedTail(*tail) for tail in tails)

    def take(self, request_ids: Iterable[str]) -> dict[str, Sequence[PushedTail]]:
        """Return and remove the tails of these requests."""
        if not self._tails:
            return {}
        return {name: tuple(self._tails.pop(name)) for name in request_ids if name in self._tails}
