"""MkDocs hooks: a link to a file outside of ``docs/`` becomes the path of that file, which the site lacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTWARD = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links that leave the documentation; a target that does not exist fails the build."""
    folder = ROOT / "docs" / Path(page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        text, up, path = match.groups()
        target = (folder / up / path).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        if not target.exists():
            raise ValueError(f"{page.file.src_uri} links to {up}{path}, which does not exist")
        inside = target.relative_to(ROOT).as_posix()
        return f"{text} (`{inside}`)" if text.strip("`") not in inside else f"`{inside}`"

    return OUTWARD.sub(replaced, markdown)
