"""A Hugging Face causal language model that drafts greedily, with a KV cache per request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vllm_instant.tools.draft_server.drafting import Guess

Tokens = npt.NDArray[np.int32]

PREFILL_TOKENS = 256
"""Maximum number of tokens that are read in one call, so that a long prompt does not keep other requests waiting."""


class ModelError(Exception):
    """The model cannot draft for a request; the message is one sentence."""


class DraftModel(Protocol):
    """What drafts."""

    max_parallel: int
    """Maximum number of calls at the same time, each from a thread of its own and of another request."""
    max_tokens: int
    """Maximum number of tokens of a request."""
    vocab_size: int
    """Number of token ids."""

    def draft(self, request: Hashable, owner: Hashable, sequence: Tokens, count: int, vocab_size: int) -> list[Guess]:
        """Return up to ``count`` tokens that follow ``sequence``; none while the model still reads it.

        Raises:
            ModelError: It cannot draft for this request.

        Args:
            request: Its key.
            owner: Requests of one owner may share cached prefixes.
            sequence: int32 ``[tokens]``, at least one.
            count: Number of tokens, at least 1.
            vocab_size: Only token ids below are proposed.

        """
        ...

    def release(self, request: Hashable) -> None:
        """The request has ended."""
        ...


@dataclass
class CachedSequence:
    """The tokens whose keys and values are cached."""

    owner: Hashable
    cache: Any = None
    tokens: Tokens = field(default_factory=lambda: np.empty(0, np.int32))


class CachePool:
    """The KV caches of live and ended requests; the least recently used one is dropped first.

    Args:
        max_tokens: Maximum number of cached tokens.

    """

    def __init__(self, max_tokens: int) -> None:
        self.num_evicted = 0
        self._max_tokens = max_tokens
        self._live: OrderedDict[Hashable, CachedSequence] = OrderedDict()
        self._ended: list[CachedSequence] = []

    @property
    def num_tokens(self) -> int:
        """Number of cached tokens."""
        return sum(len(sequence.tokens) for sequence in (*self._live.values(), *self._ended))

    def of(self, request: Hashable, owner: Hashable, tokens: Tokens) -> CachedSequence:
        """Return the cache of a request; a new one begins with the longest prefix that an ended request left."""
        found = self._live.get(request)
        if found is None:
            candidates = [ended for ended in self._ended if ended.owner == owner]
            found = max(candidates, key=lambda ended: common_prefix(ended.tokens, tokens), default=None)
            if found is None or not common_prefix(found.tokens, tokens):
                found = CachedSequence(owner)
            else:
                self._ended = [ended for ended in self._ended if ended is not found]
            self._live[request] = found
        self._live.move_to_end(request)
        return found

    def release(self, request: Hashable) -> None:
        """Keep the cache of a request that has ended for another one with the same beginning."""
        found = self._live.pop(request, None)
        if found is not None and len(found.tokens):
            self._ended.append(found)

    def shrink(self) -> None:
        """Drop caches until the limit holds, those of ended requests first; the newest one stays."""
        excess = self.num_tokens - self._max_tokens
        while excess > 0 and (self._ended or len(self._live) > 1):
            dropped = self._ended.pop(0) if self._ended else self._live.popitem(last=False)[1]
            excess -= len(dropped.tokens)
            self.num_evicted += 1


def common_prefix(one: Tokens, other: Tokens) -> int:
    """Return the number of equal leading tokens."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


class TransformersModel:
    """A model of the ``transformers`` package on the CPU.

    Args:
        model: Folder or Hugging Face name.
        dtype: Name of a torch dtype, or ``auto``.
        max_cached_tokens: Maximum number of tokens in all KV caches.

    Raises:
        ValueError: The model cannot be loaded, or its cache cannot be cut, as where layers are recurrent.

    """

    max_parallel = 1

    def __init__(self, model: str, dtype: str = "auto", max_cached_tokens: int = 65_536) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        try:
            self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{model} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        self._torch = torch
        config = self._model.config.get_text_config()
        self.max_tokens = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
        self.vocab_size = int(config.vocab_size)
        self._max_cached_tokens = max_cached_tokens
        self.caches = CachePool(max_cached_tokens)
        self._check_cutting(model)

    def _check_cutting(self, model: str) -> None:
        """Refuse a model whose drafts would depend on tokens that were cut off."""
        tokens = np.arange(1, 7, dtype=np.int32) % self.vocab_size
        try:
            fresh = self.draft("fresh", 0, tokens, 1, self.vocab_size)
            self.draft("cut", 1, np.concatenate([tokens[:3], tokens[::-1]]), 2, self.vocab_size)
            cut = self.draft("cut", 1, tokens, 1, self.vocab_size)
        except (NotImplementedError, AttributeError, TypeError) as error:
            raise ValueError(f"{model} has a cache that cannot be cut ({type(error).__name__})") from None
        if abs(fresh[0].probability - cut[0].probability) > 0.02:
            raise ValueError(f"{model} has a cache that cannot be cut, as of recurrent layers")
        self.caches = CachePool(self._max_cached_tokens)

    def draft(self, request: Hashable, owner: Hashable, sequence: Tokens, count: int, vocab_size: int) -> list[Guess]:
        """Greedy tokens; see ``DraftModel``."""
        cached = self.caches.of(request, owner, sequence)
        # The last token is always computed: its logits are needed.
        known = min(common_prefix(cached.tokens, sequence), len(sequence) - 1)
        if known < len(cached.tokens):
            # Removes as many tokens from the end.
            cached.cache.crop(known - len(cached.tokens))
            cached.tokens = cached.tokens[:known]
        missing = sequence[known:]
        if len(missing) > PREFILL_TOKENS:
            self._forward(cached, missing[:PREFILL_TOKENS])
            self.caches.shrink()
            return []
        guesses: list[Guess] = []
        while len(guesses) < count and len(cached.tokens) + len(missing) < self.max_tokens:
            guesses.append(self._guess(self._forward(cached, missing), vocab_size))
            missing = np.array([guesses[-1].token], np.int32)
        self.caches.shrink()
        return guesses

    def _forward(self, cached: CachedSequence, tokens: Tokens) -> Any:
        """The logits behind the last of ``tokens``, float ``[vocabulary]``."""
        torch = self._torch
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(tokens.astype(np.int64))[None],
                past_key_values=cached.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cached.cache = output.past_key_values
        cached.tokens = np.concatenate([cached.tokens, tokens])
        return output.logits[0, -1].float()

    def _guess(self, logits: Any, vocab_size: int) -> Guess:
        values, tokens = logits[: min(vocab_size, self.vocab_size)].softmax(-1).topk(2)
        (probability, other_probability), (token, other) = values.tolist(), tokens.tolist()
        return Guess(token, probability, other, other_probability)

    def release(self, request: Hashable) -> None:
        """The request has ended."""
        self.caches.release(request)
