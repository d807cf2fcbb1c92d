"""The first 200 tokens of each user on a server that has learned nothing yet.

    .venv/bin/python benchmarks/cold_start.py all
    .venv/bin/python benchmarks/cold_start.py DRAFTER [--users 1,4,8,16] [--starts 8] [--planted]

``all`` runs the parts in ``PARTS`` one after the other, each in a process of its own, within about eight minutes.
``DRAFTER`` is ``suffix`` (the default deployment), ``hopeless`` (random tokens), ``trained`` (the demo's draft
model), ``oracle`` (recorded answers) or ``stock`` (vLLM alone). There is one engine, in this process; a start gives
it a policy, a draft budget and a lookup history as a new server has them. Arms, in another order in each start:
``decided`` with that new state, and ``off`` and ``off again``, where the clients ask for no drafts. All share one
process, so that the decisions are the only difference; ``off again`` to ``off`` is the noise floor. ``oracle`` has
arms with fixed numbers of drafts in place of ``off again``.

Free text at temperature 1, without and with seeds; ``--after-code`` first serves a code request, whose repetitions a
lookup serves well. ``--planted`` starts with stored costs: as measured by a calibration at the beginning of the run,
and changed (three times too short or too long, without order, falling with the rows, with free drafts, of another
limit). Every time includes prompts. Results: tokens per second relative to ``off`` by start, draft tokens per user, and
the longest of the first hundred steps.

On a machine that others share, one arm of one start can be slower by a fifth for no reason of its own. ``usual`` is the
same comparison with every step at the median time of all steps of its shape in the cell (requests, rows, draft tokens
that its drafter made): what the decisions cost, without what the machine did meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}

from results import HERE, write

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.patches.plugin_factory import build_guarded, context_of
from vllm_instant.speculation.draft_budget import CLIENT_KEY, DraftBudgetManager
from vllm_instant.tools.demo import assets
from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.prompts import free, snippets
from vllm_instant.tools.measure.servers import serving_environment
from vllm_instant_plugins.goodput.policy import GoodputPolicy

TOKENS = 200
MAX_DRAFT_TOKENS = 8
MAX_USERS = 16
SLOWEST_REQUEST = 0.95
DECIDED, OFF, AGAIN = "decided", "off", "off again"
FIXED_LENGTHS = (1, 2, 4, 8)
CALIBRATION_ROUNDS = 2
FIRST_STEPS = 100
DRAFTERS = ("suffix", "hopeless", "trained", "oracle", "stock")
PARTS = (
    "suffix --users 1,8 --starts 4",
    "hopeless --users 1,8 --starts 4",
    "hopeless --users 1 --starts 1 --planted",
    "oracle --users 1 --starts 3",
    "trained --users 1 --starts 3 --seeded",
)


def in_serving_environment() -> None:
    """Start this process again with vLLM's OpenMP library preloaded, without which steps take many times as long."""
    if "libiomp5" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], serving_environment())  # noqa: S606


Shape = tuple[int, int, int]
"""Of a step: requests, rows of the model, and draft tokens that were made for the next step."""


def usual_times(served: Iterable[Sequence[tuple[Shape, float]]]) -> dict[Shape, float]:
    """The median time of all steps of each shape, from the shapes and seconds of several series of steps."""
    times = defaultdict(list)
    for steps in served:
        for shape, seconds in steps:
            times[shape].append(seconds)
    return {shape: statistics.median(found) for shape, found in times.items()}


@dataclass
class Turn:
    """One arm of one start."""

    seconds: float
    first_token: float
    """Mean seconds to the first token."""
    drafted: int
    accepted: int
    slowest_step: float
    """The longest of the first ``FIRST_STEPS`` steps after the prompts', in medians of all steps."""
    steps: list[tuple[Shape, float]] = field(default_factory=list)
    """Shape and seconds of every step."""


