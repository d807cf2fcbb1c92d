"""NVIDIA's devices, where NVML is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One device of this machine."""

    name: str
    _library: Any
    _handle: Any

    def joules(self) -> float:
        """Energy used since the driver was loaded; raises NVML's error where it is not counted."""
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def gpus() -> list[Gpu]:
    """All devices; an empty list without the library (nvidia-ml-py), a driver or a device."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [Gpu(str(pynvml.nvmlDeviceGetName(handle)), pynvml, handle) for handle in handles]
    except Exception:  # each of the three is missing in its own way
        return []
