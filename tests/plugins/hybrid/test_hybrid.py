"""Which source the hybrid takes, without an engine."""

from dataclasses import replace

import numpy as np
import pytest

from vllm_instant import Draft, DraftCost, DraftRequest
from vllm_instant.interfaces.drafter import HybridDrafter
from vllm_instant_plugins.hybrid.drafter import MIN_STEPS_BETWEEN_PROBES, PROBE_TOKENS, LookupHybridDrafter

MOST = 4
FREE = DraftCost()


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
        self.drafter = LookupHybridDrafter(lookup, MOST)
        self.tokens = {name: [1, 2, 3] for name in names}
        self.pinned = set()
        self.uncached_tokens = {}

    def assign(self, draft_cost=FREE):
        requests = [
            DraftRequest(
                name, np.array(tokens, np.int32), 3, MOST, "", name in self.pinned, self.uncached_tokens.get(name, 0)
            )
            for name, tokens in self.tokens.items()
        ]
        return dict(zip(self.tokens, self.drafter.assign(requests, draft_cost), strict=True))

    def step(self, accepted, draft_cost=FREE):
        """One step in which the model's drafts are accepted up to ``accepted[name]`` tokens."""
        shares = self.assign(draft_cost)
        drafts = {name: list(range(10, 10 + share.num_draft_tokens)) for name, share in shares.items()}
        self.drafter.on_model_drafts(drafts)
        for name, draft in drafts.items():
            kept = min(accepted.get(name, 0), len(draft))
            self.tokens[name] += [*draft[:kept], 99]
        return shares

    def learn(self, steps=30, **accepted):
        for _ in range(steps):
            self.step(accepted)


def test_it_is_a_hybrid_drafter():
    assert isinstance(LookupHybridDrafter(Lookup(), MOST), HybridDrafter)


def test_each_request_gets_its_better_source():
    driven = Driven(Lookup(a=[0.95] * 4))
    driven.learn(a=1, b=3)
    shares = driven.assign()
    assert (shares["a"].num_draft_tokens, list(shares["a"].own)) == (0, [7] * 4)
    assert shares["b"].num_draft_tokens == MOST


def test_a_weak_lookup_leaves_it_to_the_model():
    driven = Driven(Lookup(a=[0.1] * 4))
    driven.learn(a=4, b=4)
    assert driven.assign()["a"].num_draft_tokens == MOST


def test_the_model_does_not_run_when_the_lookup_serves_all():
    driven = Driven(Lookup(a=[0.99] * 4, b=[0.99] * 4))
    driven.learn(a=2, b=2)
    assert [share.num_draft_tokens for share in driven.assign().values()] == [0, 0]


def test_a_costly_model_does_not_run_for_one_request_alone():
    driven = Driven(Lookup(a=[0.95] * 4))
    driven.learn(a=2, b=2)
    shares = driven.assign(DraftCost(per_token=0.1, draft_fixed=1.5, per_draft_step=0.3))
    assert shares["b"].num_draft_tokens == 0
    assert list(shares["a"].own) == [7] * 4


def test_it_drafts_only_as_far_as_draft_steps_pay():
    driven = Driven(Lookup())
    driven.learn(200, a=1, b=1)
    lengths = [
        share.num_draft_tokens for share in driven.assign(DraftCost(per_token=0.05, per_draft_step=0.3)).values()
    ]
    assert max(lengths) == 1


def test_nothing_pays():
    driven = Driven(Lookup(a=[0.3]))
    driven.learn(200)
    shares = driven.assign(DraftCost(per_token=0.25, verify_fixed=0.2, draft_fixed=0.5, per_draft_step=0.3))
    assert all(not share.own and not share.num_draft_tokens for share in shares.values())


def test_a_client_that_asked_for_its_length_gets_it():
    driven = Driven(Lookup(a=[0.3] * 4))
    driven.learn(200)
    driven.pinned.add("a")
    shares = driven.assign(DraftCost(per_token=0.5, verify_fixed=2.0, draft_fixed=9.0, per_draft_step=9.0))
    assert list(shares["a"].own) == [7] * 4
    assert not shares["b"].own


