"""vllm-instant: lower latency for vLLM, from plugins that one deployment file chooses.

This module is the public API for plugin authors; ``vllm_instant.contracts`` says what a plugin of each kind implements.
"""

from vllm_instant.contracts import (
    Admission,
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
    EngineLoad,
    Holds,
    Plugin,
    PluginContext,
    PluginOptions,
    PrefillOutcome,
    PrefillProgress,
    QueueMoment,
    RejectionSampler,
    RequestState,
    SessionLimits,
    Share,
    SharingDrafter,
    SpeculationPolicy,
    StepOutcome,
    StreamingPrefill,
    UpcomingStep,
)
from vllm_instant.hookspecs import hookimpl
from vllm_instant.live_requests import prompt_class, told_output_tokens
from vllm_instant.settings import Deployment
from vllm_instant.verification import DraftRows, Verification, draft_rows

__version__ = "0.1.0"

__all__ = [
    "Admission",
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
    "EngineLoad",
    "Holds",
    "Plugin",
    "PluginContext",
    "PluginOptions",
    "PrefillOutcome",
    "PrefillProgress",
    "QueueMoment",
    "RejectionSampler",
    "RequestState",
    "SessionLimits",
    "Share",
    "SharingDrafter",
    "SpeculationPolicy",
    "StepOutcome",
    "StreamingPrefill",
    "UpcomingStep",
    "Verification",
    "draft_rows",
    "hookimpl",
    "prompt_class",
    "told_output_tokens",
]
