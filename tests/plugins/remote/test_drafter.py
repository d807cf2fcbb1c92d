"""A step takes what has arrived and fits, tells the server of new tokens, and learns what drafts are worth."""

import numpy as np
import pytest

from vllm_instant import Draft, DraftRequest
from vllm_instant.interfaces.drafter import FollowingDrafter, PushedTail
from vllm_instant_plugins.remote.ages import PRIOR, AgeCalibrator
from vllm_instant_plugins.remote.branches import NO_PROBABILITY, Branch
from vllm_instant_plugins.remote.drafter import RemoteDrafter
from vllm_instant_plugins.suffix.drafter import SuffixDrafter


class Source:
    """A connection on which the test says what has arrived."""

    def __init__(self):
        self.published = {}
        self.news = []
        self.ended = []

    def advance(self, news, ended):
        self.news += [tuple(new) for new in news]
        self.ended += ended

    def arrives(self, request_id, start, tokens, seen=None, probability=NO_PROBABILITY):
        count = len(tokens)
        branch = Branch(0, start, start, tuple(tokens), (probability,) * count, (seen or start,) * count)
        self.published[request_id] = (branch,)


def request(request_id, tokens, limit=4, prompt=2, salt=""):
    return DraftRequest(request_id, np.array(tokens, np.int32), prompt, limit, salt)


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def drafter(source):
    return RemoteDrafter(source, 100, 4)


def test_the_server_is_told_of_every_token_once(drafter, source):
    assert isinstance(drafter, FollowingDrafter)
    drafter.enter(request("a", [1, 2], 0, salt="tenant"))
    drafter.propose([request("a", [1, 2, 3], salt="tenant"), request("b", [9, 8])])
    drafter.propose([request("a", [1, 2, 3, 4, 5], salt="tenant"), request("b", [9, 8])])
    assert source.news == [
        ("a", "tenant", 0, [1, 2]),
        ("a", "tenant", 2, [3]),
        ("b", "", 0, [9, 8]),
        ("a", "tenant", 3, [4, 5]),
    ]
    drafter.forget("a")
    drafter.forget("a request that never was")
    assert source.ended == ["a"]


def told(drafter, source, steps, limit):
    """The numbers of tokens that the server is told of, step by step."""
    tokens, found = [1, 2], []
    drafter.propose([request("a", tokens, limit)])
    for _ in range(steps):
        source.news.clear()
        tokens.append(9)
        drafter.propose([request("a", tokens, limit)])
        found.append(sum(len(new[3]) for new in source.news))
    return found


def test_without_a_budget_the_server_is_told_of_several_tokens_at_once(drafter, source):
    assert told(drafter, source, 16, limit=0) == [0] * 7 + [8] + [0] * 7 + [8]


def test_drafts_that_never_fit_are_asked_for_less_often_until_one_does(drafter, source):
    assert told(drafter, source, 40, limit=4) == [1] * 31 + [0] * 7 + [8, 0]
    source.arrives("a", 43, [9, 9, 9, 9])
    assert told(drafter, source, 43, limit=4)[-1] == 1


def test_a_session_that_replaced_its_text_is_opened_anew(drafter, source):
    drafter.propose([request("a", [1, 2, 3, 4])])
    drafter.propose([request("a", [1, 9])])
    assert source.ended == ["a"]
    assert source.news[-1] == ("a", "", 0, [1, 9])


def test_only_a_draft_that_fits_is_proposed(drafter, source):
    source.arrives("a", 3, [4, 5, 6, 7, 8, 9])
    assert drafter.propose([request("a", [1, 2, 3])])[0].token_ids == (4, 5, 6, 7)
    assert drafter.propose([request("a", [1, 2, 3, 4, 5])])[0].token_ids == (6, 7, 8, 9)
    assert drafter.propose([request("a", [1, 2, 3, 4, 5, 7])]) == [Draft([], [])]
    assert drafter.propose([request("b", [1, 2, 3])]) == [Draft([], [])]


def test_without_budget_nothing_is_proposed_and_the_rates_are_learned_all_the_same(drafter, source):
    tokens = [1, 2, 3]
    for step in range(200):
        source.arrives("a", len(tokens), [7, 8])
        assert drafter.propose([request("a", tokens, 0)]) == [Draft([], [])]
        # Every other draft is right.
        tokens = [*tokens, *((7, 8, 1) if step % 2 else (1,))]
    source.arrives("a", len(tokens), [7, 8])
    [draft] = drafter.propose([request("a", tokens)])
    first, second = draft.confidence
    assert first == pytest.approx(0.5, abs=0.1)
    assert second > first


