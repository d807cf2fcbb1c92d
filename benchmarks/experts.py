"""Experts used and time taken by decoding steps of the demo's mixture of experts, in live vLLM servers.

    .venv/bin/python benchmarks/experts.py routing --model MODEL             # eager
    .venv/bin/python benchmarks/experts.py routing --model MODEL --compiled
    .venv/bin/python benchmarks/experts.py gate --model MODEL

``routing``: one server whose budget of experts is switched between turns, the arms in another order each round; each
turn sends a batch of prompts in one request, so that all of them decode together. The time of a step is vLLM's own mean
time between tokens. Distinct experts, kept router mass and divergence are what the plugin measures, in turns of their
own.

``gate``: a server whose cluster file is planted: it prefers experts that no token chooses. Measured is the number
of steps until the gate routes within its budget again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from results import HERE, write

from vllm_instant.moe.expert_groups import SuperExperts
from vllm_instant.moe.routing_trace import RoutedModel
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.measure.servers import Server, terminable
from vllm_instant.tools.moe.tracing import ROUTE

OUTPUT = HERE / "results" / "experts.json"
TOKENS = 48
COMMON = ["--max-model-len", "1024", "--max-num-seqs", "32", "--no-enable-prefix-caching", "--dtype", "bfloat16"]


def prompts(count: int, seed: int) -> list[str]:
    """Pieces of documents that the model was not trained on."""
    choose = random.Random(seed)
    texts = [document.text for document in documents() if document.held_out and len(document.text) > 1000]
    found = []
    for _ in range(count):
        text = choose.choice(texts)
        start = choose.randrange(len(text) - 600)
        found.append(text[start : start + choose.randrange(150, 500)])
    return found


class Client:
    """A server with an adjustable experts plugin."""

    def __init__(self, server: Server) -> None:
        self.url, self.model = server.url, server.served_model()
        self.http = httpx.Client(timeout=600)

    def control(self, **settings: Any) -> dict[str, Any]:
        """Change settings; what the plugin is and measured."""
        answer = self.http.post(f"{self.url}{ROUTE}", json=settings)
        if answer.status_code != 200:
            raise SystemExit(answer.text)
        return dict(answer.json())

    def generate(self, texts: Sequence[str], tokens: int = TOKENS) -> float:
        """Decode a batch; returns the milliseconds of a step, the time between two tokens of a request."""
        before = self._between_tokens()
        body = {"model": self.model, "prompt": list(texts), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        self.http.post(f"{self.url}/v1/completions", json=body).raise_for_status()
        after = self._between_tokens()
        return 1e3 * (after[0] - before[0]) / (after[1] - before[1])

    def _between_tokens(self) -> tuple[float, float]:
        text = self.http.get(f"{self.url}/metrics").text
        found = []
        for end in ("sum", "count"):
            lines = re.findall(rf"^vllm:inter_token_latency_seconds_{end}\{{.*\}} (\S+)$", text, re.M)
            found.append(sum(map(float, lines)))
        return found[0], found[1]


def deployment(folder: Path, **experts: Any) -> list[str]:
    """A deployment file, and the words that select it."""
    lines = ['[speculation]\nplugin = "off"\n[experts]\nplugin = "super_expert"']
    lines += [f"{name} = {json.dumps(value)}" for name, value in experts.items()]
    (folder / "deploy.toml").write_text("\n".join(lines) + "\n")
    return ["--plugins", "vllm_instant", "--instant-config", str(folder / "deploy.toml")]


def ratio(arm: Sequence[float], native: Sequence[float]) -> dict[str, float]:
    """Median ratio of paired turns, and its 95 % interval from resampled pairs."""
    pairs = np.array(arm) / np.array(native)
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(pairs, (2000, len(pairs))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"ratio": float(np.median(pairs)), "low": float(low), "high": float(high)}


def routing(
    model: str, compiled: bool, batches: list[int], budgets: list[float], rounds: int, keep: int
) -> Iterator[list[dict[str, Any]]]:
    """Counts and times of each budget, batch size by batch size."""
    arms = [1.0, *budgets]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = deployment(folder, budget=1.0, keep=keep, gate=False, adjustable=True, shadow_every=0)
        server = Server(model, [*COMMON, *([] if compiled else ["--enforce-eager"]), *words], log=folder / "log")
        with server:
            client = Client(server)
            for batch in batches:
                times: dict[float, list[float]] = {arm: [] for arm in arms}
                client.generate(prompts(batch, 99))
                for turn in range(rounds):
                    order = arms[turn % len(arms) :] + arms[: turn % len(arms)]
                    for arm in order:
                        client.control(budget=arm, shadow_every=0)
                        times[arm].append(client.generate(prompts(batch, turn)))
                cells = []
                for arm in arms:
                    client.control(budget=arm, shadow_every=4)
                    client.control(forget=True)
                    for turn in range(3):
                        client.generate(prompts(batch, 1000 + turn))
                    cells.append(_cell(client.control(), batch, arm, times, compiled, keep))
                    print(json.dumps(cells[-1]), flush=True)
                yield cells


def _cell(
    found: Mapping[str, Any], batch: int, arm: float, times: Mapping[float, list[float]], compiled: bool, keep: int
) -> dict[str, Any]:
    totals = found["totals"]
    steps = totals["layer_steps"]
    return {
        "part": "compiled" if compiled else "eager",
        "batch": batch,
        "budget": arm,
        "keep": keep,
        "native_experts": totals["native_experts"] / steps,
        "routed_experts": totals["routed_experts"] / steps,
        "kept_mass": totals["routed_mass"] / totals["native_mass"],
        # At full budget no token loses an expert, and no reference pass runs.
        "kl_nats": totals["kl"] / totals["kl_tokens"] if totals["kl_tokens"] else 0.0,
        "compared_tokens": totals["kl_tokens"],
        "ms_per_step": float(np.median(times[arm])),
        "turns": len(times[arm]),
        "time": ratio(times[arm], times[1.0]),
    }


def planted(folder: Path, model: str) -> Path:
    """A cluster file that prefers experts that no token chooses: a quarter of them, at random, by a factor of 10^12."""
    config = json.loads((Path(model) / "config.json").read_text())
    experts = config.get("num_local_experts") or config["num_experts"]
    shape = RoutedModel("planted", config["num_hidden_layers"], experts, config["num_experts_per_tok"])
    generator = np.random.default_rng(0)
    prior = [
        generator.permutation([1e6] * (experts // 4) + [1e-6] * (experts - experts // 4)) for _ in range(shape.layers)
    ]
    path = folder / "clusters.json"
    SuperExperts(shape, ((0,) * experts,) * shape.layers, tuple(tuple(map(float, row)) for row in prior)).write(path)
    return path


def gate(model: str, batch: int, max_kl: float) -> Iterator[list[dict[str, Any]]]:
    """How long a planted cluster file is followed, with the gate and without."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clusters = planted(folder, model)
        for gated in (True, False):
            words = deployment(
                folder,
                budget=0.25,
                keep=0,
                clusters=str(clusters),
                max_kl=max_kl,
                gate=gated,
                adjustable=True,
            )
            with Server(model, [*COMMON, "--enforce-eager", *words], log=folder / "log") as server:
                client = Client(server)
                client.generate(prompts(batch, 0), 240)
                found = client.control()
                before = found["totals"]
                # What is served now, compared more often than usual.
                client.http.post(f"{client.url}{ROUTE}", json={"forget": True})
                for turn in range(1, 8):
                    client.generate(prompts(batch, turn), 240)
                after = client.control()
                said = re.findall(
                    r"super_expert (\w+) its budget to (\d+) %.* at step (\d+): found ([\d.]+)", server.log_text()
                )
            totals = after["totals"]
            cells = [
                {
                    "part": "gate",
                    "gate": gated,
                    "batch": batch,
                    "max_kl": max_kl,
                    "first_240_steps_kl": before["kl"] / before["kl_tokens"],
                    "changes": [
                        {"step": int(step), "verdict": word, "budget": int(share) / 100, "found_kl": float(kl)}
                        for word, share, step, kl in said
                    ],
                    "measures": after["measures"],
                    "later_kl": totals["kl"] / totals["kl_tokens"] if totals["kl_tokens"] else None,
                    "later_experts": totals["routed_experts"] / totals["layer_steps"],
                }
            ]
            print(json.dumps(cells[-1]), flush=True)
            yield cells


def main() -> None:
    """Measure one part, and put it beside the others in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("routing", "gate"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--batch", default="1,8,16,32")
    parser.add_argument("--budget", default="0.75,0.625,0.5,0.375,0.25")
    parser.add_argument("--keep", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-kl", type=float, default=0.02)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    batches = [int(text) for text in arguments.batch.split(",")]
    if arguments.part == "gate":
        found, keys = gate(arguments.model, batches[0], arguments.max_kl), ("part", "gate")
    else:
        budgets = [float(text) for text in arguments.budget.split(",")]
        found = routing(arguments.model, arguments.compiled, batches, budgets, arguments.rounds, arguments.keep)
        keys = ("part", "batch", "budget", "keep")
    # Written after every batch size: what was measured stays when a later one is cut short.
    with terminable():
        for cells in found:
            write(arguments.output, cells, keys=keys)


if __name__ == "__main__":
    main()
