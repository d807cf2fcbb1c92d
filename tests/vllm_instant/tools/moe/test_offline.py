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
    Frontier,
    Point,
    Setting,
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


def test_a_full_budget_is_native_routing_and_that_is_the_models_own(folder, model, windows):
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=windows).logits
    native, _ = model.read(windows)
    full, _ = model.read(windows, 4, 4, budget_policy(TOP_K, 1, EXPERTS))
    assert torch.allclose(native, own, atol=1e-4)
    assert torch.allclose(full, own, atol=1e-4)


def test_one_pass_is_what_decoding_step_by_step_gives(folder, windows):
    """A server's order of work: each prompt natively, then one token of every request a step, with a KV cache."""
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


def test_the_choice_is_that_of_the_reference(model, windows):
    _, seen = model.read(windows, 4, 4, budget_policy(TOP_K, 1, 3))
    for logits, weights, chosen in seen:
        for first in (0, 4):
            rows = logits[first : first + 4, 7]
            allowed = budgets.choose(rows, TOP_K, 1, 3).experts
            wanted = budgets.route(rows, TOP_K, allowed, renormalise=model.routed.renormalise)
            assert np.array_equal(chosen[first : first + 4, 7], wanted[0])
            assert np.allclose(weights[first : first + 4, 7], wanted[1], atol=1e-5)


def test_a_trace_of_windows(model, windows):
    found = model.trace(windows, ["a", "b"] * 4, prompt=4, batch=4, at_once=4)
    _, seen = model.read(windows)
    assert len(found) == 96
    assert np.array_equal(found.experts[12 * 3 + 5, 1], seen[1][2][3, 5])
    decode = found.decode()
    steps, counts = np.unique(decode.step, return_counts=True)
    assert len(steps) == 2 * 8
    assert (counts == 4).all()
    assert not set(steps) & set(found.step[found.is_prefill])
    # A prompt's step holds one request.
    for step in np.unique(found.step[found.is_prefill]):
        assert len(np.unique(found.request[found.step == step])) == 1


def test_a_frontier_has_nothing_to_lose_natively_and_more_the_less_is_allowed(model, windows, tmp_path):
    cluster = np.tile(np.arange(EXPERTS) // 4, (2, 1))
    frontier = Frontier(model, windows, 4, cluster, at_once=4)
    native = frontier.measure(Setting(NATIVE), 4)
    assert native.saved.value == native.perplexity.value == native.kl.value == 0.0
    assert (native.mass, native.agreement) == (pytest.approx(1.0), 1.0)
    some = frontier.measure(Setting(BUDGET, 5, 1), 4)
    few = frontier.measure(Setting(BUDGET, 2), 4)
    assert few.distinct.value == TOP_K
    assert few.distinct.value < some.distinct.value <= native.distinct.value
    assert few.kl.value > some.kl.value > 0
    assert few.mass < some.mass < 1
    points = [native, some, few, frontier.measure(Setting(OEA, 0, 1), 4), frontier.measure(Setting(HARD, 1), 4)]
    assert points[-1].distinct.value <= 4
    plots.draw([*points, frontier.measure(Setting(CLUSTER_PRIOR, 3, 1, 1.0), 4)], tmp_path / "a.png", "toy")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert Point.read(some.plain()).plain() == some.plain()
    with pytest.raises(ValueError, match="needs clusters"):
        Frontier(model, windows, 4).measure(Setting(HARD, 1), 4)


def test_a_batch_of_one_keeps_its_own_experts(model, windows):
    alone = Frontier(model, windows, 4, at_once=4).measure(Setting(BUDGET, 2, 1), 1)
    assert alone.distinct.value == TOP_K
    assert alone.perplexity.value == pytest.approx(0.0, abs=1e-6)


def test_models_that_cannot_be_restricted_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no routers that can be restricted"):
        OfflineModel(write(tmp_path / "dense", "llama"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        OfflineModel(tmp_path / "none")


def test_windows_mixed_and_grouped():
    streams = [("a", torch.arange(100)), ("b", torch.arange(1000, 1100))]
    found = cut(streams, 8, 10)
    assert found.grouped().classes == ("a",) * 4 + ("b",) * 4
    assert found.mixed().classes == ("a", "b") * 4
    assert found.mixed().tokens[1, 0] == 1000
    with pytest.raises(ValueError, match="a: 100 tokens are too few for 20 windows of 10"):
        cut(streams, 40, 10)
