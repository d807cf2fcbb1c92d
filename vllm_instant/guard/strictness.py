"""What a request may change by its ``vllm_xargs``: the guard gets stricter, never laxer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_instant.guard.window import Limits
from vllm_instant.interfaces.guard import GuardOptions, Late, Side

LATE = "instant_guard_late"
HOLD_TOKENS = "instant_guard_hold_tokens"
SIDE = "instant_guard_side"
KEYS = frozenset({LATE, HOLD_TOKENS, SIDE})
_ORDER = tuple(Late)
_SIDES = ("prompt", "answer", "both")


@dataclass(frozen=True)
class Strictness:
    """The limits of one request, and the texts that are judged for it."""

    limits: Limits
    side: str

    def judges(self, side: Side) -> bool:
        return self.side in (side, "both")


def strictness_of(options: GuardOptions, extra_args: Mapping[str, Any] | None) -> Strictness:
    """Return the deployment's strictness, or the stricter one that a request asks for.

    Raises:
        ValueError: With one sentence, if a value is not valid or laxer than the deployment's.

    """
    given = extra_args or {}
    late, hold_tokens, side = options.late, options.hold_tokens, str(options.side)
    if LATE in given:
        if given[LATE] not in list(Late):
            raise ValueError(f"{LATE} must be one of {', '.join(Late)}, not {given[LATE]!r}")
        late = Late(given[LATE])
        if _ORDER.index(late) < _ORDER.index(options.late):
            raise ValueError(f"{LATE} = {late} is less strict than this server's {options.late}")
    if HOLD_TOKENS in given:
        hold_tokens = given[HOLD_TOKENS]
        if type(hold_tokens) is not int or not 1 <= hold_tokens <= options.hold_tokens:
            raise ValueError(
                f"{HOLD_TOKENS} must be a whole number from 1 to this server's {options.hold_tokens}, "
                f"not {given[HOLD_TOKENS]!r}"
            )
    if SIDE in given:
        side = given[SIDE]
        if side not in _SIDES:
            raise ValueError(f"{SIDE} must be one of {', '.join(_SIDES)}, not {side!r}")
        if side != "both" and side != options.side:
            raise ValueError(f"{SIDE} = {side} leaves out what this server judges ({options.side})")
    limits = Limits(late, hold_tokens, options.hold_ms / 1000, options.max_wait_seconds)
    return Strictness(limits, side)
