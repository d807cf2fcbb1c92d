"""The escalation: what a decision costs, and what a learned rule brings on the demo's pair.

    .venv/bin/python benchmarks/escalation.py decisions [--rounds 300]
    .venv/bin/python benchmarks/escalation.py label [--rounds 40]
    .venv/bin/python benchmarks/escalation.py routing [--prompts 240]

``decisions``: microseconds until the first part of an answer, through the middleware with ``rules`` and ``learned``,
beyond the same application without it; no engine, prompts of three lengths, the arms take turns.

``label``: time to the first token on the demo's target of one request at a time, with the model's own reading of the
prompt before it and without (``instant_escalation = "fast"``), in turns; and the time of a decoding step beside it.

``routing``: the demo's draft model is the fast end and its target the deep one, two servers that are asked one prompt
after the other. Prompts of four classes are beginnings of held-out text; a score is the share of the true continuation
that an answer begins with. The report is that of ``vllm-instant escalation report``: everything on held-out prompts,
with the random mix and the prompt's length at equal cost (seconds) as baselines.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results import HERE, write
from scripted_deep_server import Always, Ends

from vllm_instant.escalation.features import FORM
from vllm_instant.escalation.learned_rule import LearnedRule
from vllm_instant.interfaces.escalation import Depth
from vllm_instant.tools.demo import assets
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.escalation.ask import End, ask_both
from vllm_instant.tools.escalation.examples import read_examples
from vllm_instant.tools.escalation.report import judge
from vllm_instant.tools.measure.http_client import sync_client
from vllm_instant.tools.measure.servers import Server, running, settle
from vllm_instant.tools.measure.statistics import median_interval
from vllm_instant_plugins.escalation.learned import Learned
from vllm_instant_plugins.escalation.plugin import RulesOptions, build_rules

LENGTHS = (200, 4000, 100_000)
WORDS = 200
RULES = tuple({"pattern": rf"\bword{number}\b"} for number in range(20))
"""Of which none applies, so that all are tried."""
CLASSES = ("code", "structured", "repetitive", "math-like")
CONTINUATION = 60
BLOCK_SIZES = (128, 32)
"""Tokens per KV cache block: the CPU's default, and the smallest there; GPUs have 16."""
MAX_TOKENS = 24


def decisions(rounds: int) -> list[dict[str, Any]]:
    """Microseconds that a decision adds, by plugin and length of the prompt."""
    count = len(FORM) + WORDS
    rule = LearnedRule(
        vocabulary=tuple(f"word{number}" for number in range(WORDS)),
        mean=(0.0,) * count,
        scale=(1.0,) * count,
        coefficients=(0.01,) * count,
        intercept=0.0,
        slope=-1.0,
        offset=0.0,
        threshold=0.5,
    )
    plugins = {"rules": build_rules(RulesOptions(rules=RULES)), "learned": Learned(rule, 1.0)}
    cells = []
    for length in LENGTHS:
        words = random.Random(0).choices(["river", "stone", "cloud", "def", "x = 1"], k=length)
        body = {"model": "demo", "messages": [{"role": "user", "content": " ".join(words)[:length]}]}
        content = json.dumps(body).encode()
        arms: dict[str, Any] = {"none": Ends(Always(Depth.FAST)).here}
        arms |= {name: Ends(plugin).app for name, plugin in plugins.items()}
        found: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(rounds + 20):
            for name, app in arms.items():
                seconds = asyncio.run(first_part(app, content))
                if number >= 20:
                    found[name].append(seconds)
        for name in plugins:
            added = [1e6 * (a - b) for a, b in zip(found[name], found["none"], strict=True)]
            cell = {"plugin": name, "characters": length, "microseconds": vars(median_interval(added))}
            cells.append(cell)
            print(f"{name:8} {length:7} characters: {cell['microseconds']['median']:.0f} µs", flush=True)
    return cells


async def first_part(app: Any, content: bytes) -> float:
    """Seconds until the first part of an answer leaves an application."""
    arrived: list[float] = []
    sent = False

    async def receive() -> Any:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        if message.get("body") and not arrived:
            arrived.append(time.perf_counter())

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    began = time.perf_counter()
    await app(scope, receive, send)
    return arrived[0] - began


def prompts(count: int) -> list[dict[str, Any]]:
    """Beginnings of held-out text with their true continuation, the classes in turn."""
    choose = random.Random(7)
    texts: dict[str, list[str]] = {"code": [], "structured": []}
    for document in documents(held_out_only=True):
        if len(document.text) > 1000:
            texts[document.kind].append(document.text)
    records = [line for text in texts["structured"] for line in text.splitlines() if 100 < len(line) < 200]
    made = []
    while len(made) < count:
        kind = CLASSES[len(made) % len(CLASSES)]
        if kind == "repetitive":
            lines = choose.sample(records, 3)
            text = "\n".join([*lines, lines[0]])
        elif kind == "math-like":
            pairs = [(choose.randrange(10, 99), choose.randrange(10, 99)) for _ in range(choose.randrange(3, 12))]
            text = "\n".join(f"x = {a} + {b}  # {a + b}" for a, b in pairs)
        else:
            whole = choose.choice(texts[kind])
            start = choose.randrange(len(whole) - 600)
            text = whole[start : start + choose.randrange(160, 600)]
        cut = 3 if kind == "math-like" else CONTINUATION
        made.append({"prompt": text[:-cut], "reference": text[-cut:], "class": kind})
    return made


