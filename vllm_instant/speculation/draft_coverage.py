"""Which tokens of each request have keys and values in the draft model's KV cache.

A draft model that is skipped in some steps has holes in its KV cache: the target computed keys and values for the
tokens of these steps, the draft model did not. Drafts that attend to holes are accepted far less often. The record of
the holes lets the draft model fill them before the next draft, also in blocks that a later request shares through the
prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

MAX_CATCH_UP_TOKENS = 512
"""Missed tokens that a draft model reads at most before one draft: a fraction of one step of the target."""


class DraftCoverage:
    """Number of leading tokens of each request with valid draft KV, and the KV blocks with complete draft KV.

    Args:
        block_size: Tokens per KV block.

    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._covered: dict[str, int] = {}
        self._marked: dict[str, int] = {}
        """Number of leading blocks per request that ``target_alone`` has handled: those after the covered tokens are
        recorded as incomplete already, and need not be in each further step without drafts."""
        self._complete: npt.NDArray[np.bool_] = np.zeros(1024, np.bool_)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop requests that ended or lost their blocks; the record of the blocks remains."""
        for request_id in request_ids:
            self._covered.pop(request_id, None)
            self._marked.pop(request_id, None)

    def covered(self, request_id: str, computed: int, blocks: npt.NDArray[np.int32]) -> int:
        """Return the number of leading tokens of a request with valid draft KV.

        Args:
            request_id: Id of the request.
            computed: Number of its tokens that the target computed before this step; those of a new request are in
                the prefix cache.
            blocks: int32 ``[any]``, its row of the block table.

        """
        known = self._covered.get(request_id)
        if known is None:
            whole = computed // self.block_size
            complete = self._is_complete(blocks[:whole])
            known = (whole if complete.all() else int(complete.argmin())) * self.block_size
            self._covered[request_id] = known
        return known

    def target_alone(self, request_id: str, stop: int, blocks: npt.NDArray[np.int32]) -> None:
        """Record that the target computed the tokens up to ``stop`` and the draft model was skipped."""
        end = -(-stop // self.block_size)
        marked = self._marked.get(request_id, 0)
        if end <= marked:
            return
        touched = blocks[max(marked, self._covered[request_id] // self.block_size) : end]
        self._is_complete(touched)
        self._complete[touched] = False
        self._marked[request_id] = end

    def draft_read(self, request_id: str, upto: int, blocks: npt.NDArray[np.int32]) -> None:
        """Record that the first ``upto`` tokens have draft KV without a hole."""
        whole = upto // self.block_size
        filled = blocks[self._covered[request_id] // self.block_size : whole]
        if len(filled):
            self._is_complete(filled)
            self._complete[filled] = True
        self._covered[request_id] = upto
        self._marked[request_id] = min(self._marked.get(request_id, 0), whole)

    def _is_complete(self, blocks: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        highest = int(blocks.max(initial=0))
        if highest >= len(self._complete):
            grown = np.zeros(max(highest + 1, 2 * len(self._complete)), np.bool_)
            grown[: len(self._complete)] = self._complete
            self._complete = grown
        return self._complete[blocks]
