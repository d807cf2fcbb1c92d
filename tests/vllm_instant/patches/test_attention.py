"""The patch around attention plugins, with vLLM's own configuration and classes."""

from types import SimpleNamespace

import pytest
import torch

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.resolved import engine_arguments
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.attention import AttentionProvider
from vllm_instant.patches import attention

pytestmark = pytest.mark.engine


class Provider(AttentionProvider):
    def unsupported_reason(self, head_size, dtype):
        return None if head_size == 64 else f"heads are of size {head_size}"

    def row_bytes(self, head_size):
        return 2 * head_size + 16


def _asked(**changes):
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plain = AttentionSelectorConfig(64, torch.bfloat16, "fp8_per_token_head", None)
    return plain._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"has_sliding_window": True, "block_size": 32}, None),
        ({"head_size": 80}, "heads are of size 80"),
        ({"has_sink": True, "use_mla": True}, "do not know multi-head latent attention and attention sinks"),
        ({"use_batch_invariant": True}, "do not know batch invariance"),
        ({"attn_type": "encoder_only"}, "serve decoders, and this layer is of type encoder_only"),
        ({"kv_cache_dtype": "auto"}, "of type auto, and attention plugins need fp8_per_token_head"),
    ],
)
def test_why_a_layer_is_left_to_vllm(changes, words):
    reason = attention.unsupported_reason(Provider(), _asked(**changes))
    assert reason is None if words is None else words in reason


@pytest.fixture
def choose(monkeypatch):
    """vLLM's choice as the patch changes it, for a platform that answers with what it was asked for."""
    monkeypatch.setattr(attention, "provider", lambda: GuardedPlugin("attention", "test", Provider()))

    def original(selected_backend, attn_selector_config, num_heads=None):
        return f"vLLM {selected_backend}"

    def choice(selected_backend, on_cpu=False, **changes):
        return attention._choose(original, "CUSTOM", on_cpu, selected_backend, attn_selector_config=_asked(**changes))

    return choice


def test_which_backend_serves(choose, caplog):
    assert choose("CUSTOM") == choose("CUSTOM", on_cpu=True) == attention.BACKEND
    assert choose("TRITON_ATTN") == "vLLM TRITON_ATTN"
    assert not caplog.records
    assert choose("CUSTOM", head_size=80) == "vLLM None"
    assert "Plugin test of slot attention leaves layers to vLLM: heads are of size 80" in caplog.text


def test_a_cpu_does_not_get_a_cache_that_it_cannot_read(choose):
    for backend in ("CPU_ATTN", None):
        with pytest.raises(ValueError, match=r"cannot read a KV cache of type fp8_per_token_head .* valid: auto, fp8"):
            choose(backend, on_cpu=True)
        assert choose(backend, on_cpu=True, kv_cache_dtype="fp8") == f"vLLM {backend}"
    # What a plugin leaves alone ends there, too.
    with pytest.raises(ValueError, match="would give wrong tokens"):
        choose("CUSTOM", on_cpu=True, head_size=80)


@pytest.mark.parametrize(
    ("dtype", "backend", "fits"),
    [
        (None, None, True),
        ("auto", None, True),
        ("bfloat16", None, True),
        ("fp8", None, True),
        ("fp8_e5m2", None, True),
        ("int8_per_token_head", None, False),
        ("fp8_per_token_head", "CUSTOM", True),
        ("fp8_per_token_head", SimpleNamespace(name="CUSTOM"), True),
        ("fp8_per_token_head", "TRITON_ATTN", False),
    ],
)
def test_types_of_cache_are_checked_with_the_command_line(dtype, backend, fits):
    arguments = SimpleNamespace(kv_cache_dtype=dtype, attention_backend=backend)
    if fits:
        attention.refuse_unreadable_cache(arguments)
    else:
        with pytest.raises(DeploymentError, match=f"--kv-cache-dtype: vLLM's attention on CPUs .* of type {dtype}"):
            attention.refuse_unreadable_cache(arguments)


def test_rows_of_the_cache_are_as_long_as_the_plugin_says(monkeypatch):
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

    from vllm_instant.patches.attention_backend import InstantAttentionBackend

    monkeypatch.setattr(attention, "provider", lambda: GuardedPlugin("attention", "test", Provider()))

    def bytes_a_token(head, dtype, mode):
        spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=head, dtype=dtype, kv_quant_mode=mode)
        return InstantAttentionBackend.customize_spec(spec).page_size_bytes / 16 / 8

    quantized = bytes_a_token(128, torch.uint8, KVQuantMode.FP8_PER_TOKEN_HEAD)
    assert quantized == 272
    assert quantized / bytes_a_token(128, torch.bfloat16, KVQuantMode.NONE) <= 0.54


@pytest.mark.usefixtures("with_test_plugins")
def test_what_a_plugin_asks_of_vllm():
    asked = {"attention_backend": "CUSTOM", "kv_cache_dtype": "fp8_per_token_head"}
    assert asked.items() <= engine_arguments(resolve(None, ["attention.plugin=fp8_fused"])).items()
    assert asked.items() <= engine_arguments(resolve(None, ["attention.plugin=plain"])).items()
    assert engine_arguments(resolve(None, ["attention.plugin=fp8"]))["kv_cache_dtype"] == "fp8"
    assert not asked.keys() & engine_arguments(resolve(None, ["attention.plugin=native"])).keys()
