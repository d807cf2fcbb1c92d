"""Requests to the servers of the engine tests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from vllm_instant.tools.measure.servers import Server

COMMON = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
NAMED = ["--served-model-name", "demo"]


class EngineDiedError(Exception):
    """The server answered that its engine is dead."""


def ask(server: Server, prompt: str, **parameters: Any) -> list[dict[str, Any]]:
    """One completion, greedy unless said otherwise; returns its choices."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True, **parameters}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    if response.status_code == 500 and "EngineCore" in response.text:
        raise EngineDiedError(response.text)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def ask_all(server: Server, prompts: list[str], **parameters: Any) -> list[str]:
    """All prompts, eight at a time; returns the texts."""
    with ThreadPoolExecutor(8) as pool:
        return [choices[0]["text"] for choices in pool.map(lambda p: ask(server, p, **parameters), prompts)]
