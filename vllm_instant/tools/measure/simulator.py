"""A simulated engine: the effect of a speculation policy on a server, without a model.

Requests arrive, wait for a place, and get one token per step plus the draft tokens that a random process accepts; a
step takes the time of a cost function. A policy is driven through the same ``DraftBudgetManager`` as in a real server,
with a simulated clock, so that minutes of serving take seconds and a seed repeats them exactly.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.interfaces.drafter import Draft
from vllm_instant.interfaces.experts import ExpertCount
from vllm_instant.interfaces.plugins import FullGraphs
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.speculation import SpeculationPolicy
from vllm_instant.speculation.draft_budget import DraftBudgetManager
from vllm_instant.speculation.draft_plan import DraftPlan, trim_drafts

COUNT_EVERY = 8
"""Distinct experts are counted in one step out of this many."""

Acceptance = Callable[[int, int], float]
"""(step, draft position from 0) → probability that the token is accepted, given that the tokens before it were."""


def steady(chance: float, decay: float = 1.0) -> Acceptance:
    """The same in all steps; each further position is multiplied by ``decay``."""
    return lambda step, position: chance * decay**position


def switching(before: Acceptance, after: Acceptance, at: int, back_at: int | None = None) -> Acceptance:
    """One process until step ``at``, then another, and the first again from ``back_at``."""
    return lambda step, position: (after if at <= step and (back_at is None or step < back_at) else before)(
        step, position
    )


@dataclass(frozen=True)
class RequestClass:
    """Requests of one kind."""

    acceptance: Acceptance
    temperature: float = 0.0
    prompt_tokens: int = 100
    output_tokens: tuple[int, int] = (80, 120)
    share: float = 1.0
    prompt_head: int = 0
    """First token of the class's prompts."""
    finds: float = 1.0
    """Probability that the drafter proposes anything; a lookup often finds nothing."""
    stated: float | None = None
    """Confidence that the drafter states for each token; None where it states none."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step.

    Args:
        rows: table of (tokens through the target, seconds), interpolated; the step's floor.
        context_second: tokens of context that attention reads per second.
        draft_pass: seconds per draft step.
        draft_pass_request: seconds per draft step and request.
        draft_start: fixed seconds of drafting.
        missed_second: tokens per second of a drafter that reads what came while it was off.
        expert_second: seconds of each distinct expert; 0 for a model without.
        num_experts: experts of each layer.
        top_k: experts that a token picks.
        draft_share: new experts of a draft token relative to an independent token; 0 where it uses those of the
            token before it.
        graphs: steps that run as one CUDA graph; None: there is no difference.
        piecewise: share by which all others take longer.

    """

    rows: Sequence[tuple[float, float]]
    context_second: float = np.inf
    draft_pass: float = 0.0
    draft_pass_request: float = 0.0
    draft_start: float = 0.0
    missed_second: float = np.inf
    expert_second: float = 0.0
    num_experts: int = 64
    top_k: int = 8
    draft_share: float = 1.0
    graphs: FullGraphs | None = None
    piecewise: float = 0.0

    def experts(self, requests: int, drafts: int) -> ExpertCount | None:
        """Distinct experts of a step in each layer; None for a model without."""
        if not self.expert_second:
            return None
        tokens = requests + self.draft_share * drafts
        used = self.num_experts * (1.0 - (1.0 - self.top_k / self.num_experts) ** tokens)
        return ExpertCount(requests, drafts, used, self.num_experts, self.top_k)

    def launches(self, drafted: Sequence[int]) -> float:
        """The factor of the time of a step that verifies these drafts."""
        return 1.0 if self.graphs is None or self.graphs.cover(drafted) else 1.0 + self.piecewise

    def seconds(self, rows: int, context: int, passes: int, requests: int, missed: int = 0) -> float:
        """Time of one step, without noise."""
        sizes, times = zip(*self.rows, strict=True)
        if rows <= sizes[-1]:
            target = float(np.interp(rows, sizes, times))
        else:
            target = times[-1] + (rows - sizes[-1]) * (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        drafting = self.draft_start + passes * (self.draft_pass + self.draft_pass_request * requests) if passes else 0.0
        experts = self.experts(requests, rows - requests)
        target += experts.experts * self.expert_second if experts is not None else 0.0
        return target + context / self.context_second + drafting + missed / self.missed_second


# Medians measured on two cores with a 105M model in bfloat16 (vLLM 0.32.0, CPU, eager); note the fall from 2 to 3 rows.
TWO_CORES = StepCost(
    rows=[
        (1, 0.0170), (2, 0.0203), (3, 0.0167), (4, 0.0161), (5, 0.0166), (6, 0.0172), (7, 0.0195), (8, 0.0210),
        (10, 0.0226), (12, 0.0242), (16, 0.0290), (20, 0.0334), (24, 0.0376), (32, 0.0470), (40, 0.0540), (64, 0.0820),
        (72, 0.0873), (80, 0.0977), (96, 0.124), (128, 0.148), (144, 0.166), (288, 0.332),
    ],
    context_second=0.5e6,
)  # fmt: skip
TWO_CORES_DRAFT_MODEL = StepCost(
    TWO_CORES.rows, TWO_CORES.context_second, draft_pass=0.8e-3, draft_pass_request=0.1e-3, draft_start=1.2e-3
)


def roofline(
    parameters: float,
    bytes_a_parameter: float = 2.0,
    bandwidth: float = 3.0e12,
    flops: float = 600e12,
    overhead: float = 1.0e-3,
    kv_bytes_a_token: float = 131072.0,
    padding: int = 8,
    draft_pass: float = 0.6e-3,
) -> StepCost:
    """An analytic curve, not a measurement: a large model on one accelerator, batches padded to captured graphs."""
    weights = parameters * bytes_a_parameter / bandwidth
    table: list[tuple[float, float]] = []
    for size in range(padding, 4096 + 1, padding):
        seconds = overhead + max(weights, 2 * parameters * size / flops)
        table += [(size - padding + 1, seconds), (size, seconds)]
    return StepCost(table, bandwidth / kv_bytes_a_token, draft_pass=draft_pass, draft_start=0.1e-3)


@dataclass(frozen=True)
class HostNoise:
    """Factors of step times on a host that runs other processes as well.

    Args:
        jitter: standard deviation of the logarithm of each step's factor.
        hiccups: share of steps that take three times as long.
        bursts: probability per step that another process starts.
        burst_steps: steps that it runs, lowest and highest.
        burst_load: share by which steps take longer meanwhile, lowest and highest.
        first_steps: factors of the first steps of a server, whose memory and caches are cold.

    """

    jitter: float = 0.02
    hiccups: float = 0.0
    bursts: float = 0.0
    burst_steps: tuple[int, int] = (10, 60)
    burst_load: tuple[float, float] = (0.2, 0.6)
    first_steps: Sequence[float] = ()

    def factors(self, random: np.random.Generator) -> Iterator[float]:
        """The factor of each step, without end."""
        left, load = 0, 0.0
        for first in itertools.chain(self.first_steps, itertools.repeat(1.0)):
            if left == 0 and random.random() < self.bursts:
                left, load = int(random.integers(*self.burst_steps, endpoint=True)), random.uniform(*self.burst_load)
            factor = first * math.exp(self.jitter * random.standard_normal())
            if left > 0:
                left -= 1
                factor *= 1.0 + load
            yield factor * (3.0 if random.random() < self.hiccups else 1.0)


@dataclass
class Report:
    """Result of a simulation."""

    seconds: float = 0.0
    noiseless_seconds: float = 0.0
    """Seconds that the same steps take without noise."""
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    step_drafted: list[int] = field(default_factory=list)
    finished: list[tuple[int, float, int]] = field(default_factory=list)
    """(class, seconds from first to last token, tokens) of each finished request."""

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all requests over simulated time."""
        return self.tokens / self.seconds


@dataclass
class _Running:
    state: RequestState
    kind: int
    left: int
    luck: npt.NDArray[np.float64]
    """Uniform in 0..1 for each output token: a draft of it is accepted when this is below the chance."""
    granted: int = 0
    """Draft tokens that the next step verifies."""
    missed: int = 0
    """Tokens that the drafter has not read."""
    first_token_at: float | None = None


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulate(
    make_policy: Callable[[Callable[[], float]], SpeculationPolicy],
    classes: Sequence[RequestClass],
    cost: StepCost,
    *,
    concurrency: int,
    requests: int,
    max_draft_tokens: int = 8,
    feedback_delay: int = 0,
    noise: HostNoise = HostNoise(hiccups=0.005),
    seed: int = 0,
    warm_up_requests: int = 0,
) -> Report:
    """Serve ``requests`` requests, ``concurrency`` at a time, and report.

    Args:
        make_policy: given the simulated clock, the policy.
        classes: kinds of requests, mixed by their shares.
        cost: what steps take.
        concurrency: requests in flight; when one ends, the next one starts.
        requests: number of requests in total.
        max_draft_tokens: limit of a request's draft tokens.
        feedback_delay: steps by which outcomes are delayed, as with asynchronous scheduling; 0 is synchronous.
        noise: of step times.
        seed: of arrivals, acceptance and noise.
        warm_up_requests: first requests, which are served but not reported.

    """
    # Requests and the random numbers of their tokens are the same for every policy.
    factors = noise.factors(np.random.default_rng([seed, 0]))
    clock = _Clock()
    contained: GuardedPlugin[SpeculationPolicy] = GuardedPlugin("speculation", "simulated", make_policy(clock))
    budget = DraftBudgetManager(contained, max_draft_tokens, clock)
    arrivals = _arrivals(classes, requests, np.random.default_rng([seed, 1]))
    running: list[_Running] = []
    late: deque[tuple[float, Callable[[], None]]] = deque()
    report = Report()
    step = finished = 0
    while True:
        while len(running) < concurrency:
            request = next(arrivals, None)
            if request is None:
                break
            budget.admit(request.state)
            running.append(request)
        if not running:
            break
        step += 1
        budget.step_begins()
        plan = budget.plan_drafts([r.state for r in running])
        lengths = list(plan.num_draft_tokens.values())
        budget.step_scheduled(step)
        budget.on_model_executing()
        drafted = [r.granted for r in running]
        accepted = [_accepted(classes[r.kind].acceptance, step, r) for r in running]
        rows, passes = len(running) + sum(drafted), max(lengths, default=0)
        context = sum(r.state.num_prompt_tokens + r.state.num_output_tokens for r in running)
        missed = 0
        for request, length in zip(running, lengths, strict=True):
            if length:
                missed, request.missed = missed + request.missed, 0
        noiseless = cost.seconds(rows, context, passes, len(running), missed) * cost.launches(drafted)
        seconds = noiseless * next(factors)
        clock.now += seconds
        counted = finished >= warm_up_requests
        produced = 0
        for request, length, kept in zip(running, lengths, accepted, strict=True):
            gained = min(kept + 1, request.left)
            request.left -= gained
            request.state.num_output_tokens += gained
            request.missed += 0 if length else gained
            produced += gained
            if request.first_token_at is None:
                request.first_token_at = clock.now
        for request, granted in zip(running, _drafts(classes, running, plan), strict=True):
            request.granted = granted
        if counted:
            report.seconds += seconds
            report.noiseless_seconds += noiseless
            report.steps += 1
            report.tokens += produced
            report.drafted += sum(drafted)
            report.accepted += sum(accepted)
            report.step_seconds.append(seconds)
            report.step_tokens.append(produced)
            report.step_drafted.append(sum(drafted))
        experts = cost.experts(len(running), sum(drafted)) if step % COUNT_EVERY == 0 else None
        tell = _outcome(budget, step, [r.state for r in running], drafted, accepted, rows, passes, experts)
        late.append((clock.now, tell))
        if len(late) > feedback_delay:
            # Reported late, with the time at which it happened.
            now, (clock.now, tell) = clock.now, late.popleft()
            tell()
            clock.now = now
        for request in [r for r in running if r.left == 0]:
            running.remove(request)
            budget.forget(request.state.request_id)
            finished += 1
            if counted and request.first_token_at is not None:
                report.finished.append(
                    (request.kind, clock.now - request.first_token_at, request.state.num_output_tokens)
                )
    budget.close()
    if contained.disabled:
        raise RuntimeError(f"the policy raised: {dict(contained.failures)}")
    return report


def _arrivals(classes: Sequence[RequestClass], count: int, random: np.random.Generator) -> Iterator[_Running]:
    shares = np.array([c.share for c in classes])
    for number in range(count):
        kind = int(random.choice(len(classes), p=shares / shares.sum()))
        chosen = classes[kind]
        tokens = int(random.integers(chosen.output_tokens[0], chosen.output_tokens[1] + 1))
        prompt = [chosen.prompt_head] * 32 + [number]
        state = RequestState(f"r{number}", chosen.prompt_tokens, tokens, chosen.temperature, prompt_token_ids=prompt)
        # The drafter has not read the prompt.
        yield _Running(state, kind, tokens, random.random(tokens + 129), missed=chosen.prompt_tokens)


def _accepted(acceptance: Acceptance, step: int, request: _Running) -> int:
    newest = request.state.num_output_tokens
    for position in range(request.granted):
        if request.luck[newest + position] >= acceptance(step, position):
            return position
    return request.granted


def _drafts(classes: Sequence[RequestClass], running: Sequence[_Running], plan: DraftPlan) -> list[int]:
    """Draft tokens of each request after trimming by cost."""
    drafts: list[Sequence[int] | Draft] = []
    for request, length in zip(running, plan.num_draft_tokens.values(), strict=True):
        chosen = classes[request.kind]
        # The same random number for every policy: it belongs to the position in the output.
        found = request.luck[-1 - request.state.num_output_tokens % 128] < chosen.finds
        tokens = range(length if found else 0)
        drafts.append(Draft(tokens, [chosen.stated] * len(tokens)) if chosen.stated is not None else tokens)
    return [len(draft) for draft in trim_drafts(drafts, plan.draft_cost, [False] * len(drafts))]


def _outcome(
    budget: DraftBudgetManager,
    step: int,
    states: list[RequestState],
    drafted: list[int],
    accepted: list[int],
    rows: int,
    passes: int,
    experts: ExpertCount | None,
) -> Callable[[], None]:
    return lambda: budget.step_finished(
        step,
        states,
        drafted,
        accepted,
        num_scheduled_tokens=rows,
        num_scheduled_requests=len(states),
        draft_steps=passes,
        experts=experts,
    )
