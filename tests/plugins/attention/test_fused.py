"""The plugin ``fp8_fused``: refused devices and layers, steps left to vLLM, and the kernel of a step."""

import pytest
import torch
import triton

from vllm_instant.interfaces.attention import AttentionLayer, AttentionStep, Rotation
from vllm_instant_plugins.attention import fused
from vllm_instant_plugins.attention.fused import FusedAttention
from vllm_instant_plugins.attention.plugin import FusedOptions

LAYER = AttentionLayer(num_query_heads=8, num_kv_heads=2, head_size=64, scale=0.1, window=7, soft_cap=3.0)


@pytest.fixture
def in_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    return FusedAttention("cpu", 100)


def _on_gpu(monkeypatch, capability, max_chunk=100):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    return FusedAttention("cuda", max_chunk)


@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_devices_without_fp8_are_refused(device):
    with pytest.raises(ValueError, match=f"8.9 or later, found {device}; choose attention.plugin=fp8 or native"):
        FusedAttention(device, 100)


def test_older_gpus_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"found a GPU of compute capability 8\.0"):
        _on_gpu(monkeypatch, (8, 0))
    assert _on_gpu(monkeypatch, (8, 9)).unsupported_reason(128, torch.bfloat16) is None


def test_unsupported_layers_are_refused_with_a_reason(monkeypatch):
    plugin = _on_gpu(monkeypatch, (9, 0))
    assert plugin.unsupported_reason(96, torch.float16) is None
    assert (
        plugin.unsupported_reason(72, torch.float16)
        == "the head size is 72; supported are multiples of 16 from 32 to 256"
    )
    assert "head size is 512" in plugin.unsupported_reason(512, torch.float16)
    assert plugin.unsupported_reason(64, torch.float32) == (
        "the model computes in torch.float32; supported are float16 and bfloat16"
    )


def test_a_row_of_the_cache_takes_272_bytes_at_head_size_128(in_interpreter):
    assert in_interpreter.row_bytes(128) == 272


@pytest.mark.parametrize(
    ("most", "kernel"), [(1, "paged_attention"), (16, "paged_attention"), (17, "prefill_attention"), (101, None)]
)
def test_the_number_of_query_tokens_selects_the_kernel(monkeypatch, most, kernel):
    called = []
    monkeypatch.setattr(fused, "workspace_for", lambda *_: "workspace")
    for name in ("paged_attention", "prefill_attention"):
        monkeypatch.setattr(fused, name, lambda *arguments, name=name, **options: called.append((name, options)))
    plugin = _on_gpu(monkeypatch, (9, 0))
    plugin.prepare(LAYER)
    parts = fused.CacheParts(*(torch.empty(0) for _ in range(4)))
    step = AttentionStep(*(torch.empty(0) for _ in range(5)), max_query_tokens=most)
    assert plugin.attend(LAYER, parts, step) == (kernel is not None)
    assert [name for name, _ in called] == ([kernel] if kernel else [])
    for _, options in called:
        assert options["scale"] == LAYER.scale
        assert options["window"] == LAYER.window
        assert options["soft_cap"] == LAYER.soft_cap
        assert options["workspace"] == "workspace"


@pytest.mark.parametrize(("rotate", "is_neox"), [(True, True), (True, False), (False, True)])
def test_it_rotates_if_enabled_and_the_rotation_is_neox(monkeypatch, rotate, is_neox):
    called = []
    monkeypatch.setattr(fused, "rope_quantize_write", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    plugin = FusedAttention("cuda", 100, rotate)
    assert plugin.rotates() == rotate
    assert (plugin.rotation_unsupported_reason(128, 64, is_neox) is None) == is_neox
    query, key, value, rotated, positions, table, slots = (torch.empty(0) for _ in range(7))
    parts = fused.CacheParts(*(torch.empty(0) for _ in range(4)))
    served = plugin.rotate_and_write(query, key, value, rotated, Rotation(positions, table, is_neox), parts, slots)
    assert served == bool(called) == (rotate and is_neox)
    if called:
        [(*given, views, to, where, angles, into)] = called
        expected = (query, key, value, slots, positions, table, rotated)
        assert all(a is b for a, b in zip((*given, to, where, angles, into), expected, strict=True))
        assert views.key_scales is parts.key_scales


def test_it_does_not_rotate_by_default():
    assert not FusedOptions().rotate


def test_the_cache_must_have_a_type_of_one_byte(in_interpreter):
    with pytest.raises(ValueError, match=r"the cache has type torch\.float16; it must be a type of one byte"):
        in_interpreter.parts(torch.zeros(2, 2, 16, 128, dtype=torch.float16), LAYER)
