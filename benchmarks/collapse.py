"""A drafter that turns hopeless while the server runs, and perfect again: how long until ours has noticed.

.venv/bin/python benchmarks/collapse.py

The drafter is perfect, then random for about 300 steps, then perfect again, under a closed loop of users. Compared are
the tokens a second from 50 steps after the collapse on with those of no speculation, and from 50 steps after the
recovery on with those of K = 8 with perfect drafts: in turn on stock servers and on our own server with its clients
pinning the length (the same process, so that only decisions differ). Steps are counted by the server itself
(``/v1/instant/decisions``).

Turns of a few seconds scatter by several percent, whoever is asked. So what the decisions lost is also counted step by
step within those seconds: what the tokens would have taken in steps like those beside them that did not draft
(``tools.measure.speedup_estimate``), and how fast full steps decode from 50 steps after each change on, beside those of
the turns whose clients pinned the length: in such a turn, more or fewer prompts may be read.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from regret_setup import MAX_TOKENS, MODEL, OFF, OURS, Servers, record_answers
from results import write
from rich.console import Console

from vllm_instant.tools.measure.closed_loop import ClosedLoopResult, run_closed_loop
from vllm_instant.tools.measure.prompts import snippets
from vllm_instant.tools.measure.server_info import newest_decisions
from vllm_instant.tools.measure.servers import running, settle
from vllm_instant.tools.measure.speedup_estimate import decoding_speed, estimate_speedup
from vllm_instant.tools.measure.statistics import Interval, median_interval, ratio_interval

STEPS_TO_NOTICE = 50
HOPELESS_STEPS = 300
PERFECT_SECONDS = 4.0
MAX_SECONDS = 20.0


class Switching(threading.Thread):
    """Turns the drafter hopeless and back while a load runs, and notes when."""

    def __init__(self, servers: Servers, perfect: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.servers, self.perfect = servers, perfect
        self.collapsed = self.noticed = self.recovered = self.noticed_again = 0.0
        self.hopeless_steps = 0
        self.first_hopeless_step = self.first_perfect_step = 0

    def run(self) -> None:
        """Wait, switch, count steps, switch back."""
        time.sleep(PERFECT_SECONDS)
        self.servers.draft_like({"mode": "hopeless"})
        self.collapsed = self._now()
        first = self.first_hopeless_step = self._step()
        self.noticed = self._after(first + STEPS_TO_NOTICE)
        self._after(first + HOPELESS_STEPS)
        self.servers.draft_like(self.perfect)
        self.recovered = self._now()
        second = self.first_perfect_step = self._step()
        self.hopeless_steps = second - first
        self.noticed_again = self._after(second + STEPS_TO_NOTICE)

    def _now(self) -> float:
        return time.perf_counter()

    def _step(self) -> int:
        return int(newest_decisions(self.servers.url(OURS), 1)[-1]["step"])

    def _after(self, step: int) -> float:
        """When ``step`` was reached. Asking costs the server time, so the next question waits until it is likely."""
        began, first = self._now(), self._step()
        while True:
            time.sleep(0.3)
            now, newest = self._now(), self._step()
            if newest >= step:
                return now
            rate = max(newest - first, 1) / (now - began)
            time.sleep(max(0.0, min(2.0, 0.9 * (step - newest) / rate - 0.3)))


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
                found = one_load(servers, prompts, perfect, users, options.rounds)
                console.print(
                    f"{users} users: from {STEPS_TO_NOTICE} steps after the collapse on "
                    f"{Interval(**found['after_collapse_to_off']):.3f} times no speculation, "
                    f"{Interval(**found['after_collapse_to_pinned_off']):.3f} in the same process "
                    f"({Interval(**found['after_collapse_to_off_step_by_step']):.3f} step by step); "
                    f"after the recovery {Interval(**found['after_recovery_to_k8']):.3f} times K=8, "
                    f"{Interval(**found['after_recovery_to_pinned_k8']):.3f} in the same process; "
                    f"full steps {Interval(**found['full_steps_after_collapse_to_pinned_off']):.3f} times pinned off "
                    f"after the collapse, {Interval(**found['full_steps_after_recovery_to_pinned_k8']):.3f} times "
                    "pinned K=8 after the recovery",
                    soft_wrap=True,
                )
                measured.append(found)
    write(options.output, measured)


def one_load(servers: Servers, prompts: Any, perfect: dict[str, Any], users: int, rounds: int) -> dict[str, Any]:
    """All rounds with this many users."""
    speeds: dict[str, list[float]] = {}
    steps, step_by_step = [], []
    decoding: dict[str, list[float]] = {"off": [], "K=8": [], "hopeless": [], "recovered": []}

    def turn(name: str, server: str, seconds: float, number: int, speculation: int | str | None = None) -> None:
        settle()
        extra = {} if speculation is None else {"vllm_xargs": {"instant_speculation": speculation}}
        measured = run_closed_loop(
            servers.url(server),
            MODEL,
            prompts,
            concurrency=users,
            seconds=seconds,
            max_tokens=MAX_TOKENS,
            first_prompt=number * 8,
            extra=extra,
        )
        if measured.errors:
            raise SystemExit(measured.errors[0])
        speeds.setdefault(name, []).append(measured.tokens_per_second)

    for number in range(rounds):
        servers.draft_like(perfect)
        turn("off", OFF, 5.0, number)
        turn("K=8", "K=8", 5.0, number)
        for name, length in (("off", "off"), ("K=8", 8)):
            before = newest_decisions(servers.url(OURS), 1)
            turn(f"ours, {name}", OURS, 5.0, number, length)
            decoding[name].append(full_steps(servers, users, before[-1]["step"] + 1 if before else 0))
        turn("ours, perfect", OURS, 3.0, number)
        settle()
        switching = Switching(servers, perfect)
        switching.start()
        whole = load_while(switching, servers, prompts, users, number)
        opened = whole.opened_at
        hopeless = whole.speed_between(switching.noticed - opened, switching.recovered - opened)
        speeds.setdefault("after the collapse", []).append(hopeless)
        again = whole.speed_between(switching.noticed_again - opened, whole.seconds)
        speeds.setdefault("after the recovery", []).append(again)
        begin = switching.first_hopeless_step
        decisions = newest_decisions(servers.url(OURS), 2048)
        found = estimate_speedup([d for d in decisions if STEPS_TO_NOTICE <= d["step"] - begin < HOPELESS_STEPS])
        if found is None:
            raise SystemExit("drafting never ended after the collapse")
        step_by_step.append(found.speed)
        changes = switching.first_hopeless_step, switching.first_perfect_step
        decoding["hopeless"].append(full_steps(servers, users, changes[0] + STEPS_TO_NOTICE, changes[1]))
        decoding["recovered"].append(full_steps(servers, users, changes[1] + STEPS_TO_NOTICE))
        steps.append(switching.hopeless_steps)
    hopeless, again = speeds["after the collapse"], speeds["after the recovery"]
    return {
        "users": users,
        "steps_hopeless": steps,
        "after_collapse_to_off": vars(ratio_interval(hopeless, speeds["off"])),
        "after_collapse_to_pinned_off": vars(ratio_interval(hopeless, speeds["ours, off"])),
        "after_collapse_to_off_step_by_step": vars(median_interval(step_by_step)),
        "after_recovery_to_k8": vars(ratio_interval(again, speeds["K=8"])),
        "after_recovery_to_pinned_k8": vars(ratio_interval(again, speeds["ours, K=8"])),
        "full_steps_after_collapse_to_pinned_off": vars(ratio_interval(decoding["hopeless"], decoding["off"])),
        "full_steps_after_recovery_to_pinned_k8": vars(ratio_interval(decoding["recovered"], decoding["K=8"])),
        "full_steps_tokens_per_second": decoding,
        "tokens_per_second": speeds,
    }


def full_steps(servers: Servers, users: int, begin: int, end: float = math.inf) -> float:
    """Tokens a second of the server's steps ``begin`` to ``end`` that decode for all users and read no prompts."""
    decisions = newest_decisions(servers.url(OURS), 2048)
    found = decoding_speed([d for d in decisions if begin <= d["step"] < end], users)
    if found is None:
        raise SystemExit(f"no step decoded for all {users} users")
    return found


def load_while(switching: Switching, servers: Servers, prompts: Any, users: int, number: int) -> ClosedLoopResult:
    """The load of ours, long enough for the drafter's two changes."""
    turn = run_closed_loop(
        servers.url(OURS),
        MODEL,
        prompts,
        concurrency=users,
        seconds=MAX_SECONDS,
        max_tokens=MAX_TOKENS,
        first_prompt=number * 8,
    )
    switching.join(timeout=1)
    if switching.is_alive() or turn.errors or switching.noticed_again - turn.opened_at > MAX_SECONDS - 2:
        raise SystemExit(f"the changes did not fit into {MAX_SECONDS} s: {turn.errors or 'too slow a machine'}")
    return turn


if __name__ == "__main__":
    main()
