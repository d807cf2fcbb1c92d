"""The adapter between vLLM's custom drafter interface and a drafter plugin, without an engine."""

from types import SimpleNamespace

import numpy as np
import pytest
from patch_harness import wrap

from vllm_instant import Draft, DraftCost, Drafter
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.interfaces.drafter import FollowingDrafter, PushedTail
from vllm_instant.patches import drafter as drafter_patch
from vllm_instant.patches.drafter import PATCH, PluginDrafter
from vllm_instant.patches.names import MODEL_RUNNER, PLAN_ATTRIBUTE
from vllm_instant.patches.worker_reports import report_of
from vllm_instant.speculation.draft_plan import DraftPlan

LENGTH = 12


class Recording(Drafter):
    """Answers what the test says and keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self.forgotten = []

    def propose(self, requests):
        self.asked.append(
            [(r.request_id, r.token_ids.tolist(), r.num_prompt_tokens, r.max_draft_tokens) for r in requests]
        )
        return self.answer(requests)

    def forget(self, request_id):
        self.forgotten.append(request_id)


def _adapter(answer):
    adapter = object.__new__(PluginDrafter)
    plugin = Recording(answer)
    adapter.drafter = GuardedPlugin("drafter", "recording", plugin)
    adapter.vocab_size, adapter.max_draft_tokens = 100, 3
    return adapter, plugin


def _propose(adapter, sampled, plan=None, num_tokens=(4, 5, 6)):
    tokens = np.arange(3 * LENGTH, dtype=np.int32).reshape(3, LENGTH)
    adapter.begin_step(["a", "b", "c"], np.array([2, 3, 4], np.int32), plan or DraftPlan())
    return adapter.propose(sampled, np.array(num_tokens, np.int32), tokens)


def test_it_asks_for_what_was_planned_and_nothing_else():
    adapter, plugin = _adapter(lambda requests: [[7] * r.max_draft_tokens for r in requests])
    drafts = _propose(adapter, [[1], [], [2]], DraftPlan({"a": 2, "c": 0}))
    assert drafts == [[7, 7], [], []]
    assert plugin.asked == [[("a", [0, 1, 2, 3], 2, 2)]]


def test_a_request_without_a_plan_gets_the_full_length():
    adapter, _ = _adapter(lambda requests: [[7] * r.max_draft_tokens for r in requests])
    assert _propose(adapter, [[1], [1], [1]]) == [[7, 7, 7]] * 3


def test_drafts_end_at_the_models_length():
    adapter, plugin = _adapter(lambda requests: [[7] * r.max_draft_tokens for r in requests])
    assert _propose(adapter, [[1], [1], [1]], num_tokens=(LENGTH - 1, LENGTH, 4)) == [[7], [], [7, 7, 7]]
    assert [asked[0] for asked in plugin.asked[0]] == ["a", "c"]


def test_nothing_is_asked_when_nothing_is_wanted():
    adapter, plugin = _adapter(lambda requests: 1 / 0)
    assert _propose(adapter, [[1], [1], [1]], DraftPlan({"a": 0, "b": 0, "c": 0})) == [[], [], []]
    assert plugin.asked == []


def test_fewer_drafts_than_allowed_are_fine():
    adapter, _ = _adapter(lambda requests: [[], np.array([5, 6]), (np.int64(9),)])
    drafts = _propose(adapter, [[1], [1], [1]])
    assert drafts == [[], [5, 6], [9]]
    assert all(type(token) is int for row in drafts for token in row)


@pytest.mark.parametrize(
    "answer",
    [
        lambda requests: [[1]] * 2,
        lambda requests: [[1] * 4] * 3,
        lambda requests: [None] * 3,
        lambda requests: [[100]] * 3,
        lambda requests: [[-1]] * 3,
        lambda requests: [["x"]] * 3,
        lambda requests: [Draft([1, 2], [0.5])] * 3,
        lambda requests: 1 / 0,
    ],
    ids=[
        "too few rows",
        "too long",
        "none",
        "outside of the vocabulary",
        "negative",
        "no number",
        "confidence missing",
        "raises",
    ],
)
def test_what_could_harm_the_engine_disables_the_drafter(answer):
    adapter, plugin = _adapter(answer)
    for _ in range(2):
        assert _propose(adapter, [[1], [1], [1]]) == [[], [], []]
    assert len(plugin.asked) == 1

    report = report_of(SimpleNamespace(drafter=adapter))
    assert report.failures == [{"slot": "drafter", "plugin": "recording", "hook": "propose", "count": 1}]
    assert report.draft_steps is None


def test_finished_requests_are_forgotten_in_a_fixed_order():
    adapter, plugin = _adapter(lambda requests: [])
    runner_class = type("Runner", (), {"propose_draft_token_ids": print})
    runner_class._update_states = lambda self, scheduler_output: "updated"
    wrap(PATCH, MODEL_RUNNER, GPUModelRunner=runner_class)
    runner = runner_class()
    runner.drafter = adapter
    # A step without tokens drafts nothing: the engine only names finished requests before it goes idle.
    assert runner._update_states(SimpleNamespace(finished_req_ids={"y", "x", "a"})) == "updated"
    assert plugin.forgotten == ["a", "x", "y"]


def test_drafts_that_do_not_earn_their_price_are_cut():
    adapter, _ = _adapter(lambda requests: [Draft([1, 2, 3], [0.9, 0.9, 0.1])] * 3)
    plan = DraftPlan(draft_cost=DraftCost(verify_cost_curve=[(1, 0.3), (100, 30.0)]), fixed=frozenset("b"))
    assert _propose(adapter, [[1], [1], [1]], plan) == [[1, 2], [1, 2, 3], [1, 2]]


def test_the_plugin_learns_the_tenant_and_who_asked_for_the_length():
    seen = []
    adapter, _ = _adapter(lambda requests: seen.extend(requests) or [[]] * len(requests))
    _propose(adapter, [[1], [1], []], DraftPlan(fixed=frozenset("b"), cache_salts={"a": "tenant"}))
    assert [(r.cache_salt, r.is_fixed) for r in seen] == [("tenant", False), ("", True)]


class Following(Recording, FollowingDrafter):
    """A drafter that follows all requests."""

    def enter(self, request):
        self.asked.append(("enter", request.request_id, request.token_ids.tolist(), request.cache_salt))

    def receive(self, pushed):
        self.asked.append(("receive", pushed))


def test_a_following_drafter_sees_requests_without_drafts_and_what_clients_sent():
    adapter, _ = _adapter(None)
    plugin = adapter.drafter.instance = Following(lambda requests: [[7] * r.max_draft_tokens for r in requests])
    adapter.follows = True
    pushed = {"a": [PushedTail(0, 0, 0, 0, [1], b"")]}
    drafts = _propose(adapter, [[1], [], [2]], DraftPlan({"a": 2, "c": 0}, pushed=pushed))
    assert drafts == [[7, 7], [], []]
    assert plugin.asked == [("receive", pushed), [("a", [0, 1, 2, 3], 2, 2), ("c", [24, 25, 26, 27, 28, 29], 4, 0)]]


def test_a_following_drafter_sees_new_prompts_of_requests_that_are_about_to_sample():
    adapter, _ = _adapter(None)
    plugin = adapter.drafter.instance = Following(lambda requests: [])
    adapter.follows = True
    runner_class = type("Runner", (), {"propose_draft_token_ids": print, "_update_states": lambda self, output: None})
    wrap(PATCH, MODEL_RUNNER, GPUModelRunner=runner_class)
    runner = runner_class()
    runner.drafter = adapter
    new = [
        SimpleNamespace(req_id="a", prompt_token_ids=[1, 2]),
        SimpleNamespace(req_id="reads on", prompt_token_ids=[1, 2]),
        SimpleNamespace(req_id="c", prompt_token_ids=None),
    ]
    output = SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=new)
    setattr(output, PLAN_ATTRIBUTE, DraftPlan({"a": 0, "c": 0}, cache_salts={"a": "tenant"}))
    runner._update_states(output)
    assert plugin.asked == [("enter", "a", [1, 2], "tenant")]


def test_whether_a_drafter_follows_is_seen_when_it_is_built(monkeypatch):
    context = SimpleNamespace(vocab_size=100, num_speculative_tokens=3)
    monkeypatch.setattr(drafter_patch, "context_of", lambda *_: context)
    monkeypatch.setattr(drafter_patch.deployment_env, "get_deployment", lambda: object())
    for plugin in (Recording(None), Following(None)):
        guarded = GuardedPlugin("drafter", "any", plugin)
        monkeypatch.setattr(drafter_patch, "build_guarded", lambda *_, guarded=guarded: guarded)
        assert PluginDrafter(None).follows is isinstance(plugin, Following)
