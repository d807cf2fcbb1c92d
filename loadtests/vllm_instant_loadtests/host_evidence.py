"""What the machine of a server did meanwhile: CPU quota, stolen time, memory pressure, other processes, GPUs.

Counters of Linux (``/proc``, cgroups of both versions) and of NVML are read beside a server's ``/metrics`` and recorded
with them, under names that begin with ``host:``. Only for servers on this machine: of others nothing is known here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_instant.tools.measure.http_client import is_local
from vllm_instant.tools.measure.nvml import Gpu, gpus

CORES = "host:cores"
THROTTLED_SECONDS = "host:cpu_quota_throttled_seconds"
STEAL_SECONDS = "host:cpu_steal_seconds"
MEMORY_STALL_SECONDS = "host:memory_stall_seconds"
MAJOR_FAULTS = "host:major_page_faults"
OWN_CPU_SECONDS = "host:own_cpu_seconds"
OTHER_CPU_SECONDS = "host:other_cpu_seconds"
GPU_CLOCK, GPU_SLOWED = "host:gpu_clock_mhz", "host:gpu_slowed_down"
GPU_MEMORY, GPU_PCIE = "host:gpu_memory_bytes", "host:gpu_pcie_bytes_per_second"
_TICKS = os.sysconf("SC_CLK_TCK")


class HostReader:
    """Reads the counters of this machine and of one server's processes.

    Args:
        own: the processes of the server and of the load generator, with their children; all else is "other processes".
        root: of the file system, for tests.
        devices: the GPUs.

    """

    def __init__(self, own: Sequence[int], root: Path = Path("/"), devices: Sequence[Gpu] | None = None) -> None:
        self._own, self._root = list(own), root
        self._devices = gpus() if devices is None else devices

    def reading(self) -> dict[str, float]:
        """The counters that this machine has, now."""
        found: dict[str, float] = {CORES: float(os.cpu_count() or 1)}
        for read in (self._processors, self._quota, self._memory, self._gpus):
            with suppress(OSError, ValueError, IndexError):
                found |= read()
        return found

    def _processors(self) -> dict[str, float]:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(
            float, (self._root / "proc/stat").read_text().splitlines()[0].split()[1:]
        )
        busy = (user + nice + system + irq + softirq) / _TICKS
        own = sum(map(self._cpu_seconds, self._tree()))
        return {STEAL_SECONDS: steal / _TICKS, OWN_CPU_SECONDS: own, OTHER_CPU_SECONDS: max(0.0, busy - own)}

    def _tree(self) -> set[int]:
        """The server's and the load generator's processes with all their children."""
        found, waiting = set(), list(self._own)
        while waiting:
            pid = waiting.pop()
            if pid in found:
                continue
            found.add(pid)
            for task in self._listed(f"proc/{pid}/task"):
                with suppress(OSError):
                    children = (self._root / f"proc/{pid}/task/{task}/children").read_text()
                    waiting += map(int, children.split())
        return found

    def _listed(self, folder: str) -> Iterable[str]:
        try:
            return [path.name for path in (self._root / folder).iterdir()]
        except OSError:
            return []

    def _cpu_seconds(self, pid: int) -> float:
        try:
            fields = (self._root / f"proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        # utime and stime, and those of children that have ended: fields 14 to 17 of proc(5).
        return sum(map(float, fields[11:15])) / _TICKS

    def _quota(self) -> dict[str, float]:
        """The longest time that any of the server's control groups was throttled for."""
        throttled = [self._throttled(pid) for pid in self._own]
        known = [seconds for seconds in throttled if seconds is not None]
        return {THROTTLED_SECONDS: max(known)} if known else {}

    def _throttled(self, pid: int) -> float | None:
        for line in (self._root / f"proc/{pid}/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                folders, key, unit = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), "throttled_usec", 1e6
            elif "cpu" in controllers.split(","):
                folders, key, unit = (f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"), "throttled_time", 1e9
            else:
                continue
            for folder in folders:
                with suppress(OSError):
                    text = (self._root / folder / path.lstrip("/") / "cpu.stat").read_text()
                    values = dict(entry.split() for entry in text.splitlines())
                    if key in values:
                        return float(values[key]) / unit
        return None

    def _memory(self) -> dict[str, float]:
        counters = dict(line.split() for line in (self._root / "proc/vmstat").read_text().splitlines())
        found = {MAJOR_FAULTS: float(counters["pgmajfault"])} if "pgmajfault" in counters else {}
        with suppress(OSError):
            some = (self._root / "proc/pressure/memory").read_text().splitlines()[0]
            found[MEMORY_STALL_SECONDS] = float(some.rpartition("total=")[2]) / 1e6
        return found

    def _gpus(self) -> dict[str, float]:
        """The slowest clock, whether any device is slowed down, and sums over the devices."""
        readings = []
        for device in self._devices:
            with suppress(Exception):  # NVML's own errors: a device that reports one value less tells nothing here
                readings.append(device.reading())
        if not readings:
            return {}
        return {
            GPU_CLOCK: min(one.clock_mhz for one in readings),
            GPU_SLOWED: max(float(one.slowed_down) for one in readings),
            GPU_MEMORY: sum(one.memory_bytes for one in readings),
            GPU_PCIE: sum(one.pcie_bytes_per_second for one in readings),
        }


def host_reader(url: str, generator: int) -> HostReader | None:
    """A reader for a server on this machine; None for others, and where its process cannot be found.

    Args:
        url: of the server.
        generator: process id of the load generator.

    """
    server = _listening(url)
    return HostReader([server, generator]) if server is not None else None


def _listening(url: str) -> int | None:
    if not is_local(url):
        return None
    import psutil

    port = urlsplit(url).port or 80
    try:
        connections: list[Any] = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    pids = {one.pid for one in connections if one.status == psutil.CONN_LISTEN and one.laddr.port == port}
    return min((pid for pid in pids if pid), default=None)
