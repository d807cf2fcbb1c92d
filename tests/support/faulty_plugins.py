"""Plugins of every slot with one hook that misbehaves, and what the engine asks of them, without an engine.

A ``Slot`` drives a guarded plugin through all of its hooks as the engine does and returns what reaches the engine.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from fake_streaming import FakeEngine
from prometheus_client import CollectorRegistry

from vllm_instant import Drafter, SchedulingPolicy, SpeculationPolicy
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.watchdog import SIGNAL, Watchdog
from vllm_instant.escalation.metrics import EscalationMetrics
from vllm_instant.escalation.service import EscalationService
from vllm_instant.guard.metrics import GuardMetrics
from vllm_instant.guard.service import GuardService
from vllm_instant.guard.window import Limits, Window
from vllm_instant.interfaces.drafter import DraftAssignment, DraftRequest, HybridDrafter
from vllm_instant.interfaces.escalation import (
    Decision,
    Depth,
    Escalation,
    EscalationOptions,
    EscalationRequest,
    Question,
)
from vllm_instant.interfaces.experts import ExpertLayer, ExpertRouter, Measurement, StepRows
from vllm_instant.interfaces.guard import Guard, GuardOptions, Late, TextJudge, Verdict
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.scheduling import Admission, SchedulerSnapshot
from vllm_instant.interfaces.speculation import DraftCost, StepOutcome
from vllm_instant.interfaces.streaming import (
    EngineLoad,
    PrefillOutcome,
    PrefillProgress,
    SessionLimits,
    StreamingPrefill,
)
from vllm_instant.moe.router_scoring import RouterScoring
from vllm_instant.patches.drafter import PluginDrafter
from vllm_instant.patches.hybrid_drafting import HybridDraftRunner
from vllm_instant.patches.moe_worker import MoeWorker, ServedLayer
from vllm_instant.patches.rejection_sampler import checked
from vllm_instant.scheduling.admission import AdmissionController
from vllm_instant.scheduling.request_registry import RequestRegistry
from vllm_instant.speculation.draft_budget import DraftBudgetManager
from vllm_instant.speculation.draft_plan import DraftPlan
from vllm_instant.streaming.metrics import StreamingMetrics
from vllm_instant.streaming.session_manager import SessionManager


class Unsendable:
    """An object that no message can carry, and whose text cannot be read either."""

    def __reduce__(self):
        raise TypeError("cannot be pickled")

    def __repr__(self):
        raise RuntimeError("cannot be printed")


class Panic(BaseException):
    """As extensions in Rust raise it."""


def states_of(*names: str) -> list[RequestState]:
    return [
        RequestState(name, 5, 20, 0.0, prompt_token_ids=[1, 2, 3, 4, 5], cache_salt=f"salt {name}") for name in names
    ]


# ------------------------------------------------------------------------------------------------ the slots


def speculation(guarded: GuardedPlugin[Any]) -> Any:
    manager = DraftBudgetManager(guarded, 4)
    states = states_of("a", "b")
    for state in states:
        manager.admit(state)
    manager.step_begins()
    plan = manager.plan_drafts(states)
    manager.step_scheduled(1)
    manager.on_model_executing()
    manager.step_finished(1, states, [1, 1], [1, 0], num_scheduled_tokens=4)
    decisions = manager.decisions(5)
    later = manager.plan_drafts(states)
    for name in ("a", "b"):
        manager.forget(name)
    assert not manager.states
    assert not manager._id_of
    manager.close()
    for found in (plan, later):
        assert list(found.num_draft_tokens) == ["a", "b"]
        assert all(type(n) is int and 0 <= n <= 4 for n in found.num_draft_tokens.values())
        assert found.cache_salts == {"a": "salt a", "b": "salt b"}
        assert all(np.isfinite(getattr(found.draft_cost, name)) for name in ("per_token", "verify_fixed"))
    return plan, later, decisions, manager.totals()


def batching(guarded: GuardedPlugin[Any]) -> Any:
    registry = RequestRegistry()
    controller = AdmissionController(guarded, clock=lambda: 1.0)
    states = states_of("a", "b", "c")
    for state in states:
        registry.admit(state)
        controller.enter(state)
    snapshot = SchedulerSnapshot(list(states), [], 1.0, 4, 1000)
    admission = controller.admit(snapshot)
    assert all(type(place) is int and 0 <= place < 3 for place in admission.order)
    assert admission.max_num_admitted is None or (
        type(admission.max_num_admitted) is int and admission.max_num_admitted
    )
    assert all(type(name) is str for name in admission.request_ids)
    limit = controller.max_prompt_tokens(snapshot)
    assert limit is None or (type(limit) is int and limit > 0)
    order = controller.preemption_order(list(states))
    assert order is None or sorted(order) == [0, 1, 2]
    controller.started(states[0], 0.5)
    controller.preempted(states[0])
    controller.on_model_executing(snapshot)
    controller.observe(StepOutcome(list(states), [1, 1, 1], [1, 1, 0], 6, 0.01))
    controller.finished(states[0], True)
    found = controller.decisions(5), controller.totals()
    for name in ("a", "b", "c"):
        registry.forget(name)
    assert sorted(registry._free_indices) == [0, 1, 2]
    controller.close()
    return admission.request_ids, found


def drafter(guarded: GuardedPlugin[Any]) -> Any:
    adapter = object.__new__(PluginDrafter)
    adapter.drafter, adapter.vocab_size, adapter.max_draft_tokens = guarded, 100, 3
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    before = tokens.copy()
    adapter.begin_step(["a", "b"], np.array([2, 3], np.int32), DraftPlan())
    drafts = adapter.propose([[1], [2]], np.array([4, 5], np.int32), tokens)
    adapter.forget(["a"])
    assert (tokens == before).all()
    assert len(drafts) == 2
    assert all(type(token) is int and 0 <= token < 100 for row in drafts for token in row)
    assert all(len(row) <= 3 for row in drafts)
    return drafts


def hybrid(guarded: GuardedPlugin[Any]) -> Any:
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    before = tokens.copy()
    batch = SimpleNamespace(req_id_to_index={"a": 0, "b": 1}, req_ids=["a", "b"])
    runner = HybridDraftRunner(
        SimpleNamespace(input_batch=batch, _draft_probs=None), guarded, SimpleNamespace(read_tokens=0), 100
    )
    view = tokens.view()
    view.flags.writeable = False
    runner._requests = lambda *_: [DraftRequest(name, view[row, :5], 3, 3) for row, name in enumerate("ab")]
    ran = []

    def model(asked, *_):
        ran.append(asked.num_spec_tokens_to_schedule)
        return [[7] * asked.num_spec_tokens_to_schedule, []]

    drafts = runner.propose(model, SimpleNamespace(), DraftPlan({"a": 3, "b": 3}), (None,))
    runner.forget(["a"])
    assert (tokens == before).all()
    assert ran[0] in (0, 1, 2, 3)
    assert all(type(token) is int and 0 <= token < 100 for row in drafts for token in row)
    return drafts


def rejection_sampler(guarded: GuardedPlugin[Any]) -> Any:
    counts, target = [2, 1], torch.zeros(3, 10)
    step = SimpleNamespace(draft_token_ids=torch.tensor([1, 2, 3]), num_draft_tokens=list(counts), target_logits=target)
    answer = guarded.call("verify", lambda plugin: checked(plugin.verify(step), counts, target), None)
    if answer is not None:
        kept, following = answer
        assert kept.device == following.device == target.device
        assert ((kept >= 0) & (kept <= torch.tensor([2, 1]))).all()
        assert ((following >= 0) & (following < 10)).all()
    return counts


def experts(guarded: GuardedPlugin[Any]) -> Any:
    worker = MoeWorker(guarded, 8, torch.device("cpu"))
    layer = ExpertLayer(0, "layer", 4, 2)
    served = ServedLayer(worker, SimpleNamespace(), layer, RouterScoring("softmax", 2))
    worker.layers = [served]
    worker._counted = torch.zeros(1, 4, dtype=torch.float64)
    worker.by_layer = np.zeros((1, 5))
    rows = StepRows(1, ["a", "b"], np.array([0, 1, 2]), np.array([True, True]), ["", ""], np.array([5, 6]))
    served._fused = lambda *_: None
    logits = torch.arange(8.0).reshape(2, 4)
    weights, picks = torch.ones(2, 2), torch.tensor([[3, 2], [3, 2]], dtype=torch.int32)
    native = sys.modules["vllm_instant.patches.moe_routers"]
    original, native.native = native.native, lambda *_: (weights.clone(), picks.clone())
    try:
        for _ in range(2):
            worker.begin(rows, [0, 0])
            worker.reference_pass(active=True)
            worker.reference_pass(active=False)
            found, chosen = served.route(torch.zeros(2, 4), logits, None)
            assert ((chosen >= 0) & (chosen < 4)).all()
            assert torch.isfinite(found).all()
            worker.finish()
    finally:
        native.native = original
    worker._fused_route_of(served)
    answer = worker.control({"budget": 0.5})
    return worker.described(), answer


def streaming(guarded: GuardedPlugin[Any]) -> Any:
    manager = SessionManager(FakeEngine(), guarded, StreamingMetrics(CollectorRegistry()))
    assert isinstance(manager.limits, SessionLimits)
    manager.leave(manager.enter("me"))
    length = manager.next_chunk(PrefillProgress(100, 0, 16))
    assert type(length) is int
    assert length <= 100
    manager.observe(PrefillOutcome(10, 0.1, EngineLoad(0, 8)))
    delay = manager.speculative_answer_delay()
    assert delay is None or (type(delay) is float and np.isfinite(delay))
    assert type(manager.starts_speculative_answer()) is bool
    assert np.isfinite(manager.max_speculative_answer_seconds())
    return length, delay


def guard(guarded: GuardedPlugin[Any]) -> Any:
    judging = GuardService(guarded, GuardOptions(), GuardMetrics("tested", CollectorRegistry()))
    judging.update_measures()
    judgment = judging.begin("answer", "a", {}, lambda: None)
    judgment.add("some text", (1, 2), is_finished=True)
    assert not judgment.step()
    verdict = judgment.verdict
    assert type(verdict.upto) is int
    assert 0 <= verdict.upto <= 9
    window = Window(Limits(Late.WAIT, 1, 1.0, 1.0))
    window.extend("some text", [4, 9], 0.0)
    window.apply(verdict)
    if judgment.has_failed:
        window.fail()
    window.take(0.0)
    judgment.close()
    return str(verdict.upto)


def escalation(guarded: GuardedPlugin[Any]) -> Any:
    metrics = EscalationMetrics("tested", CollectorRegistry())
    service = EscalationService(guarded, EscalationOptions(), metrics, None)
    asked: list[Any] = []

    async def ask(body: Mapping[str, Any]) -> Mapping[str, Any]:
        asked.append(body)
        return {}

    request = EscalationRequest(request_id="a", path="/v1/completions", body={"prompt": "x"}, prompt="x")
    decision = asyncio.run(service.decide(request, None, ask))
    assert type(decision) is Decision
    assert decision.depth in tuple(Depth)
    return str(decision.depth)


# ------------------------------------------------------------------------------------------------ good answers


class GoodSpeculation(SpeculationPolicy):
    def get_num_draft_tokens(self, step):
        return [2] * len(step.requests)


class GoodBatching(SchedulingPolicy):
    def admit(self, snapshot):
        return Admission([1, 0])

    def max_prompt_tokens(self, snapshot):
        return 100

    def preemption_order(self, running):
        return list(range(len(running)))

    def background_work(self, snapshot):
        return None

    def observe(self, outcome):
        return None


class GoodDrafter(Drafter):
    def propose(self, requests):
        return [[1, 2] for _ in requests]


class GoodHybrid(HybridDrafter):
    def propose(self, requests):
        return [[1] for _ in requests]

    def assign(self, requests, draft_cost):
        return [DraftAssignment((), 2), DraftAssignment((5,), 0)]

    def on_model_drafts(self, drafts):
        return None


class GoodSampler:
    def verify(self, step):
        return torch.tensor([1, 0]), torch.tensor([4, 5])


class GoodExperts(ExpertRouter):
    def prepare(self, layers, max_rows, device):
        return None

    def begin_step(self, rows):
        return True

    def allowed(self, layer, step):
        return torch.tensor([[True, True, False, False]])

    def measurement(self, number):
        return Measurement.COUNTS

    def control(self, settings):
        return {"budget": 0.5}

    def fused_route(self, layer, bias, scale):
        return None


class GoodStreaming(StreamingPrefill):
    def next_chunk(self, progress, load):
        return progress.stable_tokens


class GoodGuard(Guard):
    def begin(self, request):
        return GoodJudge()


class GoodJudge(TextJudge):
    def judge(self, text, token_ids, is_finished):
        return Verdict(len(text))


class GoodEscalation(Escalation):
    def decide(self, request, answer):
        return Question({"prompt": "?"}) if answer is None else Decision(Depth.DEEP, "hard")


Drive = Callable[[GuardedPlugin[Any]], Any]

SLOTS: Mapping[str, tuple[type, Drive, tuple[str, ...]]] = {
    "speculation": (
        GoodSpeculation,
        speculation,
        ("get_num_draft_tokens", "draft_cost", "enter", "observe", "forget", "decisions", "close"),
    ),
    "batching": (
        GoodBatching,
        batching,
        (
            "admit",
            "enter",
            "started",
            "preempted",
            "finished",
            "preemption_order",
            "max_prompt_tokens",
            "background_work",
            "observe",
            "metrics",
            "decisions",
            "close",
        ),
    ),
    "drafter": (GoodDrafter, drafter, ("propose", "forget")),
    "hybrid": (GoodHybrid, hybrid, ("assign", "on_model_drafts", "forget")),
    "rejection_sampler": (GoodSampler, rejection_sampler, ("verify",)),
    "experts": (
        GoodExperts,
        experts,
        ("begin_step", "allowed", "measurement", "observe", "reference_pass", "metrics", "control", "fused_route"),
    ),
    "guard": (GoodGuard, guard, ("begin", "metrics")),
    "escalation": (GoodEscalation, escalation, ("decide",)),
    "streaming": (
        GoodStreaming,
        streaming,
        (
            "session_limits",
            "pin_limits",
            "next_chunk",
            "observe",
            "speculative_answer_delay",
            "starts_speculative_answer",
            "max_speculative_answer_seconds",
        ),
    ),
}
"""By slot: a plugin that behaves, the engine's part, and the hooks."""


