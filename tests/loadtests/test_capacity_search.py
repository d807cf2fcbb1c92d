"""The search on simulated queues with a known capacity: no server, no clock."""

from __future__ import annotations

import numpy as np
import pytest
from queue_servers import exact_capacity, probe

from vllm_instant_loadtests.capacity import CapacityPlan, search_capacity
from vllm_instant_loadtests.capacity_goals import ProbeResult, ShareGoal
from vllm_instant_loadtests.capacity_search import MIN_PROBES, CapacitySearch, SearchLimits, compare_capacity

PLAN = CapacityPlan(["e2e_p95_ms=500"], precision=0.15, max_probes=24)
GOALS = PLAN.share_goals
SECONDS = 30.0


def searched(rates: dict[str, float], seed: int, plan: CapacityPlan = PLAN, start: float = 5.0):
    random = np.random.default_rng(seed)
    searches = {name: CapacitySearch(plan.share_goals, start, plan.limits) for name in rates}
    search_capacity(
        plan,
        searches,
        lambda server, rate, _: probe(server, rate, rates[server], plan.share_goals, random, SECONDS),
        seed=str(seed),
    )
    return searches


@pytest.fixture(scope="module")
def found():
    return [searched({"a": 30.0, "b": 30.0}, seed) for seed in range(6)]


def test_the_interval_contains_the_true_capacity(found):
    truth = exact_capacity(30.0, GOALS[0])
    estimates = [search.estimate() for searches in found for search in searches.values()]
    assert sum(estimate.low <= truth <= estimate.high for estimate in estimates) >= 10  # of 12, at 95 %
    assert np.median([estimate.mean for estimate in estimates]) == pytest.approx(truth, rel=0.05)


def test_the_interval_is_as_narrow_as_asked_or_the_probes_are_used_up(found):
    for searches in found:
        for search in searches.values():
            estimate = search.estimate()
            narrow = np.sqrt(estimate.high / estimate.low) <= 1 + PLAN.precision
            assert search.finished
            assert MIN_PROBES <= len(search.probes) <= PLAN.max_probes
            assert narrow or len(search.probes) == PLAN.max_probes


def test_two_equal_servers_show_no_difference(found):
    verdicts = [compare_capacity(searches)["b", "a"].verdict for searches in found]
    assert set(verdicts) <= {"same", "undecided"}


def test_a_server_that_carries_more_is_better_by_the_right_factor():
    factor = 1.5
    capacity = exact_capacity(30.0, GOALS[0])
    faster = 30.0 + (factor - 1) * capacity
    contrasts = [compare_capacity(searched({"a": 30.0, "b": faster}, seed))["b", "a"] for seed in range(4)]
    assert {contrast.verdict for contrast in contrasts} == {"better"}
    assert sum(contrast.effect.low <= factor <= contrast.effect.high for contrast in contrasts) >= 3


def test_probes_gather_around_the_capacity(found):
    truth = exact_capacity(30.0, GOALS[0])
    later = [probe.rate for searches in found for search in searches.values() for probe in search.probes[6:]]
    assert np.mean([0.6 < rate / truth < 1.6 for rate in later]) > 0.9


def test_a_rate_is_at_most_twice_the_highest_so_far():
    search = CapacitySearch(GOALS, 1.0)
    for _ in range(6):
        rate = search.next_rate()
        assert rate <= 2.0 * max([p.rate for p in search.probes], default=1.0) + 1e-9
        search.observe(ProbeResult("s", rate, 20, 40, {goal.name: (40.0, 40.0) for goal in GOALS}, 2.0, 1.0))
    assert not search.bounded  # the goals always held


def test_the_goal_that_is_missed_first_decides():
    goals = [ShareGoal("ttft_p95_ms", "ttft", 0.95, 0.5), ShareGoal("itl_p99_ms", "itl", 0.99, 0.05)]
    search = CapacitySearch(goals, 1.0, SearchLimits(max_probes=12))
    while not search.finished:
        rate = search.next_rate()
        first, between = (100.0 if rate < limit else 40.0 for limit in (8.0, 3.0))
        counts = {"ttft_p95_ms": (first, 100.0), "itl_p99_ms": (between, 100.0)}
        search.observe(ProbeResult("s", rate, 20, 100, counts, rate, 1.0))
    assert search.deciding_goal() == "itl_p99_ms"
    assert search.estimate().mean == pytest.approx(3.0, rel=0.15)


def test_an_interrupted_search_continues_as_if_it_had_not_been():
    random = np.random.default_rng(0)
    made: dict[tuple[str, int], ProbeResult] = {}

    def run(server: str, rate: float, number: int) -> ProbeResult | None:
        if interrupted and number == 4 and server == "b":
            return None
        if (server, number) not in made:
            made[server, number] = probe(server, rate, 30.0, GOALS, random, SECONDS)
        return made[server, number]

    def rates(searches):
        return {name: [p.rate for p in search.probes] for name, search in searches.items()}

    plan = CapacityPlan(["e2e_p95_ms=500"], max_probes=8)
    searches = {name: CapacitySearch(GOALS, 5.0, plan.limits) for name in "ab"}
    interrupted = True
    assert not search_capacity(plan, searches, run, seed="0")
    assert {len(search.probes) for search in searches.values()} <= {4, 5}
    interrupted = False
    assert search_capacity(plan, searches, run, seed="0")
    whole = {name: CapacitySearch(GOALS, 5.0, plan.limits) for name in "ab"}
    assert search_capacity(plan, whole, run, seed="0")
    assert rates(whole) == rates(searches)


def test_every_server_gets_one_probe_per_round_in_changing_order():
    order: list[str] = []

    def run(server: str, rate: float, number: int) -> ProbeResult:
        order.append(server)
        return ProbeResult(server, rate, 20, 10, {goal.name: (9.0, 10.0) for goal in GOALS}, 1.0, 1.0)

    plan = CapacityPlan(["e2e_p95_ms=500"], rates=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    searches = {name: CapacitySearch(GOALS, 1.0) for name in "ab"}
    assert search_capacity(plan, searches, run, seed="0")
    rounds = list(zip(order[::2], order[1::2], strict=True))
    assert {tuple(sorted(one)) for one in rounds} == {("a", "b")}
    assert len(set(rounds)) == 2
    assert [p.rate for p in searches["a"].probes] == plan.rates


def test_a_search_ends_when_its_time_is_over():
    searches = {"a": CapacitySearch(GOALS, 1.0)}
    assert not search_capacity(PLAN, searches, lambda *_: None, seed="0", out_of_time=lambda: True)
    assert not searches["a"].probes
