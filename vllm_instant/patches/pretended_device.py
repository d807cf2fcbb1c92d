"""vLLM's platform as if the machine had GPUs, to resolve a configuration: nothing can run on them.

Triton counts as usable where it has a driver, which vLLM requires of its V2 model runner; a stand-in is one.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

NAMES = ("h100",)
"""Devices that can be pretended."""
# Compiled parts that only a CUDA build has; its Python modules import them for their side effects.
EXTENSIONS = (
    "vllm._C",
    "vllm._C_stable_libtorch",
    "vllm._moe_C",
    "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
QUERIES = (
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_group_gemm_supported",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_sparse_scaled_mm_supported",
)


def pretend() -> None:
    """Make this process, which must not have imported vLLM or Triton, see eight H100 with 80 GiB.

    Raises:
        RuntimeError: vLLM or Triton was imported before.

    """
    if "vllm" in sys.modules or "triton" in sys.modules:
        raise RuntimeError("a device must be pretended before Triton or vLLM is imported")
    os.environ["TRITON_INTERPRET"] = "1"
    offer_driver()
    replace_platform()


def offer_driver() -> None:
    """Give Triton a driver of its interpreter, under the name of a backend for CPUs."""
    import triton.backends

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=InterpreterDriver)


class InterpreterDriver:
    """As much of a Triton driver as vLLM asks for."""

    @classmethod
    def is_active(cls) -> bool:
        """Whether Triton may use it."""
        return True

    def get_current_target(self) -> Any:
        """The interpreter needs none, but Triton asks."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", "", 0)

    def get_current_device(self) -> int:
        """The only one."""
        return 0


def replace_platform() -> None:
    """Replace vLLM's current platform."""
    import torch

    for name in EXTENSIONS:
        sys.modules.setdefault(name, types.ModuleType(name))
    for query in QUERIES:
        setattr(torch.ops._C, query, lambda *arguments: True)
    platforms = importlib.import_module("vllm.platforms")
    cuda = importlib.import_module("vllm.platforms.cuda")
    interface = importlib.import_module("vllm.platforms.interface")

    class Pretended(cuda.NonNvmlCudaPlatform):  # type: ignore[name-defined]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> object:
            return interface.DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 (pretended)"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        @classmethod
        def import_kernels(cls) -> None:
            pass

        @classmethod
        def device_count(cls) -> int:
            return 8

    vars(platforms)["_current_platform"] = Pretended()
