"""The target model as a teacher: its next-token distributions on windows of text, computed once per window."""

from __future__ import annotations

from typing import Any

import torch


class Teacher:
    """A target model that provides distributions.

    In most models logits are the last hidden states times one matrix; then the hidden states are kept in place of the
    distributions, since they need a fraction of the memory. Otherwise (scaled or capped logits) the logits are kept.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.

    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._head: torch.Tensor | None = model.get_output_embeddings().weight
        probe = torch.arange(8, device=model.device)[None]
        with torch.inference_mode():
            logits = model(input_ids=probe).logits.float()
            plain = (self._hidden(probe) @ self._head.T).float()
        if not torch.allclose(logits, plain, rtol=0.02, atol=0.05):
            self._head = None

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model.base_model(input_ids=tokens).last_hidden_state
        return states

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """The hidden states or logits after each token; ``[batch, context]`` → ``[batch, context, any]``."""
        with torch.no_grad():
            if self._head is not None:
                return self._hidden(tokens)
            logits: torch.Tensor = self.model(input_ids=tokens).logits
            return logits

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, from ``states`` of any leading shape."""
        return states if self._head is None else states @ self._head.T


class TaughtWindows:
    """A fixed number of windows of a token stream, with the teacher's states.

    A step draws some of them. The teacher runs on a window when it is drawn for the first time; its states are kept for
    later draws as long as memory allows.

    Args:
        stream: int64 ``[tokens]``.
        teacher: the target.
        windows: how many different windows there are.
        context: tokens of a window.
        seed: of their places.
        memory: bytes that kept states may take.

    """

    def __init__(
        self, stream: torch.Tensor, teacher: Teacher, windows: int, context: int, seed: int, memory: float = 4e9
    ) -> None:
        self._teacher = teacher
        self._stream = stream
        self._context = context
        self._seed = seed
        places = torch.randint(0, len(stream) - context, (windows,), generator=torch.Generator().manual_seed(seed))
        self._places = places.tolist()
        self._kept: dict[int, torch.Tensor] = {}
        self._memory_left = memory

    def batch(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``[size, context]`` and states ``[size, context, any]`` of one step, the same at every call."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        chosen = torch.randint(0, len(self._places), (size,), generator=generator).tolist()
        device = self._teacher.model.device
        tokens = torch.stack([self._stream[p : p + self._context] for p in (self._places[c] for c in chosen)])
        tokens = tokens.to(device)
        missing = [i for i, c in enumerate(chosen) if c not in self._kept]
        found = {i: self._kept[c] for i, c in enumerate(chosen) if c in self._kept}
        if missing:
            for i, states in zip(missing, self._teacher.states(tokens[missing]), strict=True):
                found[i] = states
                size_in_bytes = states.numel() * states.element_size()
                if self._memory_left >= size_in_bytes and chosen[i] not in self._kept:
                    self._memory_left -= size_in_bytes
                    self._kept[chosen[i]] = states.cpu()
        return tokens, torch.stack([found[i].to(device) for i in range(size)])
