"""The ``experts`` slot: which routed experts a batch may use. Its seam comes with its first plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@runtime_checkable
class ExpertRouter(Protocol):
    """Decides which routed experts a batch may use. Runs in every worker process, under graph capture."""

    def mask_logits(self, layer: int, logits: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
        """The router logits, float32 ``[tokens, experts]``, with forbidden experts at -inf.

        ``is_padding`` is bool ``[tokens]``. Shapes must not depend on values, and nothing may be read back from the
        device.
        """
        ...
