"""Wrap methods of vLLM: each of them once, with all features around it in a fixed order.

A feature (one patch file) declares in ``VllmPatch.wraps`` which methods it wants to surround. ``wrapped_methods``
lists, for every such method, its features from the outermost to the innermost. ``Wrapping`` puts one wrapper around
each method, which calls the active features in that order, and it does so right after the method's module was
imported: no process imports a vLLM module only because it is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import wrapt

from vllm_instant.patches.compat import VllmPatch, Wrapper


class PatchConflictError(Exception):
    """An attribute of vLLM would be patched for the second time."""


class WrappedMethod:
    """One method or function of vLLM with the features around it.

    Args:
        target: ``module:Class.method`` or ``module:function``.
        features: the patches that surround it, outermost first.

    """

    def __init__(self, target: str, features: Sequence[VllmPatch]) -> None:
        for patch in features:
            if target not in patch.wraps:
                raise KeyError(f"patch {patch.name} does not wrap {target}")
        self.target = target
        self.features = tuple(features)
        self._innermost_first: tuple[Wrapper, ...] = ()

    def activate(self, names: Iterable[str]) -> None:
        """Call the features with these names from now on, and no others."""
        chosen = set(names)
        self._innermost_first = tuple(
            patch.wraps[self.target] for patch in reversed(self.features) if patch.name in chosen
        )

    def __call__(self, original: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        """Run the method with its active features around it (called by wrapt)."""
        call = original
        for wrapper in self._innermost_first:
            call = partial(wrapper, call) if instance is None else partial(wrapper, call, instance)
        return call(*args, **kwargs)

    def apply(self, module: Any) -> None:
        """Wrap the method in its loaded module; does nothing the second time.

        Raises:
            PatchConflictError: something else of this package wraps the same attribute.

        """
        _wrap(module, self.target.partition(":")[2], self)


def wrap_method(parent: Any, name: str, wrapper: Wrapper) -> None:
    """Wrap a method that is known at run time only, of a class found in vLLM's tables for example.

    Raises:
        PatchConflictError: this package wraps it already.

    """

    def call(original: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapper(original, instance, *args, **kwargs)

    _wrap(parent, name, call)


def _wrap(parent: Any, name: str, wrapper: Callable[..., Any]) -> None:
    owner, attribute, original = wrapt.resolve_path(parent, name)
    present = vars(owner).get(attribute)
    if isinstance(present, _InstantWrapper):
        if present._self_wrapper is wrapper:
            return
        raise PatchConflictError(
            f"{name} of {getattr(parent, '__name__', parent)} is patched already: a method of vLLM is wrapped once; "
            "add the feature to its row in vllm_instant/patches/wrapped_methods.py"
        )
    wrapt.apply_patch(owner, attribute, _InstantWrapper(original, wrapper))


class _InstantWrapper(wrapt.FunctionWrapper[..., Any]):
    """Marks the attributes that this package has wrapped."""


class Wrapping:
    """What this process wraps.

    Args:
        order: by target, the features around it, outermost first.

    """

    def __init__(self, order: Mapping[str, Sequence[VllmPatch]]) -> None:
        self._methods = {target: WrappedMethod(target, features) for target, features in order.items()}
        self._active: dict[str, VllmPatch] = {}
        self._changed: set[tuple[str, str]] = set()

    def is_active(self, patch: VllmPatch) -> bool:
        """Whether a patch was activated in this process."""
        return patch.name in self._active

    def activate(self, patches: Iterable[VllmPatch]) -> None:
        """Activate patches in addition to the active ones; each module is changed now or after its first import."""
        new = [patch for patch in patches if patch.name not in self._active]
        self._active.update({patch.name: patch for patch in new})
        for method in self._methods.values():
            method.activate(self._active)
        modules = dict.fromkeys(
            [target.partition(":")[0] for patch in new for target in patch.wraps]
            + [module for patch in new for module in patch.on_import]
        )
        for name in modules:
            wrapt.register_post_import_hook(partial(self.change, name), name)

    def change(self, name: str, module: Any) -> None:
        """Wrap the methods of one loaded module, and run what active patches do when it is imported."""
        for target, method in self._methods.items():
            if target.partition(":")[0] == name and any(map(self.is_active, method.features)):
                method.apply(module)
        for patch in self._active.values():
            if name in patch.on_import and (patch.name, name) not in self._changed:
                self._changed.add((patch.name, name))
                patch.on_import[name](module)
