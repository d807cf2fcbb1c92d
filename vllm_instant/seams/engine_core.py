"""Numbers out of the engine-core process: a utility method that the API server can call."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vllm_instant import carrier
from vllm_instant.seams.drafter import read_failures
from vllm_instant.seams.import_hooks import when_imported
from vllm_instant.seams.requirements import Function, Mentions, Seam

MODULE = "vllm.v1.engine.core"
METHOD = "instant_totals"


def instant_totals(self: Any) -> dict[str, Any]:
    """Totals since start: ``speculation`` (see SpeculationCounters, or None) and ``failures`` of plugins."""
    totals = getattr(self.scheduler, "instant_totals", None)
    result: dict[str, Any] = totals() if totals is not None else {"speculation": None, "failures": []}
    deployment = carrier.current()
    # Only a drafter that we run can fail in a worker; nobody else's workers are interrupted.
    if deployment is not None and deployment.offer("drafter").plugin.build is not None:
        worst: dict[tuple[str, str, str], int] = {}
        for failures in self.model_executor.collective_rpc(read_failures):
            for failure in failures:
                key = (failure["slot"], failure["plugin"], failure["hook"])
                worst[key] = max(worst.get(key, 0), failure["count"])
        result["failures"] += [
            {"slot": slot, "plugin": plugin, "hook": hook, "count": count}
            for (slot, plugin, hook), count in worst.items()
        ]
    return result


def _add_method(module: ModuleType) -> None:
    setattr(module.EngineCore, METHOD, instant_totals)


def install() -> None:
    """Add the method when the engine core is loaded."""
    when_imported(MODULE, _add_method)


SEAM = Seam(
    name="engine_core",
    purpose="numbers for the metrics",
    requirements=(
        Mentions("v1/engine/core.py", "EngineCore.__init__", ("scheduler", "model_executor")),
        Function("v1/engine/core_client.py", "AsyncMPClient.call_utility_all_async", ("self", "method")),
    ),
    optional=True,
)
