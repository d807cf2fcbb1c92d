"""Waiting times and latency under the ``similarity`` policy and first come, first served, on live servers.

    .venv/bin/python benchmarks/scheduling.py [--traffic burst,0.7,0.9,1.1,heavy,adversarial] [--rounds 3]
    .venv/bin/python benchmarks/scheduling.py --traffic "chat burst" --requests 64 --arms fcfs,similarity --rounds 5
    .venv/bin/python benchmarks/scheduling.py --traffic "assistant burst" --requests 48 --arms fcfs,similarity

Two servers of one model without speculation: of SmolLM2 for the ``assistant`` traffics, else of the demo target (see
``scheduling_traffic.py``). One is stock vLLM (``--scheduling-policy priority``, which with equal priorities serves as
requests come): the arms ``stock`` and ``stock, priority`` (each request's true length as its priority). The other is
ours, whose arms differ in the queue alone: ``fcfs``, ``similarity`` (lengths learned from 100 requests before),
``similarity, told`` (lengths told by the client), ``static`` (a batch starts when the last one is done). Requests are
sent when they are due. All arms of a round get the same prompts at the same times, every round fresh ones, and the
prefix cache is off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import write
from scheduling_traffic import ASSISTANT, DOCUMENTS, TRAFFIC, Mix, PlannedRequest, Speed, prompts_of, requests_of

from vllm_instant.tools.demo import assets, real_model
from vllm_instant.tools.measure.open_loop import OpenLoopRequest, OpenLoopResult, send_open_loop
from vllm_instant.tools.measure.server_info import newest_decisions
from vllm_instant.tools.measure.servers import Server, running, settle
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

HERE = Path(__file__).resolve().parent
MODEL = "demo"
STOCK, PRIORITY, FCFS, LEARNED, TOLD, STATIC = (
    "stock",
    "stock, priority",
    "fcfs",
    "similarity",
    "similarity, told",
    "static",
)
WAIT_RATIO, WAIT_SECONDS = 2.0, 1.0


def bodies(made: Sequence[PlannedRequest], arm: str, end_token: int) -> list[OpenLoopRequest]:
    """The requests of one arm."""
    sent = []
    for planned in made:
        extra: dict[str, Any] = {}
        if arm == PRIORITY:
            extra = {"priority": planned.tokens}
        elif arm != STOCK:
            extra = {"vllm_xargs": {"benchmark_arm": arm}}
            if arm == TOLD:
                extra["vllm_xargs"]["instant_output_tokens"] = planned.tokens
        if planned.tokens is not None:
            extra |= {"min_tokens": planned.tokens - 1, "logit_bias": {str(end_token): 100}}
        body = {
            "model": MODEL,
            "prompt": planned.prompt,
            "temperature": 0,
            "max_tokens": planned.limit,
            **extra,
        }
        sent.append(OpenLoopRequest(planned.at, body, planned.kind))
    return sent


@dataclass(frozen=True)
class Run:
    """One arm's run over one round's requests."""

    followed: Sequence[OpenLoopResult]
    preemptions: float
    starts: Sequence[Mapping[str, Any]] = ()
    """What the server says about each start, oldest first."""

    def numbers(self) -> dict[str, float]:
        """The reported figures, in seconds and tokens per second."""
        latency = np.array([f.ended for f in self.followed])
        ttft = np.array([f.ttft for f in self.followed])
        gaps = np.concatenate([f.inter_token_latencies() for f in self.followed])
        ends = np.array([f.due + f.ended for f in self.followed])
        found = {
            "mean_latency": latency.mean(),
            "p50_latency": np.percentile(latency, 50),
            "p99_latency": np.percentile(latency, 99),
            "mean_ttft": ttft.mean(),
            "p99_ttft": np.percentile(ttft, 99),
            "p99_itl": np.percentile(gaps, 99),
            "throughput": sum(f.tokens for f in self.followed) / (ends.max() - self.followed[0].due),
            "preemptions": self.preemptions,
        }
        for kind in ("short", "long"):
            of_kind = [f.ended / f.tokens for f in self.followed if f.kind == kind]
            if of_kind:
                found[f"{kind}_seconds_per_token"] = float(np.mean(of_kind))
        return {name: float(value) for name, value in found.items()}

    def capacity(self) -> Speed:
        """In a burst while requests wait: afterwards the batch is not full."""
        until = max(f.due + f.ttft for f in self.followed)
        began = self.followed[0].due
        said = [max((tokens for at, tokens in f.arrivals if f.due + at <= until), default=0) for f in self.followed]
        return Speed(sum(said) / (until - began), float(np.mean([f.tokens for f in self.followed])))


def worst_wait(ours: Run, fcfs: Run) -> float:
    """The most that a request waited over the bound, in seconds: below 0 the bound held.

    Time to the first token stands for the wait; in both runs it contains the reading of the request's own prompt.
    """
    return max(o.ttft - (WAIT_RATIO * f.ttft + WAIT_SECONDS) for o, f in zip(ours.followed, fcfs.followed, strict=True))


def worst_start(ours: Run) -> float:
    """The same by the server's own account, in seconds: its bound comes from the queue that it computes beside its own.

    Both belong to the same seconds, whereas the machine may be faster or slower when the other arm has its turn.
    """
    return max((start["waited_ms"] - start["bound_ms"]) / 1e3 for start in ours.starts if start["bound_ms"] is not None)


class Servers:
    """The two servers and their arms."""

    def __init__(self, folder: Path, slots: int, target: Path) -> None:
        self.end_token = int(json.loads((Path(target) / "config.json").read_text())["eos_token_id"])
        shared = [
            *("--served-model-name", MODEL, "--max-model-len", "1024", "--max-num-seqs", str(slots)),
            *("--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching"),
        ]
        metadata = folder / "scheduling_arms-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: scheduling-arms\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text("[vllm_instant]\narms = scheduling_arms\n")
        deployment = folder / "ours.toml"
        deployment.write_text('[speculation]\nplugin = "off"\n\n[batching]\nplugin = "arms"\n')
        self.stock = Server(
            target,
            [*shared, "--scheduling-policy", "priority"],
            log=folder / "stock.log",
            environment={"VLLM_PLUGINS": ""},
        )
        self.ours = Server(
            target,
            [*shared, "--plugins", "vllm_instant", "--instant-config", str(deployment)],
            log=folder / "ours.log",
            environment={"PYTHONPATH": f"{HERE}:{folder}"},
        )

    def run(self, arm: str, made: Sequence[PlannedRequest]) -> Run:
        """One arm's turn; raises RuntimeError when a request fails."""
        server = self.stock if arm in (STOCK, PRIORITY) else self.ours
        before = server.metrics()
        followed = send_open_loop(server.url, bodies(made, arm, self.end_token))
        failed = [f.error for f in followed if f.error]
        if failed:
            raise RuntimeError(f"{arm}: {len(failed)} of {len(followed)} requests failed, for example: {failed[0]}")
        name = "vllm:num_preemptions_total"
        preemptions = server.metrics().get(name, 0) - before.get(name, 0)
        starts = newest_decisions(server.url, len(made), queue=True) if arm in (LEARNED, TOLD) else ()
        settle()
        return Run(followed, preemptions, starts)


