"""What a patch relies on in vLLM, and a check of it against vLLM's sources.

The check reads Python files with ``ast``: nothing of vLLM is imported, so that it takes milliseconds, works for a
release that is merely unpacked, and does not depend on an installation that can be imported.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

Wrapper = Callable[..., Any]
"""Called in the place of a vLLM method with the next callable inwards, the instance, and the method's arguments.

A function without an instance is wrapped by ``wrapper(inner, *args, **kwargs)``.
"""


class RequirementError(Exception):
    """A requirement that does not hold; the message says what is different."""


class Requirement(Protocol):
    """One condition on vLLM's sources."""

    @property
    def file(self) -> str:
        """The file that is read, relative to the package folder."""
        ...

    def check(self, vllm: Path) -> None:
        """Raise RequirementError if it does not hold in the package folder ``vllm``."""
        ...


@lru_cache(maxsize=64)
def _module(path: Path) -> ast.Module:
    if not path.is_file():
        raise RequirementError(f"{path.name} is gone")
    return ast.parse(path.read_text(encoding="utf-8"))


def forget_sources() -> None:
    """Release the parsed sources: tens of megabytes that a server does not need after the check."""
    _module.cache_clear()


def _find(vllm: Path, file: str, qualified_name: str) -> ast.AST:
    """The definition of ``Class.method``, ``Class``, ``function`` or a module-level name."""
    scope: ast.AST = _module(vllm / file)
    for part in qualified_name.split("."):
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == part:
                scope = node
                break
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == part:
                scope = node
                break
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == part for t in node.targets):
                scope = node
                break
        else:
            raise RequirementError(f"{file} has no {qualified_name}")
    return scope


@dataclass(frozen=True)
class HasSignature:
    """A function or method whose leading positional parameters have these names.

    ``exact``: this package calls it, so that further parameters must have defaults; otherwise a wrapper passes them on.
    """

    file: str
    name: str
    parameters: tuple[str, ...]
    exact: bool = False

    def check(self, vllm: Path) -> None:
        node = _find(vllm, self.file, self.name)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            raise RequirementError(f"{self.file}: {self.name} is no longer a function")
        found = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args))
        if found[: len(self.parameters)] != self.parameters:
            raise RequirementError(
                f"{self.file}: {self.name} takes ({', '.join(found)}), not ({', '.join(self.parameters)}, …)"
            )
        extra = len(found) - len(self.parameters)
        if self.exact and extra > len(node.args.defaults):
            raise RequirementError(f"{self.file}: {self.name} needs more arguments now: ({', '.join(found)})")


@dataclass(frozen=True)
class HasAttribute:
    """A class, function, dataclass field or module-level variable that exists."""

    file: str
    name: str

    def check(self, vllm: Path) -> None:
        _find(vllm, self.file, self.name)


@dataclass(frozen=True)
class References:
    """A definition whose body uses these attribute or variable names (fields it reads, methods it calls)."""

    file: str
    name: str
    words: tuple[str, ...]

    def check(self, vllm: Path) -> None:
        node = _find(vllm, self.file, self.name)
        used = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        missing = [word for word in self.words if word not in used]
        if missing:
            raise RequirementError(f"{self.file}: {self.name} no longer uses {', '.join(missing)}")


@dataclass(frozen=True)
class HasStatements:
    """A function with these statements one right after another, at the top of its body."""

    file: str
    name: str
    statements: tuple[str, ...]

    def check(self, vllm: Path) -> None:
        node = _find(vllm, self.file, self.name)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            raise RequirementError(f"{self.file}: {self.name} is no longer a function")
        found = [ast.unparse(statement) for statement in node.body]
        length = len(self.statements)
        if not any(tuple(found[start : start + length]) == self.statements for start in range(len(found))):
            raise RequirementError(f"{self.file}: {self.name} no longer contains: {'; '.join(self.statements)}")


@dataclass(frozen=True)
class VllmPatch:
    """One feature that reaches into vLLM: what it relies on there, and what it changes.

    ``slots`` names the slots whose plugins need it; an empty tuple means that every deployment does. ``optional``
    patches do not stop a server: without them something less important is missing, which ``purpose`` names.
    """

    name: str
    purpose: str
    requirements: tuple[Requirement, ...]
    slots: tuple[str, ...] = ()
    optional: bool = False
    state: Callable[[], str] | None = None
    """What ``doctor`` says beside ok: whether a repair is active here, for example."""
    wraps: Mapping[str, Wrapper] = field(default_factory=dict, hash=False)
    """Its wrappers by ``module:Class.method``; ``wrapped_methods`` has the order of those of several patches."""
    on_import: Mapping[str, Callable[[Any], None]] = field(default_factory=dict, hash=False)
    """By module: other changes to it, made once, right after it was imported."""
    is_wanted: Callable[[], bool] | None = None
    """Whether this process's deployment has a use for it; None: always."""

    def unsupported_reason(self, vllm: Path) -> str | None:
        """None when every requirement holds in the package folder ``vllm``, else what is different."""
        missing = []
        for requirement in self.requirements:
            try:
                requirement.check(vllm)
            except RequirementError as error:
                missing.append(str(error))
            except SyntaxError as error:
                missing.append(f"{error.filename or 'a file'} cannot be parsed: {error.msg}")
        return "; ".join(missing) or None


def installed_vllm() -> Path | None:
    """The folder of the installed vLLM package, None when there is none; nothing is imported."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
