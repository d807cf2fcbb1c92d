"""A worker of vLLM's CPU build that finds Numba in memory starts.

Such a worker puts functions of its own in the place of Triton kernels, and looks for them in all attributes of all
loaded modules: whatever says that it has a ``__dict__`` is asked for ``vars()``. The library handle in
``llvmlite.binding.ffi`` says so of every name, and answers with a foreign function; the search ends with an
``AttributeError``, and the worker with it. Where the engine has a process of its own, Numba comes after that search.
Where it runs in the caller's (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), checking the deployment has loaded the plugins,
and with them Numba.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from vllm_instant.patches.compat import HasSignature, VllmPatch
from vllm_instant.patches.import_hooks import when_imported

DISPATCHER_MODULE = "vllm.triton_utils.dispatcher"
HIDDEN = "llvmlite.binding.ffi"
"""A module that no kernel is in."""


def _repair(module: ModuleType) -> None:
    search = module._rebind_kernels

    @functools.wraps(search)
    def _rebind_kernels(overrides: Any) -> Any:
        hidden = sys.modules.pop(HIDDEN, None)
        try:
            return search(overrides)
        finally:
            if hidden is not None:
                sys.modules[HIDDEN] = hidden

    module._rebind_kernels = _rebind_kernels  # type: ignore[attr-defined]


def install() -> None:
    """Change the search when its module is loaded; only the CPU build calls it."""
    when_imported(DISPATCHER_MODULE, _repair)


def _state() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return "not needed on this device"
    return "repairs when served with the plugin: an engine in the caller's own process did not start beside Numba"


PATCH = VllmPatch(
    name="kernel_scan",
    purpose="the engine may run in the caller's own process, on the CPU",
    requirements=(HasSignature("triton_utils/dispatcher.py", "_rebind_kernels", ("overrides",)),),
    optional=True,
    state=_state,
)
