"""Prompts that are read while they are typed, beside the same kind of prompts sent whole.

.venv/bin/python benchmarks/streaming.py

Parts, each a cell of the result file:

* ``typed``: time to first token of prompts of some 700 tokens typed over ten seconds, committed at once and after a
  short pause, against such prompts sent whole.
* ``short``: queries of at most 50 tokens: the server's time from commit to first token, against the decode steps of
  the same answers.
* ``neighbour``: the cost of a speculative answer, begun early and discarded, for another client's request.
* ``background``: four decoders while four typists write such long prompts over ten seconds, over and over:
  sent whole, or streamed, or not at all.
* ``identity``: 50 prompts with emoji, combining characters and scripts from right to left, typed with mistakes and
  edits, in float32 and greedy: is the answer that to the whole prompt?
* ``abuse``: 200 sessions that go away at random moments under load, eight idle typists on a server with eight slots,
  and one who types beyond the model's length.

The model is SmolLM2; of the last two parts, which need float32 and many requests, the demo's smallest target. The arms
of a part take turns in one server; every prompt is used once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from results import write
from streaming_checks import abuse_part, identity_part
from streaming_harness import MODEL, Answer, keystrokes, pieces, summary, typed, whole
from transformers import AutoTokenizer

from vllm_instant.streaming.client import StreamingSession
from vllm_instant.tools.demo import assets, real_model, widen_model
from vllm_instant.tools.measure.closed_loop import ClosedLoopResult, PromptSpec, run_closed_loop
from vllm_instant.tools.measure.http_client import async_client
from vllm_instant.tools.measure.servers import Server, running
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

HERE = Path(__file__).resolve().parent
LONG, SHORT = 2250, 90
"""Characters: some 700 tokens, and at most 50."""
TYPING_SECONDS = 10.0
PAUSE = 0.15
"""Seconds between the last character and Enter."""
TYPISTS = DECODERS = 4
DEPLOYMENT = """
[speculation]
plugin = "off"

[streaming]
plugin = "PLUGIN"
max_sessions_per_client = 256

