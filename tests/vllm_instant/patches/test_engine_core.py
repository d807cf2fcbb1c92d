"""When an engine core lets its policies keep what they learned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from patch_harness import wrap

from vllm_instant.patches import engine_core
from vllm_instant.patches.names import ENGINE_CORE


@pytest.fixture
def module():
    """As much of vLLM's module as the patch changes; what happens is noted in ``happened``."""
    happened: list[str] = []

    class EngineCore:
        def __init__(self, left=0):
            self.left = left
            self.scheduler = SimpleNamespace(instant_close=lambda: happened.append("kept"))

        def post_step(self, model_executed):
            happened.append("drafts fetched")

        def shutdown(self):
            happened.append("shut down")

    class EngineCoreProc(EngineCore):
        def _handle_shutdown(self):
            self.left -= 1
            return self.left >= 0

    module = wrap(engine_core.PATCH, ENGINE_CORE, EngineCore=EngineCore, EngineCoreProc=EngineCoreProc)
    module.happened = happened
    return module


def test_what_was_learned_is_kept_while_signals_are_still_handled(module):
    """After its loop vLLM gives signals back to the system, and the next one kills."""
    core = module.EngineCoreProc(left=2)
    while core._handle_shutdown():
        assert module.happened == []
    assert module.happened == ["kept"]
    core.shutdown()
    assert module.happened == ["kept", "shut down"]


def test_an_engine_without_a_loop_keeps_it_too(module):
    core = module.EngineCore()
    core.shutdown()
    core.shutdown()
    assert module.happened == ["kept", "shut down", "shut down"]


def test_a_scheduler_that_is_not_ours_is_left_alone(module):
    core = module.EngineCoreProc()
    core.scheduler = object()
    assert core._handle_shutdown() is False
    core.shutdown()
    assert module.happened == ["shut down"]


def test_drafts_are_not_fetched_where_nothing_was_drafted(module):
    core = module.EngineCore()
    core.post_step(True)
    core.scheduler.instant_nothing_to_draft = True
    core.post_step(True)
    assert module.happened == ["drafts fetched"]
