"""Energy counters of the machine: NVML for GPUs, RAPL for processors.

They count the whole machine, including everything that runs beside the server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vllm_instant.tools.measure.nvml import gpus

POWERCAP = Path("/sys/class/powercap")


@dataclass
class EnergyMeter:
    """The sum of the machine's energy counters."""

    sources: dict[str, Callable[[], float]] = field(default_factory=dict)
    """By name, a function that returns joules since an arbitrary time."""

    def joules(self) -> float | None:
        """The sum of all counters; None without any."""
        return sum(read() for read in self.sources.values()) if self.sources else None


def energy_meter(powercap: Path = POWERCAP) -> EnergyMeter:
    """The readable counters of this machine."""
    return EnergyMeter(_gpus() | _processors(powercap))


@dataclass
class _Rapl:
    """One domain of the processor, whose counter wraps around."""

    folder: Path
    seen: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        self.seen = self._count()

    def _count(self) -> int:
        return int((self.folder / "energy_uj").read_text())

    def joules(self) -> float:
        now = self._count()
        if now < self.seen:
            self.total += int((self.folder / "max_energy_range_uj").read_text())
        self.total += now - self.seen
        self.seen = now
        return self.total / 1e6


def _processors(powercap: Path) -> dict[str, Callable[[], float]]:
    found: dict[str, Callable[[], float]] = {}
    # One colon: whole packages, which include their parts (two colons).
    for folder in sorted(powercap.glob("*-rapl:*")):
        if folder.name.count(":") == 1:
            try:
                found[folder.name] = _Rapl(folder).joules
            except (OSError, ValueError):
                continue  # on many machines only root may read it
    return found


def _gpus() -> dict[str, Callable[[], float]]:
    found = {}
    for number, gpu in enumerate(gpus()):
        try:
            gpu.joules()
        except Exception:  # noqa: S112  a GPU older than Volta counts no energy
            continue
        found[f"gpu{number}"] = gpu.joules
    return found
