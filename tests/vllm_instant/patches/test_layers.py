"""What the modules of ``patches`` import: no circles, and nothing heavy where the command line needs them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import vllm_instant.patches

FOLDER = Path(vllm_instant.patches.__file__).parent
PACKAGE = "vllm_instant.patches"


def _imports() -> dict[str, set[str]]:
    """By module, the modules of the package that it imports, at the top or inside functions; types aside."""
    names = {
        ".".join((PACKAGE, *path.relative_to(FOLDER).with_suffix("").parts)): path
        for path in FOLDER.rglob("*.py")
        if path.stem != "__init__"
    }
    found = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        found[name] = imported & names.keys()
    return found


def test_the_modules_import_each_other_without_circles():
    left = _imports()
    while True:
        leaves = {name for name, imported in left.items() if not imported & left.keys()}
        if not leaves:
            break
        left = {name: imported for name, imported in left.items() if name not in leaves}
    assert left == {}


def test_patches_can_be_checked_without_vllm_and_web_frameworks():
    """``vllm-instant --help``, ``config`` and ``doctor`` run in an environment without them."""
    code = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastapi", "starlette", "torch", "vllm"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import vllm_instant.patches.activation, vllm_instant.patches.engine_options
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
