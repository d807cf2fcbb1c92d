"""What a plugin is, and what it may know of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class PluginOptions(BaseModel):
    """Base of a plugin's own options: the rest of its slot's table in the deployment file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DrafterOptions(PluginOptions):
    """Base of the options of a drafter that a plugin implements itself."""

    num_speculative_tokens: int = Field(4, ge=1, le=128, description="Most draft tokens a request gets in one step.")


@dataclass(frozen=True, kw_only=True)
class PluginContext:
    """What a plugin may know of the engine that it is built for."""

    model: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    num_speculative_tokens: int
    """Most draft tokens a request can get in one step; 0 when the server has no drafter."""
    device: str
    """``cpu``, ``cuda``, …"""
    confident_drafts: bool = False
    """Whether the drafter says how sure it is of each token, so that ``DraftCost`` cuts its drafts."""
    itl_slo_ms: float | None = None
    """The deployment's goal for the time between tokens, in milliseconds, if its speculation policy has one."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What timings measured in this engine depend on: device name, model, dtype, vLLM version, drafter, parallelism."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One name that a deployment file may choose for a slot.

    ``build(options, context)`` makes the object that does the work; it is None for a plugin that stands for vLLM's own
    behaviour. ``engine_arguments(options)`` returns engine arguments that the plugin needs, by vLLM's field names; the
    command line and the ``[vllm]`` table override them.
    """

    slot: str
    name: str
    summary: str
    lossy: bool = False
    """Whether it may change what the model would have answered."""
    options: type[PluginOptions] = PluginOptions
    build: Callable[[Any, PluginContext], Any] | None = None
    engine_arguments: Callable[[Any], Mapping[str, Any]] | None = None
    confident: bool = False
    """For drafters: whether their drafts say how sure they are (``Draft.confidence``)."""
    calibration_options: Callable[[Any], Mapping[str, Any]] | None = None
    """Options to set while ``vllm-instant calibrate`` loads a server, so that the plugin measures and stores its costs.

    Called with the deployment's options of the plugin. Raises ValueError, with one sentence, where nothing would be
    stored. None for a plugin that stores no costs."""
