"""The demo models' training text: the standard library that every Python installation contains.

Two kinds of documents, both from the running interpreter's standard library, none downloaded:

- *code*: source files (without the test suites and the largest tables), whole;
- *structured*: one JSON object per line, describing the functions and classes of a module.

The text depends on the Python version; the committed demo models were trained with the version that
their ``recipe.json`` names.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 24
"""One document in this many is never trained on; it serves evaluation, prompts and distillation reports."""

_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_MAX_SOURCE_BYTES = 400_000


@dataclass(frozen=True)
class Document:
    """One piece of text. ``kind`` is ``code`` or ``structured``; ``name`` is unique within a kind."""

    kind: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document is kept away from training (decided by its name alone)."""
        return _held_out(self.kind, self.name)


def _held_out(kind: str, name: str) -> bool:
    digest = hashlib.sha256(f"{kind}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def documents(held_out_only: bool = False) -> Iterator[Document]:
    """Every document of the corpus (or only the held-out ones), in an order that depends on names alone.

    Describing a module means parsing it: with ``held_out_only`` the others are skipped.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or path.stat().st_size > _MAX_SOURCE_BYTES:
            continue
        wanted = [kind for kind in ("code", "structured") if not held_out_only or _held_out(kind, relative.as_posix())]
        text = path.read_text(encoding="utf-8", errors="ignore") if wanted else ""
        if "code" in wanted:
            yield Document("code", relative.as_posix(), text)
        if "structured" not in wanted:
            continue
        records = _describe(text, relative.as_posix().removesuffix(".py").replace("/", "."))
        if records:
            yield Document("structured", relative.as_posix(), records)


def _describe(source: str, module: str) -> str:
    """One JSON line for each function and class of a module; empty when it cannot be parsed or has none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            record = {"module": module, "kind": "function", "name": node.name, "line": node.lineno, "args": arguments}
        elif isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            record = {"module": module, "kind": "class", "name": node.name, "line": node.lineno, "bases": bases}
        else:
            continue
        summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
        lines.append(json.dumps(record | {"doc": summary}))
    return "\n".join(lines) + "\n" if lines else ""
