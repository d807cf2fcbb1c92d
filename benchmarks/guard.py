"""What the guard lets through, what it stops by mistake, and what it costs.

.venv/bin/python benchmarks/guard.py

Parts, each a cell of the result file:

* ``planted``: violations at random places of given answers, through vLLM's output processor on every path to a client:
  ``rules`` with ``late = "wait"``, and the same rules 30 ms later with ``late = "release"`` and a window of 4 tokens.
* ``clean``: passages of the demo corpus that ``rules`` stops, which must be none.
* ``patterns``: 5,000 words and 200 expressions over a line of 10 MB, and token by token.
* ``delay``: 16 streams of a token per 50 ms through vLLM's output processor, without a guard, with ``rules`` and with
  the demo's ``classifier``, in turns.
* ``planner``: time from the last key of a wish to the first field of the event planner's plan, typed and whole.
* ``classifier``: clean and unsafe texts that training did not see.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import itertools
import logging
import random
import re
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from results import write
from scripted_guard import service

from vllm_instant.interfaces.guard import GuardOptions, GuardRequest
from vllm_instant.patches.guard_replay import ForcedAnswer, ForcedEngine, Received
from vllm_instant.tools.demo import assets, guard_classifier
from vllm_instant.tools.measure.guard_check import FalseStops, GuardCheck, passages
from vllm_instant.tools.measure.prompts import held_out_texts
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval
from vllm_instant_plugins.guard.plugin import ClassifierOptions, RulesOptions, build_classifier, build_rules

HERE = Path(__file__).resolve().parent
TOKENIZER = assets.ASSETS / assets.BASE_IN_ASSETS
WORDS = ("project bluebird", "wire transfer code", "Zürich accord", "nightshade", "blackmail", "kill switch seven")
PATTERNS = (r"\b\d{4}[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}\b", r"sk-[a-z0-9]{20,40}")
SECONDS_LATER = 0.03
STREAMS = 16
WISH_CHARACTERS, KEYS_PER_SECOND = 900, 300
STEP_SECONDS, TOKENS = 0.05, 60


class LaterGuard:
    """Rules whose verdicts come ``SECONDS_LATER``, as those of a slow guard do."""

    def __init__(self) -> None:
        self._rules = build_rules(RulesOptions(words=WORDS))

    def begin(self, request: GuardRequest) -> Any:
        judge = self._rules.begin(request)
        loop = asyncio.get_running_loop()

        class Later:
            found, shown = None, None

            def judge(self, text: str, token_ids: Any, is_finished: bool) -> Any:
                self.found = judge.judge(text, token_ids, is_finished)
                self.shown = self.shown or type(self.found)(0)
                if text or is_finished:
                    loop.call_later(SECONDS_LATER, self.show, self.found)
                return self.shown

            def show(self, verdict: Any) -> None:
                self.shown = verdict
                request.wake()

        return Later()

    def metrics(self) -> dict[str, float]:
        return {}


logging.getLogger("vllm.instant.guard").setLevel(logging.ERROR)  # thousands of audit lines


def planted_part(count: int, seed: int) -> dict[str, Any]:
    """Planted violations, of which a tenth with late verdicts."""
    options = RulesOptions(words=WORDS, patterns=PATTERNS)
    waiting = service(build_rules(options), options)
    late = GuardOptions(late="release", hold_tokens=4, hold_ms=10, side="answer")
    found = {}
    for name, judging, number in (("wait", waiting, count), ("release", service(LaterGuard(), late), count // 10)):
        check = GuardCheck(judging, TOKENIZER, WORDS, seed=seed)
        report = asyncio.run(check.leaks(number))
        found[name] = {**asdict(report), "by_path": dict(report.by_path), "window": check.window}
        print(name, found[name])
    return {"part": "planted", "seed": seed, **found}


def _is_clean(text: str) -> bool:
    """Whether Python's own search finds none of the rules: the standard library has numbers of 16 digits."""
    return not any(word in text.casefold() for word in map(str.casefold, WORDS)) and not any(
        re.search(pattern, text, re.IGNORECASE) for pattern in PATTERNS
    )


def clean_part(count: int, seed: int) -> dict[str, Any]:
    """Clean passages."""
    options = RulesOptions(words=WORDS, patterns=PATTERNS)
    check = GuardCheck(service(build_rules(options), options), TOKENIZER, WORDS, _is_clean, seed)
    found = asyncio.run(check.false_stops(count))
    return {"part": "clean", "seed": seed, "count": found.count, "stopped": found.stopped}


