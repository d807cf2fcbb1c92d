"""Withhold answers in vLLM's output processor until the guard has judged them.

``RequestState.make_request_output`` is the one place through which text, token ids and log probabilities of a request
leave for the client: streamed or whole, chat, completions or responses, one or several answers, by ``AsyncLLM`` or
``LLM``, with the V1 and the V2 model runner, also where an abort ends the answer. Here it returns only what was judged.
A verdict that comes between two steps releases text by itself. Answers of beam search are put together by the API
server (``patches.guard_whole``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.resolved import plugin_options
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.guard.answer import GuardedAnswer
from vllm_instant.guard.judgment import PromptJudgment
from vllm_instant.guard.metrics import GuardMetrics
from vllm_instant.guard.service import GuardService
from vllm_instant.guard.strictness import KEYS, Strictness, strictness_of
from vllm_instant.guard.window import Window
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.guard import GuardOptions
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.guard_request import GuardedRequest, TokenText
from vllm_instant.patches.names import ASYNC_LLM, INPUT_PROCESSOR, LLM_ENGINE, OUTPUT_PROCESSOR
from vllm_instant.patches.plugin_factory import build_guarded, context_of

PROCESSOR_ATTRIBUTE = "instant_guard"
"""On an OutputProcessor: its ``OutputGuard``. On a RequestState: its ``GuardedRequest``."""
INTERNAL: ContextVar[bool] = ContextVar("instant_guard_internal", default=False)
"""Whether requests are parts of an answer that is judged as a whole elsewhere."""
STOPPED: deque[str] = deque(maxlen=4096)
"""The ids of the newest requests of this process that the guard has ended."""
PREFILL_PREFIX = "instant-prefill-"
"""The ids of requests that prefill a prompt while it is typed (``patches.streaming``)."""


def is_served(deployment: Deployment | None) -> bool:
    """Whether a deployment has a guard; decided from the plugin's name alone, because every process asks."""
    return deployment is not None and deployment.slots["guard"].plugin != SLOTS["guard"].default


def service_of(engine_client: Any) -> GuardService | None:
    """The guard of an API server, if it has one."""
    guard: OutputGuard | None = getattr(getattr(engine_client, "output_processor", None), PROCESSOR_ATTRIBUTE, None)
    return guard.service if guard is not None else None


class OutputGuard:
    """The guard of one output processor.

    Args:
        service: Judges texts.
        processor: vLLM's ``OutputProcessor``.
        abort: Aborts requests in the engine between two steps; None where only the next step can.

    """

    def __init__(self, service: GuardService, processor: Any, abort: Callable[[list[str]], Any] | None) -> None:
        self.service = service
        self.processor = processor
        self._abort = abort
        self._stopped: list[Any] = []
        self._running: list[str] = []  # requests that the guard has ended and the engine has not
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------- new requests

    def begin(self, core_request: Any, state: Any, prompt: str | None) -> None:
        """Judge a request's prompt, and its answer from its first token on."""
        params = core_request.sampling_params
        extra_args: Mapping[str, Any] = params.extra_args or {}
        strictness = self.service.strictness(extra_args)
        request = GuardedRequest(self, state, _running_loop())
        is_structured = params.structured_outputs is not None
        judgment = None
        if strictness.judges("answer"):
            judgment = self.service.begin("answer", state.external_req_id, extra_args, request.wake, is_structured)
        shared = self._prompt_of(state, strictness, extra_args, prompt, request.loop)
        window = Window(
            strictness.limits,
            is_streamed=state.output_kind.name != "FINAL_ONLY",
            is_structured=is_structured,
            waits_for_prompt=shared is not None,
        )
        text = TokenText(core_request, state, self.processor.tokenizer)
        answer = GuardedAnswer(self.service, state.external_req_id, window, judgment, shared, request.update)
        request.start(answer, text, "" if is_structured else self.service.options.message)
        setattr(state, PROCESSOR_ATTRIBUTE, request)
        if shared is not None and shared.is_settled and request.loop is not None:
            # After the engine has got the request, so that it can be told to abort it.
            request.loop.call_soon(request.update)

    def _prompt_of(
        self,
        state: Any,
        strictness: Strictness,
        extra_args: Mapping[str, Any],
        prompt: str | None,
        loop: asyncio.AbstractEventLoop | None,
    ) -> PromptJudgment | None:
        """The judgment of a prompt, which all answers to it share."""
        if not strictness.judges("prompt"):
            return None
        parent = state.parent_req
        shared: PromptJudgment | None = getattr(parent, PROCESSOR_ATTRIBUTE, None)
        if shared is None:
            text = self.prompt_text(state, prompt)
            shared = self.judge_prompt(state.external_req_id, text, extra_args, loop)
            if parent is not None:
                setattr(parent, PROCESSOR_ATTRIBUTE, shared)
        return shared

    def prompt_text(self, state: Any, prompt: str | None) -> str:
        if prompt is None and state.prompt_token_ids is not None:
            return str(self.processor.tokenizer.decode(state.prompt_token_ids))
        return prompt or ""

    def judge_prompt(
        self,
        request_id: str,
        text: str,
        extra_args: Mapping[str, Any],
        loop: asyncio.AbstractEventLoop | None,
        is_finished: bool = True,
    ) -> PromptJudgment:
        """Begin to judge a prompt, or continue what was judged while it was typed."""
        kept = self.service.take_typed(text)
        if kept is not None:
            read, prompt = kept
        else:
            read, prompt = "", self._new_prompt(request_id, extra_args, loop)
        prompt.judgment.add(text[len(read) :], (), is_finished)
        _judge_in_parts(prompt, loop)
        if not is_finished:
            self.service.remember_typed(text, prompt)
        return prompt

    def _new_prompt(
        self, request_id: str, extra_args: Mapping[str, Any], loop: asyncio.AbstractEventLoop | None
    ) -> PromptJudgment:
        found: list[PromptJudgment] = []

        def look_again() -> None:
            if found:
                _judge_in_parts(found[0], loop)

        def wake() -> None:
            # Without a loop the answers ask for the verdict themselves.
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(look_again)

        found.append(PromptJudgment(self.service.begin("prompt", request_id, extra_args, wake)))
        return found[0]

    # ------------------------------------------------------------------------------------- ends

    def stopped(self, state: Any, is_between_steps: bool) -> None:
        """An answer was ended by the guard; the engine must not continue it."""
        self._stopped.append(state)
        STOPPED.append(state.external_req_id)
        if not is_between_steps:
            return  # vLLM may free the request itself before ``process_outputs`` returns
        self._free()
        if self._abort is not None and self._running:
            task = asyncio.get_running_loop().create_task(_awaited(self._abort(self.take_running())))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def take_running(self) -> list[str]:
        """Free the requests that the guard has ended, and return the ids that the engine must abort."""
        self._free()
        running, self._running = self._running, []
        return running

    def _free(self) -> None:
        stopped, self._stopped = self._stopped, []
        for state in stopped:
            if self.processor.request_states.get(state.request_id) is state:
                self.processor.lora_states.request_finished(state.request_id, state.lora_name)
                self.processor._finish_request(state)
                self._running.append(state.request_id)


