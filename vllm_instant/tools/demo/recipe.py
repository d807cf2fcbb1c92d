"""How the committed demo models were made: tokenizer, base model, distilled draft model.

Run ``vllm-instant demo train OUTPUT_DIR``. Seeds and hyper-parameters are fixed below; the result carries a
``recipe.json`` with the versions, the losses and the acceptance that were reached. Training can be stopped and
resumed: a checkpoint is kept beside the output.

The base model learns from text. The draft model is made from it as ``vllm-instant distill`` makes one for any target.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_instant.tools.demo.corpus import Document, documents
from vllm_instant.tools.distill import distill
from vllm_instant.tools.distill.text import TextClass, TokenClass, tokenized
from vllm_instant.tools.distill.training import Loss, Training, train

if TYPE_CHECKING:
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


def classes(corpus: list[Document]) -> list[TextClass]:
    """The corpus by kind."""
    found: dict[str, TextClass] = {}
    for document in corpus:
        text = found.setdefault(document.kind, TextClass(document.kind))
        text.add(document.name, document.text, document.held_out)
    return list(found.values())


def text_loss(stream: torch.Tensor, plan: Training) -> Loss:
    """Next-token cross entropy in nats."""

    def loss(model: Any, step: int, progress: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        offsets = torch.randint(0, len(stream) - plan.context, (plan.batch,), generator=generator)
        tokens = torch.stack([stream[o : o + plan.context] for o in offsets])
        value: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        return value

    return loss


def evaluate(
    base: LlamaForCausalLM, draft: LlamaForCausalLM, stream: torch.Tensor, context: int = 512
) -> dict[str, float]:
    """Held-out loss of the base (nats per token) and how well the draft matches it at the first draft position.

    ``acceptance`` is the expected acceptance at temperature 1 (overlap of the two distributions), ``agreement`` the
    share of positions where both would pick the same token greedily.
    """
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
    import transformers

    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    corpus = list(documents())
    tokenizer = train_tokenizer(corpus)
    tokens = tokenized(tokenizer, classes(corpus), BASE_TRAINING.context)
    training = torch.cat([c.training for c in tokens])
    started = time.monotonic()

    torch.manual_seed(BASE_TRAINING.seed)
    base = transformers.LlamaForCausalLM(BASE.config())
    train(
        base,
        BASE_TRAINING,
        text_loss(training, BASE_TRAINING),
        work / "base",
        lambda step, steps, loss: report("base", step, steps, loss),
    )
    base.to(torch.bfloat16).save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    seconds = {"base": round(time.monotonic() - started)}
    return draft_and_card(output, base, tokenizer, tokens, seconds, report)


def draft_and_card(
    output: Path,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokens: list[TokenClass],
    seconds: dict[str, int],
    report: Callable[[str, int, int, float], None],
) -> dict[str, Any]:
    """Distil the draft model from a base in bfloat16, and write the card of both."""
    import transformers

    torch.manual_seed(DRAFT_TRAINING.seed)
    draft = transformers.LlamaForCausalLM(DRAFT.config())
    taken = distill.distill(
        base.eval(),
        draft,
        tokens,
        output / "work",
        plan=DRAFT_TRAINING,
        progress=lambda step, steps, loss: report("draft", step, steps, loss),
    )
    draft.to(torch.bfloat16).save_pretrained(output / "draft")
    tokenizer.save_pretrained(output / "draft")
    acceptance = [found.plain() for found in distill.judge(base, draft, tokens)]
    held_out = torch.cat([c.held_out for c in tokens])
    card = {
        "base": asdict(BASE) | {"parameters": base.num_parameters()},
        "draft": asdict(DRAFT) | {"parameters": draft.num_parameters()},
        "base_training": asdict(BASE_TRAINING),
        "draft_training": asdict(DRAFT_TRAINING),
        "training_tokens": sum(len(c.training) for c in tokens),
        "held_out_tokens": len(held_out),
        "held_out": evaluate(base.float(), draft.float(), held_out),
        "acceptance": acceptance,
        "seconds": seconds | {"draft": round(taken)},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (output / "recipe.json").write_text(json.dumps(card, indent=2) + "\n")
    return card
