"""Scheduling policies in vLLM's scheduler: the admission order, the preemption order, and the prompt tokens per step.

A mixin for both of vLLM's schedulers (``patches.scheduler`` combines it with the draft budget). vLLM's own admission
loop runs unchanged over this package's queue (``patches.waiting_queue``), so that LoRA limits, structured output, KV
connectors, streaming sessions and pauses work as before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_instant.deployment import deployment_env
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.scheduling import Admission, SchedulerSnapshot
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.plugin_factory import build_guarded, context_of
from vllm_instant.patches.waiting_queue import InstantQueue
from vllm_instant.scheduling.admission import AdmissionController
from vllm_instant.scheduling.request_registry import LazyRequestStates, RequestRegistry

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

MIN_FREE_BLOCKS_PER_REQUEST = 2
"""With fewer free KV blocks per running request, preemptions are near and the preemption order matters."""
MIN_MIN_P = 1e-5
"""vLLM ignores smaller values of ``min_p`` (``_SAMPLING_EPS``)."""


def needs_no_drafts(sampling: Any) -> bool:
    """Whether vLLM's rejection sampler cannot verify drafts for these ``SamplingParams``; None counts as no."""
    return sampling is not None and (sampling.min_p > MIN_MIN_P or bool(sampling.logit_bias))


def forbids_drafts(sampling: Any) -> bool:
    """Whether a step with such a request cannot verify drafts of any request; None counts as no.

    vLLM's rejection sampler takes the log probabilities of the whole vocabulary from the ordinary sampler, which
    returns those of ``logprob_token_ids`` instead.
    """
    return sampling is not None and bool(sampling.logprob_token_ids)


class LiveRequestsMixin:
    """One ``RequestState`` per request for all policies; precedes vLLM's scheduler in the bases of a class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.instant_requests = RequestRegistry()
        super().__init__(*args, **kwargs)

    def instant_state(self, request: Request) -> RequestState:
        """The request's state, made on the first call."""
        state = self.instant_requests.states.get(request.request_id)
        if state is None:
            sampling = request.sampling_params
            state = RequestState(
                request_id=request.request_id,
                num_prompt_tokens=request.num_prompt_tokens,
                max_tokens=request.max_tokens,
                temperature=sampling.temperature if sampling is not None else 0.0,
                structured_output=request.use_structured_output,
                extra_args=(sampling.extra_args if sampling is not None else None) or {},
                num_output_tokens=request.num_output_tokens,
                prompt_token_ids=request.prompt_token_ids or (),
                cache_salt=request.cache_salt or "",
                fixed_num_draft_tokens=0 if needs_no_drafts(sampling) else None,
            )
            self.instant_requests.admit(state)
        return state

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.instant_requests.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]


