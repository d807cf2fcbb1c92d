"""What ``hybrid`` brings beside its sources in one and the same process, and how much anybody could bring there.

.venv/bin/python benchmarks/drafter_limit.py

Two processes of one kind differ by some percent, which hides what sources differ by. Here one server takes turns: with
lookups alone, with the draft model alone, with ``hybrid`` (``switchable_sources.py``), each with a ``goodput`` policy
and a history of its own, and without drafts. In a round all of them answer the same prompts, which never come again,
one user at a time; the first round is for learning and does not count.

Two limits for greedy text, as ratios to the better single source. Both keep what ``hybrid`` took for reading prompts
and between answers. ``limit_foreseeing``: decoding by somebody who knows beforehand what will be accepted, where steps,
drafts and passes of the draft model cost what they do in this server (``drafter_bounds.py``). ``limit_free_drafts``:
``hybrid``'s own steps, as many as it needed, if drafting and verification took no time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from drafter_bounds import StepPrices, decoding, min_seconds, texts_of
from results import HERE, write
from rich.console import Console
from switchable_sources import HYBRID, MODEL, MODEL_LENGTH, OFF, RECORD_VARIABLE, RECORDED, SUFFIX, TURN_KEY

from vllm_instant.tools.demo import assets
from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.interleaved_rounds import run_arm_round
from vllm_instant.tools.measure.prompts import free, records, snippets, sums
from vllm_instant.tools.measure.sampling import ServerClient
from vllm_instant.tools.measure.server_info import newest_decisions
from vllm_instant.tools.measure.servers import Server, running
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

NAME = "demo"
SOURCES = (SUFFIX, MODEL)
ARMS = (*SOURCES, HYBRID, OFF, RECORDED)
GREEDY = ("code", "structured", "repetitive", "math-like")
PINS: dict[str, Any] = {OFF: "off", RECORDED: MODEL_LENGTH}
TOKENS = 112


def prompts_of(count: int) -> dict[str, list[PromptSpec]]:
    """The classes of prompts, none of them twice."""
    made = {
        "code": snippets("code", 0.0, 4 * count, 11),
        "structured": snippets("structured", 0.0, 4 * count, 13),
        "repetitive": records(count, 14),
        "math-like": sums(count, 15),
        "free": free(4 * count, 12),
    }
    return {name: list({prompt.text: prompt for prompt in prompts}.values())[:count] for name, prompts in made.items()}


def server_in(folder: Path) -> Server:
    """The one server."""
    pair = assets.prepare()
    metadata = folder / "switchable_sources-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: switchable-sources\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[vllm_instant]\nsources = switchable_sources\n")
    deployment = folder / "sources.toml"
    deployment.write_text(
        '[speculation]\nplugin = "switchable_policies"\n\n[drafter]\nplugin = "switchable_sources"\n'
        f"model = {json.dumps(str(pair.draft))}\n"
        'num_speculative_tokens = 16\ndraft_sample_method = "probabilistic"\n'
    )
    return Server(
        pair.target,
        [
            *("--served-model-name", NAME, "--max-model-len", "1024", "--max-num-seqs", "16"),
            *("--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching"),
            *("--plugins", "vllm_instant", "--instant-config", str(deployment)),
        ],
        log=folder / "server.log",
        environment={
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(folder), os.environ.get("PYTHONPATH", "")]),
            RECORD_VARIABLE: str(_record(folder)),
        },
    )


def _record(folder: Path) -> Path:
    return folder / "recorded.jsonl"


@dataclass(frozen=True)
class ArmTurn:
    """One arm's turn."""

    seconds: float
    tokens: int
    steps: list[dict[str, Any]]

    @property
    def decoding_seconds(self) -> float:
        """Of the steps that read no prompt."""
        return sum(step["milliseconds"] for step in decoding(self.steps)) / 1e3

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


Round = Mapping[str, ArmTurn]


def one_turn(server: Server, arm: str, prompts: Sequence[PromptSpec], number: int, seed: int) -> ArmTurn:
    """All prompts, one after the other."""
    arguments: dict[str, Any] = {TURN_KEY: number}
    if arm in PINS:
        arguments["instant_speculation"] = PINS[arm]
    extra = {"cache_salt": arm, "vllm_xargs": arguments}
    asked = [replace(prompt, extra=extra) for prompt in prompts]
    turn = run_arm_round(ServerClient(server.url, NAME), asked, concurrency=1, tokens=TOKENS, seed=seed)
    # The policy sees a step, and the drafter that a request has ended, when the next step runs.
    body = {"model": NAME, "prompt": "x", "max_tokens": 3, "ignore_eos": True}
    body |= {"cache_salt": OFF, "vllm_xargs": {"instant_speculation": "off"}}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    steps = [step for step in newest_decisions(server.url, 2048) if step["turn"] == number]
    return ArmTurn(turn.seconds, turn.tokens, steps)


