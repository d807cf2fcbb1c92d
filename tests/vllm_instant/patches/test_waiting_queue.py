"""The queue keeps every request exactly once, in the policy's order, whatever vLLM does with it."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_instant import Admission, RequestState
from vllm_instant.patches.waiting_queue import InstantQueue


@dataclass(eq=False)
class Request:
    """What the queue looks at."""

    request_id: str
    priority: int = 0
    num_preemptions: int = 0


def _queue(admit=lambda waiting: Admission(), running=None, places=8, by_priority=False, kind=InstantQueue):
    running = [] if running is None else running
    return kind(
        admit,
        running=lambda: len(running),
        has_room=lambda: len(running) < places,
        state_of=lambda request: RequestState(request.request_id, 1, 1, 0.0),
        by_priority=by_priority,
    )


def _take_all(queue, running=None):
    """As vLLM's admission loop does."""
    taken = []
    queue.begin()
    while queue:
        request = queue.peek_request()
        assert queue.pop_request() is request
        taken.append(request.request_id)
        if running is not None:
            running.append(request)
    queue.end()
    for request_id in taken:
        queue.started(request_id)
    return taken


def _names(queue):
    return [request.request_id for request in queue]


def test_the_policys_order_and_then_as_they_came():
    queue = _queue(lambda waiting: Admission(order=[3, 1]))
    for name in "abcde":
        queue.add_request(Request(name))
    assert _names(queue) == list("abcde")
    assert _take_all(queue) == list("dbace")
    assert not queue
    assert len(queue) == 0


def test_an_order_by_id_passes_over_those_that_do_not_wait():
    named = ["d", "gone", "b"]
    queue = _queue(lambda waiting: Admission(request_ids=named))
    for name in "abcde":
        queue.add_request(Request(name))
    assert _take_all(queue) == list("dbace")
    for name in "fg":
        queue.add_request(Request(name))
    assert _take_all(queue) == list("fg"), "no named request waits: arrival order"


def test_a_policy_that_does_not_look_at_those_that_wait_does_not_pay_for_them():
    class Held(InstantQueue):
        def _all_states(self):
            pytest.fail("gathered")

    queue = _queue(lambda waiting: Admission(request_ids=["b"], max_num_admitted=len(waiting)), kind=Held)
    for name in "abc":
        queue.add_request(Request(name))
    assert _take_all(queue) == list("bac")


def test_who_has_run_before_comes_back_to_the_front():
    queue = _queue()
    for name in "ab":
        queue.add_request(Request(name))
    queue.add_request(Request("c", num_preemptions=1))
    assert _take_all(queue) == list("cab")


def test_the_order_does_not_change_within_one_call_of_schedule():
    calls = []

    def admit(waiting):
        calls.append(len(waiting))
        return Admission(order=range(len(waiting) - 1, -1, -1))

    queue = _queue(admit)
    for name in "abcd":
        queue.add_request(Request(name))
    assert _take_all(queue) == list("dcba")
    assert calls == [4]


def test_the_policy_is_not_called_while_no_request_may_start():
    running = [Request("x"), Request("y")]
    queue = _queue(lambda waiting: pytest.fail("asked"), running, places=2)
    queue.add_request(Request("a"))
    queue.begin()
    assert queue
    assert len(queue) == 1
    queue.end()


def test_no_more_start_than_the_policy_allows():
    running = []
    queue = _queue(lambda waiting: Admission(max_num_admitted=2), running)
    for name in "abcd":
        queue.add_request(Request(name))
    assert _take_all(queue, running) == ["a", "b"]
    assert len(queue) == 2, "who does not start is not lost"
    assert _take_all(queue, running) == ["c", "d"]


