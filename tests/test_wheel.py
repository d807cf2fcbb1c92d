"""The built distribution: every module and page, and no weights of models."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[1]
MAX_MEGABYTES = 1.5
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the tracked files alone, so that no leftover of an earlier build can get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=source, check=True, capture_output=True, timeout=120)
    [built] = folder.glob("*.whl")
    return built


def test_no_weights_are_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith((".safetensors", ".gguf", "tokenizer.json"))] == []
    assert wheel.stat().st_size < MAX_MEGABYTES * 1e6


def test_pages_and_deployment_files_are_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = [ROOT / "vllm_instant", *(ROOT / part / f"vllm_instant_{part}" for part in ("plugins", "loadtests"))]
    data = [
        path.relative_to(package.parent).as_posix()
        for package in packages
        for path in package.rglob("*")
        if path.suffix in (".html", ".css", ".toml", ".typed", ".py", ".jinja", ".svg", ".txt")
    ]
    assert len(data) > 100
    assert [name for name in data if name not in names] == []
