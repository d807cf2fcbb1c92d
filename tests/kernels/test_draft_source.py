"""Whose drafts serve: a lookup's, or a draft model's whose acceptance is learned on the device."""

import ahead_of_time
import pytest
from draft_source_cases import ACCEPTANCE, NUM_DRAFTS, chosen_by_kernel, launches_of_choice
from interpreting import interpreted

import vllm_instant_kernels.draft_source as module

ASSUMED = sum(ACCEPTANCE**position for position in range(1, NUM_DRAFTS + 1))  # 1.533


def _chosen(rows, steps, ended=()):
    return interpreted(chosen_by_kernel, rows, steps, ended)[0].tolist()


def _by_arithmetic(steps):
    """The same for one request."""
    tried, kept, predicted, found, last = 4.0, 4.0 * ACCEPTANCE, 4.0, 4.0, 0.0
    chosen = []
    for [sampled], [rejected], [expected] in steps:
        accepted, refused = max(sampled - 1, 0), min(rejected, 1)
        tried, kept, predicted, found = (0.97 * value for value in (tried, kept, predicted, found))
        if last < 0:
            tried, kept = tried + accepted + refused, kept + accepted
        elif accepted + refused:
            predicted, found = predicted + last, found + accepted
        acceptance = kept / tried
        of_model = sum(acceptance**position for position in range(1, NUM_DRAFTS + 1))
        chosen.append([int(expected * found / predicted > of_model)])
        last = expected if chosen[-1][0] else -1.0
    return chosen


def test_at_first_the_model_is_assumed_to_have_a_certain_acceptance():
    expected = [0.0, ASSUMED - 0.01, ASSUMED + 0.01, 9.0]
    assert _chosen([3, 1, 0, 2], [([1] * 4, [0] * 4, expected)]) == [[0, 0, 1, 1]]


def test_a_model_that_is_accepted_more_often_is_preferred_to_a_lookup_that_promises_more_than_was_assumed():
    first, good, refused = ([1], [0], [1.0]), ([4], [0], [1.0]), ([1], [3], [1.0])
    assert _chosen([5], [first] + [good] * 6 + [([4], [0], [2.0])])[-1] == [0]
    assert _chosen([5], [first, refused, refused]) == [[0], [0], [1]]


def test_a_lookup_that_keeps_less_than_it_promises_counts_less():
    first, broken, kept = ([1], [0], [2.0]), ([1], [3], [2.0]), ([3], [1], [2.0])
    assert _chosen([5], [first, broken]) == [[1], [0]]
    assert _chosen([5], [first, kept]) == [[1], [1]]


def test_steps_that_verified_nothing_and_prompts_teach_nothing():
    start, nothing, prompt = ([1], [0], [1.0]), ([1], [0], [1.0]), ([0], [0], [1.0])
    for steps in ([start] + [nothing] * 9, [start] + [prompt] * 9):
        assert _chosen([5], [*steps, ([1], [0], [ASSUMED - 0.01])])[-1] == [0]
        assert _chosen([5], [*steps, ([1], [0], [ASSUMED + 0.01])])[-1] == [1]


def test_it_is_what_the_formula_says(numbers):
    for _ in range(5):
        steps = []
        for _ in range(40):
            accepted = numbers.randint(0, NUM_DRAFTS)
            steps.append(([1 + accepted], [NUM_DRAFTS - accepted], [numbers.uniform(0, 3)]))
        assert _chosen([2], steps) == _by_arithmetic(steps)


def test_rows_are_independent_and_a_new_request_begins_with_what_all_rows_had():
    good_and_bad = ([4, 1], [0, 3], [0.0, 0.0])
    steps = [good_and_bad] * 30
    between = ([1, 1], [0, 0], [1.0, 1.0])
    assert _chosen([0, 1], [*steps, between])[-1] == [0, 1]
    assert _chosen([0, 1], [*steps, between], ended=[(29, 1)])[-1] == [0, 0]
    both_good = [([1, 1], [0, 0], [0.0, 0.0])] + [([4, 4], [0, 0], [0.0, 0.0])] * 29
    more_than_assumed = ([1, 1], [0, 0], [ASSUMED + 0.2, ASSUMED + 0.2])
    # Six idle rows, with what is assumed at first, are among "all".
    assert _chosen([0, 1], [*both_good, more_than_assumed], ended=[(29, 1)])[-1] == [0, 0]


@pytest.mark.kernel
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_for_gpus_without_spilled_registers(capability, tmp_path):
    [launch] = ahead_of_time.launches(module, launches_of_choice)
    assert ahead_of_time.compiled(launch, capability, tmp_path).spilled == 0
