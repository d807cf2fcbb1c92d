"""Which source the hybrid takes, without an engine."""

from dataclasses import replace

import numpy as np
import pytest

from vllm_instant import Draft, DraftPrice, DraftRequest, SharingDrafter
from vllm_instant_plugins.hybrid.drafter import LEAST_STEPS_BETWEEN_PROBES, PROBE_TOKENS, HybridDrafter

MOST = 4
FREE = DraftPrice()


class Lookup:
    """Proposes what the test says, by request id."""

    def __init__(self, **confidence):
        self.confidence = confidence
        self.forgotten = []

    def propose(self, requests):
        return [
            Draft([7] * len(self.confidence.get(r.request_id, [])), self.confidence.get(r.request_id, []))
            for r in requests
        ]

    def forget(self, request_id):
        self.forgotten.append(request_id)


class Driven:
    """A hybrid whose requests go on as the test says."""

    def __init__(self, lookup, names=("a", "b")):
        self.drafter = HybridDrafter(lookup, MOST)
        self.tokens = {name: [1, 2, 3] for name in names}
        self.pinned = set()
        self.missed = {}

    def share(self, price=FREE):
        requests = [
            DraftRequest(name, np.array(tokens, np.int32), 3, MOST, "", name in self.pinned, self.missed.get(name, 0))
            for name, tokens in self.tokens.items()
        ]
        return dict(zip(self.tokens, self.drafter.share(requests, price), strict=True))

    def step(self, accepted, price=FREE):
        """One step in which the model's drafts come true up to ``accepted[name]`` tokens."""
        shares = self.share(price)
        drafts = {name: list(range(10, 10 + share.model_length)) for name, share in shares.items()}
        self.drafter.model_drafted(drafts)
        for name, draft in drafts.items():
            kept = min(accepted.get(name, 0), len(draft))
            self.tokens[name] += [*draft[:kept], 99]
        return shares

    def learn(self, steps=30, **accepted):
        for _ in range(steps):
            self.step(accepted)


def test_it_is_what_the_seam_asks_for():
    assert isinstance(HybridDrafter(Lookup(), MOST), SharingDrafter)


def test_each_request_gets_its_better_source():
    driven = Driven(Lookup(a=[0.95] * 4))
    driven.learn(a=1, b=3)
    shares = driven.share()
    assert (shares["a"].model_length, list(shares["a"].own)) == (0, [7] * 4)
    assert shares["b"].model_length == MOST


def test_a_weak_lookup_leaves_it_to_the_model():
    driven = Driven(Lookup(a=[0.1] * 4))
    driven.learn(a=4, b=4)
    assert driven.share()["a"].model_length == MOST


def test_the_model_does_not_run_when_the_lookup_serves_all():
    driven = Driven(Lookup(a=[0.99] * 4, b=[0.99] * 4))
    driven.learn(a=2, b=2)
    assert [share.model_length for share in driven.share().values()] == [0, 0]


def test_a_dear_model_does_not_run_for_one_request_alone():
    driven = Driven(Lookup(a=[0.95] * 4))
    driven.learn(a=2, b=2)
    shares = driven.share(DraftPrice(row=0.1, drafting=1.5, draft_pass=0.3))
    assert shares["b"].model_length == 0
    assert list(shares["a"].own) == [7] * 4


def test_it_drafts_only_as_far_as_passes_pay():
    driven = Driven(Lookup())
    driven.learn(200, a=1, b=1)
    lengths = [share.model_length for share in driven.share(DraftPrice(row=0.05, draft_pass=0.3)).values()]
    assert max(lengths) == 1


def test_nothing_pays():
    driven = Driven(Lookup(a=[0.3]))
    driven.learn(200)
    shares = driven.share(DraftPrice(row=0.25, verifying=0.2, drafting=0.5, draft_pass=0.3))
    assert all(not share.own and not share.model_length for share in shares.values())


def test_a_client_that_asked_for_its_length_gets_it():
    driven = Driven(Lookup(a=[0.3] * 4))
    driven.learn(200)
    driven.pinned.add("a")
    shares = driven.share(DraftPrice(row=0.5, verifying=2.0, drafting=9.0, draft_pass=9.0))
    assert list(shares["a"].own) == [7] * 4
    assert not shares["b"].own


def test_an_unused_model_is_tried_again():
    driven = Driven(Lookup())
    driven.learn(200)
    dear = DraftPrice(row=0.3, drafting=0.2, draft_pass=0.1)
    asked = [
        sum(share.model_length for share in driven.step({"a": 4, "b": 4}, dear).values())
        for _ in range(3 * LEAST_STEPS_BETWEEN_PROBES + 3)
    ]
    assert asked[0] == 0
    assert 1 <= sum(1 for length in asked if length) <= 5
    assert max(asked) == PROBE_TOKENS


def test_acceptance_of_the_model_is_learned_by_position():
    driven = Driven(Lookup())
    driven.learn(100, a=2, b=2)
    reach = driven.drafter.model.reach(np.array([0]))[0]
    assert reach[1] == pytest.approx(1.0, abs=0.1)
    assert reach[2] < 0.2


def test_who_ended_is_forgotten():
    lookup = Lookup()
    driven = Driven(lookup)
    driven.learn(3, a=1)
    driven.drafter.forget("a")
    assert lookup.forgotten == ["a"]
    assert driven.drafter._drafted.keys() <= {"b"}
    driven.tokens = {"c": [1, 2, 3], "b": driven.tokens["b"]}
    driven.share()
    assert sorted(driven.drafter._indices.values()) == [0, 1]


