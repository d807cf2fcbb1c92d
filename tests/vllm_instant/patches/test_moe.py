"""Routers that ask a plugin, against vLLM's own classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from patch_harness import wrap

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.experts import ExpertLayer, ExpertRouter, Measurement, RowKind, StepRows
from vllm_instant.patches import moe as patch
from vllm_instant.patches import moe_reports, moe_routers
from vllm_instant.patches.moe_worker import MoeWorker
from vllm_instant.patches.names import EXPERTS_ATTRIBUTE, MODEL_RUNNER
from vllm_instant.patches.plugin_factory import PluginStartError

pytestmark = pytest.mark.engine

TOKENS, EXPERTS, TOP_K = 12, 16, 4


def _llama4(hidden_states, gating_output, topk, renormalize):
    from vllm.model_executor.models.llama4 import Llama4MoE

    return Llama4MoE.custom_routing_function(hidden_states, gating_output, topk, renormalize)


KINDS = {
    "softmax": {},
    "softmax, not renormalised": {"renormalize": False},
    "grouped softmax": {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
    "grouped, scaled": {
        "use_grouped_topk": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "renormalize": False,
        "routed_scaling_factor": 2.5,
    },
    "sigmoid with bias": {
        "use_grouped_topk": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "bias": True,
        "routed_scaling_factor": 2.5,
    },
    "sigmoid with bias, one group": {
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "bias": True,
    },
}


def _bias():
    return torch.rand(EXPERTS, generator=torch.Generator().manual_seed(5)) * 2


def _router(kind):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    options = dict(KINDS[kind])
    if options.pop("bias", False):
        options["e_score_correction_bias"] = _bias()
    return CPURouter(TOP_K, EXPERTS, **options)


class Restricting(ExpertRouter):
    """Allows what it is told."""

    def __init__(self, allowed=None):
        self.experts, self.steps, self.seen = allowed, [], []

    def prepare(self, layers, max_rows, device):
        self.layers = layers

    def allowed(self, layer, step):
        self.steps.append(step)
        return self.experts

    def measurement(self, number):
        return Measurement.COUNTS

    def observe(self, measures):
        self.seen.append(measures)


def _serving(router, plugin, kinds=None):
    moe_routers.adopt(router)
    serving = MoeWorker(GuardedPlugin("experts", "test", plugin), 64, torch.device("cpu"))
    layer = ExpertLayer(0, "layers.0.experts", EXPERTS, TOP_K)
    serving.serve([(router, layer, moe_routers.scoring_of(router))])
    kinds = [RowKind.DECODE] * TOKENS if kinds is None else kinds
    serving.begin(_rows(kinds), [0] * len(kinds))
    return serving


def _rows(kinds):
    real = [kind for kind in kinds if kind is not RowKind.PADDING]
    return StepRows(
        1,
        [f"r{i}" for i in range(len(real))],
        np.arange(len(real) + 1),
        np.array([kind is RowKind.DECODE for kind in real]),
        [""] * len(real),
        np.full(len(real), 7),
    )


def _inputs(seed=0, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 8, generator=generator), torch.randn(tokens, EXPERTS, generator=generator)


def _sorted(weights, picks):
    order = picks.argsort(-1)
    return weights.gather(1, order), picks.gather(1, order)


@pytest.fixture(autouse=True)
def leave_nothing():
    yield
    moe_routers.serve([])


@pytest.mark.parametrize("kind", KINDS)
def test_what_plugins_are_told_is_what_the_router_does(kind):
    """The rule that is read off a router gives the router's own picks and weights."""
    router, (hidden, logits) = _router(kind), _inputs()
    expected = _sorted(*router._compute_routing(hidden, logits, None))
    scoring = moe_routers.scoring_of(router)
    weights = scoring.weights(logits)
    picks, picked = scoring.pick(weights, scoring.ranking(weights))
    found = _sorted(picked, picks.to(torch.int32))
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_when_everything_is_allowed(kind):
    hidden, logits = _inputs()
    expected = _router(kind)._compute_routing(hidden, logits, None)
    for allowed in (None, torch.ones(1, EXPERTS, dtype=torch.bool)):
        router = _router(kind)
        _serving(router, Restricting(allowed))
        weights, picks = router._compute_routing(hidden, logits, None)
        assert torch.equal(picks, expected[1])
        assert torch.equal(weights, expected[0].float())


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_rows_are_held_to_what_is_allowed_and_others_are_not(kind):
    hidden, logits = _inputs(1)
    native = _router(kind)._compute_routing(hidden, logits, None)
    allowed = torch.zeros(1, EXPERTS, dtype=torch.bool)
    allowed[0, ::2] = True
    router = _router(kind)
    kinds = [RowKind.DECODE] * 5 + [RowKind.PREFILL] * 4
    serving = _serving(router, Restricting(allowed), kinds)
    weights, picks = router._compute_routing(hidden, logits, None)
    assert (picks[:5] % 2 == 0).all()
    # The prompt's rows, and padding behind them.
    assert torch.equal(picks[5:], native[1][5:])
    assert torch.equal(weights[5:], native[0][5:].float())
    scoring = moe_routers.scoring_of(router)
    scores = scoring.weights(logits).gather(1, picks.long())
    expected = scores / scores.sum(-1, keepdim=True) if scoring.renormalize else scores
    torch.testing.assert_close(weights[:5], scoring.scale * expected[:5], rtol=1e-4, atol=1e-5)
    serving.finish()
    [measures] = serving.plugin.instance.seen
    assert measures.native_experts == len(native[1][:5].unique())
    assert measures.routed_experts == len(picks[:5].unique()) <= 8
    assert 0 < measures.routed_mass < measures.native_mass


