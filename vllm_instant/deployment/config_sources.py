"""The layers of a deployment: the file, the environment, the command line; reading and merging them.

A layer is plain tables plus where each value was written. What the values mean is not decided here.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from vllm_instant.deployment.errors import DeploymentError, Problem, choices, shown

ENV_PREFIX = "INSTANT_"

Table = dict[str, Any]


class DeploymentFile(BaseSettings):
    """The tables of a deployment file; each slot's table is checked by the plugin that it names."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid")

    speculation: Table = Field(default_factory=dict)
    drafter: Table = Field(default_factory=dict)
    rejection_sampler: Table = Field(default_factory=dict)
    batching: Table = Field(default_factory=dict)
    experts: Table = Field(default_factory=dict)
    attention: Table = Field(default_factory=dict)
    streaming: Table = Field(default_factory=dict)
    vllm: Table = Field(default_factory=dict)


class Layer:
    """Values from one place, flattened to ``table.key`` for provenance."""

    def __init__(self, origin: str, tables: Mapping[str, Any], origin_of: Mapping[str, str] | None = None) -> None:
        self.origin = origin
        self.tables = dict(tables)
        self._origin_of = origin_of or {}
        # vLLM takes dashes and underscores for the same; so must the layers when they are merged.
        if isinstance(engine_arguments := self.tables.get("vllm"), dict):
            self.tables["vllm"] = {key.replace("-", "_"): value for key, value in engine_arguments.items()}

    def source_of(self, key: str) -> str:
        """What to call the place where ``table.key`` was written."""
        return self._origin_of.get(key, self.origin)


def read_file(path: str | Path) -> Layer:
    """The tables of a TOML file; raises DeploymentError when it cannot be read or parsed."""
    name = str(path)
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise DeploymentError([Problem(name, "", f"there is no such file (looked in {Path.cwd()})")]) from None
    except IsADirectoryError:
        raise DeploymentError([Problem(name, "", "this is a folder, not a deployment file")]) from None
    except OSError as error:
        raise DeploymentError([Problem(name, "", f"cannot be read: {error.strerror}")]) from None
    try:
        return Layer(name, tomllib.loads(raw.decode()))
    except UnicodeDecodeError as error:
        raise DeploymentError([Problem(name, "", f"is not UTF-8 text (byte {error.start})")]) from None
    except tomllib.TOMLDecodeError as error:
        raise DeploymentError([Problem(name, "", f"is not valid TOML: {error}")]) from None


def read_environment() -> Layer:
    """The tables that ``INSTANT_<TABLE>__<KEY>`` variables set; a name that fits no table is a problem."""
    problems, origins = [], {}
    for variable in sorted(os.environ):
        if not variable.startswith(ENV_PREFIX) or "__" not in variable:
            continue
        table, _, key = variable.removeprefix(ENV_PREFIX).lower().partition("__")
        if table in DeploymentFile.model_fields:
            origins[f"{table}.{key.replace('__', '.')}"] = f"environment variable {variable}"
        else:
            problems.append(
                Problem(
                    f"environment variable {variable}",
                    "",
                    f"names no table: found {table!r}; {choices(table, DeploymentFile.model_fields)}",
                )
            )
    if problems:
        raise DeploymentError(problems)
    tables = EnvSettingsSource(DeploymentFile)()
    return Layer("environment", {name: _literals(table) for name, table in tables.items()}, origins)


def read_overrides(pairs: Sequence[str]) -> Layer:
    """The tables that ``--instant-set TABLE.KEY=VALUE`` sets; VALUE is a TOML value, or else a string."""
    tables: Table = {}
    problems = []
    for pair in pairs:
        path, equals, value = pair.partition("=")
        parts = path.strip().replace("-", "_").split(".")
        if not equals or len(parts) < 2 or not all(parts):
            problems.append(Problem("--instant-set", "", f"expected TABLE.KEY=VALUE, found {shown(pair)}"))
            continue
        table = tables
        for part in parts[:-1]:
            table = table.setdefault(part, {})
        table[parts[-1]] = _literal(value)
    if problems:
        raise DeploymentError(problems)
    return Layer("--instant-set", tables)


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _literals(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _literals(inner) for key, inner in value.items()}
    return _literal(value) if isinstance(value, str) else value


def merge(into: Table, layer: Layer, tables: Mapping[str, Any], origins: dict[str, str], prefix: str = "") -> None:
    """Lay a layer's tables over ``into``, key by key, and write the origin of each value into ``origins``."""
    for key, value in tables.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            inner = into.get(key)
            if not isinstance(inner, dict):
                inner = into[key] = {}
            merge(inner, layer, value, origins, f"{path}.")
        else:
            into[key] = value
            origins[path] = layer.source_of(path)
