"""The second half of decoder layers inside vLLM: which layers are served, and what they then compute."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from feed_forward_cases import feed_forward_parts_reference
from patch_harness import wrap

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.interfaces.attention import AttentionProvider
from vllm_instant.interfaces.feed_forward import FeedForwardProvider
from vllm_instant.patches import attention
from vllm_instant.patches import feed_forward as patch
from vllm_instant.patches.compat import RequirementError, forget_sources, installed_vllm
from vllm_instant.patches.feed_forward_layers import requirements
from vllm_instant.patches.names import MODEL_LOADER
from vllm_instant.patches.plugin_factory import PluginStartError

pytestmark = pytest.mark.engine

HIDDEN, INNER, HEADS, HEAD = 64, 96, 4, 32
MAX_ROWS = 16
PARTS = ("self_attn.o_proj", "post_attention_layernorm", "mlp")


class Plain(FeedForwardProvider):
    """In plain tensor operations; remembers the rows that it was asked for, and fails when it is told to."""

    def __init__(self):
        self.max_rows, self.rows, self.fails, self.reason = MAX_ROWS, [], False, None

    def unsupported_reason(self, layer):
        return self.reason

    def serve(self, layer):
        made = [(w.numbers, w.scales) for w in (layer.output, layer.gate_and_up, layer.down)]

        def compute(attended, residual):
            self.rows.append(len(attended))
            if self.fails:
                raise RuntimeError("compute failed on purpose")
            parts = feed_forward_parts_reference(attended, residual, layer.norm, made, layer.epsilon)
            return tuple(part.to(layer.dtype) for part in parts)

        return compute


class Attending(torch.nn.Module):
    """In the place of vLLM's attention, which needs a cache."""

    layer_name = "model.layers.0.self_attn.attn"

    def forward(self, q, k, v):
        return q * 0.5


@pytest.fixture(scope="module")
def engine():
    """vLLM's configuration, and its groups of one worker."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield config
        cleanup_dist_env_and_memory()


def _config(kind, **changes):
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    made = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind]
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
    return made(**sizes | ({} if kind == "qwen2" else {"head_dim": HEAD}) | changes)


def _layer(kind, engine, **changes):
    """A decoder layer of vLLM's with random weights, whose attention only scales queries."""
    from vllm.model_executor.models import llama, mistral, qwen2, qwen3

    config = _config(kind, **changes)
    with pytest.MonkeyPatch.context() as patch:
        for module in (llama, qwen2, qwen3):
            patch.setattr(module, "Attention", lambda *args, **options: Attending())
        if kind in ("llama", "mistral"):
            of_kind = {"llama": llama.LlamaDecoderLayer, "mistral": mistral.MistralDecoderLayer}[kind]
            layer = of_kind(vllm_config=engine, prefix="model.layers.0", config=config)
        else:
            of_kind = {"qwen2": qwen2.Qwen2DecoderLayer, "qwen3": qwen3.Qwen3DecoderLayer}[kind]
            layer = of_kind(config=config, prefix="model.layers.0")
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for module in layer.modules():
        if hasattr(module, "quant_method"):
            # As vLLM computes where it has not packed the weights.
            module.cpu_linear = torch.nn.functional.linear
    return layer.eval()


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3"])
def layer(request, engine):
    return _layer(request.param, engine)


@pytest.fixture
def plugin():
    return GuardedPlugin("attention", "plain.feed_forward", Plain())


def _attach(layer, plugin, engine):
    model = torch.nn.ModuleList([layer])
    return patch.attach(model, engine, SimpleNamespace(dtype=torch.float32, model="a-model"), plugin)


@contextmanager
def _serving(layer):
    from vllm import forward_context

    context = forward_context.ForwardContext(
        no_compile_layers={Attending.layer_name: layer.self_attn.attn}, attn_metadata={}, slot_mapping={}
    )
    with forward_context.override_forward_context(context), torch.no_grad():
        yield


