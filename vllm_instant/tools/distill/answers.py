"""A target's own answers to prompts, as the training text of a draft model.

A draft model accepts most where it was trained: on what the target writes after the prompts that it will serve
(DistillSpec, Zhou et al. 2024, section 3.2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_instant.tools.distill.text import TextClass, TextError


@dataclass(frozen=True)
class ChatPrompt:
    """One prompt, as the target reads it: its chat template is part of the text."""

    text: str
    kind: str = "prompts"
    temperature: float = 1.0


def read_prompts(path: Path) -> list[ChatPrompt]:
    """Read JSON lines with ``prompt`` and, if wanted, ``class`` and ``temperature``, as ``vllm-instant bench`` does.

    Raises:
        TextError: when the file is missing, a line has no prompt, or there is no line.

    """
    if not path.is_file():
        raise TextError(f"{path} does not exist")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt = ChatPrompt(
                str(entry["prompt"]), str(entry.get("class", "prompts")), float(entry.get("temperature", 1.0))
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TextError(f"{path}, line {number}: not a JSON object with a prompt") from None
        prompts.append(prompt)
    if not prompts:
        raise TextError(f"{path} holds no prompts")
    return prompts


def answered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[ChatPrompt],
    length: int,
    report: Callable[[int, int], None] = lambda done, count: None,
    batch: int = 32,
) -> list[TextClass]:
    """Prompts with the target's answers, one document each, by class.

    Args:
        model: the target, a Hugging Face model that generates.
        tokenizer: its tokenizer.
        prompts: what to answer, each at its own temperature; 0 is greedy.
        length: most tokens of an answer.
        report: called with (done, count).
        batch: answers that are written side by side.

    """
    classes: dict[str, TextClass] = {}
    done = 0
    for group in _groups(tokenizer, prompts, batch):
        for prompt, text in zip(group, _written(model, tokenizer, group, length), strict=True):
            found = classes.setdefault(prompt.kind, TextClass(prompt.kind))
            found.add(prompt.text, text)
        done += len(group)
        report(done, len(prompts))
    return list(classes.values())


def answered_once(path: Path, answer: Callable[[], list[TextClass]], prompts: Sequence[ChatPrompt]) -> list[TextClass]:
    """What ``answer`` returns, from a file of an earlier call for the same prompts where there is one."""
    asked = hashlib.sha256(repr(prompts).encode()).hexdigest()
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["prompts"] == asked:
            return [TextClass(**found) for found in kept["classes"]]
    classes = answer()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompts": asked, "classes": [vars(found) for found in classes]}), encoding="utf-8")
    return classes


def _groups(tokenizer: Any, prompts: Sequence[ChatPrompt], batch: int) -> Iterator[list[ChatPrompt]]:
    """Prompts of one temperature and similar length, so that little of a batch is padding."""
    sized = {prompt: len(_encode(tokenizer, prompt.text)) for prompt in prompts}
    for temperature in sorted({prompt.temperature for prompt in prompts}):
        same = sorted((p for p in prompts if p.temperature == temperature), key=sized.__getitem__)
        for start in range(0, len(same), batch):
            yield same[start : start + batch]


def _written(model: Any, tokenizer: Any, group: Sequence[ChatPrompt], length: int) -> Iterable[str]:
    rows = [_encode(tokenizer, prompt.text) for prompt in group]
    width = max(map(len, rows))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # On the left: an answer begins directly behind its prompt.
    tokens = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    temperature = group[0].temperature
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with torch.inference_mode():
        written = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=length,
            pad_token_id=padding,
            **(sampling or {"do_sample": False}),
        )
    ends = tokenizer.eos_token_id
    for row, made in zip(rows, written[:, width:].tolist(), strict=True):
        # What follows the first end is padding; the end itself is added with each document.
        answer = made[: made.index(ends)] if ends in made else made
        yield tokenizer.decode([*row, *answer], skip_special_tokens=False)


def _encode(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found
