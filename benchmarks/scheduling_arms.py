"""A batching plugin for ``scheduling.py``: one server that serves all arms in turn.

Each request names its arm in ``vllm_xargs``. Arms do not overlap in time, so that the newest request's arm is the
server's. What ``similarity`` learns stays between its turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_instant import (
    Admission,
    Plugin,
    PluginContext,
    PluginOptions,
    RequestState,
    SchedulerSnapshot,
    SchedulingPolicy,
    hookimpl,
)
from vllm_instant_plugins.similarity.plugin import warm_up
from vllm_instant_plugins.similarity.policy import SimilarityPolicy

ARM_KEY = "benchmark_arm"


class FcfsSimulation(SchedulingPolicy):
    """vLLM's own order."""

    def admit(self, moment: SchedulerSnapshot) -> Admission:
        """As they came."""
        return Admission()


class StaticBatches(SchedulingPolicy):
    """A batch starts when the one before it is done."""

    def admit(self, moment: SchedulerSnapshot) -> Admission:
        """No request starts while another one runs."""
        return Admission(max_num_admitted=0 if moment.running else None)


class Arms(SchedulingPolicy):
    """Does what the policy of the newest request's arm does."""

    def __init__(self, slots: int) -> None:
        self.policies: dict[str, SchedulingPolicy] = {
            "fcfs": FcfsSimulation(),
            "static": StaticBatches(),
            "similarity": SimilarityPolicy(slots),
            "similarity, told": SimilarityPolicy(slots),
        }
        self.arm = "fcfs"

    def enter(self, request: RequestState) -> None:
        """Its arm is the server's from now on."""
        self.arm = str(request.extra_args.get(ARM_KEY, "fcfs"))
        self.policies[self.arm].enter(request)

    def admit(self, moment: SchedulerSnapshot) -> Admission:
        """Passed on."""
        return self.policies[self.arm].admit(moment)

    def started(self, request: RequestState, now: float) -> None:
        """Passed on."""
        self.policies[self.arm].started(request, now)

    def preempted(self, request: RequestState, now: float) -> None:
        """Passed on."""
        self.policies[self.arm].preempted(request, now)

    def finished(self, request: RequestState, now: float, complete: bool) -> None:
        """Passed on."""
        self.policies[self.arm].finished(request, now, complete)

    def preemption_order(self, running: Sequence[RequestState]) -> Sequence[int] | None:
        """Passed on."""
        return self.policies[self.arm].preemption_order(running)

    def background_work(self, moment: SchedulerSnapshot) -> None:
        """Passed on."""
        self.policies[self.arm].background_work(moment)

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """Those of the newest request's arm."""
        return self.policies[self.arm].decisions(last, request_id)

    def metrics(self) -> Mapping[str, float]:
        """What ``similarity`` measures of itself."""
        return self.policies["similarity"].metrics()


def _build(options: Any, context: PluginContext) -> Arms:
    warm_up()
    return Arms(context.max_num_seqs)


@hookimpl
def instant_plugins() -> Iterable[Plugin]:
    """The arms, for the benchmark's deployment."""
    return [Plugin(slot="batching", name="arms", summary="benchmark", options=PluginOptions, build=_build)]
