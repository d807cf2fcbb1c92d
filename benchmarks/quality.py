"""What lossy plugins cost in quality, in answers that can be judged: SmolLM2 and a mixture of experts made from it.

    .venv/bin/python benchmarks/quality.py --model smollm2
    .venv/bin/python benchmarks/quality.py --model mixture --mixture FOLDER

FOLDER is what `vllm-instant demo train-moe --smollm2` wrote. vLLM alone and one deployment run side by side
and get the same requests, ``--in-flight`` at a time: mails whose facts are wanted as JSON, questions to be answered by
a tool call, HumanEval, explanations, function edits and conversations. An arm that changes greedy answers is asked at
temperature 0; `relaxed`, which does not, at 0.7, with drafts in every step (with the default policy a full batch would
get none). The arm "vLLM again" asks vLLM twice: what batches of another composition, or chance, change.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import HERE, write

from vllm_instant.tools.demo import prompt_sets, real_model
from vllm_instant.tools.measure import quality, tasks
from vllm_instant.tools.measure.prompts import held_out_texts
from vllm_instant.tools.measure.sampling import ServerClient
from vllm_instant.tools.measure.servers import Server, ServerError, running

SAMPLED = 0.7
AGAIN = "vLLM again"
TEXTS, SCORED_ANSWERS, SCORED_TOKENS = 24, 48, 48
DRAFTS = ("speculation.plugin=fixed", "drafter.plugin=suffix", "drafter.num_speculative_tokens=4")
PLAIN = ("speculation.plugin=off",)


@dataclass(frozen=True)
class Arm:
    """A deployment: its name in tables, its settings, and the temperature of its answers."""

    name: str
    settings: Sequence[str]
    temperature: float = 0.0


ARMS = {
    "smollm2": (
        Arm(AGAIN, (), 0.0),
        Arm("fp8", (*PLAIN, "attention.plugin=fp8")),
        Arm("fp8_fused", (*PLAIN, "attention.plugin=fp8_fused")),
        Arm(f"{AGAIN}, sampled", (), SAMPLED),
        Arm("relaxed, epsilon 0.05", (*DRAFTS, "rejection_sampler.plugin=relaxed"), SAMPLED),
        Arm(
            "relaxed, epsilon 0.2",
            (*DRAFTS, "rejection_sampler.plugin=relaxed", "rejection_sampler.epsilon=0.2"),
            SAMPLED,
        ),
    ),
    "mixture": (
        Arm(AGAIN, ()),
        Arm("super_expert, budget 0.75", (*PLAIN, "experts.plugin=super_expert", "experts.budget=0.75")),
        Arm("super_expert, budget 0.5", (*PLAIN, "experts.plugin=super_expert", "experts.budget=0.5")),
        Arm(
            "super_expert, budget 0.5, no gate",
            (*PLAIN, "experts.plugin=super_expert", "experts.budget=0.5", "experts.gate=false"),
        ),
    ),
}


def prompts_of(asked: Sequence[tasks.Task]) -> str:
    """The prompts in words, with source and licence."""
    counts = {task.name: len(task.bodies) for task in asked}
    code = prompt_sets.PROMPT_SETS["human-eval"]
    return (
        f"{counts['facts']} mails and {counts['tools']} tool questions ({prompt_sets.OWN}, Apache-2.0), "
        f"{counts['text']} explanations, function edits and conversations (the same, and the Python standard library, "
        f"PSF-2.0)"
        + (f", {counts['HumanEval']} problems of HumanEval ({code.licence})" if "HumanEval" in counts else "")
    )


class Session:
    """vLLM alone on one model, with its answers, and deployments beside it."""

    def __init__(self, model: Path, folder: Path, asked: Sequence[tasks.Task], in_flight: int) -> None:
        self.model, self.folder, self.asked, self.in_flight = model, folder, asked, in_flight
        self.shared = [
            *("--max-model-len", "2048", "--max-num-seqs", str(in_flight)),
            *("--enforce-eager", "--no-enable-prefix-caching"),
        ]
        self.baseline = Server(model, self.shared, log=folder / "vllm.log", environment={"VLLM_PLUGINS": ""})
        self._answers: dict[float, list[list[tasks.Answer]]] = {}

    def client(self, server: Server) -> ServerClient:
        """For requests to a server."""
        return ServerClient(server.url, server.served_model())

    def ask(self, client: ServerClient, temperature: float) -> list[list[tasks.Answer]]:
        """The answers to all tasks."""
        return [tasks.ask(client, task, temperature, self.in_flight) for task in self.asked]

    def expected(self, temperature: float) -> list[list[tasks.Answer]]:
        """The baseline's answers, asked for once."""
        if temperature not in self._answers:
            self._answers[temperature] = self.ask(self.client(self.baseline), temperature)
        return self._answers[temperature]

    def measure(self, arm: Arm) -> dict[str, Any]:
        """One arm's figures, or why its server does not start."""
        began = time.monotonic()
        cell: dict[str, Any] = {"arm": arm.name, "settings": list(arm.settings)}
        cell |= {"temperature": arm.temperature, "in_flight": self.in_flight}
        expected = self.expected(arm.temperature)
        if not arm.settings:
            return cell | self._compared(self.client(self.baseline), arm, expected) | {"seconds": _since(began)}
        words = [word for setting in arm.settings for word in ("--instant-set", setting)]
        server = Server(
            self.model, [*self.shared, "--plugins", "vllm_instant", *words], log=self.folder / f"{arm.name}.log"
        )
        try:
            with server:
                return cell | self._compared(self.client(server), arm, expected) | {"seconds": _since(began)}
        except ServerError as error:
            return cell | {"refused": _reason(error)}

    def _compared(self, ours: ServerClient, arm: Arm, expected: list[list[tasks.Answer]]) -> dict[str, Any]:
        drafted, accepted = ours.totals()
        report = tasks.report(self.asked, self.ask(ours, arm.temperature), expected, arm.temperature)
        drafted_then, accepted_then = ours.totals()
        explanations = prompt_sets.PROMPT_SETS["explain"].prompts(SCORED_ANSWERS, "scored")
        scored = [prompt["prompt"] for prompt in explanations]
        measured = quality.quality_report(
            ours, self.client(self.baseline), held_out_texts(TEXTS), scored, SCORED_TOKENS, 1.0, self.in_flight
        )
        return {
            "drafted": drafted_then - drafted,
            "accepted": accepted_then - accepted,
            "tasks": report.plain(),
            "quality": measured.plain(),
        }


