"""Links in Markdown files lead to files and headings that exist, and every page is in the site's navigation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def markdown_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def anchors(path: Path) -> set[str]:
    """The anchors that forges and the site make of a page's headings."""
    headings = HEADING.findall(CODE.sub("", path.read_text()))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in plain}


@pytest.mark.parametrize("name", markdown_files())
def test_links_lead_somewhere(name):
    broken = []
    for link in LINK.findall(CODE.sub("", (ROOT / name).read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_navigation():
    # The file has no tags of MkDocs' own, which a safe loader would refuse.
    found = set(re.findall(r"[\w/.-]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    assert found == {name.removeprefix("docs/") for name in markdown_files() if name.startswith("docs/")}


def test_the_map_of_folders_names_every_part():
    named = set(re.findall(r"^\| `([\w/]+)/`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert all((ROOT / folder).is_dir() for folder in named)
    packages = {
        path.parent
        for path in [*ROOT.glob("vllm_instant/*/__init__.py"), *ROOT.glob("vllm_instant/tools/*/__init__.py")]
    }
    assert {path.relative_to(ROOT).as_posix() for path in packages} - {"vllm_instant/tools"} <= named
