"""What a plugin of each kind implements.

A plugin is offered as a ``Plugin`` and built, in the process that its slot names, into an object that follows its
slot's protocol, one file each here. Derive from the protocol: that brings the optional methods along.

Units: lengths and counts are in tokens, times in seconds. Everything runs on the hot path of a server: a method that
raises is not called again (stock vLLM behaviour takes over, see ``vllm_instant.deployment.circuit_breaker``).
"""

from vllm_instant.interfaces.attention import (
    AttentionLayer,
    AttentionProvider,
    AttentionStep,
    CacheParts,
    Rotation,
)
from vllm_instant.interfaces.drafter import Draft, DraftAssignment, Drafter, DraftRequest, HybridDrafter
from vllm_instant.interfaces.experts import (
    ExpertCount,
    ExpertLayer,
    ExpertRouter,
    Measurement,
    RouterStep,
    RoutingMeasures,
    RowKind,
    StepRows,
)
from vllm_instant.interfaces.feed_forward import FeedForwardLayer, FeedForwardProvider, LinearWeights
from vllm_instant.interfaces.plugins import DrafterOptions, Plugin, PluginContext, PluginOptions
from vllm_instant.interfaces.rejection_sampler import RejectionSampler
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.scheduling import Admission, SchedulerSnapshot, SchedulingPolicy
from vllm_instant.interfaces.speculation import DraftCost, SpeculationPolicy, StepOutcome, UpcomingStep
from vllm_instant.interfaces.streaming import (
    EngineLoad,
    Holds,
    PrefillOutcome,
    PrefillProgress,
    SessionLimits,
    StreamingPrefill,
)

__all__ = [
    "Admission",
    "AttentionLayer",
    "AttentionProvider",
    "AttentionStep",
    "CacheParts",
    "Draft",
    "DraftAssignment",
    "DraftCost",
    "DraftRequest",
    "Drafter",
    "DrafterOptions",
    "EngineLoad",
    "ExpertCount",
    "ExpertLayer",
    "ExpertRouter",
    "FeedForwardLayer",
    "FeedForwardProvider",
    "Holds",
    "HybridDrafter",
    "LinearWeights",
    "Measurement",
    "Plugin",
    "PluginContext",
    "PluginOptions",
    "PrefillOutcome",
    "PrefillProgress",
    "RejectionSampler",
    "RequestState",
    "Rotation",
    "RouterStep",
    "RoutingMeasures",
    "RowKind",
    "SchedulerSnapshot",
    "SchedulingPolicy",
    "SessionLimits",
    "SpeculationPolicy",
    "StepOutcome",
    "StepRows",
    "StreamingPrefill",
    "UpcomingStep",
]
