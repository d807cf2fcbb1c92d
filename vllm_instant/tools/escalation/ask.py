"""Asks both ends the same prompts, for a file from which a rule can be learned."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from vllm_instant.tools.escalation.examples import ENDS, REQUEST_KEYS
from vllm_instant.tools.measure.sampling import RefusedError


class End:
    """One end.

    Args:
        client: For its address.
        model: Name of its model.
        max_tokens: Limit of each answer, where the prompt's line has none.
        clock: Time in seconds.

    """

    def __init__(
        self, client: httpx.Client, model: str, max_tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._clock = clock

    def answer(self, line: Mapping[str, Any]) -> tuple[str, float, int]:
        """Return the greedy answer to a prompt, its seconds and its number of tokens; raises RefusedError."""
        body: dict[str, Any] = {key: line[key] for key in REQUEST_KEYS if key in line}
        body = {"max_tokens": self._max_tokens, "temperature": 0, **body, "model": self._model}
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        began = self._clock()
        try:
            response = self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise RefusedError(f"{self._client.base_url} does not answer ({type(error).__name__})") from None
        seconds = self._clock() - began
        if response.status_code != 200:
            raise RefusedError(f"{self._client.base_url} answers HTTP {response.status_code}: {response.text[:200]}")
        found = response.json()
        choice = found["choices"][0]
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        return str(text or ""), seconds, int((found.get("usage") or {}).get("completion_tokens") or 0)


def ask_both(
    lines: Iterable[Mapping[str, Any]], fast: End, deep: End, output: Path, concurrency: int, say: Callable[[int], None]
) -> int:
    """Write each line with both answers, their seconds and numbers of tokens; returns the number of lines."""

    def both(line: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(line)
        for name, end in zip(ENDS, (fast, deep), strict=True):
            text, seconds, tokens = end.answer(line)
            result |= {name: text, f"{name}_seconds": round(seconds, 4), f"{name}_tokens": tokens}
        return result

    count = 0
    with output.open("w", encoding="utf-8") as file, ThreadPoolExecutor(concurrency) as pool:
        for result in pool.map(both, lines):
            file.write(json.dumps(result) + "\n")
            count += 1
            say(count)
    return count
