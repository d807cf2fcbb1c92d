"""Layers whose plugin routes them in a few launches, as on devices that replay CUDA graphs."""

from types import SimpleNamespace

import pytest
import torch

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.interfaces.experts import ExpertLayer, ExpertRouter, RowKind
from vllm_instant.moe.router_scoring import RouterScoring
from vllm_instant.patches import moe_routers
from vllm_instant.patches.moe_worker import MoeWorker

ROWS, EXPERTS, TOP_K = 5, 16, 4
LOGITS = torch.randn(ROWS, EXPERTS, generator=torch.Generator().manual_seed(0))


class Fusing(ExpertRouter):
    """Allows every second expert; its fused function is given."""

    def __init__(self, fused=None):
        self.fused, self.offered, self.num_asked = fused, [], 0

    def prepare(self, layers, max_rows, device):
        pass

    def allowed(self, layer, step):
        self.num_asked += 1
        return (torch.arange(EXPERTS) % 2 == 0)[None]

    def fused_route(self, layer, bias, scale):
        self.offered.append((layer.index, bias, scale))
        return self.fused


@pytest.fixture
def serve(monkeypatch):
    def make(plugin, **rule):
        scoring = RouterScoring("softmax", TOP_K, **rule)

        def native(router, hidden_states, logits, input_ids):
            scores = scoring.weights(logits)
            picks, weights = scoring.pick(scores, scoring.ranking(scores))
            return weights, picks.int()

        monkeypatch.setattr(moe_routers, "native", native)
        worker = MoeWorker(GuardedPlugin("experts", "test", plugin), 64, torch.device("cpu"))
        worker.replays, worker.idle, worker.counting = True, False, True
        worker.kinds[:ROWS] = RowKind.DECODE
        worker.serve([(SimpleNamespace(), ExpertLayer(0, "layer", EXPERTS, TOP_K), scoring)])
        return worker

    yield make
    moe_routers.serve([])


def test_the_fused_function_replaces_the_calls_of_allowed(serve):
    calls = []

    def fused(logits, weights, picks, kinds, counting, counted):
        calls.append((kinds.tolist(), counting, counted.shape))
        counted += 1.0
        return weights * 2, picks

    plugin = Fusing(fused)
    bias = torch.zeros(EXPERTS)
    worker = serve(plugin, bias=bias, scale=2.5)
    weights, _ = worker.layers[0].route(None, LOGITS, None)
    assert plugin.offered == [(0, bias, 2.5)]
    torch.testing.assert_close(weights.sum(-1), torch.full((ROWS,), 5.0))
    assert calls == [([RowKind.DECODE] * ROWS, worker.count_flag, (4,))]
    assert worker.counts_of(worker.layers[0].layer).tolist() == [1.0] * 4
    assert not plugin.num_asked


def test_without_a_fused_function_the_plugin_is_asked(serve):
    plugin = Fusing()
    _, picks = serve(plugin).layers[0].route(None, LOGITS, None)
    assert plugin.num_asked == 1
    assert (picks % 2 == 0).all()


def test_layers_with_expert_groups_are_not_offered(serve):
    plugin = Fusing(fused=lambda *_: pytest.fail("called"))
    worker = serve(plugin, groups=4, top_groups=2)
    assert not plugin.offered
    assert worker.layers[0].fused is None


def test_a_fused_function_that_fails_is_replaced_by_calls_of_allowed(serve, caplog):
    def fused(*_):
        raise RuntimeError("no kernel for this device")

    plugin = Fusing(fused)
    worker = serve(plugin)
    for _ in range(5):
        _, picks = worker.layers[0].route(None, LOGITS, None)
        assert (picks % 2 == 0).all()
    assert not worker.plugin.disabled
    assert caplog.text.count("its fused kernels failed with RuntimeError: no kernel for this device") == 1
