"""The demo: a stock server and ours, the same prompts through both, one small table."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from vllm_instant.tools.demo import assets
from vllm_instant.tools.measure.http_client import sync_client
from vllm_instant.tools.measure.servers import Server, ServerError, settle, stop_all, terminable, words_of
from vllm_instant.tools.measure.streaming_client import TIMEOUT_SECONDS, stream_completion
from vllm_instant.tools.measure.token_stream import StreamedAnswer

DEPLOYMENT = Path(__file__).parent / "deploy.toml"
ROUNDS = 2
MAX_TOKENS = 96


@dataclass(frozen=True)
class Task:
    """One kind of prompt."""

    title: str
    prompt: str
    temperature: float


CODE = '''class LRUCache:
    """A mapping that keeps the most recently used items."""

    def __init__(self, maxsize=128):
        self.maxsize = maxsize
        self._data = {}

    def __len__(self):
        return len(self._data)

    def __contains__(self, key):
        return key in self._data

    def get(self, key, default=None):
'''

STRUCTURED = """\
{"module": "queue", "kind": "class", "name": "Queue", "line": 12, "bases": ["object"], "doc": "Create a queue."}
{"module": "queue", "kind": "function", "name": "put", "line": 24, "args": ["self", "item"], "doc": "Put an item."}
{"module": "queue", "kind": "function", "name": "get", "line": 36, "args": ["self"], "doc": "Get an item."}
{"module": "queue", "kind": "function", "name": "empty", "line": 48, "args": ["self"], "doc": "Return true if empty."}
"""

PROSE = '''"""Working with files and folders.

