"""Sources and tests of vLLM releases, downloaded once into the user's cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

OLDEST, NEWEST = "0.32.0", "0.33.0"
"""Both ends of the supported range; the oldest is the CPU build that is installed."""


def sources(version: str) -> Path:
    """The package folder ``vllm`` of a release, without its compiled parts."""
    cache = Path(platformdirs.user_cache_dir("vllm-instant")) / f"vllm-{version}-sources"
    package, marker = cache / "vllm", cache / "complete"
    if not marker.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(cache)]
        platforms = [word for glibc in (31, 28, 17) for word in ("--platform", f"manylinux_2_{glibc}_x86_64")]
        interpreter = ["--python-version", "3.12", "--implementation", "cp", "--abi", "abi3", "--abi", "cp312"]
        subprocess.run([*command, *platforms, *interpreter, f"vllm=={version}"], check=True)
        [wheel] = cache.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and name.endswith(".py"):
                    archive.extract(name, cache)
        wheel.unlink()
        marker.touch()
    return package


def own_tests(version: str) -> Path | None:
    """A folder with the package ``tests`` of a release's source distribution; None where it cannot be fetched."""
    cache = Path(platformdirs.user_cache_dir("vllm-instant")) / f"vllm-{version}-tests"
    if not (cache / "complete").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            # pip unpacks a source distribution to read its metadata, which needs build tools that may be missing: what
            # it has unpacked by then is all that is wanted.
            options = ["-q", "--no-clean", "--no-deps", "--no-binary=vllm", "--no-build-isolation", "-d", folder]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", *options, f"vllm=={version}"],
                check=False,
                capture_output=True,
                timeout=300,
                env={**os.environ, "TMPDIR": folder, "VLLM_TARGET_DEVICE": "empty"},
            )
            found = next(Path(folder).glob("pip-download-*/vllm_*/tests"), None)
            if found is None:
                return None
            shutil.rmtree(cache / "tests", ignore_errors=True)
            shutil.move(found, cache / "tests")
        (cache / "complete").touch()
    return cache
