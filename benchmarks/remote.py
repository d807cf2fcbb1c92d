"""Drafts that come over a network: speed by round trip, bytes per token, and the engine's own time.

    .venv/bin/python benchmarks/remote.py --part speed      # 5 minutes; repeated, it adds rounds to earlier ones
    .venv/bin/python benchmarks/remote.py --part engine     # 1 minute

``speed``: vLLM without speculation, ours with the draft model on the same cores, and ours with a remote drafter, on the
demo's models in float32. The draft server is a process that replays recorded drafts at ``--pace-ms`` per token instead
of computing them, behind a proxy that delays (``remote_replay``). ``oracle`` drafts are the recorded greedy answer,
``trained`` ones are what the demo's draft model says after each prefix of it. In a round all arms get the same prompts,
one burst per arm with as many requests as users; one server serves all links in turn, in random order. Afterwards every
prompt is asked once more and the answers are compared with those of vLLM alone.

``engine``: the drafter without an engine, which is told of new tokens in steps of ``--step-ms``: the time that a step
spends in the drafter, and the CPU time of that and of the network thread, per step and request. Beside it one message
each way over a plain socket after the same pause: what no drafter can do without that talks to its server in each step.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from remote_replay import ORACLE, TRAINED, Link, settings
from results import HERE, python_path, write

from vllm_instant import DraftRequest
from vllm_instant.remote.protocol import VERSION, Hello
from vllm_instant.tools.demo import assets
from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.interleaved_rounds import run_arm_round
from vllm_instant.tools.measure.prompts import snippets
from vllm_instant.tools.measure.sampling import ServerClient
from vllm_instant.tools.measure.servers import Server, running, settle
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval
from vllm_instant_plugins.remote.connection import DraftServerConnection, ServerAddress
from vllm_instant_plugins.remote.drafter import RemoteDrafter

OFF, LOCAL, REMOTE = "off", "local draft model", "remote"
SERVED = "demo"
DRAFT_TOKENS = 8
LINKS = [
    *((ORACLE, {"delay_ms": delay}) for delay in (0, 5, 20, 50, 150)),
    (ORACLE, {"delay_ms": 20, "jitter_ms": 20, "stall_every_ms": 1500, "stall_ms": 400}),
    *((TRAINED, {"delay_ms": delay}) for delay in (0, 20, 150)),
]
USERS = (1, 4, 8)
KEYS = ("part", "drafts", "link", "users")
OUTPUT = HERE / "results/remote.json"


def name_of(link: Link) -> str:
    """The link in words."""
    words = f"{link.delay_ms:g} ms"
    if link.jitter_ms:
        words += f", jitter {link.jitter_ms:g} ms"
    if link.stall_every_ms:
        words += f", a stall of {link.stall_ms:g} ms every {link.stall_every_ms:g} ms"
    return words


class Replay:
    """The process with the draft server and the network."""

    def __init__(self, answers: Path, vocab_size: int) -> None:
        command = [sys.executable, str(HERE / "remote_replay.py"), "--answers", str(answers)]
        self._process = subprocess.Popen(
            [*command, "--vocab-size", str(vocab_size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = f"ws://127.0.0.1:{self._read()['port']}"

    def _read(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self._process.stdout.readline())
        return found

    def use(self, link: Link) -> int:
        """Choose a link; returns the bytes that have passed so far."""
        self._process.stdin.write(settings(link))
        self._process.stdin.flush()
        return sum(self._read().values())

    def cpu_seconds(self) -> float:
        """CPU time of the process so far, which it takes from the engine's cores."""
        used = psutil.Process(self._process.pid).cpu_times()
        return float(used.user + used.system)

    def stop(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(10)


@contextmanager
def replaying(answers: Path, vocab_size: int) -> Iterator[Replay]:
    """A replay that is ended in every case."""
    replay = Replay(answers, vocab_size)
    try:
        yield replay
    finally:
        replay.stop()


# ----------------------------------------------------------------------------------------------------------- speed


def deployment(arm: str, draft: Path, url: str, costs: Path) -> str:
    """The deployment file of an arm; empty for vLLM alone."""
    if arm == OFF:
        return ""
    text = (
        f"[speculation]\ncosts_folder = {json.dumps(str(costs))}\n[drafter]\nnum_speculative_tokens = {DRAFT_TOKENS}\n"
    )
    if arm == LOCAL:
        return text + f'plugin = "model"\nmodel = {json.dumps(str(draft))}\n'
    return text + f'plugin = "remote"\nurl = "{url}"\n'


def server(arm: str, pair: assets.Pair, folder: Path, url: str) -> Server:
    """The server of an arm."""
    words = ["--served-model-name", SERVED, "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8"]
    words += ["--enforce-eager", "--no-enable-prefix-caching"]
    text = deployment(arm, pair.draft, url, folder / f"costs {arm}")
    if text:
        file = folder / f"{arm.replace(' ', '_')}.toml"
        file.write_text(text)
        words += ["--plugins", "vllm_instant", "--instant-config", str(file)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": python_path()}
    return Server(pair.target, words, log=folder / f"{arm}.log", name=arm, environment=environment)


def prompts_of(number: int, users: int) -> list[PromptSpec]:
    """The prompts of a round."""
    return snippets("code", 0.0, users, zlib.crc32(f"remote/{users}/{number}".encode()))


def greedy(url: str, prompts: Sequence[str], tokens: int) -> list[dict[str, list[int]]]:
    """Prompts and greedy answers as token ids, eight at a time."""
    from concurrent.futures import ThreadPoolExecutor

    def ask(prompt: str) -> dict[str, list[int]]:
        body = {"model": SERVED, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json={**body, "return_token_ids": True}, timeout=300)
        [choice] = answer.raise_for_status().json()["choices"]
        return {"prompt": choice["prompt_token_ids"], "answer": choice["token_ids"]}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, prompts))


