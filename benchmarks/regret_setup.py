"""The regret benchmark's servers, prompts and drafters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from bench_models import BenchModel

from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.servers import Server

HERE = Path(__file__).resolve().parent
MODEL = "demo"
MAX_DRAFT_TOKENS = 8
MAX_TOKENS = (64, 112)
OFF, AGAIN, OURS = "off", "off again", "ours"
LOOKUP, LOOKUP_LENGTH = "ngram, K=4", 4
"""vLLM's own lookup in the request's prompt and answer."""
PINNED_OFF = "ours, off"


@dataclass(frozen=True)
class Workload:
    """Drafts and prompts."""

    name: str
    family: str
    """Servers with the same family draft in the same way."""
    control: dict[str, Any] | None
    prompts: Sequence[PromptSpec]
    whole_answers: bool = False
    """Whether turns last longer than any answer. In short turns an arm that is much faster for some requests begins new
    answers, and prefills their prompts, while the other arm does not."""
    pinned: Sequence[int] = (0,)
    """Draft lengths at which our own server is pinned by its clients, as arms of their own."""
    kind: str = ""
    """Class of the prompts."""


@dataclass(frozen=True)
class Arm:
    """A server and the request parameters of its clients."""

    server: str
    extra: dict[str, Any]


def arms_of(servers: Servers, workload: Workload) -> dict[str, Arm]:
    """All arms of a workload: one per server, and our server pinned to a draft length.

    Two processes of one kind differ in speed by some percent for as long as they live (where their memory lies). The
    pinned arms share the process with ours, so that what differs is the decisions alone.
    """
    arms = {name: Arm(name, {}) for name in servers.arms}
    for length in workload.pinned:
        name = f"{OURS}, K={length}" if length else PINNED_OFF
        arms[name] = Arm(OURS, {"vllm_xargs": {"instant_speculation": length or "off"}})
    return arms


class Servers:
    """One server an arm, for one family of drafters.

    Args:
        family: ``switchable``, ``pair``, or ``hybrid``: in the latter ours draws on lookups beside the same draft
            model, and vLLM's own lookup gets an arm.
        lengths: fixed draft lengths that get an arm.
        folder: for logs, the control file and learned costs.
        model: the target, and the draft model of ``pair`` and ``hybrid``.

    """

    def __init__(self, family: str, lengths: Sequence[int], folder: Path, model: BenchModel) -> None:
        self.model = model
        self.control = folder / "control.json"
        self.control.write_text('{"mode": "hopeless"}')
        draft = "" if family == "switchable" else str(model.draft())
        shared = [
            *("--served-model-name", MODEL, "--max-model-len", "1024", "--max-num-seqs", "32"),
            *("--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching"),
        ]
        environment = {
            "SWITCHABLE_DRAFTER": str(self.control),
            "PYTHONPATH": str(HERE),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }

        def drafting(length: int) -> str:
            if family != "switchable":
                config: dict[str, Any] = {
                    "method": "draft_model",
                    "model": draft,
                    "draft_sample_method": "probabilistic",
                }
            else:
                config = {"method": "custom_class", "model": "switchable_drafter.SwitchableDrafter"}
            return json.dumps(config | {"num_speculative_tokens": length})

        ours = folder / "ours.toml"
        text = f'[speculation]\nplugin = "goodput"\ncosts_folder = {json.dumps(str(folder / "costs"))}\n'
        if family == "hybrid":
            text += f'[drafter]\nplugin = "hybrid"\nmodel = {json.dumps(draft)}\n'
            text += f'num_speculative_tokens = {MAX_DRAFT_TOKENS}\ndraft_sample_method = "probabilistic"\n'
        ours.write_text(text)
        select = ["--plugins", "vllm_instant", "--instant-config", str(ours)]
        # The repair of vLLM's sampling on the CPU (vLLM issue 55005) is ours; without it stock servers with drafts
        # sample wrongly at temperature 1. They get it, too, so that all arms answer from the same distribution.
        repaired = ["--plugins", "vllm_instant", "--instant-set", "speculation.plugin=fixed"]
        # Two processes of one kind: what they differ by is the noise floor, the luck of a process's memory included.
        self.arms: dict[str, Server] = {
            arm: Server(model.target, shared, log=folder / f"{arm}.log", environment=environment)
            for arm in (OFF, AGAIN)
        }
        fixed = {f"K={length}": drafting(length) for length in lengths}
        if family == "hybrid":
            fixed[LOOKUP] = json.dumps({"method": "ngram", "num_speculative_tokens": LOOKUP_LENGTH})
        for number, (arm, config) in enumerate(fixed.items()):
            self.arms[arm] = Server(
                model.target,
                [*shared, "-sc", config, *(repaired if family != "switchable" else [])],
                log=folder / f"fixed{number}.log",
                environment=environment,
            )
        drafter = [] if family == "hybrid" else ["-sc", drafting(MAX_DRAFT_TOKENS)]
        self.arms[OURS] = Server(
            model.target,
            [*shared, *drafter, *select],
            log=folder / "ours.log",
            environment=environment,
        )

    def url(self, arm: str) -> str:
        """Where an arm is served."""
        return self.arms[arm].url

    def draft_like(self, control: dict[str, Any] | None) -> None:
        """Tell the switchable drafters what to propose."""
        if control is not None:
            partial = self.control.with_suffix(".part")
            partial.write_text(json.dumps(control))
            partial.replace(self.control)


def record_answers(servers: Servers, prompts: Sequence[PromptSpec], path: Path) -> list[PromptSpec]:
    """Write the greedy answers for the oracle; returns the prompts that every arm answers alike.

    In bfloat16 two nearly equal logits can swap with the shape of the batch, and an oracle whose sequence has left its
    answer is none: such prompts are left out.
    """

    def answer(url: str, prompt: PromptSpec) -> dict[str, Any]:
        body = {
            "model": MODEL,
            "prompt": prompt.text,
            "temperature": 0,
            "max_tokens": MAX_TOKENS[1],
            "ignore_eos": True,
        }
        reply = httpx.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=300)
        reply.raise_for_status()
        choice = reply.json()["choices"][0]
        return {"prompt": choice["prompt_token_ids"], "answer": choice["token_ids"]}

    def answers(arm: str, concurrency: int) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda prompt: answer(servers.url(arm), prompt), prompts))

    entries = answers(OFF, 4)
    path.write_text(json.dumps(entries))
    servers.draft_like({"mode": "oracle", "answers": str(path)})
    fixed = [arm for arm in servers.arms if arm.startswith("K=")]
    checks = [answers(OFF, 16), answers(fixed[0], 8), answers(fixed[-1], 2)]
    heads: set[tuple[int, ...]] = set()
    stable = []
    for number, (prompt, entry) in enumerate(zip(prompts, entries, strict=True)):
        head = tuple(entry["prompt"][:16])
        if head not in heads and all(check[number]["answer"] == entry["answer"] for check in checks):
            stable.append(prompt)
        heads.add(head)
    return stable
