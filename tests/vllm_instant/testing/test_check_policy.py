"""Speculation policies with one fault each are caught, and working ones are not."""

import pytest

from vllm_instant import DraftCost, SpeculationPolicy
from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.interfaces.plugins import PluginContext
from vllm_instant.testing import ContractError, check_policy

CONTEXT = PluginContext(
    model="", max_model_len=4096, max_num_seqs=8, vocab_size=200, num_speculative_tokens=5, device="cpu"
)


class All(SpeculationPolicy):
    def get_num_draft_tokens(self, step):
        return [step.max_draft_tokens for _ in step.requests]


def test_a_correct_policy_passes():
    check_policy(All)


@pytest.mark.parametrize(("name", "options"), [("goodput", {"keep_costs": False}), ("fixed", {})])
def test_first_party_policies_pass(name, options):
    plugin = plugin_manager().get("speculation", name).plugin
    check_policy(lambda: plugin.build(plugin.options(**options), CONTEXT))


class OneMissing(All):
    def get_num_draft_tokens(self, step):
        return super().get_num_draft_tokens(step)[1:]


class Halves(All):
    def get_num_draft_tokens(self, step):
        return [step.max_draft_tokens / 2 for _ in step.requests]


class Booleans(All):
    def get_num_draft_tokens(self, step):
        return [step.max_draft_tokens > 0 for _ in step.requests]


class TooMany(All):
    def get_num_draft_tokens(self, step):
        return [step.max_draft_tokens + 1 for _ in step.requests]


class Sorts(All):
    def get_num_draft_tokens(self, step):
        step.requests.reverse()
        return super().get_num_draft_tokens(step)


class Writes(All):
    def get_num_draft_tokens(self, step):
        for request in step.requests:
            request.temperature = 0.0
        return super().get_num_draft_tokens(step)


class Keeps(All):
    def __init__(self):
        self.seen = set()

    def enter(self, request):
        self.seen.add(request.request_id)


class Infinite(All):
    def draft_cost(self):
        return DraftCost(per_token=float("inf"))


class NegativeCurve(All):
    def draft_cost(self):
        return DraftCost(verify_cost_curve=((1, -0.5),))


class Talkative(All):
    def decisions(self, last, request_id=None):
        return [{}] * 4


class NotJson(All):
    def decisions(self, last, request_id=None):
        return [{"gain": float("nan")}]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (OneMissing, "must return one number per request"),
        (Halves, "must be integers, found .* of float"),
        (Booleans, "must be integers, found .* of bool"),
        (TooMany, "must lie in 0.."),
        (Sorts, "changed the requests"),
        (Writes, "changed the requests"),
        (Keeps, "is kept in Keeps.seen"),
        (Infinite, "must be finite and not negative"),
        (NegativeCurve, "must be finite and not negative"),
        (Talkative, "must return at most 3 decisions, found 4"),
        (NotJson, "must hold plain finite JSON values"),
    ],
)
def test_each_fault_is_named(policy, message):
    with pytest.raises(ContractError, match=message):
        check_policy(policy)
