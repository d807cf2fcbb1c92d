"""Numbers and reasons out of the engine-core process, by methods that the API server can call."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.import_hooks import when_imported
from vllm_instant.patches.moe_reports import REPORT

MODULE = "vllm.v1.engine.core"
METHOD = "instant_totals"
DECISIONS_METHOD = "instant_decisions"
HOLD_METHOD = "instant_hold"
LET_GO_METHOD = "instant_let_go"


def instant_totals(self: Any) -> dict[str, Any]:
    """Totals since start: ``speculation``, ``batching``, ``experts`` (or None each) and ``failures`` of plugins."""
    of_scheduler = getattr(self.scheduler, "instant_totals", None)
    totals = of_scheduler() if of_scheduler is not None else {"speculation": None, "batching": None, "failures": []}
    experts = getattr(self.scheduler, REPORT, None)
    failures = [*totals["failures"], *(experts["failures"] if experts is not None else ())]
    return totals | {"experts": experts, "failures": failures}


def instant_decisions(self: Any, last: int, request_id: str | None = None, queue: bool = False) -> list[dict[str, Any]]:
    """Why the newest draft lengths (``queue``: starts) were chosen; empty without a policy that explains itself."""
    decisions = getattr(self.scheduler, "instant_decisions", None)
    return decisions(last, request_id, queue) if decisions is not None else []


def instant_hold(self: Any, name: str, sessions: int, tokens: int, share: float) -> str | None:
    """Let a session hold its prefix (``patches.holding``); returns why not, if not."""
    hold = getattr(self.scheduler, "instant_hold", None)
    return hold(name, sessions, tokens, share) if hold is not None else "the scheduler is not vllm-instant's"


def instant_let_go(self: Any, name: str) -> None:
    """The session holds nothing any more."""
    unpin = getattr(self.scheduler, "instant_let_go", None)
    if unpin is not None:
        unpin(name)


def _change(module: ModuleType) -> None:
    setattr(module.EngineCore, METHOD, instant_totals)
    setattr(module.EngineCore, DECISIONS_METHOD, instant_decisions)
    setattr(module.EngineCore, HOLD_METHOD, instant_hold)
    setattr(module.EngineCore, LET_GO_METHOD, instant_let_go)
    post_step = module.EngineCore.post_step

    @functools.wraps(post_step)
    def post_step_unless_nothing_was_drafted(self: Any, model_executed: bool) -> None:
        # Fetching drafts is a round trip to the workers, which a step without drafts need not pay.
        if not getattr(self.scheduler, "instant_nothing_to_draft", False):
            post_step(self, model_executed)

    module.EngineCore.post_step = post_step_unless_nothing_was_drafted
    handle_shutdown = module.EngineCoreProc._handle_shutdown

    @functools.wraps(handle_shutdown)
    def keep_before_the_loop_ends(self: Any) -> bool:
        # Once the loop has ended, the next signal kills; and whoever stops a server often sends two (to the process
        # group, then the front end to its children).
        goes_on: bool = handle_shutdown(self)
        if not goes_on:
            _close(self)
        return goes_on

    module.EngineCoreProc._handle_shutdown = keep_before_the_loop_ends
    shutdown = module.EngineCore.shutdown

    @functools.wraps(shutdown)
    def shutdown_after_saving(self: Any) -> None:
        # An engine inside the user's own process has no such loop.
        _close(self)
        shutdown(self)

    module.EngineCore.shutdown = shutdown_after_saving


def _close(core: Any) -> None:
    """Let the policies keep what they learned, once."""
    close = getattr(core.scheduler, "instant_close", None)
    if close is not None and not getattr(core, "instant_closed", False):
        core.instant_closed = True
        close()


def install() -> None:
    """Change the engine core when it is loaded."""
    when_imported(MODULE, _change)


PATCH = VllmPatch(
    name="engine_core",
    purpose="numbers for the metrics, reasons for decisions",
    requirements=(
        HasSignature("v1/engine/core.py", "EngineCore.post_step", ("self", "model_executed"), exact=True),
        HasSignature("v1/engine/core.py", "EngineCore.shutdown", ("self",), exact=True),
        HasSignature("v1/engine/core.py", "EngineCoreProc._handle_shutdown", ("self",), exact=True),
        References("v1/engine/core.py", "EngineCore.__init__", ("scheduler", "model_executor")),
        HasSignature("v1/engine/core_client.py", "AsyncMPClient.call_utility_all_async", ("self", "method")),
    ),
    optional=True,
)
