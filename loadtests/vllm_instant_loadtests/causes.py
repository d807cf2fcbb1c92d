"""Attributes a spike to a cause: each cause has a score and the evidence for it.

A score is the share of the rise that a cause explains, between 0 and 1; the highest one names the spike. Where one
cause explains the signs of another, the other's score is reduced: while a load generator sleeps no request receives
tokens, but the server has not stopped. The evidence comes from vLLM's metrics and from the requests themselves; a
decision trace, where there is one, adds lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from vllm_instant.tools.measure import server_metrics as m
from vllm_instant_loadtests import host_causes
from vllm_instant_loadtests.cause_finding import CauseFinding
from vllm_instant_loadtests.escalation_cause import ESCALATION, escalation
from vllm_instant_loadtests.host_causes import HOST_CAUSES, NEIGHBOUR, PAGING, QUOTA, STEAL
from vllm_instant_loadtests.metric_series import TimeSpan
from vllm_instant_loadtests.spike_context import AROUND, SpikeContext, explained, reached
from vllm_instant_loadtests.windows import STALL, TTFT

ACCEPTANCE = "acceptance collapse"
BATCH = "batch growth"
PREFILL = "prefill interference"
MEMORY = "preemption or KV pressure"
COMPILE = "compile or JIT"
QUEUEING = "queueing"
CLIENT = "client side"
STOPPED = "server stopped"
DISCONNECTS = "disconnects"
UNKNOWN = "unknown"
CAUSES = (
    *(ACCEPTANCE, BATCH, PREFILL, MEMORY, COMPILE, QUEUEING, CLIENT, STOPPED, DISCONNECTS, ESCALATION),
    *HOST_CAUSES,
)

MIN_SCORE = 0.25
"""Where no cause has this score, the cause is unknown."""
MIN_DRAFTED = 40
"""Minimum number of draft tokens from which an acceptance rate is computed."""
MIN_DROP = 0.1
"""Minimum drop of the acceptance rate that counts."""
FULL_CACHE = 0.95
"""Usage of the KV cache from which it counts as full: requests take blocks one at a time, so 1 is rarely read."""
LONG_PROMPT_RATIO = 3.0
"""A prompt is long if it has this many times the baseline's 90th percentile of prompt tokens."""
NEW_SIZE_RATIO = 1.25
"""A batch or a prompt is new to the engine if it is larger by this factor than all earlier ones."""
BURST_SECONDS = 2.0
"""Requests within this time count as one burst."""
MIN_STANDSTILL = 0.3
"""Minimum time without any arrival that can be a stop, seconds."""


def attribute(context: SpikeContext) -> list[CauseFinding]:
    """All causes with their scores, the likeliest first; ``UNKNOWN`` is the first where nothing explains a spike."""
    found = {finding.cause: finding for finding in (judge(context) for judge in _JUDGES)}
    for reason, sign, share in _EXPLAINS:
        taken = 1 - share * found[reason].score
        found[sign] = replace(found[sign], score=float(found[sign].score * taken))
    ordered = sorted(found.values(), key=lambda finding: -finding.score)
    if ordered[0].score < MIN_SCORE:
        seen = [line for finding in ordered for line in finding.evidence]
        ordered = [CauseFinding(UNKNOWN, 0.0, ["nothing that was recorded explains it", *seen[:3]]), *ordered]
    return [replace(ordered[0], evidence=[*ordered[0].evidence, *_traced(context)]), *ordered[1:]]


def client_side(context: SpikeContext) -> CauseFinding:
    """The load generator itself was late: what it read late may have arrived in time."""
    late = context.late()
    if not late:
        return CauseFinding(CLIENT, 0.0, [])
    return CauseFinding(
        CLIENT,
        min(1.0, late / context.delay),
        [
            f"the load generator's own timers were {late:.2f} s late, of {context.delay:.2f} s of delay; the longest "
            f"wait for a token was {context.max_token_wait:.2f} s ({context.usual_wait:.2f} s before)"
        ],
    )


