"""``hybrid`` on the device: a draft model that runs in every step with drafts, and a lookup that may replace them.

Unlike on the host, the draft model is not skipped where the lookup drafts, because which of the two is used is known on
the device alone.
"""

from __future__ import annotations

import torch

from vllm_instant.interfaces.drafter import DeviceDraftBatch, DeviceRequest, HybridDeviceDrafter
from vllm_instant_kernels.draft_source import DraftSource
from vllm_instant_kernels.suffix_lookup import SuffixLookup
from vllm_instant_plugins.suffix.cache_salt_groups import CacheSaltGroups
from vllm_instant_plugins.suffix.device_drafter import SuffixDeviceDrafter


class LookupHybridDeviceDrafter(SuffixDeviceDrafter, HybridDeviceDrafter):
    """A lookup beside a draft model.

    Args:
        lookup: The kernels with their workspace.
        groups: The histories that requests share.
        device: Device of all tensors.
        source: Chooses between the two.

    """

    def __init__(
        self, lookup: SuffixLookup, groups: CacheSaltGroups, device: torch.device | str, source: DraftSource
    ) -> None:
        super().__init__(lookup, groups, device)
        self._lookup = lookup
        self._source = source

    def warm_up(self) -> None:
        """Compile the kernels, or load what was compiled, before the first request."""
        super().warm_up()
        rows = torch.zeros(1, dtype=torch.int64, device=self._device)
        none = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._source.prefers_lookup(rows, none, none, self._lookup.expected)
        self._source.forget(0)

    def prefers_own(self, batch: DeviceDraftBatch) -> torch.Tensor:
        """Where the lookup expects more accepted tokens than the model has lately had."""
        return self._source.prefers_lookup(batch.rows, batch.num_sampled, batch.num_rejected, self._lookup.expected)

    def forget_on_device(self, request: DeviceRequest) -> None:
        """Move the output of a request that has ended into the history."""
        super().forget_on_device(request)
        self._source.forget(request.row)
