"""Batch-aware expert routing in four launches, against the tensor operations that it replaces on GPUs."""

from collections import Counter

import ahead_of_time
import pytest
import torch
from expert_routing_cases import case, routed_by_kernels, routed_by_tensors
from interpreting import interpreted
from torch.utils._python_dispatch import TorchDispatchMode

import vllm_instant_kernels.expert_routing as module

SHAPES = [(1, 8, 2), (7, 60, 4), (40, 128, 8)]
VIEWS = {"view", "expand", "t", "transpose", "select", "slice", "unsqueeze", "squeeze", "alias", "detach"}
VIEWS |= {"_unsafe_view", "as_strided", "permute", "split", "flatten", "unbind"}


def _dense(weights, picks, experts):
    return torch.zeros(len(picks), experts).scatter_(1, picks.long(), weights)


@pytest.mark.parametrize("function", module.FUNCTIONS)
@pytest.mark.parametrize(("rows", "experts", "top_k"), SHAPES)
def test_kernels_equal_tensor_operations(numbers, rows, experts, top_k, function):
    for biased, with_prior, cohesion in ((False, False, 0.0), (True, True, 0.0), (False, True, 2.0)):
        made = case(numbers.randrange(2**31), rows, experts, top_k, function, biased)
        generator = torch.Generator().manual_seed(numbers.randrange(2**31))
        prior = torch.rand(experts, generator=generator) + 0.5 if with_prior else None
        cluster = torch.randint(0, 4, (experts,), generator=generator, dtype=torch.int32) if cohesion else None
        rule = (function, numbers.randint(0, top_k), numbers.randint(top_k, experts), prior, cluster, cohesion)
        weights, picks, counted = interpreted(routed_by_kernels, *made, *rule, 1.0)
        expected_weights, expected_picks, expected = routed_by_tensors(*made, *rule)
        assert torch.equal(picks.sort(-1).values, expected_picks.sort(-1).values)
        torch.testing.assert_close(_dense(weights, picks, experts), _dense(expected_weights, expected_picks, experts))
        torch.testing.assert_close(counted, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_counted_in_other_steps(numbers):
    made = case(numbers.randrange(2**31), 5, 16, 2, "softmax", False)
    _, _, counted = interpreted(routed_by_kernels, *made, "softmax", 1, 4, None, None, 0.0, 0.0)
    assert counted.tolist() == [0.0] * 4


def _launches():
    made = case(0, 16, 128, 8, "softmax", False)
    return ahead_of_time.launches(module, lambda: routed_by_kernels(*made, "softmax", 1, 64, None, None, 0.0, 1.0))


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in VIEWS and not name.startswith(("empty", "new_empty")):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_a_layer_takes_four_launches_where_tensor_operations_take_dozens():
    made = case(0, 16, 128, 8, "softmax", False)
    with _Operations() as operations:
        routed_by_tensors(*made, "softmax", 1, 64, None, None, 0.0)
    assert 50 <= sum(operations.counts.values()) <= 80
    rule = module.RoutingRule("softmax", None, True, 1.0, 1, torch.tensor(64))
    counted, counting, recorded = torch.zeros(4, dtype=torch.float64), torch.tensor(1.0), []
    with ahead_of_time._recording(module, recorded), _Operations() as operations:
        module.route_within_budget(rule, *made[:4], counting, counted)
    assert [launch.name for launch in recorded] == ["_score_rows", "_select", "_repick", "_count"]
    assert not operations.counts, "only memory is allocated beside the launches"


@pytest.mark.kernel
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles_without_spills(capability, tmp_path):
    for launch in _launches():
        machine = ahead_of_time.compiled(launch, capability, tmp_path)
        assert machine.spilled == 0, launch.name