def rounds_of(server: Server, kind: str, prompts: Sequence[PromptSpec], rounds: int) -> list[Round]:
    """The rounds that count."""
    each = len(prompts) // (rounds + 1)
    order = random.Random(kind)
    found: list[Round] = []
    for number in range(rounds + 1):
        asked = prompts[number * each : (number + 1) * each]
        turns = {}
        for place, arm in enumerate(order.sample(ARMS, len(ARMS))):
            some = asked[:1] if arm == OFF else asked
            if arm != RECORDED or kind in GREEDY:
                turns[arm] = one_turn(server, arm, some, hash((kind, number, place)) % 10**9, 1000 * number)
        found.append(turns)
    return found[1:]


def without_drafts(rounds: Sequence[Round]) -> float:
    """Seconds of a decoding step without drafts."""
    return float(np.median([step["milliseconds"] for turns in rounds for step in decoding(turns[OFF].steps)])) / 1e3


def fitted(measured: Mapping[str, Sequence[Round]]) -> StepPrices:
    """What drafts cost, from the steps of all classes and arms."""
    steps = []
    for rounds in measured.values():
        off = 1e3 * without_drafts(rounds)
        for turns in rounds:
            for arm in (*SOURCES, HYBRID, OFF):
                steps += [
                    (step["milliseconds"] / off, step["drafted"], step["draft_steps"])
                    for step in decoding(turns[arm].steps)
                ]
    return StepPrices.fitted(steps)


def of_arm(rounds: Sequence[Round], arm: str) -> dict[str, Any]:
    """What one arm did, over all rounds."""
    steps = [step for turns in rounds for step in decoding(turns[arm].steps)]
    seconds = sum(turns[arm].seconds for turns in rounds)
    return {
        "tokens_per_second": vars(median_interval([turns[arm].speed for turns in rounds])),
        "tokens_a_step": float(np.mean([step["tokens"] for step in steps])),
        "drafted_a_step": float(np.mean([step["drafted"] for step in steps])),
        "draft_passes_a_step": float(np.mean([step["draft_steps"] for step in steps])),
        "step_ms": float(np.mean([step["milliseconds"] for step in steps])),
        "share_not_decoding": 1 - sum(turns[arm].decoding_seconds for turns in rounds) / seconds,
    }


def summary(kind: str, rounds: Sequence[Round], prices: StepPrices, recorded: Path) -> dict[str, Any]:
    """One class of prompts."""
    seconds = {arm: [turns[arm].seconds for turns in rounds] for arm in (*SOURCES, HYBRID)}
    better = min(SOURCES, key=lambda arm: sum(seconds[arm]))
    off = without_drafts(rounds)
    found: dict[str, Any] = {
        "class": kind,
        "users": 1,
        "rounds": len(rounds),
        "step_ms_without_drafts": 1e3 * off,
        "arms": {arm: of_arm(rounds, arm) for arm in (*SOURCES, HYBRID, OFF)},
        "better_single_source": better,
        "hybrid_to_better": vars(ratio_interval(seconds[better], seconds[HYBRID])),
        "hybrid_to": {arm: vars(ratio_interval(seconds[arm], seconds[HYBRID])) for arm in SOURCES},
    }
    if kind in GREEDY:
        a_token = min_seconds(texts_of(recorded), prices, off)
        rest = [turns[HYBRID].seconds - turns[HYBRID].decoding_seconds for turns in rounds]
        least = [r + turns[HYBRID].tokens * a_token for r, turns in zip(rest, rounds, strict=True)]
        free_drafts = [r + len(decoding(turns[HYBRID].steps)) * off for r, turns in zip(rest, rounds, strict=True)]
        # A single limit for all rounds: what the texts allow is known over all of them only.
        found["limit_foreseeing"] = sum(seconds[better]) / sum(least)
        found["limit_free_drafts"] = vars(ratio_interval(seconds[better], free_drafts))
    return found


def main() -> None:
    """Measure, print, write ``benchmarks/results/drafter_limit.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default=",".join([*GREEDY, "free"]))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=3, help="in each round")
    parser.add_argument("--output", type=Path, default=HERE / "results/drafter_limit.json")
    options = parser.parse_args()
    console = Console()
    chosen = options.classes.split(",")
    measured: dict[str, Sequence[Round]] = {}
    with tempfile.TemporaryDirectory(prefix="sources-") as name:
        folder = Path(name)
        server = server_in(folder)
        with running(server):
            for kind, prompts in prompts_of(options.prompts * (options.rounds + 1)).items():
                if kind in chosen:
                    measured[kind] = rounds_of(server, kind, prompts, options.rounds)
                    if _record(folder).exists():
                        _record(folder).rename(folder / f"{kind}.jsonl")
        prices = fitted(measured)
        found = [summary(kind, rounds, prices, folder / f"{kind}.jsonl") for kind, rounds in measured.items()]
    write(options.output, {"costs_relative_to_a_step": prices.plain(), "classes": found})
    for cell in found:
        ratio, limit = cell["hybrid_to_better"], cell.get("limit_foreseeing")
        at_most = f"; at most {limit:.2f} if all acceptance were foreseen" if limit else ""
        console.print(
            f"{cell['class']}: hybrid is {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] times "
            f"{cell['better_single_source']}{at_most}",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
