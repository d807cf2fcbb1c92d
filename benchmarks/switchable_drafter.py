"""Drafters that a benchmark can turn from perfect to hopeless while a server runs, in vLLM's ``custom_class`` form.

Stock vLLM and ours load the same class by name: ``speculative_config = {method: custom_class, model:
switchable_drafter.SwitchableDrafter, num_speculative_tokens: K}``. What it proposes is read from the JSON file that
``SWITCHABLE_DRAFTER`` names whenever that changes: ``{"mode": "hopeless"}`` proposes random tokens,
``{"mode": "oracle", "answers": FILE}`` the recorded answer to a prompt that it knows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

KEY_TOKENS = 16
"""Leading tokens that identify a recorded prompt."""


class SwitchableDrafter:
    """Proposes ``num_speculative_tokens`` tokens for every request, good or bad."""

    def __init__(self, vllm_config: Any) -> None:
        self.length = vllm_config.speculative_config.num_speculative_tokens
        self.vocabulary = vllm_config.model_config.get_vocab_size()
        self.random = np.random.default_rng(0)
        self.control = os.environ["SWITCHABLE_DRAFTER"]
        self._read_at = 0
        self._mode = "hopeless"
        self._answers: dict[tuple[int, ...], tuple[int, list[int]]] = {}

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row of the batch; none for rows without new tokens."""
        changed = os.stat(self.control).st_mtime_ns
        if changed != self._read_at:
            self._read_at = changed
            with open(self.control) as file:
                self._follow(json.load(file))
        if self._mode == "hopeless":
            tokens = self.random.integers(2, self.vocabulary, (len(sampled_token_ids), self.length)).tolist()
            return [row if sampled else [] for row, sampled in zip(tokens, sampled_token_ids, strict=True)]
        drafts = []
        for row, sampled in enumerate(sampled_token_ids):
            known = self._answers.get(tuple(token_ids_cpu[row, :KEY_TOKENS].tolist())) if sampled else None
            if known is None:
                drafts.append([])
                continue
            prompt_length, answer = known
            done = int(num_tokens_no_spec[row]) - prompt_length
            drafts.append(answer[done : done + self.length])
        return drafts

    def _follow(self, order: dict[str, Any]) -> None:
        self._mode = order["mode"]
        if "answers" in order:
            with open(order["answers"]) as file:
                entries = json.load(file)
            self._answers = {tuple(e["prompt"][:KEY_TOKENS]): (len(e["prompt"]), e["answer"]) for e in entries}
