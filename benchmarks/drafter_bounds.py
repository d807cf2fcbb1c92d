"""The least time that decoding can take with two sources of drafts: what ``drafter_limit.py`` compares with.

Nobody can do better than who knows beforehand, at every place of a text, how many of each source's tokens will be
accepted, and has it draft and verify exactly those. That is computed here, backwards from the end of each text, with
what steps cost in the server that was measured. Greedy decoding only: there the text does not depend on the drafts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_instant import DraftRequest
from vllm_instant_plugins.suffix.calibration import count_accepted
from vllm_instant_plugins.suffix.drafter import SuffixDrafter

MIN_RESIDUAL = 0.03
"""Relative errors below this count alike in the fit of the costs."""


@dataclass(frozen=True)
class StepPrices:
    """What a decoding step takes with one request, relative to a step without drafts."""

    verifying: float
    """When any drafts are verified,"""
    row: float
    """and for each of them."""
    drafting: float
    """When the draft model runs at the end of the step, what it missed included,"""
    draft_pass: float
    """and for each of its passes."""

    @classmethod
    def fitted(cls, steps: Sequence[tuple[float, int, int]]) -> StepPrices:
        """Least absolute deviations over ``(relative time, drafts verified, passes of the draft model)``."""
        seconds, drafted, passes = np.array(steps).T
        features = np.stack([np.ones(len(steps)), drafted > 0, drafted, passes > 0, passes], 1)
        weights = np.ones(len(steps))
        for _ in range(30):
            found = np.linalg.lstsq(features * weights[:, None], seconds * weights, rcond=None)[0]
            weights = np.maximum(np.abs(seconds - features @ found), MIN_RESIDUAL) ** -0.5
        # Drafts are not cheaper than nothing: what is below 0 is chance.
        return cls(*np.maximum(found[1:], 0.0).tolist())

    def step(self, drafted: int, passes: int) -> float:
        """A step that verifies ``drafted`` tokens, after ``passes`` of the draft model."""
        drafting = self.drafting + passes * self.draft_pass if passes else 0.0
        return 1.0 + (self.verifying + drafted * self.row if drafted else 0.0) + drafting

    def plain(self) -> dict[str, float]:
        """As JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Text:
    """An answer, and how many tokens of each source would be accepted behind each of its tokens but the first."""

    lookup: Sequence[int]
    model: Sequence[int]


def texts_of(path: Path) -> list[Text]:
    """Read what ``switchable_sources.Recorded`` wrote; lookups are made again, each text seeing those before it."""
    lookup = SuffixDrafter(max_model_len=1024, history_tokens=1_000_000)
    texts = []
    for number, line in enumerate(path.read_text().splitlines()):
        record = json.loads(line)
        tokens, first = np.array(record["tokens"], np.int32), record["prompt_tokens"] + 1
        found = []
        for place in range(first, len(tokens)):
            [draft] = lookup.propose([DraftRequest(str(number), tokens[:place], first - 1, 16)])
            found.append(count_accepted(np.array(draft.token_ids, np.int32), tokens[place:])[1])
        lookup.forget(str(number))
        texts.append(Text(found, _model_accepted(tokens, first, record["drafts"])))
    return texts


def _model_accepted(tokens: np.ndarray, first: int, drafts: Mapping[str, Sequence[int]]) -> list[int]:
    """By place. A greedy model drafts behind its own accepted tokens what it drafted before.

    Unknown are only the places behind drafts that were accepted as a whole; there it counts as right.
    """
    accepted = [0] * (len(tokens) - first + 1)
    for start, draft in sorted(((int(start), draft) for start, draft in drafts.items()), reverse=True):
        kept = count_accepted(np.array(draft, np.int32), tokens[start:])[1]
        behind = min(start - first + kept + 1, len(tokens) - first)
        total = kept + (1 + accepted[behind] if kept == len(draft) else 0)
        for ahead in range(min(total, kept + 1, len(tokens) - start)):
            accepted[start - first + ahead] = total - ahead
    return accepted[:-1]


def min_time(text: Text, prices: StepPrices) -> float:
    """Time to decode a text behind its first token, in steps without drafts, knowing what will be accepted."""
    end = len(text.lookup)
    rest = np.zeros(end + 1)
    for place in range(end - 1, -1, -1):
        ways = [prices.step(0, 0) + rest[place + 1]]
        for drafted in range(1, text.lookup[place] + 1):
            ways.append(prices.step(drafted, 0) + rest[min(place + drafted + 1, end)])
        for drafted in range(1, text.model[place] + 1):
            ways.append(prices.step(drafted, drafted) + rest[min(place + drafted + 1, end)])
        rest[place] = min(ways)
    return float(rest[0])


def min_seconds(texts: Sequence[Text], prices: StepPrices, seconds_off: float) -> float:
    """Decoding seconds a token, over all texts, knowing what will be accepted."""
    tokens = sum(len(text.lookup) for text in texts)
    return seconds_off * sum(min_time(text, prices) for text in texts) / tokens


def decoding(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those steps of one user that read no prompt."""
    return [step for step in steps if step["requests"] == 1 and not step["prompt_tokens"]]
