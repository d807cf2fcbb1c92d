"""Causes of spikes outside of the server: its machine slowed it down (``host_evidence``).

The score of each is the share of the slowdown that it explains: a process that is kept from running for a share ``f``
of the time takes ``1 / (1 - f)`` times as long.
"""

from __future__ import annotations

import math

from vllm_instant_loadtests import host_evidence as host
from vllm_instant_loadtests.cause_finding import CauseFinding
from vllm_instant_loadtests.spike_context import SpikeContext, explained
from vllm_instant_loadtests.windows import STALL, TTFT

QUOTA = "CPU quota"
STEAL = "stolen CPU time"
PAGING = "memory pressure"
NEIGHBOUR = "other processes"
GPU = "GPU slowed down"
HOST_CAUSES = (QUOTA, STEAL, PAGING, NEIGHBOUR, GPU)

MIN_SHARE = 0.05
"""Minimum growth of a share of time that counts."""
MAX_SHARE = 0.95
MIN_OTHER_CORES = 0.3
"""Minimum growth of the cores that other processes use."""
MIN_CLOCK_DROP = 1.05
"""Minimum factor by which a GPU's clock fell."""


def quota(context: SpikeContext) -> CauseFinding:
    """The control group of the server had used up its CPU quota."""
    return _kept_from_running(
        context,
        QUOTA,
        host.THROTTLED_SECONDS,
        1.0,
        "the server's control group was throttled for {now:.0%} of the time",
    )


def steal(context: SpikeContext) -> CauseFinding:
    """The hypervisor gave the processors to other machines."""
    cores = _cores(context)
    return _kept_from_running(
        context, STEAL, host.STEAL_SECONDS, cores, "the hypervisor took {now:.0%} of the processors' time"
    )


def paging(context: SpikeContext) -> CauseFinding:
    """Processes waited for memory that was reclaimed or read again."""
    found = _kept_from_running(
        context, PAGING, host.MEMORY_STALL_SECONDS, 1.0, "processes waited for memory for {now:.0%} of the time"
    )
    now, before = (context.metrics.rate(host.MAJOR_FAULTS, spans) for spans in ([context.span], context.quiet))
    if found.score and math.isfinite(now):
        found.evidence.append(f"{now:.0f} major page faults per second, {before:.0f} before")
    return found


def neighbour(context: SpikeContext) -> CauseFinding:
    """Other processes used the cores that the server needs."""
    metrics, cores = context.metrics, _cores(context)
    other, other_before = (metrics.rate(host.OTHER_CPU_SECONDS, spans) for spans in ([context.span], context.quiet))
    own_before = metrics.rate(host.OWN_CPU_SECONDS, context.quiet)
    if not other - other_before >= MIN_OTHER_CORES:
        return CauseFinding(NEIGHBOUR, 0.0, [])
    # What the server needs and what the others take, of the cores that there are.
    slowdown = (own_before + other) / max(cores, own_before + other_before)
    return CauseFinding(
        NEIGHBOUR,
        explained(slowdown, _rise(context)),
        [
            f"other processes used {other:.1f} of {cores:.0f} cores, {other_before:.1f} before; the server and the "
            f"load generator use {own_before:.1f}"
        ],
    )


def gpu(context: SpikeContext) -> CauseFinding:
    """A GPU ran at a lower clock, because it was hot or took too much power."""
    metrics = context.metrics
    now, before = (metrics.gauge(host.GPU_CLOCK, spans) for spans in ([context.span], context.quiet))
    slowed = metrics.gauge(host.GPU_SLOWED, [context.span])
    if not before / now >= MIN_CLOCK_DROP or not slowed > 0:
        return CauseFinding(GPU, 0.0, [])
    return CauseFinding(
        GPU,
        explained(before / now, _rise(context)),
        [f"a GPU ran at {now:.0f} MHz, at {before:.0f} MHz before; slowed down in {slowed:.0%} of the readings"],
    )


def _kept_from_running(context: SpikeContext, cause: str, counter: str, per: float, line: str) -> CauseFinding:
    """A cause whose counter grows by the seconds in which the server could not run."""
    now, before = (context.metrics.rate(counter, spans) / per for spans in ([context.span], context.quiet))
    if not now - before >= MIN_SHARE:
        return CauseFinding(cause, 0.0, [])
    lost = min(MAX_SHARE, now - before)
    return CauseFinding(
        cause,
        explained(1 / (1 - lost), _rise(context)),
        [line.format(now=min(now, 1.0)) + f", {max(before, 0.0):.0%} before"],
    )


def _rise(context: SpikeContext) -> float:
    return context.slowdown if context.slowdown > 1 else context.ratio(TTFT, STALL)


def _cores(context: SpikeContext) -> float:
    found = context.metrics.gauge(host.CORES, context.quiet)
    return found if math.isfinite(found) and found > 0 else 1.0
