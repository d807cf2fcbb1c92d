"""``hybrid`` on the device: a draft model that runs in every step with drafts, and a lookup that may replace them.

Unlike on the host, the draft model is not skipped where the lookup drafts, because which of the two is used is known on
the device alone. Acceptance of the model is not known there either: it is assumed.
"""

from __future__ import annotations

import torch

from vllm_instant.interfaces.drafter import DeviceDraftBatch, HybridDeviceDrafter
from vllm_instant_kernels.suffix_lookup import SuffixLookup
from vllm_instant_plugins.suffix.cache_salt_groups import CacheSaltGroups
from vllm_instant_plugins.suffix.device_drafter import SuffixDeviceDrafter

MODEL_ACCEPTANCE = 0.7
"""Assumed probability that a token of the draft model is accepted if those before it are."""


class LookupHybridDeviceDrafter(SuffixDeviceDrafter, HybridDeviceDrafter):
    """A lookup beside a draft model.

    Args:
        lookup: The kernels with their workspace.
        groups: The histories that requests share.
        device: Device of all tensors.
        num_draft_tokens: Number of draft tokens of both.

    """

    def __init__(
        self, lookup: SuffixLookup, groups: CacheSaltGroups, device: torch.device | str, num_draft_tokens: int
    ) -> None:
        super().__init__(lookup, groups, device)
        self._lookup = lookup
        self._expected_of_model = sum(MODEL_ACCEPTANCE**position for position in range(1, num_draft_tokens + 1))

    def prefers_own(self, batch: DeviceDraftBatch) -> torch.Tensor:
        """Where the lookup expects more accepted tokens than the model is assumed to bring."""
        return self._lookup.expected[: len(batch.request_ids)] > self._expected_of_model
