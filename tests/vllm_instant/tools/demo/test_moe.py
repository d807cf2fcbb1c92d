"""The demo's mixture of experts: how it starts, how it is stored, and that its expansion changes nothing."""

import json
from dataclasses import asdict

import pytest
import torch

from vllm_instant.tools.demo import assets, moe_assets, moe_recipe, moe_training, upcycling, widen_experts
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.distill.text import encode
from vllm_instant.tools.moe.batched_experts_cpu import use_batched_experts


@pytest.fixture(scope="module")
def moe():
    model = moe_assets.load(assets.ASSETS / moe_assets.MOE_IN_ASSETS)
    use_batched_experts(model)
    return model


@pytest.fixture(scope="module")
def held_out():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.ASSETS / "base")
    return encode(tokenizer, [next(d.text for d in documents() if d.held_out and len(d.text) > 20_000)])


def test_the_card_matches_the_recipe(moe):
    folder = assets.ASSETS / moe_assets.MOE_IN_ASSETS
    card = json.loads((folder / "recipe.json").read_text())
    assert card["experts"] == asdict(moe_recipe.EXPERTS) | {"parameters": moe.num_parameters()}
    assert card["training"] == asdict(moe_recipe.TRAINING)
    assert (moe.config.num_local_experts, moe.config.num_experts_per_tok) == (64, 8)
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 12e6


def test_the_stored_model_reaches_the_figures_of_its_card(moe, held_out):
    from transformers import LlamaForCausalLM

    dense = LlamaForCausalLM.from_pretrained(assets.ASSETS / "base", dtype=torch.float32).eval()
    found = moe_recipe.evaluate(moe, dense, held_out[:4100])
    card = json.loads((assets.ASSETS / moe_assets.MOE_IN_ASSETS / "recipe.json").read_text())["held_out"]["code"]
    assert found["kl"] == pytest.approx(card["kl"], abs=0.15)
    assert found["loss"] == pytest.approx(found["dense_loss"], abs=0.2)


def test_routing_is_learned_not_random(moe, held_out):
    with torch.inference_mode():
        logits = moe.model(input_ids=held_out[None, :512], output_router_logits=True).router_logits
    for layer in logits:
        shares = layer.softmax(-1).topk(8, -1).values.sum(-1)
        assert shares.mean() > 0.25  # 8 of 64 at random: 0.125
        assert moe_training.load_imbalance(layer, 8) < 1.6 * 8


def test_storing_keeps_the_weights_to_eight_bits(moe, tmp_path):
    moe_assets.store(moe, tmp_path)
    again = moe_assets.load(tmp_path)
    for name, value in moe.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, atol=float(value.abs().max()) / 100), name
    tokens = torch.arange(64)[None]
    use_batched_experts(again)
    with torch.inference_mode():
        assert torch.allclose(again(input_ids=tokens).logits, moe(input_ids=tokens).logits, atol=0.1)


def test_expansion_preserves_function_and_choice(moe, held_out):
    big = widen_experts.expand_experts(moe, widen_experts.ExpertSize(384, 64))
    use_batched_experts(big)
    tokens = held_out[None, :200]
    with torch.inference_mode():
        small, large = (m(input_ids=tokens, output_router_logits=True) for m in (moe, big))
    assert big.config.hidden_size == 384
    assert big.num_parameters() > 2 * moe.num_parameters()
    # A token between two experts that are alike to the last bit may choose the other one: hence not all of them.
    difference = (small.logits - large.logits).abs().amax(-1)[0]
    assert difference.quantile(0.95) < 1e-3
    same = [
        (a.topk(8).indices.sort().values == b.topk(8).indices.sort().values).all(-1).float().mean()
        for a, b in zip(small.router_logits, large.router_logits, strict=True)
    ]
    assert min(same) > 0.98
    with pytest.raises(ValueError, match="hidden_size = 128 is smaller than the model's 256"):
        widen_experts.expand_experts(moe, widen_experts.ExpertSize(128, 64))


def test_preparing_writes_a_loadable_folder_once(tmp_path):
    folder = moe_assets.prepare(tmp_path / "moe", widen_experts.SMALL, "float32")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {p.name for p in folder.iterdir()}
    assert moe_assets.prepare(tmp_path / "moe", widen_experts.SMALL, "float32") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(FileNotFoundError, match="demo models are not part of the installed package"):
        moe_assets.prepare(tmp_path / "other", assets=tmp_path / "nothing")


def dense_toy():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, initializer_range=0.2, tie_word_embeddings=True, **shape
    )
    return LlamaForCausalLM(config).eval()


def test_upcycling_starts_near_the_dense_model():
    dense = dense_toy()
    tokens = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    experts = upcycling.Experts(count=12, chosen=8, size=8)
    model = upcycling.upcycle(dense, tokens, experts)
    assert torch.equal(upcycling.upcycle(dense, tokens, experts).lm_head.weight, model.lm_head.weight)

    def distance(other):
        with torch.inference_mode():
            p, q = (m(input_ids=tokens).logits.log_softmax(-1) for m in (dense, other))
        return float((p.exp() * (p - q)).sum(-1).mean())

    from transformers import MixtralForCausalLM

    torch.manual_seed(2)
    random = MixtralForCausalLM(upcycling.config(dense.config, experts)).eval()
    random.load_state_dict({k: v for k, v in dense.state_dict().items() if ".mlp." not in k}, strict=False)
    assert distance(model) < 0.7 * distance(random)
    with pytest.raises(ValueError, match="cannot be divided among 4 experts of 8"):
        upcycling.upcycle(dense, tokens, upcycling.Experts(4, 2, 8))


def test_a_balanced_layer_has_the_smallest_loss():
    even = torch.full((64, 4), 0.0) + 1e-3 * torch.eye(4).repeat(16, 1)
    skewed = even + torch.tensor([2.0, 0, 0, 0])
    assert moe_training.load_imbalance(even, 1) == pytest.approx(1.0, abs=1e-3)
    assert moe_training.load_imbalance(skewed, 1) > 2


def test_batched_experts_compute_the_same():
    from transformers import MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(upcycling.config(dense_toy().config, upcycling.Experts(12, 3, 8))).eval()
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        one_by_one = model(input_ids=tokens).logits
        use_batched_experts(model)
        assert torch.allclose(model(input_ids=tokens).logits, one_by_one, atol=1e-5)
