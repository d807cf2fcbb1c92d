"""Isolation for all tests, and the shared servers of the engine tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm_releases
from hypothesis import settings as hypothesis_settings

from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.demo.assets import Pair

# First examples import torch; a deadline would judge the import.
hypothesis_settings.register_profile("tests", deadline=None)
hypothesis_settings.load_profile("tests")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is not marked otherwise is a unit test; GPU tests are skipped where there is no device."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("engine", "kernel", "gpu", "perf", "v2", "unit")):
            item.add_marker(pytest.mark.unit)
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not _has_gpu(), reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread_beside_other_processes() -> None:
    """One thread for torch where pytest-xdist runs tests in several processes: they have the cores already.

    OpenMP's threads wait for each other by spinning; with twice as many as cores a training step takes many times as
    long. vLLM's workers set their own number.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Refuse test modules that import Locust.

    It replaces threads and locks, which deadlocks pytest-xdist, and loads Flask, whose proxies raise when vLLM looks
    through all modules.
    """
    if "locust" in sys.modules:
        raise pytest.UsageError("a test module imports locust; run what needs it in a process of its own")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes run the tests: files stay whole, and all that start servers stay in one process.

    Those share some servers, and engines beside each other would be slow. (xdist's own groups get lost on the way to
    its scheduler with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = nodeid.partition("::")[0]
            # The V2 lane starts no servers, and comes last: it runs where the other files have ended.
            return next((group for group in ("tests/engine/", "tests/v2/") if file.startswith(group)), file)

    return ByFile(config, log)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("INSTANT_") or name == "VLLM_PLUGINS":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test plugins and the example distribution, as an installation leaves them in a folder of their own.

    A wheel is built by setuptools and unpacked, which is what pip does with it, in a tenth of pip's time.
    """
    target = tmp_path_factory.mktemp("plugins")
    copies = tmp_path_factory.mktemp("sources")
    for source in (ROOT / "tests/support/plugins", ROOT / "examples/bigram_plugin"):
        copy = shutil.copytree(source, copies / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')"]
        subprocess.run(build, cwd=copy, check=True, capture_output=True)
        [wheel] = (copy / "dist").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return target


@pytest.fixture(scope="session")
def newest_release() -> Path:
    """The package folder of the newest supported vLLM release, Python sources only."""
    return vllm_releases.sources(vllm_releases.NEWEST)


@pytest.fixture(scope="session")
def demo_pair() -> Pair:
    """The demo models, expanded only a little and in float32."""
    return assets.prepare(size=widen_model.SMALL, dtype="float32")


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[[str], Path]:
    """Write a deployment file and return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "deploy.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def with_test_plugins(plugin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the installed test plugins visible in this process."""
    from vllm_instant.deployment.plugin_manager import plugin_manager

    monkeypatch.syspath_prepend(str(plugin_folder))
    plugin_manager.cache_clear()
    yield
    plugin_manager.cache_clear()
