"""Whether ours is ever later than the best of no speculation and fixed draft lengths, on a real chat model.

    .venv/bin/python benchmarks/promise.py --part warm        # 12 minutes; repeated, it adds rounds to earlier ones
    .venv/bin/python benchmarks/promise.py --part cold        # 8 minutes
    .venv/bin/python benchmarks/promise.py --part first --loads 1,8 --rounds 40        # 6 minutes
    .venv/bin/python benchmarks/promise.py --part pinned --prompts story,mixed --loads 4 --rounds 12      # 10 minutes

Arms: a vLLM server without this package; one with a fixed number of ``suffix`` drafts, at several lengths; and ours,
the default deployment (``goodput``, ``suffix``). With ``--fixed 'suffix,draft model'`` also fixed numbers of drafts of
``vllm-instant demo draft``, and ours with that draft model beside the lookups (``hybrid``); these are a part of their
own in the results. In a round every arm gets
the same new prompts, one burst per arm in random order: as many requests as users (two or three in turn for a single
user), which end where the model ends them, at most ``--tokens`` tokens.

``warm`` uses servers that have served a burst before, ours with the costs that it learned then (``--costs``). ``cold``
starts a new server for each burst of ours and of vLLM without speculation, ours with an empty folder of learned costs;
the fixed lengths learn nothing and stay. ``first`` asks for one token, of ours and of two vLLM servers without
speculation, and compares the time to it. ``pinned`` has three arms and so more rounds: vLLM, ours, and the same server
of ours with every request pinned to no drafts, which tells what the decisions cost from what the package does.

Speed is output tokens per second of the burst, until its last token. Ratios are medians over rounds, each of the two
arms of one round. What ours is compared with as the best is the fastest of no speculation and of fixed numbers of
drafts that ours has as well, as the *other* rounds see it (of new servers the warm ones): the fastest of equal arms in
one round is so by luck.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import MIXED, SMOLLM2, BenchModel, add_model_option, chosen
from results import HERE, write
from rich.console import Console

from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.interleaved_rounds import ArmRound, run_arm_round
from vllm_instant.tools.measure.sampling import ServerClient
from vllm_instant.tools.measure.servers import Server, settle, stop_all, terminable
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

OFF, AGAIN, SUFFIX, DRAFT = "off", "off again", "suffix", "draft model"
OURS, HYBRID = "ours", "ours with the draft model"
PINNED = f"{OURS}, K=0"
DRAFTS = {OURS: {SUFFIX}, HYBRID: {SUFFIX, DRAFT}}
"""What each of our arms can draft with."""
LENGTHS = {SUFFIX: (2, 8), DRAFT: (1, 3)}
SERVED = "demo"
CLASSES = ("edit", "extract", "story", "mixed")
SECONDS = {"warm": 660.0, "cold": 410.0, "first": 360.0, "pinned": 600.0}
"""Time after which no round begins."""
KEYS = ("part", "prompts", "users")
OUTPUT = HERE / "results/promise.json"


@dataclass(frozen=True)
class Cell:
    """One class of prompts at one load."""

    prompts: str
    users: int

    @property
    def requests(self) -> int:
        """Number of requests in a burst: one per user, of a single user two in turn, or one of each mixed class."""
        return max(self.users, len(MIXED) if self.prompts == "mixed" else 2)


class Arms:
    """The servers, each started when it is first needed.

    Args:
        model: what they serve.
        folder: for logs and deployment files.
        costs: for what ours learns.

    """

    def __init__(self, model: BenchModel, folder: Path, costs: Path) -> None:
        self._model, self._folder, self._costs = model, folder, costs
        self._servers: dict[str, Server] = {}

    def _server(self, name: str) -> Server:
        words = ["--served-model-name", SERVED, "--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager"]
        words.append("--no-enable-prefix-caching")
        deployment = self._deployment(name)
        if deployment:
            file = self._folder / f"{name.replace(' ', '_')}.toml"
            file.write_text(deployment)
            words += ["--plugins", "vllm_instant", "--instant-config", str(file)]
        return Server(self._model.target, words, log=self._folder / f"{name}.log", name=name)

    def _deployment(self, name: str) -> str:
        """The deployment file of an arm; none for vLLM alone."""
        if name in (OFF, AGAIN):
            return ""
        draft = f"model = {json.dumps(str(self._model.draft()))}\n" if DRAFT in DRAFTS.get(name, {name}) else ""
        if name in DRAFTS:
            costs = json.dumps(str(self._costs / name))
            plugin = 'plugin = "hybrid"\nnum_speculative_tokens = 8\n' if draft else 'plugin = "suffix"\n'
            return f"[speculation]\ncosts_folder = {costs}\n[drafter]\n{plugin}{draft}"
        fixed = '[speculation]\nplugin = "fixed"\n[drafter]\n'
        if name == SUFFIX:
            return fixed + 'plugin = "suffix"\n'
        return f'{fixed}plugin = "model"\n{draft}num_speculative_tokens = 8\ndraft_sample_method = "probabilistic"\n'

    def start(self, names: Iterable[str]) -> None:
        """Start the servers that do not run yet, at the same time."""
        new = {name: self._server(name) for name in names if name not in self._servers}
        self._servers |= new
        for server in new.values():
            server.launch()
        for server in new.values():
            server.wait()

    def restart(self, names: Sequence[str]) -> None:
        """Start servers anew; what ours had learned is deleted."""
        stop_all(*(self._servers.pop(name) for name in names if name in self._servers))
        shutil.rmtree(self._costs, ignore_errors=True)
        self.start(names)

    def stop(self) -> None:
        """Stop all."""
        stop_all(*self._servers.values())
        self._servers.clear()

    def burst(self, arm: str, prompts: Sequence[PromptSpec], users: int, tokens: int, seed: int) -> dict[str, Any]:
        """One burst on an arm, ``NAME`` or ``NAME, K=LENGTH``; its figures."""
        name, _, length = arm.partition(", K=")
        if length:
            pinned = {"vllm_xargs": {"instant_speculation": int(length)}}
            prompts = [replace(prompt, extra=pinned) for prompt in prompts]
        settle()
        client = ServerClient(self._servers[name].url, SERVED)
        return figures(run_arm_round(client, prompts, concurrency=users, tokens=tokens, seed=seed))


def figures(burst: ArmRound) -> dict[str, Any]:
    """What is kept of a burst; times in milliseconds."""
    between = 1e3 * np.concatenate([answer.inter_token_latencies() for answer in burst.answers])
    if not len(between):  # every answer arrived at once
        between = np.zeros(1)
    return {
        "tokens_per_second": round(burst.tokens / burst.seconds, 3),
        "tokens": burst.tokens,
        "ttft_ms": round(1e3 * float(np.median([answer.ttft for answer in burst.answers])), 1),
        "p50_itl_ms": round(float(np.percentile(between, 50)), 2),
        "p99_itl_ms": round(float(np.percentile(between, 99)), 2),
        "latency_ms": round(1e3 * float(np.mean([answer.arrivals[-1][0] for answer in burst.answers])), 1),
    }


Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""The bursts of a cell by arm, in the same order for every arm."""