class BatchingMixin(LiveRequestsMixin):
    """Serves the ``batching`` slot."""

    # Attributes of the vLLM base class.
    vllm_config: Any
    scheduler_config: Any
    kv_cache_manager: Any
    policy: Any
    running: list[Any]
    waiting: Any
    requests: dict[str, Any]
    block_size: int
    max_num_active_reqs: int
    max_num_scheduled_tokens: int
    num_spec_tokens: int
    num_waiting_for_streaming_input: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instant_batching: AdmissionController | None = None
        self.instant_queue: InstantQueue | None = None
        deployment = deployment_env.get_deployment()
        if deployment is None:
            return
        policy = build_guarded("batching", deployment, context_of(self.vllm_config, deployment))
        if policy is None:
            return
        self.instant_batching = AdmissionController(policy)
        self._instant_by_priority = self.policy.value == "priority"
        self.waiting = self.instant_queue = InstantQueue(
            self._instant_admit,
            running=lambda: len(self.running),
            has_room=lambda: len(self.running) + self.num_waiting_for_streaming_input < self.max_num_active_reqs,
            state_of=self.instant_state,
            by_priority=self._instant_by_priority,
        )

    def add_request(self, request: Request) -> None:
        """Let the policy know a new request before the base class puts it into the queue."""
        if self.instant_batching is not None and request.request_id not in self.requests:
            self.instant_batching.enter(self.instant_state(request))
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Let vLLM schedule with the policy's queue, preemption order and limit of prompt tokens."""
        queue, batching = self.instant_queue, self.instant_batching
        if queue is None or batching is None:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if (
            batching.orders_preemption
            and free < MIN_FREE_BLOCKS_PER_REQUEST * len(self.running)
            and not self._instant_by_priority
        ):
            self._sort_by_preemption(batching)
        whole = self.max_num_scheduled_tokens, self.scheduler_config.long_prefill_token_threshold
        if batching.limits_prompts and self.running:
            self._limit_prompts(batching)
        queue.begin()
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            queue.end()
            self.max_num_scheduled_tokens, self.scheduler_config.long_prefill_token_threshold = whole
        for request_id in (
            *(new.req_id for new in output.scheduled_new_reqs),
            *output.scheduled_cached_reqs.resumed_req_ids,
        ):
            queue.started(request_id)
            oldest = queue.oldest()
            state = self.instant_state(self.requests[request_id])
            batching.started(state, state.arrival_time if oldest is None else self.instant_state(oldest).arrival_time)
        return output

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if self.instant_batching is not None:
            self.instant_batching.preempted(self.instant_state(request))
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.instant_batching is not None and self.instant_queue is not None:
            state = self.instant_state(request)
            state.num_output_tokens = request.num_output_tokens
            self.instant_batching.finished(state, _is_complete(request))
            self.instant_queue.started(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _instant_admit(self, waiting: Sequence[RequestState]) -> Admission:
        batching = self.instant_batching
        return Admission() if batching is None else batching.admit(self._snapshot(waiting))

    def instant_background_work(self) -> None:
        """Called while the model runs."""
        batching, queue = self.instant_batching, self.instant_queue
        if batching is not None and queue is not None and batching.has_background_work:
            batching.on_model_executing(self._snapshot(queue.states()))

    def _running_states(self) -> LazyRequestStates:
        """The states of the running requests; their output tokens are updated when they are read."""
        running, states = self.running, self.instant_requests.states

        def gather() -> list[RequestState]:
            found = []
            for request in running:
                state = states[request.request_id]
                state.num_output_tokens = len(request.output_token_ids)
                found.append(state)
            return found

        return LazyRequestStates(len(running), gather)

    def _snapshot(self, waiting: Sequence[RequestState]) -> SchedulerSnapshot:
        return SchedulerSnapshot(
            waiting,
            self._running_states(),
            time.monotonic(),
            self.max_num_active_reqs,
            self.kv_cache_manager.block_pool.get_num_free_blocks() * self.block_size,
        )

    def _sort_by_preemption(self, batching: AdmissionController) -> None:
        """Sort the running requests: vLLM preempts from the end of the list."""
        order = batching.preemption_order(self._running_states())
        if order is not None:
            self.running = [self.running[place] for place in order]

    def _limit_prompts(self, batching: AdmissionController) -> None:
        """Limit the step's token budget to the decoding requests' tokens plus the policy's limit of prompt tokens.

        Decoding requests are always scheduled: vLLM serves the list of running requests first, and the limit on one
        prompt keeps it from taking the tokens of the requests behind it.
        """
        reading = sum(request.is_prefill_chunk for request in self.running)
        if not reading and not len(self.waiting):
            return
        limit = batching.max_prompt_tokens(self._snapshot(()))
        if limit is None:
            return
        # vLLM pads a one-token prompt (a full prefix-cache hit) to 1 + K rows: with less room it never starts, and a
        # lower threshold per prompt breaks vLLM's assertion on these rows.
        limit = max(limit, 1 + self.num_spec_tokens)
        decoding = sum(
            request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
            for request in self.running
            if not request.is_prefill_chunk
        )
        self.max_num_scheduled_tokens = min(self.max_num_scheduled_tokens, decoding + limit)
        cap = self.scheduler_config.long_prefill_token_threshold
        self.scheduler_config.long_prefill_token_threshold = min(cap, limit) if cap > 0 else limit


def _is_complete(request: Any) -> bool:
    """Whether an answer ended by itself; the front end ends those at a stop string by aborting them."""
    name = request.status.name
    if name in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION"):
        return True
    sampling = request.sampling_params
    return name == "FINISHED_ABORTED" and sampling is not None and bool(sampling.stop)


_SCHEDULER = "v1/core/sched/scheduler.py"
_QUEUE = "v1/core/sched/request_queue.py"

PATCH = VllmPatch(
    name="admission",
    purpose="the order of waiting requests",
    requirements=(
        HasSignature(_SCHEDULER, "Scheduler.schedule", ("self",)),
        HasSignature(_SCHEDULER, "Scheduler.add_request", ("self", "request"), exact=True),
        HasSignature(_SCHEDULER, "Scheduler._preempt_request", ("self", "request")),
        HasSignature(_SCHEDULER, "Scheduler._free_request", ("self", "request")),
        References(
            _SCHEDULER,
            "Scheduler.__init__",
            ("waiting", "running", "policy", "max_num_active_reqs", "num_waiting_for_streaming_input", "block_size"),
        ),
        References(
            _SCHEDULER,
            "Scheduler.schedule",
            ("peek_request", "pop_request", "prepend_requests", "max_num_scheduled_tokens", "is_prefill_chunk"),
        ),
        References(_SCHEDULER, "Scheduler.schedule", ("long_prefill_token_threshold", "max_num_active_reqs")),
        HasSignature(_QUEUE, "RequestQueue.add_request", ("self", "request"), exact=True),
        HasSignature(_QUEUE, "RequestQueue.pop_request", ("self",), exact=True),
        HasSignature(_QUEUE, "RequestQueue.peek_request", ("self",), exact=True),
        HasSignature(_QUEUE, "RequestQueue.prepend_request", ("self", "request"), exact=True),
        HasSignature(_QUEUE, "RequestQueue.prepend_requests", ("self", "requests"), exact=True),
        HasSignature(_QUEUE, "RequestQueue.remove_request", ("self", "request"), exact=True),
        HasSignature(_QUEUE, "RequestQueue.remove_requests", ("self", "requests"), exact=True),
        HasAttribute("v1/core/sched/output.py", "SchedulerOutput.scheduled_new_reqs"),
        HasAttribute("v1/core/sched/output.py", "CachedRequestData.resumed_req_ids"),
        HasSignature("v1/core/block_pool.py", "BlockPool.get_num_free_blocks", ("self",), exact=True),
        References("v1/request.py", "Request.__init__", ("num_preemptions", "num_output_placeholders", "priority")),
    ),
    slots=("batching",),
)
