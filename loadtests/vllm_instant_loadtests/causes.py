"""Why a spike was there: each cause says how much of it the evidence for it explains, and what that evidence is.

A score is the share of the rise that a cause explains, between 0 and 1; the highest one names the spike. A cause that
is the reason of another's signs takes their part: while a load generator sleeps, nobody gets tokens, but the server has
not stopped. Everything is read from what stock vLLM exports and from the requests themselves; a decision trace, where
there is one, adds lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_instant.tools.measure import server_metrics as m
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
CAUSES = (ACCEPTANCE, BATCH, PREFILL, MEMORY, COMPILE, QUEUEING, CLIENT, STOPPED, DISCONNECTS)

MIN_SCORE = 0.25
"""Below it, a cause is unknown."""
MIN_DRAFTED = 40
MIN_DROP = 0.1
"""Of the share of accepted draft tokens."""
FULL = 0.95
"""Share of the KV cache in use at which it is full: new blocks are taken one at a time."""
LONG = 3.0
"""A long prompt has so many times the tokens of the baseline's longest usual ones."""
NEW = 1.25
"""By what factor a batch or a prompt is larger than all before, to be something new to the engine."""
BURST_SECONDS = 2.0
"""In which requests count as having come together."""
SILENT = 0.3
"""Seconds without anything for anybody that can be a stop."""


@dataclass(frozen=True)
class CauseFinding:
    """One cause, and what speaks for it."""

    cause: str
    score: float
    evidence: list[str]


def attribute(scene: SpikeContext) -> list[CauseFinding]:
    """All causes with their scores, the likeliest first; ``UNKNOWN`` is the first where nothing explains a spike."""
    found = {finding.cause: finding for finding in (judge(scene) for judge in _JUDGES)}
    for reason, sign, share in _TAKES:
        taken = 1 - share * found[reason].score
        found[sign] = replace(found[sign], score=float(found[sign].score * taken))
    ordered = sorted(found.values(), key=lambda finding: -finding.score)
    if ordered[0].score < MIN_SCORE:
        seen = [line for finding in ordered for line in finding.evidence]
        ordered = [CauseFinding(UNKNOWN, 0.0, ["nothing that was recorded explains it", *seen[:3]]), *ordered]
    return [replace(ordered[0], evidence=[*ordered[0].evidence, *_traced(scene)]), *ordered[1:]]


def client_side(scene: SpikeContext) -> CauseFinding:
    """The load generator itself was late: what it saw late need not have come late."""
    late = scene.late()
    if not late:
        return CauseFinding(CLIENT, 0.0, [])
    return CauseFinding(
        CLIENT,
        min(1.0, late / scene.lost),
        [
            f"the load generator's own timers came {late:.2f} s late, of {scene.lost:.2f} s of delay; the longest wait "
            f"for a token was {scene.longest:.2f} s ({scene.gap:.2f} s before)"
        ],
    )


def stopped(scene: SpikeContext) -> CauseFinding:
    """Nobody got anything, and the server's own counters stood still."""
    began, ended = scene.silence
    silence = ended - began
    if silence < max(SILENT, 4 * scene.gap):
        return CauseFinding(STOPPED, 0.0, [])
    lines = [f"nobody got a token for {silence:.2f} s (waits were {scene.gap:.2f} s at most before, 99 of 100)"]
    score = min(1.0, silence / scene.lost)
    away, still = scene.meters.unanswered((began, ended)), scene.meters.stood_still(m.GENERATED, (began, ended))
    if away >= 0.8 * silence:
        lines.append(f"/metrics did not answer for {away:.2f} s")
    elif still >= 0.4 * silence:
        lines.append(f"/metrics answered, but the number of generated tokens stood still for {still:.2f} s or more")
    elif len(scene.meters.at):
        score *= 0.5
    return CauseFinding(STOPPED, score, lines)


