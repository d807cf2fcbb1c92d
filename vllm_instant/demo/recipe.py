"""How the committed demo models were made: tokenizer, base model, distilled draft model.

Run ``vllm-instant demo train OUTPUT_DIR``. Seeds and hyper-parameters are fixed below; the result carries a
``recipe.json`` with the versions, the losses and the acceptance that were reached. Training can be stopped and
resumed: a checkpoint is kept beside the output.

The base model learns from text (warm-up, constant rate, linear decay; Muon for the matrices of the layers, AdamW for
the rest). The draft model learns from the base model's next-token distributions: forward KL divergence first, then the
total-variation distance, because the chance that rejection sampling accepts a draft token is one minus exactly that
distance (Leviathan et al. 2023, section 3.5).
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_instant.demo.corpus import Document, documents

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
BOS, EOS = "<s>", "</s>"
# One message after the other, no roles: the demo models continue text, they do not hold conversations.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Architecture:
    """The numbers of a Llama model that the recipe chooses."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    def config(self) -> LlamaConfig:
        """The Hugging Face configuration with the demo vocabulary and tied embeddings."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,
            **asdict(self),
        )


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


BASE = Architecture(256, 768, 6, 4, 2, 64)
DRAFT = Architecture(96, 224, 2, 3, 1, 32)
BASE_TRAINING = Training(seed=1, steps=1600, decay_steps=400, matrix_rate=0.02, other_rate=3e-3)
DRAFT_TRAINING = Training(seed=2, steps=700, decay_steps=350, matrix_rate=0.02, other_rate=4e-3)


def train_tokenizer(corpus: list[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the training documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in corpus if not d.held_out), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE, model_max_length=2048
    )


def encode(tokenizer: PreTrainedTokenizerFast, corpus: list[Document]) -> torch.Tensor:
    """All documents as one int64 token stream, each ended by EOS."""
    import torch

    ids: list[int] = []
    for document in corpus:
        ids.extend(tokenizer(document.text, add_special_tokens=False)["input_ids"])
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def learning_rate_factor(step: int, plan: Training) -> float:
    """Warm-up, constant, then linear decay to zero over the last ``decay_steps``."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    return min(1.0, (plan.steps - step) / plan.decay_steps)


Loss = Callable[["LlamaForCausalLM", "torch.Tensor", float], "torch.Tensor"]
"""(model, token ids ``[batch, context]``, progress 0..1) → scalar loss."""


def text_loss(model: LlamaForCausalLM, tokens: torch.Tensor, progress: float) -> torch.Tensor:
    """Next-token cross entropy in nats."""
    return model(input_ids=tokens, labels=tokens).loss


def distillation_loss(teacher: LlamaForCausalLM) -> Loss:
    """Forward KL divergence to the teacher, turning into total-variation distance in the second half."""
    import torch

    def loss(model: LlamaForCausalLM, tokens: torch.Tensor, progress: float) -> torch.Tensor:
        with torch.no_grad():
            target = teacher(input_ids=tokens).logits.float().log_softmax(-1)
        draft = model(input_ids=tokens).logits.float().log_softmax(-1)
        if progress < 0.5:
            return (target.exp() * (target - draft)).sum(-1).mean()
        return 0.5 * (target.exp() - draft.exp()).abs().sum(-1).mean()

    return loss


def train(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    plan: Training,
    loss_function: Loss,
    checkpoint: Path,
    report: Callable[[int, int, float], None],
) -> None:
    """Train in place, resuming from ``checkpoint`` when it is there; ``report(step, steps, loss)`` after each step."""
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [plan.matrix_rate, plan.other_rate]
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    model.train()
    for step in range(start, plan.steps):
        # The batch depends on the step alone, so that a resumed run sees the same data.
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        offsets = torch.randint(0, len(stream) - plan.context, (plan.batch,), generator=generator)
        tokens = torch.stack([stream[o : o + plan.context] for o in offsets])
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_function(model, tokens, step / plan.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(step, plan)
            optimizer.step()
            optimizer.zero_grad()
        report(step + 1, plan.steps, loss.item())
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            partial = checkpoint.with_suffix(".part")
            torch.save(
                {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1},
                partial,
            )
            partial.replace(checkpoint)
    model.eval()


def evaluate(
    base: LlamaForCausalLM, draft: LlamaForCausalLM, stream: torch.Tensor, context: int = 512
) -> dict[str, float]:
    """Held-out loss of the base (nats a token) and how well the draft matches it at the first draft position.

    ``acceptance`` is the expected acceptance at temperature 1 (overlap of the two distributions), ``agreement`` the
    share of positions where both would pick the same token greedily.
    """
    import torch

    losses, overlaps, agreements = [], [], []
    with torch.inference_mode():
        for start in range(0, len(stream) - context, context * 2):
            tokens = stream[start : start + context][None]
            output = base(input_ids=tokens, labels=tokens)
            target, proposal = output.logits.softmax(-1), draft(input_ids=tokens).logits.softmax(-1)
            losses.append(output.loss.item())
            overlaps.append(torch.minimum(target, proposal).sum(-1).mean().item())
            agreements.append((target.argmax(-1) == proposal.argmax(-1)).float().mean().item())
    count = len(losses)
    return {"loss": sum(losses) / count, "acceptance": sum(overlaps) / count, "agreement": sum(agreements) / count}


def run(output: Path, report: Callable[[str, int, int, float], None]) -> dict[str, Any]:
    """Make both models under ``output/base`` and ``output/draft``; returns what ``recipe.json`` then holds."""
    import torch
    import transformers

    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    corpus = list(documents())
    tokenizer = train_tokenizer(corpus)
    training = encode(tokenizer, [d for d in corpus if not d.held_out])
    held_out = encode(tokenizer, [d for d in corpus if d.held_out])
    started = time.monotonic()

    models: dict[str, LlamaForCausalLM] = {}
    for name, architecture, plan in (("base", BASE, BASE_TRAINING), ("draft", DRAFT, DRAFT_TRAINING)):
        torch.manual_seed(plan.seed)
        model = transformers.LlamaForCausalLM(architecture.config())
        loss = text_loss if name == "base" else distillation_loss(models["base"])
        train(
            model,
            training,
            plan,
            loss,
            work / f"{name}.pt",
            lambda step, steps, value, name=name: report(name, step, steps, value),  # type: ignore[misc]
        )
        models[name] = model
        model.to(torch.bfloat16).save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)
        model.float()

    card = {
        "base": asdict(BASE) | {"parameters": models["base"].num_parameters()},
        "draft": asdict(DRAFT) | {"parameters": models["draft"].num_parameters()},
        "base_training": asdict(BASE_TRAINING),
        "draft_training": asdict(DRAFT_TRAINING),
        "training_tokens": len(training),
        "held_out_tokens": len(held_out),
        "held_out": evaluate(models["base"], models["draft"], held_out),
        "seconds": round(time.monotonic() - started),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (output / "recipe.json").write_text(json.dumps(card, indent=2) + "\n")
    return card
