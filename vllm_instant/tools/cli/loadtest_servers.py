"""The servers of a load test: addresses that the user gives, or servers that are started."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_instant.tools.cli.common import problems_reported, require_vllm, working
from vllm_instant.tools.measure.servers import running

if TYPE_CHECKING:
    from vllm_instant_loadtests.scenario import Scenario

PACKAGES = {"locust": "Locust", "aiohttp": "aiohttp", "geventhttpclient": "geventhttpclient"}
"""Of the extra ``loadtest``, by module."""


def scenario_addresses(
    stack: ExitStack,
    scenario: Scenario,
    urls: Sequence[str],
    model: str,
    config: Path | None,
    overrides: list[str],
    output: Path,
    start_timeout: float,
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Addresses by name, of running servers or of servers that the scenario names, which run until the stack ends."""
    from vllm_instant_loadtests.launcher import LoadTestError, scenario_servers
    from vllm_instant_loadtests.scenario import named_servers

    if urls:
        if config is not None or overrides:
            raise LoadTestError("--instant-config and --instant-set are for servers started here, not for --url")
        return named_servers(" ".join(urls)), {}
    require_vllm("loadtest without --url")
    with problems_reported():
        servers, deployments = scenario_servers(scenario, model, config, overrides, output / "logs", start_timeout)
    with working(f"starting {' and '.join(servers)}") as status:
        stack.enter_context(running(*servers.values(), say=status.update))
    return {name: server.url for name, server in servers.items()}, deployments