def patterns_part() -> dict[str, Any]:
    """Time per call of ``rules``: one long line in slices, and streams token by token."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randrange(6, 14))) for _ in range(5000)]
    options = RulesOptions(words=tuple(words), patterns=tuple(f"key{n}-[0-9]{{8,16}}z" for n in range(200)))
    guard = build_rules(options)
    found: dict[str, Any] = {"part": "patterns", "words": 5000, "patterns": 200}
    lines = {"ASCII": "".join(draw.choices(letters + " ", k=8192)), "other scripts": "é\u200bДx" * 2048}
    for name, line in lines.items():
        judge = guard.begin(GuardRequest(request_id="r", side="prompt"))
        seconds = [_timed(judge, line) for _ in range(10_000_000 // 8192)]
        found[f"slice of 8,192 characters, {name}, ms"] = _quantiles([1000 * value for value in seconds])
    judge = guard.begin(GuardRequest(request_id="r", side="answer"))
    tokens = [token for text in passages(500) for token in _pieces(text)]
    found["token, µs"] = _quantiles([1e6 * _timed(judge, token) for token in tokens])
    return found


def _timed(judge: Any, text: str) -> float:
    began = time.perf_counter()
    judge.judge(text, (), False)
    return time.perf_counter() - began


def _pieces(text: str) -> list[str]:
    return [text[start : start + 4] for start in range(0, len(text), 4)]


def _quantiles(values: list[float]) -> dict[str, float]:
    return {name: float(np.quantile(values, q)) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


async def _streams(engine: ForcedEngine, texts: list[str]) -> list[Received]:
    """Sixteen streams with a token per ``STEP_SECONDS``, which begin one after the other."""

    async def one(number: int, text: str) -> Received:
        await asyncio.sleep(STEP_SECONDS * number / STREAMS)
        token_ids = engine.tokenizer.encode(text, add_special_tokens=False)[:TOKENS]
        return await engine.replay(ForcedAnswer(token_ids=token_ids, step_seconds=STEP_SECONDS))

    return await asyncio.gather(*(one(number, text) for number, text in enumerate(texts)))


def delay_part(rounds: int) -> dict[str, Any]:
    """Arms in turns, in an order that changes; the engine's steps are given, all behind them is vLLM's."""
    rules = RulesOptions(words=WORDS, patterns=PATTERNS)
    lenient = RulesOptions(words=WORDS, patterns=PATTERNS, min_beginning=4)
    scored = ClassifierOptions(
        model=str(guard_classifier.prepare()), max_tokens=96, threshold=0.9, restart_seconds=60, side="answer"
    )
    classifier: Any = build_classifier(scored)
    engines = {
        "off": ForcedEngine(TOKENIZER, None),
        "rules": ForcedEngine(TOKENIZER, service(build_rules(rules), rules)),
        "rules, min_beginning = 4": ForcedEngine(TOKENIZER, service(build_rules(lenient), lenient)),
        "classifier": ForcedEngine(TOKENIZER, service(classifier, scored)),
    }
    found: dict[str, list[list[Received]]] = {name: [] for name in engines}
    texts = iter(passages(STREAMS * (rounds + 1), 6 * TOKENS))
    for number in range(rounds + 1):
        chosen = list(itertools.islice(texts, STREAMS))
        for name in random.Random(number).sample(list(engines), len(engines)):
            received = asyncio.run(_streams(engines[name], chosen))
            if number:  # the first round warms up
                found[name].append(received)
    classifier.process.close()
    shown = _delays(found)
    return {"part": "delay", "streams": STREAMS, "step_ms": 1000 * STEP_SECONDS, "rounds": rounds, "arms": shown}


def _delays(arms: dict[str, list[list[Received]]]) -> dict[str, Any]:
    shown = {}
    base = _by_round(arms["off"])
    for name, results in arms.items():
        cell = {}
        for key, values in _by_round(results).items():
            cell[key] = vars(median_interval(values))
            if name != "off":
                cell[f"{key} to off"] = vars(ratio_interval(values, base[key]))
                cell[f"{key} added"] = float(np.median(np.array(values) - np.array(base[key])))
        shown[name] = cell
        print(name, cell)
    return shown


def _by_round(rounds: list[list[Received]]) -> dict[str, list[float]]:
    complete = [[each for each in received if each.finish_reason == "length"] for received in rounds]
    gaps = [[1000 * gap for each in received for gap in np.diff(each.times[1:])] for received in complete]
    first = [[1000 * (each.times[1] - each.times[0]) for each in received] for received in complete]
    return {
        "p50 gap, ms": [float(np.quantile(values, 0.5)) for values in gaps],
        "p99 gap, ms": [float(np.quantile(values, 0.99)) for values in gaps],
        "median time to first text, ms": [float(np.median(values)) for values in first],
        "99th percentile of it, ms": [float(np.quantile(values, 0.99)) for values in first],
    }


async def _wishes(app: Any, url: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds from the last key of a wish to the first field of its plan, typed and whole in turns."""
    found: dict[str, list[float]] = {"typed": [], "whole": []}
    texts = iter(held_out_texts(48))
    for number in range(rounds):
        for kind in random.Random(number).sample(list(found), len(found)):
            text = next(texts)[:WISH_CHARACTERS]
            wish = (app.Typed if kind == "typed" else app.Whole)(url, "demo")
            events: list[dict[str, Any]] = []

            async def send(event: dict[str, Any], events: list[dict[str, Any]] = events) -> None:
                events.append(event)

            await wish.open()
            for end in range(10, WISH_CHARACTERS, 10):
                await wish.update(text[:end])
                await asyncio.sleep(10 / KEYS_PER_SECOND)
            await app.plan(wish, text, send)
            await wish.close()
            if events[-1]["first_field_ms"] is not None:
                found[kind].append(events[-1]["first_field_ms"])
    return found


