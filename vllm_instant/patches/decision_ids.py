"""Decisions of policies as a client may see them: an id of a request is a right, and only its own client knows it.

A client that knows the id of a running request can abort it, so answers name requests by a digest of the id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ID_KEYS = frozenset({"request", "request_id"})
"""Keys of decisions that hold ids, at any depth."""


def for_clients(decisions: Sequence[Mapping[str, Any]], request_id: str | None) -> list[Any]:
    """Decisions with digests in place of ids; optionally only those of one request, under the id that was asked for.

    Args:
        decisions: of a policy.
        request_id: the whole id of an answer. The engine's id of a request begins with it and a hyphen, so that an id
            cannot be found out letter by letter.

    """
    found = [decision for decision in decisions if request_id is None or _concerns(decision, request_id)]
    return [_hidden(decision, request_id) for decision in found]


def _concerns(decision: Mapping[str, Any], request_id: str) -> bool:
    ids = list(_ids(decision))
    return not ids or any(_is_of(found, request_id) for found in ids)


def _ids(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _ids(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _ids(inner)
    elif key in ID_KEYS and isinstance(value, str):
        yield value


def _hidden(value: Any, request_id: str | None, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _hidden(inner, request_id, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(inner, request_id) for inner in value]
    if key not in ID_KEYS or not isinstance(value, str):
        return value
    if request_id is not None and _is_of(value, request_id):
        return request_id
    return hashlib.sha256(value.encode()).hexdigest()[:12]


def _is_of(found: str, request_id: str) -> bool:
    return found == request_id or found.startswith(f"{request_id}-")