def _inputs(rows):
    generator = torch.Generator().manual_seed(rows)
    return torch.arange(rows), *(torch.randn(rows, HIDDEN, generator=generator) for _ in range(2))


def _run(layer, rows):
    """What the layer returns, and whether its inputs stayed as they were, the residual aside (vLLM adds to that)."""
    positions, hidden, residual = _inputs(rows)
    with _serving(layer):
        return layer(positions, hidden, residual)


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
def test_a_layer_returns_what_it_did_before(layer, plugin, engine, rows):
    expected = _run(layer, rows)
    assert _attach(layer, plugin, engine) == 1
    found = _run(layer, rows)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert plugin.instance.rows == ([rows] if rows <= MAX_ROWS else [])


def test_the_operator_leaves_its_inputs_alone(engine, plugin):
    layer = _layer("llama", engine)
    _attach(layer, plugin, engine)
    for rows in (3, 20):
        attended, residual = torch.randn(rows, HEADS * HEAD), torch.randn(rows, HIDDEN)
        before = attended.clone(), residual.clone()
        with _serving(layer):
            computed = layer.post_attention_layernorm(attended, residual)
        assert torch.equal(attended, before[0])
        assert torch.equal(residual, before[1])
        assert {t.data_ptr() for t in computed}.isdisjoint({attended.data_ptr(), residual.data_ptr()})


def test_large_batches_get_the_norm_of_a_kernel(engine, plugin, monkeypatch):
    """Where vLLM compiles, its own choice is to have plain tensor operations fused, which does not happen in here."""
    from vllm import ir

    layer = _layer("llama", engine)
    expected = _run(layer, 20)
    _attach(layer, plugin, engine)
    original, chosen = ir.ops.fused_add_rms_norm, []

    @contextmanager
    def set_priority(priority):
        chosen.append(priority)
        yield

    ops = SimpleNamespace(
        fused_add_rms_norm=SimpleNamespace(
            supported_providers=lambda: ["native", "aiter", "vllm_c"],
            set_priority=set_priority,
            maybe_inplace=original.maybe_inplace,
        ),
        rms_norm=ir.ops.rms_norm,
    )
    monkeypatch.setattr(ir, "ops", ops)
    assert torch.equal(_run(layer, 20)[0], expected[0])
    _run(layer, 3)
    assert chosen == [["vllm_c", "native"]]


def test_types_and_names_of_weights_stay(engine, plugin):
    layer = _layer("qwen3", engine)
    kinds, names = [type(layer.get_submodule(part)) for part in PARTS], list(layer.state_dict())
    _attach(layer, plugin, engine)
    assert all(isinstance(layer.get_submodule(part), kind) for part, kind in zip(PARTS, kinds, strict=True))
    assert list(layer.state_dict()) == names


