"""``vllm-instant loadtest capacity``: the highest rate at which goals hold, of one server or of several."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_instant.deployment.secrets import masked_words
from vllm_instant.tools.cli.common import Overrides, fail, print_columns, require, working
from vllm_instant.tools.cli.loadtest_servers import PACKAGES, scenario_addresses
from vllm_instant.tools.measure.servers import START_TIMEOUT, ServerError, terminable

if TYPE_CHECKING:
    from vllm_instant_loadtests.capacity import CapacityAnalysis


def capacity(
    scenario: Annotated[
        str, typer.Argument(help="Scenario whose requests are sent, at other rates: a TOML file or a built-in one.")
    ] = "steady",
    goals: Annotated[
        list[str] | None,
        typer.Option(
            "--goal",
            metavar="METRIC_pPERCENT_ms=LIMIT",
            help="Goal, for example ttft_p95_ms=500; of ttft, answer, itl, e2e, stall. Repeatable.",
        ),
    ] = None,
    attain: Annotated[float, typer.Option(help="Share of requests that should be within all limits at once.")] = 0.95,
    urls: Annotated[
        list[str] | None,
        typer.Option("--url", metavar="NAME=URL", help="Address of a running server; repeatable: probed in turn."),
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
        Path, typer.Option(help="Folder of the recording; the same command continues an unfinished search in it.")
    ] = Path("loadtest-capacity"),
    precision: Annotated[float, typer.Option(help="Half width of the 95 % interval at which a search ends.")] = 0.10,
    probe_seconds: Annotated[
        float, typer.Option(min=1, help="Seconds of each probe that count; a quarter more comes before.")
    ] = 20.0,
    max_probes: Annotated[int, typer.Option(min=1, help="Maximum number of probes per server.")] = 40,
    max_minutes: Annotated[
        float | None, typer.Option(help="Time after which no further probe begins; continue with the same command.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="RATE,RATE,…", help="Probe these rates, once each, instead of searching.")
    ] = None,
    otlp: Annotated[
        str | None, typer.Option(metavar="URL", help="Send the results to this OpenTelemetry collector (OTLP, HTTP).")
    ] = None,
    seed: Annotated[str, typer.Option(help="Seed of prompts and arrivals.")] = "0",
    processes: Annotated[int, typer.Option(min=1, help="Number of processes that send the load.")] = 1,
    web_port: Annotated[int | None, typer.Option(help="Port on 127.0.0.1 for Locust's page during the search.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="API key of the servers; the variable VLLM_API_KEY by default.")
    ] = None,
    start_timeout: Annotated[
        float,
        typer.Option(min=1, help="Seconds without a new line in a server's log after which its start has failed."),
    ] = START_TIMEOUT,
) -> None:
    """Find the highest rate at which goals hold, with a 95 % interval, by probes whose rates gather around it.

    Several servers are probed in turn and compared: "ours carries 1.3× [1.2, 1.4] of vllm". Writes capacity.html,
    capacity.json and junit.xml; the exit code is 1 where no capacity was found or an interval is still too wide.
    """
    require("loadtest", PACKAGES, extra="loadtest")
    from vllm_instant_loadtests import scenario as scenarios
    from vllm_instant_loadtests.capacity import CapacityPlan, offered_rate
    from vllm_instant_loadtests.capacity_goals import GoalError
    from vllm_instant_loadtests.launcher import LoadTestError, LocustCommand, run_locust
    from vllm_instant_loadtests.otlp import ExportError

    try:
        plan = CapacityPlan(goals or [], attain, precision, probe_seconds, max_probes, _rates(sweep))
        played = scenarios.load(scenario)
        offered_rate(played)
        with ExitStack() as stack:
            stack.enter_context(terminable())
            servers, deployments = scenario_addresses(
                stack, played, urls or [], model, config, overrides or [], output, start_timeout
            )
            load = LocustCommand(
                scenario, servers, deployments, output, seed, processes=processes, web_port=web_port, api_key=api_key
            )
            load = replace(load, capacity=plan, max_seconds=60 * (max_minutes or 0))
            with working(f"{played.title}: probing {' and '.join(servers)}"):
                run_locust(load, shlex.join(["vllm-instant", *masked_words(sys.argv[1:])]))
        raise typer.Exit(judge_capacity(output, otlp))
    except (scenarios.ScenarioError, GoalError, LoadTestError, ServerError, ExportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("vllm-instant: interrupted; the same command continues the search", file=sys.stderr)
        raise typer.Exit(130) from None


def judge_capacity(folder: Path, collector: str | None = None) -> int:
    """Print, write and send the analysis of a recorded search; returns the exit code."""
    from vllm_instant_loadtests import capacity_report, otlp
    from vllm_instant_loadtests.capacity import analyse_capacity
    from vllm_instant_loadtests.run_recorder import RecordedRun

    analysis = analyse_capacity(RecordedRun.read(folder))
    if not analysis.servers:
        fail(f"{folder} has a search without a single probe: {folder / 'locust.log'} may say why")
    show_capacity(analysis)
    capacity_report.write(analysis, folder)
    print(f"wrote {folder / 'capacity.html'}, capacity.json and junit.xml")
    if collector is not None:
        scenario = str((analysis.about.get("scenario") or {}).get("name", ""))
        print(f"sent {otlp.send(otlp.capacity_measurements(analysis), collector, scenario)} values to {collector}")
    return 0 if analysis.met else 1


def show_capacity(analysis: CapacityAnalysis) -> None:
    """Print the probes of every server and what follows from them."""
    names = [goal.name for goal in analysis.plan.share_goals]
    rows = []
    for server in analysis.servers:
        for probe in sorted(server.probes, key=lambda probe: probe.rate):
            shares = [
                f"{probe.counts[name][0] / probe.counts[name][1]:.1%}" if name in probe.counts else "–"
                for name in names
            ]
            early = "ended early" if probe.stopped else ""
            counted = f"{probe.rate:.3g}", str(probe.requests), f"{probe.goodput:.3g}"
            rows.append((server.server, *counted, f"{probe.in_progress:.1f}", *shares, early))
    print_columns(("", "rate", "requests", "goodput", "in progress", *names, ""), rows)
    print(analysis.summary())


def _rates(text: str | None) -> list[float]:
    from vllm_instant_loadtests.capacity_goals import GoalError

    try:
        return [float(word) for word in text.split(",")] if text else []
    except ValueError:
        raise GoalError(f"--sweep {text} should be rates, separated by commas: 1,2,4") from None
