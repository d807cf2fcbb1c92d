"""Checks whether a folder holds a draft model that can be loaded, before a server starts to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def unsupported_reason(name: str) -> str | None:
    """Why a draft model that is named by its path cannot be loaded; None if it can, or where the name is no path.

    Checks ``config.json`` and the headers of safetensors files, which state the length of the files.
    """
    path = Path(name).expanduser()
    if not (name.startswith(("/", "./", "../", "~")) or path.is_dir()):
        return None  # a name on the hub
    config = path / "config.json"
    if not config.is_file():
        return f"{name!r} is not a folder with a config.json"
    try:
        json.loads(config.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return f"{config} cannot be read: {error}"
    return next(filter(None, map(_damage, sorted(path.glob("*.safetensors")))), None)


def validate_option(name: str) -> Iterable[str]:
    """The problem with the option ``model`` of a drafter, if there is one."""
    reason = unsupported_reason(name)
    if reason is not None:
        yield f"[drafter] model = {reason}"


def _damage(weights: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy"):
            return None
    except (OSError, SafetensorError) as error:
        return f"{weights} is damaged: {error}"
