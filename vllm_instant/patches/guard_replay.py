"""vLLM's output processor without a model: it gets the tokens that a model would have generated.

Used by ``vllm-instant verify --guard`` and by tests. Everything between the engine core and the client is vLLM's own:
detokenization, stop strings, log probabilities, parallel sampling, aborts and the queue of a request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_instant.guard.service import GuardService
from vllm_instant.patches import activation, guard


@dataclass(frozen=True, kw_only=True)
class ForcedAnswer:
    """One answer to replay."""

    token_ids: Sequence[int]
    prompt: str = "A prompt."
    kind: str = "DELTA"
    """vLLM's ``RequestOutputKind``: ``DELTA`` (streamed), ``CUMULATIVE`` or ``FINAL_ONLY`` (whole)."""
    step_sizes: Sequence[int] = (1,)
    """Tokens per step, repeated to the end: more than one where drafts were accepted."""
    stop: Sequence[str] = ()
    include_stop: bool = False
    logprobs: int | None = None
    detokenize: bool = True
    is_structured: bool = False
    abort_after: int | None = None
    """Number of steps after which the client disconnects."""
    step_seconds: float = 0.0
    extra_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Received:
    """What a client got."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprob_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    num_steps: int = 0
    """Number of steps until the answer ended for the client."""
    chunks: list[str] = field(default_factory=list)
    arrivals: list[int] = field(default_factory=list)
    """The step after which each part with text came, counted from 0."""
    times: list[float] = field(default_factory=list)
    """When the first step began, and when each part with text came, by ``time.perf_counter``."""


class ForcedEngine:
    """An output processor under a guard.

    Args:
        tokenizer: A folder with the tokenizer of a model.
        service: The guard; None for vLLM alone.

    """

    def __init__(self, tokenizer: Path, service: GuardService | None) -> None:
        from transformers import AutoTokenizer
        from vllm.v1.engine.output_processor import OutputProcessor

        activation.activate_for_replay(guard.PATCH)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.processor = OutputProcessor(self.tokenizer, log_stats=False)
        self._count = 0
        if service is not None:
            setattr(self.processor, guard.PROCESSOR_ATTRIBUTE, guard.OutputGuard(service, self.processor, None))

    async def replay(self, forced: ForcedAnswer, on_step: Callable[[], None] | None = None) -> Received:
        """Generate one answer, and return what its client got."""
        return (await self.replay_several([forced], on_step))[0]

    async def replay_several(
        self, answers: Sequence[ForcedAnswer], on_step: Callable[[], None] | None = None
    ) -> list[Received]:
        """Generate the answers of one request with ``n`` answers, in one step each."""
        from vllm.v1.engine.output_processor import RequestOutputCollector

        first = answers[0]
        self._count += 1
        name = f"forced-{self._count}"
        params = self._params(first, len(answers))
        queue = RequestOutputCollector(params.output_kind, name)
        received = [Received(times=[time.perf_counter()]) for _ in answers]
        client = asyncio.get_running_loop().create_task(_read(queue, received, first.kind == "DELTA"))
        ids = self._add(name, first, params, queue, len(answers))
        sent = [0] * len(answers)
        for step in range(10**9):
            if client.done():
                break
            if first.abort_after is not None and step >= first.abort_after:
                self.processor.abort_requests([name], internal=True)
                break
            outputs = [
                self._output(request_id, answers[i], sent, i, step)
                for i, request_id in enumerate(ids)
                if sent[i] < len(answers[i].token_ids)
            ]
            if not outputs:
                break
            self.processor.process_outputs(outputs)
            for each in received:
                each.num_steps += each.finish_reason is None
            if on_step is not None:
                on_step()
            await asyncio.sleep(first.step_seconds)
        await client
        return received

    def _params(self, forced: ForcedAnswer, n: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        return SamplingParams(
            n=n,
            max_tokens=max(1, len(forced.token_ids)),
            stop=list(forced.stop),
            include_stop_str_in_output=forced.include_stop,
            logprobs=forced.logprobs,
            detokenize=forced.detokenize,
            output_kind=RequestOutputKind[forced.kind],
            structured_outputs=StructuredOutputsParams(regex=".*") if forced.is_structured else None,
            extra_args=dict(forced.extra_args),
        )

    def _add(self, name: str, forced: ForcedAnswer, params: Any, queue: Any, n: int) -> list[str]:
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.parallel_sampling import ParentRequest

        def request(request_id: str, sampling_params: Any) -> Any:
            return EngineCoreRequest(
                request_id=request_id,
                prompt_token_ids=self.tokenizer.encode(forced.prompt),
                mm_features=None,
                sampling_params=sampling_params,
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
                external_req_id=name,
            )

        if n == 1:
            self.processor.add_request(request(name, params), forced.prompt, None, 0, queue)
            return [name]
        parent = ParentRequest(request(name, params))
        ids = []
        for index in range(n):
            child, child_params = parent.get_child_info(index)
            self.processor.add_request(request(child, child_params), forced.prompt, parent, index, queue)
            ids.append(child)
        return ids

    def _output(self, request_id: str, forced: ForcedAnswer, sent: list[int], index: int, step: int) -> Any:
        import numpy as np
        from vllm.v1.engine import EngineCoreOutput, FinishReason
        from vllm.v1.outputs import LogprobsLists

        size = max(1, forced.step_sizes[step % len(forced.step_sizes)])
        begin = sent[index]
        token_ids = list(forced.token_ids[begin : begin + size])
        sent[index] = begin + len(token_ids)
        logprobs = None
        if forced.logprobs is not None:
            chosen = np.array([[token, *([0] * forced.logprobs)] for token in token_ids])
            logprobs = LogprobsLists(chosen, np.full(chosen.shape, -1.0, np.float32), np.ones(len(token_ids), int))
        is_last = sent[index] == len(forced.token_ids)
        return EngineCoreOutput(
            request_id=request_id,
            new_token_ids=token_ids,
            new_logprobs=logprobs,
            finish_reason=FinishReason.LENGTH if is_last else None,
        )


async def _read(queue: Any, received: list[Received], is_delta: bool) -> None:
    """Read a request's queue to its end, as ``AsyncLLM.generate`` does."""
    finished = False
    while not finished:
        output = queue.get_nowait() or await queue.get()
        finished = output.finished
        for part in output.outputs:
            got = received[part.index]
            logprobs = [next(iter(position)) for position in part.logprobs or ()]
            if is_delta:
                got.text += part.text
                got.token_ids += part.token_ids
                got.logprob_token_ids += logprobs
            else:
                got.text, got.token_ids, got.logprob_token_ids = part.text, list(part.token_ids), logprobs
            got.chunks.append(part.text)
            if part.text:
                got.arrivals.append(got.num_steps)
                got.times.append(time.perf_counter())
            got.finish_reason = part.finish_reason or got.finish_reason
