"""Real servers on the CPU, in float32, where greedy answers must be identical character by character."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from asking import COMMON, NAMED, ask_all

from vllm_instant.tools.demo.assets import Pair
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.measure.servers import Server

PROMPTS = 50


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Excerpts of held-out documents, from a few words to several hundred tokens long."""
    pieces = []
    for document in documents():
        if document.held_out:
            generator = random.Random(document.name)
            for start in range(0, max(1, len(document.text) - 1500), 700):
                pieces.append(document.text[start : start + generator.randrange(20, 1500)])
    random.Random(0).shuffle(pieces)
    assert len(pieces) >= PROMPTS
    return pieces[:PROMPTS]


@pytest.fixture(scope="session")
def baseline(demo_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A vLLM server without speculation; the package is installed but not selected."""
    log = tmp_path_factory.mktemp("baseline") / "server.log"
    with Server(demo_pair.target, [*COMMON, *NAMED], log=log) as server:
        yield server


@pytest.fixture(scope="session")
def expected(baseline: Server, prompts: list[str]) -> list[str]:
    """The answers of vLLM alone."""
    return ask_all(baseline, prompts)


Launch = Callable[..., Any]


@pytest.fixture(scope="session")
def launch(demo_pair: Pair, plugin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """``with launch(deployment_text, *words) as server``: our server; DRAFT stands for the draft model's path."""

    @contextmanager
    def start(deployment: str, *words: str, **environment: str) -> Iterator[Server]:
        folder = tmp_path_factory.mktemp("instant")
        inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        file = folder / "deploy.toml"
        file.write_text(deployment.replace("DRAFT", str(demo_pair.draft)))
        selection = ["--plugins", "vllm_instant", "--instant-config", str(file)]
        server = Server(
            demo_pair.target,
            [*COMMON, *NAMED, *selection, *words],
            log=folder / "server.log",
            environment={"PYTHONPATH": os.pathsep.join([str(plugin_folder), *inherited]), **environment},
        )
        with server:
            yield server

    return start
