"""What a plugin is, and what it knows of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field


class PluginOptions(BaseModel):
    """Base class of a plugin's options: all keys of its slot's table in the deployment file except ``plugin``."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DrafterOptions(PluginOptions):
    """Base class of the options of a drafter that a plugin implements itself."""

    num_speculative_tokens: int = Field(
        4, ge=1, le=128, description="Maximum number of draft tokens per request and step."
    )


@dataclass(frozen=True)
class FullGraphs:
    """The decoding steps that the device runs as one CUDA graph (vLLM's mode ``FULL``).

    All other steps run in pieces (``PIECEWISE``) or without graphs, and the launches between the pieces take time.
    """

    lengths: tuple[int, ...]
    """Numbers of draft tokens, the same for all requests of the step, that have a graph; rising."""
    max_rows: int
    """Maximum number of tokens of such a step: one per request and its draft tokens."""

    def cover(self, num_draft_tokens: Sequence[int] | npt.NDArray[np.intp]) -> bool:
        """Whether a step that verifies these draft tokens, one number per request, runs in a graph."""
        numbers = num_draft_tokens.tolist() if isinstance(num_draft_tokens, np.ndarray) else list(num_draft_tokens)
        length, count = numbers[0], len(numbers)
        within = length in self.lengths and count * (1 + length) <= self.max_rows
        return within and numbers.count(length) == count


@dataclass(frozen=True, kw_only=True)
class PluginContext:
    """Properties of the engine for which a plugin is built."""

    model: str
    """Name or path of the model."""
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    num_speculative_tokens: int
    """Maximum number of draft tokens per request and step; 0 without a drafter."""
    device: str
    """Device type: ``cpu``, ``cuda``, …"""
    confident_drafts: bool = False
    """Whether the drafter reports a confidence for each token, so that ``DraftCost`` trims its drafts."""
    self_calibrating_drafts: bool = False
    """Whether such a drafter is ``Plugin.self_calibrating``."""
    full_graphs: FullGraphs | None = None
    """The decoding steps that run as one CUDA graph; None where the device has no such graphs."""
    adaptive_verification: bool = False
    """Whether vLLM trims the drafts of a step before it verifies them (``enable_adaptive_verification``); a policy
    decides for each step whether it may (``SpeculationPolicy.trims_verification``)."""
    itl_slo_ms: float | None = None
    """SLO for the inter-token latency in milliseconds, if the deployment's speculation policy has one."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Properties on which measured times depend: device name, model, dtype, vLLM version, drafter, parallelism."""
    tokenizer: str = ""
    """Name or path of the tokenizer; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One name that a deployment file can choose for a slot."""

    slot: str
    name: str
    summary: str
    """One line for ``vllm-instant plugins`` and the template of the deployment file."""
    lossy: bool = False
    """Whether it can change the distribution of the model's output."""
    options: type[PluginOptions] = PluginOptions
    """Model of the plugin's options."""
    build: Callable[[Any, PluginContext], Any] | None = None
    """Function of the options and the context that returns the object with the slot's protocol; None for vLLM's own
    behavior. Raises ValueError, with one sentence, where the engine is not supported."""
    build_on_device: Callable[[Any, PluginContext], Any] | None = None
    """For drafters: like ``build``, but returns a ``DeviceDrafter``, which serves vLLM's V2 model runner. A drafter
    without it makes vLLM use the V1 model runner and synchronous scheduling."""
    engine_arguments: Callable[[Any], Mapping[str, Any]] | None = None
    """Function of the options that returns the engine arguments that the plugin needs, by vLLM's field names; the
    command line and the ``[vllm]`` table override them."""
    confident: bool = False
    """For drafters: whether drafts have a confidence (``Draft.confidence``)."""
    self_calibrating: bool = False
    """For confident drafters on the host: whether drafting takes next to no time (20 µs per request), and drafts
    that are not verified teach the drafter, too. Policies then need not verify drafts to learn about it."""
    calibration_options: Callable[[Any], Mapping[str, Any]] | None = None
    """Function of the deployment's options that returns the options to set while ``vllm-instant calibrate`` loads a
    server, so that the plugin measures and stores its costs. Raises ValueError, with one sentence, where nothing would
    be stored. None for a plugin that stores no costs."""
