"""What a bound on every request's pace costs in total speed: ``slowest_request`` at several values, mixed traffic.

    .venv/bin/python benchmarks/pace_bound.py [--rounds 6] [--users 8]        # 5 minutes

Half of the users write free text at temperature 1, where drafts bring little; the others continue code and structured
text, where they bring much. The demo's target and draft model; one engine, in this process, so that the decisions are
the only difference: each bound has its own ``goodput`` policy, which keeps what it learned from round to round. In a
round every arm serves the same new prompts, in random order; the first round is not counted. ``off`` and ``off again``
have clients that ask for no drafts; their ratio is the noise floor.

All but ``total as measured`` are at usual step times: every step takes the median of all steps of its shape (requests,
rows, draft tokens that its drafter made). So decisions are compared, without what a shared machine did meanwhile.

``pace`` is a request's tokens per second after its first token, relative to the same request's without drafts; by
class, and of the slowest request. ``total`` is the sum of all paces. These are relative to ``off`` in the same round;
medians over rounds with intervals. ``p95`` and ``p99`` are those of the time between the pieces of an answer, which
hold one or several tokens, over the pieces of all rounds and relative to ``off``; intervals are bootstrapped by round.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cold_start import AGAIN, CLIENT_KEY, MAX_USERS, OFF, Engine, Shape, in_serving_environment, usual_times
from results import HERE, write

from vllm_instant.speculation.draft_budget import DraftBudgetManager
from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.prompts import free, snippets
from vllm_instant.tools.measure.statistics import median_interval
from vllm_instant_plugins.goodput.policy import GoodputPolicy

Array = npt.NDArray[np.float64]

BOUNDS = (1.0, 0.95, 0.9, 0.8, 0.5, 0.0)
CLASSES = ("free", "code", "structured")
PERCENTILES = (95, 99)
BOOTSTRAPS = 400


@dataclass
class Answer:
    """After which step of its arm the pieces of one answer came, and how many tokens it had by then."""

    kind: str
    steps: list[int]
    tokens: list[int]

    def pace(self, clock: Array) -> float:
        """Tokens per second after the first piece; ``clock``: seconds at the end of each step."""
        return (self.tokens[-1] - self.tokens[0]) / float(clock[self.steps[-1]] - clock[self.steps[0]])


@dataclass
class Served:
    """One arm of one round."""

    answers: list[Answer]
    steps: list[tuple[Shape, float]]
    """Shape and seconds of each step."""

    def clock(self, usual: Mapping[Shape, float] | None = None) -> Array:
        """Seconds at the end of each step, as measured or with the ``usual`` time of each shape."""
        return np.cumsum([usual[shape] if usual else seconds for shape, seconds in self.steps])


def traffic(users: int, number: int) -> list[tuple[str, PromptSpec]]:
    """The prompts of one round, half of them free text."""
    open_ended = [("free", prompt) for prompt in free(users - users // 2, f"pace {number}")]
    code = [("code", prompt) for prompt in snippets("code", 0.0, users // 4, f"pace {number}")]
    rest = users - len(open_ended) - len(code)
    structured = [("structured", prompt) for prompt in snippets("structured", 0.0, rest, f"pace {number}")]
    return [*open_ended, *code, *structured]


def serve(engine: Engine, prompts: Sequence[tuple[str, PromptSpec]], drafts: str, tokens: int) -> Served:
    """All prompts at once."""
    from vllm import SamplingParams

    loop = engine.llm.llm_engine
    answers = {}
    engine.steps = []
    for number, (kind, prompt) in enumerate(prompts):
        parameters = SamplingParams(
            temperature=prompt.temperature, max_tokens=tokens, ignore_eos=True, extra_args={CLIENT_KEY: drafts}
        )
        loop.add_request(str(number), prompt.text, parameters)
        answers[str(number)] = Answer(kind, [], [])
    while loop.has_unfinished_requests():
        for output in loop.step():
            answer, count = answers[output.request_id], len(output.outputs[0].token_ids)
            if not answer.tokens or count > answer.tokens[-1]:
                answer.steps.append(len(engine.steps) - 1)
                answer.tokens.append(count)
    return Served(list(answers.values()), engine.steps)


def figures(ours: Served, alone: Served, usual: Mapping[Shape, float]) -> dict[str, float]:
    """One arm of one round relative to no drafts."""
    clocks = ours.clock(usual), alone.clock(usual)
    paces = [[answer.pace(clock) for answer in arm.answers] for arm, clock in zip((ours, alone), clocks, strict=True)]
    ratios = [(answer.kind, one / other) for answer, one, other in zip(ours.answers, *paces, strict=True)]
    found = {f"pace, {kind}": float(np.mean([ratio for of, ratio in ratios if of == kind])) for kind in CLASSES}
    found["pace, slowest request"] = min(ratio for _, ratio in ratios)
    found["total"] = sum(paces[0]) / sum(paces[1])
    measured = [sum(answer.pace(arm.clock()) for answer in arm.answers) for arm in (ours, alone)]
    found["total as measured"] = measured[0] / measured[1]
    return found


def percentiles(rounds: Sequence[Mapping[str, Served]], arm: str, usual: Mapping[Shape, float]) -> dict[str, Any]:
    """``PERCENTILES`` of the time between pieces relative to no drafts, over all rounds, with intervals of 95 %."""
    random_rounds = np.random.default_rng(0).integers(0, len(rounds), (BOOTSTRAPS, len(rounds)))
    between = {}
    for name in (arm, OFF):
        clocks = [served[name].clock(usual) for served in rounds]
        between[name] = [
            np.concatenate([np.diff(clock[answer.steps]) for answer in served[name].answers])
            for served, clock in zip(rounds, clocks, strict=True)
        ]
    found = {}
    for percent in PERCENTILES:

        def ratio(numbers: Iterable[int], percent: int = percent) -> float:
            ours, theirs = (np.concatenate([between[name][number] for number in numbers]) for name in (arm, OFF))
            return float(np.percentile(ours, percent) / np.percentile(theirs, percent))

        low, high = np.percentile([ratio(numbers) for numbers in random_rounds], (2.5, 97.5))
        all_rounds = ratio(range(len(rounds)))
        found[f"p{percent} between pieces"] = {"median": all_rounds, "low": float(low), "high": float(high)}
    return found


def main() -> None:
    """Measure, print, write ``benchmarks/results/pace_bound.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--users", type=int, default=8, help="at least 4")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--output", type=Path, default=HERE / "results/pace_bound.json")
    options = parser.parse_args()
    in_serving_environment()
    rounds: list[dict[str, Served]] = []
    with tempfile.TemporaryDirectory(prefix="pace-bound-") as name:
        engine = Engine("trained", Path(name))
        budgets: dict[str, DraftBudgetManager | None] = {OFF: None, AGAIN: None}
        for bound in BOUNDS:
            engine.start(GoodputPolicy(engine.scheduler.num_spec_tokens, MAX_USERS, None, None, slowest_request=bound))
            budgets[f"{bound:g}" if bound else "none"] = engine.scheduler.instant_budget
        for number in range(options.rounds + 1):
            prompts = traffic(options.users, number)
            order = list(budgets)
            random.Random(number).shuffle(order)
            served = {}
            for arm in order:
                engine.scheduler.instant_budget = budgets[arm] or budgets["none"]
                served[arm] = serve(engine, prompts, "auto" if budgets[arm] else "off", options.tokens)
            if number:
                rounds.append(served)
    usual = usual_times(one.steps for served in rounds for one in served.values())
    cells = []
    for arm in budgets:
        if arm != OFF:
            found = [figures(served[arm], served[OFF], usual) for served in rounds]
            values = {key: vars(median_interval([one[key] for one in found])) for key in found[0]}
            values |= percentiles(rounds, arm, usual)
            cells.append({"users": options.users, "bound": arm, "rounds": len(found), **values})
            print(arm, ", ".join(f"{key} {value['median']:.3f}" for key, value in values.items()), flush=True)
    write(options.output, cells, "", ("users", "bound"))


if __name__ == "__main__":
    main()
