"""What a plugin of each kind implements.

A plugin is offered as a ``Plugin`` and built, in the process that its slot names, into an object that follows one of
the protocols below. Derive from the protocol: that brings the optional methods along.

Units: lengths and counts are in tokens, times in seconds. Everything runs on the hot path of a server: a method that
raises is not called again (stock vLLM behaviour takes over, see ``vllm_instant.containment``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

    from vllm_instant.verification import Verification


class PluginOptions(BaseModel):
    """Base of a plugin's own options: the rest of its slot's table in the deployment file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DrafterOptions(PluginOptions):
    """Base of the options of a drafter that a plugin implements itself."""

    num_speculative_tokens: int = Field(4, ge=1, le=128, description="Most draft tokens a request gets in one step.")


@dataclass(frozen=True, kw_only=True)
class PluginContext:
    """What a plugin may know of the engine that it is built for."""

    model: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    num_speculative_tokens: int
    """Most draft tokens a request can get in one step; 0 when the server has no drafter."""
    device: str
    """``cpu``, ``cuda``, …"""
    confident_drafts: bool = False
    """Whether the drafter says how sure it is of each token, so that ``DraftPrice`` cuts its drafts."""
    itl_slo_ms: float | None = None
    """The deployment's goal for the time between tokens, in milliseconds, if its speculation policy has one."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What timings measured in this engine depend on: device name, model, dtype, vLLM version, drafter, parallelism."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One name that a deployment file may choose for a slot.

    ``build(options, context)`` makes the object that does the work; it is None for a plugin that stands for vLLM's own
    behaviour. ``engine_arguments(options)`` returns engine arguments that the plugin needs, by vLLM's field names; the
    command line and the ``[vllm]`` table override them.
    """

    slot: str
    name: str
    summary: str
    lossy: bool = False
    """Whether it may change what the model would have answered."""
    options: type[PluginOptions] = PluginOptions
    build: Callable[[Any, PluginContext], Any] | None = None
    engine_arguments: Callable[[Any], Mapping[str, Any]] | None = None
    confident: bool = False
    """For drafters: whether their drafts say how sure they are (``Draft.confidence``)."""


# --------------------------------------------------------------------------------------------- speculation


@dataclass(slots=True)
class RequestState:
    """One request as the scheduler sees it; live, kept for the request's whole life, not to be written to."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    temperature: float
    structured_output: bool = False
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    """What the client sent as ``vllm_xargs``."""
    num_output_tokens: int = 0
    index: int = 0
    """Small, unique among the live requests, used again later: lets a policy keep its state in arrays."""
    prompt_token_ids: Sequence[int] = ()
    """Empty when the prompt came as embeddings."""
    pinned_draft_length: int | None = None
    """The draft length that its client asked for (or 0, where drafts cannot be verified), which no policy changes; None
    when the policy decides."""
    cache_salt: str = ""
    """What separates its tenant's data from that of others; empty when nothing does."""
    prompt_class: int = 0
    """The same for requests whose prompts begin alike (a system prompt): what policies group requests by."""
    arrival: float = 0.0
    """When it entered the engine, in seconds of the clock that ``QueueMoment.now`` reads."""
    num_preemptions: int = 0
    """How often it lost its KV blocks."""


@dataclass(frozen=True, slots=True)
class UpcomingStep:
    """What a speculation policy decides about: the drafts that will be verified in the step after this one."""

    requests: Sequence[RequestState]
    """Those that will have sampled a token, so that drafts can follow it."""
    max_draft_tokens: int
    """Most draft tokens a request can get."""
    num_waiting: int = 0
    """Requests that wait for their first step."""
    longest_wait: float = 0.0
    """Seconds that the oldest of them has waited."""
    number: int = 0
    """Counts up. What became of the drafts of step ``number`` is seen in the outcome with ``number + 1``."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one engine step did, for the requests that it verified drafts for or that it decoded without any.

    ``requests``, ``drafted`` and ``accepted`` have one entry a request that sampled. Drafts that vLLM only padded with
    or that a grammar cut are not counted as drafted.
    """

    requests: Sequence[RequestState]
    drafted: Sequence[int]
    accepted: Sequence[int]
    num_scheduled_tokens: int
    """All tokens of the step: prompts, decodes and drafts."""
    seconds: float
    """What the step took from the server's time: since the output of the step before it while the engine was busy,
    otherwise since its scheduling began. Sums to wall-clock time, also when asynchronous steps overlap."""
    num_scheduled_requests: int = 0
    """Requests that took part, those included that are still reading their prompt."""
    number: int = 0
    draft_passes: int = 0
    """Draft tokens that the drafter made at the end of this step, for the next: the longest length that was planned."""


