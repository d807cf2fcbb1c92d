"""A target's answers to prompts: read, written side by side as one by one, ended, sorted by class."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_instant.tools.demo import assets
from vllm_instant.tools.distill.answers import ChatPrompt, answered, answered_once, read_prompts
from vllm_instant.tools.distill.text import TextClass, TextError

pytestmark = pytest.mark.unit
TEXTS = ["import os", "class Queue:\n    def put(self, item):", "x = 1 + 2", "for name in names:\n"]


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=4096, bos_token_id=0, eos_token_id=1)).eval()
    return model, AutoTokenizer.from_pretrained(assets.ASSETS / assets.BASE_IN_ASSETS)


def _texts(classes):
    return sorted(text for found in classes for text in (*found.training, *found.held_out))


def test_padding_changes_no_greedy_answer(target):
    prompts = [ChatPrompt(text, temperature=0.0) for text in TEXTS]
    alone = [answered(*target, [prompt], 12) for prompt in prompts]
    assert _texts(answered(*target, prompts, 12, batch=4)) == sorted(text for found in alone for text in _texts(found))


def test_an_answer_follows_its_prompt_and_ends_where_the_model_ends_it(target):
    model, tokenizer = target
    [written] = _texts(answered(model, tokenizer, [ChatPrompt(TEXTS[0], temperature=0.0)], 12))
    assert written.startswith(TEXTS[0])
    tokens = tokenizer(written, add_special_tokens=False)["input_ids"]
    begun = len(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"])
    assert begun < len(tokens)
    model.generation_config.eos_token_id = tokens[begun + 2]
    tokenizer_end, tokenizer.eos_token = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(tokens[begun + 2])
    try:
        [ended] = _texts(answered(model, tokenizer, [ChatPrompt(TEXTS[0], temperature=0.0)], 12))
    finally:
        tokenizer.eos_token, model.generation_config.eos_token_id = tokenizer_end, 1
    assert ended == tokenizer.decode(tokens[: tokens.index(tokens[begun + 2], begun)])


def test_each_class_has_its_prompts_at_their_temperature(target):
    prompts = [ChatPrompt(text, kind, temperature) for text in TEXTS for kind, temperature in (("a", 0.0), ("b", 0.9))]
    steps = []
    found = answered(*target, prompts, 4, lambda done, count: steps.append((done, count)), batch=3)
    by_name = {classes.name: _texts([classes]) for classes in found}
    assert {name: len(texts) for name, texts in by_name.items()} == {"a": 4, "b": 4}
    assert by_name["a"] != by_name["b"]
    assert steps == [(3, 8), (4, 8), (7, 8), (8, 8)]


def test_the_same_prompts_are_answered_once(tmp_path):
    file, calls = tmp_path / "out/answers.json", []

    def answer():
        calls.append(1)
        return [TextClass("a", [f"text {len(calls)}"], ["held out"])]

    first, other = [ChatPrompt("x")], [ChatPrompt("y")]
    found = [answered_once(file, answer, prompts) for prompts in (first, first, other, other)]
    assert [classes[0].training for classes in found] == [["text 1"], ["text 1"], ["text 2"], ["text 2"]]
    assert found[1] == found[0]


def test_prompts_are_read_as_bench_reads_them(tmp_path):
    file = tmp_path / "prompts.jsonl"
    entries = [{"prompt": "Hello", "class": "chat", "temperature": 0}, {"prompt": "x"}]
    file.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    assert read_prompts(file) == [ChatPrompt("Hello", "chat", 0.0), ChatPrompt("x", "prompts", 1.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("\n", "holds no prompts"),
        ('{"prompt": "a"}\nno\n', "line 2: not a JSON object with a prompt"),
        ('{"text": "a"}\n', "line 1: not a JSON object with a prompt"),
        ('["a"]\n', "line 1: not a JSON object with a prompt"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TextError, match=message):
        read_prompts(file)