async def _awaited(result: Any) -> None:
    await result


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _judge_in_parts(prompt: PromptJudgment, loop: asyncio.AbstractEventLoop | None) -> None:
    """Judge a prompt; a long one in parts, between which the event loop serves other requests."""
    while prompt.step():
        if loop is not None:
            loop.call_soon(_judge_in_parts, prompt, loop)
            return


# ------------------------------------------------------------------------------------------- wrappers


def _build(vllm_config: Any) -> GuardService | None:
    deployment = deployment_env.get_deployment()
    if deployment is None or not is_served(deployment):
        return None
    if vllm_config.model_config.skip_tokenizer_init:
        raise ValueError("[guard] judges text, and --skip-tokenizer-init leaves none: remove one of them")
    guarded = build_guarded("guard", deployment, context_of(vllm_config, deployment))
    if guarded is None:
        return None
    options = plugin_options(deployment, "guard")
    if not isinstance(options, GuardOptions):
        raise ValueError(f"[guard] plugin = {guarded.plugin!r} must derive its options from GuardOptions")
    return GuardService(guarded, options, GuardMetrics(guarded.plugin))


def _options() -> GuardOptions | None:
    deployment = deployment_env.get_deployment()
    options = plugin_options(deployment, "guard") if deployment is not None else None
    return options if isinstance(options, GuardOptions) else None


