"""Everything that a GPU can answer, in one command.

    python benchmarks/gpu/run_all.py [--model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B]

First the kernels, which need PyTorch and Triton only: right, then fast. Then, where vLLM and this package are installed
and a model is named, whole servers. Each part writes its own result file; a part that fails does not stop the others,
and the exit code says whether one did.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = ("kernels.py", "block_verification.py")


def main() -> int:
    """Run all parts; returns 1 if one failed, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="also measure servers of this model")
    parser.add_argument("--draft", default=None)
    options, more = parser.parse_known_args()
    from timing import can_run

    if not can_run():
        return 2
    parts = [[name] for name in KERNELS]
    if options.model:
        if importlib.util.find_spec("vllm") is None:
            print("Servers are left out: vLLM is not installed.", file=sys.stderr)
        else:
            draft = ["--draft", options.draft] if options.draft else []
            parts.append(["servers.py", "--model", options.model, *draft, *more])
    failed = [
        part[0] for part in parts if subprocess.run([sys.executable, HERE / part[0], *part[1:]], check=False).returncode
    ]
    for name in failed:
        print(f"{name} failed.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
