"""Rotation by the attention plugin: which layers, by which hands, and never twice; with vLLM's own modules."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from patch_harness import wrap

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.interfaces.attention import AttentionProvider, CacheParts
from vllm_instant.patches import attention, fused_rope
from vllm_instant.patches.names import MODEL_LOADER

pytestmark = pytest.mark.engine

HEADS, KV_HEADS, HEAD, TOKENS = 4, 2, 32, 5
SLOTS = [7, 3, -1, 9]
"""Of the first tokens; the fifth is padding that has none."""
NAME = "model.layers.0.self_attn.attn"


class Rotating(AttentionProvider):
    """Rotates by vLLM's tensor operations, and keeps what it was given."""

    def __init__(self):
        self.keys, self.written, self.queries = [], [], []
        self.answer, self.objects, self.wanted = True, None, True

    def parts(self, cache, layer):
        numbers = cache.view(torch.float8_e4m3fn)
        return CacheParts(numbers, numbers, torch.zeros(1), torch.zeros(1))

    def rotates(self):
        return self.wanted

    def rotation_unsupported_reason(self, head_size, rotary, is_neox):
        return self.objects

    def rotate_and_write(self, query, key, value, rotated, rotation, cache, slots):
        if self.answer is None:
            raise RuntimeError("rotation failed on purpose")
        if self.answer:
            assert len(query) == len(key) == len(value) == len(rotated) == len(rotation.positions) == len(slots)
            turned, keys = _rotated(rotation.positions, query, key, rotation.cos_sin, rotation.is_neox)
            rotated.copy_(turned)
            self.keys.append(keys.clone())
        return self.answer

    def write(self, key, value, cache, slots):
        self.written.append(key.clone())

    def attend(self, layer, cache, step):
        self.queries.append(step.query.clone())
        step.output.copy_(step.query)
        return True


def _rotated(positions, query, key, cos_sin, is_neox):
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    return RotaryEmbedding.forward_static(positions, query, key, HEAD, cos_sin.shape[1], cos_sin, is_neox)


class Module(torch.nn.Module):
    """An attention module as models have them."""

    def forward(self, positions, hidden_states):
        q, k, v = hidden_states.split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        attn_output = self.attn(q, k, v)
        return attn_output * 2


class Looking(Module):
    def forward(self, positions, hidden_states):
        q, k, v = hidden_states.chunk(3)
        q, k = self.rotary_emb(positions, q, k)
        attn_output = self.attn(q, k, v)
        return attn_output + k.sum()


class Between(Module):
    def forward(self, positions, hidden_states):
        q, k, v = hidden_states.chunk(3)
        q, k = self.rotary_emb(positions, q, k)
        k = k * 2
        attn_output = self.attn(q, k, v)
        return attn_output


class Swapped(Module):
    def forward(self, positions, hidden_states):
        q, k, v = hidden_states.chunk(3)
        q, k = self.rotary_emb(positions, q, k)
        attn_output = self.attn(q, k, k)
        return attn_output + v


class Twice(Module):
    def forward(self, positions, hidden_states):
        q, k, v = hidden_states.chunk(3)
        hidden_states = self.attn(q, k, v)
        q, k = self.rotary_emb(positions, q, k)
        attn_output = self.attn(q, k, v)
        return attn_output + hidden_states


class Sometimes(Module):
    def forward(self, positions, hidden_states):
        q, k, v = hidden_states.chunk(3)
        if positions is not None:
            q, k = self.rotary_emb(positions, q, k)
            v = self.attn(q, k, v)
        return v


class Renamed(Module):
    def forward(self, where, states):
        queries, keys, values = states.chunk(3)
        queries, keys = self.rotary_emb(where, queries, keys)
        result = self.attn(queries, keys, values)
        return self.o_proj(result)


@pytest.fixture
def plugin(monkeypatch):
    contained = GuardedPlugin("attention", "turning", Rotating())
    monkeypatch.setattr(attention, "provider", lambda: contained)
    return contained


@pytest.fixture(scope="module")
def config():
    from vllm.config import CacheConfig, VllmConfig

    config = VllmConfig(cache_config=CacheConfig(cache_dtype="fp8_per_token_head"))
    config.compilation_config.custom_ops = ["none"]
    return config


