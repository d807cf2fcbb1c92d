"""ASGI middleware: reads each request before the API server does, and lets the chosen end answer it.

It is inside of the check of API keys. Answers pass through unchanged: the headers ``x-instant-answered-by`` and
``x-instant-escalation`` say who answered and why.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from vllm_instant.escalation.client import App, Client, DisconnectError, Message, Receive, Scope, Send, ask, with_body
from vllm_instant.escalation.deep_server import FORWARDED, CutError, DeepAnswer, DeepServer, UnavailableError
from vllm_instant.escalation.requests import ANSWERED_BY, CHOICE, PATHS, client_choice, prompt_text, with_settings
from vllm_instant.escalation.service import EscalationService, Outcome
from vllm_instant.escalation.withheld import WithheldAnswer
from vllm_instant.interfaces.escalation import Depth, EscalationRequest

REASON = "x-instant-escalation"
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
_WITH_KEYS = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key", "api-key"})
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_TAIL = 4096
"""Bytes at the end of an answer in which its usage is looked for."""
_PREFIXES = {PATHS[0]: "chatcmpl-", PATHS[1]: "cmpl-"}
"""What vLLM puts before the request's id."""


class Switch:
    """Where the middleware finds the service, which is there once the engine is."""

    service: EscalationService | None = None


class EscalationMiddleware:
    """Passes everything on until ``service`` is set.

    Args:
        app: The next application inwards.
        switch: Has the service once the engine is there.

    """

    def __init__(self, app: App, switch: Switch) -> None:
        self._app = app
        self._switch = switch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._switch.service
        if service is None or not _concerns(scope):
            await self._app(scope, receive, send)
            return
        client = Client(receive, send)
        try:
            content = await client.read()
            body = _parsed(content)
            if body is None:
                await self._app(scope, client.replay(content), send)
            else:
                await _Exchange(service, self._app, scope, client, content, body).run()
        except DisconnectError:
            return
        finally:
            client.close()


