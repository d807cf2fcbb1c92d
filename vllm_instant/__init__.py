"""vllm-instant: lower latency for vLLM, from plugins that one deployment file chooses.

This module is the public API for plugin authors; ``vllm_instant.contracts`` says what a plugin of each kind implements.
"""

from vllm_instant.contracts import (
    AttentionLayer,
    AttentionProvider,
    AttentionStep,
    BatchingPolicy,
    CacheParts,
    Draft,
    Drafter,
    DrafterOptions,
    DraftPrice,
    DraftRequest,
    Plugin,
    PluginContext,
    PluginOptions,
    RejectionSampler,
    RequestState,
    Share,
    SharingDrafter,
    SpeculationPolicy,
    StepOutcome,
    UpcomingStep,
)
from vllm_instant.hookspecs import hookimpl
from vllm_instant.settings import Deployment
from vllm_instant.verification import DraftRows, Verification, draft_rows

__version__ = "0.1.0"

__all__ = [
    "AttentionLayer",
    "AttentionProvider",
    "AttentionStep",
    "BatchingPolicy",
    "CacheParts",
    "Deployment",
    "Draft",
    "DraftPrice",
    "DraftRequest",
    "DraftRows",
    "Drafter",
    "DrafterOptions",
    "Plugin",
    "PluginContext",
    "PluginOptions",
    "RejectionSampler",
    "RequestState",
    "Share",
    "SharingDrafter",
    "SpeculationPolicy",
    "StepOutcome",
    "UpcomingStep",
    "Verification",
    "draft_rows",
    "hookimpl",
]
