"""The draft model of the public model: its prompts, its command, and that it is made once."""

import json
from pathlib import Path

import pytest

from vllm_instant.tools.demo import draft_recipe, prompt_sets, real_model

pytestmark = pytest.mark.unit


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(draft_recipe, "cache_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(real_model, "prepare", lambda: tmp_path / "target")
    return tmp_path


def test_it_is_distilled_once_from_prompts_of_the_training_half(cache):
    runs = []

    def run(words):
        runs.append(words)
        (Path(words[1]) / "checkpoint").mkdir()

    folder = draft_recipe.prepare(run)
    [words] = runs
    assert not (folder / "checkpoint").exists()
    assert words[:2] == [str(cache / "target"), str(folder)]
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert {prompt["class"] for prompt in prompts} == set(draft_recipe.SETS)
    asked = {
        prompt["prompt"]
        for name in draft_recipe.SETS
        for prompt in prompt_sets.PROMPT_SETS[name].prompts(60, 1, "held out")
    }
    assert not asked & {prompt["prompt"] for prompt in prompts}
    assert draft_recipe.prepare(run) == folder == draft_recipe.made()
    assert len(runs) == 1


def test_a_failed_run_is_not_taken_for_a_model(cache):
    def fail(words):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        draft_recipe.prepare(fail)
    with pytest.raises(FileNotFoundError, match=r"no draft model for .* yet: vllm-instant demo draft"):
        draft_recipe.made()


def test_the_halves_are_disjoint_and_make_up_all_prompts():
    for name in draft_recipe.SETS:
        texts = {half: {p["prompt"] for p in prompt_sets.PROMPT_SETS[name].prompts(200, 5, half)} for half in HALVES}
        assert not texts["training"] & texts["held out"]
        some = {p["prompt"] for p in prompt_sets.PROMPT_SETS[name].prompts(40, 5)}
        assert some <= texts["training"] | texts["held out"]


HALVES = ("training", "held out")
