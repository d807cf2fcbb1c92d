"""The benchmarks name only what exists: every import from the project's packages, and every support module."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("benchmarks/gpu/*.py")])
FOLDERS = ["tests/support", "tests/support/plugins", "benchmarks", "benchmarks/gpu"]
LOCAL = {path.stem for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
ABSENT_RIVALS = {"flash_attn", "flashinfer"}


def imports(path):
    """``(module, names)`` of each import statement."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT / "benchmarks").as_posix())
def test_every_import_of_a_benchmark_exists(script):
    missing = []
    for module, names in imports(script):
        top = module.partition(".")[0]
        if top.startswith("vllm_instant"):
            found = importlib.import_module(module)
            missing += [
                f"{module}.{name}"
                for name in names
                if not hasattr(found, name) and importlib.util.find_spec(f"{module}.{name}") is None
            ]
        elif top not in LOCAL | ABSENT_RIVALS and importlib.util.find_spec(top) is None:
            missing.append(module)
    assert missing == []
