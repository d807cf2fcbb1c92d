"""Whether ours is ever slower than the better of no speculation and the best fixed draft length.

.venv/bin/python benchmarks/regret.py [--short] [--model smollm2] [--prompts edit]

One stock vLLM server without speculation, stock servers with K = 1, 2, 4, 8 draft tokens, and one of ours (policy
``goodput``, at most 8) run side by side and take turns, in short rounds, each round in another order. The drafter is
hopeless (random tokens), perfect (recorded answers) or the demo's trained draft model; the load is 1 to 32 users in a
closed loop. A second server without speculation is the A/A arm: its difference to the first is the noise floor.

``mixed`` traffic is half structured at temperature 0, half open-ended at temperature 1 (of the public model: edits,
extractions and stories), with the model's own draft model.
In ``mixed hybrid`` ours draws on lookups beside the same draft model, and vLLM's own lookup is an arm as well.

Two processes of one kind differ in speed by some percent for as long as they live, which no number of rounds averages
out. Therefore our server also takes turns in which its clients pin the draft length (``vllm_xargs
instant_speculation``): "ours, off" and "ours, K=n" are the same process as "ours" and differ from it by the decisions
alone. Their turns still scatter; closest is what ours says of its own steps ("step by step"): what their tokens would
have taken in steps like those of the same seconds that did not draft (``vllm_instant.tools.measure.speedup_estimate``).

Regret = 1 − ours / best arm, in output tokens per second; the best arm is the one with the highest median, among stock
servers and, in a column of its own, among the pinned arms. Fixed lengths that are more than 30 % behind after one round
or 15 % after two get no further turns. Intervals are 95 %, bootstrapped over rounds.

``--short`` runs fewer arms, loads and rounds and exits with 1 when some regret is larger than 3 %
beyond what the noise floor explains.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import EMBEDDED, add_model_option, chosen
from regret_plot import plot
from regret_setup import (
    AGAIN,
    MAX_TOKENS,
    MODEL,
    OFF,
    OURS,
    PINNED_OFF,
    Servers,
    Workload,
    arms_of,
    record_answers,
)
from results import write
from rich.console import Console
from rich.table import Table

from vllm_instant.tools.measure.closed_loop import ClosedLoopResult, PromptSpec, run_closed_loop
from vllm_instant.tools.measure.server_info import newest_decisions
from vllm_instant.tools.measure.servers import running, settle
from vllm_instant.tools.measure.speedup_estimate import estimate_speedup
from vllm_instant.tools.measure.statistics import Interval, median_interval, ratio_interval

DROPPED_BELOW = {0: 0.7, 1: 0.85}
"""After the first and the second round: share of the best arm's speed below which a fixed length is given up."""
MIXED_LOADS = (4, 8, 16)
FAMILIES = {
    "switchable": ("hopeless", "oracle"),
    "pair": ("pair", "mixed"),
    "hybrid": ("mixed hybrid",),
}
"""Which drafters are served by the same servers."""
BOUND = 0.03
KEYS = ("model", "prompts", "drafter", "users")
ANSWERS_A_TURN = 1.25
"""Minimum length of a turn, in answers of the maximum length per user at the speed of no speculation."""


