"""Change a module right after its first import, so that no process loads what it would not have loaded anyway.

The front end never imports the model runner, and the engine core only does when it runs the worker in its own
process: a patch that touches such a module waits for it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Change = Callable[[ModuleType], None]

_waiting: dict[str, list[Change]] = defaultdict(list)
_registered: set[tuple[str, str]] = set()


def when_imported(module_name: str, change: Change) -> None:
    """Call ``change(module)`` once: now if the module is loaded, else right after its first import."""
    identity = (module_name, f"{change.__module__}.{change.__qualname__}")
    if identity in _registered:
        return
    _registered.add(identity)
    loaded = sys.modules.get(module_name)
    # A module that is being imported at this moment is already listed, but not finished.
    if loaded is not None and not getattr(getattr(loaded, "__spec__", None), "_initializing", False):
        change(loaded)
        return
    _waiting[module_name].append(change)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ChangingLoader(spec.loader)
                return spec
        return None


class _ChangingLoader(Loader):
    def __init__(self, original: Loader) -> None:
        self._original = original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if it had been imported without us.
        module.__loader__ = self._original
        if module.__spec__ is not None:
            module.__spec__.loader = self._original
        self._original.exec_module(module)
        for change in _waiting.pop(module.__name__, []):
            change(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
