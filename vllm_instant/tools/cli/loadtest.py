"""``vllm-instant loadtest``: sends a scenario's requests to servers, finds latency spikes and names their causes."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_instant.deployment.secrets import masked_words
from vllm_instant.tools.cli.common import Overrides, fail, print_columns, require, working
from vllm_instant.tools.cli.default_command import DefaultCommand, DefaultCommandGroup
from vllm_instant.tools.cli.loadtest_capacity import capacity, judge_capacity
from vllm_instant.tools.cli.loadtest_servers import PACKAGES, scenario_addresses
from vllm_instant.tools.measure.servers import START_TIMEOUT, ServerError, terminable

if TYPE_CHECKING:
    from vllm_instant_loadtests.run_recorder import RecordedRun
    from vllm_instant_loadtests.scenario import Scenario


app = typer.Typer(
    cls=DefaultCommandGroup,
    help="Find latency spikes under load and their causes, or (capacity) the load that goals allow.",
)
app.command(name="capacity")(capacity)


@app.command(
    name=DefaultCommandGroup.default,
    cls=DefaultCommand,
    epilog="`vllm-instant loadtest capacity` finds how much servers carry.",
)
def loadtest(
    scenario: Annotated[
        str | None, typer.Argument(help="Scenario to send: a TOML file, or the name of a built-in one (see --list).")
    ] = None,
    urls: Annotated[
        list[str] | None,
        typer.Option(
            "--url", metavar="NAME=URL", help="Address of a running server; repeatable: several are measured in turn."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="Model to serve without --url; `demo` is the demo's small pair, `smollm2` its chat model."),
    ] = "demo",
    config: Annotated[
        Path | None, typer.Option("--instant-config", "--config", help="Deployment file of the servers started here.")
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder for the raw run and the reports; loadtest-NAME-DATE by default.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=1, help="Length of the scenario in seconds; its own by default.")
    ] = None,
    rate_scale: Annotated[float, typer.Option(min=0.001, help="Factor on every rate.")] = 1.0,
    seed: Annotated[str, typer.Option(help="Seed of prompts and arrivals.")] = "0",
    together: Annotated[
        bool, typer.Option("--together", help="Send to all servers at the same time, not in turn.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes that send the load.")] = 1,
    web_port: Annotated[int | None, typer.Option(help="Port on 127.0.0.1 for Locust's page during the run.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="API key of the servers; the variable VLLM_API_KEY by default.")
    ] = None,
    start_timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds without a new line in a server's log after which its start has failed."),
    ] = START_TIMEOUT,
    analyse: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Analyse this recorded run again; nothing is sent.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Earlier run of the same scenario and seed; exit code 1 if it was better."),
    ] = None,
    otlp: Annotated[
        str | None, typer.Option(metavar="URL", help="Send the results to this OpenTelemetry collector (OTLP, HTTP).")
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Show the built-in scenarios.")] = False,
) -> None:
    """Send a scenario's requests when they are due, find windows with latency spikes, and name their causes.

    With --url requests go to running servers, else the servers of the scenario are started: vLLM alone and yours.
    Several servers play the scenario in turn, a part at a time, with the same prompts. Writes report.html, report.json
    and junit.xml; the exit code is 1 where a goal of the scenario is missed.
    """
    require("loadtest", PACKAGES, extra="loadtest")
    from vllm_instant_loadtests import scenario as scenarios
    from vllm_instant_loadtests.compare import BaselineError
    from vllm_instant_loadtests.launcher import LoadTestError, LocustCommand, run_locust
    from vllm_instant_loadtests.otlp import ExportError

    if list_them:
        names = scenarios.built_in()
        print_columns(("scenario", "seconds", "what"), [_row(name, scenarios.load(name)) for name in names])
        return
    try:
        if analyse is None:
            if scenario is None:
                raise LoadTestError("give a SCENARIO: a file or one of --list; or --analyse FOLDER for a recorded run")
            played = scenarios.load(scenario).scaled(rate_scale, duration)
            analyse = output or Path(f"loadtest-{played.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            with ExitStack() as stack:
                stack.enter_context(terminable())
                servers, deployments = scenario_addresses(
                    stack, played, urls or [], model, config, overrides or [], analyse, start_timeout
                )
                load = LocustCommand(
                    scenario=scenario,
                    servers=servers,
                    deployments=deployments,
                    output=analyse,
                    seed=seed,
                    rate_scale=rate_scale,
                    seconds=duration,
                    together=together,
                    processes=processes,
                    web_port=web_port,
                    api_key=api_key,
                )
                seconds = played.seconds * (1 if together else len(servers))
                with working(f"{played.title}: {seconds:.0f} s and a little"):
                    run_locust(load, shlex.join(["vllm-instant", *masked_words(sys.argv[1:])]))
        elif scenario is not None:
            raise LoadTestError(f"--analyse {analyse} judges a recorded run and takes no scenario ({scenario})")
        raise typer.Exit(_judge(analyse, baseline, otlp))
    except (scenarios.ScenarioError, LoadTestError, ServerError, BaselineError, ExportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("vllm-instant: interrupted; what was recorded is kept", file=sys.stderr)
        raise typer.Exit(130) from None


def _judge(folder: Path, baseline: Path | None, collector: str | None) -> int:
    """Print, write and send the analysis of a recorded run; returns the exit code."""
    from vllm_instant_loadtests import otlp, report
    from vllm_instant_loadtests.analysis import analyse_run

    run, before = _recorded(folder), _recorded(baseline) if baseline is not None else None
    if "capacity" in run.about:
        return judge_capacity(folder, collector)
    if not run.requests:
        fail(f"{folder} has a run without a single request: {folder / 'locust.log'} may say why")
    with working("looking for spikes"):
        analysis = analyse_run(run, baseline=before)
    plain = analysis.plain()
    print_columns(_PERCENTILES, [_percentiles(server) for server in plain["servers"]])
    for comparison in plain["comparisons"]:
        print_columns(
            ("", comparison["theirs"], comparison["ours"], "ratio [95 %]", "verdict"),
            [_compared(row, comparison["ours"], comparison["theirs"]) for row in comparison["rows"]],
        )
    print(analysis.summary())
    if not run.about.get("finished", True):
        print("The run was interrupted: this is about what was recorded until then.")
    report.write_html(analysis, run, folder / "report.html")
    report.write_json(analysis, folder / "report.json")
    report.write_junit(analysis, folder / "junit.xml")
    print(f"wrote {folder / 'report.html'}, report.json and junit.xml")
    if collector is not None:
        count = otlp.send(otlp.run_measurements(analysis), collector, str(run.about["scenario"]["name"]))
        print(f"sent {count} values to {collector}")
    return 0 if analysis.met else 1


def _recorded(folder: Path) -> RecordedRun:
    from vllm_instant_loadtests.run_recorder import RecordedRun

    try:
        return RecordedRun.read(folder)
    except FileNotFoundError:
        fail(f"{folder} has no recorded run: there is no run.json in it")


_PERCENTILES = ("ms, p50 / p99", "requests", "failed", "TTFT", "ITL", "longest stall", "E2E", "tokens/s")


def _percentiles(server: dict[str, Any]) -> tuple[str, ...]:
    found = server["milliseconds"]
    both = [
        f"{found[name]['p50']:.0f} / {found[name]['p99']:.0f}" if name in found else "–"
        for name in ("ttft", "itl", "stall", "e2e")
    ]
    speed = server["tokens_per_second"]
    counts = str(server["requests"]), str(server["failed"])
    return server["server"], *counts, *both, "–" if speed is None else f"{speed:.0f}"


def _compared(row: dict[str, Any], ours: str, theirs: str) -> tuple[str, ...]:
    values = ["–" if row[name] is None else f"{row[name]:.1f}" for name in (theirs, ours)]
    effect = row.get("effect")
    shown = f"{effect['mean']:.2f} [{effect['low']:.2f}, {effect['high']:.2f}]" if effect else "–"
    needed = row["rounds_to_decide"]
    reason = row["unsupported_reason"] or (needed and f"about {needed} more rounds would decide")
    verdict = f"{row['verdict']}: {reason}" if reason else row["verdict"]
    return f"{row['name']}, {row['unit']}", *values, shown, verdict


def _row(name: str, scenario: Scenario) -> tuple[str, str, str]:
    return name, f"{scenario.seconds:g}", f"{scenario.title}. {scenario.description}".strip()