def compiling(scene: SpikeContext) -> CauseFinding:
    """The engine was silent when it met something for the first time: a larger batch, a longer prompt."""
    began, ended = scene.silence
    if ended - began < max(SILENT, 4 * scene.gap):
        return CauseFinding(COMPILE, 0.0, [])
    lines = []
    under_way = _under_way(scene, began)
    record = max((_under_way(scene, r.due) for r in scene.run.requests if r.due < began - AROUND), default=0)
    if under_way >= NEW * record and record:
        lines.append(f"{under_way} answers were under way for the first time ({record} at most before)")
    old = [r.prompt_tokens for r in scene.run.requests if r.prompt_tokens and reached(r) < began]
    new = [r for r in scene.run.requests if r.prompt_tokens and r.sent < began + AROUND / 3 and reached(r) >= ended]
    longest = max((r.prompt_tokens or 0 for r in new), default=0)
    if old and longest >= NEW * max(old):
        lines.append(f"a prompt of {longest} tokens came for the first time ({max(old)} at most before)")
    if not lines:
        return CauseFinding(COMPILE, 0.0, [])
    return CauseFinding(COMPILE, 0.8, [f"nobody got a token for {ended - began:.2f} s", *lines])


def acceptance(scene: SpikeContext) -> CauseFinding:
    """Fewer tokens a step, because drafts are refused."""
    meters, span, quiet = scene.meters, [scene.span], scene.quiet
    if not meters.has(m.DRAFTED) or not meters.growth(m.DRAFTED, span) >= MIN_DRAFTED:
        return CauseFinding(ACCEPTANCE, 0.0, [])
    now, before = meters.ratio(m.ACCEPTED, m.DRAFTED, span), meters.ratio(m.ACCEPTED, m.DRAFTED, quiet)
    a_step, a_step_before = (1 + meters.ratio(m.ACCEPTED, m.DRAFTS, spans) for spans in (span, quiet))
    line = f"{now:.2f} of draft tokens accepted, {before:.2f} before"
    if not before - now >= MIN_DROP:
        return CauseFinding(ACCEPTANCE, 0.0, [line])
    lines = [
        line,
        f"{a_step:.2f} tokens a step of a request, {a_step_before:.2f} before: for that alone tokens come "
        f"{a_step_before / a_step:.2f} times slower; they came {scene.paced:.2f} times slower on average",
        *_kinds(scene),
    ]
    return CauseFinding(ACCEPTANCE, explained(a_step_before / a_step, scene.paced), lines)


def memory(scene: SpikeContext) -> CauseFinding:
    """Requests lost their KV blocks, or waited for some."""
    meters, span = scene.meters, [scene.wide]
    lost, before = meters.growth(m.PREEMPTIONS, span), meters.rate(m.PREEMPTIONS, scene.quiet)
    usage, usual = meters.gauge(m.KV_USAGE, span, at_most=True), meters.gauge(m.KV_USAGE, scene.quiet)
    waiting = meters.gauge(m.WAITING, span, at_most=True)
    lines = []
    score = 0.0
    if lost >= 0.5 and lost / scene.seconds > 3 * before:
        lines.append(f"{lost:.0f} requests were preempted (lost their KV blocks), {before:.2f} a second before")
        score = 0.95
    if usage >= FULL:
        lines.append(f"up to {usage:.0%} of the KV cache in use, {usual:.0%} before; {waiting:.0f} requests waited")
        score = max(score, 0.9 if waiting >= 1 and usual < 0.8 * FULL else 0.3)
    return CauseFinding(MEMORY, score, lines)


def prefill(scene: SpikeContext) -> CauseFinding:
    """Long prompts were read between the others' tokens."""
    known = [r.prompt_tokens for r in scene.sent_before() if r.prompt_tokens]
    usual = float(np.quantile(known, 0.9)) if known else math.nan
    long = [
        r
        for r in scene.run.requests
        if r.prompt_tokens and r.prompt_tokens > LONG * usual and r.sent < scene.span[1] and reached(r) > scene.span[0]
    ]
    if not long:
        return _prefill_by_metrics(scene, usual)
    gaps = scene.measured[STALL].within(*scene.span)
    slow = gaps.chosen(gaps.values > scene.gap)
    share = 1.0
    if len(slow.values):
        lost = slow.values - scene.gap
        met = np.zeros(len(lost), bool)
        for r in long:
            met |= (slow.ended > r.sent) & (slow.began < reached(r) + AROUND / 3)
        share = float(lost[met].sum() / lost.sum())
    most = max(r.prompt_tokens or 0 for r in long)
    return CauseFinding(
        PREFILL,
        share,
        [
            f"long prompts were read meanwhile: {len(long)}, of up to {most} tokens ({usual:.0f} were usual before)",
            f"{share:.0%} of the time by which arrivals were late falls into that reading",
            f"{_per(scene, m.STEP_TOKENS, m.STEPS)} tokens a step",
        ],
    )


