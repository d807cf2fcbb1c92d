"""The models that benchmarks serve, each with its draft model and its classes of prompts."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_instant.tools.demo import assets, draft_recipe, prompt_sets, real_model
from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.prompts import free, records, snippets, sums

EMBEDDED, SMOLLM2 = "embedded", "smollm2"
MIXED = ("edit", "extract", "story")
"""The classes that take turns in mixed traffic of the public model."""

Prompts = Callable[[int, int], list[PromptSpec]]
"""(count, seed) → prompts of one class."""


@dataclass(frozen=True)
class BenchModel:
    """A target, its draft model, and what it is asked."""

    name: str
    target: Path
    draft: Callable[[], Path]
    """Its folder; ends the benchmark with the command that makes it where it is missing."""
    prompts: Mapping[str, Prompts]

    def of_classes(self, names: Sequence[str], count: int, seed: int) -> dict[str, list[PromptSpec]]:
        """``count`` prompts of each class; ends the benchmark where a class does not exist."""
        unknown = [name for name in names if name not in self.prompts]
        if unknown:
            raise SystemExit(f"--prompts: {self.name} has no class {unknown[0]}, but {', '.join(self.prompts)}")
        return {name: self.prompts[name](count, seed) for name in names}


def embedded() -> BenchModel:
    """The repository's own pair."""
    pair = assets.prepare()
    return BenchModel(
        "the demo's own pair",
        pair.target,
        lambda: pair.draft,
        {
            "code": lambda count, seed: snippets("code", 0.0, count, seed),
            "structured": lambda count, seed: snippets("structured", 0.0, count, seed),
            "repetitive": records,
            "math-like": sums,
            "free": free,
            "mixed": _structured_and_free,
        },
    )


def smollm2() -> BenchModel:
    """SmolLM2-135M-Instruct, with chat prompts that its draft model was not trained on."""
    sets: dict[str, Prompts] = {name: functools.partial(_asked, name) for name in prompt_sets.PROMPT_SETS}
    return BenchModel(
        real_model.NAME, real_model.prepare(), _draft, {**sets, "mixed": functools.partial(_mixed, MIXED)}
    )


def _draft() -> Path:
    try:
        return draft_recipe.made()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None


def _structured_and_free(count: int, seed: int) -> list[PromptSpec]:
    """Structured prompts at temperature 0 and open-ended ones at temperature 1, in turn."""
    each = -(-count // 2)
    structured = snippets("structured", 0.0, each, seed)
    return [prompt for pair in zip(structured, free(each, seed + 1), strict=True) for prompt in pair][:count]


def _asked(name: str, count: int, seed: int) -> list[PromptSpec]:
    found = prompt_sets.PROMPT_SETS[name].prompts(count, seed, "held out")
    return [PromptSpec(entry["prompt"], entry["temperature"], entry["class"], ignore_eos=False) for entry in found]


def _mixed(names: Sequence[str], count: int, seed: int) -> list[PromptSpec]:
    # A class with fewer prompts than that begins again.
    each = [itertools.cycle(_asked(name, -(-count // len(names)), seed)) for name in names]
    return [next(each[number % len(each)]) for number in range(count)]


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """``--model``, and ``--draft`` for another draft model than the usual one."""
    parser.add_argument("--model", choices=[EMBEDDED, SMOLLM2], default=EMBEDDED)
    parser.add_argument("--draft", default=None, help="another draft model for the target")


def chosen(options: argparse.Namespace) -> BenchModel:
    """The model of ``--model`` with the draft model of ``--draft``."""
    model = smollm2() if options.model == SMOLLM2 else embedded()
    if options.draft is None:
        return model
    return BenchModel(model.name, model.target, lambda: Path(options.draft), model.prompts)
