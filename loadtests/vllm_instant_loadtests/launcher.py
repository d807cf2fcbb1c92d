"""Starts the servers of a scenario and Locust in a process of its own, and waits for the end of the run.

Locust is never imported here: importing it replaces sockets and locks of the whole process by gevent's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_instant import Deployment
from vllm_instant.deployment.secrets import masked_words
from vllm_instant.deployment.settings import resolve
from vllm_instant.tools.measure.guarded_process import start_guarded, stop_group
from vllm_instant.tools.measure.servers import START_TIMEOUT, Server, words_of
from vllm_instant_loadtests.capacity import CapacityPlan
from vllm_instant_loadtests.scenario import Scenario, ServerSetup

DEMO, SMOLLM2 = "demo", "smollm2"
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_ERROR = re.compile(r"/ERROR/[^:]*: (.*)")


class LoadTestError(Exception):
    """A run cannot be made; the message is one sentence."""


@dataclass(frozen=True)
class LocustCommand:
    """The command line of Locust."""

    scenario: str
    servers: Mapping[str, str]
    """Addresses by name."""
    deployments: Mapping[str, Mapping[str, Any]]
    """``deployment`` and ``instant`` of the servers that were started here, by name."""
    output: Path
    seed: str = "0"
    rate_scale: float = 1.0
    seconds: float | None = None
    together: bool = False
    processes: int = 1
    web_port: int | None = None
    api_key: str | None = None
    capacity: CapacityPlan | None = None
    max_seconds: float = 0.0

    def words(self) -> list[str]:
        """The words of the command line."""
        words = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--only-summary"]
        words += ["--scenario", self.scenario, "--output", str(self.output), "--seed", self.seed]
        words += ["--servers", " ".join(f"{name}={url}" for name, url in self.servers.items())]
        words += ["--rate-scale", str(self.rate_scale), "--duration", str(self.seconds or 0)]
        words += ["--together"] if self.together else []
        words += ["--processes", str(self.processes)] if self.processes > 1 else []
        if self.capacity is not None:
            words += ["--capacity", self.capacity.text(), "--max-seconds", str(self.max_seconds)]
        page = ["--headless"]
        if self.web_port is not None:
            page = ["--autostart", "--autoquit", "0", "--web-host", "127.0.0.1", "--web-port", str(self.web_port)]
        return [*words, *page]


def scenario_servers(
    scenario: Scenario,
    model: str,
    config: Path | None,
    overrides: Sequence[str],
    logs: Path,
    start_timeout: float = START_TIMEOUT,
) -> tuple[dict[str, Server], dict[str, dict[str, Any]]]:
    """The servers that a scenario names, not yet started, and the deployment of each, by name.

    Args:
        scenario: with the servers.
        model: of all servers; ``demo`` is the demo's pair, ``smollm2`` its public chat model.
        config: deployment file; the demo's or the defaults without one.
        overrides: ``TABLE.KEY=VALUE``, over the file.
        logs: folder for their logs.
        start_timeout: seconds without a new line in a log after which a start has failed.

    Raises:
        LoadTestError: when a fixed draft length has no draft model.
        DeploymentError: when the deployment cannot be served.

    """
    overrides = list(overrides)
    if model in (DEMO, SMOLLM2) and not Path(model).exists():
        from vllm_instant.tools.demo import setups

        try:
            demo = setups.embedded() if model == DEMO else setups.real()
        except FileNotFoundError as error:
            raise LoadTestError(str(error)) from None
        model, config = str(demo.model), config or demo.deployment
        overrides = [*demo.overrides, *overrides]
    servers, deployments = {}, {}
    for setup in scenario.servers:
        of_server = [*overrides, *(f"{key}={value}" for key, value in setup.set.items())]
        deployment = resolve(config, of_server)
        words = _ours(setup, scenario, config, of_server) if setup.instant else _baseline(setup, scenario, deployment)
        servers[setup.name] = Server(
            model,
            words,
            log=logs / f"{setup.name}.log",
            environment=dict(scenario.environment),
            start_timeout=start_timeout,
            name=setup.name,
        )
        shown = shlex.join(["vllm", "serve", model, *masked_words(words)])
        for path in (model, deployment.slots["drafter"].options.get("model"), config):
            shown = (
                shown.replace(str(path), Path(path).name) if path else shown
            )  # reports must not name the user's folders
        deployments[setup.name] = {
            "deployment": shown,
            "instant": setup.instant,
        }
    return servers, deployments


def run_locust(load: LocustCommand, command: str) -> None:
    """Make a run; raises LoadTestError with Locust's error message when it fails.

    Args:
        load: the command line.
        command: the user's own command line, for the record.

    """
    load.output.mkdir(parents=True, exist_ok=True)
    if load.capacity is None and (load.output / "run.json").exists():
        raise LoadTestError(f"--output {load.output} has a run already: choose another folder, or --analyse it")
    # Settings of other Locust runs (CI jobs, Kubernetes services) must not change this one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    environment = inherited | {"LOADTEST_COMMAND": command, "LOADTEST_DEPLOYMENTS": json.dumps(load.deployments)}
    if load.api_key:
        environment["VLLM_API_KEY"] = load.api_key
    log = load.output / "locust.log"
    with log.open("w") as file:
        process = start_guarded(load.words(), output=file, environment=environment)
        try:
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)  # Locust records the requests in progress and ends
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            stop_group(process)
            raise
    # Locust exits with 1 where requests failed; whether the load test has failed is decided by its goals.
    if code not in (0, 1) or not (load.output / "run.json").exists():
        errors = _ERROR.findall(log.read_text(errors="replace"))
        raise LoadTestError(errors[-1] if errors else f"Locust ended with exit code {code}: see {log}")


def _ours(setup: ServerSetup, scenario: Scenario, config: Path | None, overrides: Sequence[str]) -> list[str]:
    chosen = ["--instant-config", str(config)] if config is not None else []
    settings = [f"--instant-set={override}" for override in overrides]
    words = words_of({**scenario.vllm, **setup.vllm})
    return ["--plugins", "vllm_instant", *chosen, *settings, *words]


def _baseline(setup: ServerSetup, scenario: Scenario, deployment: Deployment) -> list[str]:
    shared = {key: value for key, value in deployment.vllm.items() if key not in ("speculative_config", "model")}
    words = words_of({**shared, **scenario.vllm, **setup.vllm})
    if not setup.draft_tokens:
        return words
    draft = deployment.slots["drafter"].options.get("model")
    if not draft:
        raise LoadTestError(
            f"the server {setup.name!r} should have draft_tokens = {setup.draft_tokens}, for which the deployment file "
            'has no draft model: choose [drafter] plugin = "model", or leave draft_tokens out'
        )
    speculation = {
        "method": "draft_model",
        "model": str(draft),
        "num_speculative_tokens": setup.draft_tokens,
        "draft_sample_method": "probabilistic",
    }
    words += ["--speculative-config", json.dumps(speculation)]
    if _on_cpu():
        # vLLM's CPU build samples wrongly with draft tokens (vLLM issue 55005): only vllm-instant's repair is used.
        words += ["--plugins", "vllm_instant", "--instant-set=speculation.plugin=fixed"]
        words += ["--instant-set=rejection_sampler.plugin=native"]
    return words


def _on_cpu() -> bool:
    try:
        return version("vllm").endswith("+cpu")
    except PackageNotFoundError:
        return False