@dataclass
class Cell:
    """All starts under the same conditions."""

    conditions: dict[str, Any]
    starts: list[dict[str, Turn]] = field(default_factory=list)

    def relative(self, arm: str, to: str) -> list[float]:
        """Speed of an arm relative to another one's, by start."""
        return [start[to].seconds / start[arm].seconds for start in self.starts]

    def usual(self, arm: str, to: str) -> list[float]:
        """The same, with every step at the median time of its shape in this cell."""
        medians = usual_times(turn.steps for start in self.starts for turn in start.values())
        sums = [{name: sum(medians[shape] for shape, _ in turn.steps) for name, turn in s.items()} for s in self.starts]
        return [start[to] / start[arm] for start in sums]

    def plain(self) -> dict[str, Any]:
        """The cell as JSON types."""
        arms = list(self.starts[0])
        users = self.conditions["users"]
        speeds = {arm: [TOKENS * users / start[arm].seconds for start in self.starts] for arm in arms}
        plain = {
            **self.conditions,
            "starts": len(self.starts),
            "tokens_per_second": {arm: round(statistics.median(values), 2) for arm, values in speeds.items()},
        }
        if DECIDED not in arms:
            return plain
        fixed = [arm for arm in arms if arm.startswith("K=")]
        best = max([OFF, *fixed], key=lambda arm: statistics.median(speeds[arm]))
        against = {"to_off": (DECIDED, OFF), "to_best_fixed": (DECIDED, best), "noise_floor": (AGAIN, OFF)}
        for name, (arm, other) in against.items():
            if arm in arms and (name != "to_best_fixed" or fixed):
                found = self.relative(arm, other)
                plain[name] = {"median": statistics.median(found), "worst": min(found)}
                plain[f"{name}_by_start"] = [round(value, 4) for value in found]
                usual = self.usual(arm, other)
                plain[f"{name}_usual"] = {"median": statistics.median(usual), "worst": min(usual)}
        if fixed:
            plain["best_fixed"] = best
        first = [start[DECIDED].first_token / start[OFF].first_token for start in self.starts]
        plain["first_token_to_off"] = {"median": statistics.median(first), "worst": max(first)}
        plain["slowest_step"] = {arm: max(start[arm].slowest_step for start in self.starts) for arm in arms}
        plain["drafted_per_user"] = [round(start[DECIDED].drafted / users, 1) for start in self.starts]
        plain["accepted_per_user"] = [round(start[DECIDED].accepted / users, 1) for start in self.starts]
        return plain


