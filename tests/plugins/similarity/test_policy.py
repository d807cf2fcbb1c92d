"""Admission order, preemption order and prompt chunks of the policy, on a simulated server."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant import Admission, RequestState, SchedulerSnapshot, StepOutcome
from vllm_instant.scheduling.request_registry import RequestRegistry, hinted_output_tokens
from vllm_instant.tools.measure.queue_simulator import Job, serve
from vllm_instant_plugins.similarity.itl_chunking import ItlChunkingPolicy
from vllm_instant_plugins.similarity.policy import SimilarityPolicy
from vllm_instant_plugins.similarity.request_table import hinted_tokens
from vllm_instant_plugins.state_store import PersistentState

SLOTS = 8
STEP = 0.03
"""Simulated seconds per token."""


def _jobs(seed, count, load=None, hinted=True, long_share=0.2, short=16, long=320):
    """Short and long answers, as a burst or as a Poisson stream at a fraction ``load`` of the capacity."""
    random = np.random.default_rng(seed)
    is_long = random.random(count) < long_share
    low, high = np.where(is_long, long * 3 // 4, short // 2), np.where(is_long, long * 5 // 4, short * 3 // 2)
    tokens = random.integers(low, high)
    if load is None:
        arrivals = np.sort(random.random(count) * 0.1)
    else:
        arrivals = np.cumsum(random.exponential(tokens.mean() * STEP / SLOTS / load, count))
    return [
        Job(
            float(at),
            int(n),
            prompt=[7 if slow else 3] * 32 + random.integers(10, 4000, 8).tolist(),
            hinted_tokens=int(n) if hinted else None,
        )
        for at, n, slow in zip(arrivals, tokens, is_long, strict=True)
    ]


def _policy(**options):
    return SimilarityPolicy(SLOTS, clock=lambda: 0.0, **options)


@pytest.fixture(scope="module")
def learned():
    """A policy that has learned from 150 requests of this kind."""
    policy = _policy()
    serve(_jobs(99, 150, 0.7, hinted=False), SLOTS, policy, seconds_per_token=STEP)
    return policy


def _with(learned):
    policy = _policy()
    policy.length_predictor.restore(learned.length_predictor.state())
    policy.service_time.coefficients[:] = learned.service_time.coefficients
    return policy


def _compare(jobs, policy):
    ours, theirs = (serve(jobs, SLOTS, p, seconds_per_token=STEP) for p in (policy, None))
    return ours, theirs


@pytest.mark.parametrize("hinted", [True, False], ids=["hinted", "learned"])
@pytest.mark.parametrize("load", [None, 1.1], ids=["burst", "overload"])
def test_at_high_load_the_mean_latency_falls(learned, load, hinted):
    mean, wait, slowest = [], [], []
    for seed in range(4):
        ours, theirs = _compare(_jobs(seed, 128 if load is None else 300, load, hinted), _with(learned))
        mean.append(ours.latencies.mean() / theirs.latencies.mean())
        wait.append(ours.waits.mean() / theirs.waits.mean())
        slowest.append(np.percentile(ours.latencies, 99) / np.percentile(theirs.latencies, 99))
    assert np.mean(mean) < 0.70
    assert np.mean(wait) < 0.65
    assert np.mean(slowest) < 1.10


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_below_capacity_no_latency_grows(learned, load):
    mean, slowest = [], []
    for seed in range(4):
        ours, theirs = _compare(_jobs(seed, 300, load, hinted=False), _with(learned))
        mean.append(ours.latencies.mean() / theirs.latencies.mean())
        slowest.append(np.percentile(ours.latencies, 99) / np.percentile(theirs.latencies, 99))
    assert np.mean(mean) < 1.0
    assert np.mean(slowest) < 1.02


def _starving(seed, hinted):
    """A stream of short requests that uses 90 % of the capacity, with a few long ones."""
    random = np.random.default_rng(seed)
    short = [Job(at, 16, hinted_tokens=16 if hinted else None) for at in np.arange(0, 40, 16 * STEP / SLOTS / 0.9)]
    long = [Job(float(at), 300, hinted_tokens=300 if hinted else None) for at in random.uniform(0, 40, 12)]
    return sorted([*short, *long], key=lambda job: job.arrival)


@pytest.mark.parametrize("hinted", [True, False])
def test_no_request_starves(learned, hinted, monkeypatch):
    """The bound holds where shortest job first alone exceeds it by far."""
    for seed in range(3):
        ours, theirs = _compare(_starving(seed, hinted), _with(learned))
        assert (ours.waits <= 2 * theirs.waits + 1 + 0.25).all()
    monkeypatch.setattr("vllm_instant_plugins.similarity.policy.MIN_TAIL_OBSERVATIONS", 1e9)
    impatient, theirs = _compare(_starving(0, True), _policy(wait_ratio=1e6, wait_seconds=1e6))
    assert (impatient.waits > 2 * theirs.waits + 2).any()


STREAMS = st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 200), st.integers(0, 2)), min_size=1, max_size=60)


@settings(max_examples=150)
@given(STREAMS, st.integers(1, 8), st.sampled_from([(1.0, 0.0), (2.0, 1.0), (4.0, 0.5)]))
def test_the_bound_holds_for_any_stream(stream, slots, bound):
    """With known lengths. An overdue request still waits for the next free slot, which adds to its bound.

    A slot becomes free at the latest when a request that started within its own bound ends.
    """
    jobs, now = [], 0.0
    for gap, tokens, _ in stream:
        now += gap
        jobs.append(Job(now, tokens, hinted_tokens=tokens))
    policy = SimilarityPolicy(slots, *bound, clock=lambda: 0.0)
    policy.service_time.coefficients[:] = [0.0, 0.0005, STEP]
    ours, theirs = (serve(jobs, slots, p, seconds_per_token=STEP) for p in (policy, None))
    ratio, seconds = bound
    bound_of_each = ratio * theirs.waits + seconds
    # A request is late by at most the largest extra wait allowed to any request that arrived before it.
    latest = np.maximum.accumulate(bound_of_each - theirs.waits) + theirs.waits
    service = ours.end - ours.start
    assert (ours.waits <= latest + service.max() + 0.1).all()


@given(STREAMS, st.integers(1, 8))
def test_every_request_is_served_once_and_no_slot_idles_while_requests_wait(stream, slots):
    jobs, now = [], 0.0
    for gap, tokens, kind in stream:
        now += gap
        jobs.append(Job(now, tokens, prompt=[kind] * 40))
    served = serve(jobs, slots, SimilarityPolicy(slots, clock=lambda: 0.0))
    assert np.isfinite(served.end).all()
    for at in served.start[served.waits > 1e-9]:
        assert ((served.start < at) & (served.end > at - 1e-6)).sum() >= slots - (np.isclose(served.end, at)).sum()


# ---------------------------------------------------------------------------------------------- single decisions


@pytest.fixture
def live():
    return RequestRegistry()


def _enter(policy, live, number, tokens=16, arrival=0.0, prompt=(), **known):
    state = RequestState(
        f"r{number}",
        len(prompt) or 16,
        4096,
        0.0,
        prompt_token_ids=prompt,
        extra_args={} if tokens is None else {"instant_output_tokens": tokens},
        **known,
    )
    live.admit(state)
    state.arrival_time = arrival
    policy.enter(state)
    return state


def _snapshot(waiting, running=(), now=0.0, free=1_000_000):
    return SchedulerSnapshot(waiting, running, now, SLOTS, free)


def _order(policy, waiting, **options):
    """Numbers of the requests that the policy admits, in order."""
    return [int(name[1:]) for name in policy.admit(_snapshot(waiting, **options)).request_ids]


def test_first_come_first_served_until_enough_is_learned(live):
    policy = _policy()
    waiting = [_enter(policy, live, n, tokens=None, prompt=[n] * 40) for n in range(5)]
    assert policy.admit(_snapshot(waiting)) == Admission()


def test_requests_of_one_bin_keep_the_order_of_arrival(live):
    policy = _policy()
    lengths = [300, 16, 17, 300, 15, 16]
    waiting = [_enter(policy, live, n, tokens) for n, tokens in enumerate(lengths)]
    assert _order(policy, waiting) == [1, 2, 4, 5, 0, 3]


class _Unseen(list):
    """Waiting requests that must not be read."""

    def __iter__(self):
        pytest.fail("read the whole queue")

    __getitem__ = __iter__


def test_admit_reads_no_waiting_request_after_background_work(live):
    policy = _policy()
    waiting = _Unseen(_enter(policy, live, n, tokens) for n, tokens in enumerate([300, 16, 300, 17]))
    policy.background_work(_snapshot(waiting))
    assert _order(policy, waiting, now=0.02) == [1, 3, 0, 2]


def test_new_requests_are_inserted_into_the_order(live):
    policy = _policy()
    waiting = [_enter(policy, live, n, 300) for n in range(3)]
    policy.background_work(_snapshot(waiting))
    waiting += [_enter(policy, live, 3, 16, arrival=0.01), _enter(policy, live, 4, 300, arrival=0.01)]
    policy.background_work(_snapshot(waiting, now=0.02))
    assert _order(policy, waiting, now=0.03) == [3, 0, 1, 2, 4]


def test_started_or_ended_requests_are_not_named_although_their_index_is_reused(live):
    policy = _policy()
    waiting = [_enter(policy, live, n, 16) for n in range(30)]
    policy.background_work(_snapshot(waiting))
    for state, leave in ((waiting.pop(3), True), (waiting.pop(0), False)):
        if leave:
            policy.started(state, 0.01)
        policy.finished(state, 0.02, complete=leave)
        live.forget(state.request_id)
    waiting.append(_enter(policy, live, 40, 300, arrival=0.02))
    assert _order(policy, waiting, now=0.03) == [1, 2, *range(4, 26)]
    policy.background_work(_snapshot(waiting, now=0.03))
    assert policy.decisions(5)[0]["request_id"] == "r3"


def test_requests_that_become_overdue_before_the_next_order_are_named(live, monkeypatch):
    """Among many cheaper requests."""
    monkeypatch.setattr("vllm_instant_plugins.similarity.policy.NUM_CANDIDATES", 30)
    policy = _policy()
    waiting = [_enter(policy, live, 0, 300), *(_enter(policy, live, n, 16, arrival=0.5) for n in range(1, 60))]
    policy.background_work(_snapshot(waiting, now=0.6))
    due = policy._table.deadline[waiting[0].index]
    assert 0 not in _order(policy, waiting, now=0.61)
    policy.background_work(_snapshot(waiting, now=due - 0.01))
    assert _order(policy, waiting, now=due + 0.01)[0] == 0


def test_the_whole_queue_is_ordered_when_the_candidates_are_used_up(live, monkeypatch):
    monkeypatch.setattr("vllm_instant_plugins.similarity.policy.NUM_CANDIDATES", 25)
    policy = _policy()
    waiting = [_enter(policy, live, n, 16) for n in range(60)]
    policy.background_work(_snapshot(waiting))
    for state in waiting[:10]:
        policy.started(state, 0.01)
    assert _order(policy, waiting[10:], now=0.02) == [*range(10, 34)]


def test_more_requests_are_named_when_the_engine_holds_some_back(live):
    """For example while their KV blocks are transferred from another engine."""
    policy = _policy()
    waiting = [_enter(policy, live, n, 16) for n in range(60)]
    assert _order(policy, waiting[30:]) == [*range(54)]


def test_prompt_tokens_add_to_the_cost(live):
    policy = _policy()
    waiting = [_enter(policy, live, 0, 16, prompt=[1] * 900), _enter(policy, live, 1, 16, prompt=[1] * 30)]
    assert _order(policy, waiting) == [1, 0]


def test_overdue_requests_go_first(live):
    policy = _policy()
    waiting = [_enter(policy, live, 0, 300), *(_enter(policy, live, n, 16, arrival=0.2) for n in (1, 2))]
    assert _order(policy, waiting, now=0.5)[0] == 1
    assert _order(policy, waiting, now=1.1)[0] == 0


def test_requests_that_share_a_long_prefix_are_adjacent(live):
    policy = _policy()
    shared, other = [5] * 200, [6] * 200
    waiting = [_enter(policy, live, n, 16, prompt=(shared if n % 2 else other)) for n in range(6)]
    assert _order(policy, waiting) == [0, 2, 4, 1, 3, 5]
    policy, live = _policy(), RequestRegistry()
    waiting = [_enter(policy, live, n, 16, prompt=(shared if n % 2 else other)[:100]) for n in range(6)]
    assert _order(policy, waiting) == [0, 1, 2, 3, 4, 5]


def test_salted_prefixes_are_not_shared(live):
    policy = _policy()
    waiting = [_enter(policy, live, n, 16, prompt=[5] * 200, cache_salt=str(n % 2)) for n in range(4)]
    assert _order(policy, waiting) == [0, 2, 1, 3]


def test_the_preempted_request_is_cheap_to_recompute_and_has_many_tokens_left(live):
    policy = _policy()
    nearly_done = _enter(policy, live, 0, 100, num_output_tokens=95)
    fresh_and_long = _enter(policy, live, 1, 2000, num_output_tokens=4)
    much_work = _enter(policy, live, 2, 2000, prompt=[1] * 3000, num_output_tokens=400)
    order = policy.preemption_order([fresh_and_long, nearly_done, much_work])
    assert list(order) == [1, 2, 0], "the last one is preempted"
    fresh_and_long.num_preemptions = 5
    assert list(policy.preemption_order([fresh_and_long, nearly_done, much_work]))[-1] == 2, (
        "not the same one again and again"
    )


def test_after_a_preemption_no_request_starts_until_there_is_room(live):
    policy = _policy()
    running = [_enter(policy, live, n, 300) for n in range(4)]
    waiting = [_enter(policy, live, 9, 16)]
    assert policy.admit(_snapshot(waiting, running, 1.0, free=50)).max_num_admitted is None
    policy.preempted(running[0], 1.0)
    assert policy.admit(_snapshot(waiting, running, 1.1, free=50)).max_num_admitted == 0
    assert policy.admit(_snapshot(waiting, running, 1.1, free=5000)).max_num_admitted == 1
    assert policy.admit(_snapshot(waiting, running, 60.0, free=50)).max_num_admitted is None


def test_prompt_chunks_keep_the_itl_goal(live):
    policy = ItlChunkingPolicy(SLOTS, 0.050, clock=lambda: 0.0)
    decoding = [_enter(policy, live, n, 300, num_output_tokens=5) for n in range(4)]
    waiting = [_enter(policy, live, 9, 16, prompt=[1] * 900)]
    assert policy.max_prompt_tokens(_snapshot(waiting, decoding)) is None, "no step was measured yet"
    random = np.random.default_rng(0)
    for _ in range(200):
        prompt, requests = int(random.integers(0, 200)), int(random.integers(1, 8))
        seconds = 0.010 + 0.001 * requests + 0.0004 * prompt
        policy.observe(StepOutcome(decoding[:1] * requests, [0] * requests, [0] * requests, requests + prompt, seconds))
    limit = policy.max_prompt_tokens(_snapshot(waiting, decoding))
    assert limit == pytest.approx((0.050 - 0.010 - 4 * 0.001) / 0.0004, rel=0.1)
    assert policy.max_prompt_tokens(_snapshot(waiting, ())) is None, "no request is decoding"
    assert _policy().max_prompt_tokens(_snapshot(waiting, decoding)) is None, "there is no goal"


def test_prompts_progress_under_an_impossible_itl_goal(live):
    policy = ItlChunkingPolicy(SLOTS, 0.001, clock=lambda: 0.0)
    decoding = [_enter(policy, live, 0, 300, num_output_tokens=5)]
    for _ in range(20):
        policy.observe(StepOutcome(decoding, [0], [0], 1, 0.02))
    assert policy.max_prompt_tokens(_snapshot((), decoding)) == 16


def test_aborted_requests_are_not_learned_from(live):
    policy = _policy()
    state = _enter(policy, live, 0, tokens=None)
    policy.started(state, 0.0)
    state.num_output_tokens = 3
    policy.finished(state, 1.0, complete=False)
    policy.close()
    assert policy.length_predictor.num_observed == 0
    assert len(policy._fcfs) == 0


def test_learned_lengths_survive_a_restart(tmp_path, learned):
    store = PersistentState(tmp_path, {"model": "m"}, "lengths")
    policy = _policy(store=store)
    serve(_jobs(5, 100, 0.7, hinted=False), SLOTS, policy)
    policy.close()
    again = _policy(store=PersistentState(tmp_path, {"model": "m"}, "lengths"))
    assert again.length_predictor.useful
    assert again.length_predictor.num_observed == policy.length_predictor.num_observed == 100


def test_a_file_of_another_release_is_ignored_with_a_warning(tmp_path, caplog):
    store = PersistentState(tmp_path, {"model": "m"}, "lengths")
    store.save({"lengths": {"edges": []}, "service": [0.0, 0.0, 1.0]})
    assert _policy(store=store).length_predictor.num_observed == 0
    assert "do not fit this release" in caplog.text


@pytest.mark.parametrize("nonsense", ["long", -5, 0, True, None, [3], 10**400, float("inf")])
def test_invalid_hints_count_as_none(nonsense):
    state = RequestState("r", 16, 4096, 0.0, extra_args={"instant_output_tokens": nonsense})
    assert np.isnan(hinted_tokens(state))
    if nonsense is not None:
        with pytest.raises(ValueError, match=r"instant_output_tokens must be a number of tokens from 1, found"):
            hinted_output_tokens(state.extra_args)


def test_metrics_have_names():
    assert set(_policy().metrics()) == {
        "finished_requests_learned",
        "output_length_calibration_error",
        "seconds_per_output_token",
    }


def test_starts_are_explained(live):
    policy = _policy()
    long, short = _enter(policy, live, 0, 300), _enter(policy, live, 1, 16, arrival=0.2)
    policy.admit(_snapshot([long, short], now=0.5))
    policy.started(short, 0.5)
    short.num_output_tokens = 14
    policy.finished(short, 0.9, complete=True)
    policy.started(long, 0.9)
    first, second = policy.decisions(10)
    assert first == {
        "request_id": "r1",
        "waited_ms": pytest.approx(300),
        "bound_ms": pytest.approx(1000),
        "expected_tokens": 16,
        "tokens": 14,
        "older_waiting": 1,
    }
    assert (second["request_id"], second["tokens"], second["older_waiting"]) == ("r0", None, 0)
    assert policy.decisions(1) == [second]
    assert policy.decisions(5, "r1") == [first]
