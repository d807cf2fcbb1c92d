"""Prompts for a server that records which experts it uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.prompts import BUILT_IN

ROUTE = "/v1/instant/experts"
CLASS_KEY = "instant_prompt_class"
"""What a request writes into ``vllm_xargs`` to name its kind of prompt."""


class TracingError(RuntimeError):
    """A trace that could not be recorded, in one sentence."""


def read_prompts(path: Path) -> list[PromptSpec]:
    """Prompts from a file: JSON lines with ``prompt`` and perhaps ``class`` and ``temperature``, or one prompt a line.

    Raises:
        TracingError: when there are none, or a line is something else.

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
            record = json.loads(line)
            text, kind = record["prompt"], record.get("class", path.stem)
            temperature = float(record.get("temperature", 0.0))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TracingError(f"{path}, line {number}: expected an object with a prompt, {error}") from None
        if not isinstance(text, str) or not isinstance(kind, str):
            raise TracingError(f"{path}, line {number}: prompt and class must be strings")
        prompts.append(PromptSpec(text, temperature, kind))
    if not prompts:
        raise TracingError(f"{path} has no prompts")
    return prompts


def built_in_prompts(seed: int = 0, each: int = 32) -> Iterator[PromptSpec]:
    """Fresh prompts of the built-in classes in turn, without end."""
    while True:
        lists = [make(each, f"trace/{seed}") for make in BUILT_IN.values()]
        for prompts in zip(*lists, strict=False):
            yield from prompts
        seed += 1


def recorded_tokens(url: str) -> int | None:
    """How many tokens the server has recorded, None when it records nothing."""
    answer = httpx.post(f"{url}{ROUTE}", json={}, timeout=30)
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
    """Send prompts until enough tokens are recorded, or all are sent; then let the server write its trace.

    Args:
        url: of the server, without ``/v1``.
        model: as requests call it.
        prompts: what to send.
        tokens: how many shall be recorded.
        concurrency: requests at a time.
        output_tokens: most tokens of an answer.
        progress: told now and then how many there are.

    Returns:
        The trace's file, on the server's machine, and how many tokens it has.

    Raises:
        TracingError: when the server records nothing or refuses a request.

    """
    if recorded_tokens(url) is None:
        raise TracingError(
            f'{url} records no experts: it must be served with [experts] plugin = "observed" and a trace'
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
        answer = client.post(f"{url}/v1/completions", json=body)
        if answer.status_code != 200:
            raise TracingError(f"the server refused a prompt: {answer.text[:200]}")

    with httpx.Client(timeout=600) as client, ThreadPoolExecutor(concurrency) as pool:
        while True:
            batch = [prompt for _, prompt in zip(range(2 * concurrency), waiting, strict=False)]
            list(pool.map(lambda prompt: send(client, prompt), batch))
            recorded = recorded_tokens(url) or 0
            progress(recorded)
            if recorded >= tokens or len(batch) < 2 * concurrency:
                break
        answer = client.post(f"{url}{ROUTE}", json={"write": True})
    if answer.status_code != 200:
        raise TracingError(f"the trace was not written: {answer.json()['error']['message']}")
    written = answer.json()["answer"]
    return Path(written["trace"]), int(written["tokens"])
