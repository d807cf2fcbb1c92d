"""The plan alone, against costs that are known exactly."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_instant import FullGraphs
from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.planner import max_step_seconds, plan_step


def _costs(base=20.0, row=0.0, start=0.0, each=0.0, each_request=0.0, verifying=0.0, knee=None, piecewise=0.0):
    """Costs in milliseconds, linear in rows or flat up to a knee."""
    costs = StepCosts(512)
    extra = np.maximum(costs.knots - knee, 0) if knee is not None else costs.knots
    costs.weights[: len(costs.knots)] = (base + row * extra) / 1e3
    costs.weights[len(costs.knots) :] = np.array([0, verifying, start, 0, each, each_request, 0, 0, piecewise, 0]) / 1e3
    return costs


def _reach(*chances, positions=4):
    return np.array([[chance ** (j + 1) for j in range(positions)] for chance in chances])


def _best_by_search(survival, costs):
    """Every combination of lengths."""
    best, rate = None, 0.0
    requests, positions = survival.shape
    for lengths in itertools.product(range(positions + 1), repeat=requests):
        rows, draft_steps = requests + sum(lengths), max(lengths)
        tokens = requests + sum(survival[i, :k].sum() for i, k in enumerate(lengths))
        seconds = costs.target_seconds(np.array([float(rows)]), 0.0)[0]
        seconds += costs.verify_seconds() * (sum(lengths) > 0)
        seconds += costs.draft_seconds(np.array([float(draft_steps)]), np.array([float(rows)]), requests)[0]
        if tokens / seconds > rate * (1 + 1e-9):
            best, rate = lengths, tokens / seconds
    return best, rate


chances = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4)
shapes = st.builds(
    _costs,
    base=st.floats(1.0, 50.0),
    row=st.floats(0.0, 3.0),
    start=st.floats(0.0, 3.0),
    each=st.floats(0.0, 3.0),
    each_request=st.floats(0.0, 0.5),
    verifying=st.floats(0.0, 2.0),
    knee=st.none() | st.integers(1, 20),
)


@given(chances, shapes)
@settings(max_examples=60, deadline=None)
def test_it_is_as_good_as_trying_everything(chances, costs):
    survival = _reach(*chances, positions=3)
    plan = plan_step(survival, costs, 0.0, max_rows=1e9)
    _, rate = _best_by_search(survival, costs)
    # Thresholds come in steps, so that two nearly equal chances are taken or left together.
    assert plan.tokens / plan.seconds >= 0.93 * rate
    assert plan.gain >= 1.0 - 1e-9


@given(chances, shapes)
@settings(max_examples=60, deadline=None)
def test_a_likelier_request_never_gets_less(chances, costs):
    plan = plan_step(_reach(*chances), costs, 0.0, max_rows=1e9)
    order = np.argsort(chances)
    assert (np.diff(plan.num_draft_tokens[order]) >= 0).all()


@given(st.floats(0.05, 0.9), st.floats(0.0, 0.1), st.integers(1, 8), shapes)
@settings(max_examples=80, deadline=None)
def test_the_budget_grows_with_acceptance(chance, more, requests, costs):
    low = plan_step(_reach(*[chance] * requests), costs, 0.0, max_rows=1e9)
    high = plan_step(_reach(*[min(1.0, chance + more)] * requests), costs, 0.0, max_rows=1e9)
    assert high.total_draft_tokens >= low.total_draft_tokens


@given(chances, shapes, st.floats(0.1, 10.0))
@example([1.0], _costs(base=1.0, row=0.5, each=1.0), 0.109375)
@settings(max_examples=40, deadline=None)
def test_the_unit_of_time_does_not_matter(chances, costs, factor):
    """Between plans that are equally good rounding decides: what they are worth is the same."""
    survival = _reach(*chances)
    before = plan_step(survival, costs, 0.0, max_rows=1e9)
    costs.weights *= factor
    costs._monotone = None  # kept from the first plan
    after = plan_step(survival, costs, 0.0, max_rows=1e9)
    assert after.gain == pytest.approx(before.gain, rel=1e-9)
    assert after.tokens / after.seconds * factor == pytest.approx(before.tokens / before.seconds, rel=1e-9)


def test_the_gain_comes_from_tokens_even_where_more_rows_take_less_time():
    costs = _costs()
    costs.weights[: len(costs.knots)] = 0.05 * 0.9 ** np.arange(len(costs.knots))
    costs._recent[:] = 100.0  # all of it was measured, often and recently
    assert costs.at_knots()[-1] < 0.6 * costs.at_knots()[0]
    plan = plan_step(_reach(0.05), costs, 0.0, max_rows=1e9, must_draft=True)
    assert plan.total_draft_tokens > 0
    assert plan.gain == pytest.approx(plan.tokens / plan.num_requests)


def test_free_rows_are_all_taken_and_costly_ones_only_when_likely():
    survival = _reach(0.9, 0.5, 0.1)
    assert plan_step(survival, _costs(row=0.0), 0.0, max_rows=1e9).num_draft_tokens.tolist() == [4, 4, 4]
    costly = plan_step(survival, _costs(base=3.0, row=3.0), 0.0, max_rows=1e9)
    assert costly.num_draft_tokens[0] > 0
    assert costly.num_draft_tokens[2] == 0


def test_hopeless_drafts_are_not_made_even_where_rows_are_free():
    plan = plan_step(_reach(0.0, 0.0), _costs(row=0.0, start=0.1), 0.0, max_rows=1e9)
    assert plan.num_draft_tokens.tolist() == [0, 0]
    assert plan.draft_steps == 0
    assert plan.gain == pytest.approx(1.0)


def test_drafting_costs_count():
    survival = _reach(0.6)
    assert plan_step(survival, _costs(row=0.1, each=0.5), 0.0, max_rows=1e9).num_draft_tokens[0] >= 2
    assert plan_step(survival, _costs(row=0.1, each=12.0), 0.0, max_rows=1e9).num_draft_tokens[0] <= 1
    assert plan_step(survival, _costs(row=0.1, start=50.0), 0.0, max_rows=1e9).num_draft_tokens[0] == 0


def test_a_drafter_that_weighs_its_passes_itself_is_not_charged_for_them():
    costs = _costs(row=0.1, start=50.0, each=5.0)
    assert plan_step(_reach(0.9, 0.9), costs, 0.0, max_rows=100).total_draft_tokens == 0
    assert plan_step(_reach(0.9, 0.9), costs, 0.0, max_rows=100, drafting_counts=False).total_draft_tokens == 8


def test_limits_on_rows_and_time():
    survival = _reach(0.95, 0.95)
    limited = plan_step(survival, _costs(row=0.01), 0.0, max_rows=6)
    assert 0 < limited.total_draft_tokens <= 4
    slow = _costs(base=20.0, row=1.0)
    within = plan_step(survival, slow, 0.0, max_rows=1e9, max_seconds=0.0245)
    assert within.seconds <= 0.0245
    impossible = plan_step(survival, slow, 0.0, max_rows=1e9, max_seconds=0.001)
    assert impossible.total_draft_tokens == 0, "what cannot be kept without drafts either forbids only drafts"


def test_weights_move_drafts_to_those_who_need_them():
    survival = _reach(0.6, 0.6)
    costs = _costs(base=8.0, row=4.0)
    even = plan_step(survival, costs, 0.0, max_rows=1e9)
    assert even.num_draft_tokens[0] == even.num_draft_tokens[1]
    uneven = plan_step(survival, costs, 0.0, max_rows=1e9, weights=np.array([2.5, 0.3]))
    assert uneven.num_draft_tokens[0] > uneven.num_draft_tokens[1]


def test_a_drafter_that_rarely_delivers_costs_fewer_rows():
    survival = _reach(0.7)
    costs = _costs(base=10.0, row=1.0)
    rare = plan_step(survival, costs, 0.0, max_rows=1e9, delivery_rate=np.array([0.1]))
    full = plan_step(survival, costs, 0.0, max_rows=1e9)
    assert rare.num_draft_tokens[0] >= full.num_draft_tokens[0] > 0
    assert rare.seconds < full.seconds


def test_must_draft_gives_the_best_plan_that_drafts():
    costs = _costs(base=10.0, row=5.0, start=1.0)
    assert plan_step(_reach(0.3), costs, 0.0, max_rows=1e9).total_draft_tokens == 0
    forced = plan_step(_reach(0.3), costs, 0.0, max_rows=1e9, must_draft=True)
    assert forced.num_draft_tokens.tolist() == [1]
    assert forced.gain < 1


def test_a_step_is_too_long_when_a_request_is_slower_for_others_drafts():
    survival = _reach(0.9, 0.0)
    plan = plan_step(survival, _costs(base=20.0, row=1.0), 0.0, max_rows=1e9)
    nothing = np.zeros(2)
    assert plan.num_draft_tokens.tolist() == [4, 0]
    assert max_step_seconds(plan, survival, None, 0.5, nothing) == pytest.approx(2 * plan.baseline_seconds)
    assert max_step_seconds(plan, survival, None, 1.0, nothing) == pytest.approx(plan.baseline_seconds)
    # Requests that drafts help may take part in longer steps.
    helped = _reach(0.9, 0.8)
    both = plan_step(helped, _costs(base=20.0, row=1.0), 0.0, max_rows=1e9)
    longest = max_step_seconds(both, helped, None, 0.5, nothing)
    assert longest == pytest.approx(2 * both.baseline_seconds * (1 + helped[1].sum()))
    # One that they have helped before may lose as much of it again.
    assert max_step_seconds(plan, survival, None, 1.0, np.array([0.0, 0.003])) == pytest.approx(
        plan.baseline_seconds + 0.003
    )
    rarely = max_step_seconds(both, helped, np.array([1.0, 0.5]), 0.5, nothing)
    assert rarely == pytest.approx(2 * both.baseline_seconds * (1 + 0.5 * helped[1].sum()))


# ------------------------------------------------------------------------------------------------ CUDA graphs

GRAPHS = FullGraphs((0, 1, 2, 4), 64)


def _rate(plan):
    return plan.tokens / plan.seconds


@given(chances, shapes, st.floats(0.0, 5.0))
@settings(max_examples=60, deadline=None)
def test_with_graphs_no_even_plan_is_better_and_an_uneven_one_pays_for_its_pieces(chances, costs, piecewise):
    costs.weights[len(costs.knots) + 8] = piecewise / 1e3
    survival, count = _reach(*chances), len(chances)
    plan = plan_step(survival, costs, 0.0, max_rows=1e9, graphs=GRAPHS)
    free = plan_step(survival, costs, 0.0, max_rows=1e9)
    for length in GRAPHS.lengths:
        rows, steps = np.array([float(count * (1 + length))]), np.array([float(length)])
        seconds = costs.target_seconds(rows, 0.0)[0] + costs.verify_seconds() * (length > 0)
        seconds += costs.draft_seconds(steps, rows, count)[0]
        even = (count + survival[:, :length].sum()) / seconds
        assert _rate(plan) >= even * (1 - 1e-9)
    # An uneven plan is taken where it wins at its price, so that the loss is limited by the price.
    assert _rate(plan) >= _rate(free) * free.seconds / (free.seconds + piecewise / 1e3) * (1 - 1e-9)
    if not GRAPHS.cover(plan.num_draft_tokens):
        assert plan.seconds > piecewise / 1e3


def test_with_graphs_an_uneven_plan_is_taken_only_where_it_wins_at_its_own_price():
    survival = _reach(1.0, 0.0, 0.0, 0.0)
    cheap, costly = _costs(row=2.0, piecewise=0.5), _costs(row=2.0, piecewise=40.0)
    assert plan_step(survival, cheap, 0.0, max_rows=1e9, graphs=GRAPHS).num_draft_tokens.tolist() == [4, 0, 0, 0]
    assert not plan_step(survival, costly, 0.0, max_rows=1e9, graphs=GRAPHS).total_draft_tokens


def test_lengths_without_a_graph_cost_their_pieces():
    """Three drafts would be best, and four have a graph."""
    survival = np.array([[0.9, 0.8, 0.7, 0.0]] * 2)
    costs = _costs(each=0.5, piecewise=2.0)
    assert plan_step(survival, costs, 0.0, max_rows=1e9).num_draft_tokens.tolist() == [3, 3]
    assert plan_step(survival, costs, 0.0, max_rows=1e9, graphs=GRAPHS).num_draft_tokens.tolist() == [4, 4]


def test_steps_with_more_rows_than_any_graph_are_all_uneven():
    survival, costs = _reach(0.9, 0.9), _costs(piecewise=2.0)
    few = FullGraphs((0, 4), 8)
    within = plan_step(survival, costs, 0.0, max_rows=1e9, graphs=GRAPHS)
    beyond = plan_step(survival, costs, 0.0, max_rows=1e9, graphs=few)
    assert beyond.seconds == pytest.approx(within.seconds + 2e-3)


def test_where_steps_without_drafts_have_no_graph_they_cost_their_pieces():
    """As on the V1 model runner with a draft model, which captures the maximum only."""
    plan = plan_step(_reach(0.0, 0.0), _costs(row=1.0, piecewise=2.0), 0.0, max_rows=1e9, graphs=FullGraphs((4,), 64))
    assert plan.total_draft_tokens == 0
    assert plan.baseline_seconds == pytest.approx(24e-3)


def test_the_gain_of_an_even_plan_comes_from_tokens_too():
    costs = _costs()
    costs.weights[: len(costs.knots)] = 0.05 * 0.9 ** np.arange(len(costs.knots))
    costs._recent[:] = 100.0  # all of it was measured, often and recently
    plan = plan_step(_reach(0.05, 0.05), costs, 0.0, max_rows=1e9, must_draft=True, graphs=GRAPHS)
    assert GRAPHS.cover(plan.num_draft_tokens)
    assert plan.total_draft_tokens > 0
    assert plan.gain == pytest.approx(plan.tokens / plan.num_requests)
