"""What limits a distilled draft: acceptance after more and more training, and for larger and larger drafts.

    .venv/bin/python benchmarks/distill_curve.py [--plans 0.1:1000,0.1:4500,0.3:2000,2L:1500,3L:1500]

A plan is a share of the target's parameters, or how many of its layers the draft starts with (``3L``), and a number of
steps; each is a run of its own, with its own decay of the learning rate, as ``vllm-instant distill --share S`` or
``--take-layers L`` makes it with ``--steps N`` from the demo's base model and text. Acceptance is that of the first
draft token at temperature 1, as an exact expectation (the overlap of the two distributions) over text that was learned
from and text that was held out: a draft that fails on the latter alone has learned by heart.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from results import HERE, write

from vllm_instant.tools.demo import assets, corpus, recipe
from vllm_instant.tools.distill import architecture, distill
from vllm_instant.tools.distill.initialization import layers_of
from vllm_instant.tools.distill.text import TokenClass, tokenized
from vllm_instant.tools.distill.training import overridden

TARGET = assets.ASSETS / assets.BASE_IN_ASSETS
LEARNED_TOKENS = 60_000
"""Of the text that was learned from, so many are measured on: about as many as are held out."""


def one_plan(target: Any, classes: list[TokenClass], start: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train one draft and measure it."""
    taken = int(start[:-1]) if start.endswith("L") else 0
    usual = distill.TRAINING_OF_LAYERS if taken else distill.DEFAULT_TRAINING
    plan = overridden(usual, steps=steps, batch=None, context=None)
    torch.manual_seed(plan.seed)
    if taken:
        draft = layers_of(target, taken)
    else:
        draft = transformers.LlamaForCausalLM(architecture.derive(target.config, target.num_parameters(), float(start)))
    seconds = distill.distill(target, draft, classes, folder, plan=plan)
    draft.to(torch.bfloat16)
    acceptance = {
        c.name: {
            kind: recipe.evaluate(target, draft, stream)["acceptance"]
            for kind, stream in (("held_out", c.held_out), ("learned", c.training[:LEARNED_TOKENS]))
        }
        for c in classes
    }
    return {
        "start": f"{taken} layers of the target" if taken else f"new, {start} of the target's parameters",
        "parameters": draft.num_parameters(),
        "steps": steps,
        "tokens_seen": steps * plan.batch * plan.context,
        "training_seconds": seconds,
        "acceptance": acceptance,
    }


def main() -> None:
    """Train, measure, print and write ``benchmarks/results/distill_curve.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", default="0.1:1000,0.1:4500,0.3:2000,2L:1500,3L:1500")
    parser.add_argument("--output", type=Path, default=HERE / "results/distill_curve.json")
    options = parser.parse_args()
    target = transformers.AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TARGET)
    classes = tokenized(tokenizer, recipe.classes(list(corpus.documents())), distill.DEFAULT_TRAINING.context)
    found = []
    for plan in options.plans.split(","):
        start, steps = plan.split(":")
        with tempfile.TemporaryDirectory(prefix="distill-curve-") as folder:
            found.append(one_plan(target, classes, start, int(steps), Path(folder)))
        result = found[-1]
        by_class = ", ".join(
            f"{name} {of['held_out']:.3f} held out, {of['learned']:.3f} learned from"
            for name, of in result["acceptance"].items()
        )
        print(
            f"{result['start']}: {result['parameters']:,} parameters, {steps} steps "
            f"({result['tokens_seen'] / 1e6:.1f}M tokens, {result['training_seconds']:.0f} s): {by_class}",
            flush=True,
        )
        write(options.output, found)


if __name__ == "__main__":
    main()
