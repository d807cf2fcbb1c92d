"""The ``speculation`` slot: how many draft tokens each request gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vllm_instant.interfaces.experts import ExpertCount
from vllm_instant.interfaces.requests import RequestState


@dataclass(frozen=True, slots=True)
class UpcomingStep:
    """The step for which a policy sets draft budgets: drafts made at its end are verified in the next step."""

    requests: Sequence[RequestState]
    """The requests that sample a token in this step, after which drafts can follow."""
    max_draft_tokens: int
    """Maximum number of draft tokens per request; 0 in a step after which no drafter can run, because it would delay
    a request's first token."""
    num_waiting: int = 0
    """Number of requests that wait for their first step."""
    max_wait: float = 0.0
    """Waiting time of the oldest of these, in seconds."""
    number: int = 0
    """Number of the step, increasing. Its drafts are verified in the ``StepOutcome`` with ``number + 1``."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Result of one engine step, for the requests that sampled in it.

    ``requests``, ``drafted`` and ``accepted`` have one entry per request. Draft tokens that are padding or that a
    grammar cut do not count as drafted.
    """

    requests: Sequence[RequestState]
    drafted: Sequence[int]
    """Number of verified draft tokens per request."""
    accepted: Sequence[int]
    """Number of accepted draft tokens per request."""
    num_scheduled_tokens: int
    """Number of tokens of the step: prompts, decodes and drafts."""
    seconds: float
    """Duration of the step: from the previous step's output while the engine was busy, otherwise from the start of its
    scheduling. Durations sum to wall-clock time, also where asynchronous steps overlap."""
    num_scheduled_requests: int = 0
    """Number of requests in the step, including prefills."""
    number: int = 0
    """Number of the step (``UpcomingStep.number``)."""
    draft_steps: int = 0
    """Number of sequential steps of the drafter at the end of this step: the largest draft budget of any request."""
    experts: ExpertCount | None = None
    """Distinct experts in a recent step; None in most steps, which are not counted, and without an experts plugin."""
    uncached_tokens: int | None = None
    """Number of tokens that a draft model prefilled before it drafted, because it was skipped when they were computed;
    None where it is unknown."""
    trimmed: bool = False
    """Whether vLLM's adaptive verification could trim the drafts of this step. Then ``drafted`` is what was proposed;
    how many of these tokens were verified is not known."""


UNAFFORDABLE = 1e6
"""Accepted tokens that no draft is expected to bring: the cost, in a ``DraftCost``, of drafts that must not be made."""


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Cost of drafts in one step, in accepted tokens: drafting pays off if its expected accepted tokens exceed it.

    By default everything is free. Workers trim drafts with known confidence to the tokens whose expected gain exceeds
    the cost (``speculation.draft_plan.trim_drafts``).
    """

    verify_cost_curve: Sequence[tuple[int, float]] = ()
    """Cost of verification by the number of draft tokens of all requests: increasing numbers from 1, with linear
    interpolation between them."""
    per_token: float = 0.0
    """Approximate cost of verifying one draft token, for decisions before the total number is known."""
    verify_fixed: float = 0.0
    """Fixed cost of verifying any draft tokens."""
    draft_fixed: float = 0.0
    """Fixed cost of running a draft model."""
    per_draft_step: float = 0.0
    """Cost of one step of a draft model, which drafts one token for every request."""
    catch_up_fixed: float = 0.0
    """Fixed cost of prefilling the tokens that a draft model has not processed because it was skipped."""
    catch_up_per_token: float = 0.0
    """Cost per token of this prefill."""
    baseline_step: float = 0.0
    """Cost of one request's share of a step without drafts, which yields one token; 0 where it is unknown."""


@runtime_checkable
class SpeculationPolicy(Protocol):
    """Decides how many draft tokens each request gets in the next step. Runs in the engine-core process.

    The budgets of a step are usually requested one step in advance, while the model runs, so that scheduling does not
    wait for the policy. If a new request arrives, they are requested again with the same ``number``; the last result
    counts.
    """

    def get_num_draft_tokens(self, step: UpcomingStep) -> Sequence[int]:
        """Return each request's draft budget in ``0..step.max_draft_tokens``; if all are 0, the drafter is skipped."""
        ...

    def draft_cost(self) -> DraftCost:
        """Return the cost of drafts in the step of the last ``get_num_draft_tokens``. Optional; free by default."""
        return DraftCost()

    def trims_verification(self) -> bool:
        """Return whether vLLM's adaptive verification, where enabled, may trim drafts. Optional; True by default.

        Concerns the drafts of the step of the last ``get_num_draft_tokens``.
        """
        return True

    def enter(self, request: RequestState) -> None:
        """A request entered the engine; it may wait before its first step. Optional."""
        return None

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from a finished step. Optional."""
        return None

    def forget(self, request_id: str) -> None:
        """Drop the state of a request that ended or was aborted. Optional."""
        return None

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """Return the newest decisions, the oldest first, for ``vllm-instant explain``. Optional.

        A decision is a mapping of JSON types with any keys. The tools use these, all of them optional:

        * ``summary``: a dict from heading to formatted text, the decision's row in the table that ``explain`` prints;
          without it the row has the decision's own keys and values.
        * ``explanation``: one sentence about the words of the row; ``explain`` prints each sentence once.
        * ``step``, ``num_requests``, ``draft_tokens`` and ``outcome``: the step's number, its requests, their draft
          tokens, and None or what the step did (``tokens``, ``milliseconds``, ``prompt_tokens``); from these the tools
          estimate the speedup by drafts.

        Args:
            last: Maximum number of decisions.
            request_id: Return only decisions about this request, and its own figures; the id that the client saw is a
                prefix of the engine's.

        """
        return ()

    def close(self) -> None:
        """Store what the next start needs; called when the engine stops. Optional."""
        return None