@dataclass(frozen=True, slots=True)
class DraftPrice:
    """What drafts cost in one step, each in the accepted tokens that it must bring at least; all 0: everything is free.

    Workers keep of a draft whose confidence is known what is expected to bring more than it costs.
    """

    batch: Sequence[tuple[int, float]] = ()
    """What verifying so many draft tokens in all costs, at some rising numbers from 1; interpolated in between."""
    row: float = 0.0
    """The same as a rough price of each draft token, for those who decide before they know how many there will be."""
    verifying: float = 0.0
    """What comes on top when any draft is verified."""
    drafting: float = 0.0
    """Running a draft model at all."""
    draft_pass: float = 0.0
    """Each pass of a draft model, which brings one more token for every request."""


@runtime_checkable
class SpeculationPolicy(Protocol):
    """Decides how many draft tokens each request gets in the next step. Runs in the engine-core process.

    Lengths are usually asked for one step ahead, while the model runs, so that nobody waits for the policy; when a new
    request appears they are asked for again with the same ``number``, and the later answer counts.
    """

    def draft_lengths(self, step: UpcomingStep) -> Sequence[int]:
        """One length a request, each in ``0..step.max_draft_tokens``; 0 for all: the drafter does not even run."""
        ...

    def price(self) -> DraftPrice:
        """What drafts cost in the step that ``draft_lengths`` was asked for last. Optional; free by default."""
        return DraftPrice()

    def enter(self, request: RequestState) -> None:
        """A request entered the engine; it may wait before its first step. Optional."""
        return None

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from a finished step. Optional."""
        return None

    def forget(self, request_id: str) -> None:
        """The request ended or was aborted. Optional."""
        return None

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """Why the newest decisions were taken, the oldest first, as plain data for ``vllm-instant explain``. Optional.

        Args:
            last: at most so many.
            request_id: only those that concern this request (an id as the client saw it is a prefix of ours).

        """
        return ()

    def close(self) -> None:
        """The engine stops: keep what the next start should know. Optional."""
        return None


# ------------------------------------------------------------------------------------------------- drafter


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """One request that wants draft tokens."""

    request_id: str
    token_ids: npt.NDArray[np.int32]
    """Shape ``[num_tokens]``: prompt and output, the newest token last. A view; do not write to it or keep it."""
    num_prompt_tokens: int
    max_draft_tokens: int
    """At least 1."""
    cache_salt: str = ""
    """What separates tenants: requests with another one must not learn what this one says."""
    is_pinned: bool = False
    """Whether its client asked for this draft length: what the draft costs does not count."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Draft tokens with how sure the drafter is of them."""

    token_ids: Sequence[int]
    confidence: Sequence[float]
    """For each token the chance that it is accepted if those before it are, in 0..1. The speculation policy prices
    verification (``DraftPrice``), and tokens that are not expected to earn their price are cut."""


@runtime_checkable
class Drafter(Protocol):
    """Proposes draft tokens. Runs in every worker process, after each step's tokens were sampled.

    With several workers each of them must propose the same tokens: decide from the arguments, never from a clock.
    """

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Sequence[int] | Draft]:
        """For each request 0 to ``max_draft_tokens`` token ids that may come next, the nearest first."""
        ...

    def forget(self, request_id: str) -> None:
        """The request ended or was aborted. Optional."""
        return None


@dataclass(frozen=True, slots=True)
class Share:
    """What one request gets from a drafter that shares the work with a draft model."""

    own: Sequence[int] = ()
    """Draft tokens of its own; used when ``model_length`` is 0."""
    model_length: int = 0
    """How many tokens the draft model shall draft for it instead."""


