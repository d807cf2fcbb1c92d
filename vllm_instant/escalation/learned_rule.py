"""A learned rule as numbers in a JSON file: a server needs neither scikit-learn nor pickled objects to use it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_instant.escalation.features import FORM, features_of


class LearnedRule(BaseModel):
    """A logistic regression over ``features_of``, its calibration (Platt 1999) and the threshold.

    The probability that the deep answer is better is ``1 / (1 + exp(slope * f + offset))`` with ``f`` the regression's
    linear function of the standardized features.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    form: tuple[str, ...] = FORM
    vocabulary: tuple[str, ...] = Field(max_length=20_000)
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float
    slope: float
    offset: float
    threshold: float = Field(ge=0, le=1)
    """Requests with at least this probability go deep."""
    learned_from: dict[str, Any] = Field(default_factory=dict)
    """Numbers about the prompts, and what the rule brought on held-out ones."""

    @model_validator(mode="after")
    def _has_equal_lengths(self) -> LearnedRule:
        count = len(self.form) + len(self.vocabulary)
        if not len(self.mean) == len(self.scale) == len(self.coefficients) == count:
            raise ValueError(f"mean, scale and coefficients must have {count} numbers each")
        if self.form != FORM:
            raise ValueError("it was learned by another version of this package: learn it again")
        return self

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {word: position for position, word in enumerate(self.vocabulary)}

    def probability(self, body: Mapping[str, Any]) -> float:
        """Return the probability that the deep answer to a request is better."""
        standardized = (features_of(body, self._positions) - np.array(self.mean)) / np.array(self.scale)
        value = float(standardized @ np.array(self.coefficients)) + self.intercept
        return 1 / (1 + math.exp(min(700.0, max(-700.0, self.slope * value + self.offset))))


def read_rule(path: Path) -> LearnedRule:
    """Read a rule; raises ValueError, with one sentence, where the file is none."""
    try:
        return LearnedRule.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise ValueError(f"{path} is no learned rule: {where or 'the file'}: {detail['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no learned rule: {error}") from None
