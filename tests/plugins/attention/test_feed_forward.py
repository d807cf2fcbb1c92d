"""The feed-forward of ``fp8_fused``: its option, refused layers and the arguments of the kernels."""

import pytest
import torch
import triton

from vllm_instant import PluginContext
from vllm_instant.interfaces.feed_forward import FeedForwardLayer, FeedForwardProvider, LinearWeights
from vllm_instant_plugins.attention import feed_forward as module
from vllm_instant_plugins.attention.feed_forward import FusedFeedForward
from vllm_instant_plugins.attention.fused import FusedAttention
from vllm_instant_plugins.attention.plugin import PLUGINS


def _layer(hidden=64, inner=96, dtype=torch.bfloat16, fp8=False):
    def weights(outputs, inputs):
        if fp8:
            return LinearWeights(torch.zeros(outputs, inputs, dtype=torch.float8_e4m3fn), torch.ones(outputs))
        return LinearWeights(torch.zeros(outputs, inputs, dtype=dtype))

    norm = torch.ones(hidden, dtype=dtype)
    return FeedForwardLayer(weights(hidden, 128), norm, 1e-5, weights(2 * inner, hidden), weights(hidden, inner), dtype)


def test_it_is_off_by_default(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    [plugin] = [plugin for plugin in PLUGINS if plugin.name == "fp8_fused"]
    context = PluginContext(
        model="m", max_model_len=8, max_num_seqs=1, vocab_size=8, num_speculative_tokens=0, device="cpu"
    )
    assert plugin.build(plugin.options(), context).feed_forward() is None
    part = plugin.build(plugin.options(feed_forward=True), context).feed_forward()
    assert isinstance(part, FeedForwardProvider)
    assert part.max_rows == 16


def test_unsupported_layers_are_refused_with_a_reason():
    part = FusedFeedForward(interprets=False)
    assert part.unsupported_reason(_layer()) is None
    assert part.unsupported_reason(_layer(fp8=True)) is None
    assert part.unsupported_reason(_layer(hidden=72)) == (
        "the layer has sizes 72 and 96, and the kernels support multiples of 16"
    )
    assert part.unsupported_reason(_layer(inner=100)) == (
        "the layer has sizes 64 and 100, and the kernels support multiples of 16"
    )
    assert part.unsupported_reason(_layer(dtype=torch.float32)) == (
        "the model computes in torch.float32, and the kernels support float16 and bfloat16"
    )
    assert FusedFeedForward(interprets=True).unsupported_reason(_layer(dtype=torch.float32)) is None


@pytest.mark.parametrize("interprets", [False, True])
def test_weights_are_passed_to_the_kernels_in_their_types(monkeypatch, interprets):
    called = []
    monkeypatch.setattr(module, "feed_forward_parts", lambda *arguments, **options: called.append((arguments, options)))
    layer = _layer(fp8=True)
    attention, residual = torch.zeros(3, 128), torch.zeros(3, 64)
    part = FusedFeedForward(interprets)
    part.serve(layer)(attention, residual)
    part.serve(layer)(attention, residual)
    [(arguments, options), (_, of_another)] = called
    assert arguments[0] is attention
    assert arguments[1] is residual
    weights = options["weights"]
    assert weights.epsilon == layer.epsilon
    assert weights.norm is layer.norm
    for found, given in ((weights.output, layer.output), (weights.gate_and_up, layer.gate_and_up)):
        assert found.scales is given.scales
        assert found.numbers.data_ptr() == given.numbers.data_ptr()
        assert found.numbers.dtype == (torch.uint8 if interprets else torch.float8_e4m3fn)
    # Counters are for one layer only.
    assert options["counters"].data_ptr() != of_another["counters"].data_ptr()


def test_the_plugin_has_no_feed_forward_by_default(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert FusedAttention("cpu", 100).feed_forward() is None