@runtime_checkable
class SharingDrafter(Drafter, Protocol):
    """A drafter beside a draft model that vLLM runs: it decides for each request and step who drafts.

    A plugin is one when it brings both ``build`` and ``engine_arguments`` (which configure the draft model).
    """

    def share(self, requests: Sequence[DraftRequest], price: DraftPrice) -> Sequence[Share]:
        """One share a request. The draft model does not run when no request wants it."""
        ...

    def model_drafted(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """What the draft model then drafted, by request id: what becomes of it shows in the next ``token_ids``."""
        ...


# ----------------------------------------------------------------------------------------- rejection sampler


@runtime_checkable
class RejectionSampler(Protocol):
    """Decides which draft tokens are kept, and what follows them. Runs in every worker process."""

    def verify(self, step: Verification) -> tuple[torch.Tensor, torch.Tensor]:
        """Verify one step.

        Returns:
            int64 ``[batch]``: how many leading drafts each request keeps, in ``0..num_draft_tokens``; and int64
            ``[batch]``: the token that takes the place of the first one refused. The latter is ignored where
            every draft is kept: what follows then is sampled from the target as ever.

        """
        ...


# ------------------------------------------------------------------------------------------------ batching


@dataclass(frozen=True, slots=True)
class QueueMoment:
    """What a batching policy decides about: who waits, who runs, and how much room there is."""

    waiting: Sequence[RequestState]
    """In the order of arrival. Requests that lost their KV blocks are not among them: they always go first."""
    running: Sequence[RequestState]
    """With ``num_output_tokens`` up to date."""
    now: float
    """Seconds, monotonic."""
    most_running: int
    """Most requests that run together."""
    free_kv_tokens: int
    """Tokens for which there are free KV blocks."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Who may start."""

    order: Sequence[int] = ()
    """Indices into ``QueueMoment.waiting``, those first that shall start first; all others follow as they arrived."""
    most: int | None = None
    """At most so many start in this step; None: as many as there is room for."""


@runtime_checkable
class BatchingPolicy(Protocol):
    """Decides which waiting requests start, how much of their prompts a step reads, and who is preempted.

    Runs in the engine-core process. The order is asked for when there is room for somebody, not in every step; an
    explicit ``priority`` of the requests stands above it. With vLLM's scheduling policy ``priority``, preemption is
    vLLM's.
    """

    def admit(self, moment: QueueMoment) -> Admission:
        """Who may start now, and in which order."""
        ...

    def enter(self, request: RequestState) -> None:
        """A request begins to wait. Optional."""
        return None

    def started(self, request: RequestState, now: float) -> None:
        """A request left the queue, or came back after it had lost its KV blocks. Optional."""
        return None

    def preempted(self, request: RequestState, now: float) -> None:
        """A running request lost its KV blocks and waits again. Optional."""
        return None

    def finished(self, request: RequestState, now: float, complete: bool) -> None:
        """A request left the engine; ``complete`` says whether it ended by itself. Optional."""
        return None

    def spare(self, running: Sequence[RequestState]) -> Sequence[int] | None:
        """Indices of the running requests, those first that shall keep their KV blocks longest when blocks run out.

        None keeps vLLM's own choice, which preempts who started last. Asked only when blocks are short. Optional.
        """
        return None

    def most_prompt_tokens(self, moment: QueueMoment) -> int | None:
        """Most prompt tokens that the next step shall read beside the running requests' own; None: no limit.

        Optional.
        """
        return None

    def think(self, moment: QueueMoment) -> None:
        """Called while the model runs and nobody waits for an answer: the place for whatever takes long. Optional."""
        return None

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from a finished step. Optional."""
        return None

    def measures(self) -> Mapping[str, float]:
        """Numbers about itself, by name, for ``/metrics``. Optional."""
        return {}

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """Why the newest requests started when they did, as ``SpeculationPolicy.decisions`` does. Optional.

        For ``vllm-instant explain --queue`` a decision has ``request_id``, ``waited_ms``, ``bound_ms`` (the longest
        that it might have waited), ``expected_tokens``, ``tokens`` (None while it runs) and ``older_waiting``.
        """
        return ()

    def close(self) -> None:
        """The engine stops: keep what the next start should know. Optional."""
        return None


# ------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What one attention layer of the model computes, the same in every step."""

    num_query_heads: int
    """On this worker, as is the next."""
    num_kv_heads: int
    head_size: int
    scale: float
    """What scores are multiplied with."""
    window: int = 0
    """Each token sees only so many, itself included; 0 is all."""
    soft_cap: float = 0.0
    """``c`` if scores ``s`` become ``c * tanh(s / c)``; 0 for none."""


@dataclass(frozen=True, slots=True)
class CacheParts:
    """Views of a layer's paged cache: FP8 numbers (E4M3) with one scale a token and head, for keys and for values."""

    keys: torch.Tensor
    """``[blocks, block_size, KV heads, head_size]``, one byte each, the last dimension contiguous."""
    values: torch.Tensor
    key_scales: torch.Tensor
    """float32 ``[blocks, block_size, KV heads]``: a key is its stored number times its scale."""
    value_scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What one layer attends to in one step: causal attention of the newest tokens of some requests."""

    query: torch.Tensor
    """``[tokens, query heads, head_size]``, all requests one after another."""
    output: torch.Tensor
    """The same shape; to be written."""
    block_tables: torch.Tensor
    """int32 ``[requests or more, blocks]``."""
    lengths: torch.Tensor
    """int32 ``[requests]``, tokens in the cache, the new ones included; 0 for padding."""
    starts: torch.Tensor
    """int32 ``[requests + 1]``, the first new token of each request, and their number."""
    most_query_tokens: int
    """No request has more new tokens, also whenever a CUDA graph that is captured now is replayed."""


@runtime_checkable
class AttentionProvider(Protocol):
    """Attention over an FP8 cache whose rows it lays out. Runs in every worker process, under graph capture.

    Nothing may be read back from the device. vLLM's own kernels work on the same cache, through ``parts``: they take
    over where ``attend`` declines, and once the plugin is disabled.
    """

    def objection(self, head_size: int, dtype: torch.dtype) -> str | None:
        """Why layers of this kind cannot be served, one sentence; None if they can. Asked while the model is built."""
        ...

    def row_bytes(self, head_size: int) -> int:
        """Bytes of one token's keys and values of one KV head, with all that belongs to them."""
        ...

    def prepare(self, layer: AttentionLayer) -> None:
        """Allocate what steps need: called for each layer before any graph is captured. Optional."""
        return None

    def parts(self, cache: torch.Tensor, layer: AttentionLayer) -> CacheParts:
        """Where the parts lie in a cache ``[blocks, KV heads, block_size, row_bytes]``, in any order of strides."""
        ...

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: CacheParts, slots: torch.Tensor) -> None:
        """Quantise and write ``[tokens or more, KV heads, head_size]`` to int64 ``slots`` ``[tokens]``; -1: nowhere."""
        ...

    def attend(self, layer: AttentionLayer, cache: CacheParts, step: AttentionStep) -> bool:
        """Write ``step.output``, or return False to leave the step to vLLM's kernel."""
        ...


