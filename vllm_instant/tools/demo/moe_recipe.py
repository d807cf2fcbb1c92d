"""How the committed mixture of experts was made from the demo's base model.

Run ``vllm-instant demo train-moe OUTPUT_DIR``: upcycling, then distillation from the dense model with a load-balancing
loss. Seeds and hyper-parameters are fixed below; an interrupted run resumes. The result carries a ``recipe.json``
with what was reached, measured on the weights as they are stored.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_instant.tools.demo import moe_assets, moe_training, upcycling
from vllm_instant.tools.demo.assets import ASSETS, BASE_IN_ASSETS
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.demo.recipe import classes
from vllm_instant.tools.distill.teacher import TaughtWindows, Teacher
from vllm_instant.tools.distill.text import TokenClass, tokenized
from vllm_instant.tools.distill.training import Training, train
from vllm_instant.tools.moe.batched_experts_cpu import use_batched_experts

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MixtralForCausalLM

EXPERTS = upcycling.Experts(count=64, chosen=8, size=32)
TRAINING = Training(seed=3, steps=1000, decay_steps=500, matrix_rate=0.01, other_rate=2e-3, batch=2, context=512)
WINDOWS = 4000
RECORDED_WINDOWS, RECORDED_CONTEXT, RECORDED_SEED = 32, 256, 5


def run(output: Path, report: Callable[[str, int, int, float], None], assets: Path = ASSETS) -> dict[str, Any]:
    """Make the model under ``output/moe``; returns what its ``recipe.json`` then holds."""
    import transformers

    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / BASE_IN_ASSETS)
    tokens = tokenized(tokenizer, classes(list(documents())), TRAINING.context)
    stream = torch.cat([c.training for c in tokens])
    dense = transformers.LlamaForCausalLM.from_pretrained(assets / BASE_IN_ASSETS, dtype=torch.float32).eval()
    model = upcycling.upcycle(dense, recorded_windows(stream), EXPERTS)

    clock = work / "seconds.json"
    before = float(json.loads(clock.read_text())) if clock.exists() else 0.0
    began = time.monotonic()

    def progress(step: int, steps: int, loss: float) -> None:
        if step % 50 == 0 or step == steps:
            clock.write_text(json.dumps(before + time.monotonic() - began))
        report("mixture of experts", step, steps, loss)

    teacher = Teacher(dense.to(torch.bfloat16))
    windows = TaughtWindows(stream, teacher, WINDOWS, TRAINING.context, TRAINING.seed)
    use_batched_experts(model)
    train(model, TRAINING, moe_training.loss_of(windows, teacher, TRAINING), work / "moe", progress)
    return store_with_card(
        output / moe_assets.MOE_IN_ASSETS, model, dense, tokens, round(json.loads(clock.read_text()))
    )


def recorded_windows(stream: torch.Tensor) -> torch.Tensor:
    """The windows of text on which the dense model's activations are recorded."""
    generator = torch.Generator().manual_seed(RECORDED_SEED)
    places = torch.randint(0, len(stream) - RECORDED_CONTEXT, (RECORDED_WINDOWS,), generator=generator)
    return torch.stack([stream[place : place + RECORDED_CONTEXT] for place in places])


def store_with_card(
    folder: Path, model: MixtralForCausalLM, dense: LlamaForCausalLM, tokens: list[TokenClass], seconds: int
) -> dict[str, Any]:
    """Store the model and write beside it what the stored one reaches on held-out text."""
    import transformers

    moe_assets.store(model, folder)
    stored = moe_assets.load(folder)
    use_batched_experts(stored)
    card = {
        "experts": asdict(EXPERTS) | {"parameters": stored.num_parameters()},
        "training": asdict(TRAINING),
        "held_out": {c.name: evaluate(stored, dense.float(), c.held_out) for c in tokens},
        "seconds": seconds,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (folder / "recipe.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def evaluate(
    model: MixtralForCausalLM, dense: LlamaForCausalLM, stream: torch.Tensor, context: int = 512
) -> dict[str, float]:
    """On held-out text: both losses in nats per token, and the KL divergence from the dense model to ours."""
    sums: dict[str, list[float]] = {"loss": [], "dense_loss": [], "kl": []}
    with torch.inference_mode():
        for start in range(0, len(stream) - context, context * 2):
            tokens = stream[start : start + context][None]
            own, other = model(input_ids=tokens, labels=tokens), dense(input_ids=tokens, labels=tokens)
            p, q = other.logits.log_softmax(-1), own.logits.log_softmax(-1)
            sums["loss"].append(own.loss.item())
            sums["dense_loss"].append(other.loss.item())
            sums["kl"].append((p.exp() * (p - q)).sum(-1).mean().item())
    return {name: round(sum(values) / len(values), 4) for name, values in sums.items()}