@dataclass
class Cell:
    """One drafter at one load: the turns of each arm, by round."""

    workload: str
    load: int
    model: str
    prompts: str
    turns: dict[str, list[ClosedLoopResult]] = field(default_factory=dict)
    step_by_step: list[float] = field(default_factory=list)
    """Speed of ours relative to its own steps without drafts, of the rounds that had such steps."""

    def speeds(self, arm: str) -> list[float]:
        """Tokens per second by round."""
        return [turn.tokens_per_second for turn in self.turns[arm]]

    def best(self) -> str:
        """The stock arm that has the highest median."""
        return self._fastest([arm for arm in self.turns if not arm.startswith(OURS) and arm != AGAIN])

    def best_pinned(self) -> str:
        """The pinned arm of our own server that has the highest median."""
        return self._fastest([arm for arm in self.turns if arm.startswith(f"{OURS},")])

    def _fastest(self, arms: list[str]) -> str:
        return max(arms, key=lambda arm: np.median(self.speeds(arm)))

    def ratio(self, arm: str, other: str) -> Interval:
        """Tokens per second of one arm relative to another's in the same rounds."""
        rounds = min(len(self.turns[arm]), len(self.turns[other]))
        return ratio_interval(self.speeds(arm)[:rounds], self.speeds(other)[:rounds])

    def p99(self, arm: str) -> float:
        """99th percentile of the time between tokens over all rounds, in milliseconds."""
        gaps = [turn.inter_token_latencies() for turn in self.turns[arm]]
        return float(np.percentile(np.concatenate(gaps), 99)) * 1e3

    def p99_ratio(self, arm: str, other: str, draws: int = 1000) -> Interval:
        """p99 time between tokens of ``other`` relative to ``arm``'s: above 1 means that ``arm`` is better."""
        rounds = min(len(self.turns[arm]), len(self.turns[other]))
        ours = [turn.inter_token_latencies() for turn in self.turns[arm][:rounds]]
        theirs = [turn.inter_token_latencies() for turn in self.turns[other][:rounds]]

        def p99(gaps: list[np.ndarray], chosen: np.ndarray) -> float:
            return float(np.percentile(np.concatenate([gaps[i] for i in chosen]), 99))

        generator = np.random.default_rng(0)
        picks = generator.integers(0, rounds, (draws, rounds))
        drawn = [p99(theirs, pick) / p99(ours, pick) for pick in picks]
        everything = np.arange(rounds)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Interval(p99(theirs, everything) / p99(ours, everything), float(low), float(high))

    def plain(self) -> dict[str, Any]:
        """The cell as JSON types."""
        best = self.best()
        return {
            "model": self.model,
            "prompts": self.prompts,
            "drafter": self.workload,
            "users": self.load,
            "best_arm": best,
            "ours_to_best": vars(self.ratio(OURS, best)),
            "ours_to_off": vars(self.ratio(OURS, OFF)),
            "best_pinned_arm": self.best_pinned(),
            "ours_to_best_pinned": vars(self.ratio(OURS, self.best_pinned())),
            "ours_to_off_step_by_step": vars(median_interval(self.step_by_step)) if self.step_by_step else None,
            "pinned_off_to_off": vars(self.ratio(PINNED_OFF, OFF)),
            "regret": 1 - self.ratio(OURS, best).median,
            "noise_floor": vars(self.ratio(AGAIN, OFF)),
            "p99_itl_off_to_ours": vars(self.p99_ratio(OURS, OFF)),
            "p99_itl_pinned_off_to_ours": vars(self.p99_ratio(OURS, PINNED_OFF)),
            "arms": {
                arm: {
                    "tokens_per_second": vars(median_interval(self.speeds(arm))),
                    "tokens_per_second_by_round": [round(speed, 2) for speed in self.speeds(arm)],
                    "p99_itl_ms": self.p99(arm),
                    "median_ttft_ms": 1e3 * float(np.median([t for turn in turns for t in turn.ttft] or [np.nan])),
                    "tokens_by_kind": {
                        kind: sum(turn.tokens_by_kind.get(kind, 0) for turn in turns)
                        for kind in sorted({k for turn in turns for k in turn.tokens_by_kind})
                    },
                }
                for arm, turns in self.turns.items()
            },
        }


