"""Sends prompts to a server that records a routing trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, Field, ValidationError

from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.http_client import sync_client
from vllm_instant.tools.measure.prompts import BUILT_IN

ROUTE = "/v1/instant/experts"
CLASS_KEY = "instant_prompt_class"
"""Key in a request's ``vllm_xargs`` that names its prompt class."""


class TracingError(RuntimeError):
    """A trace that could not be recorded; the message is one sentence."""


class _PromptLine(BaseModel):
    prompt: str
    prompt_class: str | None = Field(None, alias="class")
    temperature: float = 0.0


def read_prompts(path: Path) -> list[PromptSpec]:
    """Prompts from a file: one per line, or in ``*.jsonl`` objects with ``prompt``, ``class`` and ``temperature``.

    Raises:
        TracingError: if there are none, or a line is invalid.

    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TracingError(f"{path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(PromptSpec(line, 0.0, path.stem))
            continue
        try:
            record = _PromptLine.model_validate_json(line)
        except ValidationError as error:
            [first, *_] = error.errors()
            where = "".join(f"{part}: " for part in first["loc"])
            raise TracingError(
                f"{path}, line {number}: expected an object with a prompt, {where}{first['msg']}"
            ) from None
        prompts.append(PromptSpec(record.prompt, record.temperature, record.prompt_class or path.stem))
    if not prompts:
        raise TracingError(f"{path} has no prompts")
    return prompts


def built_in_prompts(seed: int = 0, each: int = 32) -> Iterator[PromptSpec]:
    """An endless stream of different prompts, alternating between the built-in classes."""
    while True:
        lists = [make(each, f"trace/{seed}") for make in BUILT_IN.values()]
        for prompts in zip(*lists, strict=False):
            yield from prompts
        seed += 1


def recorded_tokens(url: str) -> int | None:
    """Number of tokens that the server has recorded; None if it records no trace."""
    with sync_client(url, timeout=30) as client:
        answer = client.post(ROUTE, json={})
    if answer.status_code != 200:
        return None
    found = answer.json()["measures"].get("recorded_tokens")
    return None if found is None else int(found)


def record(
    url: str,
    model: str,
    prompts: Iterator[PromptSpec] | Sequence[PromptSpec],
    tokens: int,
    *,
    concurrency: int = 8,
    output_tokens: int = 96,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[Path, int]:
    """Send prompts until enough tokens are recorded or all are sent; then the server writes its trace.

    Args:
        url: address of the server, without ``/v1``.
        model: model name in requests.
        prompts: the prompts to send.
        tokens: number of tokens to record.
        concurrency: concurrent requests.
        output_tokens: maximum number of output tokens per request.
        progress: called with the number of recorded tokens after each batch of prompts.

    Returns:
        The path of the trace on the server's machine, and its number of tokens.

    Raises:
        TracingError: if the server records no trace or refuses a request.

    """
    if recorded_tokens(url) is None:
        raise TracingError(
            f'{url} records no experts: it must be served with [experts] plugin = "observed", adjustable = true '
            "and a trace"
        )
    waiting = iter(prompts)

    def send(client: httpx.Client, prompt: PromptSpec) -> None:
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt.text,
            "max_tokens": output_tokens,
            "temperature": prompt.temperature,
            "vllm_xargs": {CLASS_KEY: prompt.kind},
        }
        answer = client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            raise TracingError(f"the server refused a prompt: {answer.text[:200]}")

    with sync_client(url, timeout=600) as client, ThreadPoolExecutor(concurrency) as pool:
        while True:
            batch = [prompt for _, prompt in zip(range(2 * concurrency), waiting, strict=False)]
            list(pool.map(lambda prompt: send(client, prompt), batch))
            recorded = recorded_tokens(url) or 0
            progress(recorded)
            if recorded >= tokens or len(batch) < 2 * concurrency:
                break
        answer = client.post(ROUTE, json={"write": True})
    if answer.status_code != 200:
        told = answer.json()
        message = told["error"]["message"] if "error" in told else told.get("detail", answer.text[:200])
        raise TracingError(f"the trace was not written: {message}")
    written = answer.json()["answer"]
    return Path(written["trace"]), int(written["tokens"])
