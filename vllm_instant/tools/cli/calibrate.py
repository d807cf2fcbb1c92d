"""``vllm-instant calibrate``: learn what steps cost before the first user comes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_instant.deployment.settings import resolve
from vllm_instant.tools.cli.common import Overrides, fail, problems_reported, require_vllm
from vllm_instant.tools.measure.closed_loop import PromptSpec, run_closed_loop
from vllm_instant.tools.measure.servers import Server, ServerError, terminable

SECONDS = 6.0


def calibrate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model, as for vllm serve.")],
    config: Annotated[Path | None, typer.Option("--instant-config", "--config", help="The deployment file.")] = None,
    overrides: Overrides = None,
    most: Annotated[int | None, typer.Option(help="Largest number of concurrent requests to measure.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of load for each number of requests.")] = SECONDS,
) -> None:
    """Start a server with the deployment, load it, and keep what steps cost for the servers that come after it.

    Further words are passed to `vllm serve`; give the same ones as in production: what is learned is kept for this
    device, model, dtype, vLLM version, drafter and parallelism. Takes about as long as starting the server and six
    seconds for each of 1, 2, 4, 8, … requests.
    """
    require_vllm("calibrate")
    console = Console()
    with problems_reported():
        deployment = resolve(config, overrides or [])
        choice = deployment.slots["speculation"]
        if choice.plugin != "goodput":
            fail(f'[speculation] plugin = "{choice.plugin}" learns no costs; only goodput does')
        if not choice.options.get("keep_costs", True):
            fail("[speculation] keep_costs = false: what is learned would be lost")
        largest = most or int(deployment.vllm.get("max_num_seqs", 32))
    settings = [f"--instant-set={override}" for override in overrides or []]
    if config is not None:
        settings += ["--instant-config", str(config)]
    levels = [1]
    while levels[-1] * 2 <= largest:
        levels.append(levels[-1] * 2)
    with terminable(), tempfile.TemporaryDirectory(prefix="vllm-instant-calibrate-") as folder:
        server = Server(
            model,
            [*context.args, "--plugins", "vllm_instant", *settings, "--instant-set", "speculation.calibrating=true"],
            log=Path(folder) / "server.log",
        )
        try:
            with console.status(f"Starting {model} …"):
                server.launch()
                server.wait()
            served = server.served_model()
            for level in levels:
                with console.status(f"{level} concurrent requests, {seconds:.0f} s …"):
                    measured = run_closed_loop(server.url, served, _prompts(), concurrency=level, seconds=seconds)
                if measured.errors:
                    fail(f"the server refuses the load: {measured.errors[0]}")
                console.print(f"{level:4} concurrent requests: {measured.tokens_per_second:.0f} tokens/s while trying")
            totals = server.metrics()
        except ServerError as error:
            print(f"vllm-instant: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        finally:
            server.stop()
    steps = int(totals.get("vllm_instant:planned_steps_total", 0))
    if not totals.get("vllm_instant:draft_tokens_proposed_total"):
        fail("the server drafted nothing: it needs a drafter ([drafter], or speculative_config)")
    console.print(f"Learned from {steps} steps; the next server of this deployment starts with it.")


def _prompts() -> list[PromptSpec]:
    words = "the cache of a server keeps what it has seen while a request waits for its turn to be read again"
    spoken = words.split()
    prompts = []
    for i in range(64):
        text = " ".join(spoken[(i * 7 + j * (i % 5 + 1)) % len(spoken)] for j in range(24))
        prompts.append(PromptSpec(text, i % 2 * 1.0))
    return prompts
