"""Trains a draft model that vLLM loads, from a target model and text, and reports its acceptance."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_instant.tools.distill.acceptance import Acceptance, measure
from vllm_instant.tools.distill.initialization import start_at_target
from vllm_instant.tools.distill.losses import FORWARD_KL, TOTAL_VARIATION, head_distance
from vllm_instant.tools.distill.teacher import TaughtWindows, Teacher
from vllm_instant.tools.distill.text import TokenClass
from vllm_instant.tools.distill.training import Loss, Training, train

OBJECTIVES = ("kl", "tv", "kl-tv")
"""Forward KL divergence, total variation, or the first and then, for the second half, the second."""

DEFAULT_TRAINING = Training(
    seed=2, steps=4500, decay_steps=2250, matrix_rate=0.02, other_rate=4e-3, batch=2, context=512
)
"""Small batches: a model of this size learns more from many small steps than from few large ones."""
TRAINING_OF_LAYERS = Training(
    seed=2, steps=1500, decay_steps=750, matrix_rate=0.01, other_rate=5e-4, batch=2, context=512
)
"""For a draft that starts with layers of its target: smaller changes, and fewer of them."""
WINDOWS = 4000
"""Different windows of text; a new model's default plan draws each about twice."""
REPORT = "distillation.json"
CHECKPOINT = "checkpoint"

Progress = Callable[[int, int, float], None]
"""(step, steps, loss)."""


@dataclass(frozen=True)
class Report:
    """The draft model's sizes, training and acceptance."""

    target: str
    target_parameters: int
    draft_parameters: int
    draft: dict[str, Any]
    """The draft's shape."""
    layers_of_target: int
    """Number of target layers that the draft was initialised with; 0 for a new model."""
    objective: str
    training: dict[str, Any]
    training_tokens: int
    seconds: float
    """Training time, summed over interrupted and resumed runs."""
    acceptance: list[Acceptance]
    versions: dict[str, str]

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def objective_at(objective: str, progress: float) -> str:
    """Which distance is trained at this progress (0..1)."""
    if objective == "kl-tv":
        return FORWARD_KL if progress < 0.5 else TOTAL_VARIATION
    return objective


def loss_of(windows: TaughtWindows, teacher: Teacher, plan: Training, objective: str) -> Loss:
    """The training loss of a draft model whose target is ``teacher``."""

    def loss(model: Any, step: int, progress: float) -> torch.Tensor:
        tokens, states = windows.batch(step, plan.batch)
        hidden = model.base_model(input_ids=tokens).last_hidden_state.flatten(0, 1)
        # Head and distance run in bfloat16 with float32 sums, also where there is no autocast.
        return head_distance(
            hidden.to(torch.bfloat16),
            model.get_output_embeddings().weight,
            states.flatten(0, 1),
            teacher.logits,
            objective_at(objective, progress),
        )

    return loss


def distill(
    target: Any,
    draft: Any,
    classes: Sequence[TokenClass],
    output: Path,
    *,
    plan: Training = DEFAULT_TRAINING,
    objective: str = "kl-tv",
    progress: Progress = lambda *_: None,
    device: str = "cpu",
) -> float:
    """Train ``draft`` in place towards ``target``, from the checkpoint under ``output`` if there is one.

    Args:
        target: Hugging Face model in evaluation mode.
        draft: Hugging Face model with the same vocabulary, float32: a new one, or one of ``initialization.layers_of``.
        classes: text to learn from; windows are drawn from all of it alike.
        output: folder for the checkpoint.
        plan: steps and rates.
        objective: one of ``OBJECTIVES``.
        progress: called after each step.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Seconds of training, those of earlier runs included.

    """
    clock = output / "seconds.json"
    before = float(json.loads(clock.read_text())) if clock.exists() else 0.0
    began = time.monotonic()
    stream = torch.cat([c.training for c in classes])
    start_at_target(draft, target)
    teacher = Teacher(target)
    windows = TaughtWindows(stream, teacher, WINDOWS, plan.context, plan.seed)

    def report(step: int, steps: int, loss: float) -> None:
        if step % 50 == 0 or step == steps:
            clock.write_text(json.dumps(before + time.monotonic() - began))
        progress(step, steps, loss)

    train(draft, plan, loss_of(windows, teacher, plan, objective), output / CHECKPOINT, report, device)
    return float(json.loads(clock.read_text()))


def judge(target: Any, draft: Any, classes: Sequence[TokenClass], positions: int = 8) -> list[Acceptance]:
    """Acceptance on the held-out text of each class, greedy and at temperature 1."""
    return [
        measure(target, draft, c.held_out, c.name, temperature, positions)
        for c in classes
        if len(c.held_out) > 2 * positions
        for temperature in (0.0, 1.0)
    ]