This module explains how a program finds its files, what happens when a file is missing, and why it is'''

TASKS = (
    Task("code continuation", CODE, 0.0),
    Task("structured text", STRUCTURED, 0.0),
    Task("free text", PROSE, 1.0),
)


def shared_arguments() -> list[str]:
    """The ``[vllm]`` table of the demo's deployment file, for the stock server, which does not read such files."""
    return words_of(tomllib.loads(DEPLOYMENT.read_text())["vllm"])


def our_arguments(pair: assets.Pair) -> list[str]:
    """What our server is started with beside the model."""
    selection = ["--plugins", "vllm_instant", "--instant-config", str(DEPLOYMENT)]
    return [*selection, "--instant-set", f"drafter.model={pair.draft}"]


def compare() -> int:
    """Run the whole demo; returns the exit code."""
    console = Console()
    try:
        with terminable(), tempfile.TemporaryDirectory(prefix="vllm-instant-demo-") as logs:
            pair = _prepare(console)
            stock = Server(pair.target, shared_arguments(), log=Path(logs) / "stock.log")
            ours = Server(pair.target, our_arguments(pair), log=Path(logs) / "instant.log")
            try:
                _start(console, {"stock vLLM": stock, "with vllm-instant": ours})
                results = converse(console, stock, ours)
            finally:
                with console.status("Stopping both servers …"):
                    stop_all(stock, ours)
            console.print(_table(results))
            console.print(
                f"Medians of {ROUNDS} alternating rounds of up to {MAX_TOKENS} tokens, one request at a time, the same "
                "model and flags on both servers. The target is a small trained model expanded to 105 million "
                "parameters without changing its distribution (see docs/demo-models.md)."
            )
    except KeyboardInterrupt:
        console.print("Interrupted; both servers are stopped.")
        return 130
    except (ServerError, FileNotFoundError) as error:
        console.print(f"vllm-instant: {error}", markup=False, style="red")
        return 1
    return 0


def serve(port: int) -> int:
    """Replace this process by a server with the demo's deployment file."""
    console = Console()
    try:
        pair = _prepare(console)
    except FileNotFoundError as error:
        console.print(f"vllm-instant: {error}", markup=False, style="red")
        return 1
    server = Server(pair.target, our_arguments(pair), log=Path(os.devnull))
    server.port = port
    from vllm_instant.tools.measure.servers import serving_environment

    console.print(f"Serving on {server.url}/v1 as model 'demo'; Ctrl-C stops it.\n  {' '.join(server.command)}")
    os.execve(server.command[0], server.command, serving_environment())  # noqa: S606  ours becomes the server


def _prepare(console: Console) -> assets.Pair:
    with console.status("Preparing the demo models (expanding the target the first time) …"):
        return assets.prepare()


def _start(console: Console, servers: dict[str, Server]) -> None:
    started = time.monotonic()
    for server in servers.values():
        server.launch()
    waiting = dict(servers)
    with console.status("") as status:
        while waiting:
            status.update(f"Starting {' and '.join(waiting)} … {time.monotonic() - started:.0f} s")
            for name, server in list(waiting.items()):
                if server.healthy():
                    console.print(f"{name}: ready after {server.started_in:.0f} s on {server.url}")
                    del waiting[name]
            time.sleep(0.25)


@dataclass
class Result:
    """What one kind of prompt gave."""

    task: Task
    stock: list[StreamedAnswer]
    ours: list[StreamedAnswer]
    accepted: float
    proposed: float


def converse(console: Console, stock: Server, ours: Server, rounds: int = ROUNDS) -> list[Result]:
    """Send every kind of prompt through both servers, alternating, and print our first answers as they arrive."""
    clients = {server: sync_client(server.url, timeout=TIMEOUT_SECONDS) for server in (stock, ours)}
    for client in clients.values():
        stream_completion(client, "demo", "import os\n", max_tokens=8, temperature=0.0)
    results = []
    before = _drafted(ours)
    busy = None
    for task in TASKS:
        console.rule(f"{task.title} (temperature {task.temperature:g})")
        console.print(task.prompt, style="dim", markup=False, highlight=False, end="")
        answers: dict[Server, list[StreamedAnswer]] = {stock: [], ours: []}
        for round_number in range(rounds):
            order = (ours, stock) if round_number % 2 == 0 else (stock, ours)
            for server in order:
                if busy not in (None, server):
                    settle()
                busy = server
                shown = server is ours and round_number == 0
                answers[server].append(_ask(console, clients[server], task, seed=round_number, shown=shown))
            if round_number == 0:
                console.print()
        after, busy = _drafted(ours), None
        results.append(Result(task, answers[stock], answers[ours], after[0] - before[0], after[1] - before[1]))
        before = after
    return results


def _ask(console: Console, client: httpx.Client, task: Task, seed: int, shown: bool) -> StreamedAnswer:
    def write(text: str) -> None:
        console.print(text, style="green", markup=False, highlight=False, end="")
        console.file.flush()

    sampling = {"max_tokens": MAX_TOKENS, "temperature": task.temperature, "seed": seed, "ignore_eos": True}
    return stream_completion(client, "demo", task.prompt, write if shown else None, **sampling)


def _drafted(server: Server) -> tuple[float, float]:
    """Draft tokens that a server has accepted and proposed so far, from its metrics."""
    settle()
    metrics = server.metrics()
    prefix = "vllm_instant:draft_tokens_"
    return metrics.get(f"{prefix}accepted_total", 0.0), metrics.get(f"{prefix}proposed_total", 0.0)


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="vllm-instant beside stock vLLM", box=None, header_style="bold")
    for heading in ("prompt", "server", "first token", "tokens/s", "drafts accepted"):
        table.add_column(heading, justify="left" if heading in ("prompt", "server") else "right", no_wrap=True)
    for result in results:
        stock_speed = _median(answer.tokens_per_second for answer in result.stock)
        speed = _median(answer.tokens_per_second for answer in result.ours)
        share = result.accepted / result.proposed if result.proposed else 0.0
        table.add_row(
            result.task.title,
            "stock",
            f"{_median(a.ttft for a in result.stock) * 1000:.0f} ms",
            f"{stock_speed:.1f}",
            "-",
        )
        table.add_row(
            "",
            "vllm-instant",
            f"{_median(a.ttft for a in result.ours) * 1000:.0f} ms",
            f"{speed:.1f} ({speed / stock_speed:.2f}×)",
            f"{result.accepted:.0f} of {result.proposed:.0f} ({share:.0%})",
        )
    return table


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)