@pytest.fixture
def build(plugin, config):
    """``build(cls)``: an attention module with vLLM's own rotation and attention, over the backend of plugins."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from vllm_instant.patches.attention_backend import InstantAttentionBackend

    def make(cls=Module, rotary_dim=HEAD, is_neox=True):
        config.compilation_config.static_forward_context.clear()
        module = cls()
        with set_current_vllm_config(config):
            module.rotary_emb = RotaryEmbedding(HEAD, rotary_dim, 64, 10_000.0, is_neox, torch.float32)
            module.attn = Attention(
                HEADS,
                HEAD,
                HEAD**-0.5,
                num_kv_heads=KV_HEADS,
                cache_config=config.cache_config,
                prefix=NAME,
                attn_backend=InstantAttentionBackend,
            )
        module.attn.kv_cache = torch.zeros(2, KV_HEADS, 16, 2 * HEAD + 16, dtype=torch.uint8)
        return module

    return make


@pytest.fixture
def step(config):
    """``with step(slots)``: inside of a step of the engine."""
    from vllm.forward_context import set_forward_context

    @contextmanager
    def inside(slots=SLOTS):
        metadata = None
        if slots is not None:
            metadata = SimpleNamespace(
                num_actual_tokens=len(slots),
                block_table=torch.zeros(1, 4, dtype=torch.int32),
                seq_lens=torch.tensor([9]),
                query_start_loc=torch.tensor([0, len(slots)]),
                max_query_len=len(slots),
                causal=True,
                mm_prefix_range_tensor=None,
                rswa_prefix_lens=None,
            )
        mapping = {} if slots is None else {NAME: torch.tensor(slots)}
        with set_forward_context({NAME: metadata}, config, num_tokens=TOKENS, slot_mapping=mapping):
            yield

    return inside


@pytest.fixture
def states():
    width = (HEADS + 2 * KV_HEADS) * HEAD
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 6, 0, 63, 2])


def _expected(module, hidden, positions, is_neox=True):
    """Rotated queries and keys, ``[tokens, heads, head]``."""
    rotary = getattr(module.rotary_emb, "rotary", module.rotary_emb)
    query, key, _ = hidden.split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], -1)
    turned = _rotated(positions, query, key, rotary.cos_sin_cache, is_neox)
    assert not torch.equal(turned[0], query)
    return turned[0].view(TOKENS, HEADS, HEAD), turned[1].view(TOKENS, KV_HEADS, HEAD)


@pytest.fixture(scope="module")
def serve():
    from vllm_instant.patches.fused_rope_attention import serve

    return serve


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rotary_dim", [HEAD, HEAD // 2])
def test_the_plugin_rotates_and_writes(plugin, build, serve, step, states, compiled, rotary_dim):
    module = build(rotary_dim=rotary_dim)
    query, key = _expected(module, *states)
    with step():
        by_vllm = module(states[1], states[0])
    assert len(plugin.instance.written) == 1
    plugin.instance.queries.clear()

    assert serve(module) == 1
    run = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    before = states[0].clone()
    with step():
        output = run(states[1], states[0])
    [(found,), (written,)] = plugin.instance.queries, plugin.instance.keys
    real = len(SLOTS)
    torch.testing.assert_close(found, query[:real])
    torch.testing.assert_close(written, key[:real])
    assert len(plugin.instance.written) == 1, "keys were written once more"
    torch.testing.assert_close(output[:real], by_vllm[:real])
    assert output.shape == by_vllm.shape
    assert torch.equal(states[0], before)


@pytest.mark.parametrize("answer", [False, None])
@pytest.mark.parametrize("is_neox", [True, False])
def test_vllm_rotates_what_the_plugin_does_not(plugin, build, serve, step, states, answer, is_neox, caplog):
    module = build(is_neox=is_neox)
    query, key = _expected(module, *states, is_neox)
    serve(module)
    plugin.instance.answer = answer
    written = []
    module.attn.impl.do_kv_cache_update = lambda layer, keys, *rest: written.append(keys)
    module.attn.impl._is_ours = lambda metadata: True
    attended = []
    # Once the plugin is disabled vLLM's kernel attends, which needs a GPU.
    module.attn.impl.forward = lambda layer, query, *rest, **more: attended.append(query)
    for _ in range(2):
        with step():
            module(states[1], states[0])
    for found, keys in zip(attended, written, strict=True):
        torch.testing.assert_close(found, query)
        torch.testing.assert_close(keys, key)
    assert len(written) == 2
    assert plugin.disabled == (answer is None)
    assert caplog.text.count("raised in rotate_and_write and is disabled") == (answer is None)


def test_where_vllm_only_measures_memory_nothing_is_written(plugin, build, serve, step, states):
    module = build()
    serve(module)
    with step(None):
        module(states[1], states[0])
    assert plugin.instance.keys == plugin.instance.written == plugin.instance.queries == []


def test_several_positions_a_token_are_left_to_vllm(plugin, build, serve, step, states):
    """What makes them is another class, but a flat one may get them as well."""
    module = build()
    serve(module)
    module.rotary_emb.rotary.forward = lambda positions, query, key: (query, key)
    with step():
        module(states[1][None].expand(3, -1), states[0])
    assert (len(plugin.instance.written), plugin.instance.keys) == (1, [])


def test_a_rotation_that_layers_share_stays_whole(build, serve):
    module, other = build(), torch.nn.Module()
    other.rotary_emb = shared = module.rotary_emb
    serve(torch.nn.ModuleList([other, module]))
    assert other.rotary_emb is shared
    assert module.rotary_emb is not shared


def test_models_that_are_served():
    from vllm.model_executor.models.llama import LlamaAttention
    from vllm.model_executor.models.qwen2 import Qwen2Attention
    from vllm.model_executor.models.qwen3 import Qwen3Attention

    from vllm_instant.patches.fused_rope_attention import hands_on

    assert all(hands_on(cls.forward) for cls in (LlamaAttention, Qwen2Attention, Qwen3Attention, Module, Renamed))


@pytest.mark.parametrize("cls", [Looking, Between, Swapped, Twice, Sometimes])
def test_modules_that_do_more_are_left_alone(build, serve, caplog, cls):
    module = build(cls)
    rotary, kind = module.rotary_emb, type(module.attn)
    assert serve(module) == 0
    assert module.rotary_emb is rotary
    assert type(module.attn) is kind
    assert f"layers to vLLM: {cls.__name__} does not hand the result of its rotation straight" in caplog.text


def _other_rotation(module):
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    class Bent(RotaryEmbedding):
        def forward_native(self, positions, query, key=None):
            return query, key

    module.rotary_emb.__class__ = Bent


def _other_attention(module):
    class Chunked(type(module.attn)):
        pass

    module.attn.__class__ = Chunked


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_rotation, "Bent does not rotate by one table of cosines and sines"),
        (_other_attention, "their attention is a Chunked"),
        (lambda m: setattr(m.rotary_emb, "use_flashinfer", True), "RotaryEmbedding does not rotate by one table"),
        (lambda m: setattr(m.rotary_emb, "head_size", 64), "disagree about the size of a head (64, 32, 32)"),
        (lambda m: setattr(m.attn, "kv_sharing_target_layer_name", "0"), "they read the cache of another layer"),
        (lambda m: setattr(m.attn, "use_direct_call", True), "does not attend by an operator of unquantised queries"),
        (lambda m: setattr(m.attn.impl.plugin.instance, "objects", "it is busy"), "layers to vLLM: it is busy"),
        (lambda m: setattr(m, "forward", print), "Module does not hand the result"),
        (lambda m: delattr(m, "rotary_emb"), "Module does not hand the result"),
    ],
)
def test_layers_that_are_left_to_vllm_are_told(build, serve, caplog, change, words):
    module = build()
    change(module)
    kind = type(module.attn)
    assert serve(module) == 0
    assert type(module.attn) is kind
    assert "Plugin turning of slot attention leaves the rotation in 1 layers to vLLM" in caplog.text
    assert words in caplog.text


def test_a_plugin_that_does_not_rotate_changes_nothing(plugin, build, serve, caplog):
    plugin.instance.wanted = False
    module = build()
    rotary = module.rotary_emb
    with caplog.at_level(logging.INFO):
        assert serve(module) == 0
    assert module.rotary_emb is rotary
    assert not caplog.records
    assert not module.attn.impl.fused_rope_kvcache_supported()


def test_vllms_own_fusion_finds_the_plugin(plugin, build, states):
    """The method that its operator calls rotates in place."""
    module = build()
    query, key = _expected(module, *states)
    impl = module.attn.impl
    assert impl.fused_rope_kvcache_supported()
    given, keys, values = (
        part.unflatten(-1, (-1, HEAD))
        for part in states[0].clone().split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], -1)
    )
    table = module.rotary_emb.cos_sin_cache
    slots = torch.tensor(SLOTS)

    def call():
        impl.do_rope_and_kv_cache_update(
            module.attn, given, keys, values, states[1], table, True, module.attn.kv_cache, slots
        )

    call()
    torch.testing.assert_close(given[: len(SLOTS)], query[: len(SLOTS)])
    torch.testing.assert_close(plugin.instance.keys[0], key[: len(SLOTS)])
    # And where the plugin declines, vLLM's rotation is in place, too.
    given.copy_(states[0][:, : HEADS * HEAD].view(TOKENS, HEADS, HEAD))
    plugin.instance.answer = False
    call()
    torch.testing.assert_close(given, query)
    torch.testing.assert_close(plugin.instance.written[0], key)
    plugin.instance.objects = "no"
    assert not impl.fused_rope_kvcache_supported()


def _configuration(splitting):
    return SimpleNamespace(compilation_config=SimpleNamespace(splitting_ops=splitting), additional_config={"a": 1})


@pytest.mark.parametrize(
    ("splitting", "expected"),
    [
        (["vllm::attention", fused_rope.BESIDE], ["vllm::attention", fused_rope.BESIDE, fused_rope.OPERATOR]),
        # vLLM's own write stays in the graph, and so does what takes its place.
        (["vllm::attention"], ["vllm::attention"]),
        ([], []),
        (None, None),
    ],
)
def test_graphs_are_split_and_kept_apart(splitting, expected):
    config, of_part = _configuration(splitting), _configuration(splitting and [*splitting])
    model = torch.nn.Module()
    model.vllm_config = of_part
    for _ in range(2):
        fused_rope.announce_operator(model, config)
    for found in (config, of_part):
        assert found.compilation_config.splitting_ops == expected
        assert found.additional_config == {"a": 1, fused_rope.CACHE_KEY: True}


def test_a_split_graph_runs_write_and_attention_together(build, serve, step, states):
    from vllm.compilation.backends import split_graph

    module = build()
    serve(module)
    pieces = []

    def backend(graph, inputs):
        _, items = split_graph(graph, ["vllm::unified_attention_with_output", fused_rope.OPERATOR])
        pieces.extend(item for item in items if item.is_splitting_graph)
        return graph.forward

    with step():
        torch.compile(module, backend=backend, fullgraph=True)(states[1], states[0])
    [piece] = pieces
    called = [node.target for node in piece.graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.vllm_instant.rotate_and_write in called
    assert torch.ops.vllm.unified_attention_with_output in called


@pytest.mark.parametrize("chosen", [True, False])
def test_loaded_models_are_looked_at(monkeypatch, build, chosen):
    """Around vLLM's loader, and only where a plugin brings kernels."""
    module, config = build(), _configuration([fused_rope.BESIDE])

    class Loader:
        def load_model(self, vllm_config, model_config, prefix=""):
            return module

    slot = SimpleNamespace(plugin="turning" if chosen else "native")
    monkeypatch.setattr(fused_rope.deployment_env, "get_deployment", lambda: SimpleNamespace(slots={"attention": slot}))
    wrap(fused_rope.PATCH, MODEL_LOADER, BaseModelLoader=Loader)
    assert Loader().load_model(config, model_config=None) is module
    assert (type(module.attn).__name__ == "RotatingAttention") == chosen
    assert (fused_rope.OPERATOR in config.compilation_config.splitting_ops) == chosen
