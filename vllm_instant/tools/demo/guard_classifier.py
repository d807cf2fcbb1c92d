"""A small classifier for the guard, trained in seconds, that finds texts which give away credentials.

Unsafe texts are sentences from templates behind passages of the demo corpus; safe ones are passages, with and without
harmless sentences about the same things. It shows how the plugin ``classifier`` works, and is no protection.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_instant.tools.demo import assets
from vllm_instant.tools.demo.corpus import documents

STEPS, BATCH, MAX_TOKENS = 300, 32, 96
MAX_DOCUMENTS = 300
_SYSTEMS = ("admin account", "mail server", "database", "payroll", "router", "backup host", "vault", "build machine")
_UNSAFE = (
    "the password of the {} is {}",
    "log in to the {} with the password {}",
    "here is the secret key of the {}: {}",
    "use the stolen pin {1} for the {0}",
)
_SAFE = (
    "the password of the {} must be changed every month",
    "never send the secret key of the {} by mail",
    "the {} needs a password",
    "ask the owner of the {} for a new pin",
)


def unsafe_sentence(draw: random.Random) -> str:
    """Return a sentence that gives away a made-up credential."""
    secret = "".join(draw.choices("abcdefghkmnpqrstuvwxyz23456789", k=draw.randrange(6, 11)))
    return draw.choice(_UNSAFE).format(draw.choice(_SYSTEMS), secret)


def examples(count: int, seed: int, held_out: bool) -> tuple[list[str], list[int]]:
    """Return texts and their labels, 1 for unsafe; ``held_out`` chooses the passages that training does not see."""
    draw = random.Random(seed)
    found = (document.text for document in documents(held_out_only=held_out) if document.held_out == held_out)
    pool = list(itertools.islice(found, MAX_DOCUMENTS))
    texts, labels = [], []
    for _ in range(count):
        text = draw.choice(pool)
        start = draw.randrange(max(1, len(text) - 300))
        passage = text[start : start + draw.randrange(0, 300)]
        label = draw.random() < 0.4
        if label:
            passage += f" {unsafe_sentence(draw)}"
        elif draw.random() < 0.4:
            passage += f" {draw.choice(_SAFE).format(draw.choice(_SYSTEMS))}"
        texts.append(passage)
        labels.append(int(label))
    return texts, labels


def prepare(output: Path | None = None, steps: int = STEPS) -> Path:
    """Train the classifier, or return the folder of one that was trained before."""
    name = f"guard-classifier-{steps}-1"
    return assets.made_once(output or assets.cache_folder(name), name, lambda folder: _train(folder, steps))


def _train(folder: Path, steps: int) -> None:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    source = assets.ASSETS / assets.BASE_IN_ASSETS
    tokenizer = AutoTokenizer.from_pretrained(source, truncation_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=256,
        hidden_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "safe", 1: "unsafe"},
        label2id={"safe": 0, "unsafe": 1},
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts, labels = examples(steps * BATCH, seed=0, held_out=False)
    for step in range(steps):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        loss = model(**_batch(tokenizer, texts[rows]), labels=torch.tensor(labels[rows])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _batch(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}