def test_where_lookups_are_silent_a_token_saves_a_step():
    """Its share of the step is worth three average tokens: what does not pay at the average price pays there."""
    price = DraftPrice(row=0.1, drafting=0.8, draft_pass=0.1)
    accepted = {"a": 1, "b": 1}
    average, silent = Driven(Lookup()), Driven(Lookup())
    for _ in range(60):
        average.step(accepted, price)
        silent.step(accepted, replace(price, step=3.0))
    assert [share.model_length for share in average.share(price).values()] == [1, 1]
    dear = replace(price, drafting=2.5)
    assert [share.model_length for share in average.share(dear).values()] == [0, 0]
    assert [share.model_length for share in silent.share(replace(dear, step=3.0)).values()] == [1, 1]


READING = DraftPrice(row=0.05, drafting=0.1, draft_pass=0.1, resuming=0.2, missed_token=0.05)


def test_what_the_model_must_read_first_counts():
    driven = Driven(Lookup(a=[0.6], b=[0.6]))
    driven.learn(60, a=2, b=2)
    assert [share.model_length for share in driven.share(READING).values()] == [2, 2]
    driven.missed = {"a": 10}
    assert [share.model_length for share in driven.share(READING).values()] == [2, 2]
    driven.missed = {"a": 40}
    assert [share.model_length for share in driven.share(READING).values()] == [0, 2]
    driven.missed = {"a": 40, "b": 40}
    shares = driven.share(READING)
    assert [(share.model_length, len(share.own)) for share in shares.values()] == [(0, 1), (0, 1)]
    driven.pinned = {"a"}
    assert driven.share(READING)["a"].model_length > 0


def test_reading_anything_has_its_own_price():
    driven = Driven(Lookup(a=[0.9]), names=("a",))
    driven.learn(60, a=2)
    assert driven.share(READING)["a"].model_length == 2
    driven.missed = {"a": 1}
    assert driven.share(READING)["a"].model_length == 2
    assert driven.share(replace(READING, resuming=1.0))["a"].model_length == 0


def test_what_the_model_reads_is_paid_off_while_the_lookup_is_silent():
    price = replace(READING, step=1.0)
    silent, speaking = Driven(Lookup(), names=("a",)), Driven(Lookup(), names=("a",))
    for step in range(200):
        silent.step({"a": 2}, price)
        speaking.drafter._lookup.confidence = {"a": [0.9] * 4 if step % 2 else []}
        speaking.step({"a": 2}, price)
    speaking.drafter._lookup.confidence = {}
    for driven, length in ((silent, 2), (speaking, 0)):
        assert driven.share(price)["a"].model_length > 0
        driven.missed = {"a": 80}
        assert driven.share(price)["a"].model_length == length


def test_probes_are_rarer_where_the_model_must_read_first():
    def probes(missed):
        driven = Driven(Lookup())
        driven.learn(200)
        driven.missed = dict.fromkeys("ab", missed)
        dear = replace(READING, row=0.3)
        asked = (driven.step({}, dear) for _ in range(2000))
        return sum(any(share.model_length for share in shares.values()) for shares in asked)

    assert 1 < probes(100) < probes(0) / 4


def test_lookups_are_cut_by_what_batches_cost():
    driven = Driven(Lookup(a=[0.9, 0.9, 0.9, 0.9]), names=("a",))
    driven.learn(60)
    # The first token is dear because it is the first; the third would be the first that does not pay.
    price = DraftPrice(batch=[(1, 0.8), (2, 0.9), (3, 2.5), (4, 4.0)], row=0.9, drafting=9.0)
    share = driven.share(price)["a"]
    assert (list(share.own), share.model_length) == ([7, 7], 0)


def test_expectations_that_do_not_come_true_are_believed_less(monkeypatch):
    """Who is chosen for an estimate is chosen most often when it is too high."""
    driven = Driven(Lookup(), names=("a",))
    monkeypatch.setattr(driven.drafter.model, "reach", lambda indices: np.full((len(indices), MOST), 0.8))
    price = DraftPrice(row=0.1, drafting=0.3, draft_pass=0.2)
    assert driven.step({"a": 1}, price)["a"].model_length == MOST
    driven.learn(40, a=1)
    assert driven.share(price)["a"].model_length == 0
    driven.tokens["a"] += [5] * 3
    for _ in range(2000):
        driven.share(replace(price, drafting=99.0))
    assert driven.share(price)["a"].model_length == MOST, "not for ever"


def test_batches_that_shall_not_be_run_do_not_make_rows_dear():
    """A cold server: its policy lets steps grow by degrees."""
    driven = Driven(Lookup())
    driven.learn(60, a=4, b=4)
    affordable = [(1, 0.2), (2, 0.3), (3, 0.4), (4, 0.5)]
    price = DraftPrice(batch=[*affordable, (6, 1e6), (8, 1e6)], row=0.13, drafting=0.1, draft_pass=0.1)
    assert [share.model_length for share in driven.share(price).values()] == [2, 2]
    none = DraftPrice(batch=[(1, 1e6), (8, 1e6)], row=1e6, drafting=0.1, draft_pass=0.1)
    assert not any(share.model_length for share in driven.share(none).values())


def test_what_a_preempted_request_lost_does_not_count_as_hoped():
    driven = Driven(Lookup(), names=("a",))
    driven.learn(60, a=4)
    before = driven.drafter._got / driven.drafter._hoped
    for _ in range(20):
        shares = driven.share()
        draft = list(range(10, 10 + shares["a"].model_length))
        driven.drafter.model_drafted({"a": draft})
        driven.tokens["a"].append(draft[0])
    assert driven.drafter._got / driven.drafter._hoped > 0.9 * before