def _prefill_by_metrics(scene: SpikeContext, usual: float) -> CauseFinding:
    """Where requests do not say how long their prompts are: the server's count of prompt tokens."""
    now = scene.meters.rate(m.PROMPT_TOKENS, [scene.wide])
    before = scene.meters.rate(m.PROMPT_TOKENS, scene.quiet)
    if math.isfinite(usual) or not now > LONG * before:
        return CauseFinding(PREFILL, 0.0, [])
    sent, sent_before = len(scene.sent(scene.wide)) / (scene.seconds + 2 * AROUND), len(scene.sent_before())
    seconds = sum(end - begin for begin, end in scene.quiet)
    # More requests are a burst; longer ones are long prompts.
    longer = (now / max(before, 1e-9)) / max(sent * seconds / max(sent_before, 1), 1.0)
    return CauseFinding(
        PREFILL,
        min(0.9, max(0.0, (longer - 1) / LONG)),
        [f"{now:.0f} prompt tokens a second were read, {before:.0f} before"],
    )


def queueing(scene: SpikeContext) -> CauseFinding:
    """Requests waited for a place in the batch."""
    meters = scene.meters
    waiting, before = meters.gauge(m.WAITING, [scene.wide], at_most=True), meters.gauge(m.WAITING, scene.quiet)
    worst, usual = scene.first_token
    reading = (scene.span[0], max(scene.wide[1], scene.span[0] + worst + AROUND))
    queued = meters.ratio(m.QUEUE_SECONDS, m.QUEUED, [reading])
    queued_before = meters.ratio(m.QUEUE_SECONDS, m.QUEUED, scene.quiet)
    if not waiting >= 1 or not waiting > 2 * before:
        return CauseFinding(QUEUEING, 0.0, [])
    lines = [f"up to {waiting:.0f} requests waited for a place, {before:.1f} before"]
    if math.isfinite(queued):
        usual_wait = f", {queued_before * 1e3:.0f} ms before" if math.isfinite(queued_before) else ""
        lines.append(f"requests queued for {queued * 1e3:.0f} ms on average{usual_wait}")
        share = min(1.0, 2 * queued / max(worst - usual, 1e-3))
    else:
        share = 0.6
    places = meters.gauge(m.RUNNING, [scene.wide], at_most=True)
    lines.append(f"{places:.0f} ran at once, at most")
    # Where no more came than before, a queue is rather the sign of something else that made answers take longer.
    more = 0.25 + 0.75 * _growth(scene)
    # What queues explain is the time to the first token.
    return CauseFinding(QUEUEING, more * share * (0.95 if scene.ratio(TTFT) > 1 else 0.4), lines)


def batch(scene: SpikeContext) -> CauseFinding:
    """More requests shared each step."""
    meters = scene.meters
    now, before = meters.gauge(m.RUNNING, [scene.span]), meters.gauge(m.RUNNING, scene.quiet)
    if math.isnan(now):
        now, before = _streams(scene, [scene.span]), _streams(scene, scene.quiet)
    if not now - before >= 1.5 or not now > 1.4 * before:
        return CauseFinding(BATCH, 0.0, [])
    # A batch also grows because answers take longer; only if more of them came it is a reason.
    came, came_before = _crowds(scene)
    rise = scene.slower if scene.slower > 1 else scene.ratio(TTFT, STALL)
    return CauseFinding(
        BATCH,
        0.75 * _growth(scene) * explained(now / max(before, 0.5), rise),
        [
            f"{now:.1f} requests ran at once, {before:.1f} before; up to {came:.0f} came within {BURST_SECONDS:.0f} s, "
            f"{came_before:.0f} before",
            f"{_per(scene, m.STEP_TOKENS, m.STEPS)} tokens a step",
        ],
    )


