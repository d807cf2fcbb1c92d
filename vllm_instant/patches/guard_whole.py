"""Answers that the API server puts together itself, and what the responses endpoint says of a stopped one.

Beam search asks the engine for one token at a time and decodes the best sequences at the end: its parts are no answers,
and the whole ones are judged here. The responses endpoint names no reason for an
incomplete answer but its length.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.guard.answer import GuardedAnswer
from vllm_instant.guard.window import Release, Window
from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.guard import INTERNAL, PROCESSOR_ATTRIBUTE, STOPPED, OutputGuard, is_served
from vllm_instant.patches.guard_request import CONTENT_FILTER

_BEAM_MODULE = "vllm.entrypoints.generate.beam_search.online"
_RESPONSES_MODULE = "vllm.entrypoints.openai.responses.protocol"


async def _beam_search(search: Any, mixin: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    outputs = search(*args, **kwargs)
    guard: OutputGuard | None = getattr(mixin.engine_client.output_processor, PROCESSOR_ATTRIBUTE, None)
    while True:
        # The requests of a step are made in tasks that inherit this.
        token = INTERNAL.set(guard is not None)
        try:
            output = await anext(outputs)
        except StopAsyncIteration:
            return
        finally:
            INTERNAL.reset(token)
        if guard is not None:
            for part in output.outputs:
                await _judge(guard, output, part)
        yield output


async def _judge(guard: OutputGuard, output: Any, part: Any) -> None:
    """Replace a sequence by what of it may be released."""
    service, loop = guard.service, asyncio.get_running_loop()
    strictness, verdict = service.strictness(None), asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(verdict.set)

    judgment = service.begin("answer", output.request_id, None, wake) if strictness.judges("answer") else None
    prompt = None
    if strictness.judges("prompt"):
        text = guard.prompt_text(output, output.prompt)
        prompt = guard.judge_prompt(output.request_id, text, {}, loop)
    window = Window(strictness.limits, is_streamed=False, waits_for_prompt=prompt is not None)
    answer = GuardedAnswer(service, output.request_id, window, judgment, prompt, verdict.set)
    answer.add(part.text, (), (), is_finished=True)
    release = await _released(answer, verdict, service.clock)
    if release.text == part.text and not release.is_stopped:
        return
    # A sequence is decoded as a whole: which tokens belong to the text that was taken away is not known.
    part.token_ids, part.logprobs, part.cumulative_logprob = [], None, None
    part.text = release.text
    if release.is_stopped:
        part.text += service.options.message
        part.finish_reason, part.stop_reason = CONTENT_FILTER, None


async def _released(answer: GuardedAnswer, verdict: asyncio.Event, clock: Any) -> Release:
    while (release := answer.take(is_awake=True)) is None:
        deadline = answer.deadline()
        with suppress(TimeoutError):
            await asyncio.wait_for(verdict.wait(), None if deadline is None else max(0.0, deadline - clock()))
        verdict.clear()
    return release


def _from_request(make: Any, cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    response = make(request, *args, **kwargs)
    if response.status == "completed" and _is_stopped(str(request.request_id)):
        from openai.types.responses.response import IncompleteDetails

        response.status = "incomplete"
        response.incomplete_details = IncompleteDetails(reason=CONTENT_FILTER)
    return response


def _is_stopped(request_id: str) -> bool:
    """Whether one of the engine's requests of a response, which are called ``ID_0``, ``ID_1`` …, was stopped."""
    return any(stopped.startswith(f"{request_id}_") for stopped in STOPPED)


PATCH = VllmPatch(
    name="guard_whole",
    purpose="judges answers of beam search, and names the reason of stopped responses",
    requirements=(
        HasSignature(
            "entrypoints/generate/beam_search/online.py",
            "BeamSearchOnlineMixin.beam_search",
            ("self", "prompt", "request_id", "params"),
        ),
        References(
            "entrypoints/generate/beam_search/online.py",
            "BeamSearchOnlineMixin.beam_search",
            ("create_task", "generate", "decode"),
        ),
        HasSignature("entrypoints/openai/responses/protocol.py", "ResponsesResponse.from_request", ("cls", "request")),
    ),
    slots=("guard",),
    wraps={
        f"{_BEAM_MODULE}:BeamSearchOnlineMixin.beam_search": _beam_search,
        f"{_RESPONSES_MODULE}:ResponsesResponse.from_request": _from_request,
    },
    is_wanted=lambda: is_served(deployment_env.get_deployment()),
)
