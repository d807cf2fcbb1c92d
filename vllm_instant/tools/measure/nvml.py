"""NVIDIA's devices, where NVML is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SLOWED_DOWN_REASONS = 0x08 | 0x20 | 0x40 | 0x80
"""NVML's clock event reasons: hardware slowdown, software and hardware thermal slowdown, power brake. The software
power cap (0x04) is not among them: a loaded GPU runs at its power limit."""


@dataclass(frozen=True)
class GpuReading:
    """The state of one device."""

    clock_mhz: float
    """Of its multiprocessors."""
    slowed_down: bool
    """Whether it is too hot, or its power supply asks it to."""
    memory_bytes: float
    pcie_bytes_per_second: float
    """Both directions."""


@dataclass(frozen=True)
class Gpu:
    """One device of this machine."""

    name: str
    _library: Any
    _handle: Any

    def joules(self) -> float:
        """Energy used since the driver was loaded; raises NVML's error where it is not counted."""
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def reading(self) -> GpuReading:
        """Clock, slowdown, memory and PCIe traffic now; raises NVML's error where one is not reported."""
        nvml, device = self._library, self._handle
        kibibytes = sum(
            nvml.nvmlDeviceGetPcieThroughput(device, counter)
            for counter in (nvml.NVML_PCIE_UTIL_TX_BYTES, nvml.NVML_PCIE_UTIL_RX_BYTES)
        )
        return GpuReading(
            float(nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
            bool(nvml.nvmlDeviceGetCurrentClocksEventReasons(device) & SLOWED_DOWN_REASONS),
            float(nvml.nvmlDeviceGetMemoryInfo(device).used),
            1024.0 * kibibytes,
        )


def gpus() -> list[Gpu]:
    """All devices; an empty list without the library (nvidia-ml-py), a driver or a device."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [Gpu(str(pynvml.nvmlDeviceGetName(handle)), pynvml, handle) for handle in handles]
    except Exception:  # each of the three is missing in its own way
        return []
