"""Whether a folder holds a draft model that can be loaded, before a server spends a minute on finding out."""

from __future__ import annotations

import json
from pathlib import Path


def unsupported_reason(name: str) -> str | None:
    """What is wrong with a draft model that is named by its path; None if nothing is, or it is no path.

    Looks at ``config.json`` and at the headers of safetensors files, which say how long the files must be.
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


def _damage(weights: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy"):
            return None
    except (OSError, SafetensorError) as error:
        return f"{weights} is damaged: {error}"
