"""Compiles kernels ahead of time as they would be launched, and reads the resources of their machine code.

``launches`` records the launches of a function without running them; ``compiled`` compiles one launch.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

OPTIONS = {"num_warps", "num_stages"}
"""Keywords of a launch that are not parameters of the kernel."""
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
"""Bytes per thread of a load instruction, by the suffix of its name; 4 without one."""
TENSOR_CORES = {"HMMA", "QMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "OMMA"}
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments of its launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Machine:
    """The machine code of a kernel and its resources."""

    cubin: bytes
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of spilled registers per thread, stores and loads together."""
    shared: int
    """Bytes of shared memory."""
    instructions: Mapping[str, int]
    """Number of occurrences of each instruction in the code, by its full name."""

    def loads(self) -> dict[int, int]:
        """Loads from global memory by their width in bytes, asynchronous copies included."""
        widths: Counter[int] = Counter()
        for name, times in self.instructions.items():
            parts = name.split(".")
            if parts[0] in ("LDG", "LDGSTS"):
                widths[next((WIDTHS[part] for part in parts if part in WIDTHS), 4)] += times
        return dict(sorted(widths.items()))

    def products(self) -> int:
        """Number of tensor core instructions."""
        return sum(times for name, times in self.instructions.items() if name.split(".")[0] in TENSOR_CORES)


def launches(module: ModuleType, function: Callable[..., Any], *arguments: Any) -> list[Launch]:
    """The launches of kernels of ``module`` by ``function(*arguments)``; none of them runs."""
    recorded: list[Launch] = []
    with _recording(module, recorded):
        function(*arguments)
    return recorded


@contextmanager
def _recording(module: ModuleType, recorded: list[Launch]) -> Iterator[None]:
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    for name, kernel in kernels.items():
        setattr(module, name, _Recorder(kernel, recorded))
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


@dataclass(frozen=True)
class _Recorder:
    """A substitute for a kernel that records launches."""

    kernel: Any
    recorded: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*positional: Any, **keywords: Any) -> None:
            options = {name: keywords.pop(name) for name in OPTIONS & keywords.keys()}
            bound = self.kernel.signature.bind(*positional, **keywords)
            bound.apply_defaults()
            self.recorded.append(Launch(self.kernel, grid, bound.arguments, options))

        return launch


def compiled(launch: Launch, capability: int, folder: Path) -> Machine:
    """The machine code of a launch for ``sm_<capability>``, with the specialisation of a launch on the device.

    The assembler's files are written to ``folder``. Raises Triton's errors, and ``subprocess.CalledProcessError`` if
    the assembler refuses the code.
    """
    signature, constants, attributes = {}, {}, {}
    for position, (name, value) in enumerate(launch.arguments.items()):
        unchanged = launch.kernel.params[position].do_not_specialize
        if (
            launch.kernel.params[position].is_constexpr
            or value is None
            or (not unchanged and _is_int(value) and value == 1)
        ):
            signature[name] = "constexpr"
            constants[(position,)] = value
            continue
        signature[name] = _type(value)
        # PyTorch allocates aligned memory on every device; a view of it may be unaligned.
        place = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if not unchanged and _is_int(place) and place % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    log = _assembled(result.asm["ptx"], capability, folder)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if not spills or not registers:
        raise ValueError(f"the assembler says nothing about registers or spills:\n{log}")
    spilled = int(spills[1]) + int(spills[2])
    cubin = result.asm["cubin"]
    return Machine(cubin, int(registers[1]), spilled, result.metadata.shared, _instructions(cubin, folder))


def _instructions(cubin: bytes, folder: Path) -> Counter[str]:
    binary = folder / "kernel.cubin"
    binary.write_bytes(cubin)
    disassembler = Path(get_ptxas(90).path).with_name("nvdisasm")
    run = subprocess.run([str(disassembler), "-c", str(binary)], capture_output=True, text=True, check=True)
    # "        /*0120*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", run.stdout, re.MULTILINE))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i1" if isinstance(value, bool) else "i32" if -(2**31) <= value < 2**31 else "i64"


def _assembled(ptx: str, capability: int, folder: Path) -> str:
    """The assembler's report on a kernel."""
    architecture = re.search(r"\.target\s+(sm_\w+)", ptx)
    if not architecture:
        raise ValueError("the code names no architecture")
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture[1]}", str(source), "-o", f"{source}.cubin"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stderr + run.stdout