def stopped(context: SpikeContext) -> CauseFinding:
    """No request received anything, and the server's own counters did not change."""
    began, ended = context.max_standstill
    standstill = ended - began
    if standstill < max(MIN_STANDSTILL, 4 * context.usual_wait):
        return CauseFinding(STOPPED, 0.0, [])
    lines = [f"no request received a token for {standstill:.2f} s (p99 of waits before: {context.usual_wait:.2f} s)"]
    score = min(1.0, standstill / context.delay)
    away, still = context.metrics.unanswered((began, ended)), context.metrics.unchanged(m.GENERATED, (began, ended))
    if away >= 0.8 * standstill:
        lines.append(f"/metrics did not answer for {away:.2f} s")
    elif still >= 0.4 * standstill:
        lines.append(f"/metrics answered, but the number of generated tokens did not change for at least {still:.2f} s")
    elif len(context.metrics.at):
        score *= 0.5
    return CauseFinding(STOPPED, score, lines)


def compiling(context: SpikeContext) -> CauseFinding:
    """The engine stopped when something was new to it: a larger batch or a longer prompt."""
    began, ended = context.max_standstill
    if ended - began < max(MIN_STANDSTILL, 4 * context.usual_wait):
        return CauseFinding(COMPILE, 0.0, [])
    lines = []
    in_progress = _in_progress(context, began)
    record = max((_in_progress(context, r.due) for r in context.run.requests if r.due < began - AROUND), default=0)
    if in_progress >= NEW_SIZE_RATIO * record and record:
        lines.append(f"{in_progress} requests ran for the first time (at most {record} before)")
    old = [r.prompt_tokens for r in context.run.requests if r.prompt_tokens and reached(r) < began]
    new = [r for r in context.run.requests if r.prompt_tokens and r.sent < began + AROUND / 3 and reached(r) >= ended]
    longest = max((r.prompt_tokens or 0 for r in new), default=0)
    if old and longest >= NEW_SIZE_RATIO * max(old):
        lines.append(f"a prompt of {longest} tokens arrived for the first time (at most {max(old)} before)")
    if not lines:
        return CauseFinding(COMPILE, 0.0, [])
    return CauseFinding(COMPILE, 0.8, [f"no request received a token for {ended - began:.2f} s", *lines])


def acceptance(context: SpikeContext) -> CauseFinding:
    """Fewer tokens per step, because drafts are rejected."""
    metrics, span, quiet = context.metrics, [context.span], context.quiet
    if not metrics.has(m.DRAFTED) or not metrics.growth(m.DRAFTED, span) >= MIN_DRAFTED:
        return CauseFinding(ACCEPTANCE, 0.0, [])
    now, before = metrics.ratio(m.ACCEPTED, m.DRAFTED, span), metrics.ratio(m.ACCEPTED, m.DRAFTED, quiet)
    per_step, per_step_before = (1 + metrics.ratio(m.ACCEPTED, m.DRAFTS, spans) for spans in (span, quiet))
    line = f"{now:.2f} of draft tokens accepted, {before:.2f} before"
    if not before - now >= MIN_DROP:
        return CauseFinding(ACCEPTANCE, 0.0, [line])
    lines = [
        line,
        f"{per_step:.2f} tokens per step of a request, {per_step_before:.2f} before: a slowdown of "
        f"{per_step_before / per_step:.2f}×; the measured one is {context.pace_ratio:.2f}× on average",
        *_kinds(context),
    ]
    return CauseFinding(ACCEPTANCE, explained(per_step_before / per_step, context.pace_ratio), lines)


def memory(context: SpikeContext) -> CauseFinding:
    """Requests lost their KV blocks or waited for free ones."""
    metrics, span = context.metrics, [context.wide]
    lost, before = metrics.growth(m.PREEMPTIONS, span), metrics.rate(m.PREEMPTIONS, context.quiet)
    usage, usual = metrics.gauge(m.KV_USAGE, span, at_most=True), metrics.gauge(m.KV_USAGE, context.quiet)
    waiting = metrics.gauge(m.WAITING, span, at_most=True)
    lines = []
    score = 0.0
    if lost >= 0.5 and lost / context.seconds > 3 * before:
        lines.append(f"{lost:.0f} requests were preempted (lost their KV blocks), {before:.2f} per second before")
        score = 0.95
    if usage >= FULL_CACHE:
        lines.append(f"up to {usage:.0%} of the KV cache in use, {usual:.0%} before; {waiting:.0f} requests waited")
        score = max(score, 0.9 if waiting >= 1 and usual < 0.8 * FULL_CACHE else 0.3)
    return CauseFinding(MEMORY, score, lines)


