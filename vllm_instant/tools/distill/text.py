"""What a draft model learns from: text of several classes, part of it held out.

Text comes from files or from the target itself. Every class keeps some documents back, which no training step sees;
the report measures acceptance on these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HELD_OUT_ONE_IN = 24
PIECE_CHARACTERS = 4000
"""Files are cut into pieces of about this length, so that a single large file can be held out in part."""
SUFFIXES = {".txt", ".md", ".py", ".json", ".jsonl", ".csv", ".html", ".xml", ".yaml", ".toml", ".c", ".js", ".ts"}
_FIELDS = ("text", "content", "prompt", "completion", "response", "output")


class TextError(ValueError):
    """Text that cannot be used, in one sentence."""


@dataclass
class TextClass:
    """The documents of one class (code, chat, …)."""

    name: str
    training: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    def add(self, name: str, text: str, held_out: bool | None = None) -> None:
        """Add a document; whether it is held out depends on its name alone, unless said."""
        if held_out is None:
            digest = hashlib.sha256(f"{self.name}/{name}".encode()).digest()
            held_out = int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0
        (self.held_out if held_out else self.training).append(text)


@dataclass
class TokenClass:
    """The tokens of one class: int64 streams, documents ended by EOS."""

    name: str
    training: torch.Tensor
    held_out: torch.Tensor


def read(sources: Sequence[str], held_out: Sequence[str] = ()) -> list[TextClass]:
    """Read ``PATH`` or ``CLASS=PATH`` sources: text files, JSON lines, or folders of these.

    Args:
        sources: what is learned from; a class that ``held_out`` does not name keeps one document in 24 back.
        held_out: sources that are only measured on.

    Raises:
        TextError: when a path is missing, or nothing readable is under it.

    """
    classes: dict[str, TextClass] = {}
    kept = {_split(source)[0] for source in held_out}
    for source, only_measured in [*((s, False) for s in sources), *((s, True) for s in held_out)]:
        name, rest = _split(source)
        path = Path(rest).expanduser()
        if not path.exists():
            raise TextError(f"{path} does not exist")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        texts = classes.setdefault(name, TextClass(name))
        before = len(texts.training) + len(texts.held_out)
        for file in files:
            for number, piece in enumerate(_pieces(_documents(file))):
                texts.add(f"{file.name}/{number}", piece, only_measured or (False if name in kept else None))
        if len(texts.training) + len(texts.held_out) == before:
            raise TextError(f"{path}: no text found (files that end in {', '.join(sorted(SUFFIXES))})")
    return list(classes.values())


def _split(source: str) -> tuple[str, str]:
    """The class and the path of ``CLASS=PATH``; a path alone is a class of its own."""
    name, _, path = source.rpartition("=")
    return name or Path(path).stem, path


def _documents(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8", errors="ignore")
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(f"{file}, line {number}: not JSON ({error.msg})") from None
        found = "\n".join(str(entry[key]) for key in _FIELDS if entry.get(key)) if isinstance(entry, dict) else ""
        yield found or line


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        start = 0
        while start < len(document):
            cut = document.find("\n", start + PIECE_CHARACTERS)
            end = len(document) if cut < 0 else cut + 1
            if document[start:end].strip():
                yield document[start:end]
            start = end


def encode(tokenizer: Any, documents: Iterable[str]) -> torch.Tensor:
    """All documents as one int64 token stream, each ended by EOS where the tokenizer has one."""
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


def tokenized(tokenizer: Any, classes: Sequence[TextClass], context: int) -> list[TokenClass]:
    """The token streams of all classes.

    Raises:
        TextError: when there is less than a few windows of ``context`` tokens to learn from, or to measure on.

    """
    found = [TokenClass(c.name, encode(tokenizer, c.training), encode(tokenizer, c.held_out)) for c in classes]
    for tokens in found:
        if not len(tokens.held_out):  # little text: the end of it
            cut = len(tokens.training) * (HELD_OUT_ONE_IN - 1) // HELD_OUT_ONE_IN
            tokens.training, tokens.held_out = tokens.training[:cut], tokens.training[cut:]
    total = sum(len(tokens.training) for tokens in found)
    if total < 8 * context:
        raise TextError(f"{total} tokens of text are too few: at least {8 * context} are needed, millions are better")
    return found


def generated(
    model: Any,
    tokenizer: Any,
    classes: Sequence[TextClass],
    count: int,
    length: int,
    report: Callable[[int, int], None],
    batch: int = 16,
    prompt_tokens: int = 32,
) -> TextClass:
    """Texts that the target writes itself, at temperature 1.

    Args:
        model: the target.
        tokenizer: its tokenizer.
        classes: texts whose beginnings are continued; without any the target starts from nothing.
        count: how many texts.
        length: tokens of each.
        report: called with (done, count).
        batch: texts that are written side by side.
        prompt_tokens: tokens of a beginning.

    """
    beginnings = [document for c in classes for document in c.training]
    texts = TextClass("generated")
    torch.manual_seed(0)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for done in range(0, count, batch):
        prompts = []
        for number in range(done, min(done + batch, count)):
            text = beginnings[number * 7919 % len(beginnings)] if beginnings else ""
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"][:prompt_tokens] or [start])
        shortest = min(map(len, prompts))
        tokens = torch.tensor([prompt[:shortest] for prompt in prompts], device=model.device)
        with torch.inference_mode():
            written = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=length,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start,
            )
        for number, row in enumerate(written):
            texts.add(str(done + number), tokenizer.decode(row, skip_special_tokens=True))
        report(min(done + batch, count), count)
    return texts
