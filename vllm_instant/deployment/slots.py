"""The slots of a deployment file: what each decides, where it runs, and what it is when nobody fills it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_instant import interfaces


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
            interfaces.SpeculationPolicy,
        ),
        Slot("drafter", "which tokens are proposed", "worker", "suffix", interfaces.Drafter, optional=True),
        Slot(
            "rejection_sampler",
            "which proposals are kept",
            "worker",
            "block",
            interfaces.RejectionSampler,
        ),
        Slot(
            "batching",
            "which waiting requests run next, and who is preempted",
            "engine core",
            "fcfs",
            interfaces.SchedulingPolicy,
        ),
        Slot("experts", "which experts a batch may use", "worker", "native", interfaces.ExpertRouter),
        Slot(
            "attention",
            "the attention kernel and the KV-cache format",
            "worker",
            "native",
            interfaces.AttentionProvider,
        ),
        Slot(
            "streaming",
            "prefill while the prompt is still arriving",
            "API server",
            "off",
            interfaces.StreamingPrefill,
        ),
    )
}
"""By name, in the order in which tables are written and printed."""