def prefill(context: SpikeContext) -> CauseFinding:
    """Long prompts were prefilled between the tokens of other requests."""
    known = [r.prompt_tokens for r in context.sent_before() if r.prompt_tokens]
    usual = float(np.quantile(known, 0.9)) if known else math.nan
    long = [
        r
        for r in context.run.requests
        if r.prompt_tokens
        and r.prompt_tokens > LONG_PROMPT_RATIO * usual
        and r.sent < context.span[1]
        and reached(r) > context.span[0]
    ]
    if not long:
        return _prefill_by_metrics(context, usual)
    gaps = context.measured[STALL].within(*context.span)
    slow = gaps.chosen(gaps.values > context.usual_wait)
    share = 1.0
    if len(slow.values):
        lost = slow.values - context.usual_wait
        met = np.zeros(len(lost), bool)
        for r in long:
            met |= (slow.ended > r.sent) & (slow.began < reached(r) + AROUND / 3)
        share = float(lost[met].sum() / lost.sum())
    max_tokens = max(r.prompt_tokens or 0 for r in long)
    return CauseFinding(
        PREFILL,
        share,
        [
            f"long prompts were prefilled: {len(long)}, of up to {max_tokens} tokens (p90 before: {usual:.0f})",
            f"{share:.0%} of the delay of arrivals falls into that prefill",
            f"{_per(context, m.STEP_TOKENS, m.STEPS)} tokens per step",
        ],
    )


def _prefill_by_metrics(context: SpikeContext, usual: float) -> CauseFinding:
    """Prefill by the server's count of prompt tokens, where answers do not report prompt lengths."""
    now = context.metrics.rate(m.PROMPT_TOKENS, [context.wide])
    before = context.metrics.rate(m.PROMPT_TOKENS, context.quiet)
    if math.isfinite(usual) or not now > LONG_PROMPT_RATIO * before:
        return CauseFinding(PREFILL, 0.0, [])
    sent, sent_before = len(context.sent(context.wide)) / (context.seconds + 2 * AROUND), len(context.sent_before())
    seconds = sum(end - begin for begin, end in context.quiet)
    # More requests are a burst; more tokens per request are long prompts.
    longer = (now / max(before, 1e-9)) / max(sent * seconds / max(sent_before, 1), 1.0)
    return CauseFinding(
        PREFILL,
        min(0.9, max(0.0, (longer - 1) / LONG_PROMPT_RATIO)),
        [f"{now:.0f} prompt tokens per second were prefilled, {before:.0f} before"],
    )


def queueing(context: SpikeContext) -> CauseFinding:
    """Requests waited for admission to the batch."""
    metrics = context.metrics
    waiting, before = metrics.gauge(m.WAITING, [context.wide], at_most=True), metrics.gauge(m.WAITING, context.quiet)
    worst, usual = context.first_token
    reading = (context.span[0], max(context.wide[1], context.span[0] + worst + AROUND))
    queued = metrics.ratio(m.QUEUE_SECONDS, m.QUEUED, [reading])
    queued_before = metrics.ratio(m.QUEUE_SECONDS, m.QUEUED, context.quiet)
    if not waiting >= 1 or not waiting > 2 * before:
        return CauseFinding(QUEUEING, 0.0, [])
    lines = [f"up to {waiting:.0f} requests waited for admission, {before:.1f} before"]
    if math.isfinite(queued):
        usual_wait = f", {queued_before * 1e3:.0f} ms before" if math.isfinite(queued_before) else ""
        lines.append(f"requests queued for {queued * 1e3:.0f} ms on average{usual_wait}")
        share = min(1.0, 2 * queued / max(worst - usual, 1e-3))
    else:
        share = 0.6
    places = metrics.gauge(m.RUNNING, [context.wide], at_most=True)
    lines.append(f"at most {places:.0f} ran at once")
    # Without more arrivals than before, a queue is rather a sign of something else that made answers take longer.
    more = 0.25 + 0.75 * _growth(context)
    # A queue delays first tokens, hardly the time between tokens.
    return CauseFinding(QUEUEING, more * share * (0.95 if context.ratio(TTFT) > 1 else 0.4), lines)