def run_cell(servers: Servers, workload: Workload, load: int, rounds: int, seconds: float, console: Console) -> Cell:
    """All rounds of one drafter at one load."""
    cell = Cell(workload.name, load, servers.model.name, workload.kind)
    asked = arms_of(servers, workload)
    arms = list(asked)
    servers.draft_like(workload.control)
    order = random.Random(f"{workload.name}{load}")
    prompts_per_round = 4 * max(load, 4)
    for number in range(-1, rounds):
        order.shuffle(arms)
        # Ours learns the new load before it counts, as it would have in the first seconds of it.
        for arm in arms if number >= 0 else [OURS, OFF]:
            settle()
            before = newest_step(servers) if arm == OURS else 0
            turn = run_closed_loop(
                servers.url(asked[arm].server),
                MODEL,
                workload.prompts,
                concurrency=load,
                seconds=seconds,
                max_tokens=MAX_TOKENS,
                first_prompt=(number + 1) * prompts_per_round,
                extra=asked[arm].extra,
            )
            if turn.errors or not turn.gaps:
                why = turn.errors[0] if turn.errors else "no tokens in the window"
                raise SystemExit(f"{workload.name}, {load} users, {arm}: {why}")
            if number >= 0:
                cell.turns.setdefault(arm, []).append(turn)
            elif arm == OFF and workload.whole_answers:
                seconds = max(seconds, ANSWERS_A_TURN * MAX_TOKENS[1] * load / turn.tokens_per_second)
                prompts_per_round *= 2
            if arm == OURS and number >= 0:
                decisions = newest_decisions(servers.url(OURS), 2048)
                found = estimate_speedup(decision for decision in decisions if decision["step"] > before)
                if found is not None:
                    cell.step_by_step.append(found.speed)
        if number in DROPPED_BELOW:
            least = DROPPED_BELOW[number] * max(np.median(cell.speeds(arm)) for arm in arms)
            arms = [a for a in arms if a in (OFF, AGAIN, OURS, PINNED_OFF) or np.median(cell.speeds(a)) >= least]
    best = cell.best()
    closely = f"{median_interval(cell.step_by_step):.3f}" if cell.step_by_step else "never off"
    console.print(
        f"  {load:3} users: best {best} {np.median(cell.speeds(best)):.1f} tok/s, ours to best "
        f"{cell.ratio(OURS, best):.3f}, to off {cell.ratio(OURS, OFF):.3f}, floor {cell.ratio(AGAIN, OFF):.3f}; "
        f"to best pinned ({cell.best_pinned()}) {cell.ratio(OURS, cell.best_pinned()):.3f}, pinned off to off "
        f"{cell.ratio(PINNED_OFF, OFF):.3f}; step by step {closely}; p99 ITL off/ours "
        f"{cell.p99_ratio(OURS, OFF):.2f}, pinned off/ours {cell.p99_ratio(OURS, PINNED_OFF):.2f}",
        soft_wrap=True,
    )
    return cell


def newest_step(servers: Servers) -> int:
    """Number of the step that ours decided last; 0 before the first."""
    decisions = newest_decisions(servers.url(OURS), 1)
    return int(decisions[-1]["step"]) if decisions else 0


def table(cells: list[Cell], lengths: tuple[int, ...]) -> Table:
    """Tokens per second by arm, and the regret."""
    shown = Table(title="Output tokens per second")
    names = [OFF, *(f"K={k}" for k in lengths), OURS]
    ratios = ("ours / best", "ours / best pinned", "ours / off", "off again / off", "p99 ITL off / ours")
    for name in ("drafter", "users", *names, *ratios):
        shown.add_column(name, justify="left" if name == "drafter" else "right")
    for cell in cells:
        best = cell.best()
        ratio = cell.ratio(OURS, best)
        speeds = [f"{np.median(cell.speeds(n)):.0f}{'*' if n == best else ''}" for n in names]
        shown.add_row(
            cell.workload,
            str(cell.load),
            *speeds,
            f"{ratio:.3f}",
            f"{cell.ratio(OURS, cell.best_pinned()):.3f}",
            f"{cell.ratio(OURS, OFF):.2f}",
            f"{cell.ratio(AGAIN, OFF):.3f}",
            f"{cell.p99_ratio(OURS, OFF):.2f}",
        )
    return shown


def beyond_noise(cells: list[Cell]) -> list[str]:
    """Cells whose regret is more than the bound and more than noise, by the whole interval of the ratio."""
    floor = max(max(1 - cell.ratio(AGAIN, OFF).low, cell.ratio(AGAIN, OFF).high - 1) for cell in cells)
    failures = []
    for cell in cells:
        ratio = cell.ratio(OURS, cell.best())
        if ratio.high < 1 - BOUND - floor or ratio.median < 1 - BOUND - 2 * floor:
            failures.append(
                f"{cell.workload}, {cell.load} users: ours / {cell.best()} is {ratio:.3f}, "
                f"below {1 - BOUND:.2f} by more than the noise floor of {floor:.3f}"
            )
        pinned = cell.ratio(OURS, cell.best_pinned())
        if pinned.high < 1 - BOUND:
            failures.append(
                f"{cell.workload}, {cell.load} users: ours / {cell.best_pinned()} is {pinned:.3f}, below "
                f"{1 - BOUND:.2f} in one and the same process"
            )
    return failures


