"""Whatever a hook of a plugin does, the engine continues with valid values: every hook with every kind of fault."""

import pickle
import signal
import threading
import time

import pytest
from faulty_plugins import FAULTS, SLOTS, Panic, faulty, mutating, sendable, watched

from vllm_instant.deployment import circuit_breaker, watchdog
from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin, HangError
from vllm_instant.deployment.plain import finite, json_types, whole, whole_numbers
from vllm_instant.deployment.watchdog import Watchdog

HOOKS = [(slot, hook) for slot, (_, _, hooks) in SLOTS.items() for hook in hooks]
CALLED_LATE = {("streaming", "pin_limits"), ("streaming", "session_limits")}


@pytest.mark.parametrize(("slot", "hook"), HOOKS)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_stays_inside(slot, hook, kind):
    _, drive, _ = SLOTS[slot]
    for fault in FAULTS[kind]:
        guarded = faulty(slot, hook, fault)
        if kind == "hangs":
            with watched(guarded, hook):
                drive(guarded)
        else:
            drive(guarded)
        if kind in ("raises", "BaseException", "hangs"):
            assert guarded.disabled
            assert guarded.failures == {hook: 1}
        # With the plugin in whatever state it is now, the engine continues.
        found = drive(guarded)
        pickle.dumps(found)
        if slot in ("batching", "experts", "streaming"):
            assert sendable(found)
        if slot == "speculation":
            assert sendable(found[2:])


@pytest.mark.parametrize(("slot", "hook"), HOOKS)
def test_a_hook_that_changes_its_arguments_changes_nothing_else(slot, hook):
    good, drive, _ = SLOTS[slot]
    undisturbed = drive(GuardedPlugin(slot, "good", good()))
    guarded = faulty(slot, hook, mutating(getattr(good, hook)))
    found = drive(guarded)
    assert not guarded.disabled
    pickle.dumps(found)
    if slot in ("speculation", "drafter", "hybrid", "rejection_sampler", "streaming"):
        assert str(found) == str(undisturbed)


@pytest.mark.parametrize("slot", SLOTS)
def test_a_plugin_that_behaves_stays_in_service(slot):
    good, drive, hooks = SLOTS[slot]
    called = set()

    class Recording(GuardedPlugin):
        def call(self, hook, run, otherwise):
            called.add(hook)
            return super().call(hook, run, otherwise)

    guarded = Recording(slot, "good", good())
    drive(guarded)
    assert not guarded.disabled
    # The matrix above is only worth something for hooks that are called.
    assert called >= set(hooks) - {"metrics"} - ({"forget"} if slot == "streaming" else set())


def test_decisions_and_gauges_of_numpy_become_plain():
    _, drive, _ = SLOTS["speculation"]
    guarded = faulty("speculation", "decisions", FAULTS["NumPy"][0])
    assert drive(guarded)[2] == [{"a": 1.5, "b": [3], "c": [1, 2]}]
    assert not guarded.disabled


# ------------------------------------------------------------------------------------------------ the breaker


def test_a_keyboard_interrupt_and_vllms_own_exit_are_let_through():
    guarded = GuardedPlugin("speculation", "p", object())

    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded.call("enter", interrupted, None)
    handler = {"__name__": "vllm.v1.executor.multiproc_executor"}
    exec("def handler(*_):\n    raise SystemExit", handler)  # noqa: S102  a function of that module
    previous = signal.signal(signal.SIGUSR2, handler["handler"])
    try:
        with pytest.raises(SystemExit):
            guarded.call("enter", lambda _: signal.raise_signal(signal.SIGUSR2), None)
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert not guarded.disabled


def test_three_slow_calls_in_a_row_disable_a_plugin():
    now = [0.0]
    seconds = [5.0]

    def run(_):
        now[0] += seconds[0]
        return "answer"

    guarded = GuardedPlugin("speculation", "slow", object(), clock=lambda: now[0])
    # The first call may compile; and a fast call in between starts the count again.
    for seconds[0] in (60.0, 1.5, 1.5, 0.1, 1.5, 1.5):
        assert guarded.call("observe", run, None) == "answer"
    assert guarded.call("observe", run, None) is None
    assert guarded.disabled
    untimed = GuardedPlugin("experts", "slow", object(), is_timed=False, clock=lambda: now[0])
    for seconds[0] in (60.0,) * 10:
        assert untimed.call("observe", run, None) == "answer"