def _since(began: float) -> int:
    return round(time.monotonic() - began)


def _reason(error: ServerError) -> str:
    """The message of the error that ended a server, without its traceback."""
    lines = [line for line in error.log.splitlines() if "Error: " in line or "vllm-instant: " in line]
    return lines[-1].rpartition(") ")[2].strip() if lines else str(error).splitlines()[0]


def main() -> None:
    """Measure, print, write ``benchmarks/results/quality.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(ARMS), default="smollm2")
    parser.add_argument("--mixture", type=Path, help="folder of the mixture of experts")
    parser.add_argument("--arms", help="names of arms, separated by semicolons; all by default")
    parser.add_argument("--count", type=int, default=60, help="mails, tool questions and texts, of each")
    parser.add_argument("--problems", type=int, default=164, help="problems of HumanEval")
    parser.add_argument("--in-flight", type=int, default=32, help="requests at a time")
    parser.add_argument("--output", type=Path, default=HERE / "results/quality.json")
    options = parser.parse_args()
    if options.model == "mixture" and options.mixture is None:
        parser.error("--model mixture needs --mixture FOLDER")
    model = options.mixture if options.model == "mixture" else real_model.prepare()
    name = real_model.NAME if options.model == "smollm2" else f"mixture of experts from {real_model.NAME}"
    chosen = options.arms.split(";") if options.arms else [arm.name for arm in ARMS[options.model]]
    asked = tasks.tasks(options.count, options.problems)
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        session = Session(model, Path(folder), asked, options.in_flight)
        with running(session.baseline):
            for arm in (arm for arm in ARMS[options.model] if arm.name in chosen):
                cell = {"model": name, "prompts": prompts_of(asked)} | session.measure(arm)
                show(cell)
                write(options.output, [cell], keys=("model", "arm"))


def show(cell: dict[str, Any]) -> None:
    """Print one arm."""
    print(f"{cell['model']}, {cell['arm']}: {cell.get('refused') or str(cell['seconds']) + ' s'}", flush=True)
    if "refused" in cell:
        return
    for row in cell["tasks"]["marks"]:
        change = row["difference"]
        print(
            f"  {row['task']}, {row['mark']}: {row['baseline']:.3f} -> {row['ours']:.3f} "
            f"({change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}])"
        )
    for row in cell["tasks"]["equality"]:
        print(f"  {row['task']}: equal {row['equal']['mean']:.3f}, shared prefix {row['shared_prefix']:.3f}")
    measured = cell["quality"]
    for key in ("perplexity_ratio", "divergence", "answer_gap"):
        value = measured[key]
        print(f"  {key} {value['mean']:.5f} [{value['low']:.5f}, {value['high']:.5f}]", flush=True)


if __name__ == "__main__":
    main()
