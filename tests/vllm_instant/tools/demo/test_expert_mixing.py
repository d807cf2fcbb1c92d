"""Branches of one model as the experts of a mixture: shape, exactness, routing by text, an interrupted run."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from vllm_instant.tools.demo import assets, expert_mixing
from vllm_instant.tools.demo.corpus import Document
from vllm_instant.tools.demo.expert_mixing import MixPlan

PLAN = MixPlan(experts=3, chosen=2, steps=2, context=32, pieces=16)
KINDS = {
    "code": "def add(first, second):\n    return first + second\n\n",
    "structured": '{"name": "copy", "kind": "function", "args": ["source"]}\n',
}


@pytest.fixture
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture
def windows():
    """Tokens of three kinds of text that share no token."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1000 * kind, 1000 * kind + 20, (8, 32), generator=generator) for kind in range(3)]


def branch(base, file, change=0.0):
    torch.manual_seed(1)
    weights = {n: v + change * torch.randn_like(v) for n, v in base.state_dict().items() if ".mlp." in n}
    torch.save(weights, file)
    return file


def test_a_mixture_of_equal_branches_is_the_base(base, windows, tmp_path):
    """Exactly so, because the weights of a token's experts sum to one."""
    file = branch(base, tmp_path / "b.pt")
    mixture = expert_mixing.mix(base, [file] * 3, windows, PLAN)
    with torch.inference_mode():
        assert torch.allclose(mixture(windows[0]).logits, base(windows[0]).logits, atol=1e-5)


def test_branches_that_differ_make_another_model(base, windows, tmp_path):
    files = [branch(base, tmp_path / f"{n}.pt", change=0.05 * n) for n in range(3)]
    mixture = expert_mixing.mix(base, files, windows, PLAN)
    with torch.inference_mode():
        assert not torch.allclose(mixture(windows[0]).logits, base(windows[0]).logits, atol=1e-3)


def test_a_token_is_routed_to_the_expert_of_its_text(base, windows, tmp_path):
    mixture = expert_mixing.mix(base, [branch(base, tmp_path / "b.pt")] * 3, windows, PLAN)
    for kind, tokens in enumerate(windows):
        with torch.inference_mode():
            logits = mixture(tokens, output_router_logits=True).router_logits
        for layer in logits:
            assert (layer.argmax(-1) == kind).float().mean() > 0.8  # a third at random


def test_texts_are_clustered_by_their_words():
    texts = [f"{text} {number}" for number in range(12) for text in KINDS.values()]
    labels, others = expert_mixing.cluster(texts, list(KINDS.values()), 2, 0)
    assert len(set(labels[::2])) == len(set(labels[1::2])) == 1
    assert labels[0] != labels[1]
    assert others.tolist() == labels[:2].tolist()


def test_the_whole_recipe_and_its_card(base, tmp_path, monkeypatch):
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(assets.ASSETS / "base").save_pretrained(tmp_path / "base")
    texts = [Document(kind, f"{kind}{number}", text * 40) for kind, text in KINDS.items() for number in range(60)]
    monkeypatch.setattr(expert_mixing, "documents", lambda: iter(texts))
    steps = []
    card = expert_mixing.run(tmp_path, lambda *step: steps.append(step[:2]), PLAN, tmp_path / "base")
    assert steps == [(f"branch {number} of 3", step) for number in (1, 2, 3) for step in (1, 2)]
    mixture = MixtralForCausalLM.from_pretrained(tmp_path / "moe")
    assert (mixture.config.num_local_experts, mixture.config.num_experts_per_tok) == (3, 2)
    assert json.loads((tmp_path / "moe" / "recipe.json").read_text()) == card
    measured = [row for row in card["held_out"] if row]  # a cluster of three can be without held-out text
    assert measured
    assert all(sorted(row) == ["base_loss", "expert", "expert_share", "mixture_loss"] for row in measured)
    assert sum(card["pieces"]) == 16 * 2 + 4  # of two kinds, and a quarter as many conversations, less those held out


def test_a_branch_that_is_there_is_not_trained_again(base, tmp_path):
    (tmp_path / "branch0.pt").write_bytes(b"kept")
    expert_mixing._branch(tmp_path, torch.arange(100), PLAN, 0, tmp_path, lambda *step: pytest.fail("trained"))
    assert (tmp_path / "branch0.pt").read_bytes() == b"kept"
