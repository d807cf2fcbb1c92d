"""The options of a load test inside of Locust."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_instant_loadtests.capacity import CapacityPlan
from vllm_instant_loadtests.capacity_goals import GoalError
from vllm_instant_loadtests.scenario import Scenario, ScenarioError, built_in, load, named_servers

DEFAULT_HOST = "http://127.0.0.1:8000"
"""Where `vllm serve` listens by default."""


def add_options(parser: Any) -> None:
    """Add the options of load tests to Locust's command line, environment variables and web page."""
    group = parser.add_argument_group("vllm-instant load tests")

    def add(name: str, variable: str, **more: Any) -> None:
        # Only arguments outside of groups can be left out of the page.
        (parser if "include_in_web_ui" in more else group).add_argument(name, env_var=f"LOADTEST_{variable}", **more)

    names = ", ".join(built_in())
    add("--scenario", "SCENARIO", default="steady", help=f"A TOML file, or one of: {names}.")
    add(
        "--servers",
        "SERVERS",
        default="",
        help="NAME=URL of each server, separated by spaces; the host by default.",
        include_in_web_ui=False,
    )
    add(
        "--output",
        "OUTPUT",
        default="",
        help="Folder of the recording; loadtest-DATE-TIME by default.",
        include_in_web_ui=False,
    )
    # Every client that reaches Locust's page starts runs with the API key of this process.
    parser.set_defaults(web_host=os.environ.get("LOCUST_WEB_HOST", "127.0.0.1"))
    add("--seed", "SEED", default="0", help="Seed of prompts and arrivals.")
    add("--rate-scale", "RATE_SCALE", type=float, default=1.0, help="Multiplies every rate.")
    add(
        "--duration",
        "DURATION",
        type=float,
        default=0.0,
        help="Length of the timeline in seconds; it is stretched to it.",
    )
    add(
        "--together",
        "TOGETHER",
        action="store_true",
        help="Send to all servers at the same time instead of one after the other.",
    )
    add(
        "--closed-loop",
        "CLOSED_LOOP",
        action="store_true",
        help="Locust's users hold the scenario's sessions one after the other, instead of its arrivals.",
        include_in_web_ui=False,
    )
    add(
        "--capacity",
        "CAPACITY",
        default="",
        help="Plan of a capacity search in JSON, as `vllm-instant loadtest capacity` writes it.",
        include_in_web_ui=False,
    )
    add(
        "--max-seconds",
        "MAX_SECONDS",
        type=float,
        default=0.0,
        help="Time after which a capacity search makes no further probe.",
        include_in_web_ui=False,
    )


def of_page(options: argparse.Namespace, given: argparse.Namespace) -> argparse.Namespace:
    """Return the options of a run that the web page may have changed.

    The page takes any field from every client that reaches it. The servers, which are sent the API key, and the files
    that are read and written are those of the command line; a scenario may be another built-in one.

    Args:
        options: Locust's options now.
        given: Those of the command line.

    """
    pinned = {name: getattr(given, name) for name in ("servers", "output", "closed_loop", "capacity", "max_seconds")}
    if options.scenario not in built_in():
        pinned["scenario"] = given.scenario
    return argparse.Namespace(**{**vars(options), **pinned})


@dataclass(frozen=True)
class RunOptions:
    """The options of a run."""

    scenario: Scenario
    servers: dict[str, str]
    """Addresses by server name."""
    seed: str
    trace_speed: float
    output: Path
    capacity: CapacityPlan | None = None
    max_seconds: float = 0.0
    """Time limit of a capacity search; 0 is none."""
    closed_loop: bool = False
    seconds: float = 0.0
    """Duration that was asked for; 0 is the scenario's own, or until the test is stopped in a closed loop."""

    @classmethod
    def of(cls, options: argparse.Namespace, host: str | None) -> RunOptions:
        """The run that Locust's options describe; raises ScenarioError."""
        scenario = load(options.scenario)
        seconds = float(options.duration or 0)
        if float(options.rate_scale) <= 0 or seconds < 0:
            raise ScenarioError("--rate-scale and --duration should be above 0")
        scenario = scenario.scaled(float(options.rate_scale), seconds or None)
        if options.together:
            scenario = scenario.model_copy(
                update={"alternation": scenario.alternation.model_copy(update={"together": True})}
            )
        servers = named_servers(options.servers or host or DEFAULT_HOST)
        if options.closed_loop and len(servers) > 1:
            raise ScenarioError("--closed-loop is for one server: the users of several would share the machine's load")
        output = Path(options.output) if options.output else Path(f"loadtest-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            plan = CapacityPlan.read(options.capacity) if getattr(options, "capacity", "") else None
        except GoalError as error:
            raise ScenarioError(str(error)) from None
        number, free = 2, output
        while plan is None and (free / "run.json").exists():  # a further run from the web page
            free, number = output.with_name(f"{output.name}-{number}"), number + 1
        return cls(
            scenario,
            servers,
            str(options.seed),
            float(options.rate_scale),
            free,
            plan,
            float(options.max_seconds),
            bool(options.closed_loop),
            seconds,
        )
