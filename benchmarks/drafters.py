"""Drafters by class of prompt: acceptance by position, and tokens per second.

.venv/bin/python benchmarks/drafters.py [--model smollm2] [--prompts edit,extract,story]

One server each with ``suffix``, ``model``, ``hybrid`` and no drafter, on the target of ``--model``. Acceptance is
measured with clients that ask for 8 draft tokens (``instant_speculation``), so that no draft is left out for its cost;
tokens per second with the ``goodput`` policy deciding, as served. All arms take turns.

``ms_per_step`` is the time of a step without drafts (``off``) and with 8 draft tokens per request: of the draft model
that is eight of its steps and one of the target's, which verifies them.

Position j of the table is the share of a request's steps in which draft token j existed and was accepted; the sum over
positions is the number of accepted draft tokens per step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bench_models import BenchModel, add_model_option, chosen
from prometheus_client.parser import text_string_to_metric_families
from regret_setup import HERE, MODEL
from results import write
from rich.console import Console
from rich.table import Table

from vllm_instant.tools.measure.closed_loop import PromptSpec, run_closed_loop
from vllm_instant.tools.measure.interleaved_rounds import interleaved
from vllm_instant.tools.measure.servers import Server, running, settle
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

OFF, SUFFIX, MODEL_ARM, HYBRID = "off", "suffix", "model", "hybrid"
POSITIONS = 8
MAX_TOKENS = (96, 160)
PROMPTS_A_TURN = 32
"""More than a turn can answer: a prompt of an earlier turn would be answered from the drafter's history."""
METRICS_SECONDS = 2.5
"""Until ``/metrics`` shows the figures of a load: the server updates them every second."""


def servers(folder: Path, served: BenchModel) -> dict[str, Server]:
    """One server a drafter."""
    model = json.dumps(str(served.draft()))
    common = f"costs_folder = {json.dumps(str(folder / 'costs'))}\n"
    drafters = {
        SUFFIX: '[drafter]\nplugin = "suffix"\n',
        MODEL_ARM: f'[drafter]\nplugin = "model"\nmodel = {model}\nnum_speculative_tokens = 8\n'
        'draft_sample_method = "probabilistic"\n',
        HYBRID: f'[drafter]\nplugin = "hybrid"\nmodel = {model}\nnum_speculative_tokens = 16\n'
        'draft_sample_method = "probabilistic"\n',
        OFF: "",
    }
    arms = {}
    for arm, drafter in drafters.items():
        file = folder / f"{arm}.toml"
        speculation = '[speculation]\nplugin = "off"\n' if arm == OFF else f"[speculation]\n{common}"
        file.write_text(speculation + drafter)
        arms[arm] = Server(
            served.target,
            [
                *("--served-model-name", MODEL, "--max-model-len", "1024", "--max-num-seqs", "16"),
                *("--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching"),
                *("--plugins", "vllm_instant", "--instant-config", str(file)),
            ],
            log=folder / f"{arm}.log",
            environment={"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(HERE)},
        )
    return arms


def totals_of(url: str) -> np.ndarray:
    """Accepted draft tokens by position and, behind them, granted draft tokens: totals since the server started."""
    time.sleep(METRICS_SECONDS)
    totals = np.zeros(POSITIONS + 1)
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text):
        for sample in family.samples:
            if sample.name == "vllm:spec_decode_num_accepted_tokens_per_pos_total":
                position = int(sample.labels["position"])
                if position < POSITIONS:
                    totals[position] += sample.value
            elif sample.name == "vllm_instant:draft_tokens_budgeted_total":
                totals[-1] += sample.value
    return totals


def turn(server: Server, prompts: Sequence[PromptSpec], users: int, seconds: float, number: int, **extra: Any) -> float:
    """Tokens per second of one turn."""
    measured = run_closed_loop(
        server.url,
        MODEL,
        prompts,
        concurrency=users,
        seconds=seconds,
        max_tokens=MAX_TOKENS,
        first_prompt=number * PROMPTS_A_TURN,
        extra=extra,
    )
    if measured.errors:
        raise SystemExit(measured.errors[0])
    return measured.tokens_per_second


