"""``similarity`` with a goal for the time between tokens: prompts are read in pieces that keep it."""

from __future__ import annotations

from typing import Any

from vllm_instant import SchedulerSnapshot, StepOutcome
from vllm_instant_plugins.similarity.cost_model import LinearTime
from vllm_instant_plugins.similarity.policy import SECONDS_PER_PROMPT_TOKEN, SECONDS_PER_TOKEN, SimilarityPolicy

MIN_PROMPT_TOKENS = 16
ENOUGH_STEPS = 10


class PacedSimilarityPolicy(SimilarityPolicy):
    """Limits how much of the prompts a step reads beside running requests.

    Args:
        slots: most requests that run together.
        itl_seconds: goal for the time between tokens.
        **options: of ``SimilarityPolicy``.

    """

    def __init__(self, slots: int, itl_seconds: float, **options: Any) -> None:
        super().__init__(slots, **options)
        self.step_time = LinearTime([SECONDS_PER_TOKEN / 2, SECONDS_PER_TOKEN / 8, SECONDS_PER_PROMPT_TOKEN])
        """Seconds of a step: constant, for each token that is decoded or verified, for each prompt token."""
        self._itl_seconds = itl_seconds

    def max_prompt_tokens(self, moment: SchedulerSnapshot) -> int | None:
        """What fits into a step beside those that run."""
        decoding = sum(state.num_output_tokens > 0 for state in moment.running)
        if not decoding or self.step_time.measured < ENOUGH_STEPS:
            return None
        fixed, decode, prompt = self.step_time.prices
        room = self._itl_seconds - fixed - decode * decoding
        return max(MIN_PROMPT_TOKENS, int(room / max(prompt, 1e-7)))

    def observe(self, outcome: StepOutcome) -> None:
        """Learn what a step takes."""
        if outcome.seconds > 0 and outcome.num_scheduled_tokens:
            decoded = min(len(outcome.requests) + sum(outcome.drafted), outcome.num_scheduled_tokens)
            self.step_time.observe(outcome.seconds, 1.0, decoded, outcome.num_scheduled_tokens - decoded)
