"""The kernels' machine code for devices that are not present: registers, spills, shared memory, load widths.

    .venv/bin/python benchmarks/machine_code.py

Compiles every kernel ahead of time for compute capabilities 8.0, 9.0 and 10.0, as its host function would launch it,
with Triton and the assembler that comes with it, and vLLM's own unified attention in the same way, both as vLLM
launches it and with tiles as large as ours. Nothing runs, so this says nothing about time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from results import HERE, write


def main() -> None:
    """Compile, print, write ``benchmarks/results/machine_code.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results/machine_code.json")
    options = parser.parse_args()
    # Importable since `results` was imported.
    import triton
    from compiled_kernels import printed, table

    rows = table()
    print(printed(rows))
    write(options.output, {"triton": triton.__version__, "rows": rows})


if __name__ == "__main__":
    main()