def test_calls_within_calls_are_told_apart():
    guarded = GuardedPlugin("speculation", "p", object())

    def outer(_):
        before = guarded.current
        guarded.call("inner", lambda _: None, None)
        return guarded.current is before

    assert guarded.call("outer", outer, None)
    assert guarded.current is None


def test_a_subscriber_that_raises_anything_does_not_reach_the_engine(monkeypatch):
    class Manager:
        def announce_failure(self, *_):
            raise Panic

    monkeypatch.setattr(circuit_breaker, "plugin_manager", Manager)
    guarded = GuardedPlugin("speculation", "p", object())
    assert guarded.call("enter", lambda _: 1 / 0, "otherwise") == "otherwise"


# ------------------------------------------------------------------------------------------------ the watchdog


def test_a_call_in_a_thread_is_ended_too():
    guarded = GuardedPlugin("streaming", "hanging", object())

    def hang(_):
        while True:
            time.sleep(0.001)

    found = []
    with watched(guarded, "next_chunk"):
        thread = threading.Thread(target=lambda: found.append(guarded.call("next_chunk", hang, "otherwise")))
        thread.start()
        thread.join(60)
    assert found == ["otherwise"]


def test_a_waiting_call_of_the_system_is_interrupted_in_the_main_thread():
    guarded = GuardedPlugin("speculation", "hanging", object())
    with watched(guarded, "observe"):
        assert (
            guarded.call("observe", lambda _: threading.Lock().acquire() and time.sleep(1e6), "otherwise")
            == "otherwise"
        )


def test_the_watchdog_waits_longer_for_a_first_call_and_leaves_other_calls_alone():
    now = [0.0]
    dog = Watchdog(clock=lambda: now[0])
    guarded = GuardedPlugin("speculation", "p", object(), clock=lambda: now[0])
    ended = []
    dog._end = ended.append
    dog._plugins.add(guarded)

    def look_after(seconds):
        def run(_):
            now[0] += seconds
            dog.look()

        return run

    guarded.call("observe", look_after(watchdog.FIRST_HANG_SECONDS - 1), None)
    guarded.call("observe", look_after(watchdog.HANG_SECONDS - 1), None)
    assert ended == []
    guarded.call("observe", look_after(watchdog.HANG_SECONDS + 1), None)
    assert [hook for hook, _, _ in ended] == ["observe"]
    dog.look()
    assert len(ended) == 1


def test_a_signal_that_comes_late_harms_nobody():
    dog = Watchdog()
    guarded = GuardedPlugin("speculation", "p", object())
    dog._plugins.add(guarded)
    calls = []
    guarded.call("observe", lambda _: calls.append(guarded.current), None)
    dog._condemned = calls[0]
    dog._on_signal(watchdog.SIGNAL, None)  # that call has returned
    assert dog._condemned is None
    dog._condemned = guarded.current = calls[0]
    with pytest.raises(HangError):
        dog._on_signal(watchdog.SIGNAL, None)


# ------------------------------------------------------------------------------------------------ plain values


@pytest.mark.parametrize("value", [1.0, True, "1", None, float("nan"), [1]])
def test_only_whole_numbers_are_whole(value):
    with pytest.raises(ContractError):
        whole(value)
    with pytest.raises(ContractError):
        whole_numbers([1, value])


@pytest.mark.parametrize("value", ["1", None, float("nan"), float("inf"), 10**400, True, [1]])
def test_only_finite_numbers_are_finite(value):
    with pytest.raises(ContractError):
        finite(value)


def test_json_types_are_copies_of_limited_depth():
    value = {"a": [1, 2.5, None, "x", (True,)], 3: float("nan")}
    copy = json_types(value)
    assert copy == {"a": [1, 2.5, None, "x", [True]], "3": None}
    assert copy["a"] is not value["a"]
    deep: list = []
    deep.append(deep)
    with pytest.raises(ContractError, match="nested"):
        json_types(deep)