def _init_async(init: Any, engine: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    service = _build(vllm_config)  # before the model is loaded
    init(vllm_config, *args, **kwargs)
    if service is not None:
        guard = OutputGuard(service, engine.output_processor, engine.engine_core.abort_requests_async)
        setattr(engine.output_processor, PROCESSOR_ATTRIBUTE, guard)


def _init_sync(init: Any, engine: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    service = _build(vllm_config)
    init(vllm_config, *args, **kwargs)
    if service is not None:
        guard = OutputGuard(service, engine.output_processor, None)
        setattr(engine.output_processor, PROCESSOR_ATTRIBUTE, guard)


def _process_inputs(
    process: Any, processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    from vllm.exceptions import VLLMValidationError

    extra_args = getattr(params, "extra_args", None)
    if extra_args and not KEYS.isdisjoint(extra_args) and (options := _options()) is not None:
        try:
            strictness_of(options, extra_args)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    is_embedded = isinstance(prompt, dict) and prompt.get("type") == "embeds"
    if is_embedded and (options := _options()) is not None and options.side != "answer":
        raise VLLMValidationError(
            "prompts of embeddings cannot be judged: they are not served with a guard over prompts"
        )
    if kwargs.get("resumable"):
        raise VLLMValidationError("requests whose prompt is streamed into the engine are not served with a guard")
    return process(request_id, prompt, params, *args, **kwargs)


def _add_request(
    add: Any, processor: Any, request: Any, prompt: Any, parent_req: Any = None, *args: Any, **kwargs: Any
) -> None:
    add(request, prompt, parent_req, *args, **kwargs)
    guard: OutputGuard | None = getattr(processor, PROCESSOR_ATTRIBUTE, None)
    if guard is None or request.sampling_params is None or INTERNAL.get():
        return
    state = processor.request_states[request.request_id]
    if request.external_req_id.startswith(PREFILL_PREFIX):
        # Its one token is discarded; its prompt is the beginning of one that is still typed.
        if guard.service.options.side != "answer":
            text = guard.prompt_text(state, prompt)
            guard.judge_prompt(request.external_req_id, text, {}, _running_loop(), is_finished=False)
        return
    guard.begin(request, state, prompt)


def _process_outputs(process: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    result = process(*args, **kwargs)
    guard: OutputGuard | None = getattr(processor, PROCESSOR_ATTRIBUTE, None)
    if guard is not None:
        result.reqs_to_abort.extend(guard.take_running())
    return result


def _make_request_output(
    make: Any,
    state: Any,
    new_token_ids: Any,
    pooling_output: Any,
    finish_reason: Any,
    stop_reason: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    request: GuardedRequest | None = getattr(state, PROCESSOR_ATTRIBUTE, None)
    if request is None or pooling_output is not None:
        return make(new_token_ids, pooling_output, finish_reason, stop_reason, *args, **kwargs)
    return request.on_output(make, new_token_ids, finish_reason, stop_reason, args, kwargs)


def _new_completion_output(new: Any, state: Any, token_ids: Any, finish_reason: Any, stop_reason: Any) -> Any:
    request: GuardedRequest | None = getattr(state, PROCESSOR_ATTRIBUTE, None)
    if request is None:
        return new(token_ids, finish_reason, stop_reason)
    return request.completion_output(new([], finish_reason, stop_reason))


_OUTPUT = "v1/engine/output_processor.py"
_STATE = f"{OUTPUT_PROCESSOR}:RequestState"

PATCH = VllmPatch(
    name="guard",
    purpose="withholds answers until they are judged",
    requirements=(
        HasSignature(
            _OUTPUT,
            "RequestState.make_request_output",
            ("self", "new_token_ids", "pooling_output", "finish_reason", "stop_reason"),
        ),
        HasSignature(
            _OUTPUT,
            "RequestState._new_completion_output",
            ("self", "token_ids", "finish_reason", "stop_reason"),
            exact=True,
        ),
        HasSignature(_OUTPUT, "OutputProcessor.add_request", ("self", "request", "prompt", "parent_req")),
        HasSignature(_OUTPUT, "OutputProcessor.process_outputs", ("self", "engine_core_outputs")),
        HasSignature(_OUTPUT, "OutputProcessor._finish_request", ("self", "req_state"), exact=True),
        References(_OUTPUT, "OutputProcessor.process_outputs", ("make_request_output", "put", "update")),
        References(_OUTPUT, "OutputProcessor.abort_requests", ("make_request_output",)),
        References(_OUTPUT, "OutputProcessor.__init__", ("lora_states", "request_states", "tokenizer")),
        HasAttribute("v1/engine/detokenizer.py", "BaseIncrementalDetokenizer.decode_next"),
        HasSignature(
            "v1/engine/detokenizer.py", "IncrementalDetokenizer.from_new_request", ("cls", "tokenizer", "request")
        ),
        References(
            "v1/engine/detokenizer.py", "BaseIncrementalDetokenizer.update", ("decode_next", "output_text", "token_ids")
        ),
        HasSignature("v1/engine/async_llm.py", "AsyncLLM.__init__", ("self", "vllm_config")),
        HasSignature("v1/engine/llm_engine.py", "LLMEngine.__init__", ("self", "vllm_config")),
        HasSignature(
            "v1/engine/input_processor.py", "InputProcessor.process_inputs", ("self", "request_id", "prompt", "params")
        ),
        HasAttribute("config/model.py", "ModelConfig.skip_tokenizer_init"),
        HasAttribute("exceptions.py", "VLLMValidationError"),
    ),
    slots=("guard",),
    wraps={
        f"{ASYNC_LLM}:AsyncLLM.__init__": _init_async,
        f"{LLM_ENGINE}:LLMEngine.__init__": _init_sync,
        f"{INPUT_PROCESSOR}:InputProcessor.process_inputs": _process_inputs,
        f"{OUTPUT_PROCESSOR}:OutputProcessor.add_request": _add_request,
        f"{OUTPUT_PROCESSOR}:OutputProcessor.process_outputs": _process_outputs,
        f"{_STATE}.make_request_output": _make_request_output,
        f"{_STATE}._new_completion_output": _new_completion_output,
    },
    is_wanted=lambda: is_served(deployment_env.get_deployment()),
)
