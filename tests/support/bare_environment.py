"""A virtual environment that holds this project and its dependencies, but neither vLLM nor PyTorch nor FastAPI."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import tomllib
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("", "plugins", "triton_kernels", "loadtests")


@dataclass(frozen=True)
class BareEnvironment:
    """A virtual environment and how commands run in it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        [found] = (self.folder / "lib").glob("python3*/site-packages")
        return found

    def run(self, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``vllm-instant WORDS`` there."""
        return self.run_python("-m", "vllm_instant.tools.cli", *words, **environment)

    def run_python(self, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(
            [self.python, *words],
            env={**inherited, "COLUMNS": "200", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def build(folder: Path, extra: str = "", also: Sequence[str] = ()) -> BareEnvironment:
    """Make the environment that ``pip install vllm-instant`` would make, with links to packages installed here.

    What pyproject.toml declares is followed, so a dependency that is missing there is missing in the environment, too.

    Args:
        folder: new folder of the environment.
        extra: of this project; its packages are there, too.
        also: requirements whose packages are there, too.

    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    venv.create(folder, symlinks=True)
    environment = BareEnvironment(folder)
    wanted = list(project["dependencies"]) + list(project["optional-dependencies"].get(extra, [])) + list(also)
    for distribution in _closure(wanted):
        for name in {PurePosixPath(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = environment.site_packages / name
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(name))))
    paths = [str(ROOT / source) for source in SOURCES]
    (environment.site_packages / "project.pth").write_text("\n".join(paths))
    metadata = environment.site_packages / f"vllm_instant-{importlib.metadata.version('vllm-instant')}.dist-info"
    metadata.mkdir()
    version = importlib.metadata.version("vllm-instant")
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-instant\nVersion: {version}\n")
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [
        f"[{group}]\n" + "\n".join(f"{name} = {at}" for name, at in found.items()) for group, found in groups.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return environment


def _closure(requirements: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """Every distribution that the requirements lead to, extras that they name included."""
    waiting = [(Requirement(text), "") for text in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not applies:
            continue
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) in seen:
                continue
            seen.add((requirement.name, wanted))
            distribution = importlib.metadata.distribution(requirement.name)
            waiting += [(Requirement(text), wanted) for text in distribution.requires or []]
            yield distribution