# ------------------------------------------------------------------------------------------------ faults


def _spoil(value: Any, depth: int = 0) -> None:
    """Change everything in an argument that can be changed."""
    if depth > 3:
        return
    if isinstance(value, np.ndarray):
        value[...] = 99
    elif isinstance(value, torch.Tensor):
        value.zero_()
    elif isinstance(value, list):
        for each in list(value):
            _try(_spoil, each, depth + 1)
        value.clear()
    elif isinstance(value, dict):
        value.clear()
    elif isinstance(value, RequestState):
        for name, other in {"request_id": "spoilt", "index": 77, "cache_salt": "theirs"}.items():
            _try(setattr, value, name, other)
        _try(setattr, value, "fixed_num_draft_tokens", -5)
        _try(setattr, value, "arrival_time", float("nan"))
    elif isinstance(value, tuple):
        for each in value:
            _try(_spoil, each, depth + 1)
    else:
        for name in getattr(type(value), "__slots__", ()) or list(getattr(value, "__dict__", ())):
            _try(_spoil, getattr(value, name, None), depth + 1)


def _try(function: Callable[..., Any], *arguments: Any) -> None:
    """Go on with the other inputs where one is protected."""
    try:
        function(*arguments)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return


def _raises(*_: Any) -> Any:
    raise RuntimeError("a fault")


