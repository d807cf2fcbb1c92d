"""``suffix`` on the device: the same lookup, without the request's newest tokens on the host.

Drafts are those of ``SuffixDrafter``, except that they are as long as was planned, since their rows are verified in any
case, and that their confidence is the one that the host begins with: it only decides whether a ``hybrid`` drafter
uses its model.
"""

from __future__ import annotations

import torch

from vllm_instant.interfaces.drafter import DeviceDraftBatch, DeviceDrafter, DeviceRequest
from vllm_instant_kernels.suffix_lookup import NO_GROUP, LookupBatch, SuffixLookup
from vllm_instant_plugins.suffix.cache_salt_groups import CacheSaltGroups


class SuffixDeviceDrafter(DeviceDrafter):
    """Lookup in a request's own tokens and in a shared history, both on the device.

    Args:
        lookup: The kernels with their workspace.
        groups: The histories that requests share.
        device: Device of all tensors.

    """

    def __init__(self, lookup: SuffixLookup, groups: CacheSaltGroups, device: torch.device | str) -> None:
        self._lookup = lookup
        self._groups = groups
        self._device = torch.device(device)
        self._group_of: dict[str, int] = {}
        """Group by request id, of the live requests that have one."""

    def warm_up(self) -> None:
        """Compile the kernels, or load what was compiled, before the first request."""
        numbers = {"dtype": torch.int32, "device": self._device}
        width = self._lookup.max_model_len
        token_ids, num_tokens = torch.zeros((1, width), **numbers), torch.zeros(1, **numbers)
        rows = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._lookup.append_output(token_ids, num_tokens, 0, 0, 1, 0)
        self._lookup.propose(LookupBatch(token_ids, num_tokens, rows, num_tokens, 1), num_tokens)

    def propose_on_device(self, batch: DeviceDraftBatch) -> torch.Tensor:
        """One lookup per request."""
        requests = LookupBatch(batch.token_ids, batch.num_tokens, batch.rows, batch.num_sampled, batch.max_num_tokens)
        return self._lookup.propose(requests, self._groups_of(batch))

    def _groups_of(self, batch: DeviceDraftBatch) -> torch.Tensor | None:
        """int32 ``[requests]`` on the device; None where no request searches the history."""
        for request_id in batch.request_ids:
            if request_id not in self._group_of:
                group = self._groups.group(batch.cache_salts.get(request_id, ""))
                if group is not None:
                    self._group_of[request_id] = group
        groups = [self._group_of.get(request_id, NO_GROUP) for request_id in batch.request_ids]
        if all(group == NO_GROUP for group in groups):
            return None
        # From pinned memory the copy does not wait for the device.
        on_host = torch.tensor(groups, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        return on_host.to(self._device, non_blocking=True)

    def forget_on_device(self, request: DeviceRequest) -> None:
        """Move the output of a request that has ended into the history."""
        group = self._group_of.pop(request.request_id, None)
        self._lookup.forget(request.row)
        if group is not None:
            self._lookup.append_output(
                request.token_ids,
                request.num_tokens,
                request.row,
                request.num_prompt_tokens,
                request.max_num_tokens,
                group,
            )
