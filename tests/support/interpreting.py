"""Calls functions that launch Triton kernels on CPU tensors in Triton's interpreter.

Whether kernels are interpreted is decided when Triton is imported. They therefore run in a separate process, which is
reused by further calls; this process can compile kernels.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


def interpreted(function: Callable[..., Any], *arguments: Any) -> tuple[torch.Tensor, ...]:
    """``function(*arguments)`` in the interpreter; it must be importable by name and return a tuple of tensors.

    Tensors keep their strides. Changes of the arguments are lost.
    """
    results = _process().submit(_call, function, [_packed(argument) for argument in arguments]).result()
    return tuple(map(_unpacked, results))


def kernel_tensors(kernel: str, grid: tuple[int, ...], names: Sequence[str], *values: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of one launch after the kernel has run; to be called through ``interpreted``.

    Args:
        kernel: module and name of the kernel, separated by a colon.
        grid: programs along each axis.
        names: names of the kernel's parameters.
        values: values of these parameters.

    """
    module, _, name = kernel.partition(":")
    getattr(importlib.import_module(module), name)[grid](**dict(zip(names, values, strict=True)))
    return tuple(value for value in values if isinstance(value, torch.Tensor))


@functools.cache
def _process() -> ProcessPoolExecutor:
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_choose_interpreter)
    atexit.register(process.shutdown)
    return process


def _choose_interpreter() -> None:
    if "triton" in sys.modules:
        raise RuntimeError("Triton is imported before it is told to interpret")
    os.environ["TRITON_INTERPRET"] = "1"
    # Functions of test modules are called tests.….test_….name.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    torch.set_num_threads(1)


def _call(function: Callable[..., Any], packed: list[Any]) -> list[Any]:
    return [_packed(result) for result in function(*map(_unpacked, packed))]


def _packed(value: Any) -> Any:
    """Tensors as arrays, which are sent between processes without shared memory."""
    if not isinstance(value, torch.Tensor):
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return _Packed((whole.numpy(), value.shape, value.stride(), value.storage_offset()))


class _Packed(tuple[Any, ...]):
    """An array, and the shape, strides and offset of the tensor in it."""


def _unpacked(value: Any) -> Any:
    if not isinstance(value, _Packed):
        return value
    array, *layout = value
    return torch.from_numpy(array).as_strided(*layout)
