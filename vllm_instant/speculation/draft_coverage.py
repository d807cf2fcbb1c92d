"""Which part of each request's context the draft model has read.

A draft model that is not run at every step has holes in its KV cache: the target wrote its own keys and values for the
tokens of the skipped steps, the draft model did not. Drafts that attend to holes are accepted far less often. This
keeps account of the holes, so that they can be filled before the next draft, also where a later request inherits
blocks through the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class DraftCoverage:
    """Leading tokens of each request whose draft KV is valid, and KV blocks whose draft KV is complete.

    Args:
        block_size: tokens of a KV block.

    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._covered: dict[str, int] = {}
        self._passed: dict[str, int] = {}
        """Blocks of each request, counted from its first, of which those behind the covered tokens are known to be
        incomplete: while nothing is drafted, each step would say so again."""
        self._complete: npt.NDArray[np.bool_] = np.zeros(1024, np.bool_)

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests ended or lost their blocks; what a block holds stays known."""
        for request_id in request_ids:
            self._covered.pop(request_id, None)
            self._passed.pop(request_id, None)

    def covered(self, request_id: str, computed: int, blocks: npt.NDArray[np.int32]) -> int:
        """How many leading tokens of the request the draft model has read.

        Args:
            request_id: the request.
            computed: tokens of it that the target has computed before this step; when the request is new, these come
                from the prefix cache.
            blocks: int32 ``[any]``, its row of the block table.

        """
        known = self._covered.get(request_id)
        if known is None:
            whole = computed // self.block_size
            complete = self._of(blocks[:whole])
            known = (whole if complete.all() else int(complete.argmin())) * self.block_size
            self._covered[request_id] = known
        return known

    def target_alone(self, request_id: str, stop: int, blocks: npt.NDArray[np.int32]) -> None:
        """The target computed tokens up to ``stop``, the draft model did not read them."""
        end = -(-stop // self.block_size)
        passed = self._passed.get(request_id, 0)
        if end <= passed:
            return
        touched = blocks[max(passed, self._covered[request_id] // self.block_size) : end]
        self._of(touched)
        self._complete[touched] = False
        self._passed[request_id] = end

    def draft_read(self, request_id: str, upto: int, blocks: npt.NDArray[np.int32]) -> None:
        """The draft model has now read the first ``upto`` tokens without a hole."""
        whole = upto // self.block_size
        filled = blocks[self._covered[request_id] // self.block_size : whole]
        if len(filled):
            self._of(filled)
            self._complete[filled] = True
        self._covered[request_id] = upto
        self._passed[request_id] = min(self._passed.get(request_id, 0), whole)

    def _of(self, blocks: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        highest = int(blocks.max(initial=0))
        if highest >= len(self._complete):
            grown = np.zeros(max(highest + 1, 2 * len(self._complete)), np.bool_)
            grown[: len(self._complete)] = self._complete
            self._complete = grown
        return self._complete[blocks]
