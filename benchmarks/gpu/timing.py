"""What the benchmarks of kernels share: graphs, rounds in which arms take turns, intervals, result files.

Needs PyTorch with a CUDA device, and nothing else that is installed.
"""

from __future__ import annotations

import datetime
import json
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A checkout is enough.
sys.path[:0] = [str(ROOT / path) for path in ("triton_kernels", "tests/support", "tests/support/plugins", "benchmarks")]

HEAD, KV_HEADS, BLOCK = 128, 8, 16
ROTATED_BYTES = 256 << 20
"""Buffers that take turns are together at least this large, several times an L2 cache."""


def can_run() -> bool:
    """Whether there is a device; says what is missing."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        print(f"This needs PyTorch and Triton on a machine with a CUDA device: {error}.", file=sys.stderr)
        return False
    if not torch.cuda.is_available():
        print("This needs a CUDA device, and PyTorch finds none.", file=sys.stderr)
        return False
    return True


def graph(function: Callable[[], Any]) -> Any:
    """A call as a CUDA graph, run once before it is captured."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        function()
    return captured


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call as a CUDA graph; the tensors that it was captured with live as long as the result."""
    return partial(_replay, graph(call), call)


def _replay(captured: Any, _kept: Any) -> None:
    captured.replay()


def times(arms: dict[str, list[Callable[[], Any]]], runs: int) -> dict[str, list[float]]:
    """Microseconds between events around each call, after a tenth as many calls that do not count."""
    import torch

    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for run in range(-runs // 10, runs):
        for arm, functions in arms.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            began.record()
            functions[run % len(functions)]()
            ended.record()
            torch.cuda.synchronize()
            if run >= 0:
                found[arm].append(1000 * began.elapsed_time(ended))
    return found


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Median and interval of each arm."""
    return {arm: median_interval(values) for arm, values in found.items()}


def copy_bandwidth(runs: int) -> float:
    """Median bytes per second of a copy of 1 GiB, read and written."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = times({"copy": [replayed(partial(target.copy_, source))]}, runs)
    return 2 * (1 << 30) / (summary(found)["copy"]["median"] * 1e-6)


def median_interval(values: Sequence[float], confidence: float = 0.95, draws: int = 2000) -> dict[str, float]:
    """Median with its percentile-bootstrap interval.

    As in ``vllm_instant.tools.measure.statistics``, with nothing but the standard library.
    """
    generator = random.Random(0)
    resampled = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    tail = (1 - confidence) / 2
    low, high = resampled[int(tail * draws)], resampled[int((1 - tail) * draws) - 1]
    return {"median": statistics.median(values), "low": low, "high": high}


def write(path: Path, measured: Any) -> None:
    """Write ``measured`` with the environment that it was measured in as JSON."""
    import torch
    import triton

    run = {
        "name": "",
        "command": " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "measured": measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": path.stem, "runs": [run]}, indent=1) + "\n")
    print(f"wrote {path}")


def _commit() -> str:
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"