# -------------------------------------------------------- slots whose seams come with their first plugins


@runtime_checkable
class ExpertRouter(Protocol):
    """Decides which routed experts a batch may use. Runs in every worker process, under graph capture."""

    def mask_logits(self, layer: int, logits: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
        """The router logits, float32 ``[tokens, experts]``, with forbidden experts at -inf.

        ``is_padding`` is bool ``[tokens]``. Shapes must not depend on values, and nothing may be read back from the
        device.
        """
        ...


# ------------------------------------------------------------------------------------------ streaming prompts


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine is with requests that somebody waits for, as far as this API server knows."""

    running: int
    """Requests in the engine, waiting ones included; what is read ahead of a prompt's end is not counted."""
    max_running: int
    """Most requests that can run at once."""
    ahead: int = 0
    """Requests in the engine that nobody waits for: chunks that are read ahead, and answers begun early."""


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far a prompt that is still arriving has been read."""

    settled_tokens: int
    """Tokens so far that no later text can change: the beginning of the prompt."""
    cached_tokens: int
    """Those of them whose keys and values were computed ahead."""
    block_size: int
    """Tokens of a KV block: only whole ones are kept."""


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """One chunk that was read ahead."""

    tokens: int
    seconds: float
    """From asking the engine to its answer."""
    load: EngineLoad
    """As it was when the engine was asked."""


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """What clients with prompts that are still arriving may take."""

    sessions: int = 256
    """Open at once in one API server."""
    sessions_per_client: int = 16
    """Clients are told apart by their credentials, and by address where they have none."""
    idle_seconds: float = 300.0
    """Without an event from the client, after which its session is closed."""
    text_characters: int = 1_000_000
    """Of one prompt."""
    prefills_in_flight: int = 1
    """Chunks of all sessions that the engine reads at once."""
    token_seconds: float = 60.0
    """How long a session token can be used to open sessions."""
    demo_page: bool = False
    """Whether a page to try it is served."""


@runtime_checkable
class StreamingPrefill(Protocol):
    """Decides what is read of prompts that are still arriving, and when. Runs in the API server.

    Sessions, routes and the way into vLLM are not the plugin's: ``vllm_instant.streaming`` has them. A plugin that
    fails is not asked again; prompts are then read when they are complete.
    """

    def next_chunk(self, progress: PrefillProgress, load: EngineLoad) -> int:
        """How many tokens of the prompt shall be cached next, at most ``settled_tokens``.

        No more than ``cached_tokens`` means: nothing now. Asked again a little later, and when more text is there.
        """
        ...

    def observe(self, outcome: PrefillOutcome) -> None:
        """Learn what a chunk took. Optional."""
        return None

    def early_after(self) -> float | None:
        """Seconds without new text after which ``starts_early`` is asked; None: never. Optional."""
        return None

    def starts_early(self, load: EngineLoad) -> bool:
        """Whether to begin the answer before the client commits, as if the prompt ended here. Optional.

        It is thrown away if the prompt does not end here.
        """
        return False

    def most_early_seconds(self) -> float:
        """How long such an answer goes on when nobody commits. Optional."""
        return 1.0

    def limits(self) -> SessionLimits:
        """What clients may take; asked once. Optional."""
        return SessionLimits()
