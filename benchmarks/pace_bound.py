"""What a bound on every request's pace costs in total speed: ``slowest_request`` at several values, mixed traffic.

    .venv/bin/python benchmarks/pace_bound.py [--rounds 6] [--users 8]        # 5 minutes

Half of the users write free text at temperature 1, where drafts bring little; the others continue code and structured
text, where they bring much. The demo's target and draft model; one engine, in this process, so that the decisions are
the only difference: each bound has its own ``goodput`` policy, which keeps what it learned from round to round. In a
round every arm serves the same new prompts, in random order; the first round is not counted. ``off`` and ``off again``
have clients that ask for no drafts; their ratio is the noise floor.

``pace`` is a request's tokens per second after its first token, relative to the same request's without drafts; by
class, and of the slowest request. ``p95`` and ``p99`` are those of the time between the pieces of an answer, which hold
one or several tokens. All are relative to ``off`` in the same round; medians over rounds with intervals.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cold_start import AGAIN, CLIENT_KEY, MAX_USERS, OFF, Engine, in_serving_environment
from results import HERE, write

from vllm_instant.speculation.draft_budget import DraftBudgetManager
from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.prompts import free, snippets
from vllm_instant.tools.measure.statistics import median_interval
from vllm_instant_plugins.goodput.policy import GoodputPolicy

BOUNDS = (1.0, 0.95, 0.9, 0.8, 0.5, 0.0)
CLASSES = ("free", "code", "structured")
PERCENTILES = (95, 99)


@dataclass
class Answer:
    """When the pieces of one answer came, in seconds, and how many tokens it had by then."""

    kind: str
    times: list[float]
    tokens: list[int]

    @property
    def pace(self) -> float:
        """Tokens per second after the first piece."""
        return (self.tokens[-1] - self.tokens[0]) / (self.times[-1] - self.times[0])


def traffic(users: int, number: int) -> list[tuple[str, PromptSpec]]:
    """The prompts of one round, half of them free text."""
    open_ended = [("free", prompt) for prompt in free(users - users // 2, f"pace {number}")]
    code = [("code", prompt) for prompt in snippets("code", 0.0, users // 4, f"pace {number}")]
    rest = users - len(open_ended) - len(code)
    structured = [("structured", prompt) for prompt in snippets("structured", 0.0, rest, f"pace {number}")]
    return [*open_ended, *code, *structured]


def serve(engine: Engine, prompts: Sequence[tuple[str, PromptSpec]], drafts: str, tokens: int) -> list[Answer]:
    """All prompts at once."""
    from vllm import SamplingParams

    loop = engine.llm.llm_engine
    answers = {}
    for number, (kind, prompt) in enumerate(prompts):
        parameters = SamplingParams(
            temperature=prompt.temperature, max_tokens=tokens, ignore_eos=True, extra_args={CLIENT_KEY: drafts}
        )
        loop.add_request(str(number), prompt.text, parameters)
        answers[str(number)] = Answer(kind, [], [])
    while loop.has_unfinished_requests():
        outputs = loop.step()
        now = time.perf_counter()
        for output in outputs:
            answer, count = answers[output.request_id], len(output.outputs[0].token_ids)
            if not answer.tokens or count > answer.tokens[-1]:
                answer.times.append(now)
                answer.tokens.append(count)
    return list(answers.values())


def figures(answers: Sequence[Answer], alone: Sequence[Answer]) -> dict[str, float]:
    """One arm of one round relative to no drafts."""
    paces = [(ours.kind, ours.pace / theirs.pace) for ours, theirs in zip(answers, alone, strict=True)]
    found = {f"pace, {kind}": float(np.mean([pace for of, pace in paces if of == kind])) for kind in CLASSES}
    found["pace, slowest request"] = min(pace for _, pace in paces)
    ends = [
        max(answer.times[-1] for answer in arm) - min(answer.times[0] for answer in arm) for arm in (alone, answers)
    ]
    found["total until the last token"] = ends[0] / ends[1]
    found["total"] = sum(answer.pace for answer in answers) / sum(answer.pace for answer in alone)
    between = [np.concatenate([np.diff(answer.times) for answer in arm]) for arm in (answers, alone)]
    for percent in PERCENTILES:
        ours, theirs = (float(np.percentile(times, percent)) for times in between)
        found[f"p{percent} between pieces"] = ours / theirs
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
    found: dict[str, list[dict[str, float]]] = {}
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
            answers = {}
            for arm in order:
                engine.scheduler.instant_budget = budgets[arm] or budgets["none"]
                answers[arm] = serve(engine, prompts, "auto" if budgets[arm] else "off", options.tokens)
            if number:
                for arm in budgets:
                    found.setdefault(arm, []).append(figures(answers[arm], answers[OFF]))
    cells = []
    for arm, rounds in found.items():
        if arm != OFF:
            values = {key: vars(median_interval([one[key] for one in rounds])) for key in rounds[0]}
            cells.append({"users": options.users, "bound": arm, "rounds": len(rounds), **values})
            print(arm, ", ".join(f"{key} {value['median']:.3f}" for key, value in values.items()), flush=True)
    write(options.output, cells, "", ("users", "bound"))


if __name__ == "__main__":
    main()
