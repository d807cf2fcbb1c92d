"""Prefixes that both ends of a connection know, so that the next turn of a conversation sends its new tokens only.

A prefix is named by a hash over its tokens, block by block, as vLLM names the blocks of its prefix cache. Whole blocks
count only, and a tenant's hashes begin with its name, so that no prefix of another one is found.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

BLOCK_TOKENS = 64
HASH_BYTES = 16


class _Block(NamedTuple):
    parent: bytes
    """Hash of the prefix without this block; empty for the first one."""
    tokens: array[int]


def block_hashes(tokens: Sequence[int] | array[int], tenant: str) -> list[bytes]:
    """Return the hashes of the prefixes of 1, 2, … whole blocks of tokens (int32), each of ``HASH_BYTES`` bytes."""
    content = memoryview(array("i", tokens)).cast("B")
    found, parent, size = list[bytes](), tenant.encode(), BLOCK_TOKENS * array("i").itemsize
    for begin in range(0, len(content) - size + 1, size):
        parent = hashlib.blake2b(parent + content[begin : begin + size], digest_size=HASH_BYTES).digest()
        found.append(parent)
    return found


class KnownPrefixes:
    """Hashes of prefixes that the other end was sent; the oldest are forgotten.

    Args:
        capacity: Maximum number of hashes.

    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def add(self, hashes: Sequence[bytes]) -> None:
        """Remember the prefixes of a request."""
        for one in hashes:
            self._hashes[one] = None
            self._hashes.move_to_end(one)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)

    def longest(self, hashes: Sequence[bytes]) -> int:
        """Return the number of blocks of the longest known one of a request's prefixes."""
        return next((length for length in range(len(hashes), 0, -1) if hashes[length - 1] in self._hashes), 0)

    def clear(self) -> None:
        """Forget all: the other end has lost them."""
        self._hashes.clear()


class PrefixStore:
    """The tokens of prefixes by hash; blocks that were not used for longest are dropped.

    Args:
        max_tokens: Maximum number of tokens.

    """

    def __init__(self, max_tokens: int) -> None:
        self._max_blocks = max_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[tuple[Hashable, bytes], _Block] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of tokens."""
        return BLOCK_TOKENS * len(self._blocks)

    def add(self, owner: Hashable, tenant: str, tokens: Sequence[int] | array[int]) -> None:
        """Keep the whole blocks of a request of ``owner``."""
        parent = b""
        for place, one in enumerate(block_hashes(tokens, tenant)):
            begin = place * BLOCK_TOKENS
            key = (owner, one)
            if key not in self._blocks:
                self._blocks[key] = _Block(parent, array("i", tokens[begin : begin + BLOCK_TOKENS]))
            self._blocks.move_to_end(key)
            parent = one
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def tokens_of(self, owner: Hashable, name: bytes) -> list[int] | None:
        """Return the tokens of a prefix of ``owner`` by its hash; None if they are not all known."""
        blocks: list[_Block] = []
        while name:
            block = self._blocks.get((owner, name))
            if block is None:
                return None
            self._blocks.move_to_end((owner, name))
            blocks.append(block)
            name = block.parent
        return [token for block in reversed(blocks) for token in block.tokens]
