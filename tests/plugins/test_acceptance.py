"""The acceptance model alone: what it believes after what it saw."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant_plugins import acceptance
from vllm_instant_plugins.acceptance import AcceptanceModel

ONE = np.array([0])


def _conditional(model, indices):
    """Chance of each draft token given that those before it are accepted."""
    survival = model.survival(np.asarray(indices))
    return survival / np.concatenate([np.ones((len(survival), 1)), survival[:, :-1]], axis=1)


def _model(requests=1, positions=4, kind="greedy"):
    model = AcceptanceModel(positions)
    for index in range(requests):
        model.enter(index, kind, index)
    return model


def _observe(model, index, drafted, accepted, times=1):
    for _ in range(times):
        model.observe([index], [drafted], [accepted])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(0, 4)), max_size=60),
)
@settings(max_examples=60, deadline=None)
def test_estimates_stay_chances_and_reach_falls_with_the_position(history):
    model = _model(requests=6)
    for index, drafted, accepted in history:
        _observe(model, index, drafted, min(drafted, accepted))
    all_requests = np.arange(6)
    conditional, survival = _conditional(model, all_requests), model.survival(all_requests)
    assert ((conditional >= 0) & (conditional <= 1)).all()
    assert (np.diff(survival, axis=1) <= 1e-12).all()


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.8, 1.0])
def test_it_finds_the_chance_of_each_position(chance):
    model, random = _model(), np.random.default_rng(0)
    estimates = []
    for step in range(600):
        accepted = 0
        while accepted < 4 and random.random() < chance * 0.9**accepted:
            accepted += 1
        _observe(model, 0, 4, accepted)
        if step > 100:
            estimates.append(_conditional(model, ONE)[0])
    mean = np.mean(estimates, axis=0)
    assert mean[0] == pytest.approx(chance, abs=0.05)
    if chance >= 0.8:
        assert mean[2] == pytest.approx(chance * 0.81, abs=0.08)


def test_tokens_behind_a_refused_one_say_nothing():
    model = _model()
    before = _conditional(model, ONE)[0]
    _observe(model, 0, 4, 0, times=5)
    after = _conditional(model, ONE)[0]
    assert after[0] < before[0] - 0.2
    # Positions 2 to 4 were never looked at; only what follows from the first one's class may have moved them.
    assert after[1] / after[0] >= 0.9 * before[1] / before[0]


def test_a_new_request_starts_with_what_its_kind_showed():
    model = AcceptanceModel(4)
    model.enter(0, "greedy", 0)
    model.enter(1, "hot", 1)
    _observe(model, 0, 2, 2, times=80)
    _observe(model, 1, 2, 0, times=80)
    model.enter(2, "greedy", 2)
    model.enter(3, "hot", 3)
    assert _conditional(model, np.array([2]))[0, 0] > 0.9
    assert _conditional(model, np.array([3]))[0, 0] < 0.15


def test_prompts_that_begin_alike_form_a_class_once_they_come_again():
    model = AcceptanceModel(4)
    for index in range(4):
        model.enter(index, "greedy", "agents" if index % 2 else f"other {index}")
    for _ in range(60):
        model.observe([0, 1, 2, 3], [2] * 4, [0, 2, 0, 2])
    model.enter(4, "greedy", "agents")
    model.enter(5, "greedy", "never seen")
    agents, others = _conditional(model, np.array([4, 5]))[:, 0]
    assert agents > others + 0.1


def test_far_positions_follow_the_ratio_of_the_parent():
    model = AcceptanceModel(4)
    model.enter(0, "a", 0)
    model.enter(1, "b", 1)
    _observe(model, 0, 4, 4, times=100)
    _observe(model, 1, 1, 1, times=100)
    assert _conditional(model, np.array([1]))[0, 3] > 0.8, (
        "b never drafted four tokens, but nothing speaks against them"
    )


@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 4)])
def test_a_sudden_change_is_believed_within_a_dozen_observations_by_all_of_the_class(before, after):
    model = _model(requests=2)
    for _ in range(150):
        model.observe([0, 1], [4, 4], [before, before])
    _observe(model, 0, 4, after, times=12)
    changed, silent = _conditional(model, np.array([0, 1]))[:, 0]
    if after:
        assert changed > 0.7
        assert silent > 0.4
    else:
        assert changed < 0.3
        assert silent < 0.6


def test_chance_alone_does_not_look_like_a_change(monkeypatch):
    cuts = []
    monkeypatch.setattr(AcceptanceModel, "_cut", lambda self, row, touched: cuts.append(row))
    model, random = _model(), np.random.default_rng(1)
    for _ in range(3000):
        _observe(model, 0, 1, int(random.random() < 0.6))
    assert len(cuts) <= 3 * 3, "one in a thousand, for each of the three levels"


def test_idle_requests_become_like_their_class_again():
    model = _model(requests=2)
    for number in range(100):
        _observe(model, 0, 2, 2)
        if number % 12 == 0:
            _observe(model, 1, 2, 0)
    unlucky = _conditional(model, np.array([1]))[0, 0]
    for _ in range(100):
        model.fade(np.array([1]))
    assert _conditional(model, np.array([1]))[0, 0] > unlucky + 0.2


def test_more_classes_than_room_for_them():
    model = AcceptanceModel(2)
    for number in range(3 * acceptance.MAX_SIMILAR):
        for index in range(2):
            model.enter(index, number % (2 * acceptance.MAX_KINDS), number)
        model.observe([0, 1], [2, 2], [1, 2])
    assert np.isfinite(model.survival(np.array([0, 1]))).all()
    assert len(model._similar) == acceptance.MAX_SIMILAR


def test_requests_beyond_the_first_arrays():
    model = AcceptanceModel(3)
    for index in (5, 400, 63, 64):
        model.enter(index, "greedy", 0)
    model.observe([400], [3], [3])
    assert model.survival(np.array([5, 400, 63, 64])).shape == (4, 3)


def _after_forty_prompts():
    """They came again and again, and all their drafts were accepted; four of them run now."""
    model = AcceptanceModel(4)
    for _ in range(3):
        for prompt in range(40):
            model.enter(0, "greedy", prompt)
            _observe(model, 0, 4, 4, times=5)
    for prompt in range(4):
        model.enter(prompt, "greedy", prompt)
    return model


def test_idle_classes_forget_a_drafter_that_changed():
    """Forty prompts come again and again, four at a time; the drafter turns hopeless while four others run."""
    model = _after_forty_prompts()
    for _ in range(8):
        model.observe([0, 1, 2, 3], [4] * 4, [0] * 4)
    model.enter(5, "greedy", 30)
    assert _conditional(model, np.array([5]))[0, 0] < 0.4


def test_a_class_that_was_idle_follows_its_parent_when_its_prompt_comes_again():
    """What its parent has learned since the change is calibrated_survival of it, too."""
    model = _after_forty_prompts()
    for _ in range(30):
        model.observe([0, 1, 2, 3], [4] * 4, [0] * 4)
    model.enter(5, "greedy", 30)
    model.enter(6, "greedy", "never seen")
    idle, unknown = _conditional(model, np.array([5, 6]))[:, 0]
    assert unknown < 0.05
    assert idle < 0.2


def test_many_classes_that_learn_in_one_step_take_turns():
    model = AcceptanceModel(4)
    all_requests = np.arange(40)
    for _ in range(2):
        for index in all_requests:
            model.enter(index, "greedy", int(index))
    before = model._class_estimate[acceptance.MAX_KINDS + 1 :, 0].copy()
    fresh = []
    for _ in range(6):
        model.observe(all_requests, [2] * 40, [2] * 40)
        now = model._class_estimate[acceptance.MAX_KINDS + 1 :, 0]
        fresh.append(int((now[:40] != before[:40]).sum()))
    assert fresh[:5] == [8, 16, 24, 32, 40]


def _served(rates, seed, requests=60, tokens=100):
    """A model that has served one request after the other, each with one draft token per step."""
    model, random = _model(), np.random.default_rng(seed)
    for number in range(requests):
        model.enter(0, "greedy", "alike")
        for _ in range(tokens):
            _observe(model, 0, 1, int(random.random() < rates[number % len(rates)]))
    model.enter(0, "greedy", "alike")
    return model


@pytest.mark.parametrize("seed", range(5))
def test_a_run_of_refusals_says_little_of_a_request_whose_class_is_alike(seed):
    model = _served([0.2], seed)
    before = model.survival(ONE)[0, 0]
    _observe(model, 0, 1, 0, times=10)
    assert 0.1 < before < 0.32
    # In one of nine such places ten refusals come in a row. With the weak prior alone it is 0.47 of what it was.
    assert model.survival(ONE)[0, 0] > 0.57 * before


@pytest.mark.parametrize("seed", range(5))
def test_and_much_where_requests_differ(seed):
    model = _served([0.9, 0.05], seed)
    before = model.survival(ONE)[0, 0]
    _observe(model, 0, 1, 0, times=10)
    assert model.survival(ONE)[0, 0] < 0.55 * before
