"""KV blocks of prompts that are still being typed, pinned between their chunks.

The prefix cache keeps whole blocks, and only until their memory is needed. Pinned prefixes keep their blocks to the
last token, within limits: a maximum number of sessions, of tokens per session, and a maximum fraction of all blocks.
When the engine is short of blocks, the least recently used prefix is evicted first. Eviction costs only time: whole
blocks may still be in the prefix cache, and the rest is computed again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class BlockPool(Protocol):
    """The reference counts of KV blocks (vLLM's ``BlockPool``)."""

    def touch(self, blocks: Sequence[Any]) -> None:
        """Add one reference to each block."""
        ...

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """Remove one reference from each block; blocks without references are reused in this order."""
        ...


@dataclass
class _Pinned:
    max_tokens: int
    token_ids: Sequence[int] = ()
    groups: tuple[list[Any], ...] = ()
    key: Hashable = None


class PinnedPrefixes:
    """The pinned prefixes of one engine.

    Args:
        pool: The pool of the blocks.
        block_sizes: Tokens per block, for each KV-cache group.
        num_blocks: Number of blocks in the whole cache.

    """

    def __init__(self, pool: BlockPool, block_sizes: Sequence[int], num_blocks: int) -> None:
        self._pool = pool
        self._block_sizes = tuple(block_sizes)
        self._num_blocks = num_blocks
        # In the order of use, the least recently used session first.
        self._pinned: dict[str, _Pinned] = {}

    def __len__(self) -> int:
        return len(self._pinned)

    @property
    def num_blocks(self) -> int:
        """Number of blocks pinned by all sessions; a block that two sessions pin counts twice."""
        return sum(len(group) for pinned in self._pinned.values() for group in pinned.groups)

    def open(self, name: str, max_sessions: int, max_tokens: int) -> bool:
        """Let a session pin up to ``max_tokens``; returns False if ``max_sessions`` others may already."""
        if name in self._pinned:
            return True
        if len(self._pinned) >= max_sessions:
            return False
        self._pinned[name] = _Pinned(max_tokens)
        return True

    def unpin(self, name: str) -> None:
        """Release a session's blocks; it can pin none until it is opened again."""
        pinned = self._pinned.pop(name, None)
        if pinned is not None:
            self._release(pinned)

    def clear(self) -> None:
        """Release the blocks of all sessions, because their contents are invalid; the sessions remain open."""
        for pinned in self._pinned.values():
            self._release(pinned)

    def pin(
        self, name: str, token_ids: Sequence[int], groups: Sequence[Sequence[Any]], key: Hashable, max_share: float
    ) -> None:
        """Pin the blocks that a request of a session computed, in place of the session's earlier ones.

        Args:
            name: The session; ignored unless it is open.
            token_ids: The computed tokens, ``[tokens]``.
            groups: For each KV-cache group the blocks of these tokens, and possibly more.
            key: Must be equal for a request that uses the blocks: what keys and values depend on besides the tokens.
            max_share: Maximum fraction of the cache's blocks that all sessions together pin.

        """
        pinned = self._pinned.pop(name, None)
        if pinned is None:
            return
        before = _Pinned(0, pinned.token_ids, pinned.groups)
        self._pinned[name] = pinned  # most recently used
        num_tokens = min(len(token_ids), pinned.max_tokens)
        blocks = tuple(
            list(group[: -(-num_tokens // size)]) for group, size in zip(groups, self._block_sizes, strict=True)
        )
        pinned.token_ids, pinned.groups, pinned.key = (), (), None
        needed, limit = sum(map(len, blocks)), int(max_share * self._num_blocks)
        if needed <= limit:
            for other in [other for other in self._pinned.values() if other is not pinned]:
                if self.num_blocks + needed <= limit:
                    break
                self._release(other)
            # Before the earlier blocks are released: most of them are the same.
            for group in blocks:
                self._pool.touch(group)
            pinned.token_ids, pinned.groups, pinned.key = list(token_ids[:num_tokens]), blocks, key
        self._release(before)

    def find(self, name: str, token_ids: Sequence[int], key: Hashable) -> tuple[int, tuple[list[Any], ...]]:
        """Return the number of pinned tokens that a session's request can use, and their blocks in each group.

        The last block may be partly filled; a request that continues in it needs a copy.
        """
        pinned = self._pinned.pop(name, None)
        if pinned is None:
            return 0, ()
        self._pinned[name] = pinned  # most recently used
        if pinned.key != key:
            return 0, ()
        num_tokens = 0
        # The last token must be computed: its logits start the answer.
        for one, other in zip(pinned.token_ids, token_ids[:-1], strict=False):
            if one != other:
                break
            num_tokens += 1
        sizes = zip(pinned.groups, self._block_sizes, strict=True) if pinned.groups else ()
        return num_tokens, tuple(group[: -(-num_tokens // size)] for group, size in sizes)

    def evict_lru(self) -> bool:
        """Release the least recently used prefix; returns False if there is none."""
        for pinned in self._pinned.values():
            if pinned.groups:
                self._release(pinned)
                return True
        return False

    def _release(self, pinned: _Pinned) -> None:
        groups, pinned.groups, pinned.token_ids, pinned.key = pinned.groups, (), (), None
        for group in groups:
            # The end of a prefix is shared by fewer requests than its beginning, so it is reused first.
            self._pool.free_blocks(reversed(group))
