"""A drafter that turns hopeless while the server runs, and perfect again: how long until ours has noticed.

.venv/bin/python benchmarks/collapse.py

Ours and stock servers (no speculation; K = 8) take turns under the same closed loop of users. In each turn of ours the
drafter is perfect, then random for about 300 steps, then perfect again. Compared are: the tokens a second from
50 steps after the collapse on with those of no speculation, and from 50 steps after the recovery on with those of K = 8
with perfect drafts. Steps are counted by the server itself (``/v1/instant/decisions``).
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from regret_setup import MAX_TOKENS, MODEL, OFF, OURS, Servers, record_answers, snippets
from results import write
from rich.console import Console

from vllm_instant.evidence.load import Measured, measure
from vllm_instant.evidence.servers import running, settle
from vllm_instant.evidence.statistics import ratio_interval

STEPS_TO_NOTICE = 50
HOPELESS_STEPS = 300
PERFECT_SECONDS = 4.0
MOST_SECONDS = 20.0


class Switching(threading.Thread):
    """Turns the drafter hopeless and back while a load runs, and notes when."""

    def __init__(self, servers: Servers, perfect: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.servers, self.perfect = servers, perfect
        self.collapsed = self.noticed = self.recovered = self.noticed_again = 0.0
        self.hopeless_steps = 0

    def run(self) -> None:
        """Wait, switch, count steps, switch back."""
        time.sleep(PERFECT_SECONDS)
        self.servers.draft_like({"mode": "hopeless"})
        self.collapsed = self._now()
        first = self._step()
        self.noticed = self._after(first + STEPS_TO_NOTICE)
        self._after(first + HOPELESS_STEPS)
        self.servers.draft_like(self.perfect)
        self.recovered = self._now()
        second = self._step()
        self.hopeless_steps = second - first
        self.noticed_again = self._after(second + STEPS_TO_NOTICE)

    def _now(self) -> float:
        return time.perf_counter()

    def _step(self) -> int:
        answer = httpx.get(f"{self.servers.url(OURS)}/v1/instant/decisions", params={"last": 1}, timeout=10).json()
        return int(answer["engines"][0]["decisions"][-1]["step"])

    def _after(self, step: int) -> float:
        while self._step() < step:
            time.sleep(0.1)
        return self._now()


def main() -> None:
    """Measure, print, write ``benchmarks/results/collapse.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default="1,4")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/collapse.json")
    options = parser.parse_args()
    console = Console()
    measured = []
    with tempfile.TemporaryDirectory(prefix="collapse-") as name:
        folder = Path(name)
        servers = Servers("switchable", (8,), folder)
        with running(*servers.arms.values()):
            answers = folder / "answers.json"
            prompts = record_answers(servers, snippets("code", 0.0, 40, 5), answers)
            perfect = {"mode": "oracle", "answers": str(answers)}
            for users in (int(load) for load in options.loads.split(",")):
                off, fixed, hopeless, perfect_again = [], [], [], []
                steps = []

                def load(arm: str, seconds: float, number: int, users: int = users) -> Measured:
                    settle()
                    turn = measure(
                        servers.url(arm),
                        MODEL,
                        prompts,
                        concurrency=users,
                        seconds=seconds,
                        max_tokens=MAX_TOKENS,
                        first_prompt=number * 8,
                    )
                    if turn.errors:
                        raise SystemExit(turn.errors[0])
                    return turn

                for number in range(options.rounds):
                    servers.draft_like(perfect)
                    off.append(load(OFF, 5.0, number).tokens_per_second)
                    fixed.append(load("K=8", 5.0, number).tokens_per_second)
                    load(OURS, 3.0, number)
                    settle()
                    switching = Switching(servers, perfect)
                    switching.start()
                    turn = load_while(switching, servers, prompts, users, number)
                    opened = turn.opened_at
                    hopeless.append(turn.speed_between(switching.noticed - opened, switching.recovered - opened))
                    perfect_again.append(turn.speed_between(switching.noticed_again - opened, turn.seconds))
                    steps.append(switching.hopeless_steps)
                collapse, recovery = ratio_interval(hopeless, off), ratio_interval(perfect_again, fixed)
                console.print(
                    f"{users} users: from {STEPS_TO_NOTICE} steps after the collapse on {collapse:.3f} times no "
                    f"speculation; from {STEPS_TO_NOTICE} steps after the recovery on {recovery:.3f} times K=8"
                )
                measured.append(
                    {
                        "users": users,
                        "steps_hopeless": steps,
                        "after_collapse_to_off": vars(collapse),
                        "after_recovery_to_k8": vars(recovery),
                        "off_tokens_per_second": off,
                        "k8_tokens_per_second": fixed,
                        "after_collapse_tokens_per_second": hopeless,
                        "after_recovery_tokens_per_second": perfect_again,
                        "median_k8_over_off": float(np.median(fixed) / np.median(off)),
                    }
                )
    write(options.output, measured)


def load_while(switching: Switching, servers: Servers, prompts: Any, users: int, number: int) -> Measured:
    """The load of ours, long enough for the drafter's two changes."""
    turn = measure(
        servers.url(OURS),
        MODEL,
        prompts,
        concurrency=users,
        seconds=MOST_SECONDS,
        max_tokens=MAX_TOKENS,
        first_prompt=number * 8,
    )
    switching.join(timeout=1)
    if switching.is_alive() or turn.errors or switching.noticed_again - turn.opened_at > MOST_SECONDS - 2:
        raise SystemExit(f"the changes did not fit into {MOST_SECONDS} s: {turn.errors or 'too slow a machine'}")
    return turn


if __name__ == "__main__":
    main()
