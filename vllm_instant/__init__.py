"""vllm-instant: lower latency for vLLM, from plugins that one deployment file chooses.

These names are all that the author of a drafter, rejection sampler, speculation or scheduling policy needs.
``vllm_instant.interfaces`` has those of the other slots.
"""

from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.drafter import Draft, Drafter, DraftRequest
from vllm_instant.interfaces.hookspecs import hookimpl
from vllm_instant.interfaces.plugins import DrafterOptions, FullGraphs, Plugin, PluginContext, PluginOptions
from vllm_instant.interfaces.rejection_sampler import RejectionSampler, VerificationBatch
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.scheduling import Admission, SchedulerSnapshot, SchedulingPolicy
from vllm_instant.interfaces.speculation import DraftCost, SpeculationPolicy, StepOutcome, UpcomingStep

__version__ = "0.1.0"

__all__ = [
    "Admission",
    "Deployment",
    "Draft",
    "DraftCost",
    "DraftRequest",
    "Drafter",
    "DrafterOptions",
    "FullGraphs",
    "Plugin",
    "PluginContext",
    "PluginOptions",
    "RejectionSampler",
    "RequestState",
    "SchedulerSnapshot",
    "SchedulingPolicy",
    "SpeculationPolicy",
    "StepOutcome",
    "UpcomingStep",
    "VerificationBatch",
    "hookimpl",
]
