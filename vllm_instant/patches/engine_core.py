"""Methods of the engine core that the API server calls: metrics, decisions, pinned prefixes and drafts of clients."""

from __future__ import annotations

from typing import Any

from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.moe_reports import REPORT
from vllm_instant.patches.names import ENGINE_CORE

METHOD = "instant_totals"
DECISIONS_METHOD = "instant_decisions"
HOLD_METHOD = "instant_hold"
LET_GO_METHOD = "instant_let_go"
PUSH_METHOD = "instant_push_drafts"


def instant_totals(self: Any) -> dict[str, Any]:
    """Totals since start: ``speculation``, ``batching``, ``experts`` (or None each) and ``failures`` of plugins."""
    of_scheduler = getattr(self.scheduler, "instant_totals", None)
    totals = of_scheduler() if of_scheduler is not None else {"speculation": None, "batching": None, "failures": []}
    experts = getattr(self.scheduler, REPORT, None)
    failures = [*totals["failures"], *(experts["failures"] if experts is not None else ())]
    return totals | {"experts": experts, "failures": failures}


def instant_decisions(self: Any, last: int, request_id: str | None = None, queue: bool = False) -> list[dict[str, Any]]:
    """Why the newest draft budgets (``queue``: admissions) were chosen; empty without a policy that explains itself."""
    decisions = getattr(self.scheduler, "instant_decisions", None)
    return decisions(last, request_id, queue) if decisions is not None else []


def instant_hold(self: Any, name: str, sessions: int, tokens: int, share: float) -> str | None:
    """Let a session pin its prefix (``patches.pinned_prefixes``); returns the reason of a refusal, or None."""
    hold = getattr(self.scheduler, "instant_hold", None)
    return hold(name, sessions, tokens, share) if hold is not None else "the scheduler is not vllm-instant's"


def instant_let_go(self: Any, name: str) -> None:
    """Unpin the prefix of a session."""
    unpin = getattr(self.scheduler, "instant_let_go", None)
    if unpin is not None:
        unpin(name)


def instant_push_drafts(self: Any, pushed: dict[str, Any]) -> None:
    """Take drafts that clients send for their own requests, by key (``patches.client_drafts``)."""
    push = getattr(self.scheduler, "instant_push_drafts", None)
    if push is not None:
        push(pushed)


def _extend(module: Any) -> None:
    """Add the methods that the API server calls."""
    setattr(module.EngineCore, METHOD, instant_totals)
    setattr(module.EngineCore, DECISIONS_METHOD, instant_decisions)
    setattr(module.EngineCore, HOLD_METHOD, instant_hold)
    setattr(module.EngineCore, LET_GO_METHOD, instant_let_go)
    setattr(module.EngineCore, PUSH_METHOD, instant_push_drafts)


def _post_step(post_step: Any, core: Any, model_executed: bool) -> None:
    """Skip fetching drafts, a round trip to the workers, in steps without any."""
    if not getattr(core.scheduler, "instant_nothing_to_draft", False):
        post_step(model_executed)


def _handle_shutdown(handle: Any, core: Any) -> bool:
    """Save before the engine core's loop ends: after it, the next signal kills the process.

    Servers are often stopped by two signals: one to the process group, and one from the front end to its children.
    """
    continues: bool = handle()
    if not continues:
        _close(core)
    return continues


def _shutdown(shutdown: Any, core: Any) -> None:
    """Save where the engine runs in the user's own process, without such a loop."""
    _close(core)
    shutdown()


def _close(core: Any) -> None:
    """Let the policies save their state, once."""
    close = getattr(core.scheduler, "instant_close", None)
    if close is not None and not getattr(core, "instant_closed", False):
        core.instant_closed = True
        close()


PATCH = VllmPatch(
    name="engine_core",
    purpose="numbers for the metrics, reasons for decisions, saved state of policies",
    requirements=(
        HasSignature("v1/engine/core.py", "EngineCore.post_step", ("self", "model_executed"), exact=True),
        HasSignature("v1/engine/core.py", "EngineCore.shutdown", ("self",), exact=True),
        HasSignature("v1/engine/core.py", "EngineCoreProc._handle_shutdown", ("self",), exact=True),
        References("v1/engine/core.py", "EngineCore.__init__", ("scheduler", "model_executor")),
        HasSignature("v1/engine/core_client.py", "AsyncMPClient.call_utility_all_async", ("self", "method")),
    ),
    optional=True,
    wraps={
        f"{ENGINE_CORE}:EngineCore.post_step": _post_step,
        f"{ENGINE_CORE}:EngineCore.shutdown": _shutdown,
        f"{ENGINE_CORE}:EngineCoreProc._handle_shutdown": _handle_shutdown,
    },
    on_import={ENGINE_CORE: _extend},
)