def disconnects(scene: SpikeContext) -> CauseFinding:
    """Clients came and hung up."""
    sent = scene.sent((scene.span[0] - 1.0, scene.span[1]))
    left = [r for r in sent if r.left]
    seconds = sum(end - begin for begin, end in scene.quiet)
    before = sum(r.left for r in scene.sent_before()) / max(seconds, 1e-9)
    if len(left) < 4 or len(left) / (scene.seconds + 1) < 3 * before:
        return CauseFinding(DISCONNECTS, 0.0, [])
    return CauseFinding(
        DISCONNECTS,
        min(1.0, 1.2 * len(left) / len(sent)),
        [f"{len(left)} of {len(sent)} clients that came hung up, {before:.2f} a second before"],
    )


def _under_way(scene: SpikeContext, at: float) -> int:
    return sum(r.due <= at < r.ended for r in scene.run.requests)


def _crowds(scene: SpikeContext) -> tuple[float, float]:
    """The most requests that came within ``BURST_SECONDS`` in the spike, and what is seldom more at the usual rate."""
    dues = np.sort([request.due for request in scene.run.requests])

    def counts(began: float, ended: float) -> list[float]:
        starts = np.arange(began, max(ended - BURST_SECONDS, began) + 0.01, 0.5)
        return list(np.searchsorted(dues, starts + BURST_SECONDS) - np.searchsorted(dues, starts))

    before = [count for began, ended in scene.quiet for count in counts(began, ended)]
    usual = float(np.median(before or [0.0]))
    return max(counts(scene.span[0] - BURST_SECONDS, scene.span[1])), usual + 2 * math.sqrt(usual)


def _growth(scene: SpikeContext) -> float:
    """Between 0 (no more requests came together than before) and 1 (half as many again, or more)."""
    now, before = _crowds(scene)
    return min(1.0, max(0.0, now / max(before, 1) - 1.0) / 0.5)


def _per(scene: SpikeContext, name: str, by: str) -> str:
    now, before = scene.meters.ratio(name, by, [scene.wide]), scene.meters.ratio(name, by, scene.quiet)
    return f"{now:.1f} (before: {before:.1f})" if math.isfinite(now) and math.isfinite(before) else "unknown numbers of"


def _streams(scene: SpikeContext, spans: Sequence[TimeSpan]) -> float:
    """Answers under way on average, as the clients saw it."""
    total = sum(end - begin for begin, end in spans)
    under_way = sum(
        max(0.0, min(r.ended, end) - max(r.sent, begin)) for r in scene.run.requests for begin, end in spans
    )
    return under_way / total if total > 0 else math.nan


def _kinds(scene: SpikeContext) -> list[str]:
    """Which traffic is new."""
    old, new = {r.kind for r in scene.sent_before()}, [r.kind for r in scene.sent(scene.span)]
    fresh = sorted({kind for kind in new if kind not in old})
    return [f"new traffic: {', '.join(fresh)}"] if fresh else []


def _traced(scene: SpikeContext) -> list[str]:
    """What the decision trace of our own scheduler says of the spike's steps."""

    def outcomes(spans: Sequence[TimeSpan]) -> list[dict[str, float]]:
        inside = [step for step in scene.run.steps if any(begin <= step.at < end for begin, end in spans)]
        return [step.decision["outcome"] for step in inside if step.decision.get("outcome")]

    now, before = outcomes([scene.span]), outcomes(scene.quiet)
    if not now or not before:
        return []
    means = {
        name: [float(np.mean([outcome[name] for outcome in some])) for some in (now, before)]
        for name in ("drafted", "accepted", "milliseconds")
    }
    return [
        f"decision trace: {means['drafted'][0]:.1f} draft tokens a step and {means['accepted'][0]:.1f} accepted "
        f"({means['drafted'][1]:.1f} and {means['accepted'][1]:.1f} before), {means['milliseconds'][0]:.0f} ms a step "
        f"({means['milliseconds'][1]:.0f} before)"
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
)
_TAKES = (
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
    (ACCEPTANCE, BATCH, 0.5),
    (ACCEPTANCE, QUEUEING, 0.8),
)
"""(reason, sign, share): what a reason explains, its sign does not explain again. In order: a score that was taken from
takes less."""
