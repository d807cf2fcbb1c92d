"""Finished requests as rows of Locust's statistics, and so of its web page, its CSV files and its exports.

Locust counts whatever fires ``events.request`` as a request. So one event is fired for a request, with its end-to-end
latency; the other measures are rows beside it, and the totals stay what they say.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant_loadtests.run_recorder import RecordedRequest


class RequestFailedError(Exception):
    """How Locust is told of a failure."""


def report(environment: Any, request: RecordedRequest) -> None:
    """Add a request to the statistics of this process.

    Rows, in Locust's columns for milliseconds: ``E2E`` (one a request; failures count here), ``TTFT``, ``ITL`` (one
    entry a token: tokens that arrive together share the time since those before), ``stall`` (the longest time without
    a token) and ``tokens/s`` (tokens a second, not milliseconds). All but ITL count from when the request was due.
    """
    name = f"{request.server}: {request.kind}" if request.server else request.kind
    if not request.left:
        environment.events.request.fire(
            request_type="E2E",
            name=name,
            response_time=(request.ended - request.due) * 1e3,
            response_length=request.tokens,
            exception=RequestFailedError(request.error) if request.error else None,
            context={"loadtest": request},
        )
    if not request.arrivals:
        return
    statistics = environment.stats
    statistics.get(name, "TTFT").log(request.ttft * 1e3, 0)
    times, totals = np.array(request.arrivals).T
    if len(times) > 1:
        gaps, tokens = np.diff(times), np.diff(totals)
        statistics.get(name, "stall").log(float(gaps.max()) * 1e3, 0)
        between = statistics.get(name, "ITL")
        for latency in np.repeat(gaps / tokens, tokens.astype(int)):
            between.log(float(latency) * 1e3, 0)
        statistics.get(name, "tokens/s").log(float(tokens.sum() / gaps.sum()), 0)