def workloads(
    servers: Servers, family: str, wanted: list[str], folder: Path, console: Console, recorded: int, prompts: str
) -> list[Workload]:
    """The requested workloads of one family of drafters.

    Args:
        servers: of the family.
        family: one of ``FAMILIES``.
        wanted: names of workloads.
        folder: for the perfect drafter's answers.
        console: to print to.
        recorded: how many answers it gets.
        prompts: class of all prompts but those of mixed traffic.

    """
    found = []

    def asked(kind: str, count: int, seed: int) -> list[PromptSpec]:
        return servers.model.of_classes([kind], count, seed)[kind]

    if family == "switchable":
        if "hopeless" in wanted:
            found.append(Workload("hopeless", family, {"mode": "hopeless"}, asked(prompts, 256, 3), kind=prompts))
        if "oracle" in wanted:
            answers = folder / "answers.json"
            stable = record_answers(servers, asked(prompts, recorded, 5), answers)
            console.print(f"oracle: {len(stable)} prompts that every arm answers alike")
            found.append(
                Workload(
                    "oracle", family, {"mode": "oracle", "answers": str(answers)}, stable, pinned=(0, 8), kind=prompts
                )
            )
    elif family == "hybrid":
        if "mixed hybrid" in wanted:
            found.append(Workload("mixed hybrid", family, None, asked("mixed", 1024, 9), True, kind="mixed"))
    else:
        if "pair" in wanted:
            found.append(Workload("pair", family, None, asked(prompts, 512, 7), True, (0, 1, 2, 4), prompts))
        if "mixed" in wanted:
            found.append(Workload("mixed", family, None, asked("mixed", 1024, 9), True, (0, 1, 2, 4), "mixed"))
    return found


def main() -> None:
    """Measure, print, write ``benchmarks/results/regret.json`` and ``regret.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafters", default="hopeless,oracle,pair,mixed,mixed hybrid")
    parser.add_argument("--loads", default="1,4,8,16,32")
    parser.add_argument("--oracle-loads", default=None, help="loads of the perfect drafter; --loads by default")
    parser.add_argument("--pair-loads", default=None, help="loads of the pair workload; --loads by default")
    parser.add_argument("--lengths", default="1,2,4,8")
    add_model_option(parser)
    parser.add_argument("--prompts", default=None, help="class of prompts of all but mixed traffic; code, or mixed")
    parser.add_argument("--name", default="", help="the conditions of this run, where they are not the usual ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--short", action="store_true", help="the form for CI")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/regret.json")
    options = parser.parse_args()
    if options.short:
        options.drafters, options.loads, options.lengths = "hopeless,oracle", "1,8", "8"
        options.rounds, options.seconds, options.oracle_loads = 3, 2.0, "1"
    model = chosen(options)
    prompts = options.prompts or ("code" if options.model == EMBEDDED else "mixed")
    recorded = 16 if options.short else 40
    lengths = tuple(int(k) for k in options.lengths.split(","))
    loads = [int(load) for load in options.loads.split(",")]
    oracle_loads = [int(load) for load in options.oracle_loads.split(",")] if options.oracle_loads else loads
    pair_loads = [int(load) for load in options.pair_loads.split(",")] if options.pair_loads else loads
    wanted = options.drafters.split(",")
    console = Console()
    cells: list[Cell] = []
    began = time.monotonic()
    for family, members in FAMILIES.items():
        if not set(members) & set(wanted):
            continue
        with tempfile.TemporaryDirectory(prefix="regret-") as name:
            folder = Path(name)
            servers = Servers(family, lengths, folder, model)
            elapsed = time.monotonic() - began
            console.print(f"[{elapsed:.0f} s] starting {len(servers.arms)} servers ({family} drafters)")
            with running(*servers.arms.values()):
                found = workloads(servers, family, wanted, folder, console, recorded, prompts)
                for workload, load in itertools.product(found, loads):
                    if workload.name.startswith("mixed") and load not in MIXED_LOADS:
                        continue
                    if load not in {"pair": pair_loads, "oracle": oracle_loads}.get(workload.name, loads):
                        continue
                    console.print(f"[{time.monotonic() - began:.0f} s] {workload.name}")
                    cells.append(run_cell(servers, workload, load, options.rounds, options.seconds, console))
                    if not options.short:
                        write(options.output, [cell.plain() for cell in cells], options.name, KEYS)
    console.print(table(cells, lengths), width=200)
    if options.short:
        failures = beyond_noise(cells)
        for failure in failures:
            console.print(failure, style="red")
        console.print(f"{time.monotonic() - began:.0f} s")
        sys.exit(1 if failures else 0)
    plot(options.output)


if __name__ == "__main__":
    main()