class Engine:
    """One engine in this process, whose policy, draft budget and drafter are replaced at each start.

    Args:
        drafter: one of ``DRAFTERS``.
        folder: for its deployment file.
        arguments: further arguments of ``vllm.LLM``.

    """

    def __init__(self, drafter: str, folder: Path, **arguments: Any) -> None:
        from vllm import LLM

        pair = assets.prepare()
        self.confident = drafter == "suffix"
        self.control = folder / "control.json"
        self.draft_like({"mode": "hopeless"})
        file = folder / "deploy.toml"
        file.write_text(
            "[speculation]\nkeep_costs = false\n"
            + (
                f'[drafter]\nplugin = "model"\nmodel = {json.dumps(str(pair.draft))}\n'
                f'num_speculative_tokens = {MAX_DRAFT_TOKENS}\ndraft_sample_method = "probabilistic"\n'
                if drafter == "trained"
                else ""
            )
        )
        options: dict[str, Any] = dict(arguments)
        if drafter in ("hopeless", "oracle"):
            options["speculative_config"] = {
                "method": "custom_class",
                "model": "switchable_drafter.SwitchableDrafter",
                "num_speculative_tokens": MAX_DRAFT_TOKENS,
            }
        if drafter != "stock":
            options["additional_config"] = {"vllm_instant": str(file)}
        self.llm = LLM(
            str(pair.target),
            max_model_len=1024,
            max_num_seqs=MAX_USERS,
            block_size=32,
            enforce_eager=True,
            enable_prefix_caching=False,
            disable_log_stats=False,
            **options,
        )
        self.core: Any = self.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
        self.scheduler = self.core.scheduler
        self.speculates = drafter != "stock"
        self.steps: list[tuple[Shape, float]] = []
        step, schedule = self.llm.llm_engine.step, self.scheduler.schedule
        scheduled: dict[str, int] = {}

        def seen_schedule(*args: Any, **options: Any) -> Any:
            nonlocal scheduled
            output = schedule(*args, **options)
            scheduled = output.num_scheduled_tokens
            return output

        def timed_step() -> Any:
            began = time.perf_counter()
            outputs = step()
            seconds = time.perf_counter() - began
            drafts = sum(len(request.spec_token_ids) for request in self.scheduler.running)
            self.steps.append(((len(scheduled), sum(scheduled.values()), drafts), seconds))
            return outputs

        self.scheduler.schedule = seen_schedule
        self.llm.llm_engine.step = timed_step

    def draft_like(self, control: dict[str, Any]) -> None:
        """Tell the switchable drafter what to propose."""
        self.control.write_text(json.dumps(control))
        os.environ["SWITCHABLE_DRAFTER"] = str(self.control)

    def policy(self, costs: dict[str, Any] | None = None, calibrating: bool = False) -> GoodputPolicy:
        """A policy as the deployment builds it, without state, or with stored ``costs``."""
        from cold_starts import Store

        return GoodputPolicy(
            self.scheduler.num_spec_tokens,
            MAX_USERS,
            None,
            None if costs is None else Store(costs),  # type: ignore[arg-type]
            calibrating=calibrating,
            confident_drafts=self.confident,
            self_calibrating=self.confident,
            slowest_request=SLOWEST_REQUEST,
        )

    def start(self, policy: GoodputPolicy) -> None:
        """Forget everything that earlier requests taught."""
        if not self.speculates:
            return
        guarded = GuardedPlugin("speculation", "goodput", policy)
        self.scheduler.instant_budget = DraftBudgetManager(
            guarded, self.scheduler.num_spec_tokens, requests=self.scheduler.instant_requests
        )
        if self.confident:
            deployment = deployment_env.get_deployment()
            if deployment is None:
                raise RuntimeError("the engine has no deployment")
            config = self.llm.llm_engine.vllm_config
            runner = self.core.model_executor.driver_worker.worker.model_runner
            runner.drafter.drafter = build_guarded("drafter", deployment, context_of(config, deployment))

    def serve(self, prompts: Sequence[PromptSpec], drafts: str | int, seeds: int | None) -> Turn:
        """All prompts at once, ``TOKENS`` tokens each; ``drafts`` is what their clients ask for."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=prompt.temperature,
                max_tokens=TOKENS,
                ignore_eos=True,
                seed=None if seeds is None else seeds + number,
                extra_args={CLIENT_KEY: drafts} if self.speculates else None,
            )
            for number, prompt in enumerate(prompts)
        ]
        before = self.counts()
        self.steps = []
        began = time.perf_counter()
        answers = self.llm.generate([prompt.text for prompt in prompts], parameters, use_tqdm=False)
        seconds = time.perf_counter() - began
        first_tokens = [answer.metrics.first_token_latency for answer in answers if answer.metrics is not None]
        drafted, accepted = (after - earlier for after, earlier in zip(self.counts(), before, strict=True))
        after_prompts = [taken for _, taken in self.steps[1:]]
        slowest_step = max(after_prompts[:FIRST_STEPS]) / statistics.median(after_prompts)
        return Turn(seconds, statistics.fmean(first_tokens), drafted, accepted, slowest_step, self.steps)

    def counts(self) -> tuple[int, int]:
        """Verified and accepted draft tokens so far."""
        if not self.speculates:
            return 0, 0
        counters = self.scheduler.instant_budget.counters
        return counters.proposed, counters.accepted

    def calibrated(self, prompts: Sequence[PromptSpec]) -> dict[str, Any]:
        """Costs of this engine's steps, with random numbers of drafts and one or four users."""
        policy = self.policy(calibrating=True)
        self.start(policy)
        for _ in range(CALIBRATION_ROUNDS):
            for users in (1, 4):
                self.serve(prompts[:users], "auto", None)
        return policy.costs.state()

    def record(self, prompts: Sequence[PromptSpec], path: Path) -> None:
        """Let the switchable drafter propose the greedy answers."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args={CLIENT_KEY: "off"})
        self.start(self.policy())
        answers = [self.llm.generate([prompt.text], greedy, use_tqdm=False)[0] for prompt in prompts]
        path.write_text(
            json.dumps([{"prompt": a.prompt_token_ids, "answer": list(a.outputs[0].token_ids)} for a in answers])
        )
        self.draft_like({"mode": "oracle", "answers": str(path)})


def run_cell(
    engine: Engine,
    conditions: dict[str, Any],
    starts: int,
    *,
    costs: dict[str, Any] | None = None,
    prompts: Sequence[PromptSpec] | None = None,
) -> Cell:
    """All starts under the same conditions."""
    users, cell = conditions["users"], Cell(conditions)
    arms: dict[str, str | int] = {OFF: "off"}
    if engine.speculates:
        arms[DECIDED] = "auto"
    if prompts is not None:
        arms |= {f"K={length}": length for length in FIXED_LENGTHS}
    elif costs is None:
        arms[AGAIN] = "off"
    texts = prompts or free(starts * users, f"cold {users}")
    code = snippets("code", 0.0, starts, "cold code")
    for number in range(starts):
        chosen = [texts[(number * users + user) % len(texts)] for user in range(users)]
        order = list(arms)
        random.Random(f"{number} {conditions}").shuffle(order)
        turns = {}
        for arm in order:
            engine.start(engine.policy(copy.deepcopy(costs)) if engine.speculates else None)  # type: ignore[arg-type]
            if conditions.get("after_code"):
                engine.serve(code[number : number + 1], "auto" if arm == DECIDED else "off", None)
            turns[arm] = engine.serve(chosen, arms[arm], 1000 * number if conditions["seeded"] else None)
        cell.starts.append(turns)
    return cell


def report(cell: dict[str, Any]) -> None:
    """One line for a terminal."""
    shown = [f"{key} {value}" for key, value in cell.items() if not key.endswith("_by_start")]
    print(", ".join(shown), flush=True)


def main() -> None:
    """Measure one drafter, print, add to ``benchmarks/results/cold_start.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", choices=("all", *DRAFTERS))
    parser.add_argument("--users", default="1,4,8,16")
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--planted", action="store_true", help="with stored costs, right and wrong ones")
    parser.add_argument("--after-code", action="store_true", help="free text after a code request")
    parser.add_argument("--seeded", action="store_true", help="requests with seeds")
    parser.add_argument("--output", type=Path, default=HERE / "results/cold_start.json")
    options = parser.parse_args()
    in_serving_environment()
    if options.drafter == "all":
        for part in PARTS:
            subprocess.run([sys.executable, __file__, *part.split(), "--output", str(options.output)], check=True)
        return
    measure(options)


