"""A server that streams tokens at a set pace, for trying load tests and measuring the load generator itself.

    python -m vllm_instant_loadtests.mock --port 8000 --step-ms 50 --tokens-per-step 1

It has the routes of vLLM that load tests use: completions, chat, streaming sessions, ``/health``, ``/v1/models``,
``/version`` and ``/metrics``. All streams advance in steps, as a batch does; ``POST /mock`` with options changes the
pace while it runs, and ``--truth FILE`` records when it sent what.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from aiohttp import web

from vllm_instant.tools.measure import server_metrics as m


@dataclass(frozen=True)
class MockPace:
    """How the mock behaves."""

    first_ms: float = 50.0
    """Time from a request's start to its first token."""
    step_ms: float = 50.0
    tokens_per_step: int = 1
    slots: int = 10_000
    """Maximum number of running requests; others wait."""
    thinking_tokens: int = 0
    """Tokens at the beginning of each answer that are sent as reasoning."""
    accepted_share: float = 0.0
    """Share of the tokens that are reported as accepted drafts."""
    refuse: bool = False
    """Answer HTTP 503."""


PREFIX_BLOCK = 16
"""Prompt tokens (token ids, or characters of messages) per block of the mock's endless prefix cache."""


class MockServer:
    """The server.

    Args:
        pace: its initial behaviour.
        model: its model name.
        truth: file for what was sent when, one JSON line per request: ``id`` and ``sent`` as ``[when, tokens so far]``
            by ``time.perf_counter``.

    """

    def __init__(self, pace: MockPace | None = None, model: str = "mock", truth: Path | None = None) -> None:
        self.pace = pace or MockPace()
        self.model = model
        self.running = self.waiting = self.generated = self.aborted = self.steps = 0
        self.asked: list[dict[str, Any]] = []
        self.prefix_queries = self.prefix_hits = 0
        self._prefixes: set[int] = set()
        self._truth: IO[str] | None = truth.open("w", buffering=1) if truth is not None else None
        self._numbers = itertools.count()
        self._sessions: dict[str, dict[str, Any]] = {}
        self._tick = asyncio.Event()
        self._slot = asyncio.Condition()

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=1 << 26)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/version", self._version),
                web.get("/v1/models", self._models),
                web.get("/metrics", self._metrics),
                web.post("/v1/completions", self._complete),
                web.post("/v1/chat/completions", self._complete),
                web.post("/v1/instant/sessions", self._open),
                web.post("/v1/instant/sessions/{id}", self._event),
                web.delete("/v1/instant/sessions/{id}", self._close),
                web.post("/mock", self._change),
            ]
        )
        app.cleanup_ctx.append(self._stepping)
        return app

    async def _stepping(self, app: web.Application) -> Any:
        task = asyncio.create_task(self._steps())
        yield
        task.cancel()
        if self._truth is not None:
            self._truth.close()

    async def _steps(self) -> None:
        due = time.perf_counter()
        while True:
            due = max(due + self.pace.step_ms / 1e3, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            tick, self._tick = self._tick, asyncio.Event()
            self.steps += bool(self.running)
            tick.set()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "mock"})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model, "root": self.model, "max_model_len": 100_000}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        values = {
            m.RUNNING: self.running,
            m.WAITING: self.waiting,
            m.GENERATED: self.generated,
            m.KV_USAGE: min(1.0, self.running / self.pace.slots),
            m.PREEMPTIONS: 0,
            m.STEPS: self.steps,
            m.PREFIX_QUERIES: self.prefix_queries,
            m.PREFIX_HITS: self.prefix_hits,
        }
        return web.Response(text="".join(f'{name}{{engine="0"}} {float(value)}\n' for name, value in values.items()))

    async def _change(self, request: web.Request) -> web.Response:
        known = {field.name for field in fields(MockPace)}
        self.pace = replace(self.pace, **{key: value for key, value in (await request.json()).items() if key in known})
        return web.json_response(asdict(self.pace))

    async def _open(self, request: web.Request) -> web.Response:
        name = f"session-{next(self._numbers)}"
        self._sessions[name] = {**await request.json(), "text": ""}
        return web.json_response({"id": name})

    async def _event(self, request: web.Request) -> web.StreamResponse:
        session = self._sessions.get(request.match_info["id"])
        if session is None:
            return web.json_response({"error": "there is no such session"}, status=404)
        event = await request.json()
        if event["type"] == "input_text.commit":
            return await self._stream(request, session)
        session["text"] += event.get("text", "")
        return web.json_response({"prefilled": 0})

    async def _close(self, request: web.Request) -> web.Response:
        self._sessions.pop(request.match_info["id"], None)
        return web.json_response({})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        return await self._stream(request, await request.json())

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.pace.refuse:
            return web.json_response({"error": "the engine is dead"}, status=503)
        self.asked.append(body)
        self._look_up(body)
        name = f"mock-{next(self._numbers)}"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        sent: list[tuple[float, int]] = []
        self.waiting += 1
        async with self._slot:
            await self._slot.wait_for(lambda: self.running < self.pace.slots)
            self.waiting -= 1
            self.running += 1
        try:
            await response.prepare(request)
            await asyncio.sleep(self.pace.first_ms / 1e3)
            await self._write(response, name, body, sent)
        except ConnectionError:
            self.aborted += 1
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1
            async with self._slot:
                self._slot.notify_all()
            if self._truth is not None:
                self._truth.write(json.dumps({"id": name, "sent": sent}) + "\n")
        return response

    def _look_up(self, body: dict[str, Any]) -> None:
        """Count the known prefix of a prompt."""
        prompt = body.get("prompt") or "".join(str(message["content"]) for message in body.get("messages", ()))
        blocks = [hash(tuple(prompt[: end + PREFIX_BLOCK])) for end in range(0, len(prompt), PREFIX_BLOCK)]
        known = next((place for place, block in enumerate(blocks) if block not in self._prefixes), len(blocks))
        self.prefix_queries += len(prompt)
        self.prefix_hits += min(known * PREFIX_BLOCK, len(prompt))
        self._prefixes.update(blocks[: len(prompt) // PREFIX_BLOCK])

    async def _write(
        self, response: web.StreamResponse, name: str, body: dict[str, Any], sent: list[tuple[float, int]]
    ) -> None:
        max_tokens, tokens = int(body.get("max_tokens") or body["max_completion_tokens"]), 0
        # The shape and about the length of vLLM's events, without the fields that clients ignore.
        head = json.dumps({"id": name, "object": "chat.completion.chunk", "created": 1, "model": self.model})[:-1]
        while tokens < max_tokens:
            if tokens:
                await self._tick.wait()
            tokens = min(max_tokens, tokens + self.pace.tokens_per_step)
            usage = f'"usage": {{"prompt_tokens": 7, "total_tokens": {7 + tokens}, "completion_tokens": {tokens}}}'
            field_name = "reasoning" if tokens <= self.pace.thinking_tokens else "content"
            event = f'data: {head}, "choices": [{{"index": 0, "delta": {{"{field_name}": " word"}}}}], {usage}}}\n\n'
            sent.append((time.perf_counter(), tokens))
            await response.write(event.encode())
            self.generated += sent[-1][1] - (sent[-2][1] if len(sent) > 1 else 0)
        if self.pace.accepted_share:
            accepted = f'"num_accepted_draft_tokens": {round(tokens * self.pace.accepted_share)}'
            await response.write(f'data: {head}, "metrics": {{"speculative_decoding": {{{accepted}}}}}}}\n\n'.encode())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--truth", type=Path, help="file for when what was sent")
    for field in fields(MockPace):
        if field.name != "refuse":
            kind = int if isinstance(field.default, int) else float
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    options = vars(parser.parse_args())
    host, port, truth = options.pop("host"), options.pop("port"), options.pop("truth")

    async def serve() -> web.Application:
        return MockServer(MockPace(**options), truth=truth).app()

    web.run_app(serve(), host=host, port=port, print=None, access_log=None)


if __name__ == "__main__":
    main()
