"""The slots of a deployment file: what each decides, in which process, and its default plugin."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_instant.interfaces.attention import AttentionProvider
from vllm_instant.interfaces.drafter import Drafter
from vllm_instant.interfaces.escalation import Escalation
from vllm_instant.interfaces.experts import ExpertRouter
from vllm_instant.interfaces.guard import Guard
from vllm_instant.interfaces.rejection_sampler import RejectionSampler
from vllm_instant.interfaces.scheduling import SchedulingPolicy
from vllm_instant.interfaces.speculation import SpeculationPolicy
from vllm_instant.interfaces.streaming import StreamingPrefill


@dataclass(frozen=True)
class Slot:
    """One table of a deployment file."""

    name: str
    decides: str
    """What its plugin decides, for the template of the deployment file."""
    runs_in: str
    """The process in which its plugin runs."""
    default: str
    """The plugin of a deployment that names none; always lossless."""
    protocol: type
    """The protocol of the object that its plugin builds."""
    optional: bool = False
    """Whether the default serves only where it costs no other feature (``patches.default_drafter``)."""


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
        Slot("drafter", "which draft tokens are proposed", "worker", "suffix", Drafter, optional=True),
        Slot(
            "rejection_sampler",
            "which draft tokens are accepted",
            "worker",
            "block",
            RejectionSampler,
        ),
        Slot(
            "batching",
            "which waiting requests start next, and which request is preempted",
            "engine core",
            "fcfs",
            SchedulingPolicy,
        ),
        Slot("experts", "which experts the tokens of a batch may use", "worker", "native", ExpertRouter),
        Slot(
            "attention",
            "the attention kernel and the KV-cache format",
            "worker",
            "native",
            AttentionProvider,
        ),
        Slot(
            "streaming",
            "prefill while the prompt is still being typed",
            "API server",
            "off",
            StreamingPrefill,
        ),
        Slot("guard", "which text may reach the client", "API server", "off", Guard),
        Slot("escalation", "which requests a deeper server or setting answers", "API server", "off", Escalation),
    )
}
"""By name, in the order in which tables are written and printed."""