def test_who_lost_its_blocks_goes_first_and_who_was_passed_over_to_its_place():
    queue = _queue(lambda waiting: Admission(order=[len(waiting) - 1]))
    a, b, c, d = (Request(name) for name in "abcd")
    for request in (a, b, c):
        queue.add_request(request)
    queue.begin()
    assert queue.pop_request() is c
    queue.end()
    queue.prepend_requests([c])  # vLLM passed over it: a LoRA that does not fit, a grammar that is not ready
    assert _names(queue) == ["a", "b", "c"]
    queue.started("d")
    d.num_preemptions = 1
    queue.prepend_request(d)
    assert _names(queue) == ["d", "a", "b", "c"]
    assert queue.oldest() is a
    assert _take_all(queue) == ["d", "c", "a", "b"]


def test_priority_stands_above_the_policy():
    queue = _queue(lambda waiting: Admission(order=[2, 1, 0]), by_priority=True)
    for name, priority in (("a", 1), ("b", 0), ("c", 1)):
        queue.add_request(Request(name, priority))
    lost = Request("d", 1, num_preemptions=1)
    queue.prepend_request(lost)
    assert _take_all(queue) == ["b", "d", "c", "a"]


def test_priority_stands_above_an_order_by_id():
    queue = _queue(lambda waiting: Admission(request_ids=["c"]), by_priority=True)
    for name, priority in (("a", 1), ("b", 0), ("c", 1)):
        queue.add_request(Request(name, priority))
    assert _take_all(queue) == ["b", "c", "a"]


def test_what_does_not_wait_cannot_be_taken():
    queue = _queue()
    with pytest.raises(IndexError):
        queue.peek_request()
    with pytest.raises(IndexError):
        queue.pop_request()
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove_request(Request("a"))
    assert queue.oldest() is None
    queue.remove_requests([Request("a")])


class EveryRequestOnce(RuleBasedStateMachine):
    """Any sequence of what vLLM does, against a set."""

    def __init__(self):
        super().__init__()
        self.running, self.held, self.waiting, self.number = [], [], {}, 0
        self.seed = 0
        self.queue = _queue(self._admit, self.running, places=4)

    def _admit(self, waiting):
        names = [state.request_id for state in waiting]
        assert names == sorted(names, key=lambda name: int(name)), "the policy sees them as they came"
        order = sorted(range(len(names)), key=lambda place: hash((self.seed, names[place])))
        order, most = order[: self.seed % 4], None if self.seed % 3 else 1
        if self.seed % 2:
            return Admission(max_num_admitted=most, request_ids=["elsewhere", *(names[place] for place in order)])
        return Admission(order, most)

    @rule()
    def add(self):
        self.number += 1
        request = Request(str(self.number))
        self.queue.add_request(request)
        self.waiting[request.request_id] = request

    @rule(seed=st.integers(0, 50), skips=st.sets(st.integers(0, 5)))
    def schedule(self, seed, skips):
        self.seed = seed
        self.queue.begin()
        skipped, looks = [], 0
        while self.queue and len(self.running) < 4:
            request = self.queue.peek_request()
            assert self.queue.pop_request() is request
            assert self.waiting.pop(request.request_id) is request
            if looks in skips:
                skipped.insert(0, request)
            else:
                self.running.append(request)
            looks += 1
        for request in skipped:
            self.waiting[request.request_id] = request
        if skipped:
            self.queue.prepend_requests(skipped)
        self.queue.end()
        for request in self.running:
            self.queue.started(request.request_id)

    @precondition(lambda self: self.running)
    @rule()
    def preempt(self):
        request = self.running.pop()
        request.num_preemptions += 1
        self.queue.prepend_request(request)
        self.waiting[request.request_id] = request

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 100))
    def abort(self, which):
        request = self.waiting.pop(sorted(self.waiting)[which % len(self.waiting)])
        self.queue.remove_requests({request})
        self.queue.started(request.request_id)

    @precondition(lambda self: self.running)
    @rule()
    def finish(self):
        self.running.pop(0)

    @invariant()
    def each_request_waits_exactly_once(self):
        names = _names(self.queue)
        assert sorted(names) == sorted(self.waiting)
        assert len(self.queue) == len(names)
        assert bool(self.queue) == bool(names)


TestEveryRequestOnce = EveryRequestOnce.TestCase
TestEveryRequestOnce.settings = settings(max_examples=120, stateful_step_count=30)
