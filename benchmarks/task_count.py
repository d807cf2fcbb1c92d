"""A middleware for ``vllm serve --middleware task_count.TaskCount``: ``/soak/tasks`` answers what its process holds."""

from __future__ import annotations

import asyncio

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

PATH = "/soak/tasks"


class TaskCount:
    """Answers the number of the event loop's tasks, its own included, at ``PATH``; passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        counted = scope["type"] == "http" and scope["path"] == PATH
        app = JSONResponse({"tasks": len(asyncio.all_tasks())}) if counted else self._app
        await app(scope, receive, send)
