"""What the checks share: their error, plain integers, and where an object keeps a value."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Set
from numbers import Integral
from typing import Any


class ContractError(AssertionError):
    """A plugin broke its interface; the message is one sentence."""


def whole_number(value: Any) -> bool:
    """Whether a value is an integer, as Python's or NumPy's type, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def path_to(holder: Any, wanted: Any, *, only_keys: bool = False) -> str | None:
    """Where an object keeps a value: the attributes and containers on the way, or None where it does not.

    Args:
        holder: searched with all that its attributes, dicts, lists, tuples, sets and deques lead to.
        wanted: what is looked for, by equality.
        only_keys: look only at the keys of dicts and the members of sets, where a state per request is kept.

    """
    waiting: deque[tuple[str, Any]] = deque([(type(holder).__name__, holder)])
    seen: set[int] = set()
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, str | bytes):
            if value == wanted and not only_keys:
                return path
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping | Set) and any(key == wanted for key in value if isinstance(key, type(wanted))):
            return path
        waiting.extend(_parts(path, value))
    return None


def _parts(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"{path}[{key!r}]", inner) for key, inner in list(value.items())]
    if isinstance(value, list | tuple | Set | deque):
        return [(f"{path}[…]", inner) for inner in list(value)]
    names = [*getattr(value, "__dict__", ()), *_slots(type(value))]
    return [(f"{path}.{name}", getattr(value, name)) for name in names if hasattr(value, name)]


def _slots(cls: type) -> list[str]:
    found: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in found if name not in ("__dict__", "__weakref__")]
