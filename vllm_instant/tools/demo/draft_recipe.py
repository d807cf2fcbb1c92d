"""A draft model for the demo's public chat model: two of its layers, trained on its own answers to the demo's prompts.

``vllm-instant demo draft`` writes the prompts and runs ``vllm-instant distill`` with the arguments below. The result
stays in the user's cache: with a vocabulary of 49,152 the embeddings alone are 28 million parameters, too many for the
repository.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_instant.tools.demo import prompt_sets, real_model
from vllm_instant.tools.demo.assets import cache_folder, made_once

SETS = ("edit", "extract", "story", "explain")
PROMPTS_PER_SET = 64
PROMPT_SEED = "draft"
ANSWER_TOKENS = 96
OPTIONS = ("--take-layers", "2", "--share", "0.3", "--steps", "400", "--context", "128", "--batch", "2")
ABOUT = "two of the target's 30 layers, trained on its answers to prompts of the demo's classes"


def folder() -> Path:
    """Where the draft model is kept; another recipe has another folder."""
    recipe = repr((real_model.SHA256, SETS, PROMPTS_PER_SET, PROMPT_SEED, ANSWER_TOKENS, OPTIONS))
    return cache_folder(f"smollm2-draft-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}")


def made() -> Path:
    """The folder of the draft model; raises FileNotFoundError with the command that makes it where it is missing."""
    if not (folder() / "complete").is_file():
        raise FileNotFoundError(f"there is no draft model for {real_model.NAME} yet: vllm-instant demo draft")
    return folder()


def prepare(run: Callable[[Sequence[str]], None], output: Path | None = None) -> Path:
    """Make the draft model; returns its folder, at once when that was done before.

    Args:
        run: runs ``vllm-instant distill`` with these words.
        output: folder to write to; by default one in the user's cache, named after the recipe.

    """
    chosen = output or folder()
    target = real_model.prepare()

    def make(to: Path) -> None:
        from vllm_instant.tools.distill.distill import CHECKPOINT  # imports torch

        to.mkdir(parents=True, exist_ok=True)
        prompts = to / "prompts.jsonl"
        prompt_sets.write(prompts, SETS, PROMPTS_PER_SET, PROMPT_SEED, "training")
        answers = ("--prompts", str(prompts), "--answer-tokens", str(ANSWER_TOKENS))
        run([str(target), str(to), *answers, *OPTIONS])
        # Five times as large as the model, and of use to an interrupted run only.
        shutil.rmtree(to / CHECKPOINT, ignore_errors=True)

    return made_once(chosen, folder().name, make)