def with_drafts(draft: Path, answers: Sequence[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """Add what the draft model says after each prefix."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32).eval()
    found = []
    for one in answers:
        begin = len(one["prompt"]) - 1
        with torch.inference_mode():
            logits = model(torch.tensor([one["prompt"] + one["answer"]])).logits[0, begin:-1]
        probabilities, tokens = logits.softmax(-1).max(-1)
        found.append({**one, "tokens": tokens.tolist(), "probabilities": probabilities.tolist()})
    return found


def burst(arm: Server, prompts: Sequence[PromptSpec], tokens: int) -> float:
    """Output tokens per second of one burst."""
    done = run_arm_round(ServerClient(arm.url, SERVED), prompts, concurrency=len(prompts), tokens=tokens)
    return done.tokens / done.seconds


def measure_speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of all cells; the cells of the result file."""
    pair = assets.prepare(dtype="float32")
    began = time.monotonic()
    links = [Link(drafts=drafts, pace_ms=options.pace_ms, **link) for drafts, link in LINKS]
    loads = [int(users) for users in options.loads.split(",")]
    rounds: dict[tuple[str, str, int], list[dict[str, float]]] = earlier(options.output)
    first = min((len(made) for made in rounds.values()), default=0)
    numbers = range(first, first + options.rounds)
    with tempfile.TemporaryDirectory(prefix="remote-") as name:
        folder = Path(name)
        answers = folder / "answers.json"
        with running(server(OFF, pair, folder, "")) as (off,):
            asked = [
                prompt.text for number in [-1, *numbers] for users in loads for prompt in prompts_of(number, users)
            ]
            recorded = greedy(off.url, asked, options.tokens)
            answers.write_text(json.dumps(with_drafts(pair.draft, recorded)))
            with (
                replaying(answers, 4096) as replay,
                running(server(LOCAL, pair, folder, ""), server(REMOTE, pair, folder, replay.url)) as (local, remote),
            ):
                arms = {OFF: off, LOCAL: local, REMOTE: remote}
                for arm in arms.values():  # what is compiled or learned once
                    for users in loads:
                        burst(arm, prompts_of(-1, users), options.tokens)
                for number in numbers:
                    if time.monotonic() - began > options.seconds:
                        break
                    for users in loads:
                        found = one_round(arms, replay, links, number, users, options.tokens)
                        for link in links:
                            row = {OFF: found[OFF], LOCAL: found[LOCAL], **found[name_of(link) + link.drafts]}
                            rounds.setdefault((link.drafts, name_of(link), users), []).append(row)
                    print(f"[{time.monotonic() - began:.0f} s] round {number}", flush=True)
                replay.use(links[2])
                again = greedy(remote.url, asked, options.tokens)
                equal = sum(one["answer"] == other["answer"] for one, other in zip(recorded, again, strict=True))
    cells = [cell_of(key, made, options) for key, made in rounds.items()]
    return [*cells, {"part": "answers", "equal": equal, "asked": len(asked)}]


def one_round(
    arms: Mapping[str, Server], replay: Replay, links: Sequence[Link], number: int, users: int, tokens: int
) -> dict[str, Any]:
    """Tokens per second of every arm, and bytes per token of the remote ones."""
    prompts, order = prompts_of(number, users), random.Random(f"{number} {users}")
    found: dict[str, Any] = {}
    for arm in order.sample([OFF, LOCAL, REMOTE], 3):
        settle()
        if arm != REMOTE:
            found[arm] = burst(arms[arm], prompts, tokens)
            continue
        for link in order.sample(links, len(links)):
            before, cpu, began = replay.use(link), replay.cpu_seconds(), time.perf_counter()
            speed = burst(arms[REMOTE], prompts, tokens)
            share = (replay.cpu_seconds() - cpu) / (time.perf_counter() - began)
            passed = (replay.use(link) - before) / (users * tokens)
            found[name_of(link) + link.drafts] = {REMOTE: speed, "bytes_per_token": passed, "cores_of_replay": share}
    return found


def cell_of(
    key: tuple[str, str, int], rounds: Sequence[Mapping[str, float]], options: argparse.Namespace
) -> dict[str, Any]:
    """A cell of the result file."""
    speeds = {arm: [row[arm] for row in rounds] for arm in (OFF, LOCAL, REMOTE)}
    drafts, link, users = key
    return {
        "part": "speed",
        "drafts": drafts,
        "link": link,
        "users": users,
        "tokens": options.tokens,
        "pace_ms": options.pace_ms,
        "remote_to_off": vars(ratio_interval(speeds[REMOTE], speeds[OFF])),
        "remote_to_local": vars(ratio_interval(speeds[REMOTE], speeds[LOCAL])),
        "tokens_per_second": {arm: vars(median_interval(found)) for arm, found in speeds.items()},
        "bytes_per_token": float(np.median([row["bytes_per_token"] for row in rounds])),
        "cores_of_replay": float(np.median([row["cores_of_replay"] for row in rounds])),
        "rounds": [dict(row) for row in rounds],
    }


def earlier(path: Path) -> dict[tuple[str, str, int], list[dict[str, float]]]:
    """The rounds that a result file holds."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    cells = [cell for run in runs for cell in run["measured"] if cell["part"] == "speed"]
    return {(cell["drafts"], cell["link"], cell["users"]): cell["rounds"] for cell in cells}


# ---------------------------------------------------------------------------------------------------------- engine


def measure_engine(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The drafter's own time and bytes, by number of requests."""
    chance = np.random.default_rng(0)
    cells = []
    with tempfile.TemporaryDirectory(prefix="remote-") as name:
        answers = Path(name) / "answers.json"
        texts = [chance.integers(0, 4096, (2, 2000)).tolist() for _ in range(max(USERS))]
        recorded = [
            {"prompt": prompt[:100], "answer": answer, "tokens": [], "probabilities": []} for prompt, answer in texts
        ]
        answers.write_text(json.dumps(recorded))
        with replaying(answers, 4096) as replay:
            for users in USERS:
                for delay in (0, 20):
                    replay.use(Link(delay_ms=delay, pace_ms=0.2))
                    cells.append({**steps_of(replay.url, recorded[:users], options), "link": f"{delay} ms"})
    return cells


def steps_of(url: str, requests: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Steps of a number of requests, of whose drafts all are right."""
    connection = DraftServerConnection(ServerAddress(url), Hello(VERSION, "", 4096), DRAFT_TOKENS)
    reason = connection.start(10)
    if reason is not None:
        raise SystemExit(reason)
    drafter = RemoteDrafter(connection, 4096, DRAFT_TOKENS)
    done = [1] * len(requests)
    tokens = [np.array(one["prompt"] + one["answer"], np.int32) for one in requests]
    in_step: list[float] = []
    drafted, cpu = 0, 0.0
    [thread] = (one for one in threading.enumerate() if one.name == "remote-drafter")
    thread_clock = time.pthread_getcpuclockid(int(thread.ident or 0))
    thread_cpu = time.clock_gettime(thread_clock)
    for _ in range(options.steps):
        batch = [
            DraftRequest(f"r{place}", tokens[place][: 100 + done[place]], 100, DRAFT_TOKENS)
            for place in range(len(requests))
        ]
        began, used = time.perf_counter(), time.thread_time()
        drafts = drafter.propose(batch)
        in_step.append(time.perf_counter() - began)
        cpu += time.thread_time() - used
        for place, draft in enumerate(drafts):
            drafted += len(draft.token_ids)
            done[place] = min(done[place] + 1 + len(draft.token_ids), 1900)
        threading.Event().wait(1e-3 * options.step_ms)
    cpu += time.clock_gettime(thread_clock) - thread_cpu
    committed = sum(done)
    connection.close()
    per = 1e6 / len(requests)
    return {
        "part": "engine",
        "drafts": ORACLE,
        "users": len(requests),
        "steps": options.steps,
        "step_ms": options.step_ms,
        "in_step_us_per_request": {
            "median": per * float(np.median(in_step)),
            "p99": per * float(np.percentile(in_step, 99)),
        },
        "cpu_us_per_request": per * cpu / options.steps,
        "plain_exchange_us_per_request": per * plain_exchange(options),
        "drafted_per_step": drafted / (options.steps * len(requests)),
        "bytes_per_token": (connection.bytes_sent + connection.bytes_received) / committed,
    }


ECHO = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while piece := connection.recv(65536):
    connection.send(piece)
"""


def plain_exchange(options: argparse.Namespace) -> float:
    """CPU seconds of a thread that sends 64 bytes after each pause and receives the echo of another process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        echo = subprocess.Popen([sys.executable, "-c", ECHO, str(listener.getsockname()[1])])
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began = time.thread_time()
            for _ in range(options.steps):
                connection.send(bytes(64))
                connection.recv(65536)
                time.sleep(1e-3 * options.step_ms)
            used = time.thread_time() - began
    echo.wait(10)
    return used / options.steps


def main() -> None:
    """Measure, and write ``benchmarks/results/remote.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["speed", "engine"], required=True)
    parser.add_argument("--loads", default=",".join(map(str, USERS)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=190.0, help="no round begins later than this")
    parser.add_argument("--tokens", type=int, default=80, help="length of the answers")
    parser.add_argument("--pace-ms", type=float, default=1.0, help="time per token of the draft server")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    cells = measure_engine(options) if options.part == "engine" else measure_speed(options)
    for cell in cells:
        print(json.dumps({key: value for key, value in cell.items() if key != "rounds"}))
    write(options.output, cells, options.part, KEYS)


if __name__ == "__main__":
    main()