def test_an_unused_model_is_tried_again():
    driven = Driven(Lookup())
    driven.learn(200)
    costly = DraftCost(per_token=0.3, draft_fixed=0.2, per_draft_step=0.1)
    asked = [
        sum(share.num_draft_tokens for share in driven.step({"a": 4, "b": 4}, costly).values())
        for _ in range(3 * MIN_STEPS_BETWEEN_PROBES + 3)
    ]
    assert asked[0] == 0
    assert 1 <= sum(1 for length in asked if length) <= 5
    assert max(asked) == PROBE_TOKENS


def test_acceptance_of_the_model_is_learned_by_position():
    driven = Driven(Lookup())
    driven.learn(100, a=2, b=2)
    survival = driven.drafter.model.survival(np.array([0]))[0]
    assert survival[1] == pytest.approx(1.0, abs=0.1)
    assert survival[2] < 0.2


def test_ended_requests_are_forgotten():
    lookup = Lookup()
    driven = Driven(lookup)
    driven.learn(3, a=1)
    driven.drafter.forget("a")
    assert lookup.forgotten == ["a"]
    assert driven.drafter._drafted.keys() <= {"b"}
    driven.tokens = {"c": [1, 2, 3], "b": driven.tokens["b"]}
    driven.assign()
    assert sorted(driven.drafter._indices.values()) == [0, 1]


def test_during_a_miss_streak_a_token_saves_a_step():
    """Its share of the step is worth three average tokens: drafts that do not pay on average pay there."""
    draft_cost = DraftCost(per_token=0.1, draft_fixed=0.8, per_draft_step=0.1)
    accepted = {"a": 1, "b": 1}
    average, silent = Driven(Lookup()), Driven(Lookup())
    for _ in range(60):
        average.step(accepted, draft_cost)
        silent.step(accepted, replace(draft_cost, baseline_step=3.0))
    assert [share.num_draft_tokens for share in average.assign(draft_cost).values()] == [1, 1]
    costly = replace(draft_cost, draft_fixed=2.5)
    assert [share.num_draft_tokens for share in average.assign(costly).values()] == [0, 0]
    assert [share.num_draft_tokens for share in silent.assign(replace(costly, baseline_step=3.0)).values()] == [1, 1]


READING = DraftCost(per_token=0.05, draft_fixed=0.1, per_draft_step=0.1, catch_up_fixed=0.2, catch_up_per_token=0.05)


def test_the_cost_of_catching_up_counts():
    driven = Driven(Lookup(a=[0.6], b=[0.6]))
    driven.learn(60, a=2, b=2)
    assert [share.num_draft_tokens for share in driven.assign(READING).values()] == [2, 2]
    driven.uncached_tokens = {"a": 10}
    assert [share.num_draft_tokens for share in driven.assign(READING).values()] == [2, 2]
    driven.uncached_tokens = {"a": 40}
    assert [share.num_draft_tokens for share in driven.assign(READING).values()] == [0, 2]
    driven.uncached_tokens = {"a": 40, "b": 40}
    shares = driven.assign(READING)
    assert [(share.num_draft_tokens, len(share.own)) for share in shares.values()] == [(0, 1), (0, 1)]
    driven.pinned = {"a"}
    assert driven.assign(READING)["a"].num_draft_tokens > 0


def test_catching_up_has_a_fixed_cost():
    driven = Driven(Lookup(a=[0.9]), names=("a",))
    driven.learn(60, a=2)
    assert driven.assign(READING)["a"].num_draft_tokens == 2
    driven.uncached_tokens = {"a": 1}
    assert driven.assign(READING)["a"].num_draft_tokens == 2
    assert driven.assign(replace(READING, catch_up_fixed=1.0))["a"].num_draft_tokens == 0


