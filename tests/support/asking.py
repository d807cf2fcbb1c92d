"""Requests to the servers of the engine tests."""

from __future__ import annotations

import time
from collections.abc import Callable
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


def metrics_when(server: Server, ready: Callable[[dict[str, float]], bool], seconds: float = 10) -> dict[str, float]:
    """The server's metrics as soon as ``ready`` accepts them; the last ones read when the time is up.

    The API server polls our counters from the engine every second, so they lag behind its answers.
    """
    deadline = time.monotonic() + seconds
    while True:
        metrics = server.metrics()
        if ready(metrics) or time.monotonic() > deadline:
            return metrics
        time.sleep(0.1)


def settled_metrics(server: Server) -> dict[str, float]:
    """The metrics of an idle server after at least one more poll of the engine."""
    counters: list[dict[str, float]] = []

    def unchanged(metrics: dict[str, float]) -> bool:
        counters.append({name: value for name, value in metrics.items() if name.startswith("vllm")})
        # Fifteen reads, 0.1 s apart, span a whole polling interval.
        return len(counters) > 15 and all(earlier == counters[-1] for earlier in counters[-16:])

    return metrics_when(server, unchanged)