[vllm]
served_model_name = "demo"
max_model_len = 1024
max_num_seqs = 8
enforce_eager = true
"""
EMBEDDED = "the demo's own"


class Prompts:
    """Prompts that were not sent before."""

    def __init__(self) -> None:
        self._seed = itertools.count(1)

    def new(self, characters: int) -> str:
        """The next one."""
        return pieces(characters, 1, next(self._seed))[0]


async def typed_part(url: str, prompts: Prompts, rounds: int, count: Callable[[str], int]) -> dict[str, Any]:
    """Long prompts; ``count`` says how many tokens a text has."""
    request = {"model": MODEL, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    arms: dict[str, list[Answer]] = {"whole": [], "typed, committed at once": [], "typed, committed after a pause": []}
    pauses = {"typed, committed at once": 0.0, "typed, committed after a pause": PAUSE}
    tokens: list[int] = []
    async with async_client(url) as client:
        for number in range(rounds):
            for arm in random.Random(number).sample(list(arms), len(arms)):
                text = prompts.new(LONG)
                tokens.append(count(text))
                if arm == "whole":
                    answer = await whole(client, url, text, **request)
                else:
                    answer = await typed(url, keystrokes(text), TYPING_SECONDS, pauses[arm], **request)
                arms[arm].append(answer)
    base = [answer.after_commit for answer in arms["whole"]]
    return {
        "part": "typed",
        "rounds": rounds,
        "tokens": int(np.median(tokens)),
        "ms_after_commit": {arm: summary([a.after_commit for a in found]) for arm, found in arms.items()},
        "ms_after_last_key": {arm: summary([a.after_last_key for a in found]) for arm, found in arms.items()},
        "after_commit_to_whole": {
            arm: vars(ratio_interval([a.after_commit for a in arms[arm]], base)) for arm in pauses
        },
        "after_last_key_to_whole": {
            arm: vars(ratio_interval([a.after_last_key for a in arms[arm]], base)) for arm in pauses
        },
    }


async def short_part(server: Server, prompts: Prompts, rounds: int) -> dict[str, Any]:
    """Short queries; of the time in the server, how much the engine had them, and of that in which they waited."""
    request = {"model": MODEL, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    url = server.url
    spans = {"waiting": "vllm:request_queue_time_seconds_sum", "reading": "vllm:request_prefill_time_seconds_sum"}
    # With one letter there is next to nothing to read: what is left is the way into the engine and one step of it, for
    # a server that has just been busy, and for one that has been idle for as long as between two keystrokes.
    letter = {"one letter": [(0, 0, "a")], "one letter, after a letter": [(0, 0, "b"), (0, 1, "a")]}
    pauses = {"committed at once": 0.0, "committed after a pause": PAUSE, **dict.fromkeys(letter, 0.0)}
    in_server: dict[str, list[float]] = {arm: [] for arm in pauses}
    in_engine: dict[str, dict[str, list[float]]] = {arm: {span: [] for span in spans} for arm in pauses}
    whole_ttft: list[float] = []
    steps: list[float] = []
    async with async_client(url) as client:
        for number in range(rounds):
            found: list[float] = []
            for arm in random.Random(number).sample(list(pauses), len(pauses)):
                edits = letter[arm] if arm in letter else keystrokes(prompts.new(SHORT), 3)
                before = server.metrics()
                answer = await typed(url, edits, len(edits) * 0.12, pauses[arm], **request)
                in_server[arm].append(answer.in_server)
                after = server.metrics()
                for span, name in spans.items():
                    in_engine[arm][span].append(after[name] - before.get(name, 0.0))
                # What was begun early comes in a burst: a decode step is what the other answers show.
                if pauses[arm] == 0.0:
                    found += answer.steps
            answer = await whole(client, url, prompts.new(SHORT), **request)
            whole_ttft.append(answer.after_commit)
            steps.append(float(np.median(found + answer.steps)))
    return {
        "part": "short",
        "rounds": rounds,
        "decode_step_ms": summary(steps),
        "whole_ms_seen_by_client": summary(whole_ttft),
        "ms_in_server": {arm: summary(values) for arm, values in in_server.items()},
        "ms_in_engine": {arm: {span: summary(v) for span, v in found.items()} for arm, found in in_engine.items()},
        "in_server_to_decode_step": {arm: vars(ratio_interval(in_server[arm], steps)) for arm in pauses},
    }


async def neighbour_part(url: str, prompts: Prompts, rounds: int) -> dict[str, Any]:
    """Another client's request while a speculative answer is decoded that will be discarded."""
    request = {"model": MODEL, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    ttft: dict[str, list[float]] = {"alone": [], "beside an early answer": []}
    async with async_client(url) as client:
        for number in range(rounds):
            for arm in random.Random(number).sample(list(ttft), 2):
                async with StreamingSession(url, **request | {"max_tokens": 400}) as session:
                    if arm != "alone":
                        await session.append(prompts.new(SHORT))
                    await asyncio.sleep(0.35)
                    answer = await whole(client, url, prompts.new(SHORT), **request)
                    ttft[arm].append(answer.after_commit)
    ratio = ratio_interval(ttft["beside an early answer"], ttft["alone"])
    return {
        "part": "neighbour",
        "rounds": rounds,
        "ttft_ms": {arm: summary(v) for arm, v in ttft.items()},
        "ratio": vars(ratio),
    }


async def background_part(url: str, prompts: Prompts, rounds: int) -> dict[str, Any]:
    """Time between tokens of four decoders beside four typists."""
    seconds = 2 * TYPING_SECONDS
    p99: dict[str, list[float]] = {"no typists": [], "whole": [], "streamed": []}
    longest: dict[str, list[float]] = {arm: [] for arm in p99}
    speed: dict[str, list[float]] = {arm: [] for arm in p99}
    ttft: dict[str, list[float]] = {"whole": [], "streamed": []}
    for number in range(rounds):
        for arm in random.Random(number).sample(list(p99), len(p99)):
            measured, answers = await _with_typists(url, prompts, arm, seconds if arm != "no typists" else 8.0)
            p99[arm].append(float(np.quantile(measured.inter_token_latencies(), 0.99)))
            longest[arm].append(float(measured.inter_token_latencies().max()))
            speed[arm].append(measured.tokens_per_second)
            if arm != "no typists":
                ttft[arm] += answers
    return {
        "part": "background",
        "rounds": rounds,
        "itl_p99_ms": {arm: summary(values) for arm, values in p99.items()},
        "itl_longest_ms": {arm: summary(values) for arm, values in longest.items()},
        "tokens_per_second": {arm: vars(median_interval(values)) for arm, values in speed.items()},
        "typists_ttft_ms": {arm: summary(values) for arm, values in ttft.items()},
        "p99_streamed_to_whole": vars(ratio_interval(p99["streamed"], p99["whole"])),
        "speed_streamed_to_whole": vars(ratio_interval(speed["streamed"], speed["whole"])),
    }


async def _with_typists(url: str, prompts: Prompts, arm: str, seconds: float) -> tuple[ClosedLoopResult, list[float]]:
    # Answers longer than the window: what is measured is not their own prompts being read.
    asked = [PromptSpec(prompts.new(SHORT)) for _ in range(2 * DECODERS)]
    request = {"model": MODEL, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answers: list[float] = []

    async def type_on(number: int, client: httpx.AsyncClient) -> None:
        # From the beginning one of them is done every so often: the first prompts are shorter and typed in less time.
        part = (number + 1) / TYPISTS
        while True:
            text = prompts.new(int(LONG * part))
            if arm == "streamed":
                answer = await typed(url, keystrokes(text, 12), TYPING_SECONDS * part, 0.0, **request)
            else:
                await asyncio.sleep(TYPING_SECONDS * part)
                answer = await whole(client, url, text, **request)
            part = 1.0
            answers.append(answer.after_commit)

    with ThreadPoolExecutor(1) as pool:
        load = asyncio.get_running_loop().run_in_executor(
            pool,
            lambda: run_closed_loop(
                url, MODEL, asked, concurrency=DECODERS, seconds=seconds, warm_up=2.5, max_tokens=(940, 960)
            ),
        )
        async with async_client(url) as client:
            typists = [asyncio.create_task(type_on(i, client)) for i in range(TYPISTS if arm != "no typists" else 0)]
            measured = await load
            for typist in typists:
                typist.cancel()
            await asyncio.gather(*typists, return_exceptions=True)
    if measured.errors:
        raise SystemExit(measured.errors[0])
    return measured, answers


def serve(folder: Path, plugin: str, dtype: str | None = None) -> Server:
    """The server; in ``dtype`` with the demo's smallest target."""
    target = assets.prepare(size=widen_model.SMALL, dtype=dtype).target if dtype else real_model.prepare()
    file = folder / f"{dtype}.toml"
    file.write_text(DEPLOYMENT.replace("PLUGIN", plugin))
    words = ["--plugins", "vllm_instant", "--instant-config", str(file), *(["--dtype", dtype] if dtype else [])]
    return Server(target, words, log=folder / f"{dtype}.log", environment={"VLLM_CPU_KVCACHE_SPACE": "1"})


def main() -> None:
    """Measure, print, write ``benchmarks/results/streaming.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    timed, checked = ("typed", "short", "neighbour", "background"), ("identity", "abuse")
    parser.add_argument("--parts", default=",".join((*timed, *checked)))
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the parts with long prompts; others have 3 times more"
    )
    parser.add_argument("--plugin", choices=("chunked", "resumable"), default="chunked")
    parser.add_argument("--output", type=Path, default=HERE / "results/streaming.json")
    options = parser.parse_args()
    measured: list[dict[str, Any]] = []
    parts = options.parts.split(",")
    rounds = options.rounds

    def run(part: str, work: Callable[[], Coroutine[Any, Any, dict[str, Any]]]) -> None:
        if part in parts:
            began = time.monotonic()
            model = real_model.NAME if part in timed else EMBEDDED
            measured.append({"model": model, "plugin": options.plugin} | asyncio.run(work()))
            print(f"{part} ({time.monotonic() - began:.0f} s): {measured[-1]}")
            write(options.output, measured, keys=("plugin", "part"))

    with tempfile.TemporaryDirectory(prefix="streaming-") as name:
        prompts = Prompts()
        if set(parts) & set(timed):
            with running(server := serve(Path(name), options.plugin)):
                asyncio.run(short_part(server, Prompts(), 1))  # first requests are slower
                url = server.url
                tokenizer = AutoTokenizer.from_pretrained(real_model.prepare())
                run("typed", lambda: typed_part(url, prompts, rounds, lambda text: len(tokenizer(text)["input_ids"])))
                run("short", lambda: short_part(server, prompts, 3 * rounds))
                run("neighbour", lambda: neighbour_part(url, prompts, 3 * rounds))
                run("background", lambda: background_part(url, prompts, rounds))
        if set(parts) & set(checked):
            with running(checking := serve(Path(name), options.plugin, "float32")):
                run("identity", lambda: identity_part(checking.url))
                run("abuse", lambda: abuse_part(checking))


if __name__ == "__main__":
    main()