def test_the_cost_of_catching_up_is_spread_over_the_miss_streak():
    draft_cost = replace(READING, baseline_step=1.0)
    silent, speaking = Driven(Lookup(), names=("a",)), Driven(Lookup(), names=("a",))
    for step in range(200):
        silent.step({"a": 2}, draft_cost)
        speaking.drafter._lookup.confidence = {"a": [0.9] * 4 if step % 2 else []}
        speaking.step({"a": 2}, draft_cost)
    speaking.drafter._lookup.confidence = {}
    for driven, length in ((silent, 2), (speaking, 0)):
        assert driven.assign(draft_cost)["a"].num_draft_tokens > 0
        driven.uncached_tokens = {"a": 80}
        assert driven.assign(draft_cost)["a"].num_draft_tokens == length


def test_probes_are_rarer_where_the_model_must_read_first():
    def probes(uncached_tokens):
        driven = Driven(Lookup())
        driven.learn(200)
        driven.uncached_tokens = dict.fromkeys("ab", uncached_tokens)
        costly = replace(READING, per_token=0.3)
        asked = (driven.step({}, costly) for _ in range(2000))
        return sum(any(share.num_draft_tokens for share in shares.values()) for shares in asked)

    assert 1 < probes(100) < probes(0) / 4


def test_lookups_are_cut_by_what_batches_cost():
    driven = Driven(Lookup(a=[0.9, 0.9, 0.9, 0.9]), names=("a",))
    driven.learn(60)
    # The first token is costly because it is the first; the third would be the first that does not pay.
    draft_cost = DraftCost(verify_cost_curve=[(1, 0.8), (2, 0.9), (3, 2.5), (4, 4.0)], per_token=0.9, draft_fixed=9.0)
    share = driven.assign(draft_cost)["a"]
    assert (list(share.own), share.num_draft_tokens) == ([7, 7], 0)


def test_too_high_expectations_are_corrected(monkeypatch):
    """A source that is chosen for its estimate is chosen more often when it is too high."""
    driven = Driven(Lookup(), names=("a",))
    monkeypatch.setattr(driven.drafter.model, "survival", lambda indices: np.full((len(indices), MOST), 0.8))
    draft_cost = DraftCost(per_token=0.1, draft_fixed=0.3, per_draft_step=0.2)
    assert driven.step({"a": 1}, draft_cost)["a"].num_draft_tokens == MOST
    driven.learn(40, a=1)
    assert driven.assign(draft_cost)["a"].num_draft_tokens == 0
    driven.tokens["a"] += [5] * 3
    for _ in range(2000):
        driven.assign(replace(draft_cost, draft_fixed=99.0))
    assert driven.assign(draft_cost)["a"].num_draft_tokens == MOST, "but not forever"


def test_unaffordable_batches_do_not_make_rows_costly():
    """A cold server: its policy lets steps grow by degrees."""
    driven = Driven(Lookup())
    driven.learn(60, a=4, b=4)
    affordable = [(1, 0.2), (2, 0.3), (3, 0.4), (4, 0.5)]
    draft_cost = DraftCost(
        verify_cost_curve=[*affordable, (6, 1e6), (8, 1e6)], per_token=0.13, draft_fixed=0.1, per_draft_step=0.1
    )
    assert [share.num_draft_tokens for share in driven.assign(draft_cost).values()] == [2, 2]
    none = DraftCost(verify_cost_curve=[(1, 1e6), (8, 1e6)], per_token=1e6, draft_fixed=0.1, per_draft_step=0.1)
    assert not any(share.num_draft_tokens for share in driven.assign(none).values())


def test_the_lost_draft_of_a_preempted_request_does_not_count_as_expected():
    driven = Driven(Lookup(), names=("a",))
    driven.learn(60, a=4)
    before = driven.drafter._accepted / driven.drafter._expected
    for _ in range(20):
        shares = driven.assign()
        draft = list(range(10, 10 + shares["a"].num_draft_tokens))
        driven.drafter.on_model_drafts({"a": draft})
        driven.tokens["a"].append(draft[0])
    assert driven.drafter._accepted / driven.drafter._expected > 0.9 * before
