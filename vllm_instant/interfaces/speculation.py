"""The ``speculation`` slot: how many draft tokens each request gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vllm_instant.interfaces.experts import ExpertCount
from vllm_instant.interfaces.requests import RequestState


@dataclass(frozen=True, slots=True)
class UpcomingStep:
    """What a speculation policy decides about: the drafts that will be verified in the step after this one."""

    requests: Sequence[RequestState]
    """Those that will have sampled a token, so that drafts can follow it."""
    max_draft_tokens: int
    """Most draft tokens a request can get."""
    num_waiting: int = 0
    """Requests that wait for their first step."""
    max_wait: float = 0.0
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
    draft_steps: int = 0
    """Draft tokens that the drafter made at the end of this step, for the next: the longest length that was planned."""
    experts: ExpertCount | None = None
    """Distinct experts that a step of late used, where an experts plugin counts them; most steps are not counted."""
    uncached_tokens: int | None = None
    """Tokens that a draft model read before it drafted, because they came while it did not run; None: not known."""


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What drafts cost in one step, each in the accepted tokens that it must bring at least; all 0: everything is free.

    Workers keep of a draft whose confidence is known what is expected to bring more than it costs.
    """

    verify_cost_curve: Sequence[tuple[int, float]] = ()
    """What verifying so many draft tokens in all costs, at some rising numbers from 1; interpolated in between."""
    per_token: float = 0.0
    """The same as a rough price of each draft token, for those who decide before they know how many there will be."""
    verify_fixed: float = 0.0
    """What comes on top when any draft is verified."""
    draft_fixed: float = 0.0
    """Running a draft model at all."""
    per_draft_step: float = 0.0
    """Each pass of a draft model, which brings one more token for every request."""
    catch_up_fixed: float = 0.0
    """What comes on top when a draft model first reads what came while it did not run,"""
    catch_up_per_token: float = 0.0
    """and each token of that."""
    baseline_step: float = 0.0
    """One request's share of a step without drafts, which brings it one token; 0 where it is not known."""


@runtime_checkable
class SpeculationPolicy(Protocol):
    """Decides how many draft tokens each request gets in the next step. Runs in the engine-core process.

    Lengths are usually asked for one step ahead, while the model runs, so that nobody waits for the policy; when a new
    request appears they are asked for again with the same ``number``, and the later answer counts.
    """

    def get_num_draft_tokens(self, step: UpcomingStep) -> Sequence[int]:
        """One length a request, each in ``0..step.max_draft_tokens``; 0 for all: the drafter does not even run."""
        ...

    def draft_cost(self) -> DraftCost:
        """What drafts cost in the step that ``get_num_draft_tokens`` was asked for last. Optional; free by default."""
        return DraftCost()

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
        """Return the newest decisions, the oldest first, for ``vllm-instant explain``. Optional.

        A decision is a mapping of JSON types with any keys. The tools use these, all of them optional:

        * ``summary``: a dict from heading to formatted text, the decision's row in the table that ``explain`` prints;
          without it the row has the decision's own keys and values.
        * ``explanation``: one sentence about the words of the row; ``explain`` prints each sentence once.
        * ``step``, ``num_requests``, ``draft_tokens`` and ``outcome``: the step's number, its requests, their draft
          tokens, and None or what the step did (``tokens``, ``milliseconds``, ``prompt_tokens``); from these the tools
          estimate the speedup that drafts bring.

        Args:
            last: Maximum number of decisions.
            request_id: Return only decisions about this request, and its own figures; the id that the client saw is a
                prefix of the engine's.

        """
        return ()

    def close(self) -> None:
        """The engine stops: keep what the next start should know. Optional."""
        return None
