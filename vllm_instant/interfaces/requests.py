"""One request as the policies in the engine core see it; all of them see the same object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, eq=False)
class RequestState:
    """One request as the scheduler sees it; live, kept for the request's whole life, not to be written to.

    Two of them are equal when they are the same object, so that lists of them are compared quickly.
    """

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
    fixed_num_draft_tokens: int | None = None
    """The draft length that its client asked for (or 0, where drafts cannot be verified), which no policy changes; None
    when the policy decides."""
    cache_salt: str = ""
    """What separates its tenant's data from that of others; empty when nothing does."""
    prompt_group: int = 0
    """The same for requests whose prompts begin alike (a system prompt): what policies group requests by."""
    arrival_time: float = 0.0
    """When it entered the engine, in seconds of the clock that ``SchedulerSnapshot.now`` reads."""
    num_preemptions: int = 0
    """How often it lost its KV blocks."""
