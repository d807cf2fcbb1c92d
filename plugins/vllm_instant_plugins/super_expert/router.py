"""The ``super_expert`` router: fewer distinct experts per step, within a quality budget that is measured online."""

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
    FusedRoute,
    Measurement,
    RouterStep,
    RoutingMeasures,
    StepRows,
)
from vllm_instant.moe.expert_groups import SuperExperts
from vllm_instant_plugins.super_expert.expert_selection import ExpertSelector, warm_up
from vllm_instant_plugins.super_expert.quality_gate import GateDecision, QualityGate

logger = logging.getLogger("vllm.instant")

COUNT_EVERY = 8
"""Interval of counted steps."""
PROBE_STEPS = 32
"""Steps after a change of the budget in which reference passes run every ``PROBE_EVERY`` steps."""
PROBE_EVERY = 4


class SuperExpertRouter(ExpertRouter):
    """Keeps each token's best experts and reroutes the others to experts that the batch loads anyway.

    Args:
        budget: fraction of a layer's experts that the decoding tokens of a step may use together.
        keep: number of top-ranked experts per token that the budget never drops.
        gate: enforces the quality budget; None to serve without one.
        clusters: groups and priors of the model's experts; None for none.
        cohesion: weight with which the demand for an expert's group adds to the demand for the expert.
        reference_every: interval of reference passes in steps; 0 for none.
        adjustable: whether ``control`` may change settings while serving.

    """

    def __init__(
        self,
        budget: float,
        keep: int,
        gate: QualityGate | None,
        clusters: SuperExperts | None = None,
        cohesion: float = 0.0,
        reference_every: int = 100,
        adjustable: bool = False,
    ) -> None:
        self.budget = budget
        self.gate = gate
        self._keep = keep
        self._clusters = clusters
        self._cohesion = cohesion
        self._reference_every = reference_every
        self._adjustable = adjustable
        self._selectors: list[ExpertSelector] = []
        self._num_experts: list[int] = []
        self._shapes: set[tuple[int, int]] = set()
        self._changed_at = 0
        """Step of the last change of the budget."""
        self._step = 0
        self._applied_fraction = budget

    def prepare(self, layers: Sequence[ExpertLayer], max_rows: int, device: torch.device) -> None:
        """Allocate the tables and budgets of all layers on the device."""
        self._num_experts = [layer.num_experts for layer in layers]
        self._shapes = {(layer.num_experts, layer.top_k) for layer in layers}
        clusters = self._clusters
        if clusters is not None:
            expected = (clusters.model.experts, clusters.model.top_k)
            if len(layers) != clusters.model.layers or self._shapes != {expected}:
                experts, top_k = next(iter(self._shapes))
                raise ValueError(
                    f"the clusters were learned for {clusters.model.name} ({clusters.model.shape()}), but this model "
                    f"has {len(layers)} layers of {experts} experts, {top_k} per token; "
                    "learn them from a trace of this model"
                )
        self._selectors = [
            ExpertSelector(
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
        """Whether the step can use more experts than the budget allows; otherwise ``allowed`` need not be asked."""
        tokens = int(np.diff(rows.starts)[rows.is_decode].sum())
        # The reference pass of a step that is not asked has the same routing as the step, unless it measures a level.
        fraction = self.fraction
        if self.gate is not None and self.gate.compared_level is not None:
            fraction = min(fraction, self.gate.share(self.gate.compared_level))
        return tokens > 1 and any(
            tokens * top_k > math.ceil(fraction * experts - 1e-9) and fraction < 1.0 for experts, top_k in self._shapes
        )

    def allowed(self, layer: ExpertLayer, step: RouterStep) -> torch.Tensor | None:
        """The experts that the rows of this step may use."""
        # Without graph capture (on a CPU) a selection that allows every expert need not be computed.
        if step.weights.device.type == "cpu" and self._applied_fraction >= 1.0:
            return None
        return self._selectors[layer.index].allowed(step)

    def fused_route(self, layer: ExpertLayer, bias: torch.Tensor | None, scale: float) -> FusedRoute | None:
        """Route the layer by fused Triton kernels."""
        return self._selectors[layer.index].fused(layer, bias, scale)

    def measurement(self, number: int) -> Measurement:
        """Counts every ``COUNT_EVERY`` steps and reference passes at a longer interval, shorter after a change."""
        self._step = number
        since = number - self._changed_at
        probing = since < PROBE_STEPS or (self.gate is not None and self.gate.suspicious)
        if self._reference_every and since % (PROBE_EVERY if probing else self._reference_every) == 0:
            return Measurement.REFERENCE
        return Measurement.COUNTS if number % COUNT_EVERY == 0 else Measurement.OFF

    def reference_pass(self, active: bool) -> None:
        """Apply the routing of a reference pass: the model's own, or at the last level the next tighter level."""
        if not active:
            self._apply(self.fraction)
            return
        level = self.gate.compared_level if self.gate is not None else None
        self._apply(1.0 if level is None or self.gate is None else self.gate.share(level))

    def observe(self, measures: RoutingMeasures) -> None:
        """Update the gate and apply its decision."""
        gate = self.gate
        if gate is None:
            return
        kept = measures.routed_mass / measures.native_mass if measures.native_mass else None
        before = gate.evidence
        divergence = measures.kl / measures.kl_tokens if measures.kl_tokens else None
        decision = gate.observe(self._step, divergence, kept)
        if decision is GateDecision.UNCHANGED:
            return
        self._changed_at = self._step
        self._apply(self.fraction)
        found = [f"{before.mean_kl:.4f} nats per token" if before.mean_kl is not None else ""]
        found.append(f"{before.mean_kept:.3f} of the router's weights kept" if before.mean_kept is not None else "")
        logger.warning(
            "Plugin super_expert %s its budget to %.0f %% of the experts%s at step %d: measured %s; "
            "the limit is %g nats%s",
            decision.value,
            100 * self.fraction,
            " (the model's own routing)" if self.fraction >= 1.0 else "",
            self._step,
            " and ".join(filter(None, found)),
            gate.max_kl,
            f" and {gate.min_kept:g} of the weights" if gate.min_kept else "",
        )

    @property
    def fraction(self) -> float:
        """Fraction of a layer's experts that a step may use now."""
        return self.budget if self.gate is None else self.gate.share()

    def _apply(self, fraction: float) -> None:
        self._applied_fraction = fraction
        for selector, experts in zip(self._selectors, self._num_experts, strict=True):
            selector.budget.fill_(math.ceil(fraction * experts - 1e-9))

    def metrics(self) -> Mapping[str, float]:
        """The budget and the measurements of the gate."""
        found: dict[str, float] = {"budget": self.fraction, "budget_configured": self.budget}
        if self.gate is not None:
            found |= {"level": self.gate.level, "loosened": self.gate.loosened}
            if self.gate.evidence.mean_kl is not None:
                found["kl"] = self.gate.evidence.mean_kl
            if self.gate.evidence.mean_kept is not None:
                found["kept_mass"] = self.gate.evidence.mean_kept
        return found

    def control(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Change the budget or the interval of reference passes: ``{"budget": 0.4, "shadow_every": 20}``."""
        if not self._adjustable:
            raise ValueError("settings cannot be changed while serving unless [experts] adjustable = true")
        budget = settings.get("budget", self.budget)
        every = settings.get("shadow_every", self._reference_every)
        unknown = sorted(set(settings) - {"budget", "shadow_every"})
        if unknown:
            raise ValueError(f"only budget and shadow_every can be changed, found {unknown[0]!r}")
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise ValueError(f"budget must be above 0 and at most 1, found {budget!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(f"shadow_every must be a number of steps, or 0 for no reference passes, found {every!r}")
        self._reference_every = every
        self.budget = float(budget)
        self._changed_at = self._step
        if self.gate is not None:
            self.gate.start(self.budget, self._step)
        self._apply(self.fraction)
        return {"budget": self.budget, "shadow_every": every}
