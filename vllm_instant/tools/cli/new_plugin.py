"""``vllm-instant new-plugin``: the files of a plugin that works, to be changed into one's own."""

from __future__ import annotations

import importlib.util
import keyword
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import jinja2
import typer

from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.tools.cli.common import fail


class Kind(StrEnum):
    """The slots for which there is a template."""

    DRAFTER = "drafter"
    SPECULATION = "speculation"
    REJECTION_SAMPLER = "rejection_sampler"


@dataclass(frozen=True)
class _Template:
    title: str
    suffix: str
    """How the names of its classes end."""
    next_step: str
    """The command that tries an installed plugin, with its ``{name}`` or the option that chooses it, ``{set}``."""


TEMPLATES = {
    Kind.DRAFTER: _Template("A drafter", "drafter", "vllm-instant try-drafter {name} --text FILE"),
    Kind.SPECULATION: _Template("A speculation policy", "policy", "vllm serve MODEL --plugins vllm_instant {set}"),
    Kind.REJECTION_SAMPLER: _Template("A rejection sampler", "sampler", "vllm-instant verify MODEL {set}"),
}


def new_plugin(
    kind: Annotated[Kind, typer.Argument(help="Slot that the plugin fills.")],
    name: Annotated[
        str, typer.Argument(help="Name of the plugin and of its module: lower-case letters, digits and underscores.")
    ],
    output: Annotated[Path | None, typer.Option(help="New folder for the files; NAME by default.")] = None,
) -> None:
    """Write a plugin that works: a module, its pyproject.toml and a test, in a folder of their own."""
    if not (name.isidentifier() and name.isascii() and name == name.lower()) or keyword.iskeyword(name):
        fail(f"NAME {name} should be lower-case letters, digits and underscores, and begin with a letter")
    if importlib.util.find_spec(name) is not None:
        fail(f"NAME {name} is the name of a module that is installed already")
    if plugin_manager().find(kind, name):
        fail(f"a {kind} with the name {name} is installed already; see vllm-instant plugins")
    folder = output or Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} exists already; give a new folder with --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files(kind, name).items():
            (folder / file).write_text(text, encoding="utf-8")
            print(f"wrote {folder / file}")
    except OSError as error:
        fail(f"{folder} cannot be written: {error.strerror}")
    step = TEMPLATES[kind].next_step.format(name=name, set=f"--instant-set {kind}.plugin={name}")
    print(f"Next:\n  pip install -e '{folder}[test]'\n  pytest {folder}\n  {step}")


def files(kind: Kind, name: str) -> dict[str, str]:
    """The text of each file of a new plugin, by file name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vllm_instant.tools.cli"),
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  Python and TOML, with a name that was checked
    )
    stem = name.removesuffix(TEMPLATES[kind].suffix).strip("_") or name
    values = {
        "name": name,
        "distribution": name.replace("_", "-").strip("-"),
        "cls": "".join(part.capitalize() for part in stem.split("_")),
        "kind": TEMPLATES[kind],
    }
    templates = {
        "pyproject.toml": "pyproject.toml.jinja",
        f"{name}.py": f"{kind}.py.jinja",
        f"test_{name}.py": f"test_{kind}.py.jinja",
    }
    return {file: environment.get_template(template).render(values) for file, template in templates.items()}
