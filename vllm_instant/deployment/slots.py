"""The slots of a deployment file: what each decides, where it runs, and what it is when nobody fills it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_instant.interfaces.attention import AttentionProvider
from vllm_instant.interfaces.drafter import Drafter
from vllm_instant.interfaces.experts import ExpertRouter
from vllm_instant.interfaces.rejection_sampler import RejectionSampler
from vllm_instant.interfaces.scheduling import SchedulingPolicy
from vllm_instant.interfaces.speculation import SpeculationPolicy
from vllm_instant.interfaces.streaming import StreamingPrefill


@dataclass(frozen=True)
class Slot:
    """One table of a deployment file."""

    name: str
    decides: str
    runs_in: str
    default: str
    """The plugin of a deployment that does not name one; always lossless."""
    contract: type
    optional: bool = False
    """Whether the default only serves where it takes nothing away (``patches.default_drafter``)."""


SLOTS: dict[str, Slot] = {
    slot.name: slot
    for slot in (
        Slot(
            "speculation",
            "how many draft tokens each request gets in the next step",
            "engine core",
            "goodput",
            SpeculationPolicy,
        ),
        Slot("drafter", "which tokens are proposed", "worker", "suffix", Drafter, optional=True),
        Slot(
            "rejection_sampler",
            "which proposals are kept",
            "worker",
            "block",
            RejectionSampler,
        ),
        Slot(
            "batching",
            "which waiting requests run next, and who is preempted",
            "engine core",
            "fcfs",
            SchedulingPolicy,
        ),
        Slot("experts", "which experts a batch may use", "worker", "native", ExpertRouter),
        Slot(
            "attention",
            "the attention kernel and the KV-cache format",
            "worker",
            "native",
            AttentionProvider,
        ),
        Slot(
            "streaming",
            "prefill while the prompt is still arriving",
            "API server",
            "off",
            StreamingPrefill,
        ),
    )
}
"""By name, in the order in which tables are written and printed."""
