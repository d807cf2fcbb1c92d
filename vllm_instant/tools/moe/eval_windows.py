"""Windows of text that stand for requests, and in which company they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_instant.tools.distill.text import TextError


@dataclass(frozen=True)
class Windows:
    """Tokens int64 ``[windows, context]`` and the class of each window."""

    tokens: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.classes)

    def mixed(self) -> Windows:
        """In an order in which neighbours are of different classes, as far as possible."""
        # The place of a window among those of its class decides; equal places lie side by side.
        seen: dict[str, int] = {}
        places = []
        for name in self.classes:
            places.append(seen.get(name, 0))
            seen[name] = places[-1] + 1
        return self._ordered(np.argsort(places, kind="stable").tolist())

    def grouped(self) -> Windows:
        """In an order in which windows of one class follow each other."""
        names = sorted(set(self.classes))
        return self._ordered(np.argsort([names.index(name) for name in self.classes], kind="stable").tolist())

    def _ordered(self, order: list[int]) -> Windows:
        return Windows(self.tokens[order], tuple(self.classes[i] for i in order))


def cut(streams: Sequence[tuple[str, torch.Tensor]], count: int, context: int) -> Windows:
    """Equally many windows of every class, spread over its text.

    Args:
        streams: name and token stream int64 ``[tokens]`` of each class.
        count: windows of all classes together.
        context: tokens of a window.

    Raises:
        TextError: when a class is too short for its windows not to overlap.

    """
    each = count // len(streams)
    tokens: list[torch.Tensor] = []
    classes: list[str] = []
    for name, stream in streams:
        if len(stream) < each * context:
            raise TextError(
                f"{name}: {len(stream)} tokens are too few for {each} windows of {context}; give more text, "
                "or ask for fewer windows"
            )
        step = (len(stream) - context) // max(each - 1, 1)
        tokens.extend(stream[start : start + context] for start in range(0, each * step, step))
        classes.extend([name] * each)
    return Windows(torch.stack(tokens), tuple(classes))
