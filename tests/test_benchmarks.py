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


def test_servers_on_a_gpu_are_compared_with_the_best_arm_of_vllm_and_refused_arms_are_left_out(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/gpu"))
    servers = importlib.import_module("servers")

    def windows(*speeds):
        return {4: servers.Windows(list(speeds), [1.0] * 3, [2.0] * 3, [3.0] * 3)}

    found = {
        servers.OFF: windows(10, 10, 10),
        "draft model, K=2": windows(20, 20, 20),
        "adaptive verification": {},
        servers.OURS: windows(30, 30, 30),
    }
    [row] = servers.cells(found, [4])
    assert row["best_vllm_arm"] == "draft model, K=2"
    assert row[f"{servers.OURS} / best"]["median"] == 1.5
    assert "adaptive verification" not in row["arms"]


def test_a_soak_tells_what_grows_from_what_is_constant(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    soak = importlib.import_module("chaos_soak")
    readings = [{"seconds": 300 * i, "tasks": 11, "threads": 10 + i, "memory, MiB": 500 + (i % 2)} for i in range(20)]
    found = {row["quantity"]: row for row in soak.slopes(readings)}
    assert (found["tasks"]["per_hour"], found["tasks"]["low"], found["tasks"]["high"]) == (0, 0, 0)
    assert found["threads"]["per_hour"] == pytest.approx(12)
    assert {name: row["flat"] for name, row in found.items()} == {"tasks": True, "threads": False, "memory, MiB": True}