def batch(context: SpikeContext) -> CauseFinding:
    """More requests ran in each step."""
    metrics = context.metrics
    now, before = metrics.gauge(m.RUNNING, [context.span]), metrics.gauge(m.RUNNING, context.quiet)
    if math.isnan(now):
        now, before = _streams(context, [context.span]), _streams(context, context.quiet)
    if not now - before >= 1.5 or not now > 1.4 * before:
        return CauseFinding(BATCH, 0.0, [])
    # A batch also grows when answers take longer; it is a cause only if more requests arrived.
    burst, burst_before = _bursts(context)
    rise = context.slowdown if context.slowdown > 1 else context.ratio(TTFT, STALL)
    return CauseFinding(
        BATCH,
        0.75 * _growth(context) * explained(now / max(before, 0.5), rise),
        [
            f"{now:.1f} requests ran at once, {before:.1f} before; up to {burst:.0f} in {BURST_SECONDS:.0f} s, "
            f"{burst_before:.0f} before",
            f"{_per(context, m.STEP_TOKENS, m.STEPS)} tokens per step",
        ],
    )


def disconnects(context: SpikeContext) -> CauseFinding:
    """Clients connected and hung up."""
    sent = context.sent((context.span[0] - 1.0, context.span[1]))
    left = [r for r in sent if r.left]
    seconds = sum(end - begin for begin, end in context.quiet)
    before = sum(r.left for r in context.sent_before()) / max(seconds, 1e-9)
    if len(left) < 4 or len(left) / (context.seconds + 1) < 3 * before:
        return CauseFinding(DISCONNECTS, 0.0, [])
    return CauseFinding(
        DISCONNECTS,
        min(1.0, 1.2 * len(left) / len(sent)),
        [f"{len(left)} of {len(sent)} new clients hung up, {before:.2f} per second before"],
    )


def _in_progress(context: SpikeContext, at: float) -> int:
    return sum(r.due <= at < r.ended for r in context.run.requests)


def _bursts(context: SpikeContext) -> tuple[float, float]:
    """Maximum number of arrivals within ``BURST_SECONDS`` in the spike, and what the usual rate rarely exceeds.

    At the usual rate that number is Poisson distributed: mean plus two standard deviations.
    """
    dues = np.sort([request.due for request in context.run.requests])

    def counts(began: float, ended: float) -> list[float]:
        starts = np.arange(began, max(ended - BURST_SECONDS, began) + 0.01, 0.5)
        return list(np.searchsorted(dues, starts + BURST_SECONDS) - np.searchsorted(dues, starts))

    before = [count for began, ended in context.quiet for count in counts(began, ended)]
    usual = float(np.median(before or [0.0]))
    return max(counts(context.span[0] - BURST_SECONDS, context.span[1])), usual + 2 * math.sqrt(usual)


def _growth(context: SpikeContext) -> float:
    """Growth of bursts: 0 if they are no larger than before, 1 if they are larger by half or more."""
    now, before = _bursts(context)
    return min(1.0, max(0.0, now / max(before, 1) - 1.0) / 0.5)


def _per(context: SpikeContext, name: str, by: str) -> str:
    now, before = context.metrics.ratio(name, by, [context.wide]), context.metrics.ratio(name, by, context.quiet)
    return f"{now:.1f} (before: {before:.1f})" if math.isfinite(now) and math.isfinite(before) else "unknown numbers of"


