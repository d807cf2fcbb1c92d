"""The demo: a baseline server and ours, the same prompts through both, and a table."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from vllm_instant.tools.demo.setups import DemoSetup, Task, chosen
from vllm_instant.tools.measure.environment_info import device
from vllm_instant.tools.measure.http_client import sync_client
from vllm_instant.tools.measure.servers import Server, ServerError, settle, start_all, stop_all, terminable
from vllm_instant.tools.measure.streaming_client import TIMEOUT_SECONDS, stream_completion
from vllm_instant.tools.measure.token_stream import StreamedAnswer

ROUNDS = 2
MAX_TOKENS = 160
ROUNDING = (
    "Steps that verify drafts have larger matrices, which bfloat16 rounds differently: of two tokens that are almost "
    "equally likely, the other one may be chosen. With --dtype float32 the answers are the same."
)


def compare(is_embedded: bool = False, dtype: str = "") -> int:
    """Run the whole demo; returns the exit code.

    Args:
        is_embedded: use the repository's own models, which also stand in for the public one where it is missing.
        dtype: number format of both servers; the model's own by default.

    """
    console = Console()
    try:
        with terminable(), tempfile.TemporaryDirectory(prefix="vllm-instant-demo-") as logs:
            setup = _prepare(console, is_embedded, dtype)
            stock = Server(setup.model, setup.baseline_arguments(), log=Path(logs) / "stock.log")
            ours = Server(setup.model, setup.our_arguments(), log=Path(logs) / "instant.log")
            try:
                _start(console, {"vLLM": stock, "vLLM with vllm-instant": ours})
                results = converse(console, setup.tasks, stock, ours)
            finally:
                with console.status("Stopping both servers …"):
                    stop_all(stock, ours)
            console.print(_table(results))
            console.print(conditions(setup, ROUNDS))
            if not dtype and any(result.equal < len(result.ours) for result in results):
                console.print(ROUNDING)
    except KeyboardInterrupt:
        console.print("Interrupted; both servers are stopped.")
        return 130
    except (ServerError, FileNotFoundError, ValueError) as error:
        console.print(f"vllm-instant: {error}", markup=False, style="red")
        return 1
    return 0


def serve(port: int, is_embedded: bool = False) -> int:
    """Replace this process by a server with the demo's deployment file."""
    console = Console()
    try:
        setup = _prepare(console, is_embedded)
    except (FileNotFoundError, ValueError) as error:
        console.print(f"vllm-instant: {error}", markup=False, style="red")
        return 1
    server = Server(setup.model, setup.our_arguments(), log=Path(os.devnull))
    server.port = port
    from vllm_instant.tools.measure.servers import serving_environment

    console.print(f"Serving on {server.url}/v1 as model 'demo'; Ctrl-C stops it.\n  {' '.join(server.command)}")
    os.execve(server.command[0], server.command, serving_environment())  # noqa: S606  ours becomes the server


def _prepare(console: Console, is_embedded: bool, dtype: str = "") -> DemoSetup:
    with console.status("Preparing the model (converting it the first time) …"):
        setup, note = chosen(is_embedded, dtype)
    if note:
        console.print(note, markup=False, highlight=False)
    return setup


def _start(console: Console, servers: dict[str, Server]) -> None:
    for name, server in servers.items():
        server.name = name
    with console.status("") as status:
        start_all(*servers.values(), say=status.update)
    for name, server in servers.items():
        console.print(f"{name}: ready after {server.started_in or 0:.0f} s on {server.url}")


@dataclass
class Result:
    """The answers to one kind of prompt."""

    task: Task
    stock: list[StreamedAnswer]
    ours: list[StreamedAnswer]
    accepted: float
    proposed: float

    @property
    def equal(self) -> int:
        """Number of rounds in which both servers gave the same text; they have the same seed."""
        return sum(stock.text == ours.text for stock, ours in zip(self.stock, self.ours, strict=True))


def conditions(setup: DemoSetup, rounds: int) -> str:
    """One paragraph below the table."""
    number_format = f" in {setup.dtype}" if setup.dtype else ""
    return (
        f"Medians of {rounds} alternating rounds of up to {MAX_TOKENS} tokens, one request at a time, the same model "
        f"and flags on both servers{number_format}, on {device()}. {setup.about}"
    )


def converse(
    console: Console, tasks: Sequence[Task], stock: Server, ours: Server, rounds: int = ROUNDS
) -> list[Result]:
    """Send every kind of prompt through both servers, alternating, and print our first answers as they arrive."""
    clients = {server: sync_client(server.url, timeout=TIMEOUT_SECONDS) for server in (stock, ours)}
    for client in clients.values():
        stream_completion(client, "demo", "import os\n", max_tokens=8, temperature=0.0)
    results = []
    before = _drafted(ours)
    busy = None
    for task in tasks:
        console.rule(f"{task.title} (temperature {task.temperature:g})")
        console.print(task.shown or task.prompt, style="dim", markup=False, highlight=False, end="")
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

    sampling = {"max_tokens": MAX_TOKENS, "temperature": task.temperature, "seed": seed, **task.parameters}
    return stream_completion(client, "demo", task.prompt, write if shown else None, **sampling)


def _drafted(server: Server) -> tuple[float, float]:
    """Draft tokens that a server has accepted and proposed so far, from its metrics."""
    settle()
    metrics = server.metrics()
    prefix = "vllm_instant:draft_tokens_"
    return metrics.get(f"{prefix}accepted_total", 0.0), metrics.get(f"{prefix}proposed_total", 0.0)


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="vllm-instant beside vLLM alone", box=None, header_style="bold")
    for heading in ("prompt", "server", "first token", "tokens/s", "drafts accepted", "same answer"):
        table.add_column(heading, justify="left" if heading in ("prompt", "server") else "right", no_wrap=True)
    for result in results:
        stock_speed = _median(answer.tokens_per_second for answer in result.stock)
        speed = _median(answer.tokens_per_second for answer in result.ours)
        share = result.accepted / result.proposed if result.proposed else 0.0
        table.add_row(
            result.task.title,
            "vLLM",
            f"{_median(a.ttft for a in result.stock) * 1000:.0f} ms",
            f"{stock_speed:.1f}",
            "-",
            "-",
        )
        table.add_row(
            "",
            "vllm-instant",
            f"{_median(a.ttft for a in result.ours) * 1000:.0f} ms",
            f"{speed:.1f} ({speed / stock_speed:.2f}×)",
            f"{result.accepted:.0f} of {result.proposed:.0f} ({share:.0%})",
            f"{result.equal} of {len(result.ours)}",
        )
    return table


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)