def best_by_round(arm: str, rounds: Rounds, warm: Rounds) -> list[str]:
    """What one of our arms is compared with in each round.

    The fastest of no speculation and fixed numbers of drafts that the arm has too, in all other rounds and in ``warm``;
    in the round itself where there is no other.
    """
    count = len(rounds[arm])
    others = [other for other in rounds if other in (OFF, AGAIN) or other.partition(",")[0] in DRAFTS[arm]]
    found = []
    for now in range(count):
        judged = [number for number in range(count) if number != now] or ([] if warm else [now])
        speeds = {
            other: [rounds[other][number]["tokens_per_second"] for number in judged]
            + [burst["tokens_per_second"] for burst in warm.get(other, ())]
            for other in others
        }
        found.append(max(speeds, key=lambda other: float(np.median(speeds[other] or [0.0]))))
    return found


def summary(part: str, cell: Cell, model: str, rounds: Rounds, warm: Rounds) -> dict[str, Any]:
    """A cell of the result file; ``warm`` are the rounds of the same cell on servers that have served before."""

    def values(arm: str, key: str) -> list[float]:
        return [burst[key] for burst in rounds[arm]]

    found: dict[str, Any] = {"part": part, "model": model, "prompts": cell.prompts, "users": cell.users, "ours": {}}
    for arm in (arm for arm in DRAFTS if arm in rounds):
        by_round = best_by_round(arm, rounds, warm)
        best = {
            key: [rounds[other][number][key] for number, other in enumerate(by_round)]
            for key in ("tokens_per_second", "latency_ms")
        }
        speeds = values(arm, "tokens_per_second")
        found["ours"][arm] = {
            "best_by_round": by_round,
            "to_best": vars(ratio_interval(speeds, best["tokens_per_second"])),
            "to_off": vars(ratio_interval(speeds, values(OFF, "tokens_per_second"))),
            # The other way round: above 1, ours is sooner.
            "latency_best_to_ours": vars(ratio_interval(best["latency_ms"], values(arm, "latency_ms"))),
        }
    first = {arm: values(arm, "ttft_ms") for arm in rounds}
    found["ttft_to_off"] = {arm: vars(ratio_interval(first[arm], first[OFF])) for arm in rounds if arm != OFF}
    keys = ("tokens_per_second", "ttft_ms", "p50_itl_ms", "p99_itl_ms", "latency_ms")
    found["arms"] = {arm: {key: vars(median_interval(values(arm, key))) for key in keys} for arm in rounds}
    found["rounds"] = dict(rounds)
    return found