def test_too_few_allowed_experts_restrict_no_row():
    hidden, logits = _inputs()
    expected = _router("softmax")._compute_routing(hidden, logits, None)
    router, allowed = _router("softmax"), torch.zeros(1, EXPERTS, dtype=torch.bool)
    allowed[0, : TOP_K - 1] = True
    _serving(router, Restricting(allowed))
    assert torch.equal(router._compute_routing(hidden, logits, None)[1], expected[1])


@pytest.mark.parametrize("answer", [torch.ones(1, EXPERTS), torch.ones(1, 3, dtype=torch.bool), None])
def test_a_failing_plugin_is_disabled_and_the_model_routes(answer, caplog):
    class Failing(Restricting):
        def allowed(self, layer, step):
            if answer is None:
                raise RuntimeError("no idea")
            return answer

    hidden, logits = _inputs()
    expected = _router("softmax")._compute_routing(hidden, logits, None)
    router = _router("softmax")
    serving = _serving(router, Failing())
    assert torch.equal(router._compute_routing(hidden, logits, None)[1], expected[1])
    assert serving.plugin.disabled
    assert serving.described()["failures"] == [{"slot": "experts", "plugin": "test", "hook": "allowed", "count": 1}]
    serving.begin(_rows([RowKind.DECODE] * TOKENS), [0] * TOKENS)
    assert serving.idle


def test_the_operator_is_one_piece_for_the_compiler():
    router, (hidden, logits) = _router("sigmoid with bias"), _inputs()
    allowed = torch.zeros(1, EXPERTS, dtype=torch.bool)
    allowed[0, :8] = True
    plugin = Restricting(allowed)
    _serving(router, plugin)
    compiled = torch.compile(
        lambda hidden, logits: router._compute_routing(hidden, logits * 1.0, None), fullgraph=True, backend="aot_eager"
    )
    weights, picks = compiled(hidden, logits)
    assert (picks < 8).all()
    assert weights.dtype == torch.float32
    assert picks.dtype == torch.int32
    # What changes later changes in the tensors that are there.
    plugin.experts[:] = True
    expected = _router("sigmoid with bias")._compute_routing(hidden, logits, None)
    assert torch.equal(compiled(hidden, logits)[1], expected[1])


def test_routers_that_have_no_layer_are_left_alone():
    """Those of a draft model."""
    router, (hidden, logits) = _router("softmax"), _inputs()
    kind = type(router)
    moe_routers.adopt(router)
    assert isinstance(router, kind)
    assert not router.supports_monolithic_kernels
    expected = _router("softmax")._compute_routing(hidden, logits, None)
    assert torch.equal(router._compute_routing(hidden, logits, None)[1], expected[1])


def test_kernels_that_route_by_themselves_are_kept_away():
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

    router = _router("softmax")
    assert router.routing_method_type is not RoutingMethodType.Custom
    moe_routers.adopt(router)
    assert router.routing_method_type is RoutingMethodType.Custom


