"""Put a patch around stand-ins for vLLM's classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm_instant.patches.compat import VllmPatch
from vllm_instant.patches.wrapping import WrappedMethod


def wrap(patch: VllmPatch, module: str, **stand_ins: Any) -> SimpleNamespace:
    """Change stand-ins for classes and functions of a vLLM module as ``patch`` alone would change them.

    Methods that a stand-in does not have are left out.
    """
    namespace = SimpleNamespace(**stand_ins)
    for target in patch.wraps:
        name, _, path = target.partition(":")
        if name == module and _has(namespace, *path.split(".")):
            method = WrappedMethod(target, (patch,))
            method.activate((patch.name,))
            method.apply(namespace)
    if module in patch.on_import:
        patch.on_import[module](namespace)
    return namespace


def _has(namespace: SimpleNamespace, owner: str, method: str = "") -> bool:
    found = getattr(namespace, owner, None)
    if not method or found is None:
        return found is not None
    return any(method in vars(kind) for kind in found.__mro__ if kind is not object)
