"""Corpus, recipe, committed asset and expansion agree with each other."""

import json
from dataclasses import asdict

import pytest

from vllm_instant.tools.demo import assets, recipe, widen_model
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.distill.text import encode
from vllm_instant.tools.distill.training import Training, learning_rate_factor


@pytest.fixture(scope="module")
def base():
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(assets.ASSETS / "base", dtype=torch.float32).eval()


def test_the_corpus_is_deterministic_and_holds_out_documents():
    first, second = list(documents()), list(documents())
    assert first == second
    assert len({(d.kind, d.name) for d in first}) == len(first)
    assert {d.kind for d in first} == {"code", "structured"}
    held_out = [d for d in first if d.held_out]
    assert list(documents(held_out_only=True)) == held_out
    assert 0.02 < len(held_out) / len(first) < 0.08
    assert {d.kind for d in held_out} == {"code", "structured"}


def test_structured_documents_are_one_json_object_per_line():
    document = next(d for d in documents() if d.kind == "structured")
    for line in document.text.splitlines():
        assert {"module", "kind", "name", "line", "doc"} <= json.loads(line).keys()


def test_stored_models_have_the_shape_of_the_recipe(base):
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    for name, architecture in (("base", recipe.BASE), ("draft", recipe.DRAFT)):
        config = AutoConfig.from_pretrained(assets.ASSETS / name)
        assert {key: getattr(config, key) for key in asdict(architecture)} == asdict(architecture)
        wanted = LlamaForCausalLM(architecture.config()).state_dict()
        with safe_open(assets.ASSETS / name / "model.safetensors", "pt") as weights:
            for key in weights.keys():  # noqa: SIM118  not a dict
                assert tuple(weights.get_slice(key).get_shape()) == tuple(wanted[key].shape)
        assert len(AutoTokenizer.from_pretrained(assets.ASSETS / name)) == recipe.VOCABULARY


def test_the_card_matches_the_recipe(base):
    card = json.loads((assets.ASSETS / "recipe.json").read_text())
    assert card["base"].items() >= asdict(recipe.BASE).items()
    assert card["draft"].items() >= asdict(recipe.DRAFT).items()
    assert card["base_training"] == asdict(recipe.BASE_TRAINING)
    assert card["draft_training"] == asdict(recipe.DRAFT_TRAINING)
    assert card["base"]["parameters"] == base.num_parameters()
    assert card["draft"]["parameters"] <= 0.1 * card["base"]["parameters"]
    folders = (assets.ASSETS / "base", assets.ASSETS / "draft")
    assert sum(p.stat().st_size for folder in folders for p in folder.iterdir()) <= 16e6


def test_the_stored_pair_reaches_the_figures_of_its_card(base):
    """A part of the held-out text only, hence the tolerance; a wrong or untrained pair is far away."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    card = json.loads((assets.ASSETS / "recipe.json").read_text())["held_out"]
    draft = LlamaForCausalLM.from_pretrained(assets.ASSETS / "draft", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(assets.ASSETS / "base")
    stream = encode(tokenizer, (d.text for d in documents() if d.held_out))
    found = recipe.evaluate(base, draft, stream[:20_000])
    assert found["loss"] == pytest.approx(card["loss"], abs=0.6)
    assert found["acceptance"] == pytest.approx(card["acceptance"], abs=0.1)


@pytest.mark.parametrize("size", [widen_model.SMALL, widen_model.MEDIUM], ids=["small", "medium"])
def test_expansion_preserves_the_function(base, size):
    import torch

    target = widen_model.expand(base, size)
    tokens = torch.randint(2, recipe.VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = (target(input_ids=tokens).logits - base(input_ids=tokens).logits).abs().max().item()
    assert difference < 1e-3
    assert target.num_parameters() > base.num_parameters()
    if size is widen_model.MEDIUM:
        assert target.num_parameters() > 100e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, "hidden_size = 128 is smaller"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "multiple of 2"),
    ],
)
def test_sizes_that_cannot_be_reached_are_refused(base, change, message):
    with pytest.raises(ValueError, match=message):
        widen_model.expand(base, widen_model.Size(**{**vars(widen_model.SMALL), **change}))


def test_the_learning_rate_warms_up_stays_and_ends_at_zero():
    plan = Training(seed=0, steps=100, decay_steps=20, matrix_rate=1, other_rate=1, warmup_steps=10)
    rates = [learning_rate_factor(step, plan) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == pytest.approx([1.0] * 72)
    assert rates[100] == 0
    assert rates[80:] == sorted(rates[80:], reverse=True)


def test_prepare_is_idempotent_and_notices_other_weights(tmp_path):
    pair = assets.prepare(tmp_path, widen_model.SMALL, "float32")
    written = (pair.target / "model.safetensors").stat().st_mtime_ns
    assert assets.prepare(tmp_path, widen_model.SMALL, "float32") == pair
    assert (pair.target / "model.safetensors").stat().st_mtime_ns == written
    assets.prepare(tmp_path, widen_model.SMALL, "bfloat16")
    assert (pair.target / "model.safetensors").stat().st_mtime_ns != written