def test_compiled_it_is_one_operator(engine, plugin):
    layer = _layer("qwen3", engine)
    expected = _run(layer, 4)
    _attach(layer, plugin, engine)
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(layer, backend=keep, fullgraph=True, dynamic=True)
    found = _run(compiled, 4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    [graph] = graphs
    assert sum("vllm_instant.feed_forward" in target for target in graph) == 1
    assert plugin.instance.rows == [4]


def warnings(caplog):
    """Whatever level other tests have left the logger at."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_plugin_that_raises_is_disabled_and_vllm_takes_over(engine, plugin, caplog):
    layer = _layer("llama", engine)
    expected = _run(layer, 4)
    _attach(layer, plugin, engine)
    plugin.instance.fails = True
    with caplog.at_level(logging.ERROR, "vllm.instant"):
        for _ in range(3):
            for one, other in zip(_run(layer, 4), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert plugin.instance.rows == [4]
    [record] = warnings(caplog)
    assert "plain.feed_forward in slot attention raised in compute and is disabled" in record.getMessage()


def test_a_result_of_another_form_is_not_used(engine, plugin, caplog):
    layer = _layer("llama", engine)
    expected = _run(layer, 4)
    plugin.instance.serve = lambda half: lambda attended, residual: (residual[:1], residual.half())
    _attach(layer, plugin, engine)
    with caplog.at_level(logging.ERROR, "vllm.instant"):
        torch.testing.assert_close(_run(layer, 4)[0], expected[0], rtol=1e-4, atol=1e-4)
    [record] = warnings(caplog)
    assert "it returned torch.float32 of shape (1, 64) for a residual stream of torch.float32 and shape (4, 64)" in (
        record.getMessage()
    )


def _with_bias(layer):
    layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(HIDDEN))


def _split(layer):
    layer.mlp.down_proj.tp_size = 2


def _packed(layer):
    layer.mlp.gate_up_proj.weight = torch.nn.Parameter(torch.empty(0))


def _other_type(layer):
    layer.mlp.gate_up_proj.weight.data = layer.mlp.gate_up_proj.weight.data.half()


def _quantised(layer):
    layer.mlp.down_proj.quant_method = SimpleNamespace()


def _other_norm(layer):
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    layer.post_attention_layernorm = GemmaRMSNorm(HIDDEN)


def _partial_norm(layer):
    layer.post_attention_layernorm.variance_size_override = 8


def _other_activation(layer):
    layer.mlp.act_fn = torch.nn.SiLU()


def _offloaded(layer):
    layer.forward = layer.forward


def _other_layer(layer):
    class Scaled(type(layer)):
        def forward(self, *args):
            return super().forward(*args)

    layer.__class__ = Scaled


def _other_feed_forward(layer):
    class Clamped(type(layer.mlp)):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    layer.mlp.__class__ = Clamped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with_bias, "o_proj has a bias"),
        (_split, "down_proj is split between 2 workers (tensor parallelism)"),
        (_packed, "vLLM keeps the weights of gate_up_proj in a form of its own (shape (0,), not (192, 64))"),
        (_other_type, "gate_up_proj has weights of type torch.float16, and the model computes in torch.float32"),
        (
            _quantised,
            "down_proj is quantised (SimpleNamespace, weights of type torch.float32), and plugins know FP8 weights "
            "with one scale an output",
        ),
        (_other_norm, "it has a GemmaRMSNorm and not vLLM's RMSNorm"),
        (_partial_norm, "its norm is over a part of the hidden state, or has no weights"),
        (_other_activation, "it has a SiLU and not vLLM's SiluAndMul"),
        (_offloaded, "its weights are moved to the device for each step (offloading)"),
        (_other_layer, "its layer is of a kind that is not known (Scaled)"),
        (_other_feed_forward, "its feed-forward is of a kind that is not known (Clamped)"),
    ],
)
def test_other_layers_stay_vllms_with_a_sentence(engine, plugin, caplog, change, reason):
    layer = _layer("llama", engine)
    change(layer)
    kinds = [type(layer.get_submodule(part)) for part in PARTS]
    with caplog.at_level(logging.WARNING, "vllm.instant"):
        assert _attach(layer, plugin, engine) == 0
    assert [type(layer.get_submodule(part)) for part in PARTS] == kinds
    [record] = warnings(caplog)
    assert record.getMessage() == f"Plugin plain.feed_forward leaves 1 layers of a-model to vLLM: {reason}"


def test_a_plugins_objection_is_said_once(engine, plugin, caplog):
    plugin.instance.reason = "it does not like it"
    model = torch.nn.ModuleList([_layer("llama", engine) for _ in range(3)])
    with caplog.at_level(logging.WARNING, "vllm.instant"):
        assert patch.attach(model, engine, SimpleNamespace(dtype=torch.float32, model="a-model"), plugin) == 0
    [record] = warnings(caplog)
    assert record.getMessage() == "Plugin plain.feed_forward leaves 3 layers of a-model to vLLM: it does not like it"


def test_a_model_without_such_layers_is_named(engine, plugin, caplog):
    with caplog.at_level(logging.WARNING, "vllm.instant"):
        assert _attach(torch.nn.Linear(2, 2), plugin, engine) == 0
    assert "finds no decoder layer that it knows in a-model" in caplog.text


def test_layers_are_served_once(engine, plugin, caplog):
    layer = _layer("llama", engine)
    assert _attach(layer, plugin, engine) == 1
    with caplog.at_level(logging.WARNING, "vllm.instant"):
        assert _attach(layer, plugin, engine) == 0
    assert warnings(caplog) == []
    _run(layer, 2)
    assert plugin.instance.rows == [2]


def _fp8(linear):
    """As vLLM keeps weights with one scale an output: inputs first, those of one output side by side."""
    scales = linear.weight.data.abs().amax(1, keepdim=True) / 448
    numbers = (linear.weight.data / scales).to(torch.float8_e4m3fn)
    linear.weight = torch.nn.Parameter(numbers.t(), requires_grad=False)
    linear.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
    # Its own computation is not what is tested; it only has to be another method than for plain weights.
    linear.quant_method = SimpleNamespace()


def test_fp8_weights_with_a_scale_an_output_reach_the_plugin(engine, plugin):
    layer = _layer("qwen2", engine)
    expected = _run(layer, 4)
    for _, linear in patch.linears(layer):
        _fp8(linear)
    assert _attach(layer, plugin, engine) == 1
    added, residual = _run(layer, 4)
    assert plugin.instance.rows == [4]
    # Numbers with three bits of mantissa: relative errors of up to 1/16, which sums of 64 make smaller.
    assert float((residual - expected[1]).norm() / expected[1].norm()) < 0.05
    assert float((added - expected[0]).norm() / expected[0].norm()) < 0.1
    assert not torch.equal(residual, expected[1])


@pytest.mark.parametrize("spoiled", ["one scale", "blocks", "outputs first"])
def test_other_fp8_weights_do_not(engine, plugin, caplog, spoiled):
    layer = _layer("qwen2", engine)
    for _, linear in patch.linears(layer):
        _fp8(linear)
    down = layer.mlp.down_proj
    if spoiled == "one scale":
        down.weight_scale = torch.nn.Parameter(torch.ones(1))
    elif spoiled == "blocks":
        down.weight_block_size = [128, 128]
    else:
        down.weight = torch.nn.Parameter(down.weight.data.t().contiguous(), requires_grad=False)
    with caplog.at_level(logging.WARNING, "vllm.instant"):
        assert _attach(layer, plugin, engine) == 0
    assert "leaves 1 layers of a-model to vLLM: " in caplog.text
    assert "down_proj" in caplog.text


@pytest.fixture
def loading(engine, monkeypatch):
    """Loads a layer with a loader that has a way of its own and calls the general one, as some of vLLM's do."""

    def load(plugin, **changes):
        class Base:
            def create_model(self, vllm_config, model_config, prefix=""):
                self.seen, self.layer = dict(vllm_config.additional_config), _layer("llama", engine)
                return torch.nn.ModuleList([self.layer])

            def load_model(self, vllm_config, model_config, prefix=""):
                model = self.create_model(vllm_config, model_config, prefix)
                self.kept = [hasattr(linear, "_cpu_skip_gemm_dispatch") for _, linear in patch.linears(self.layer)]
                return model

        class OwnWay(Base):
            def load_model(self, vllm_config, model_config, prefix=""):
                return super().load_model(vllm_config, model_config, prefix)

        wrap(patch.PATCH, MODEL_LOADER, BaseModelLoader=Base, _LOAD_FORMAT_TO_MODEL_LOADER={"a": Base, "own": OwnWay})
        monkeypatch.setattr(patch, "is_chosen", lambda: True)
        monkeypatch.setattr(patch, "provider", lambda config: plugin)
        config = {"lora_config": None, "additional_config": {"a": 1}, "device_config": engine.device_config}
        loader = OwnWay()
        loader.load_model(
            vllm_config=SimpleNamespace(**config | changes),
            model_config=SimpleNamespace(dtype=torch.float32, model="a-model"),
        )
        return loader

    return load


def test_loaders_serve_what_they_load(loading, plugin):
    loader = loading(plugin)
    assert hasattr(loader.layer.self_attn.attn, patch.SERVED)
    # Known before the model is made: it keeps copies of the configuration.
    assert loader.seen == {"a": 1, patch.CACHE_KEY: "plain.feed_forward"}
    # vLLM would pack the weights for its own kernels.
    assert loader.kept == [True] * 3


def test_without_a_plugin_nothing_is_touched(loading):
    loader = loading(None)
    assert not hasattr(loader.layer.self_attn.attn, patch.SERVED)
    assert loader.seen == {"a": 1}
    assert loader.kept == [False] * 3


def test_lora_leaves_all_layers_to_vllm(loading, plugin, caplog):
    with caplog.at_level(logging.WARNING, "vllm.instant"):
        loader = loading(plugin, lora_config=object())
    assert not hasattr(loader.layer.self_attn.attn, patch.SERVED)
    assert "leaves all layers to vLLM: LoRA adapters change its linear layers" in caplog.text


def test_batch_invariance_leaves_all_layers_to_vllm(loading, plugin, caplog, monkeypatch):
    from vllm import envs

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True)
    with caplog.at_level(logging.WARNING, "vllm.instant"):
        loader = loading(plugin)
    assert not hasattr(loader.layer.self_attn.attn, patch.SERVED)
    assert "(VLLM_BATCH_INVARIANT)" in caplog.text


