"""A checked deployment as data: the plugin of each slot, vLLM's engine arguments, and where each value came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vllm_instant.interfaces.plugins import Plugin


@dataclass(frozen=True)
class InstalledPlugin:
    """A plugin together with the distribution that brings it."""

    plugin: Plugin
    distribution: str
    version: str


class SlotChoice(BaseModel):
    """The plugin that fills a slot, with all of its options, defaults included."""

    model_config = ConfigDict(frozen=True)

    plugin: str
    options: dict[str, Any] = Field(default_factory=dict)


class Deployment(BaseModel):
    """A checked deployment with every slot filled; as JSON it travels to the engine-core and worker processes."""

    model_config = ConfigDict(frozen=True)

    file: str | None = None
    """Absolute path of the deployment file; None where no file was given."""
    slots: dict[str, SlotChoice]
    """The choice of every slot, by the slot's name."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """The ``[vllm]`` table: engine arguments by vLLM's field names."""
    origins: dict[str, str] = Field(default_factory=dict)
    """The source of each value by ``table.key``; a value that is not listed is a default."""