def measure(
    servers: Servers, traffic: str, arms: Sequence[str], rounds: int, count: int, speed: Speed
) -> dict[str, Any]:
    """All arms of one traffic, round by round."""
    mix, load = TRAFFIC[traffic]
    numbers: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    over: dict[str, list[float]] = {arm: [] for arm in arms if arm in (LEARNED, TOLD)}
    over_own: dict[str, list[float]] = {arm: [] for arm in over}
    for number in range(rounds):
        made = requests_of(mix, load, count, speed, seed=1000 * number + hash_of(traffic))
        turns = list(arms) if number % 2 else list(arms)[::-1]
        runs = {arm: servers.run(arm, made) for arm in turns}
        for arm, run in runs.items():
            numbers[arm].append(run.numbers())
        for arm in over:
            over[arm].append(worst_wait(runs[arm], runs[FCFS]))
            over_own[arm].append(worst_start(runs[arm]))
        print(f"  {traffic}, round {number + 1} of {rounds}", flush=True)
    names = numbers[FCFS][0]
    return {
        "traffic": traffic,
        "model": real_model.NAME if mix is ASSISTANT else "demo target",
        "prompts": prompts_of(mix),
        "requests": count,
        "rounds": rounds,
        "arms": {
            arm: {name: vars(median_interval([r[name] for r in runs])) for name in names}
            for arm, runs in numbers.items()
        },
        "against_fcfs": {
            arm: {
                name: vars(ratio_interval([r[name] for r in runs], [r[name] for r in numbers[FCFS]]))
                for name in names
                if name != "preemptions"
            }
            for arm, runs in numbers.items()
            if arm != FCFS
        },
        "throughput_against_static": vars(
            ratio_interval([r["throughput"] for r in numbers[LEARNED]], [r["throughput"] for r in numbers[STATIC]])
        )
        if STATIC in arms
        else None,
        "max_seconds_over_the_bound": over,
        "max_seconds_over_its_own_bound": over_own,
    }


