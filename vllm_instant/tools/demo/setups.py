"""The two forms of the demo: a public chat model, and the repository's own small pair of models."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_instant.tools.demo import assets, real_model
from vllm_instant.tools.measure.servers import words_of

DEPLOYMENT = Path(__file__).parent / "deploy.toml"
REAL_DEPLOYMENT = Path(__file__).parent / "smollm2.toml"


@dataclass(frozen=True)
class Task:
    """One kind of prompt."""

    title: str
    prompt: str
    temperature: float
    shown: str = ""
    """What is printed of the prompt; all of it by default."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters of the request."""


@dataclass(frozen=True)
class DemoSetup:
    """A model, its deployment file, and the prompts that are sent to it."""

    name: str
    model: Path
    deployment: Path
    tasks: Sequence[Task]
    about: str
    """One sentence about the model, printed below the table."""
    overrides: Sequence[str] = ()
    dtype: str = ""
    """Number format of both servers; the model's own by default."""

    def baseline_arguments(self) -> list[str]:
        """The ``[vllm]`` table of the deployment file, for the baseline server, which does not read such files."""
        return [*words_of(tomllib.loads(self.deployment.read_text())["vllm"]), *self._dtype_words()]

    def our_arguments(self) -> list[str]:
        """The command-line words that select the deployment."""
        selection = ["--plugins", "vllm_instant", "--instant-config", str(self.deployment)]
        overrides = [word for override in self.overrides for word in ("--instant-set", override)]
        return [*selection, *overrides, *self._dtype_words()]

    def _dtype_words(self) -> list[str]:
        return ["--dtype", self.dtype] if self.dtype else []


def _chat(title: str, text: str, temperature: float = 0.0, **parameters: Any) -> Task:
    return Task(title, real_model.chat(text), temperature, f"{text}\n\n", parameters)


FUNCTION = '''def add_item(self, name, price, quantity=1):
    """Add an item to the basket and return the new total."""
    if price < 0:
        raise ValueError(f"the price of {name} is negative")
    item = Item(name, price, quantity)
    self.items.append(item)
    self.total += price * quantity
    self.log.info("added %s", name)
    return self.total
'''

MAIL = (
    "Hi team, the budget review moves to Tuesday 3 March at 14:00 in room 12. Ana Silva leads it, and Bo Lindqvist "
    "will present the figures. Please send yours to Ana by Friday."
)

FACTS = {
    "type": "object",
    "properties": {
        "what": {"type": "string", "maxLength": 60},
        "when": {"type": "string", "maxLength": 60},
        "where": {"type": "string", "maxLength": 60},
        "who": {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 1, "maxItems": 4},
    },
    "required": ["what", "when", "where", "who"],
    "additionalProperties": False,
}

REAL_TASKS = (
    # A model of this size repeats a function well, and edits hardly any.
    _chat("repeat this function", f"Repeat this Python function exactly:\n```python\n{FUNCTION}```"),
    _chat(
        "extract the facts as JSON",
        f"Extract the facts as a JSON object with keys what, when, where, who: {MAIL}",
        response_format={"type": "json_schema", "json_schema": {"name": "facts", "schema": FACTS}},
    ),
    _chat("tell a story", "Write a short story about a lighthouse keeper who finds a robot on the beach.", 0.8),
)

CODE = '''class LRUCache:
    """A mapping that keeps the most recently used items."""

    def __init__(self, maxsize=128):
        self.maxsize = maxsize
        self._data = {}

    def __len__(self):
        return len(self._data)

    def __contains__(self, key):
        return key in self._data

    def get(self, key, default=None):
'''

STRUCTURED = """\
{"module": "queue", "kind": "class", "name": "Queue", "line": 12, "bases": ["object"], "doc": "Create a queue."}
{"module": "queue", "kind": "function", "name": "put", "line": 24, "args": ["self", "item"], "doc": "Put an item."}
{"module": "queue", "kind": "function", "name": "get", "line": 36, "args": ["self"], "doc": "Get an item."}
{"module": "queue", "kind": "function", "name": "empty", "line": 48, "args": ["self"], "doc": "Return true if empty."}
"""

PROSE = '''"""Working with files and folders.

This module explains how a program finds its files, what happens when a file is missing, and why it is'''

EMBEDDED_TASKS = tuple(
    Task(title, prompt, temperature, parameters={"ignore_eos": True})
    for title, prompt, temperature in (
        ("code continuation", CODE, 0.0),
        ("structured text", STRUCTURED, 0.0),
        ("free text", PROSE, 1.0),
    )
)


def real() -> DemoSetup:
    """SmolLM2-135M-Instruct; raises FileNotFoundError where its package is not installed."""
    return DemoSetup(
        real_model.NAME,
        real_model.prepare(),
        REAL_DEPLOYMENT,
        REAL_TASKS,
        f"The model is {real_model.NAME}, with 135 million parameters; drafts are lookups in prompt and answers.",
    )


def embedded() -> DemoSetup:
    """The repository's own pair of models; raises FileNotFoundError outside a clone."""
    pair = assets.prepare()
    return DemoSetup(
        "the embedded pair",
        pair.target,
        DEPLOYMENT,
        EMBEDDED_TASKS,
        "The target is a small trained model expanded to 105 million parameters without changing its distribution "
        "(docs/demo-models.md).",
        [f"drafter.model={pair.draft}"],
    )


def chosen(is_embedded: bool, dtype: str = "") -> tuple[DemoSetup, str]:
    """The setup, and a sentence for the user where the embedded models stand in for the public one.

    Args:
        is_embedded: use the repository's own pair.
        dtype: number format of both servers, as vLLM's ``--dtype``.

    """
    if is_embedded:
        return replace(embedded(), dtype=dtype), ""
    try:
        return replace(real(), dtype=dtype), ""
    except FileNotFoundError as error:
        return replace(embedded(), dtype=dtype), f"{error}. This is the demo with its embedded models."