def _gpu_routers():
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    bias = _bias()
    return {
        "softmax": FusedTopKRouter(TOP_K, EXPERTS),
        "sigmoid": FusedTopKRouter(TOP_K, EXPERTS, scoring_func="sigmoid"),
        "biased": FusedTopKBiasRouter(
            top_k=TOP_K,
            global_num_experts=EXPERTS,
            e_score_correction_bias=bias,
            scoring_func="sigmoid",
            routed_scaling_factor=2.5,
        ),
        "grouped": GroupedTopKRouter(TOP_K, EXPERTS, 4, 2),
        "DeepSeek": GroupedTopKRouter(
            TOP_K, EXPERTS, 4, 2, scoring_func="sigmoid", routed_scaling_factor=2.5, e_score_correction_bias=bias
        ),
    }


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "biased", "grouped", "DeepSeek"])
def test_the_routers_of_gpus_pick_by_the_rule_that_is_read_off_them(kind, monkeypatch):
    """Their kernels do not run here; vLLM's own formulas in PyTorch do, for groups, and the textbook's for the rest."""
    from vllm.model_executor.layers.fused_moe.router import grouped_topk_router

    router, (hidden, logits) = _gpu_routers()[kind], _inputs(3)
    scoring = moe_routers.scoring_of(router)
    if kind in ("grouped", "DeepSeek"):
        plain = grouped_topk_router.grouped_topk._torchdynamo_orig_callable
        monkeypatch.setattr(grouped_topk_router, "grouped_topk", plain)
        expected = _sorted(*router._compute_routing(hidden, logits, None))
    else:
        scores = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
        choice = scores + _bias() if kind == "biased" else scores
        picks = choice.topk(TOP_K).indices
        picked = scores.gather(1, picks)
        picked = picked / picked.sum(-1, keepdim=True) * (2.5 if kind == "biased" else 1.0)
        expected = _sorted(picked, picks.to(torch.int32))
    weights = scoring.weights(logits)
    picks, picked = scoring.pick(weights, scoring.ranking(weights))
    found = _sorted(picked, picks.to(torch.int32))
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hash_indices_table": torch.zeros(4, 4, dtype=torch.int32)}, "hash routing"),
        ({"custom_routing_function": _llama4}, "function of the model's own"),
    ],
)
def test_routers_that_cannot_be_served_are_refused_with_a_reason(options, words):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    with pytest.raises(moe_routers.UnservedRouterError, match=words):
        moe_routers.scoring_of(CPURouter(TOP_K, EXPERTS, **options))


def test_llama4_is_known():
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.models.llama4 import Llama4MoE

    router = CPURouter(TOP_K, EXPERTS, custom_routing_function=Llama4MoE.custom_routing_function)
    hidden, logits = _inputs()
    expected = _sorted(*router._compute_routing(hidden, logits, None))
    scoring = moe_routers.scoring_of(router)
    weights = scoring.weights(logits)
    picks, picked = scoring.pick(weights, scoring.ranking(weights))
    found = _sorted(picked, picks.to(torch.int32))
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


