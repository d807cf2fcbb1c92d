"""vLLM's platform as if the machine had eight H100, for configuration only: nothing can run on them."""

from __future__ import annotations

import importlib
import sys
import types

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
    """Replace the current platform; call it after ``interpreter.offer``, before importing vLLM's engine."""
    import torch

    for name in EXTENSIONS:
        sys.modules.setdefault(name, types.ModuleType(name))
    for query in QUERIES:
        setattr(torch.ops._C, query, lambda *arguments: True)
    platforms = importlib.import_module("vllm.platforms")
    cuda = importlib.import_module("vllm.platforms.cuda")
    interface = importlib.import_module("vllm.platforms.interface")

    class Pretended(cuda.NonNvmlCudaPlatform):  # type: ignore[misc,name-defined]
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

    platforms._current_platform = Pretended()
