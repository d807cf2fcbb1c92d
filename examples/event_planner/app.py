"""Plan a party with a model: the wish is read while it is typed, and the plan fills the page field by field.

One command, from a clone with vLLM: ``python examples/event_planner/app.py``. With ``--server URL`` it uses a running
vLLM server of yours with ``[streaming]`` and ``[guard]`` in its deployment file (``deploy.toml`` is one).
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field, StringConstraints
from pydantic_core import from_json

from vllm_instant.streaming.client import StreamingError, StreamingSession

HERE = Path(__file__).resolve().parent
Line = Annotated[str, StringConstraints(min_length=1, max_length=48)]
Lines = Annotated[list[Line], Field(min_length=1, max_length=5)]


class Plan(BaseModel):
    """What the model answers with; the schema is enforced while it generates."""

    guests: Lines
    dishes: Lines
    music: Lines
    itinerary: Lines
    toasts: Lines


class Rsvp(BaseModel):
    """The answer of one guest."""

    guest: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)]
    coming: bool


SYSTEM = (
    "You plan parties. Answer with a JSON object with the lists guests, dishes, music, itinerary and toasts, "
    "each of one to five short lines, for this wish:"
)


def request_for(model: str) -> dict[str, Any]:
    """Return the body of a chat request, without the wish."""
    schema = {"name": "plan", "schema": Plan.model_json_schema(), "strict": True}
    return {
        "model": model,
        "messages": [{"role": "system", "content": SYSTEM}],
        "response_format": {"type": "json_schema", "json_schema": schema},
        "max_tokens": 700,
        "temperature": 0.7,
    }


def fields_of(text: str) -> dict[str, list[str]]:
    """Return the fields of a plan of which only the beginning has arrived."""
    try:
        found = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return {name: lines for name, lines in found.items() if name in Plan.model_fields and isinstance(lines, list)}


class Rsvps:
    """The answers of guests, in one SQLite file."""

    def __init__(self, file: str | Path) -> None:
        self._file = str(file)
        with closing(self._connect()) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS rsvps (guest TEXT PRIMARY KEY, coming INTEGER NOT NULL)")

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._file)

    def rows(self) -> list[dict[str, Any]]:
        with closing(self._connect()) as database:
            rows = database.execute("SELECT guest, coming FROM rsvps ORDER BY guest").fetchall()
        return [{"guest": guest, "coming": bool(coming)} for guest, coming in rows]

    def put(self, rsvp: Rsvp) -> None:
        with closing(self._connect()) as database, database:
            database.execute("INSERT OR REPLACE INTO rsvps VALUES (?, ?)", (rsvp.guest, rsvp.coming))

    def delete(self, guest: str) -> bool:
        with closing(self._connect()) as database, database:
            return database.execute("DELETE FROM rsvps WHERE guest = ?", (guest,)).rowcount > 0


class Typed:
    """A wish that the server reads while it is typed (``[streaming]``)."""

    def __init__(self, server: str, model: str) -> None:
        self._session = StreamingSession(server, **request_for(model))
        self._text = ""

    async def open(self) -> None:
        await self._session.__aenter__()

    async def close(self) -> None:
        await self._session.__aexit__(None, None, None)

    async def update(self, text: str) -> None:
        """Send what has changed since the last call."""
        same = 0
        while same < min(len(text), len(self._text)) and text[same] == self._text[same]:
            same += 1
        if same < len(self._text):
            await self._session.replace(same, None, text[same:])
        elif same < len(text):
            await self._session.append(text[same:])
        self._text = text

    async def answer(self, text: str) -> AsyncIterator[dict[str, Any]]:
        await self.update(text)
        async for chunk in self._session.commit():
            yield chunk


class Whole:
    """A wish that is sent when it is complete, as to any OpenAI-compatible server."""

    def __init__(self, server: str, model: str) -> None:
        self._url = f"{server.rstrip('/')}/v1/chat/completions"
        self._request = {**request_for(model), "stream": True}

    async def open(self) -> None:
        # vLLM closes an idle connection after 5 seconds, httpx leaves it after 5: a wish of that moment would be lost.
        self._client = httpx.AsyncClient(timeout=120, limits=httpx.Limits(keepalive_expiry=1))

    async def close(self) -> None:
        await self._client.aclose()

    async def update(self, text: str) -> None:
        """The server hears nothing before the end."""

    async def answer(self, text: str) -> AsyncIterator[dict[str, Any]]:
        messages = [*self._request["messages"], {"role": "user", "content": text}]
        async with self._client.stream("POST", self._url, json={**self._request, "messages": messages}) as response:
            if response.status_code != 200:
                raise StreamingError((await response.aread()).decode()[:300], "refused")
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if data and data != "[DONE]":
                    yield from_json(data)


async def plan(wish: Typed | Whole, text: str, send: Any) -> None:
    """Answer a wish: send each field as it grows, then how it ended."""
    began, first, answer, shown, reason = time.perf_counter(), None, "", {}, None
    async for chunk in wish.answer(text):
        choice = (chunk.get("choices") or [{}])[0]
        answer += (choice.get("delta") or {}).get("content") or ""
        reason = choice.get("finish_reason") or reason
        found = fields_of(answer)
        changed = {name: lines for name, lines in found.items() if lines and lines != shown.get(name)}
        if changed:
            first = first or time.perf_counter() - began
            await send({"fields": changed})
        shown = found
    await send({"done": reason, "first_field_ms": None if first is None else round(1000 * first)})


def create_app(server: str, model: str, database: str | Path, notice: str = "", wishes: Any = None) -> FastAPI:
    """Return the application; ``wishes`` replaces the classes of wishes in tests."""
    app, rsvps = FastAPI(title="Event planner"), Rsvps(database)
    kinds = wishes or {"typed": Typed, "whole": Whole}

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse((HERE / "page.html").read_text(encoding="utf-8").replace("<!-- notice -->", notice))

    @app.get("/rsvps")
    def list_rsvps() -> list[dict[str, Any]]:
        return rsvps.rows()

    @app.post("/rsvps", status_code=201)
    def put_rsvp(rsvp: Rsvp) -> list[dict[str, Any]]:
        rsvps.put(rsvp)
        return rsvps.rows()

    @app.delete("/rsvps/{guest}")
    def delete_rsvp(guest: str) -> list[dict[str, Any]]:
        if not rsvps.delete(guest):
            raise HTTPException(404, "no such guest")
        return rsvps.rows()

    @app.websocket("/wish")
    async def wish(socket: WebSocket, kind: str = "typed") -> None:
        await socket.accept()
        try:
            while True:
                await one_wish(socket, kinds.get(kind, Typed)(server, model))
        except WebSocketDisconnect:
            return
        except (StreamingError, httpx.HTTPError, OSError) as error:
            await socket.send_json({"error": str(error) or type(error).__name__})
            await socket.close()

    return app


async def one_wish(socket: WebSocket, wish: Typed | Whole) -> None:
    """Receive a wish while it is typed, and answer it at its end."""
    await wish.open()
    try:
        while "plan" not in (event := await socket.receive_json()):
            await wish.update(str(event["text"]))
        await plan(wish, str(event["plan"]), socket.send_json)
    finally:
        await wish.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--server", help="address of a running vLLM server; by default one is started with the demo model"
    )
    parser.add_argument("--model", default="demo", help="the model's name at that server")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--database", default="event_planner.sqlite")
    given = parser.parse_args()
    with ExitStack() as stack:
        server, notice = given.server, ""
        if server is None:
            server = stack.enter_context(demo_server())
            notice = "The demo model has only read program code: the schema holds, and the words are nonsense."
        app = create_app(server, given.model, given.database, notice)
        print(f"http://127.0.0.1:{given.port}")
        asyncio.run(uvicorn.Server(uvicorn.Config(app, port=given.port, log_level="warning")).serve())


class demo_server:  # noqa: N801  used as a function
    """A vLLM server with the repository's demo model and ``deploy.toml``; a context manager that gives its address."""

    def __enter__(self) -> str:
        from vllm_instant.tools.demo import assets, widen_model
        from vllm_instant.tools.measure.servers import Server

        self._folder = tempfile.TemporaryDirectory()
        target = assets.prepare(size=widen_model.MEDIUM).target
        print("Starting vLLM …")
        words = ["--plugins", "vllm_instant", "--instant-config", str(HERE / "deploy.toml")]
        self._server = Server(target, words, log=Path(self._folder.name) / "server.log")
        return self._server.__enter__().url

    def __exit__(self, *error: Any) -> None:
        self._server.__exit__(*error)
        self._folder.cleanup()


if __name__ == "__main__":
    main()