def one_class(
    arms: dict[str, Server], name: str, prompts: Sequence[PromptSpec], users: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Acceptance and speed of all drafters on one class of prompts."""
    acceptance, step_ms = {}, {}
    for arm in (SUFFIX, MODEL_ARM, HYBRID):
        before = totals_of(arms[arm].url)
        settle()
        speed = turn(arms[arm], prompts, users, seconds, 0, vllm_xargs={"instant_speculation": POSITIONS})
        gained = totals_of(arms[arm].url) - before
        # Each step grants each request what its client asked for.
        acceptance[arm] = [float(share) for share in gained[:-1] * POSITIONS / gained[-1]]
        step_ms[arm] = 1e3 * users * (1 + sum(acceptance[arm])) / speed
    speeds: dict[str, list[float]] = {arm: [] for arm in arms}
    order = random.Random(name)
    for number, arm in interleaved(list(arms), range(-1, rounds), order):
        speed = turn(arms[arm], prompts, users, seconds, number + 2)
        if number >= 0:  # the first round is for the policy to learn
            speeds[arm].append(speed)
    step_ms[OFF] = 1e3 * users / float(np.median(speeds[OFF]))
    better = max((SUFFIX, MODEL_ARM), key=lambda arm: float(np.median(speeds[arm])))
    return {
        "class": name,
        "users": users,
        "acceptance_by_position": acceptance,
        "accepted_per_step": {arm: sum(shares) for arm, shares in acceptance.items()},
        "ms_per_step": step_ms,
        "tokens_per_second": {arm: vars(median_interval(found)) for arm, found in speeds.items()},
        "better_single_source": better,
        "hybrid_to_better": vars(ratio_interval(speeds[HYBRID], speeds[better])),
        "hybrid_to_off": vars(ratio_interval(speeds[HYBRID], speeds[OFF])),
        "suffix_to_off": vars(ratio_interval(speeds[SUFFIX], speeds[OFF])),
    }


def table(measured: Sequence[dict[str, Any]]) -> Table:
    """The result to print."""
    result = Table(title="Accepted draft tokens per step, tokens per second (goodput policy)")
    for column in ("class", "users", "drafter", *(str(j + 1) for j in range(POSITIONS)), "sum", "tok/s"):
        result.add_column(column, justify="left" if column in ("class", "drafter") else "right")
    for found in measured:
        for arm in (SUFFIX, MODEL_ARM, HYBRID, OFF):
            shares = found["acceptance_by_position"].get(arm)
            cells = [f"{share:.2f}" for share in shares] if shares else [""] * POSITIONS
            total = f"{sum(shares):.2f}" if shares else ""
            speed = f"{found['tokens_per_second'][arm]['median']:.0f}"
            result.add_row(found["class"], str(found["users"]), arm, *cells, total, speed)
        result.add_section()
    return result


def main() -> None:
    """Measure, print, write ``benchmarks/results/drafters.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.add_argument("--prompts", default=None, help="classes of prompts, separated by commas; all by default")
    parser.add_argument("--loads", default="1,4")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--name", default="", help="the conditions of this run, where they are not the usual ones")
    parser.add_argument("--output", type=Path, default=HERE / "results/drafters.json")
    options = parser.parse_args()
    console = Console()
    model = chosen(options)
    classes = options.prompts.split(",") if options.prompts else [name for name in model.prompts if name != "mixed"]
    workloads = model.of_classes(classes, 256, 11)
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="drafters-") as name:
        arms = servers(Path(name), model)
        with running(*arms.values()):
            loads = [int(load) for load in options.loads.split(",")]
            for users, (kind, prompts) in itertools.product(loads, workloads.items()):
                found = one_class(arms, kind, prompts, users, options.rounds, options.seconds)
                measured.append({"model": model.name, **found})
                ratio = found["hybrid_to_better"]
                console.print(
                    f"{kind}, {users} users: hybrid is {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] "
                    f"times {found['better_single_source']}",
                    soft_wrap=True,
                )
                write(options.output, measured, options.name, ("model", "class", "users"))
    console.print(table(measured), width=160)


if __name__ == "__main__":
    main()
