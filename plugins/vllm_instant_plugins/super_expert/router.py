"""Fewer distinct experts a step, held to a quality budget by what is measured while serving."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vllm_instant.interfaces.experts import (
    ExpertLayer,
    ExpertRouter,
    Measurement,
    RouterStep,
    RoutingMeasures,
    StepRows,
)
from vllm_instant.moe.expert_groups import SuperExperts
from vllm_instant_plugins.super_expert.expert_selection import LayerChoice, warm_up
from vllm_instant_plugins.super_expert.quality_gate import QualityGate, Verdict

logger = logging.getLogger("vllm.instant")

COUNT_EVERY = 8
PROBE_STEPS = 32
"""After a change of the budget the shadow comes more often for so many steps, …"""
PROBE_EVERY = 4
"""… in one step of so many."""


class SuperExpertRouter(ExpertRouter):
    """Keeps each token's best experts and re-routes the rest to those that the batch pays for anyway.

    Args:
        budget: experts that a step may use in a layer, as a share of all.
        keep: of its own best experts no token is refused so many.
        gate: what keeps the quality, None to go without.
        clusters: what is known of the model's experts; None for nothing.
        cohesion: how much the demand for its cluster adds to that for an expert.
        shadow_every: one step of so many runs once more for comparison; 0 for none.
        adjustable: whether settings may change while serving.

    """

    def __init__(
        self,
        budget: float,
        keep: int,
        gate: QualityGate | None,
        clusters: SuperExperts | None = None,
        cohesion: float = 0.0,
        shadow_every: int = 100,
        adjustable: bool = False,
    ) -> None:
        self.budget = budget
        self.gate = gate
        self._keep = keep
        self._clusters = clusters
        self._cohesion = cohesion
        self._shadow_every = shadow_every
        self._adjustable = adjustable
        self._choices: list[LayerChoice] = []
        self._num_experts: list[int] = []
        self._shapes: set[tuple[int, int]] = set()
        self._changed = 0
        """The step at which the budget changed last."""
        self._number = 0
        self._served_share = budget

    def prepare(self, layers: Sequence[ExpertLayer], max_rows: int, device: torch.device) -> None:
        """Tables and budgets of all layers on the device."""
        self._num_experts = [layer.num_experts for layer in layers]
        self._shapes = {(layer.num_experts, layer.top_k) for layer in layers}
        clusters = self._clusters
        if clusters is not None:
            expected = (clusters.model.experts, clusters.model.top_k)
            if len(layers) != clusters.model.layers or self._shapes != {expected}:
                experts, top_k = next(iter(self._shapes))
                raise ValueError(
                    f"the clusters were learned for {clusters.model.name} ({clusters.model.shape()}), but this model "
                    f"has {len(layers)} layers of {experts} experts, {top_k} for a token; learn from a trace of it"
                )
        self._choices = [
            LayerChoice(
                layer,
                self._keep,
                None if clusters is None else list(clusters.prior[layer.index]),
                None if clusters is None else list(clusters.cluster[layer.index]),
                self._cohesion,
                device,
            )
            for layer in layers
        ]
        self._apply(self.budget)
        if device.type == "cpu":
            warm_up()

    def begin_step(self, rows: StepRows) -> bool:
        """Only steps that could use more experts than the budget has are worth a question."""
        tokens = int(np.diff(rows.starts)[rows.is_decode].sum())
        # In the shadow of a step that needs no question the model's own routing is what serves, too, unless a level
        # is tried there.
        share = self.share
        if self.gate is not None and self.gate.compared_level is not None:
            share = min(share, self.gate.share(self.gate.compared_level))
        return tokens > 1 and any(
            tokens * top_k > math.ceil(share * experts - 1e-9) and share < 1.0 for experts, top_k in self._shapes
        )

    def allowed(self, layer: ExpertLayer, step: RouterStep) -> torch.Tensor | None:
        """The experts that this step pays for."""
        # Where nothing is captured, what refuses nobody need not be computed.
        if step.weights.device.type == "cpu" and self._served_share >= 1.0:
            return None
        return self._choices[layer.index].allowed(step)

    def look(self, number: int) -> Measurement:
        """Counts now and then, a shadow more rarely, both more often after a change."""
        self._number = number
        since = number - self._changed
        probing = since < PROBE_STEPS or (self.gate is not None and self.gate.suspicious)
        if self._shadow_every and since % (PROBE_EVERY if probing else self._shadow_every) == 0:
            return Measurement.REFERENCE
        return Measurement.COUNTS if number % COUNT_EVERY == 0 else Measurement.OFF

    def shadow(self, active: bool) -> None:
        """The shadow is the model's own routing; where that serves, the level that may come next."""
        if not active:
            self._apply(self.share)
            return
        level = self.gate.compared_level if self.gate is not None else None
        self._apply(1.0 if level is None or self.gate is None else self.gate.share(level))

    def observe(self, measures: RoutingMeasures) -> None:
        """Let the gate judge."""
        gate = self.gate
        if gate is None:
            return
        kept = measures.routed_mass / measures.native_mass if measures.native_mass else None
        before = gate.evidence
        divergence = measures.kl / measures.kl_tokens if measures.kl_tokens else None
        verdict = gate.observe(self._number, divergence, kept)
        if verdict is Verdict.STAYS:
            return
        self._changed = self._number
        self._apply(self.share)
        found = [f"{before.mean_kl:.4f} nats a token" if before.mean_kl is not None else ""]
        found.append(f"{before.mean_kept:.3f} of the router's mass kept" if before.mean_kept is not None else "")
        logger.warning(
            "Plugin super_expert %s its budget to %.0f %% of the experts%s at step %d: found %s; allowed are %g nats%s",
            verdict.value,
            100 * self.share,
            " (the model's own routing)" if self.share >= 1.0 else "",
            self._number,
            " and ".join(filter(None, found)),
            gate.max_kl,
            f" and {gate.min_kept:g} of the mass" if gate.min_kept else "",
        )

    @property
    def share(self) -> float:
        """The share of experts that a step may use now."""
        return self.budget if self.gate is None else self.gate.share()

    def _apply(self, share: float) -> None:
        self._served_share = share
        for choice, experts in zip(self._choices, self._num_experts, strict=True):
            choice.budget.fill_(math.ceil(share * experts - 1e-9))

    def metrics(self) -> Mapping[str, float]:
        """The budget and the gate."""
        found: dict[str, float] = {"budget": self.share, "budget_configured": self.budget}
        if self.gate is not None:
            found |= {"level": self.gate.level, "loosened": self.gate.loosened}
            if self.gate.evidence.mean_kl is not None:
                found["kl"] = self.gate.evidence.mean_kl
            if self.gate.evidence.mean_kept is not None:
                found["kept_mass"] = self.gate.evidence.mean_kept
        return found

    def control(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take another budget or look more or less often: ``{"budget": 0.4, "shadow_every": 20}``."""
        if not self._adjustable:
            raise ValueError("nothing may be changed while serving: set adjustable = true below [experts]")
        budget = settings.get("budget", self.budget)
        every = settings.get("shadow_every", self._shadow_every)
        unknown = sorted(set(settings) - {"budget", "shadow_every"})
        if unknown:
            raise ValueError(f"budget and shadow_every may be changed, found {unknown[0]!r}")
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise ValueError(f"expected a budget above 0 and up to 1, found {budget!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(f"expected shadow_every as a number of steps, 0 for never, found {every!r}")
        self._shadow_every = every
        self.budget = float(budget)
        self._changed = self._number
        if self.gate is not None:
            self.gate.start(self.budget, self._number)
        self._apply(self.share)
        return {"budget": self.budget, "shadow_every": every}
