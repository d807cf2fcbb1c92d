"""Asks a guard model behind an OpenAI-compatible URL whether a text is safe."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from vllm_instant_plugins.guard.expressions import compile_re2

logger = logging.getLogger("vllm.instant.guard")

RETRY_SECONDS = 0.5


class ModelClient:
    """Scores texts by a guard model: 1 where its answer matches a pattern, else 0.

    A request that fails is sent again until it is answered; what happens to the text meanwhile is for ``late`` to say.

    Args:
        url: Address of the server, with or without ``/v1``.
        model: Name of the model there.
        unsafe_pattern: Regular expression that finds the answer to an unsafe text.
        api_key: Key of the server.
        timeout: Seconds until a request counts as failed.
        max_requests: Maximum number of requests at once.

    """

    has_failed = False

    def __init__(
        self, url: str, model: str, unsafe_pattern: str, api_key: str | None, timeout: float, max_requests: int
    ) -> None:
        self._unsafe = compile_re2(unsafe_pattern)
        self._body = {"model": model, "max_tokens": 16, "temperature": 0}
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base = url.rstrip("/").removesuffix("/v1")
        # vLLM closes idle connections after 5 seconds, as httpx does by default: a text of that moment would have to be
        # sent again.
        limits = httpx.Limits(keepalive_expiry=1.0)
        self._client = httpx.Client(base_url=base, headers=headers, timeout=timeout, limits=limits)
        self._pool = ThreadPoolExecutor(max_requests, thread_name_prefix="guard-model")
        self._closed = threading.Event()
        self.num_restarts = 0
        """Number of requests that were sent again."""

    def submit(self, text: str, on_score: Callable[[float, float], None]) -> None:
        """Ask about a text. ``on_score`` is called, in another thread, with the score and the seconds that it took."""
        self._pool.submit(self._ask, text, on_score)

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, text: str, on_score: Callable[[float, float], None]) -> None:
        began = time.monotonic()
        body: dict[str, Any] = {**self._body, "messages": [{"role": "user", "content": text}]}
        while not self._closed.is_set():
            try:
                response = self._client.post("/v1/chat/completions", json=body)
                response.raise_for_status()
                answer = str(response.json()["choices"][0]["message"]["content"])
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                self.num_restarts += 1
                logger.warning("The guard model does not answer (%s: %s); asking again", type(error).__name__, error)
                self._closed.wait(RETRY_SECONDS)
                continue
            on_score(float(self._unsafe.search(answer) is not None), time.monotonic() - began)
            return