def share_of_reference(line: Mapping[str, Any], answer: str) -> float:
    """The share of the true continuation that an answer begins with."""
    reference = str(line["reference"])
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reference, answer, strict=False))
    return sum(1 for _ in equal) / len(reference)


def label(rounds: int) -> list[dict[str, Any]]:
    """The cells of both sizes of KV cache blocks; only full blocks are shared by question and answer."""
    return [label_with(rounds, block_size) for block_size in BLOCK_SIZES]


def label_with(rounds: int, block_size: int) -> dict[str, Any]:
    """Milliseconds to the first token with and without a question before, and of a step."""
    pair = assets.prepare()
    texts = [line["prompt"] for line in prompts(8 * rounds) if line["class"] in ("code", "structured")]
    found: dict[str, list[float]] = {"fast": [], "auto": []}
    steps: list[float] = []
    with tempfile.TemporaryDirectory(prefix="escalation-") as name:
        file = Path(name) / "deploy.toml"
        # Below any probability: the question is asked, and the answer comes from here.
        file.write_text(
            '[speculation]\nplugin = "off"\n[escalation]\nplugin = "label"\nthreshold = 1.0\n'
            "[escalation.deep_settings]\nseed = 1\n"
        )
        words = ["--served-model-name", "demo", "--max-model-len", "1024", "--max-num-seqs", "2", "--enforce-eager"]
        words += ["--block-size", str(block_size)]
        server = Server(
            pair.target,
            [*words, "--plugins", "vllm_instant", "--instant-config", str(file)],
            log=Path(name) / "server.log",
            environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        with running(server), sync_client(server.url, timeout=60) as client:
            for number, text in enumerate(texts[: 2 * rounds + 4]):
                choice = ("fast", "auto")[number % 2]
                body = {"model": "demo", "prompt": text, "max_tokens": 8, "stream": True, "ignore_eos": True}
                body["vllm_xargs"] = {"instant_escalation": choice}
                arrivals = [time.perf_counter()]
                with client.stream("POST", "/v1/completions", json=body) as response:
                    arrivals += [time.perf_counter() for line in response.iter_lines() if line.startswith("data: {")]
                if number >= 4:
                    found[choice].append(1e3 * (arrivals[1] - arrivals[0]))
                    steps += [1e3 * (after - before) for before, after in itertools.pairwise(arrivals[1:])]
    first = {choice: vars(median_interval(values)) for choice, values in found.items()}
    step = vars(median_interval(steps))
    added = first["auto"]["median"] - first["fast"]["median"]
    print(
        f"blocks of {block_size}: first token {first['fast']} ms, with a question {first['auto']} ms: {added:+.1f} ms; "
        f"a step {step} ms"
    )
    return {
        "requests": rounds,
        "block_size": block_size,
        "first_token_ms": first,
        "added_ms": added,
        "step_ms": step,
    }


def routing(count: int) -> dict[str, Any]:
    """Ask both ends, and judge the rule that is learned from their answers."""
    pair = assets.prepare()
    with tempfile.TemporaryDirectory(prefix="escalation-") as name:
        folder = Path(name)
        servers = [
            Server(
                model,
                ["--served-model-name", end, "--max-model-len", "1024", "--max-num-seqs", "2", "--enforce-eager"],
                log=folder / f"{end}.log",
                environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
            )
            for end, model in (("fast", pair.draft), ("deep", pair.target))
        ]
        answers = folder / "answers.jsonl"
        with running(*servers):
            ends = [
                End(sync_client(server.url, timeout=60), name, MAX_TOKENS)
                for server, name in zip(servers, ("fast", "deep"), strict=True)
            ]
            for end in ends:
                end.answer({"prompt": "def main():"})
            settle()
            ask_both(prompts(count), *ends, answers, 1, lambda done: None)
        examples, cost = read_examples(answers, share_of_reference)
        report = judge(examples, cost, 0.02)
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
    by_class = {}
    for kind in CLASSES:
        own = [example for example, line in zip(examples, lines, strict=True) if line["class"] == kind]
        by_class[kind] = {
            "prompts": len(own),
            "fast_score": sum(example.fast_score for example in own) / len(own),
            "deep_score": sum(example.deep_score for example in own) / len(own),
        }
    return {"classes": by_class, **report.plain()}


def main() -> None:
    """Measure one part, print, write ``benchmarks/results/escalation.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("decisions", "label", "routing"))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--output", type=Path, default=HERE / "results/escalation.json")
    options = parser.parse_args()
    if options.part == "decisions":
        measured: list[dict[str, Any]] = decisions(options.rounds or 300)
    elif options.part == "label":
        measured = label(options.rounds or 40)
    else:
        measured = [routing(options.prompts)]
        print(json.dumps({key: value for key, value in measured[0].items() if key != "frontier"}, indent=1))
        for point in measured[0]["frontier"]:
            print(point)
    write(options.output, measured, options.part)


if __name__ == "__main__":
    main()
