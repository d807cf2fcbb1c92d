"""Two small OpenAI-compatible ends for tests of the escalation: an ASGI application, and a server with faults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.escalation.deep_server import DeepServer
from vllm_instant.escalation.metrics import EscalationMetrics
from vllm_instant.escalation.middleware import EscalationMiddleware, Switch
from vllm_instant.escalation.service import EscalationService
from vllm_instant.interfaces.escalation import Decision, Depth, EscalationOptions

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def answer(text: str, n: int = 1) -> bytes:
    """A whole chat answer."""
    choices = [{"index": i, "message": {"role": "assistant", "content": text}} for i in range(n)]
    return json.dumps({"id": "x", "choices": choices, "usage": USAGE}).encode()


def events(*texts: str) -> list[bytes]:
    """The events of a streamed answer, the end of the stream included."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    chunks.append({"choices": [], "usage": USAGE})
    return [*(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks), b"data: [DONE]\n\n"]


class FakeEnd:
    """A server that answers every request with its name, and can fail in several ways.

    Args:
        name: The text of its answers.
        fault: ``key``, ``context``, ``busy``, ``slow``, ``cut``, ``silent``, ``unended`` or empty.

    """

    def __init__(self, name: str, fault: str = "") -> None:
        self.name = name
        self.fault = fault
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gate = asyncio.Event()
        """Streams wait for it after their first event; set by default."""
        self.gate.set()
        self.has_lost_client = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        status = {"key": 401, "context": 400, "busy": 503}.get(self.fault)
        if status is not None:
            return web.json_response({"error": {"message": self.fault}}, status=status)
        if self.fault == "slow":
            await asyncio.Event().wait()
        if not body.get("stream"):
            response = web.StreamResponse(headers={"content-type": "application/json"})
            await response.prepare(request)
            content = answer(self.name, body.get("n", 1))
            await response.write(content[:10])
            if self.fault == "cut":
                request.transport.abort()
            await response.write(content[10:])
            return response
        return await self._stream(request)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        parts = events(self.name, " said", " it")
        try:
            for number, part in enumerate(parts):
                if number == 2 and self.fault == "cut":
                    request.transport.abort()
                if number == 2 and self.fault == "silent":
                    await asyncio.Event().wait()
                if self.fault == "unended" and number == len(parts) - 1:
                    break
                await response.write(part)
                await self.gate.wait()
        except (ConnectionError, asyncio.CancelledError):
            self.has_lost_client.set()
            raise
        return response

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """Serve on a free port; yields the address."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.handle)
        app.router.add_post("/v1/completions", self.handle)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


class HereApp:
    """The API server itself, as the middleware sees it: answers with ``here``."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.contents: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.next_answers: list[dict[str, Any]] = []
        self.next_streams: list[list[bytes]] = []
        """Events of streamed answers, which it gives first."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.contents.append(message["body"])
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        try:
            body = dict(json.loads(message["body"]))
            self.bodies.append(body)
        except (ValueError, TypeError):
            body = {}
        parts = events("here") if body.get("stream") else [answer("here", body.get("n", 1))]
        if self.next_answers:
            parts = [json.dumps(self.next_answers.pop(0)).encode()]
        kind = b"application/json"
        if self.next_streams:
            kind, parts = b"text/event-stream; charset=utf-8", self.next_streams.pop(0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Always:
    """A plugin that gives the same decision always."""

    def __init__(self, depth: Depth = Depth.DEEP) -> None:
        self.depth = depth

    def decide(self, request: Any, answer: Any) -> Any:
        return Decision(self.depth, "always")


class Ends:
    """A middleware between the application ``here`` and a deep server."""

    def __init__(self, plugin: Any = None, clock: Any = None, **options: Any) -> None:
        self.here = HereApp()
        self.registry = CollectorRegistry()
        self.now = 0.0
        clock = clock or (lambda: self.now)
        parsed = EscalationOptions(**options)
        deep = DeepServer(parsed, clock) if parsed.deep_url else None
        guarded = GuardedPlugin("escalation", "tested", plugin or Always())
        metrics = EscalationMetrics("tested", self.registry)
        self.service = EscalationService(guarded, parsed, metrics, deep, clock)
        switch = Switch()
        switch.service = self.service
        self.app = EscalationMiddleware(self.here, switch)

    async def post(
        self, body: Any, path: str = "/v1/chat/completions", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request; returns status, headers and body."""
        sent: list[Any] = []
        async for message in self.messages(body, path, headers):
            sent.append(message)
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, content

    async def messages(
        self,
        body: Any,
        path: str = "/v1/chat/completions",
        headers: dict[str, str] | None = None,
        left: asyncio.Event | None = None,
    ) -> AsyncIterator[Any]:
        """Send a request; yields ASGI's messages as they come. ``left``: the client leaves when it is set."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        left = left or asyncio.Event()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        has_read = False

        async def receive() -> Any:
            nonlocal has_read
            if not has_read:
                has_read = True
                return {"type": "http.request", "body": content, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        }

        async def run() -> None:
            try:
                await self.app(scope, receive, queue.put)
            finally:
                await queue.put(None)

        task = asyncio.ensure_future(run())
        while (message := await queue.get()) is not None:
            yield message
        await task

    def value(self, name: str, **labels: str) -> float:
        """A metric."""
        return self.registry.get_sample_value(f"vllm_instant:escalation_{name}", labels) or 0.0