def hash_of(traffic: str) -> int:
    """A seed of its own for each traffic."""
    return sum(map(ord, traffic))


def show(cell: dict[str, Any]) -> None:
    """Print one traffic."""
    print(f"{cell['traffic']}, {cell['requests']} requests, {cell['rounds']} rounds; against fcfs:")
    for arm, ratios in cell["against_fcfs"].items():
        shown = ("mean_latency", "mean_ttft", "p99_latency", "p99_itl", "throughput")
        row = "  ".join(
            f"{name} {ratios[name]['median']:.2f} [{ratios[name]['low']:.2f}, {ratios[name]['high']:.2f}]"
            for name in shown
        )
        over = cell["max_seconds_over_the_bound"].get(arm)
        if over:
            own = cell["max_seconds_over_its_own_bound"][arm]
            row += f"  over the bound by at most {max(over):.2f} s, by its own account {max(own):.2f} s"
        print(f"  {arm:16} {row}")
    if cell["throughput_against_static"]:
        ratio = cell["throughput_against_static"]
        print(f"  throughput against static: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")


def main() -> None:
    """Measure, print and write ``benchmarks/results/scheduling.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--traffic",
        default="burst,0.7,0.9,1.1,heavy,adversarial",
        help=f"of {', '.join(TRAFFIC)}; default: %(default)s",
    )
    parser.add_argument("--arms", default=",".join((STOCK, "stock priority", FCFS, LEARNED, "similarity told", STATIC)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--training", type=int, default=100, help="requests that the predictor learns from before")
    parser.add_argument("--output", type=Path, default=HERE / "results/scheduling.json")
    options = parser.parse_args()
    known = {name.replace(",", ""): name for name in (STOCK, PRIORITY, FCFS, LEARNED, TOLD, STATIC)}
    arms = [known[name.strip()] for name in options.arms.split(",")]
    unknown = set(options.traffic.split(",")) - set(TRAFFIC)
    if unknown:
        parser.error(f"--traffic: no {', '.join(sorted(unknown))}; there are {', '.join(TRAFFIC)}")
    if FCFS not in arms:
        parser.error("--arms needs fcfs, which all others are compared with")
    real = {traffic.startswith("assistant") for traffic in options.traffic.split(",")}
    if len(real) > 1:
        parser.error("--traffic: the assistant traffics use another model than the others; measure them on their own")
    if True in real and set(arms) - {STOCK, FCFS, LEARNED, STATIC}:
        parser.error("--arms: in the assistant traffics no length is known beforehand")
    target = real_model.prepare() if True in real else assets.prepare().target
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        servers = Servers(Path(folder), options.slots, Path(target))
        needs_stock = bool({STOCK, PRIORITY} & set(arms))
        with running(*[servers.stock] * needs_stock, servers.ours):
            for arm in (STOCK, FCFS) if needs_stock else (FCFS,):
                servers.run(arm, requests_of(ASSISTANT if True in real else DOCUMENTS, None, 12, Speed(), seed=7))
            speeds: dict[Mix, Speed] = {}
            for traffic in options.traffic.split(","):
                mix, _ = TRAFFIC[traffic]
                if mix not in speeds:
                    # What the server can do is what it does under a burst.
                    speeds[mix] = servers.run(FCFS, requests_of(mix, None, 48, Speed(), seed=8)).capacity()
                    per_second = speeds[mix].tokens_per_second
                    print(f"capacity {per_second:.0f} output tokens/s with {options.slots} places", flush=True)
                    servers.run(LEARNED, requests_of(mix, 1.1, options.training, speeds[mix], seed=9))
                speed = speeds[mix]
                cells.append(measure(servers, traffic, arms, options.rounds, options.requests, speed))
                show(cells[-1])
                cells[-1]["capacity_tokens_per_second"] = speed.tokens_per_second
                # Written after each traffic: a run that is cut off keeps what it has.
                write(options.output, cells, keys=("traffic", "requests"))


if __name__ == "__main__":
    main()
