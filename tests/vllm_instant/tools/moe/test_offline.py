import numpy as np
import pytest
import torch

from vllm_instant.tools.moe import budgets, plots
from vllm_instant.tools.moe.eval_windows import cut
from vllm_instant.tools.moe.offline import ModelError, OfflineModel, budget_policy
from vllm_instant.tools.moe.quality_budget_curve import (
    BUDGET,
    CLUSTER_PRIOR,
    HARD,
    NATIVE,
    OEA,
    CurvePoint,
    QualityBudgetCurve,
    Restriction,
)

EXPERTS, TOP_K = 8, 2


def write(folder, kind="mixtral"):
    import transformers

    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts_per_tok": TOP_K,
        "initializer_range": 0.2,
    }
    if kind == "llama":
        shape.pop("num_experts_per_tok")
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    elif kind == "qwen3":
        config = transformers.Qwen3MoeConfig(
            **shape, moe_intermediate_size=16, num_experts=EXPERTS, norm_topk_prob=False
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.MixtralConfig(**shape, intermediate_size=16, num_local_experts=EXPERTS)
        model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["mixtral", "qwen3"])
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder):
    return OfflineModel(folder)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1))


def test_a_full_budget_gives_the_models_own_routing(folder, model, windows):
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=windows).logits
    native, _ = model.read(windows)
    full, _ = model.read(windows, 4, 4, budget_policy(TOP_K, 1, EXPERTS))
    assert torch.allclose(native, own, atol=1e-4)
    assert torch.allclose(full, own, atol=1e-4)


def test_one_pass_equals_decoding_step_by_step(folder, windows):
    """The order of a server: each prompt natively, then one token of every request per step, with a KV cache."""
    from transformers import DynamicCache

    model, prompt, batch = OfflineModel(folder), 4, 4
    policy = budget_policy(TOP_K, 1, 3)
    at_once, seen = model.read(windows[:batch], prompt, batch, policy)
    with torch.inference_mode():
        cache = DynamicCache()
        model.model(input_ids=windows[:batch, :prompt], past_key_values=cache)
        for place in range(prompt, windows.shape[1]):

            def restrict(layer, logits):
                allowed = policy(layer, logits[None, None].numpy())[0, 0]
                return logits.masked_fill(~torch.from_numpy(allowed), float("-inf"))

            model._restrict = restrict
            step = model.model(input_ids=windows[:batch, place : place + 1], past_key_values=cache).logits
            assert torch.allclose(step[:, 0], at_once[:, place], atol=1e-4)
    for _, _, chosen in seen:
        for place in range(prompt, windows.shape[1]):
            assert len(np.unique(chosen[:, place])) <= max(3, batch)


def test_the_picks_are_those_of_the_reference(model, windows):
    _, seen = model.read(windows, 4, 4, budget_policy(TOP_K, 1, 3))
    for logits, weights, chosen in seen:
        for first in (0, 4):
            rows = logits[first : first + 4, 7]
            allowed = budgets.select_experts(rows, TOP_K, 1, 3).experts
            wanted = budgets.route(rows, TOP_K, allowed, renormalise=model.routed.renormalise)
            assert np.array_equal(chosen[first : first + 4, 7], wanted[0])
            assert np.allclose(weights[first : first + 4, 7], wanted[1], atol=1e-5)


def test_windows_give_a_trace_with_the_steps_of_a_server(model, windows):
    found = model.trace(windows, ["a", "b"] * 4, prompt=4, batch=4, windows_per_pass=4)
    _, seen = model.read(windows)
    assert len(found) == 96
    assert np.array_equal(found.experts[12 * 3 + 5, 1], seen[1][2][3, 5])
    decode = found.decode()
    steps, counts = np.unique(decode.step, return_counts=True)
    assert len(steps) == 2 * 8
    assert (counts == 4).all()
    assert not set(steps) & set(found.step[found.is_prefill])
    # The step of a prompt has one request.
    for step in np.unique(found.step[found.is_prefill]):
        assert len(np.unique(found.request[found.step == step])) == 1


def test_the_quality_loss_is_zero_for_native_routing_and_grows_with_the_restriction(model, windows, tmp_path):
    cluster = np.tile(np.arange(EXPERTS) // 4, (2, 1))
    curve = QualityBudgetCurve(model, windows, 4, cluster, windows_per_pass=4)
    native = curve.measure(Restriction(NATIVE), 4)
    assert native.saved.value == native.perplexity.value == native.kl.value == 0.0
    assert (native.mass, native.agreement) == (pytest.approx(1.0), 1.0)
    some = curve.measure(Restriction(BUDGET, 5, 1), 4)
    few = curve.measure(Restriction(BUDGET, 2), 4)
    assert few.distinct.value == TOP_K
    assert few.distinct.value < some.distinct.value <= native.distinct.value
    assert few.kl.value > some.kl.value > 0
    assert few.mass < some.mass < 1
    points = [native, some, few, curve.measure(Restriction(OEA, 0, 1), 4), curve.measure(Restriction(HARD, 1), 4)]
    assert points[-1].distinct.value <= 4
    plots.draw([*points, curve.measure(Restriction(CLUSTER_PRIOR, 3, 1, 1.0), 4)], tmp_path / "a.png", "toy")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert CurvePoint.from_record(some.to_record()).to_record() == some.to_record()
    with pytest.raises(ValueError, match="needs clusters"):
        QualityBudgetCurve(model, windows, 4).measure(Restriction(HARD, 1), 4)


def test_a_batch_of_one_keeps_its_own_experts(model, windows):
    alone = QualityBudgetCurve(model, windows, 4, windows_per_pass=4).measure(Restriction(BUDGET, 2, 1), 1)
    assert alone.distinct.value == TOP_K
    assert alone.perplexity.value == pytest.approx(0.0, abs=1e-6)


def test_models_that_cannot_be_restricted_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no routers that can be restricted"):
        OfflineModel(write(tmp_path / "dense", "llama"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        OfflineModel(tmp_path / "none")


def test_windows_are_ordered_mixed_or_grouped():
    streams = [("a", torch.arange(100)), ("b", torch.arange(1000, 1100))]
    found = cut(streams, 8, 10)
    assert found.grouped().classes == ("a",) * 4 + ("b",) * 4
    assert found.mixed().classes == ("a", "b") * 4
    assert found.mixed().tokens[1, 0] == 1000
    with pytest.raises(ValueError, match="a: 100 tokens are too few for 20 windows of 10"):
        cut(streams, 40, 10)
