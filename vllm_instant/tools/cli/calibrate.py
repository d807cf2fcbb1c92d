"""``vllm-instant calibrate``: learn what steps cost before the first user comes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.deployment.resolved import installed_plugin, plugin_options
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.tools.cli.common import Overrides, fail, problems_reported, require_vllm, toml_value
from vllm_instant.tools.measure.closed_loop import PromptSpec, run_closed_loop
from vllm_instant.tools.measure.servers import Server, ServerError, terminable

SECONDS = 6.0


def calibrate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model, as for `vllm serve`.")],
    config: Annotated[
        Path | None, typer.Option("--instant-config", "--config", help="Deployment file of the server.")
    ] = None,
    overrides: Overrides = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option("--max-concurrency", "--most", min=1, help="Largest number of concurrent requests to measure."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of load per number of requests.")] = SECONDS,
) -> None:
    """Start a server with the deployment, load it, and store the measured step costs for later servers.

    Further words are passed to `vllm serve`; give the same ones as in production, because the costs are stored for
    this device, model, dtype, vLLM version, drafter and parallelism. It takes the start of a server, and six seconds
    for each of 1, 2, 4, 8, … concurrent requests.
    """
    with problems_reported():
        deployment = resolve(config, overrides or [])
    calibrating = calibration_settings(deployment)
    require_vllm("calibrate")
    console = Console()
    largest = max_concurrency or int(deployment.vllm.get("max_num_seqs", 32))
    settings = [f"--instant-set={override}" for override in [*(overrides or []), *calibrating]]
    if config is not None:
        settings += ["--instant-config", str(config)]
    levels = [2**power for power in range(largest.bit_length())]
    with terminable(), tempfile.TemporaryDirectory(prefix="vllm-instant-calibrate-") as folder:
        arguments = [*context.args, "--plugins", "vllm_instant", *settings]
        server = Server(model, arguments, log=Path(folder) / "server.log")
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
            fail(str(error), exit_code=1)
        finally:
            server.stop()
    steps = int(totals.get("vllm_instant:planned_steps_total", 0))
    if not totals.get("vllm_instant:draft_tokens_proposed_total"):
        fail("the server drafted nothing: it needs a drafter ([drafter], or speculative_config)")
    console.print(f"Learned from {steps} steps; the next server of this deployment starts with it.")


def calibration_settings(deployment: Deployment) -> list[str]:
    """The overrides with which the deployment's plugins measure their costs; ends the command where none does."""
    settings: list[str] = []
    for slot in deployment.slots:
        plugin = installed_plugin(deployment, slot).plugin
        if plugin.calibration_options is None:
            continue
        try:
            options = plugin.calibration_options(plugin_options(deployment, slot))
        except ValueError as error:
            fail(f"[{slot}] {error}")
        settings += [f"{slot}.{key}={toml_value(value)}" for key, value in options.items()]
    if not settings:
        able = [
            f"[{found.plugin.slot}] {found.plugin.name}"
            for found in plugin_manager().installed_plugins()
            if found.plugin.calibration_options is not None
        ]
        fail(f"no plugin of this deployment stores costs; installed plugins that do: {', '.join(able) or 'none'}")
    return settings


def _prompts() -> list[PromptSpec]:
    words = "the cache of a server keeps what it has seen while a request waits for its turn to be read again"
    spoken = words.split()
    prompts = []
    for i in range(64):
        text = " ".join(spoken[(i * 7 + j * (i % 5 + 1)) % len(spoken)] for j in range(24))
        prompts.append(PromptSpec(text, i % 2 * 1.0))
    return prompts
