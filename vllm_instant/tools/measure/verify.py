"""Checks a server against vLLM with the same model: greedy answers, seeds, and the distribution of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vllm_instant.tools.measure.distribution_test import Tokens
from vllm_instant.tools.measure.sampling import (
    SETTINGS,
    SamplingResult,
    SamplingSetting,
    ServerClient,
    draw_samples,
    greedy_answers,
    sampled,
    seeded_answers,
)

Outcome = Literal["pass", "fail", "not tested", "lossy"]
Tick = Callable[[str], None]


@dataclass(frozen=True)
class VerifyPlan:
    """The requests of a check.

    ``false_alarms`` is the probability that a server that samples as vLLM does fails any of the sampled settings.
    """

    prompts: Sequence[str]
    settings: Sequence[SamplingSetting] = SETTINGS
    draws: int = 600
    """Number of samples per prompt and setting."""
    tokens: int = 4
    """Number of tokens per sample whose joint distribution is tested."""
    answer_tokens: int = 48
    """Length of greedy and seeded answers."""
    false_alarms: float = 1e-3

    @property
    def limit(self) -> float:
        """The p-value below which one setting fails."""
        return self.false_alarms / max(1, len(self.settings))


@dataclass(frozen=True)
class BaselineAnswers:
    """The answers of vLLM."""

    greedy: list[list[int]]
    seeded: list[list[int]]
    drawn: list[list[Tokens]]
    """By setting, by prompt."""


@dataclass(frozen=True)
class VerifyCheck:
    """One line of the report."""

    name: str
    outcome: Outcome
    detail: str
    numbers: dict[str, Any]


def baseline_answers(baseline: ServerClient, plan: VerifyPlan, tick: Tick = lambda text: None) -> BaselineAnswers:
    """Send all requests of a plan to vLLM once."""
    tick("greedy and seeded answers of vLLM")
    greedy = greedy_answers(baseline, plan.prompts, plan.answer_tokens)
    seeded = seeded_answers(baseline, plan.prompts, plan.answer_tokens)
    drawn = []
    for setting in plan.settings:
        tick(f"vLLM at {setting.name}")
        drawn.append(draw_samples(baseline, plan.prompts, setting.parameters, plan.draws, plan.tokens))
    return BaselineAnswers(greedy, seeded, drawn)


def verify(
    ours: ServerClient,
    expected: BaselineAnswers,
    plan: VerifyPlan,
    *,
    exact: bool,
    lossy: bool,
    tick: Tick = lambda text: None,
) -> list[VerifyCheck]:
    """Run every check.

    Args:
        ours: the server that is checked.
        expected: the answers of vLLM to the same plan.
        plan: the requests.
        exact: whether equal tokens can be expected, as in float32; otherwise rounding may change close decisions.
        lossy: whether the deployment chose a lossy plugin, so that a difference is what was asked for.
        tick: called with what is being done.

    """
    tick("greedy answers")
    checks = [
        _identity("greedy", greedy_answers(ours, plan.prompts, plan.answer_tokens), expected.greedy, exact, lossy)
    ]
    tick("seeded answers, twice")
    first = seeded_answers(ours, plan.prompts, plan.answer_tokens)
    again = seeded_answers(ours, plan.prompts, plan.answer_tokens)
    checks.append(_identity("seeds, asked twice", again, first, exact, lossy))
    checks.append(_identity("seeds, as vLLM", first, expected.seeded, exact, lossy))
    for setting, drawn in zip(plan.settings, expected.drawn, strict=True):
        tick(setting.name)
        checks.append(_distribution(sampled(ours, drawn, plan.prompts, setting, plan.limit), plan, lossy))
    return checks


def _identity(name: str, found: list[list[int]], expected: list[list[int]], exact: bool, lossy: bool) -> VerifyCheck:
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    detail = f"{same} of {len(found)} answers identical"
    if same == len(found):
        outcome: Outcome = "pass"
    elif lossy:
        outcome = "lossy"
    elif exact:
        outcome = "fail"
    else:
        outcome, detail = "not tested", f"{detail}; rounding can cause that, float32 would tell"
    return VerifyCheck(name, outcome, detail, {"identical": same, "answers": len(found)})


def _distribution(result: SamplingResult, plan: VerifyPlan, lossy: bool) -> VerifyCheck:
    agreement = result.agreement
    numbers = asdict(agreement) | {"drafted": result.drafted, "accepted": result.accepted}
    drafts = f"{result.accepted} of {result.drafted} draft tokens accepted"
    differs = agreement.p_value < plan.limit
    if differs and lossy:
        outcome: Outcome = "lossy"
        detail = f"differs by a total variation of about {agreement.distance:.3f} at most"
    elif differs:
        outcome, detail = (
            "fail",
            f"another distribution: p = {agreement.p_value:.1g}, largest difference in {agreement.worst_view}",
        )
    elif not result.conclusive:
        outcome, detail = "not tested", "too few draft tokens were accepted or rejected for a conclusion"
    else:
        outcome = "pass"
        detail = f"p = {agreement.p_value:.2g}; a total variation of {agreement.detectable:.3f} would be detected"
    return VerifyCheck(result.setting.name, outcome, f"{detail} ({drafts})", numbers)
