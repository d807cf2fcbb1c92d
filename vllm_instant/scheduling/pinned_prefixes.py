"""KV blocks of prompts that are still arriving, held between their chunks.

The prefix cache keeps whole blocks, and only as long as nobody needs the memory. What is held here stays as it is, to
the last token, within limits: so many sessions, so many tokens each, a share of all blocks together; and whenever the
engine is short of blocks, the sessions that were used longest ago lose theirs first. Losing one costs time, nothing
else: its whole blocks may still be in the prefix cache, and the rest is read again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class BlockPool(Protocol):
    """What counts the references to KV blocks (vLLM's ``BlockPool``)."""

    def touch(self, blocks: Sequence[Any]) -> None:
        """One reference more."""
        ...

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """One reference less; those without any are free, the first ones to be used first."""
        ...


@dataclass
class _Held:
    tokens: int
    """Most that may be held."""
    token_ids: Sequence[int] = ()
    groups: tuple[list[Any], ...] = ()
    key: Hashable = None


class PinnedPrefixes:
    """The held prefixes of one engine.

    Args:
        pool: where the blocks belong.
        block_sizes: tokens of a block, for each KV-cache group.
        num_blocks: of the whole cache.

    """

    def __init__(self, pool: BlockPool, block_sizes: Sequence[int], num_blocks: int) -> None:
        self._pool = pool
        self._block_sizes = tuple(block_sizes)
        self._num_blocks = num_blocks
        # The one used longest ago stands first.
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_blocks(self) -> int:
        """Held by all sessions together; a block that two of them hold counts twice."""
        return sum(len(group) for held in self._held.values() for group in held.groups)

    def open(self, name: str, sessions: int, tokens: int) -> bool:
        """Let a session hold up to so many tokens, unless ``sessions`` do already."""
        if name in self._held:
            return True
        if len(self._held) >= sessions:
            return False
        self._held[name] = _Held(tokens)
        return True

    def close(self, name: str) -> None:
        """The session holds nothing any more."""
        held = self._held.pop(name, None)
        if held is not None:
            self._release(held)

    def clear(self) -> None:
        """No session holds anything, though each may again: what was computed has become wrong."""
        for held in self._held.values():
            self._release(held)

    def keep(
        self, name: str, token_ids: Sequence[int], groups: Sequence[Sequence[Any]], key: Hashable, share: float
    ) -> None:
        """Hold what a request of the session has computed, in place of what it held before.

        Args:
            name: the session; ignored unless it is open.
            token_ids: those that were computed, ``[tokens]``.
            groups: for each KV-cache group, the blocks that they lie in (and possibly more).
            key: what must be the same for another request that is to use them.
            share: most of the cache's blocks that all sessions together may hold.

        """
        held = self._held.pop(name, None)
        if held is None:
            return
        before = _Held(0, held.token_ids, held.groups)
        self._held[name] = held  # used last
        tokens = min(len(token_ids), held.tokens)
        blocks = tuple(list(group[: -(-tokens // size)]) for group, size in zip(groups, self._block_sizes, strict=True))
        held.token_ids, held.groups, held.key = (), (), None
        wanted, room = sum(map(len, blocks)), int(share * self._num_blocks)
        if wanted <= room:
            for other in [other for other in self._held.values() if other is not held]:
                if self.num_blocks + wanted <= room:
                    break
                self._release(other)
            for group in blocks:
                self._pool.touch(group)
            held.token_ids, held.groups, held.key = list(token_ids[:tokens]), blocks, key
        self._release(before)

    def find(self, name: str, token_ids: Sequence[int], key: Hashable) -> tuple[int, tuple[list[Any], ...]]:
        """What a request can use of its session's: tokens, and the blocks of each group that they lie in.

        The last block may be filled in part; who goes on from there needs a copy of it.
        """
        held = self._held.pop(name, None)
        if held is None:
            return 0, ()
        self._held[name] = held
        if held.key != key:
            return 0, ()
        tokens = 0
        # The last token must be computed: its logits are the answer's beginning.
        for one, other in zip(held.token_ids, token_ids[:-1], strict=False):
            if one != other:
                break
            tokens += 1
        sizes = zip(held.groups, self._block_sizes, strict=True) if held.groups else ()
        return tokens, tuple(group[: -(-tokens // size)] for group, size in sizes)

    def evict_lru(self) -> bool:
        """Free what was used longest ago; whether there was anything."""
        for held in self._held.values():
            if held.groups:
                self._release(held)
                return True
        return False

    def _release(self, held: _Held) -> None:
        groups, held.groups, held.token_ids, held.key = held.groups, (), (), None
        for group in groups:
            # The end of a prefix is of use to fewer requests than its beginning.
            self._pool.free_blocks(reversed(group))
