"""Rejection samplers with one fault each are caught, and working ones are not."""

import planted_samplers
import pytest
import torch

from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.testing import ContractError, check_sampler
from vllm_instant_plugins.samplers.token import TokenSampler


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("token", {}),
        ("block", {}),
        ("relaxed", {"epsilon": 0.1}),
        ("cascade", {"epsilon": 0.1, "rule": "token"}),
        ("cascade", {"epsilon": 0.1, "greedy": "cascade"}),
    ],
)
def test_first_party_samplers_pass(name, options):
    plugin = plugin_manager().get("rejection_sampler", name).plugin

    class Context:
        device = "cpu"

    check_sampler(lambda: plugin.build(plugin.options(**options), Context), lossless=not plugin.lossy)


class Narrow(TokenSampler):
    def verify(self, step):
        num_kept, following = super().verify(step)
        return num_kept.to(torch.int32), following


class OnlyKept(TokenSampler):
    def verify(self, step):
        return super().verify(step)[0]


class OneMissing(TokenSampler):
    def verify(self, step):
        return tuple(tensor[1:] for tensor in super().verify(step))


class KeepsPadding(TokenSampler):
    def verify(self, step):
        _, following = super().verify(step)
        return torch.tensor(step.num_draft_tokens), following


class Outside(TokenSampler):
    def verify(self, step):
        num_kept, following = super().verify(step)
        return num_kept, following + 1000


class WritesDrafts(TokenSampler):
    def verify(self, step):
        answer = super().verify(step)
        step.draft_token_ids.zero_()
        return answer


class GreedyOutside(TokenSampler):
    def verify_greedy(self, step):
        num_kept, following = self.verify(step)
        return num_kept, following + 1000


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Narrow, "must be an int64 tensor of shape .*, found torch.int32"),
        (OnlyKept, "must return a pair of tensors"),
        (OneMissing, "must be an int64 tensor of shape"),
        (KeepsPadding, "draft tokens . were kept"),
        (Outside, "a replacement must be a token id in 0..10"),
        (WritesDrafts, "changed draft_token_ids or draft_probs"),
        (GreedyOutside, "a replacement must be a token id in 0..10"),
        (planted_samplers.AcceptAlways, "do not follow the target's distribution"),
        (planted_samplers.WrongResidual, "do not follow the target's distribution"),
        (planted_samplers.OffByOne, "do not follow the target's distribution"),
    ],
)
def test_each_fault_is_named(sampler, message):
    with pytest.raises(ContractError, match=message):
        check_sampler(sampler)