def _prints_badly(*_: Any) -> Any:
    raise RuntimeError(Unsendable())


def _exits(*_: Any) -> Any:
    sys.exit(3)


def _panics(*_: Any) -> Any:
    raise Panic


def _hangs(*_: Any) -> Any:
    while True:
        time.sleep(0.001)


def _hangs_and_catches(*_: Any) -> Any:
    while True:
        try:
            time.sleep(0.001)
        except Exception:  # noqa: S112  what a careless plugin does
            continue


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *_: value


NAN = float("nan")
FAULTS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "raises": (_raises, _prints_badly),
    "BaseException": (_exits, _panics),
    "hangs": (_hangs, _hangs_and_catches),
    "wrong type": tuple(map(_returns, ("text", 1.5, object(), {"a": 1}, True, b"x", None, [1.0, 2.5], ["1", None]))),
    "wrong shape": tuple(
        map(_returns, ([], [1] * 1000, [[1], [2], [3]], np.ones((2, 2, 2), int), torch.ones(7, 7), ((),), [-1, -1]))
    ),
    "wrong device": (
        _returns(torch.empty(2, 4, dtype=torch.bool, device="meta")),
        _returns((torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))),
        _returns([torch.empty(2, device="meta")] * 2),
    ),
    "NaN": tuple(
        map(
            _returns,
            (
                NAN,
                float("inf"),
                [NAN, 1],
                np.array([NAN, 1.0]),
                {"a": NAN},
                DraftCost(per_token=NAN),
                Admission([0], NAN),  # type: ignore[arg-type]
                Admission([NAN]),  # type: ignore[list-item]
                SessionLimits(idle_seconds=NAN),
                [DraftAssignment((), NAN)] * 2,  # type: ignore[arg-type]
                (torch.tensor([NAN, NAN]), torch.tensor([NAN, NAN])),
            ),
        )
    ),
    "cannot be sent": tuple(
        map(
            _returns,
            (
                Unsendable(),
                [Unsendable()] * 2,
                [{"a": Unsendable()}],
                [{"a": 2**70}],
                {"a": Unsendable()},
                threading.Lock(),
                DraftCost(per_token=Unsendable()),  # type: ignore[arg-type]
                Admission(request_ids=[Unsendable()]),  # type: ignore[list-item]
            ),
        )
    ),
    "NumPy": tuple(
        map(
            _returns,
            (
                [{"a": np.float32(1.5), "b": [np.int64(3)], "c": np.array([1, 2])}],
                {"a": np.float32(1.5)},
                [np.int64(1), np.int64(2)],
                np.array([1, 2]),
                np.float64(0.5),
                np.bool_(True),
            ),
        )
    ),
}
"""By kind: functions that take the place of a hook."""