def earlier(path: Path, part: str) -> dict[Cell, dict[str, list[dict[str, Any]]]]:
    """The rounds that a result file holds of one part, by cell and arm."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    cells = [cell for run in runs for cell in run["measured"] if cell["part"] == part]
    return {Cell(cell["prompts"], cell["users"]): cell["rounds"] for cell in cells}


def arms_of(part: str, fixed: Sequence[str]) -> list[str]:
    """All arms of a part, those of a fixed length by drafter."""
    if part == "first":
        return [OFF, AGAIN, OURS]
    if part == "pinned":
        return [OFF, PINNED, OURS]
    ours = [OURS, HYBRID] if DRAFT in fixed else [OURS]
    return [OFF, *(f"{name}, K={length}" for name in fixed for length in LENGTHS[name]), *ours]


def main() -> None:
    """Measure until the time is over, and write ``benchmarks/results/promise.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.set_defaults(model=SMOLLM2)
    parser.add_argument("--part", choices=list(SECONDS), required=True)
    parser.add_argument("--prompts", help="classes of prompts; by default all four in the warm part, else mixed")
    parser.add_argument("--loads", default="1,4,8,16")
    parser.add_argument("--fixed", default=SUFFIX, help="drafters that have an arm with a fixed length")
    parser.add_argument("--costs", type=Path, help="folder in which ours keeps learned costs between warm runs")
    parser.add_argument("--tokens", type=int, default=40, help="largest length of an answer")
    parser.add_argument("--seconds", type=float, help="no round begins later than this")
    parser.add_argument("--rounds", type=int, default=3, help="cells that have as many rounds get no more")
    parser.add_argument("--name", default="", help="the conditions of this run, where they are not the usual ones")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    model = chosen(options)
    options.seconds = SECONDS[options.part] if options.seconds is None else options.seconds
    kinds = (options.prompts or (",".join(CLASSES) if options.part == "warm" else "mixed")).split(",")
    cells = [Cell(kind, int(users)) for users in options.loads.split(",") for kind in kinds]
    with terminable(), tempfile.TemporaryDirectory(prefix="promise-") as name:
        learned = options.costs if options.costs and options.part != "cold" else Path(name) / "costs"
        arms = Arms(model, Path(name), learned)
        try:
            measure(arms, model, cells, options, Console())
        finally:
            arms.stop()


def measure(
    arms: Arms, model: BenchModel, cells: Sequence[Cell], options: argparse.Namespace, console: Console
) -> None:
    """Rounds of all cells, those with the fewest rounds first."""
    began = time.monotonic()
    part = options.part
    fixed = [name for name in options.fixed.split(",") if name and part not in ("first", "pinned")]
    stored_as = f"{part}, {DRAFT}" if DRAFT in fixed else part
    rounds = earlier(options.output, stored_as)
    warm = earlier(options.output, stored_as.replace(part, "warm")) if part == "cold" else {}
    names = arms_of(part, fixed)
    tokens = 1 if part == "first" else options.tokens

    def made(cell: Cell) -> int:
        return min((len(bursts) for bursts in rounds.get(cell, {}).values()), default=0)

    if part != "cold":
        arms.start(dict.fromkeys(arm.partition(",")[0] for arm in names))
        for arm in names:
            arms.burst(arm, model.of_classes(["mixed"], 4, 99)["mixed"], 4, 32, 0)
    while open_cells := [cell for cell in cells if made(cell) < options.rounds]:
        cell = min(open_cells, key=made)
        if time.monotonic() - began > options.seconds:
            break
        number = made(cell)
        seed = zlib.crc32(f"{part}/{cell.prompts}/{cell.users}/{number}".encode())
        prompts = model.of_classes([cell.prompts], cell.requests, seed)[cell.prompts]
        if part == "cold":
            arms.restart([OFF, *(arm for arm in DRAFTS if arm in names)])
            arms.start(fixed)
        order = random.Random(seed).sample(names, len(names))
        found = {arm: arms.burst(arm, prompts, cell.users, tokens, seed) for arm in order}
        kept = rounds.setdefault(cell, {})
        for arm, burst in found.items():
            kept[arm] = [*kept.get(arm, [])[:number], burst]
        unit = "ttft_ms" if part == "first" else "tokens_per_second"
        line = ", ".join(f"{arm} {burst[unit]:.1f}" for arm, burst in sorted(found.items()))
        console.print(
            f"[{time.monotonic() - began:.0f} s] {part}, {cell.prompts}, {cell.users} users: {line}", soft_wrap=True
        )
        measured = [summary(stored_as, of, model.name, by_arm, warm.get(of, {})) for of, by_arm in rounds.items()]
        write(options.output, measured, options.name, KEYS)


if __name__ == "__main__":
    main()