def planner_part(rounds: int) -> dict[str, Any]:
    """The event planner with its own deployment file."""
    folder = HERE.parent / "examples/event_planner"
    sys.path.insert(0, str(folder))
    app = importlib.import_module("app")
    app.request_for = functools.partial(_short, app.request_for)
    with app.demo_server() as url:
        found = asyncio.run(_wishes(app, url, rounds))
    return {
        "part": "planner",
        "characters": WISH_CHARACTERS,
        "first field, ms": {kind: vars(median_interval(values)) for kind, values in found.items()},
        "ratio": vars(ratio_interval(found["typed"], found["whole"])),
    }


def _short(request_for: Any, model: str) -> dict[str, Any]:
    """A request whose plan ends soon behind its first field."""
    return {**request_for(model), "max_tokens": 48}


def classifier_part(count: int) -> dict[str, Any]:
    """Rates of the demo's classifier, on texts from documents that training did not see."""
    options = ClassifierOptions(model=str(guard_classifier.prepare()), max_tokens=96, threshold=0.9, restart_seconds=60)
    guard: Any = build_classifier(options)
    texts, labels = guard_classifier.examples(count, seed=99, held_out=True)
    scores, done = [0.0] * count, threading.Semaphore(0)

    def keep(number: int) -> Any:
        def on_score(score: float, seconds: float) -> None:
            scores[number] = score
            done.release()

        return on_score

    for number, text in enumerate(texts):
        guard.process.submit(text[-options.context_characters :], keep(number))
    for _ in texts:
        done.acquire()
    guard.process.close()
    cell: dict[str, Any] = {"part": "classifier", "threshold": options.threshold}
    for name, label in (("clean", 0), ("unsafe", 1)):
        kept = [score for score, of in zip(scores, labels, strict=True) if of == label]
        found = FalseStops(len(kept), sum(score >= options.threshold for score in kept))
        cell[name] = {"count": found.count, "stopped": found.stopped, "interval": found.interval()}
    return cell


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="planted,clean,patterns,delay,planner,classifier")
    parser.add_argument("--planted", type=int, default=10_000)
    parser.add_argument("--clean", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of planted and clean: runs of several seeds add up")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, default=HERE / "results/guard.json")
    given = parser.parse_args()
    parts = {
        "planted": lambda: planted_part(given.planted, given.seed),
        "clean": lambda: clean_part(given.clean, given.seed),
        "patterns": patterns_part,
        "delay": lambda: delay_part(given.rounds),
        "planner": lambda: planner_part(given.rounds),
        "classifier": lambda: classifier_part(given.clean // 10),
    }
    for name in given.parts.split(","):
        cell = parts[name]()
        print(cell)
        write(given.output, [cell], keys=("part", "seed"))


if __name__ == "__main__":
    main()
