"""One training loop for the project's small models, on the CPU or a GPU, that can be stopped and resumed.

Devices, precision and gradient scaling are Accelerate's. The matrices of the layers are trained with Muon
(Jordan et al. 2024), everything else with AdamW. What a step sees depends on its number alone, so that a resumed run
continues exactly as an uninterrupted one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_EVERY = 100
_STEP_FILE = "step.json"


@dataclass(frozen=True)
class Training:
    """How long and how fast one model is trained. ``batch`` sequences of ``context`` tokens make a step."""

    seed: int
    steps: int
    decay_steps: int
    matrix_rate: float
    other_rate: float
    batch: int = 16
    context: int = 512
    warmup_steps: int = 40


Loss = Callable[[Any, int, float], torch.Tensor]
"""(model, step, progress 0..1) → scalar loss."""


def overridden(plan: Training, steps: int | None, batch: int | None, context: int | None) -> Training:
    """The plan with other numbers where they are given; the decay keeps its share of the steps."""
    count = steps or plan.steps
    return replace(
        plan,
        steps=count,
        decay_steps=max(1, count * plan.decay_steps // plan.steps),
        batch=batch or plan.batch,
        context=context or plan.context,
    )


def learning_rate_factor(step: int, plan: Training) -> float:
    """Warm-up, constant, then linear decay to zero over the last ``decay_steps``."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    return min(1.0, (plan.steps - step) / plan.decay_steps)


def train(
    model: Any,
    plan: Training,
    loss: Loss,
    checkpoint: Path,
    report: Callable[[int, int, float], None],
    device: str = "cpu",
) -> None:
    """Train in place.

    Args:
        model: a Hugging Face causal language model in float32; its ``base_model`` and output matrix are trained.
        plan: steps and rates.
        loss: the minimised function.
        checkpoint: folder of the newest state; a run that finds one resumes there.
        report: called with (step, steps, loss) after each step.
        device: ``"cpu"`` or ``"cuda"``.

    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
    model.to(accelerator.device).train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        accelerator.prepare(torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01)),
        accelerator.prepare(torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0)),
    ]
    rates = [plan.matrix_rate, plan.other_rate]
    for step in range(_resume(checkpoint, model, optimizers), plan.steps):
        with accelerator.autocast():
            value = loss(model, step, step / plan.steps)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(step, plan)
            optimizer.step()
            optimizer.zero_grad()
        report(step + 1, plan.steps, value.item())
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == plan.steps:
            _save(checkpoint, model, optimizers, step + 1)
    model.eval()


def _save(checkpoint: Path, model: Any, optimizers: list[Any], step: int) -> None:
    """Write beside the old state and swap, so that a run that is killed here loses nothing."""
    partial, old = checkpoint.with_suffix(".part"), checkpoint.with_suffix(".old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, partial / "state.pt")
    (partial / _STEP_FILE).write_text(json.dumps({"step": step}))
    if checkpoint.exists():
        checkpoint.rename(old)
    partial.rename(checkpoint)
    shutil.rmtree(old, ignore_errors=True)


def _resume(checkpoint: Path, model: Any, optimizers: list[Any]) -> int:
    """Load the newest state; returns the step to go on with."""
    old = checkpoint.with_suffix(".old")
    if not checkpoint.exists() and old.exists():
        old.rename(checkpoint)
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(json.loads((checkpoint / _STEP_FILE).read_text())["step"])
