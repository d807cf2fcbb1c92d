"""What a request's lookup proposes, and how it learns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant_plugins.suffix.calibration import ConfidenceCalibrator
from vllm_instant_plugins.suffix.index import TokenIndex
from vllm_instant_plugins.suffix.request_lookup import FORGET_AFTER, LONG_COPY, NOTHING_SHARED, RequestLookup
from vllm_instant_plugins.suffix.vote import AGREEMENTS, KINDS, OWN, RESUMED, SHARED, SHORTEST


def _calibrator(rates=1.0):
    """One that states these rates at first."""
    calibrator = ConfidenceCalibrator()
    calibrator.rates[:] = rates
    return calibrator


def _ended(*sequences, capacity=256):
    """An index of the outputs of requests that have ended, with their groups."""
    index = TokenIndex(capacity)
    for group, tokens in sequences:
        index.append(np.array(tokens, np.int32), group)
        index.end_sequence(group)
    return index


def _propose(*steps, most=8, shared=NOTHING_SHARED, group=-1, rates=1.0):
    """The last draft of a request whose tokens grow by each of the steps; with the lookup."""
    lookup, calibrator, tokens = RequestLookup(2048), _calibrator(rates), []
    for new in steps:
        tokens += new
        calibrator.rates[:] = rates
        draft = lookup.propose(np.array(tokens, np.int32), most, calibrator, shared, group)
    return draft, lookup


def _tokens(*steps, **options):
    return list(_propose(*steps, **options)[0].token_ids)


def test_a_repetition_is_continued():
    assert _tokens([1, 2, 3, 4, 5, 9, 1, 2], most=3) == [3, 4, 5]


def test_one_token_is_enough_for_a_draft():
    assert _tokens([7, 8, 9, 7], most=2) == [8, 9]


def test_the_more_frequent_continuation_wins():
    assert _tokens([1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2], most=1) == [3]


def test_a_longer_match_outvotes_shorter_ones():
    assert _tokens([5, 1, 2, 3, 1, 2, 4, 1, 2, 4, 5, 1, 2], most=1) == [3]


def _kind(source=OWN, agreement=0, length_class=0):
    return (source * AGREEMENTS + agreement) * len(SHORTEST) + length_class


def _source(kind):
    return kind // len(SHORTEST) // AGREEMENTS


@pytest.mark.parametrize("length", [1, 2, 8, 9, 12, 13, 24, 32])
def test_length_has_classes_with_confidences_of_their_own(length):
    rates = np.zeros(KINDS)
    rates[_kind(length_class=sum(shortest <= length for shortest in SHORTEST) - 1)] = 0.5
    repeated = [*range(10, 10 + length)]
    draft, _ = _propose([*repeated, 99, 1, *repeated], most=1, rates=rates)
    assert draft.token_ids == [99]
    assert draft.confidence == [0.5]


@pytest.mark.parametrize(
    ("tokens", "agreement"),
    [
        ([1, 2, 3, 1, 2], 0),
        ([1, 2, 3, 1, 2, 3, 9, 1, 2], 1),
        ([1, 2, 3, 1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3, 7, 1, 2], 2),
        ([1, 2, 3, 1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 3),
        ([1, 2, 3, 1, 2, 4, 9, 1, 2], 4),
        ([1, 2, 3, 1, 2, 4, 9, 1, 2, 5, 8, 1, 2], 5),
    ],
)
def test_agreement_has_classes_with_confidences_of_their_own(tokens, agreement):
    rates = np.zeros(KINDS)
    rates[_kind(agreement=agreement, length_class=1)] = 0.5
    assert _propose(tokens, most=1, rates=rates)[0].confidence == [0.5]


def test_a_proposal_ends_where_it_becomes_unlikely():
    assert len(_tokens([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], most=7, rates=0.2)) == 3


def test_only_outputs_of_the_own_group_are_proposed():
    shared = _ended((1, [1, 2, 3, 4]), (2, [1, 2, 5, 6]))
    assert _tokens([1, 2], shared=shared, group=1) == [3, 4]
    assert _tokens([1, 2], shared=shared, group=2) == [5, 6]
    assert _tokens([1, 2], shared=shared, group=3) == []
    assert _tokens([1, 2], shared=shared, group=-1) == []


def test_own_tokens_and_outputs_of_others_vote_together():
    shared = _ended((0, [1, 2, 4]), (0, [1, 2, 4]))
    assert _tokens([1, 2, 3, 1, 2], most=1) == [3]
    draft, lookup = _propose([1, 2, 3, 1, 2], most=1, shared=shared, group=0)
    assert draft.token_ids == [4]
    assert _source(lookup.kinds[0]) == SHARED


def test_an_output_does_not_continue_in_the_next_one():
    shared = _ended((0, [5, 1, 2]), (0, [3, 4, 4, 4]))
    assert _tokens([1, 2], shared=shared, group=0) == []
    assert _tokens([2, 3], shared=shared, group=0, most=1) == [4]


PROMPT = [*range(100, 140), 1]
COPY = PROMPT[:20]
DECOYS = [120, 900, 122, 900] * 2
"""What newer occurrences of single tokens would propose."""


@pytest.mark.parametrize(
    ("came", "expected"),
    [
        ([55], [121, 122, 123]),  # token 120 was replaced
        ([55, 56, 120], [121, 122, 123]),  # two tokens were put before it
        ([122], [123, 124, 125]),  # two tokens were left out
    ],
)
def test_a_copy_goes_on_behind_an_edit(came, expected):
    draft, lookup = _propose([*PROMPT, *DECOYS, *COPY], *[[token] for token in came], most=3)
    assert draft.token_ids == expected
    assert _source(lookup.kinds[0]) == RESUMED


def test_only_a_long_copy_of_own_tokens_is_resumed():
    for length in (LONG_COPY - 1, LONG_COPY):
        assert bool(_tokens([*PROMPT, *PROMPT[:length]], [55])) == (length == LONG_COPY)
    assert _tokens(COPY, [55], shared=_ended((0, PROMPT)), group=0) == []


def test_a_copy_that_was_left_long_ago_is_not_resumed():
    unknown = [[token] for token in range(500, 500 + FORGET_AFTER + 2)]
    assert _tokens([*PROMPT, *COPY], *unknown[:-1]) != []
    assert _tokens([*PROMPT, *COPY], *unknown) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(1, 9))
def test_drafts_consist_of_known_tokens(steps, most):
    values = [token for new in steps for token in new]
    draft, lookup = _propose(*steps, most=most, shared=_ended((0, values[::-1]), (1, [7, 8, 9]), capacity=32), group=0)
    assert len(draft.token_ids) == len(draft.confidence) == len(lookup.kinds) <= most
    assert set(draft.token_ids) <= set(values)
    assert all(0 < value <= 1 for value in draft.confidence)
    assert lookup.tokens.tolist() == values


def test_rates_are_learned_by_kind():
    calibrator, tokens = ConfidenceCalibrator(), [1, 2, 3, 1]
    before, lookup = calibrator.rates.copy(), RequestLookup(64)
    lookup.propose(np.array(tokens, np.int32), 2, calibrator)
    right, wrong = lookup.kinds
    lookup.propose(np.array([*tokens, 2, 9], np.int32), 2, calibrator)
    assert calibrator.rates[right] > before[right]
    assert calibrator.rates[wrong] < before[wrong]
    others = np.setdiff1d(np.arange(KINDS), (right, wrong))
    assert (calibrator.rates[others] == before[others]).all()


def test_tokens_behind_a_wrong_one_teach_nothing():
    calibrator, lookup = ConfidenceCalibrator(), RequestLookup(64)
    lookup.propose(np.array([1, 2, 3, 4, 1], np.int32), 3, calibrator)
    before, kinds = calibrator.rates.copy(), lookup.kinds
    lookup.propose(np.array([1, 2, 3, 4, 1, 9, 3], np.int32), 3, calibrator)
    changed = np.flatnonzero(calibrator.rates != before).tolist()
    assert changed == kinds[:1]


def test_an_unpredictable_request_has_lower_confidence_than_others():
    random = np.random.default_rng(0)
    confidence = []
    for wrong in (0, 1):
        calibrator, lookup, tokens = _calibrator(0.5), RequestLookup(2048), [1, 2, 3, 1]
        for step in range(150):
            calibrator.rates[:] = 0.5
            draft = lookup.propose(np.array(tokens, np.int32), 2, calibrator)
            new = random.integers(10, 1000) if wrong and step % 2 else (draft.token_ids or [1])[0]
            tokens += [int(new)] if step % 2 else [1]
        confidence.append(draft.confidence[0])
    assert confidence[1] < 0.8 * confidence[0]