def mutating(good: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that answers well and spoils its arguments before."""

    def hook(self: Any, *arguments: Any) -> Any:
        answer = good(self, *arguments)
        for argument in arguments:
            _try(_spoil, argument)
        return answer

    return hook


def faulty(slot: str, hook: str, fault: Callable[..., Any]) -> GuardedPlugin[Any]:
    """A plugin with one hook that is replaced."""
    good = SLOTS[slot][0]
    cls = type("Faulty", (good,), {hook: fault})
    return GuardedPlugin(slot, "faulty", cls())


@contextmanager
def watched(guarded: GuardedPlugin[Any], hook: str) -> Iterator[None]:
    """The watchdog, for which a call of this hook has taken far too long already."""
    dog = Watchdog(clock=lambda: time.perf_counter() + 1000.0)
    dog._plugins.add(guarded)
    # The watchdog of this process may have the signal, if an earlier test built a plugin.
    previous = signal.signal(SIGNAL, signal.SIG_DFL)
    dog._install_handler()
    assert dog._has_handler
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            call = guarded.current
            if call is not None and call[0] == hook:
                dog.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        dog.release()
        signal.signal(SIGNAL, previous)


def sendable(value: Any) -> bool:
    """Whether vLLM's messages can carry a value."""
    msgspec.msgpack.encode(value)
    return True
