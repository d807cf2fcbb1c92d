"""A draft model that vLLM serves: its completions API takes and returns token ids."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable
from typing import Any

import httpx

from vllm_instant.tools.draft_server.drafting import Guess
from vllm_instant.tools.draft_server.model import ModelError, Tokens
from vllm_instant.tools.measure.http_client import sync_client

TIMEOUT = 30.0
"""Seconds for one answer."""
_TOKEN_ID = "token_id:"  # noqa: S105  how vLLM writes a token with ``return_tokens_as_token_ids``


class ServedModel:
    """A model behind ``/v1/completions`` of vLLM, which batches the calls and keeps prefixes in its own cache.

    Args:
        url: Address of the server, without ``/v1``.
        vocab_size: Number of token ids.
        api_key: Of the server; None without one.
        max_parallel: Maximum number of calls at the same time.

    Raises:
        ModelError: The server does not answer.

    """

    def __init__(self, url: str, vocab_size: int, api_key: str | None = None, max_parallel: int = 32) -> None:
        self.vocab_size = vocab_size
        self.max_parallel = max_parallel
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = sync_client(url.rstrip("/").removesuffix("/v1"), timeout=TIMEOUT, headers=headers)
        self._url = url
        [served, *_] = self._ask("GET", "/v1/models")["data"]
        self._name = served["id"]
        self.max_tokens = int(served.get("max_model_len") or 1 << 20)

    def draft(self, request: Hashable, owner: Hashable, sequence: Tokens, count: int, vocab_size: int) -> list[Guess]:
        """Greedy tokens; see ``DraftModel``."""
        count = min(count, self.max_tokens - len(sequence))
        if count < 1:
            return []
        body = {
            "model": self._name,
            "prompt": sequence.tolist(),
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_tokens_as_token_ids": True,
            # vLLM's prefix cache is shared within an owner only, as the caches of ``CachePool`` are.
            "cache_salt": hashlib.sha256(repr(owner).encode()).hexdigest(),
        }
        try:
            found = self._ask("POST", "/v1/completions", body)["choices"][0]["logprobs"]
            guesses = [_guess(token, top) for token, top in zip(found["tokens"], found["top_logprobs"], strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ModelError(f"{self._url} answers as no vLLM does ({type(error).__name__})") from None
        known = next((place for place, guess in enumerate(guesses) if guess.token >= vocab_size), len(guesses))
        return guesses[:known]

    def release(self, request: Hashable) -> None:
        """The request has ended; vLLM drops what it cached when it needs the room."""

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ModelError(f"{self._url} does not answer ({type(error).__name__})") from None
        if answer.status_code != 200:
            raise ModelError(f"{self._url} answers HTTP {answer.status_code}: {' '.join(answer.text.split())[:200]}")
        return answer.json()


def _guess(token: str, top: dict[str, float]) -> Guess:
    """The sampled token and the likeliest other one."""
    others = [(math.exp(value), _number(name)) for name, value in top.items() if name != token]
    other_probability, other = max(others, default=(0.0, 0))
    return Guess(_number(token), math.exp(top[token]), other, other_probability)


def _number(token: str) -> int:
    if not token.startswith(_TOKEN_ID):
        raise ValueError(token)
    return int(token.removeprefix(_TOKEN_ID))