def measure(options: argparse.Namespace) -> None:
    """All cells of one drafter."""
    cells = []
    with tempfile.TemporaryDirectory(prefix="cold-start-") as name:
        engine = Engine(options.drafter, Path(name))
        prompts, loads = None, [int(count) for count in options.users.split(",")]
        if options.drafter == "oracle":
            prompts = snippets("code", 0.0, max([options.starts, *loads]), "cold oracle")
            engine.record(prompts, Path(name) / "answers.json")
        elif engine.speculates:  # the first steps of a process are slow in every arm
            engine.serve(free(MAX_USERS, "warm"), "off", None)
        planted: dict[str, dict[str, Any] | None] = {"none": None}
        if options.planted:
            from cold_starts import PLANTED

            measured = engine.calibrated(free(MAX_USERS, "calibration"))
            planted = {change: copy.deepcopy(measured) for change in PLANTED}
            for change, state in planted.items():
                PLANTED[change](state)  # type: ignore[arg-type]
        for users in loads:
            for stored, costs in planted.items():
                conditions = {
                    "drafter": options.drafter,
                    "users": users,
                    "seeded": options.seeded,
                    "after_code": options.after_code,
                    "stored_costs": stored,
                }
                cells.append(run_cell(engine, conditions, options.starts, costs=costs, prompts=prompts).plain())
                report(cells[-1])
                write(options.output, cells, "", ("drafter", "users", "seeded", "after_code", "stored_costs"))


if __name__ == "__main__":
    main()