def test_rates_are_learned_by_age_and_stated_probability():
    calibrator = AgeCalibrator()
    young, old = calibrator.cells([0, 9], [NO_PROBABILITY] * 2)
    sure, unsure = calibrator.cells([0, 0], [7, 0])
    assert calibrator.rates[young] == calibrator.rates[old] == PRIOR
    assert calibrator.rates[sure] > 0.9 > 0.1 > calibrator.rates[unsure]
    for _ in range(100):
        calibrator.observe([young], 1)
        calibrator.observe([old], 0)
        calibrator.observe([unsure], 1)
    assert calibrator.rates[young] > 0.95
    assert calibrator.rates[old] < 0.1
    assert calibrator.rates[unsure] > 0.9
    assert calibrator.cells([10**6], [7]) == calibrator.cells([200], [7])


def test_the_confidence_in_a_drafter_that_is_always_wrong_falls(drafter, source):
    tokens = [1, 2, 3]
    expected = []
    for _ in range(60):
        source.arrives("a", len(tokens), [7, 7, 7, 7], probability=7)
        [draft] = drafter.propose([request("a", tokens)])
        expected.append(sum(np.cumprod(draft.confidence)))
        tokens.append(1)
    assert expected[0] > 2.5
    assert expected[-1] < 0.2


def test_the_lookup_is_used_where_it_expects_more(source):
    lookup = SuffixDrafter(64, 0)
    drafter = RemoteDrafter(source, 100, 4, lookup)
    repetitive = [1, 2, 3, 4, 5, 1, 2, 3]
    nothing, found = drafter.propose([request("a", [9, 8, 7]), request("b", repetitive)])
    assert list(nothing.token_ids) == []
    assert list(found.token_ids) == [4, 5, 1, 2]
    source.arrives("b", len(repetitive), [50, 51, 52, 53], probability=7)
    assert drafter.propose([request("b", repetitive)])[0].token_ids == (50, 51, 52, 53)
    drafter.forget("b")
    assert lookup._live.keys() == {"a"}


def pushed(branch, base, position, seen, tokens):
    return PushedTail(branch, base, position, seen, tokens, b"")


def test_a_client_drafts_for_its_own_request_by_output_positions():
    drafter = RemoteDrafter(None, 100, 4)
    drafter.propose([request("a", [1, 2, 3]), request("b", [1, 2, 3])])
    drafter.receive({"a": [pushed(0, 1, 1, 1, [4, 5, 6])]})
    mine, other = drafter.propose([request("a", [1, 2, 3]), request("b", [1, 2, 3])])
    assert mine.token_ids == (4, 5, 6)
    assert list(other.token_ids) == []
    # Before the first output token, and late.
    drafter.receive({"c": [pushed(0, 0, 0, 0, [3, 4, 5, 6])]})
    assert drafter.propose([request("c", [1, 2, 3, 4])])[0].token_ids == (5, 6)


def test_what_one_client_sends_does_not_change_the_confidence_of_another():
    drafter = RemoteDrafter(None, 100, 4)
    hostile, honest = [1, 2, 3], [1, 2, 3]

    def step():
        drafter.receive(
            {
                "hostile": [pushed(len(hostile), len(hostile) - 2, len(hostile) - 2, len(hostile) - 2, [50, 51])],
                "honest": [pushed(len(honest), len(honest) - 2, len(honest) - 2, len(honest) - 2, [7, 7])],
            }
        )
        return drafter.propose([request("hostile", hostile), request("honest", honest)])

    first = step()[1].confidence[0]
    for _ in range(50):
        hostile.append(1)
        honest.append(7)
        refused, taken = step()
    assert not refused.confidence or refused.confidence[0] < 0.2
    assert taken.confidence[0] > first


def test_hostile_tails_of_a_client_are_dropped():
    drafter = RemoteDrafter(None, 100, 4)
    drafter.propose([request("a", [1, 2, 3])])
    drafter.receive({"a": [pushed(0, 1, 1, 1, [1000]), pushed(1, 5, 5, 5, [7]), pushed(2, 1, 3, 1, [7])]})
    assert drafter.propose([request("a", [1, 2, 3])]) == [Draft([], [])]
