"""Records operations that wait for a device, by the file that calls them.

On a CPU nothing waits; what counts is the call, which on a GPU would copy values to the host or synchronise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
}
"""Methods and functions of tensors that need their values on the host."""


class HostSyncs(TorchFunctionMode):
    """While it is active, ``calls`` collects what files with one of these parts in their path do.

    Args:
        owners: parts of paths.

    """

    def __init__(self, owners: Iterable[str]) -> None:
        super().__init__()
        self.owners = tuple(owners)
        self.calls: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if self._waits(name, args, kwargs):
            frame = sys._getframe(1)
            while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            if any(owner in frame.f_code.co_filename for owner in self.owners):
                self.calls.append(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {name}")
        return function(*args, **kwargs)

    @staticmethod
    def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in READS:
            return True
        if name == "to":
            # A copy between devices waits unless it may be asynchronous.
            return not kwargs.get("non_blocking", False) and _moves(args[1:], kwargs)
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            # Lists become device tensors by a blocking copy, masks need the number of their true entries.
            return any(
                isinstance(part, list) or (isinstance(part, torch.Tensor) and part.dtype == torch.bool)
                for part in index
            )
        return False


def _moves(arguments: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether arguments of ``Tensor.to`` name a device."""
    named = [*arguments, kwargs.get("device")]
    return any(isinstance(value, torch.device | str) for value in named)
