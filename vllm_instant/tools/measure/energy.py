"""What the machine has used of energy so far, where it can tell: NVML counts for GPUs, RAPL for processors.

Counters are the machine's, not a process's: what runs beside the server is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vllm_instant.tools.measure.nvml import gpus

POWERCAP = Path("/sys/class/powercap")


@dataclass
class EnergyMeter:
    """Adds up the machine's energy counters."""

    sources: dict[str, Callable[[], float]] = field(default_factory=dict)
    """By name: joules since some time in the past."""

    def joules(self) -> float | None:
        """All counters together; None without any."""
        return sum(read() for read in self.sources.values()) if self.sources else None


def energy_meter(powercap: Path = POWERCAP) -> EnergyMeter:
    """The counters of this machine that can be read."""
    return EnergyMeter(_gpus() | _processors(powercap))


@dataclass
class _Rapl:
    """One domain of the processor; its counter starts again at zero now and then."""

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
    # One colon: whole packages. Their parts, with two, are in them already.
    for folder in sorted(powercap.glob("*-rapl:*")):
        if folder.name.count(":") == 1:
            try:
                found[folder.name] = _Rapl(folder).joules
            except (OSError, ValueError):
                continue  # only root may read it on many machines
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