def _streams(context: SpikeContext, spans: Sequence[TimeSpan]) -> float:
    """Mean number of answers in progress, as seen by the clients."""
    total = sum(end - begin for begin, end in spans)
    in_progress = sum(
        max(0.0, min(r.ended, end) - max(r.sent, begin)) for r in context.run.requests for begin, end in spans
    )
    return in_progress / total if total > 0 else math.nan


def _kinds(context: SpikeContext) -> list[str]:
    """The kinds of traffic that are new."""
    old, new = {r.kind for r in context.sent_before()}, [r.kind for r in context.sent(context.span)]
    fresh = sorted({kind for kind in new if kind not in old})
    return [f"new traffic: {', '.join(fresh)}"] if fresh else []


def _traced(context: SpikeContext) -> list[str]:
    """The decision trace of vllm-instant's scheduler about the steps of the spike."""

    def outcomes(spans: Sequence[TimeSpan]) -> list[dict[str, float]]:
        inside = [step for step in context.run.steps if any(begin <= step.at < end for begin, end in spans)]
        return [step.decision["outcome"] for step in inside if step.decision.get("outcome")]

    now, before = outcomes([context.span]), outcomes(context.quiet)
    if not now or not before:
        return []
    means = {
        name: [float(np.mean([outcome[name] for outcome in some])) for some in (now, before)]
        for name in ("drafted", "accepted", "milliseconds")
    }
    return [
        f"decision trace: {means['drafted'][0]:.1f} draft tokens per step and {means['accepted'][0]:.1f} accepted "
        f"({means['drafted'][1]:.1f} and {means['accepted'][1]:.1f} before), {means['milliseconds'][0]:.0f} ms per "
        f"step ({means['milliseconds'][1]:.0f} before)"
    ]


_JUDGES: tuple[Callable[[SpikeContext], CauseFinding], ...] = (
    client_side,
    stopped,
    compiling,
    acceptance,
    memory,
    prefill,
    queueing,
    batch,
    disconnects,
    escalation,
    host_causes.quota,
    host_causes.steal,
    host_causes.paging,
    host_causes.neighbour,
    host_causes.gpu,
)
_EXPLAINS = (
    # A slow machine delays everything on it, the load generator included, and requests pile up behind it.
    *((cause, CLIENT, 0.8) for cause in (QUOTA, STEAL, PAGING, NEIGHBOUR)),
    *((cause, sign, 0.8) for cause in HOST_CAUSES for sign in (QUEUEING, BATCH, STOPPED, COMPILE)),
    # Time that the hypervisor or a quota takes is missing from what other processes could have used.
    (STEAL, NEIGHBOUR, 0.5),
    (PAGING, NEIGHBOUR, 0.5),
    (CLIENT, STOPPED, 1.0),
    (CLIENT, COMPILE, 1.0),
    (CLIENT, QUEUEING, 0.9),
    (CLIENT, BATCH, 0.9),
    (CLIENT, PREFILL, 0.8),
    (CLIENT, ACCEPTANCE, 0.8),
    (PREFILL, STOPPED, 0.7),
    (PREFILL, COMPILE, 0.7),
    (PREFILL, BATCH, 0.7),
    (PREFILL, QUEUEING, 0.5),
    (COMPILE, STOPPED, 0.6),
    (STOPPED, QUEUEING, 0.8),
    (STOPPED, BATCH, 0.8),
    (STOPPED, ACCEPTANCE, 0.6),
    (MEMORY, QUEUEING, 0.9),
    (MEMORY, BATCH, 0.9),
    (QUEUEING, BATCH, 0.3),
    (DISCONNECTS, BATCH, 0.9),
    (DISCONNECTS, QUEUEING, 0.7),
    # Answers of another server take no steps of this one, but they are in progress.
    *((ESCALATION, sign, 0.8) for sign in (BATCH, QUEUEING, PREFILL)),
    (ACCEPTANCE, BATCH, 0.5),
    (ACCEPTANCE, QUEUEING, 0.8),
)
"""(reason, sign, share): the share of the sign's score that the reason's score removes. The order matters: a score that
has been reduced removes less."""
