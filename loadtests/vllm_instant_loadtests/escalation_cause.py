"""Spikes that come from escalated requests: answers of another, slower server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_instant.interfaces.escalation import Depth
from vllm_instant_loadtests.cause_finding import CauseFinding
from vllm_instant_loadtests.run_recorder import RecordedRequest
from vllm_instant_loadtests.spike_context import AROUND, SpikeContext

ESCALATION = "escalation"


def escalation(context: SpikeContext) -> CauseFinding:
    """More requests were answered by the deep end, or that end answered later than it did."""
    now, before = context.sent((context.span[0] - AROUND, context.span[1])), context.sent_before()
    deep_now, deep_before = ([r for r in some if r.answered_by == Depth.DEEP] for some in (now, before))
    if not deep_now or not before:
        return CauseFinding(ESCALATION, 0.0, [])
    usual = _Usual.of([r for r in before if r.answered_by != Depth.DEEP] or before)

    def lost(some: Sequence[RecordedRequest], among: Sequence[RecordedRequest]) -> float:
        return sum(map(usual.lost, some)) / len(among)

    rise = lost(now, now) - lost(before, before)
    of_deep = lost(deep_now, now) - lost(deep_before, before)
    if rise <= 0 or of_deep <= 0:
        return CauseFinding(ESCALATION, 0.0, [])
    share = min(1.0, of_deep / rise)
    first = float(np.median([r.ttft for r in deep_now if r.arrivals] or [np.nan]))
    return CauseFinding(
        ESCALATION,
        share,
        [
            f"the deep end answered {len(deep_now)} of {len(now)} requests, {len(deep_before)} of {len(before)} before",
            f"its first tokens took {1e3 * first:.0f} ms, those of the fast end {1e3 * usual.ttft:.0f} ms before",
            f"its answers took {share:.0%} of the additional time",
        ],
    )


@dataclass(frozen=True)
class _Usual:
    """What the first token and a further one usually take, seconds."""

    ttft: float
    itl: float

    @classmethod
    def of(cls, requests: Sequence[RecordedRequest]) -> _Usual:
        answered = [r for r in requests if r.arrivals]
        itls = [_decoding(r) / (r.tokens - 1) for r in answered if r.tokens > 1]
        return cls(*(float(np.median(values or [0.0])) for values in ([r.ttft for r in answered], itls)))

    def lost(self, request: RecordedRequest) -> float:
        """Seconds that a request took beyond the usual."""
        if not request.arrivals:
            return 0.0
        later = _decoding(request) - self.itl * (request.tokens - request.arrivals[0][1])
        return max(0.0, request.ttft - self.ttft) + max(0.0, later)


def _decoding(request: RecordedRequest) -> float:
    """Seconds from the first arrival to the last."""
    return request.arrivals[-1][0] - request.arrivals[0][0]
