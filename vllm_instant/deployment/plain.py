"""Results of plugins as plain values: whole numbers, finite numbers and JSON types that vLLM's messages can carry."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from vllm_instant.deployment.circuit_breaker import ContractError

MAX_INTEGER = 2**63 - 1
"""msgpack, in which vLLM's processes talk, has 64-bit integers."""
MAX_DEPTH = 32


def whole(value: Any, name: str = "a number") -> int:
    """Return a whole number as an int; raises ContractError for all else, numbers like 2.0 and booleans included."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        raise ContractError(f"{name} must be a whole number, found {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise ContractError(f"{name} must be a whole number, found {_shown(value)}") from None


def whole_numbers(values: Any, name: str = "numbers") -> list[int]:
    """Return the entries of a sequence or an array of integers as a list; raises ContractError."""
    if values is None:
        raise ContractError(f"{name} must be whole numbers, found None")
    if hasattr(values, "tolist"):
        values = values.tolist()
    found = list(values)
    if set(map(type, found)) <= {int}:
        return found
    return [whole(value, name) for value in found]


def finite(value: Any, name: str = "a number") -> float:
    """Return a finite number as a float; raises ContractError for all else."""
    if isinstance(value, str | bytes | bool):
        raise ContractError(f"{name} must be a number, found {_shown(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ContractError(f"{name} must be a number, found {_shown(value)}") from None
    if not math.isfinite(number):
        raise ContractError(f"{name} must be finite, found {number}")
    return number


def truth(value: Any, name: str = "the answer") -> bool:
    """Return a boolean of Python or NumPy; raises ContractError for all else."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ContractError(f"{name} must be True or False, found {_shown(value)}")
    return bool(value)


def json_types(value: Any, depth: int = 0) -> Any:
    """Return a copy of JSON types; scalars of NumPy become Python's, and numbers that are not finite None.

    Raises:
        ContractError: A value is of another type, an integer has more than 64 bits, or it is nested too deeply.

    """
    if value is None or type(value) in (bool, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None  # JSON has no others
    if depth > MAX_DEPTH:
        raise ContractError(f"values are nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {str(key): json_types(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_types(inner, depth + 1) for inner in value]
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        return json_types(value.tolist(), depth + 1)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        if not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
            raise ContractError("an integer has more than 64 bits")
        return int(value)
    raise ContractError(f"expected JSON types, found {_shown(value)}")


def decisions_of(decisions: Any, last: int) -> list[dict[str, Any]]:
    """Return a policy's decisions as JSON types, at most ``last``; raises ContractError."""
    found = json_types(list(decisions)[-last:])
    if any(not isinstance(decision, dict) for decision in found):
        raise ContractError("a decision is a mapping")
    return list(found)


def gauges(metrics: Any) -> dict[str, float]:
    """Return a plugin's own gauges as floats by name, which may be infinite or NaN; raises ContractError."""
    if not isinstance(metrics, Mapping):
        raise ContractError(f"expected a mapping from names to numbers, found {_shown(metrics)}")
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ContractError(f"a gauge must be a number: {error}") from None


def _shown(value: Any) -> str:
    return f"{type(value).__name__}"
