"""The backend inside vLLM: what a layer hands to the plugin, and what is left to vLLM's kernels."""

from types import SimpleNamespace

import pytest
import torch

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.interfaces.attention import AttentionProvider, CacheParts
from vllm_instant.patches import attention

pytestmark = pytest.mark.engine


class Recording(AttentionProvider):
    """Does what it is told to do, and remembers what it was asked."""

    def __init__(self):
        self.prepared, self.steps, self.written = [], [], []
        self.answer = True

    def prepare(self, layer):
        self.prepared.append(layer)

    def parts(self, cache, layer):
        numbers = cache.view(torch.float8_e4m3fn)
        scales = torch.zeros(1)
        return CacheParts(numbers, numbers, scales, scales)

    def write(self, key, value, cache, slots):
        if self.answer is None:
            raise RuntimeError("write failed on purpose")
        self.written.append(slots)

    def attend(self, layer, cache, step):
        if self.answer is None:
            raise RuntimeError("attend failed on purpose")
        self.steps.append((layer, step))
        return self.answer


@pytest.fixture
def plugin(monkeypatch):
    contained = GuardedPlugin("attention", "recording", Recording())
    monkeypatch.setattr(attention, "provider", lambda: contained)
    return contained


@pytest.fixture
def by_vllm(monkeypatch):
    """The names of vLLM's own methods that were called, which do nothing here."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    called = []
    for name in ("forward", "do_kv_cache_update"):
        monkeypatch.setattr(TritonAttentionImpl, name, lambda *a, name=name, **k: called.append(name))
    return called


def _layer(**changes):
    from vllm_instant.patches.attention_backend import InstantAttentionImpl

    arguments = {
        "num_heads": 8,
        "head_size": 64,
        "scale": 0.125,
        "num_kv_heads": 2,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "fp8_per_token_head",
    }
    return InstantAttentionImpl(**arguments | changes)


def _metadata(**changes):
    plain = {
        "num_actual_tokens": 3,
        "block_table": torch.zeros(2, 4, dtype=torch.int32),
        "seq_lens": torch.tensor([9, 5]),
        "query_start_loc": torch.tensor([0, 2, 3]),
        "max_query_len": 2,
        "causal": True,
        "mm_prefix_range_tensor": None,
        "rswa_prefix_lens": None,
    }
    return SimpleNamespace(**plain | changes)


def _forward(layer, metadata, **more):
    query, cache = torch.zeros(5, 8, 64), torch.zeros(4, 2, 16, 144, dtype=torch.uint8)
    return layer.forward(None, query, None, None, cache, metadata, torch.zeros(5, 8, 64), **more)


def test_a_step_reaches_the_plugin(plugin, by_vllm):
    layer = _layer(sliding_window=100, logits_soft_cap=30.0)
    output = _forward(layer, _metadata())
    assert output.shape == (5, 8, 64)
    [(shape, step)] = plugin.instance.steps
    assert plugin.instance.prepared == [shape]
    assert (shape.num_query_heads, shape.num_kv_heads, shape.head_size, shape.scale) == (8, 2, 64, 0.125)
    assert (shape.window, shape.soft_cap) == (100, 30.0)
    # Rows of padding are not the plugin's.
    assert step.query.shape == step.output.shape == (3, 8, 64)
    assert step.output.data_ptr() == output.data_ptr()
    assert step.lengths.tolist() == [9, 5]
    assert step.starts.tolist() == [0, 2, 3]
    assert step.max_query_tokens == 2
    assert by_vllm == []


def test_all_tokens_are_seen_without_a_window(plugin):
    assert _layer().shape.window == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": False},
        {"causal": torch.tensor([True, False])},
        {"mm_prefix_range_tensor": torch.zeros(2, 1, 2)},
        {"rswa_prefix_lens": torch.zeros(2)},
    ],
)
def test_steps_that_the_contract_does_not_have_are_vllms(plugin, by_vllm, changes):
    _forward(_layer(), _metadata(**changes))
    assert by_vllm == ["forward"]
    assert plugin.instance.steps == []


def test_so_are_layers_and_outputs_that_it_does_not_have(plugin, by_vllm):
    _forward(_layer(alibi_slopes=[1.0] * 8), _metadata())
    _forward(_layer(sinks=torch.zeros(8)), _metadata())
    _forward(_layer(), _metadata(), output_scale=torch.ones(1))
    _forward(_layer(), None)
    assert by_vllm == ["forward"] * 4
    assert plugin.instance.steps == []


def test_what_the_plugin_declines_is_vllms(plugin, by_vllm):
    plugin.instance.answer = False
    _forward(_layer(), _metadata())
    assert by_vllm == ["forward"]
    assert not plugin.disabled


def test_a_plugin_that_raises_is_replaced_by_vllm_on_the_same_cache(plugin, by_vllm, caplog):
    layer = _layer()
    key, slots = torch.zeros(5, 2, 64), torch.arange(3)
    cache = torch.zeros(4, 2, 16, 144, dtype=torch.uint8)
    layer.do_kv_cache_update(None, key, key, cache, slots)
    assert len(plugin.instance.written) == 1
    plugin.instance.answer = None
    _forward(layer, _metadata())
    layer.do_kv_cache_update(None, key, key, cache, slots)
    assert by_vllm == ["forward", "do_kv_cache_update"]
    assert plugin.disabled
    assert "raised in attend and is disabled" in caplog.text
    keys, _ = layer._pth_key_value_caches(cache)
    assert keys.dtype == torch.float8_e4m3fn
    assert layer._k_scale_cache is layer.parts(cache).key_scales
