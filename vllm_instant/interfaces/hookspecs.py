"""Every hook that a distribution can implement: the whole plugin API on one page.

A distribution names a module in the entry-point group ``vllm_instant``; functions of that module marked with
``hookimpl`` are called. ``vllm_instant.interfaces`` defines the types in the signatures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from vllm_instant.interfaces.deployment import Deployment
    from vllm_instant.interfaces.plugins import Plugin

PROJECT = "vllm_instant"
"""The pluggy project name, and the entry-point group of distributions with plugins."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def instant_plugins() -> Iterable[Plugin]:  # type: ignore[empty-body]
    """Return one ``Plugin`` for each name that a deployment file can choose."""


@hookspec
def instant_check(deployment: Deployment) -> Iterable[str]:  # type: ignore[empty-body]
    """Return one sentence per error in a deployment; with any error the server does not start."""


@hookspec
def instant_plugin_failed(slot: str, plugin: str, hook: str, error: Exception) -> None:
    """A plugin raised in a running server and was disabled there; called in the process where it failed."""
