"""Drafting by a plugin beside a draft model, with a runner made of arrays."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from patch_harness import wrap

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.resolved import drafter_arguments, installed_plugin
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.drafter import DraftAssignment, HybridDrafter
from vllm_instant.interfaces.speculation import UNAFFORDABLE
from vllm_instant.patches import hybrid_drafting
from vllm_instant.patches.hybrid_drafting import HYBRID_ATTRIBUTE, PATCH, HybridDraftRunner
from vllm_instant.patches.names import MODEL_RUNNER, PLAN_ATTRIBUTE, V2_MODEL_RUNNER
from vllm_instant.patches.plugin_factory import PluginStartError
from vllm_instant.patches.worker_reports import report_of
from vllm_instant.speculation.draft_plan import DraftPlan

LENGTH, VOCABULARY = 16, 50
SAMPLED = torch.tensor([[11, 12, -1], [21, -1, -1], [31, 32, 33]])


class Recording(HybridDrafter):
    """Assigns as the test says, and records its calls."""

    def __init__(self, assignments):
        self.assignments = assignments
        self.asked, self.drafted, self.forgotten = [], [], []

    def propose(self, requests):
        return [[] for _ in requests]

    def assign(self, requests, draft_cost):
        self.draft_cost = draft_cost
        self.asked = [
            (r.request_id, r.token_ids.tolist(), r.num_prompt_tokens, r.max_draft_tokens, r.cache_salt, r.is_fixed)
            for r in requests
        ]
        self.missed = {r.request_id: r.uncached_tokens for r in requests}
        return self.assignments(requests) if callable(self.assignments) else self.assignments

    def on_model_drafts(self, drafts):
        self.drafted.append(dict(drafts))

    def forget(self, request_id):
        self.forgotten.append(request_id)


class Model:
    """A draft model that drafts as many 7s as its plan says, and none for unread requests."""

    def __init__(self, unread=()):
        self.unread = unread
        self.plans = []

    def __call__(self, runner, scheduler_output, *arguments):
        plan = getattr(scheduler_output, PLAN_ATTRIBUTE)
        self.plans.append((dict(plan.num_draft_tokens), scheduler_output.num_spec_tokens_to_schedule))
        ids = runner.input_batch.req_ids
        return [[7] * (0 if name in self.unread else plan.num_draft_tokens.get(name, 0)) for name in ids]


def _hybrid(assignments, discarded=(False, False, False)):
    tokens = np.zeros((4, LENGTH), np.int32)
    tokens[:, :4] = np.arange(4) + 1
    batch = SimpleNamespace(
        req_ids=["a", "b", "c"],
        req_id_to_index={"a": 0, "b": 1, "c": 2},
        token_ids_cpu=tokens,
        num_tokens_no_spec=np.array([4, 4, 4, 0]),
        num_prompt_tokens=np.array([2, 3, 4, 0]),
        vocab_size=VOCABULARY,
    )
    runner = SimpleNamespace(
        input_batch=batch, discard_request_mask=SimpleNamespace(np=np.array(discarded)), _draft_probs=None
    )
    plugin = Recording(assignments)
    draft_model = SimpleNamespace(missed=lambda scheduler_output: [0, 5, 2], read_tokens=5)
    return HybridDraftRunner(runner, GuardedPlugin("drafter", "recording", plugin), draft_model, VOCABULARY), plugin


def _propose(hybrid, model, plan):
    output = SimpleNamespace(num_spec_tokens_to_schedule=9)
    setattr(output, PLAN_ATTRIBUTE, plan)
    drafts = hybrid.propose(partial(model, hybrid.runner), output, plan, (SAMPLED,))
    assert output.num_spec_tokens_to_schedule == 9  # the scheduler's own object does not change
    return drafts


def test_each_request_gets_the_drafts_of_its_assignment():
    hybrid, plugin = _hybrid([DraftAssignment([1, 2, 3]), DraftAssignment(num_draft_tokens=2), DraftAssignment()])
    model = Model()
    plan = DraftPlan({"a": 4, "b": 4, "c": 4}, fixed=frozenset("c"), cache_salts={"b": "salt"})
    assert _propose(hybrid, model, plan) == [[1, 2, 3], [7, 7], []]
    assert model.plans == [({"b": 2}, 2)]
    assert plugin.drafted == [{"b": [7, 7]}]
    assert plugin.asked == [
        ("a", [1, 2, 3, 4, 11, 12], 2, 4, "", False),
        ("b", [1, 2, 3, 4, 21], 3, 4, "salt", False),
        ("c", [1, 2, 3, 4, 31, 32, 33], 4, 4, "", True),
    ]
    assert hybrid.draft_steps == 2


def test_the_plugin_learns_of_missed_tokens_and_the_report_of_those_that_were_read():
    hybrid, plugin = _hybrid([DraftAssignment(num_draft_tokens=2)] * 3)
    _propose(hybrid, Model(), DraftPlan({"a": 4, "b": 4, "c": 4}))
    assert plugin.missed == {"a": 0, "b": 5, "c": 2}
    hybrid.runner.rejection_sampler = None
    setattr(hybrid.runner, HYBRID_ATTRIBUTE, hybrid)
    report = report_of(hybrid.runner)
    assert (report.draft_steps, report.uncached_tokens) == (2, 5)


def test_the_model_does_not_draft_without_an_assignment():
    hybrid, plugin = _hybrid([DraftAssignment([1]), DraftAssignment(), DraftAssignment([2])])
    model = Model()
    assert _propose(hybrid, model, DraftPlan({"a": 4, "b": 4, "c": 4})) == [[1], [], [2]]
    assert model.plans == [({}, 0)]
    assert plugin.drafted == []
    assert hybrid.draft_steps == 0


def test_the_model_does_not_run_while_a_request_waits_for_its_first_token():
    hybrid, plugin = _hybrid([DraftAssignment([1], 2), DraftAssignment(num_draft_tokens=2), DraftAssignment([2])])
    model = Model()
    plan = DraftPlan({"a": 4, "b": 4, "c": 4}, draft_model_runs=False)
    assert _propose(hybrid, model, plan) == [[1], [], [2]]
    assert model.plans == [({}, 0)]
    assert plugin.draft_cost.draft_fixed == UNAFFORDABLE


def test_only_requests_with_a_draft_budget_are_assigned():
    hybrid, plugin = _hybrid([DraftAssignment([1])], discarded=(False, True, False))
    assert _propose(hybrid, Model(), DraftPlan({"a": 0, "b": 4, "c": 4})) == [[], [], [1]]
    assert [asked[0] for asked in plugin.asked] == ["c"]


def test_the_plugin_is_not_called_in_a_step_without_drafts():
    hybrid, _ = _hybrid(lambda requests: 1 / 0)
    assert _propose(hybrid, Model(), DraftPlan({"a": 0, "b": 0, "c": 0})) == [[], [], []]
    assert not hybrid.drafter.disabled


def test_own_tokens_are_used_where_the_model_drafts_nothing():
    hybrid, _ = _hybrid([DraftAssignment([1, 2], 3), DraftAssignment(num_draft_tokens=3), DraftAssignment()])
    assert _propose(hybrid, Model(unread="ab"), DraftPlan({"a": 4, "b": 4, "c": 4})) == [[1, 2], [], []]


def test_drafts_end_at_the_models_length():
    hybrid, plugin = _hybrid([DraftAssignment()])
    hybrid.runner.input_batch.num_tokens_no_spec[:3] = (LENGTH - 3, LENGTH - 1, LENGTH - 3)
    _propose(hybrid, Model(), DraftPlan({"a": 4, "b": 4, "c": 4}))
    assert [(asked[0], asked[3]) for asked in plugin.asked] == [("a", 1)]


def test_own_tokens_get_one_hot_distributions():
    hybrid, _ = _hybrid([DraftAssignment([1, 2, 3]), DraftAssignment(num_draft_tokens=2), DraftAssignment()])
    model = Model()

    def with_probabilities(runner, *arguments):
        runner._draft_probs = torch.full((3, 2, VOCABULARY), 1 / VOCABULARY)
        return model(runner, *arguments)

    _propose(hybrid, with_probabilities, DraftPlan({"a": 4, "b": 4, "c": 4}))
    probabilities = hybrid.runner._draft_probs
    assert probabilities.shape == (3, 3, VOCABULARY)
    assert probabilities[0].argmax(-1).tolist() == [1, 2, 3]
    assert probabilities[0].max(-1).values.tolist() == [1.0, 1.0, 1.0]
    assert torch.allclose(probabilities[0].sum(-1), torch.ones(3))
    assert torch.allclose(probabilities[1, :2], torch.full((2, VOCABULARY), 1 / VOCABULARY))


@pytest.mark.parametrize(
    "assignments",
    [
        lambda requests: [],
        lambda requests: [DraftAssignment([1] * 5)] * 3,
        lambda requests: [DraftAssignment([VOCABULARY])] * 3,
        lambda requests: [DraftAssignment(num_draft_tokens=5)] * 3,
        lambda requests: 1 / 0,
    ],
    ids=["too few", "too long", "outside of the vocabulary", "too many passes", "raises"],
)
def test_a_plugin_that_fails_leaves_the_model_alone(assignments):
    hybrid, _ = _hybrid(assignments)
    for _ in range(2):
        assert _propose(hybrid, Model(), DraftPlan({"a": 4, "b": 3, "c": 0})) == [[7] * 4, [7] * 3, []]
    assert hybrid.drafter.disabled


@pytest.mark.parametrize(
    ("drafter", "on_device", "refused"), [("hybrid", False, True), ("hybrid", True, False), ("suffix", True, False)]
)
def test_the_v2_runner_is_refused_where_it_would_ignore_the_plugin(monkeypatch, drafter, on_device, refused):
    deployment = resolve(None, [f"drafter.plugin={drafter}", *(["drafter.model=m"] if drafter == "hybrid" else [])])
    monkeypatch.setattr(hybrid_drafting.deployment_env, "get_deployment", lambda: deployment)
    found = installed_plugin(deployment, "drafter").plugin
    plugin = replace(found, build_on_device=found.build_on_device if on_device else None)
    monkeypatch.setattr(hybrid_drafting, "installed_plugin", lambda *_: SimpleNamespace(plugin=plugin))
    chosen = drafter_arguments(deployment)["speculative_config"]
    built = []

    class GPUModelRunner:
        def __init__(self, vllm_config):
            built.append(vllm_config)

    wrap(PATCH, V2_MODEL_RUNNER, GPUModelRunner=GPUModelRunner)
    config = SimpleNamespace(speculative_config=SimpleNamespace(**{"model": None, **chosen}))
    if refused:
        with pytest.raises(PluginStartError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
            GPUModelRunner(config)
    else:
        GPUModelRunner(config)
    assert bool(built) is not refused


def test_finished_requests_are_forgotten_in_a_fixed_order():
    hybrid, plugin = _hybrid([DraftAssignment()] * 3)
    runner_class = type("Runner", (), dict.fromkeys(("propose_draft_token_ids", "initialize_kv_cache"), print))
    runner_class._update_states = lambda self, scheduler_output: "updated"
    wrap(PATCH, MODEL_RUNNER, GPUModelRunner=runner_class)
    runner = runner_class()
    setattr(runner, HYBRID_ATTRIBUTE, hybrid)
    # A step without tokens drafts nothing: the engine only names finished requests before it goes idle.
    assert runner._update_states(SimpleNamespace(finished_req_ids={"x", "b", "a"})) == "updated"
    assert plugin.forgotten == ["a", "b", "x"]
