"""The ``super_expert`` router as the patch calls it, without an engine."""

import numpy as np
import pytest
import torch

from vllm_instant.interfaces.experts import ExpertLayer, Measurement, RouterStep, RoutingMeasures, RowKind, StepRows
from vllm_instant.moe.expert_groups import SuperExperts
from vllm_instant.moe.router_scoring import RouterScoring
from vllm_instant.moe.routing_trace import RoutedModel
from vllm_instant_plugins.super_expert.quality_gate import QualityGate
from vllm_instant_plugins.super_expert.router import SuperExpertRouter

CPU = torch.device("cpu")
LAYERS = [ExpertLayer(index, f"layers.{index}", 16, 4) for index in range(2)]


def _router(**options):
    router = SuperExpertRouter(**({"budget": 0.25, "keep": 1, "gate": QualityGate(0.25, 0.02)} | options))
    router.prepare(LAYERS, 64, CPU)
    return router


def _rows(decoding, prompt=0):
    lengths = [1] * decoding + ([prompt] if prompt else [])
    return StepRows(
        1,
        [f"r{i}" for i in range(len(lengths))],
        np.concatenate([[0], np.cumsum(lengths)]),
        np.array([True] * decoding + [False] * bool(prompt)),
        [""] * len(lengths),
        np.zeros(len(lengths), np.int64),
    )


def _step(tokens, seed=0):
    weights = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    picks, picked = RouterScoring("softmax", 4).pick(weights, weights)
    return RouterStep(weights, weights, picks, picked, torch.full((tokens,), RowKind.DECODE, dtype=torch.int8))


def test_steps_that_cannot_exceed_the_budget_are_not_asked():
    router = _router()
    assert not router.begin_step(_rows(0, 30))
    assert not router.begin_step(_rows(1))
    assert not router.begin_step(_rows(1, 30))
    assert router.begin_step(_rows(2))
    assert not _router(budget=1.0, gate=None).begin_step(_rows(16))
    assert not _router(budget=0.5, gate=None).begin_step(_rows(2))


def test_a_reference_pass_uses_the_models_own_routing():
    router = _router()
    step = _step(8)
    served = router.allowed(LAYERS[0], step)
    assert served.sum() < 16
    router.reference_pass(True)
    assert router.allowed(LAYERS[0], step) is None
    router.reference_pass(False)
    assert torch.equal(router.allowed(LAYERS[0], step), served)


def test_at_the_last_level_a_reference_pass_measures_the_next_tighter_level():
    router = _router()
    router.gate.level = router.gate.last
    router.reference_pass(False)
    assert router.allowed(LAYERS[0], _step(8)) is None
    assert router.begin_step(_rows(8))
    router.reference_pass(True)
    assert router.allowed(LAYERS[0], _step(8)) is not None
    router.reference_pass(False)
    assert router.allowed(LAYERS[0], _step(8)) is None


def test_loosening_changes_the_captured_tensors_and_is_logged(caplog):
    router = _router()
    before = [selector.budget for selector in router._selectors]
    assert [int(budget) for budget in before] == [4, 4]
    for number in range(1, 4):
        assert router.measurement(4 * number) is Measurement.REFERENCE
        router.observe(RoutingMeasures(2, 20, 8, 2.0, 1.0, 4, 8.0, 16.0))
    # The tensors are the ones that a CUDA graph would have captured.
    assert [int(budget) for budget in before] == [7, 7]
    assert "loosened its budget to 44 %" in caplog.text
    assert router.metrics()["loosened"] == 1


def test_settings_change_only_if_adjustable():
    with pytest.raises(ValueError, match="adjustable"):
        _router().control({"budget": 0.5})
    router = _router(adjustable=True)
    assert router.control({"budget": 0.5, "shadow_every": 0}) == {"budget": 0.5, "shadow_every": 0}
    assert int(router._selectors[1].budget) == 8
    assert router.measurement(4) is not Measurement.REFERENCE
    for wrong in ({"budget": 0}, {"budget": True}, {"shadow_every": 1.5}, {"keep": 2}):
        with pytest.raises(ValueError, match="found"):
            router.control(wrong)


def test_groups_of_another_model_are_refused():
    model = RoutedModel("other", 2, 8, 4)
    clusters = SuperExperts(model, ((0,) * 8,) * 2, ((1.0,) * 8,) * 2)
    with pytest.raises(ValueError, match=r"8 experts.*2 layers of 16 experts"):
        _router(clusters=clusters)


def test_the_prior_of_a_groups_file_decides_which_experts_are_allowed():
    model = RoutedModel("this", 2, 16, 4)
    favoured = [1e6 if expert >= 12 else 1.0 for expert in range(16)]
    clusters = SuperExperts(model, ((0,) * 16,) * 2, (tuple(favoured),) * 2)
    router = _router(clusters=clusters, keep=0)
    step = _step(12)
    assert set(range(12, 16)) <= set(step.picks.flatten().tolist())
    assert np.flatnonzero(router.allowed(LAYERS[0], step)[0].numpy()).tolist() == [12, 13, 14, 15]


def test_the_fused_rule_shares_the_budget_tensor_of_the_layer():
    router = _router()
    bias = torch.zeros(16)
    route = router.fused_route(LAYERS[1], bias, 2.5)
    [rule] = route.args
    assert rule.budget is router._selectors[1].budget
    assert (rule.function, rule.renormalize, rule.keep, rule.scale) == ("softmax", True, 1, 2.5)
    assert rule.bias is bias
