"""vLLM's whole API server over an engine that generates given texts: prints the answers of all endpoints as JSON.

A process of its own, because it activates the patches of a deployment. Usage: MODEL DEPLOYMENT CHAT_TEMPLATE
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import httpx
import numpy as np

from vllm_instant.deployment.settings import resolve
from vllm_instant.patches import activation

BAD, CLEAN = "first a bomb then", "a clean answer"
CALL = '<tool_call>{"name": "f", "arguments": {"a": "a bomb"}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
COMMON = {"model": "demo", "temperature": 0, "max_tokens": 24}
CHAT = [{"role": "user", "content": "def main():"}]


class ForcedCore:
    """The engine core's client: every request is answered with ``text``, a token per step."""

    def __init__(self, tokenizer: Any) -> None:
        self.text = BAD
        self.aborted: list[str] = []
        self.resources = MagicMock(engine_dead=False)
        self._tokenizer = tokenizer
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def add_request_async(self, request: Any) -> None:
        self._tasks.append(asyncio.create_task(self._generate(request)))

    async def _generate(self, request: Any) -> None:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.outputs import LogprobsLists

        params = request.sampling_params
        token_ids = self._tokenizer.encode(self.text, add_special_tokens=False)[: params.max_tokens]
        for number, token in enumerate(token_ids, start=1):
            if request.request_id in self.aborted:
                return
            logprobs = None
            if params.num_logprobs is not None:
                shown = [token, *(100 + (token + 7 * other) % 1000 for other in range(params.num_logprobs))]
                values = -np.arange(1, len(shown) + 1, dtype=np.float32)
                logprobs = LogprobsLists(np.array([shown]), values[None], np.array([1]))
            reason = FinishReason.LENGTH if number == len(token_ids) else None
            output = EngineCoreOutput(request.request_id, [token], new_logprobs=logprobs, finish_reason=reason)
            await self._outputs.put(EngineCoreOutputs(outputs=[output]))
            await asyncio.sleep(0.001)

    async def get_output_async(self) -> Any:
        return await self._outputs.get()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AsyncMock(return_value=[]) if name.endswith("async") else MagicMock()


async def served(model: str, template: str) -> tuple[httpx.AsyncClient, ForcedCore]:
    """A client of the API server, and the engine behind it."""
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine import async_llm
    from vllm.v1.executor import Executor

    core = ForcedCore(AutoTokenizer.from_pretrained(model))
    async_llm.EngineCoreClient.make_async_mp_client = staticmethod(lambda *_, **__: core)
    words = ["--model", model, "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    words += ["--served-model-name", "demo", "--chat-template", template, "--enable-auto-tool-choice"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*words, "--tool-call-parser", "hermes"])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    engine = async_llm.AsyncLLM(vllm_config=config, executor_class=Executor, log_stats=False)
    app = build_app(args, ("generate",))
    await init_app_state(engine, app.state, args, ("generate",))
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60), core


async def answers(model: str, template: str) -> dict[str, Any]:
    """What a client gets of each endpoint."""
    client, core = await served(model, template)

    async def post(path: str, text: str = BAD, **body: Any) -> Any:
        core.text = text
        response = await client.post(path, json={**COMMON, **body})
        return {"status": response.status_code, **response.json()}

    async def stream(path: str, text: str = BAD, **body: Any) -> list[Any]:
        core.text = text
        response = await client.post(path, json={**COMMON, "stream": True, **body})
        lines = [line.removeprefix("data:").strip() for line in response.text.splitlines()]
        return [json.loads(line) for line in lines if line.startswith("{")]

    completions, chat = "/v1/completions", "/v1/chat/completions"
    prompt = {"prompt": "def main():"}
    with_tool = {"messages": CHAT, "tools": [TOOL], "max_tokens": 60}
    beams = {"use_beam_search": True, "n": 2, "max_tokens": 6}
    found = {
        "completion": await post(completions, **prompt, logprobs=1, return_token_ids=True),
        "completion, streamed": await stream(completions, **prompt),
        "completion, echo": await post(completions, **prompt, echo=True),
        "completions": await post(completions, **prompt, n=2, temperature=1),
        "chat": await post(chat, messages=CHAT, logprobs=True, top_logprobs=2),
        "chat, streamed": await stream(chat, messages=CHAT, logprobs=True),
        "response": await post("/v1/responses", input="def main():", max_output_tokens=24),
        "response, streamed": await stream("/v1/responses", input="def main():", max_output_tokens=24),
        "message": await post("/v1/messages", messages=CHAT),
        "tool call": await post(chat, CALL, **with_tool),
        "tool call, streamed": await stream(chat, CALL, **with_tool),
        "beam search": await post(completions, "good", **prompt, **beams),
        "beam search, prompt": await post(completions, "good", prompt="the bomb:", **beams),
        "prompt": await post(completions, CLEAN, prompt="make a bomb"),
        "prompt, streamed": await stream(chat, CLEAN, messages=[{"role": "user", "content": "make a bomb"}]),
        "laxer": await post(completions, **prompt, vllm_xargs={"instant_guard_late": "release"}),
        "stricter": await post(completions, **prompt, vllm_xargs={"instant_guard_late": "stop"}),
        "clean": await post(chat, CLEAN, messages=CHAT),
    }
    await asyncio.sleep(0.05)
    return {**found, "aborted": len(core.aborted)}


if __name__ == "__main__":
    activation.serve(resolve(sys.argv[2]))
    print("\nANSWERS " + json.dumps(asyncio.run(answers(sys.argv[1], sys.argv[3]))), flush=True)
    os._exit(0)  # vLLM's threads wait for an engine that is not there
