"""The sources of a deployment: the file, the environment and the command line; how they are read and merged.

A source is plain tables plus the origin of each value. ``settings`` checks the values.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_instant.deployment.errors import DeploymentError, Problem, choices, shown
from vllm_instant.deployment.slots import SLOTS

ENV_PREFIX = "INSTANT_"
TABLES = (*SLOTS, "vllm")
"""The tables of a deployment file: one per slot, and vLLM's engine arguments."""

Table = dict[str, Any]

_DATES = (datetime.date, datetime.time)
_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


@dataclass
class ConfigSource:
    """Tables from one source, with the origin of their values by ``table.key``."""

    origin: str
    """The origin of values that ``origins`` does not list."""
    tables: Table
    origins: Mapping[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """The text of values written outside a file, by ``table.key``: a string may look like a number."""

    def __post_init__(self) -> None:
        # vLLM treats dashes and underscores in argument names alike, so merging must too.
        if isinstance(arguments := self.tables.get("vllm"), dict):
            self.tables["vllm"] = {key.replace("-", "_"): value for key, value in arguments.items()}

    def origin_of(self, key: str) -> str:
        """Return where ``table.key`` was written."""
        return self.origins.get(key, self.origin)


@dataclass
class MergedSources:
    """The tables of all sources in one, with the origins and texts of the values that take effect."""

    tables: Table = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def add(self, source: ConfigSource) -> None:
        """Overwrite values with those of ``source``, key by key in nested tables."""
        self._add(self.tables, source, source.tables, "")

    def _add(self, into: Table, source: ConfigSource, tables: Mapping[str, Any], prefix: str) -> None:
        for key, value in tables.items():
            path = f"{prefix}{key}"
            self.texts.pop(path, None)
            if isinstance(value, dict):
                inner = into.get(key)
                if not isinstance(inner, dict):
                    inner = into[key] = {}
                self._add(inner, source, value, f"{path}.")
            else:
                into[key] = value
                self.origins[path] = source.origin_of(path)
                if path in source.texts:
                    self.texts[path] = source.texts[path]


def read_file(path: str | Path) -> ConfigSource:
    """Return the tables of a TOML file in UTF-8, with or without a byte order mark.

    Raises:
        DeploymentError: The file cannot be read or parsed, or a value is a date or not finite.

    """
    name = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        tables = tomllib.loads(text)
    except FileNotFoundError:
        raise DeploymentError([Problem(name, "", f"there is no such file (looked in {Path.cwd()})")]) from None
    except IsADirectoryError:
        raise DeploymentError([Problem(name, "", "this is a folder, not a deployment file")]) from None
    except OSError as error:
        raise DeploymentError([Problem(name, "", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise DeploymentError([Problem(name, "", f"is not UTF-8 text (byte {error.start})")]) from None
    except ValueError as error:
        raise DeploymentError([Problem(name, "", f"is not valid TOML: {error}")]) from None
    except RecursionError:
        raise DeploymentError([Problem(name, "", "is not valid TOML: it is nested too deeply")]) from None
    problems = [Problem(name, key, message) for key, message in _unusable(tables)]
    if problems:
        raise DeploymentError(problems)
    return ConfigSource(name, tables)


def _unusable(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The values that TOML has and no option takes: their keys, and what is wrong with them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _unusable(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _unusable(inner, path)
    elif isinstance(value, _DATES):
        yield _shown_key(path), f'expected a string, number, list or table, found a date or time: quote it, "{value}"'
    elif isinstance(value, float) and not math.isfinite(value):
        yield _shown_key(path), f"expected a finite number, found {value}"


def _shown_key(path: Sequence[str]) -> str:
    return f"[{path[0]}] {'.'.join(path[1:])}".rstrip() if len(path) > 1 else path[0]


def read_environment() -> ConfigSource:
    """Return the tables that the variables ``INSTANT_<TABLE>__<KEY>`` set.

    Raises:
        DeploymentError: A variable names no table, or a table without a key.

    """
    origins: dict[str, str] = {}
    source = ConfigSource("environment", {}, origins)
    problems: list[Problem] = []
    # A table's own variable sorts before those of its keys, which override it.
    for variable in sorted(os.environ):
        if not variable.startswith(ENV_PREFIX):
            continue
        origin, text = f"environment variable {variable}", os.environ[variable]
        table, *keys = variable.removeprefix(ENV_PREFIX).lower().split("__")
        if not keys:
            if table in TABLES and text:
                problems += _read_table(source, origins, table, text, origin)
        elif table not in TABLES:
            problems.append(Problem(origin, "", f"names no table: found {table!r}; {choices(table, TABLES)}"))
        elif not all(keys):
            problems.append(Problem(origin, "", f"names no key of [{table}]; expected {variable.rstrip('_')}__KEY"))
        else:
            _set(source, (table, *keys), text)
            origins[".".join((table, *keys))] = origin
    if problems:
        raise DeploymentError(problems)
    return source


def _read_table(source: ConfigSource, origins: dict[str, str], table: str, text: str, origin: str) -> Iterator[Problem]:
    """A whole table in one variable, as a TOML or JSON table."""
    value = _parsed(text)
    if isinstance(value, dict):
        source.tables[table] = value
        origins.update({f"{table}.{key}": origin for key in value})
    else:
        key = "PLUGIN" if table in SLOTS else "KEY"
        example = f"{ENV_PREFIX}{table.upper()}__{key}={text if table in SLOTS else 'VALUE'}"
        yield Problem(origin, "", f"names the table [{table}] without a key; write {example}")


def read_overrides(pairs: Sequence[str]) -> ConfigSource:
    """Return the tables that ``--instant-set TABLE.KEY=VALUE`` sets; VALUE is a TOML value, or else a string.

    Raises:
        DeploymentError: A pair has another form.

    """
    source = ConfigSource("--instant-set", {})
    problems = []
    for pair in pairs:
        path, equals, text = pair.partition("=")
        parts = path.strip().replace("-", "_").split(".")
        if not equals or len(parts) < 2 or not all(parts):
            problems.append(Problem("--instant-set", "", f"expected TABLE.KEY=VALUE, found {shown(pair)}"))
        else:
            _set(source, parts, text)
    if problems:
        raise DeploymentError(problems)
    return source


def _set(source: ConfigSource, path: Sequence[str], text: str) -> None:
    """Set one value from its text; a table replaces a value of the same key, and a value replaces a table."""
    table = source.tables
    for part in path[:-1]:
        inner = table.get(part)
        if not isinstance(inner, dict):
            inner = table[part] = {}
        table = inner
    table[path[-1]] = _value(path, text)
    source.texts[".".join(path)] = text


def _value(path: Sequence[str], text: str) -> Any:
    """The value that a text outside a file stands for."""
    value = _parsed(text)
    if isinstance(value, _DATES) or (isinstance(value, float) and not math.isfinite(value)):
        return text
    if path[0] == "vllm" and isinstance(value, int | float) and not isinstance(value, bool):
        # vLLM converts the text of an argument itself, so that a revision 7e12345 or a name 0x1F must stay text.
        # Keys of nested tables become JSON.
        kept = _JSON_NUMBER.fullmatch(text) if len(path) > 2 else str(value) == text
        return value if kept else text
    return value


def _parsed(text: str) -> Any:
    """A TOML value, a JSON list or table, or else the text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    if len(parsed) == 1:  # more keys come from further lines of the text
        return parsed["value"]
    if text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text
