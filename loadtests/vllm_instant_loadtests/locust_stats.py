"""Reports finished requests to Locust's statistics, and thereby to its web page, CSV files and exports.

Locust counts everything that fires ``events.request`` as a request. Therefore one event per request is fired, with its
end-to-end latency; the other metrics are separate rows, and the totals stay correct.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant_loadtests.run_recorder import RecordedRequest


class RequestFailedError(Exception):
    """Marks a failed request in Locust's statistics."""


def report(environment: Any, request: RecordedRequest) -> None:
    """Add a request to the statistics of this process.

    Rows, in Locust's columns for milliseconds: ``E2E`` (one per request; failures count here), ``TTFT``, ``ITL`` (one
    entry per token: tokens that arrive together share the time since the previous arrival), ``stall`` (the longest time
    without a token) and ``tokens/s`` (not milliseconds). E2E and TTFT count from when the request was
    due.
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
