"""The description of a run, ``run.json`` (see ``run_recorder``)."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import httpx

from vllm_instant.deployment.secrets import masked, masked_words
from vllm_instant.tools.measure.environment_info import environment_info
from vllm_instant.tools.measure.http_client import get
from vllm_instant.tools.measure.server_info import ServerInfo
from vllm_instant_loadtests.run_options import RunOptions
from vllm_instant_loadtests.scenario import Scenario
from vllm_instant_loadtests.schedule import trace_of
from vllm_instant_loadtests.traces import prefix_share

DEPLOYMENTS = "LOADTEST_DEPLOYMENTS"
"""Environment variable with ``deployment`` and ``instant`` of each server, as JSON by name."""


def describe_run(
    options: RunOptions, servers: Mapping[str, ServerInfo], headers: Mapping[str, str], clock: float
) -> dict[str, Any]:
    """The description at the beginning of a run; segments are added while it runs."""
    scenario = options.scenario
    return {
        "scenario": {
            "name": scenario.name,
            "title": scenario.title,
            "description": scenario.description,
            "seconds": scenario.seconds,
            "kinds": [traffic.kind for traffic in scenario.traffic],
        },
        "goals": scenario.goals.model_dump(mode="json", exclude_none=True),
        "servers": [
            {
                "name": name,
                "url": masked(found.url),
                "model": found.model,
                "version": found.version,
                **_deployment(name, found.url, headers),
            }
            for name, found in servers.items()
        ],
        **_trace(scenario),
        "segments": [],
        "together": scenario.alternation.together and len(servers) > 1,
        "seed": options.seed,
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "clock": clock,
        "finished": False,
        "environment_info": environment_info(
            os.environ.get("LOADTEST_COMMAND") or " ".join(["locust", *masked_words(sys.argv[1:])])
        ),
    }


def _trace(scenario: Scenario) -> dict[str, float]:
    """The share of prompt tokens that an endless prefix cache would have, where the scenario replays a trace."""
    for traffic in scenario.traffic:
        recorded = trace_of(scenario, traffic)
        share = prefix_share(recorded, traffic.block_tokens) if recorded is not None else math.nan
        if math.isfinite(share):
            return {"trace_prefix_share": round(share, 6)}
    return {}


def _deployment(name: str, url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """How a server was started, where the launcher knows; otherwise whether it runs vllm-instant."""
    known = json.loads(os.environ.get(DEPLOYMENTS, "{}"))
    if name in known:
        return dict(known[name])
    try:
        answer = get(url, "/v1/instant/deployment", headers=dict(headers))
        ours = answer.status_code == 200
    except httpx.HTTPError:
        ours = False
    return {"deployment": "", "instant": ours}