class _Exchange:
    """One request and its answer."""

    def __init__(
        self,
        service: EscalationService,
        app: App,
        scope: Scope,
        client: Client,
        content: bytes,
        body: dict[str, Any],
    ) -> None:
        self._service = service
        self._app = app
        self._scope = scope
        self._client = client
        self._content = content
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = _path(scope)
        given = headers.get("x-request-id") or str(body.get("request_id", ""))
        self._id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        key = headers.get("authorization", "")
        self._request = EscalationRequest(
            request_id=self._id,
            path=path,
            body=body,
            prompt=prompt_text(body),
            headers={name: value for name, value in headers.items() if name not in _WITH_KEYS},
            tenant=hashlib.sha256(key.encode()).hexdigest()[:16] if key else "",
        )
        self._tail = b""

    async def run(self) -> None:
        service, options = self._service, self._service.options
        began = service.clock()
        try:
            choice = client_choice(self._request.body, options.client_choice)
        except ValueError as error:
            await self._refuse(str(error))
            return
        decision = await self._client.unless_gone(service.decide(self._request, choice, self._ask_here))
        outcome = service.begin(_PREFIXES[self._request.path] + self._id, decision, began)
        is_deep = decision.depth is Depth.DEEP
        settings = options.deep_settings if is_deep else options.fast_settings
        try:
            if is_deep and service.deep is not None:
                if not await self._answer_there(outcome, service.deep):
                    await self._answer_here(options.fast_settings, self._marked(outcome))
            elif is_deep or not options.escalate_stopped:
                await self._answer_here(settings, self._marked(outcome))
            else:
                await self._answer_fast_or_deep(outcome)
        finally:
            service.end(outcome, self._request, _usage(self._tail))

    def _body(self) -> dict[str, Any]:
        """The request as the client sent it: a plugin may have changed what it was shown."""
        body: dict[str, Any] = json.loads(self._content)
        return body

    async def _ask_here(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return await ask(self._app, self._scope, {**body, "stream": False}, f"{self._id}-escalation")

    async def _answer_there(self, outcome: Outcome, deep: DeepServer) -> bool:
        """Let the deep server answer; returns False where it does not."""
        body = with_settings(self._body(), self._service.options.deep_settings)
        try:
            answer = await self._client.unless_gone(deep.ask(self._request.path, body, self._id))
        except UnavailableError as error:
            self._service.fall_back(outcome, error)
            return False
        await self._pass_on(outcome, answer)
        return True

    async def _answer_fast_or_deep(self, outcome: Outcome) -> None:
        """Answer fast; where the guard stops that before the client has read anything, let the deep end answer."""
        service, options = self._service, self._service.options
        withheld = WithheldAnswer(self._marked(outcome))
        await self._answer_here(options.fast_settings, withheld.send)
        if not withheld.is_stopped:
            return
        service.escalate_stopped(outcome)
        if service.deep is None:
            await self._answer_here(options.deep_settings, self._marked(outcome))
        elif not await self._answer_there(outcome, service.deep):
            await withheld.release()

    async def _answer_here(self, settings: Mapping[str, Any], send: Send) -> None:
        content = self._content
        if settings or CHOICE in (self._request.body.get("vllm_xargs") or ()):
            content = json.dumps(with_settings(self._body(), settings)).encode()
        scope = with_body(self._scope, content, {"x-request-id": self._id})
        await self._app(scope, self._client.replay(content), send)

    def _marked(self, outcome: Outcome) -> Send:
        """The client's ``send`` for an answer of this server, whose headers say who answered and why."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_marks(outcome)]}
            elif message["type"] == "http.response.body" and message.get("body"):
                self._note(outcome, message["body"])
            await self._client.send(message)

        return send

    async def _pass_on(self, outcome: Outcome, answer: DeepAnswer) -> None:
        headers = [(name.encode(), value.encode("latin-1")) for name, value in answer.headers.items()]
        try:
            await self._client.send(
                {"type": "http.response.start", "status": answer.status, "headers": [*headers, *_marks(outcome)]}
            )
            await self._send_part(outcome, answer.first)
            while (part := await self._client.unless_gone(_next(answer.rest))) is not None:
                await self._send_part(outcome, part)
        except CutError:
            # The client has read a part, which no other answer may contradict: it is told, as vLLM tells it.
            self._service.cut(outcome)
            await self._send_part(outcome, _CUT)
        finally:
            await answer.close()
        await self._client.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_part(self, outcome: Outcome, part: bytes) -> None:
        self._note(outcome, part)
        await self._client.send({"type": "http.response.body", "body": part, "more_body": True})

    def _note(self, outcome: Outcome, part: bytes) -> None:
        self._service.first_part(outcome)
        self._tail = (self._tail + part)[-_TAIL:]

    async def _refuse(self, message: str) -> None:
        error = {"message": message, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
        content = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await self._client.send({"type": "http.response.start", "status": 400, "headers": headers})
        await self._client.send({"type": "http.response.body", "body": content, "more_body": False})


_CUT = (
    b"\n\ndata: "
    + json.dumps(
        {"error": {"message": "the deep answer was cut off", "type": "BadGatewayError", "param": None, "code": 502}}
    ).encode()
    + b"\n\ndata: [DONE]\n\n"
)


async def _next(parts: Any) -> bytes | None:
    part: bytes | None = await anext(parts, None)
    return part


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _concerns(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST" or _path(scope) not in PATHS:
        return False
    # A request that another server has escalated is answered here, so that none goes in a circle.
    return all(name.lower() != FORWARDED.encode() for name, _ in scope["headers"])


def _parsed(content: bytes) -> dict[str, Any] | None:
    """The request as JSON; None where the API server must say what is wrong with it."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _marks(outcome: Outcome) -> list[tuple[bytes, bytes]]:
    reason = outcome.reason.encode("ascii", "replace").decode()
    printable = "".join(letter if letter.isprintable() else "?" for letter in reason)
    return [(ANSWERED_BY.encode(), str(outcome.answered_by).encode()), (REASON.encode(), printable.encode())]


def _usage(tail: bytes) -> tuple[int, int] | None:
    """The numbers of tokens at the end of an answer, if it has them."""
    prompt, completion = _PROMPT_TOKENS.findall(tail), _COMPLETION_TOKENS.findall(tail)
    return (int(prompt[-1]), int(completion[-1])) if prompt and completion else None
