"""One request as the policies in the engine core see it; all policies share the same object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, eq=False)
class RequestState:
    """One request of the scheduler; updated in place during the request's whole life, read-only for policies.

    Two states are equal only if they are the same object, which makes comparisons of lists fast.
    """

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    """Maximum number of output tokens."""
    temperature: float
    structured_output: bool = False
    """Whether a grammar constrains the output."""
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    """The client's ``vllm_xargs``."""
    num_output_tokens: int = 0
    index: int = 0
    """Small number, unique among the live requests and reused later: an index for policies that store arrays."""
    prompt_token_ids: Sequence[int] = ()
    """Token ids of the prompt; empty for a prompt of embeddings."""
    fixed_num_draft_tokens: int | None = None
    """Number of draft tokens that the client fixed, or 0 where drafts cannot be verified; None where the policy
    decides."""
    cache_salt: str = ""
    """Salt that separates a tenant's data from that of others; empty for none."""
    prompt_group: int = 0
    """Hash of the prompt's beginning: equal for requests with the same system prompt."""
    arrival_time: float = 0.0
    """Time of arrival in seconds, on the clock of ``SchedulerSnapshot.now``."""
    num_preemptions: int = 0
    """Number of times that the request lost its KV blocks."""
