"""Counters of the machine, read from made-up files, and of made-up devices."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_instant.tools.measure import nvml
from vllm_instant_loadtests import host_evidence as host

TICKS = os.sysconf("SC_CLK_TCK")


def written(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def process(root: Path, pid: int, cpu: int, children: str = "") -> None:
    fields = " ".join(["S", "1", *["0"] * 9, f"{cpu}", "0", "0", "0", *["0"] * 10])
    (root / f"proc/{pid}/task/{pid}").mkdir(parents=True)
    (root / f"proc/{pid}/stat").write_text(f"{pid} (a name) with) {fields}")
    (root / f"proc/{pid}/task/{pid}/children").write_text(children)
    (root / f"proc/{pid}/cgroup").write_text("0::/server\n")


@pytest.fixture
def machine(tmp_path):
    root = written(
        tmp_path,
        proc__stat=f"cpu  {100 * TICKS} 0 {20 * TICKS} 900 5 0 0 {7 * TICKS} 0 0\n",
        proc__vmstat="pgfault 9\npgmajfault 31\n",
        proc__pressure__memory="some avg10=0.00 total=2500000\nfull avg10=0.00 total=1\n",
    )
    written(root, **{"sys__fs__cgroup__server__cpu.stat": "usage_usec 5\nthrottled_usec 1500000\n"})
    process(root, 10, 30 * TICKS, "11 ")
    process(root, 11, 40 * TICKS)
    process(root, 99, 25 * TICKS)
    return root


def test_processes_of_the_server_are_told_from_others(machine):
    found = host.HostReader([10], machine, []).reading()
    assert found[host.OWN_CPU_SECONDS] == 70
    assert found[host.OTHER_CPU_SECONDS] == 50
    assert found[host.STEAL_SECONDS] == 7
    assert found[host.CORES] == os.cpu_count()


def test_pressure_and_page_faults(machine):
    found = host.HostReader([10], machine, []).reading()
    assert (found[host.MEMORY_STALL_SECONDS], found[host.MAJOR_FAULTS]) == (2.5, 31)


def test_the_quota_of_either_version_of_control_groups(machine):
    assert host.HostReader([10], machine, []).reading()[host.THROTTLED_SECONDS] == 1.5
    (machine / "proc/10/cgroup").write_text("3:cpuset:/\n1:cpu,cpuacct:/box\n0::/\n")
    (machine / "sys/fs/cgroup/cpu,cpuacct/box").mkdir(parents=True)
    (machine / "sys/fs/cgroup/cpu,cpuacct/box/cpu.stat").write_text("nr_throttled 3\nthrottled_time 250000000\n")
    assert host.HostReader([10], machine, []).reading()[host.THROTTLED_SECONDS] == 0.25


def test_what_a_machine_does_not_have_is_left_out(tmp_path):
    assert set(host.HostReader([1], tmp_path, []).reading()) == {host.CORES}


def test_a_server_elsewhere_has_no_machine_here():
    assert host.host_reader("http://10.0.0.1:8000", os.getpid()) is None


def test_a_server_here_is_found_by_its_port(tmp_path):
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        reader = host.host_reader(f"http://127.0.0.1:{listening.getsockname()[1]}", os.getpid())
    assert reader is not None
    assert reader.reading()[host.OWN_CPU_SECONDS] > 0


def fake_nvml(**changes):
    """The library with two devices: the first is at its power limit, as usual, the second is hot."""
    functions = {
        "nvmlDeviceGetClockInfo": lambda device, _: (1980, 1200)[device],
        "nvmlDeviceGetCurrentClocksEventReasons": lambda device: (0x04, 0x40)[device],
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(used=1 << 30),
        "nvmlDeviceGetPcieThroughput": lambda device, counter: (10, 20)[counter],
    }
    constants = {"NVML_CLOCK_SM": 1, "NVML_PCIE_UTIL_TX_BYTES": 0, "NVML_PCIE_UTIL_RX_BYTES": 1}
    return SimpleNamespace(**{**functions, **constants, **changes})


def test_devices_are_read_together(tmp_path):
    devices = [nvml.Gpu(f"gpu {number}", fake_nvml(), number) for number in range(2)]
    found = host.HostReader([1], tmp_path, devices).reading()
    assert (found[host.GPU_CLOCK], found[host.GPU_SLOWED]) == (1200, 1)
    assert (found[host.GPU_MEMORY], found[host.GPU_PCIE]) == (2 << 30, 2 * 30 * 1024)
    assert not devices[0].reading().slowed_down


def test_a_device_that_reports_less_tells_nothing(tmp_path):
    def refuse(*_):
        raise RuntimeError("not supported")

    library = fake_nvml(nvmlDeviceGetClockInfo=refuse)
    found = host.HostReader([1], tmp_path, [nvml.Gpu("g", library, 0)]).reading()
    assert host.GPU_CLOCK not in found
