"""Let a worker of vLLM's CPU build start in a process that has loaded Numba.

Such a worker replaces Triton kernels by functions of its own and searches for them in the attributes of all loaded
modules: it calls ``vars()`` on each object that has a ``__dict__``. The library handle in ``llvmlite.binding.ffi``
claims to have every attribute and returns a foreign function for it, so that the search ends with an
``AttributeError``. An engine in a process of its own loads Numba after that search. An engine in the caller's process
(``VLLM_ENABLE_V1_MULTIPROCESSING=0``) starts after the check of the deployment has loaded the plugins, and Numba with
them.
"""

from __future__ import annotations

import sys
from typing import Any

from vllm_instant.patches.compat import HasSignature, VllmPatch

DISPATCHER_MODULE = "vllm.triton_utils.dispatcher"
HIDDEN = "llvmlite.binding.ffi"
"""A module that contains no kernel, and on which the search fails."""


def _rebind_kernels(search: Any, overrides: Any) -> Any:
    hidden = sys.modules.pop(HIDDEN, None)
    try:
        return search(overrides)
    finally:
        if hidden is not None:
            sys.modules[HIDDEN] = hidden


def _state() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return "not needed on this device"
    return "repairs when served with the plugin: an engine in the caller's own process did not start beside Numba"


PATCH = VllmPatch(
    name="cpu_numba_scan",
    purpose="the engine may run in the caller's own process, on the CPU",
    requirements=(HasSignature("triton_utils/dispatcher.py", "_rebind_kernels", ("overrides",)),),
    optional=True,
    state=_state,
    wraps={f"{DISPATCHER_MODULE}:_rebind_kernels": _rebind_kernels},
)
