"""``similarity`` with a goal for the inter-token latency (ITL): limits the prompt tokens per step to keep it."""

from __future__ import annotations

from typing import Any

from vllm_instant import SchedulerSnapshot, StepOutcome
from vllm_instant_plugins.similarity.cost_model import LinearCostModel
from vllm_instant_plugins.similarity.policy import SECONDS_PER_PROMPT_TOKEN, SECONDS_PER_TOKEN, SimilarityPolicy

MIN_PROMPT_TOKENS = 16
MIN_OBSERVED_STEPS = 10


class ItlChunkingPolicy(SimilarityPolicy):
    """Limits the prompt tokens of a step with running requests by the predicted time of the step.

    Args:
        max_num_seqs: maximum number of requests that run at once.
        itl_seconds: goal for the time between tokens.
        **options: of ``SimilarityPolicy``.

    """

    def __init__(self, max_num_seqs: int, itl_seconds: float, **options: Any) -> None:
        super().__init__(max_num_seqs, **options)
        self.step_time = LinearCostModel([SECONDS_PER_TOKEN / 2, SECONDS_PER_TOKEN / 8, SECONDS_PER_PROMPT_TOKEN])
        """Seconds of a step: constant, per decoded or verified token, per prompt token."""
        self._itl_seconds = itl_seconds

    def max_prompt_tokens(self, snapshot: SchedulerSnapshot) -> int | None:
        """The number of prompt tokens that keeps the goal, at least ``MIN_PROMPT_TOKENS`` so that prompts progress."""
        num_decoding = sum(state.num_output_tokens > 0 for state in snapshot.running)
        if not num_decoding or self.step_time.num_observations < MIN_OBSERVED_STEPS:
            return None
        fixed, per_decode_token, per_prompt_token = self.step_time.coefficients
        remaining = self._itl_seconds - fixed - per_decode_token * num_decoding
        return max(MIN_PROMPT_TOKENS, int(remaining / max(per_prompt_token, 1e-7)))

    def observe(self, outcome: StepOutcome) -> None:
        """Update the model of the step time."""
        if outcome.seconds > 0 and outcome.num_scheduled_tokens:
            num_decoded = min(len(outcome.requests) + sum(outcome.drafted), outcome.num_scheduled_tokens)
            self.step_time.observe(outcome.seconds, 1.0, num_decoded, outcome.num_scheduled_tokens - num_decoded)
