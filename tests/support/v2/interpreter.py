"""Triton's interpreter in the place of a Triton backend for CPUs. Call ``offer`` before importing vLLM or Triton.

vLLM has a V2 model runner for CPUs and uses it where Triton has a backend called "cpu". None is released, but the
interpreter runs the same kernels on CPU tensors.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def offer() -> None:
    """Make Triton interpret, and name a backend that lets vLLM find Triton usable on this machine."""
    if "triton" in sys.modules or "vllm" in sys.modules:
        raise RuntimeError("the interpreter must be offered before Triton or vLLM is imported")
    os.environ["TRITON_INTERPRET"] = "1"
    from vllm_instant.patches.pretended_device import offer_driver

    offer_driver()
    _accept_integer_masks()


def _accept_integer_masks() -> None:
    """Compiled kernels treat an integer mask as a boolean one; the interpreter indexes with it and fails."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def boolean(mask: Any) -> Any:
        if mask is None or np.asarray(mask.data).dtype == bool:
            return mask
        return TensorHandle(np.asarray(mask.data).astype(bool), mask.dtype)

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        return load(self, pointers, boolean(mask), other, *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return store(self, pointers, value, boolean(mask), *rest, **options)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
