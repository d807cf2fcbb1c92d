"""The servers of ``chaos.py``, with most slots in use.

One engine, or two with data parallelism, serve the demo's small draft model, which drafts for itself. Its attention
heads cannot be divided: two tensor-parallel workers serve the demo's target, with lookups.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import results

from vllm_instant.tools.demo import assets
from vllm_instant.tools.measure.servers import Server

KEY = "chaos"
HEADERS = {"Authorization": f"Bearer {KEY}"}
HYBRID = """
[drafter]
plugin = "hybrid"
model = "{draft}"
num_speculative_tokens = 4
history_tokens = 20_000
"""
SUFFIX = """
[drafter]
plugin = "suffix"
num_speculative_tokens = 4
history_tokens = 20_000
"""
DEPLOYMENT = """
[batching]
plugin = "similarity"
[streaming]
plugin = "resumable"
[speculation]
plugin = "goodput"
costs_folder = "{state}"
"""
WORDS = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager"]
WORDS += ["--served-model-name", "demo", "--api-key", KEY, "--plugins", "vllm_instant"]
WORDS += ["--num-gpu-blocks-override", "600"]  # a cache that is soon used whole, and evicts


LAYOUTS = {
    "one engine": (HYBRID, (), {}),
    "two engines": (HYBRID, ("--data-parallel-size", "2"), {}),
    "two workers": (SUFFIX, ("--tensor-parallel-size", "2"), {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
}
"""By name the drafter, and words and environment of the server."""


def server_of(folder: Path, *words: str, layout: str = "one engine") -> Server:
    """A server that is not started yet; its files are in ``folder``."""
    pair, file = assets.prepare(), folder / "deploy.toml"
    drafter, layout_words, layout_environment = LAYOUTS[layout]
    model = pair.target if layout == "two workers" else pair.draft
    file.write_text((drafter + DEPLOYMENT).format(draft=pair.draft, state=folder / "state"))
    environment = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": results.python_path(str(results.HERE))}
    environment |= layout_environment
    words = (*WORDS, "--instant-config", str(file), *layout_words, *words)
    return Server(model, words, log=folder / "server.log", environment=environment)


@dataclass
class Target:
    """What faults are aimed at."""

    url: str
    client: httpx.AsyncClient
    """Has the URL and the key."""
    front: psutil.Process
    state: Path
    """Folder of the learned state."""
    prompts: list[str]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 80)

    @property
    def family(self) -> list[psutil.Process]:
        """The front end and all its descendants."""
        return [self.front, *self.front.children(recursive=True)]

    @property
    def engine(self) -> list[psutil.Process]:
        """The processes of the engine core."""
        return [process for process in self.family if "EngineCore" in process.name()]

    def body(self, choose: random.Random, **parameters: Any) -> dict[str, Any]:
        """A completion request."""
        prompt = choose.choice(self.prompts)
        return {"model": "demo", "prompt": prompt, "max_tokens": 24, "ignore_eos": True, **parameters}
