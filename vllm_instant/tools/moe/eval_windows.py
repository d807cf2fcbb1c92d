"""Windows of text used as requests, and the order in which they form batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_instant.tools.distill.text import TextError


@dataclass(frozen=True)
class EvalWindows:
    """Token ids int64 ``[windows, context]`` and the prompt class of each window."""

    tokens: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.classes)

    def mixed(self) -> EvalWindows:
        """The windows ordered so that neighbours are of different classes where possible."""
        # Sort by the place of a window within its class: round-robin over the classes.
        seen: dict[str, int] = {}
        places = []
        for name in self.classes:
            places.append(seen.get(name, 0))
            seen[name] = places[-1] + 1
        return self._ordered(np.argsort(places, kind="stable").tolist())

    def grouped(self) -> EvalWindows:
        """The windows ordered by class."""
        names = sorted(set(self.classes))
        return self._ordered(np.argsort([names.index(name) for name in self.classes], kind="stable").tolist())

    def _ordered(self, order: list[int]) -> EvalWindows:
        return EvalWindows(self.tokens[order], tuple(self.classes[i] for i in order))


def cut(streams: Sequence[tuple[str, torch.Tensor]], count: int, context: int) -> EvalWindows:
    """Cut the same number of windows from every class, spread over its text.

    Args:
        streams: name and token ids int64 ``[tokens]`` of each class.
        count: number of windows over all classes.
        context: tokens per window.

    Raises:
        TextError: if the windows of a class would overlap.

    """
    each = count // len(streams)
    tokens: list[torch.Tensor] = []
    classes: list[str] = []
    for name, stream in streams:
        if len(stream) < each * context:
            raise TextError(
                f"{name}: {len(stream)} tokens are too few for {each} windows of {context}; provide more "
                "text or request fewer windows"
            )
        step = (len(stream) - context) // max(each - 1, 1)
        tokens.extend(stream[start : start + context] for start in range(0, each * step, step))
        classes.extend([name] * each)
    return EvalWindows(torch.stack(tokens), tuple(classes))