def test_the_square_root_of_softplus_is_known():
    """DeepSeek-V4's; vLLM's kernel for it knows few numbers of experts."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    bias = torch.rand(256, generator=torch.Generator().manual_seed(5))
    router = CPURouter(6, 256, scoring_func="sqrtsoftplus", e_score_correction_bias=bias, routed_scaling_factor=1.5)
    logits = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    expected = _sorted(*router._compute_routing(torch.zeros(5, 8), logits, None))
    scoring = moe_routers.scoring_of(router)
    weights = scoring.weights(logits)
    picks, picked = scoring.pick(weights, scoring.ranking(weights))
    found = _sorted(picked, picks.to(torch.int32))
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("pipeline_parallel_size", 2, "all layers"),
        ("data_parallel_size", 4, "data_parallel_size = 4"),
        ("enable_dbo", True, "microbatches"),
    ],
)
def test_engines_that_split_a_step_are_refused(field, value, words):
    fields = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "enable_dbo": False}
    config = SimpleNamespace(parallel_config=SimpleNamespace(**fields))
    assert patch.unsupported_reason(config) is None
    setattr(config.parallel_config, field, value)
    assert words in patch.unsupported_reason(config)


def test_native_touches_nothing():
    deployment_env.set_deployment(resolve(None, []))
    try:
        assert patch.chosen() is None
        deployment_env.set_deployment(resolve(None, ["experts.plugin=observed"]))
        assert patch.chosen() is not None
    finally:
        deployment_env.clear_deployment()


def test_a_model_without_experts_is_refused():
    with pytest.raises(PluginStartError, match="no mixture-of-experts layers"):
        patch.served_layers(torch.nn.Linear(2, 2), "super_expert")


def test_rows_that_decode():
    """One new token and its drafts behind a prompt that was read; not what a preempted request reads again."""
    params = SimpleNamespace(extra_args={"instant_prompt_class": "code"})
    names = ["prompt", "decodes", "verifies", "resumed", "last of its prompt"]
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(
            req_ids=names,
            num_computed_tokens_cpu=np.array([0, 30, 31, 25, 19], np.int32),
            num_prompt_tokens=np.array([20, 20, 20, 20, 20], np.int32),
        ),
        requests={name: SimpleNamespace(sampling_params=params if name == "decodes" else None) for name in names},
    )
    output = SimpleNamespace(scheduled_spec_decode_tokens={"verifies": [5, 6]})
    rows, drafts = patch.rows_of(runner, output, np.array([20, 1, 3, 7, 1], np.int32), 9)
    assert rows.is_decode.tolist() == [False, True, True, False, False]
    assert rows.starts.tolist() == [0, 20, 21, 24, 31, 32]
    assert rows.prompt_classes == ["", "code", "", "", ""]
    assert rows.first_positions.tolist() == [0, 30, 31, 25, 19]
    assert (rows.number, drafts) == (9, [0, 0, 2, 0, 0])


def test_counts_reach_the_scheduler_beside_the_output():
    class Counting(Restricting):
        def metrics(self):
            return {"budget": 0.5}

    router, (hidden, logits) = _router("softmax"), _inputs()
    serving = _serving(router, Counting())
    router._compute_routing(hidden, logits, None)
    serving.finish()
    output = SimpleNamespace()
    setattr(output, EXPERTS_ATTRIBUTE, serving.report())
    count = moe_reports.count_in(output)
    assert (count.requests, count.draft_tokens) == (TOKENS, 0)
    assert (count.num_experts, count.top_k) == (EXPERTS, TOP_K)
    assert count.experts == serving.totals["routed_experts"]
    assert serving.report() is None
    assert moe_reports.count_in(SimpleNamespace()) is None
    assert serving.control({"no such": 1})["error"]
    assert serving.control({})["measures"] == {"budget": 0.5}


class TestShadow:
    class Shy(Restricting):
        def measurement(self, number):
            return Measurement.REFERENCE

    def _begin(self, serving, kinds):
        serving.begin(_rows(kinds), [0] * len(kinds))
        return serving.wants_shadow

    def test_it_waits_for_a_step_that_only_decodes(self):
        serving = _serving(_router("softmax"), self.Shy())
        assert serving.wants_shadow
        assert not self._begin(serving, [RowKind.DECODE, RowKind.PREFILL])
        assert not self._begin(serving, [RowKind.PREFILL])
        assert self._begin(serving, [RowKind.DECODE])

    def test_but_not_for_ever(self):
        serving = _serving(_router("softmax"), self.Shy())
        assert any(self._begin(serving, [RowKind.DECODE, RowKind.PREFILL]) for _ in range(80))

    def test_a_step_without_a_question_is_not_run_twice(self):
        class Content(self.Shy):
            def begin_step(self, rows):
                return False

        serving = _serving(_router("softmax"), Content())
        assert not serving.wants_shadow
        assert serving.counting

    def test_a_model_that_cannot_run_twice_is_only_counted(self):
        serving = _serving(_router("softmax"), self.Shy())
        serving.shadow_objection = "the model keeps a state"
        assert not self._begin(serving, [RowKind.DECODE])
        assert serving.counting

    def test_the_divergence_is_that_of_the_served_from_the_shadow_distribution(self):
        serving = _serving(_router("softmax"), self.Shy())
        shadow, served = torch.randn(3, 9), torch.randn(3, 9)
        tokens, total, squared = serving.compare(shadow, served).tolist()
        p, q = shadow.softmax(-1), served.softmax(-1)
        each = (p * (p / q).log()).sum(-1)
        assert tokens == 3
        assert total == pytest.approx(float(each.sum()), rel=1e-4)
        assert squared == pytest.approx(float((each * each).sum()), rel=1e-4)

    def test_only_rows_that_decode_and_sample_are_compared(self):
        kinds = [RowKind.PREFILL, *[RowKind.DECODE] * 30]
        serving = _serving(_router("softmax"), self.Shy(), kinds)
        rows = serving.compared_rows(torch.arange(0, 31, 2)).tolist()
        assert 0 not in rows
        assert 0 < len(rows) <= 8


class TestRunner:
    """The forward pass of a runner made of lists, with a shadow before it."""

    @pytest.fixture
    def runner(self, monkeypatch):
        from vllm import forward_context

        passes = []

        class GPUModelRunner:
            def __init__(self, vllm_config):
                self.config = vllm_config

            def load_model(self):
                pass

            def initialize_kv_cache(self, config):
                pass

            def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
                return torch.arange(len(num_scheduled_tokens)), None

            def _model_forward(self, *args, **kwargs):
                passes.append((self.instant_experts.plugin.instance.shadowed, forward_context.get_forward_context()))
                forward_context.get_forward_context().moe_layer_index += 6
                return torch.full((3, 4), float(len(passes)))

            def sample_tokens(self, grammar_output):
                return SimpleNamespace()

            def get_model(self):
                return SimpleNamespace(compute_logits=lambda hidden: hidden.cumsum(-1))

        wrap(patch.PATCH, MODEL_RUNNER, GPUModelRunner=GPUModelRunner)
        monkeypatch.setattr("vllm.distributed.get_tp_group", lambda: SimpleNamespace(world_size=1))
        context = SimpleNamespace(moe_layer_index=0)
        monkeypatch.setattr(forward_context, "_forward_context", context)
        runner = GPUModelRunner(SimpleNamespace())

        class Shadowing(Restricting):
            shadowed = False

            def measurement(self, number):
                return Measurement.REFERENCE if number == 1 else Measurement.OFF

            def reference_pass(self, active):
                self.shadowed = active

        serving = MoeWorker(GuardedPlugin("experts", "test", Shadowing()), 64, torch.device("cpu"))
        layer_router = _router("softmax")
        moe_routers.adopt(layer_router)
        layer = ExpertLayer(0, "layers.0.experts", EXPERTS, TOP_K)
        serving.serve([(layer_router, layer, moe_routers.scoring_of(layer_router))])
        runner.instant_experts = serving
        runner.input_batch = SimpleNamespace(
            req_ids=["a", "b", "c"],
            num_computed_tokens_cpu=np.array([9, 9, 9], np.int32),
            num_prompt_tokens=np.array([5, 5, 5], np.int32),
        )
        runner.requests = {name: SimpleNamespace(sampling_params=None) for name in "abc"}
        return runner, passes, context

    def _step(self, runner):
        output = SimpleNamespace(scheduled_spec_decode_tokens={})
        runner._prepare_inputs(output, np.array([1, 1, 1], np.int32))
        hidden = runner._model_forward()
        return hidden, runner.sample_tokens(None)

    def test_the_pass_that_counts_comes_last(self, runner):
        runner, passes, context = runner
        hidden, _ = self._step(runner)
        assert [shadowed for shadowed, _ in passes] == [True, False]
        assert (hidden == 2.0).all()
        # One pass's worth of layers was counted by vLLM.
        assert context.moe_layer_index == 6
        assert runner.instant_experts.totals["kl_tokens"] == 3
        expected = torch.ones(4).cumsum(0).log_softmax(-1)
        served = (2 * torch.ones(4)).cumsum(0).log_softmax(-1)
        divergence = float((expected.exp() * (expected - served)).sum())
        assert runner.instant_experts.totals["kl"] == pytest.approx(3 * divergence, rel=1e-4)

    def test_other_steps_run_once_and_report_now_and_then(self, runner):
        runner, passes, _ = runner
        self._step(runner)
        outputs = [self._step(runner)[1] for _ in range(40)]
        assert len(passes) == 42
        reports = [getattr(output, EXPERTS_ATTRIBUTE) for output in outputs if hasattr(output, EXPERTS_ATTRIBUTE)]
        assert len(reports) == 1
        assert reports[0]["totals"]["kl_tokens"] == 3