@pytest.mark.parametrize(
    ("part", "line", "other"),
    [
        ("LlamaDecoderLayer", "hidden_states = self.mlp(hidden_states)", "hidden_states = 2 * self.mlp(hidden_states)"),
        ("LlamaAttention", "output, _ = self.o_proj(attn_output)", "output, _ = self.o_proj(2 * attn_output)"),
        ("LlamaMLP", "x, _ = self.down_proj(x)", "x, _ = self.down_proj(2 * x)"),
    ],
)
def test_a_release_that_computes_something_else_is_noticed(tmp_path, part, line, other):
    [requirement] = [r for r in requirements() if r.file.endswith("/llama.py") and r.name == f"{part}.forward"]
    copy = tmp_path / requirement.file
    copy.parent.mkdir(parents=True)
    source = (installed_vllm() / requirement.file).read_text()
    copy.write_text(source)
    requirement.check(tmp_path)
    assert line in source
    copy.write_text(source.replace(line, other))
    forget_sources()
    with pytest.raises(RequirementError, match=rf"llama\.py: {part}\.forward no longer contains: "):
        requirement.check(tmp_path)


class Whole(AttentionProvider):
    def __init__(self, part):
        self.part = part

    def feed_forward(self):
        return self.part


@pytest.fixture
def part_of(monkeypatch):
    def find(whole):
        patch._part.cache_clear()
        monkeypatch.setattr(attention, "provider", lambda: whole and GuardedPlugin("attention", "whole", whole))
        return patch._part("a deployment")

    yield find
    patch._part.cache_clear()


def test_the_part_has_a_breaker_of_its_own(part_of):
    part = Plain()
    contained = part_of(Whole(part))
    assert contained.instance is part
    assert (contained.slot, contained.plugin) == ("attention", "whole.feed_forward")
    assert part_of(Whole(None)) is None
    assert part_of(None) is None


def test_a_part_of_another_kind_does_not_start(part_of):
    with pytest.raises(PluginStartError, match=r"its feed_forward\(\) returned a int; return None, or derive it from"):
        part_of(Whole(3))
