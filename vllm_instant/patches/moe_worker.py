"""An experts plugin in a worker: rows of steps, layers, measurements, and the reference pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin, failure_counts
from vllm_instant.deployment.plain import gauges, json_types, whole
from vllm_instant.interfaces.experts import (
    ExpertLayer,
    ExpertRouter,
    FusedRoute,
    Measurement,
    RouterStep,
    RoutingMeasures,
    RowKind,
    StepRows,
)
from vllm_instant.moe.router_scoring import one_hot, reroute_restricted
from vllm_instant.patches import moe_routers

logger = logging.getLogger("vllm.instant")

SHADOW_ROWS = 8
"""Most tokens of a step whose next-token distributions are compared."""
MAX_MIXED_ROWS = 256
"""A shadow that waited too long takes a step that also reads prompts, if it has no more rows than this."""
PATIENCE = 64
"""Steps for which a shadow waits for one that only decodes."""
READ_DELAY = 4
"""Steps after which numbers are read from a device other than the CPU: long done, and the same on all workers."""
REPORT_EVERY = 32

_FIELDS = ("native_experts", "routed_experts", "native_mass", "routed_mass")


def _controlled(plugin: ExpertRouter, settings: dict[str, Any]) -> dict[str, Any]:
    """The plugin's answer to settings; settings that it refuses are no failure of the plugin."""
    try:
        return {"answer": json_types(dict(plugin.control(settings)))}
    except ContractError:
        raise
    except ValueError as error:
        return {"error": str(error)}


class ServedLayer:
    """One MoE layer whose router calls the plugin."""

    def __init__(self, serving: MoeWorker, router: Any, layer: ExpertLayer, scoring: Any) -> None:
        self._serving = serving
        self._router = router
        self.layer = layer
        self.scoring = scoring
        self.fused: FusedRoute | None = None
        """Routes and counts in a few launches, where the plugin offers it."""

    def route(self, hidden_states: Any, logits: Any, input_ids: Any) -> tuple[Any, Any]:
        """Final weights and picks of all rows; called inside the operator."""
        import torch

        weights, picks = moe_routers.native(self._router, hidden_states, logits, input_ids)
        serving, rows = self._serving, len(logits)
        if rows > len(serving.kinds) or (serving.idle and not serving.counting):
            return weights, picks
        kinds = serving.kinds[:rows]
        found = self._fused(logits, weights, picks, kinds)
        if found is not None:
            return found
        scores = self.scoring.weights(logits)
        ranking = self.scoring.ranking(scores)
        own = picks.to(torch.int64)
        order = ranking.gather(1, own).argsort(dim=-1, descending=True, stable=True)
        own, own_weights = own.gather(1, order), weights.gather(1, order)
        # On CPUs the plugin gets copies. On GPUs that would be four more kernels in each layer of each step.
        given = (scores, ranking, own, own_weights, kinds)
        step = RouterStep(*(given if serving.replays else (tensor.clone() for tensor in given)))
        allowed = None
        if not serving.idle:
            allowed = serving.plugin.call(
                "allowed", lambda plugin: self._checked(plugin.allowed(self.layer, step), rows), None
            )
        routed = own
        held = kinds == RowKind.DECODE
        if allowed is not None and (serving.replays or self._refuses_any(allowed, own, held)):
            changed, chosen, chosen_weights = reroute_restricted(self.scoring, scores, own, allowed, held)
            weights = torch.where(changed[:, None], chosen_weights, weights)
            picks = torch.where(changed[:, None], chosen.to(torch.int32), picks)
            routed = torch.where(changed[:, None], chosen, own)
        if serving.counting:
            serving.count(self.layer, scores, own, routed, held)
        return weights, picks

    def _fused(self, logits: Any, weights: Any, picks: Any, kinds: Any) -> Any:
        """Final weights and picks by the plugin's fused function; None without one, or if it failed."""
        serving = self._serving
        if self.fused is None or serving.plugin.disabled:
            return None
        counted = serving.counts_of(self.layer)
        try:
            return self.fused(logits, weights.contiguous(), picks.contiguous(), kinds, serving.count_flag, counted)
        except Exception as error:
            logger.warning(
                "Layer %s is routed by tensor operations: its fused kernels failed with %s: %s",
                self.layer.name,
                type(error).__name__,
                error,
            )
            self.fused = None
            return None

    @staticmethod
    def _refuses_any(allowed: Any, own: Any, held: Any) -> bool:
        """Whether a row picked a forbidden expert; called only where reading the answer does not synchronise."""
        refused = ~allowed.expand(len(own), -1).gather(1, own).all(-1)
        return bool((refused & held).any())

    def _checked(self, allowed: Any, rows: int) -> Any:
        import torch

        if allowed is None:
            return None
        if not isinstance(allowed, torch.Tensor):
            raise ContractError(f"allowed must be a tensor or None, found {type(allowed).__name__}")
        shapes = (1, self.layer.num_experts), (rows, self.layer.num_experts)
        if allowed.dtype != torch.bool or tuple(allowed.shape) not in shapes:
            raise ContractError(
                f"allowed must be bool of shape [{rows} or 1, {self.layer.num_experts}], found {allowed.dtype} "
                f"{tuple(allowed.shape)}"
            )
        if allowed.device != self._serving.kinds.device:
            raise ContractError(f"allowed must be on {self._serving.kinds.device}, found {allowed.device}")
        return allowed


class MoeWorker:
    """The plugin of a worker with its layers and measurements.

    Args:
        plugin: the deployment's experts plugin.
        max_rows: limit of rows per step.
        device: the model's.

    """

    def __init__(self, plugin: GuardedPlugin[ExpertRouter], max_rows: int, device: Any) -> None:
        import torch

        self.plugin = plugin
        self.kinds = torch.zeros(max_rows, dtype=torch.int8, device=device)
        """A ``RowKind`` for each row of the step."""
        self.layers: list[ServedLayer] = []
        self.shadow_objection: str | None = None
        """Why the model cannot run a step twice here."""
        self.replays = device.type != "cpu"
        """On a device that replays graphs nothing may branch: what is skipped there is multiplied with 0."""
        self._pinned = torch.zeros(max_rows, dtype=torch.int8, pin_memory=self.replays)
        self._counting = torch.zeros((), device=device)
        self._counted: Any = None
        self._kl = torch.zeros(3, dtype=torch.float64, device=device)
        self._pending: tuple[int, Any] | None = None
        self._look = Measurement.OFF
        self._overdue = 0
        self._decode_rows: list[int] = []
        self._latest: dict[str, Any] | None = None
        self.idle = not self.replays
        """Whether no plugin call is needed in this step; counting may still take place."""
        self.counting = self.replays
        self.number = 0
        self.totals = dict.fromkeys(("layer_steps", *_FIELDS, "kl_tokens", "kl"), 0.0)
        self.by_layer: npt.NDArray[np.float64] = np.zeros((0, 4))

    def serve(self, layers: Sequence[tuple[Any, ExpertLayer, Any]]) -> None:
        """Serve layers, given as router, layer and scoring; called once, before anything is compiled."""
        import torch

        described = [layer for _, layer, _ in layers]
        self.plugin.instance.prepare(described, len(self.kinds), self.kinds.device)
        self.layers = [ServedLayer(self, router, layer, scoring) for router, layer, scoring in layers]
        self._counted = torch.zeros(len(layers), len(_FIELDS), dtype=torch.float64, device=self.kinds.device)
        self.by_layer = np.zeros((len(layers), 1 + len(_FIELDS)))
        if self.replays:
            self._offer_fused()
        moe_routers.serve(list(self.layers))
        for index, (router, _, _) in enumerate(layers):
            setattr(router, moe_routers.LAYER, index)

    def _offer_fused(self) -> None:
        for served in self.layers:
            if not served.scoring.grouped:
                served.fused = self._fused_route_of(served)

    def _fused_route_of(self, served: ServedLayer) -> FusedRoute | None:
        def ask(plugin: ExpertRouter) -> FusedRoute | None:
            return plugin.fused_route(served.layer, served.scoring.bias, served.scoring.scale)

        nothing: FusedRoute | None = None
        return self.plugin.call("fused_route", ask, nothing)

    @property
    def count_flag(self) -> Any:
        """float32 scalar on the device: 1 in passes that are counted, else 0."""
        return self._counting

    def counts_of(self, layer: ExpertLayer) -> Any:
        """float64 ``[4]`` on the device: the sums of ``_FIELDS`` of one layer."""
        return self._counted[layer.index]

    def count(self, layer: ExpertLayer, scores: Any, own: Any, routed: Any, held: Any) -> None:
        """Add one layer's numbers of this step; nothing is read from the device."""
        import torch

        real = held[:, None]
        before = (one_hot(own, layer.num_experts) & real).any(0).sum()
        after = (one_hot(routed, layer.num_experts) & real).any(0).sum()
        native_mass = (scores.gather(1, own) * real).sum()
        routed_mass = (scores.gather(1, routed) * real).sum()
        row = torch.stack([before.float(), after.float(), native_mass, routed_mass])
        self._counted[layer.index] += row * self._counting if self.replays else row

    # ------------------------------------------------------------------------------------------ around a forward pass

    def begin(self, rows: StepRows, drafts: Sequence[int]) -> None:
        """Begin a step: the requests of its rows, and each request's number of draft tokens."""
        import torch

        self.number += 1
        counts = np.diff(rows.starts)
        kinds = np.where(rows.is_decode, RowKind.DECODE, RowKind.PREFILL).astype(np.int8).repeat(counts)
        total = len(kinds)
        self._pinned[:total] = torch.from_numpy(kinds)
        self._pinned[total:] = RowKind.PADDING
        self.kinds.copy_(self._pinned, non_blocking=True)
        self._decode_rows = np.flatnonzero(kinds == RowKind.DECODE).tolist()
        self._consume()
        self._requests = int(rows.is_decode.sum())
        self._drafts = int(sum(drafts))
        asked = self.plugin.call("begin_step", lambda plugin: plugin.begin_step(rows), False)
        look = self.plugin.call(
            "measurement", lambda plugin: Measurement(whole(plugin.measurement(self.number))), Measurement.OFF
        )
        if look is Measurement.REFERENCE and asked is False:
            look = Measurement.COUNTS  # both passes would be the same
        self._look = look if self._decode_rows else Measurement.OFF
        if look is Measurement.REFERENCE and self.shadow_objection is not None:
            self._look = Measurement.COUNTS
        elif look is Measurement.REFERENCE or (self._overdue and asked is not False):
            pure = len(self._decode_rows) == total
            late = self._overdue > PATIENCE and total <= MAX_MIXED_ROWS
            if self._decode_rows and (pure or late):
                self._look, self._overdue = Measurement.REFERENCE, 0
            else:
                self._look, self._overdue = (
                    Measurement.COUNTS if self._decode_rows else Measurement.OFF,
                    self._overdue + 1,
                )
        if not self.replays:
            self.idle = self.plugin.disabled or asked is False
            self.counting = self._look is not Measurement.OFF

    @property
    def wants_shadow(self) -> bool:
        """Whether this step first runs a reference pass, before the pass whose results are used."""
        return self._look is Measurement.REFERENCE and not self.plugin.disabled

    def reference_pass(self, active: bool) -> None:
        """Begin or end the reference pass."""
        self.plugin.call("reference_pass", lambda plugin: plugin.reference_pass(active), None)
        if not self.replays:
            self.counting = not active
        else:
            self._counting.fill_(0.0 if active else 1.0)

    def before_forward(self) -> None:
        """Begin the pass whose results are used and counted."""
        if self.replays:
            self._counting.fill_(1.0 if self._look is not Measurement.OFF else 0.0)

    def compared_rows(self, logits_rows: Any) -> Any:
        """The sampled rows that are compared: int64 ``[up to SHADOW_ROWS]``, spread over the batch."""
        import torch

        decoding = set(self._decode_rows)
        rows = [row for row in logits_rows.tolist() if row in decoding]
        # The start of the stride moves, so that each request is compared in some step.
        stride = max(1, -(-len(rows) // SHADOW_ROWS))
        return torch.tensor(rows[self.number % stride :: stride][:SHADOW_ROWS], device=self.kinds.device)

    def compare(self, shadow_logits: Any, served_logits: Any) -> Any:
        """Sums over tokens of 1, KL(reference || served) and its square: float64 ``[3]``."""
        import torch

        shadow = shadow_logits.float().log_softmax(-1)
        served = served_logits.float().log_softmax(-1)
        each = (shadow.exp() * (shadow - served)).sum(-1).double().clamp(min=0.0)
        return torch.stack([torch.full_like(each[:1].sum(), len(each)), each.sum(), (each * each).sum()])

    def nothing_compared(self) -> Any:
        """A buffer for the sums of ``compare`` on a worker without logits."""
        return self._kl.new_zeros(3)

    def add_comparison(self, sums: Any) -> None:
        """Add the sums of ``compare`` from the worker with logits."""
        self._kl += sums

    def finish(self) -> None:
        """End the forward pass: start to read the measurements from the device."""
        if self._look is Measurement.OFF or self._pending is not None:
            return
        import torch

        everything = torch.cat([self._counted.flatten(), self._kl])
        if not self.replays:
            self._take(everything.numpy().copy())
            return
        copy = torch.empty(everything.shape, dtype=everything.dtype, pin_memory=True)
        copy.copy_(everything, non_blocking=True)
        self._clear()
        event = torch.cuda.Event()
        event.record()
        self._pending = (self.number + READ_DELAY, (copy, event, self._requests, self._drafts))

    def _consume(self) -> None:
        if self._pending is None or self.number < self._pending[0]:
            return
        copy, event, self._requests, self._drafts = self._pending[1]
        event.synchronize()
        self._pending = None
        self._take(copy.numpy().copy(), cleared=True)

    def _clear(self) -> None:
        self._counted.zero_()
        self._kl.zero_()

    def _take(self, numbers: npt.NDArray[np.float64], cleared: bool = False) -> None:
        if not cleared:
            self._clear()
        counted, (tokens, kl, squared) = numbers[:-3].reshape(-1, len(_FIELDS)), numbers[-3:]
        sums = counted.sum(0)
        layer_steps = float(len(counted)) if sums[0] else 0.0
        native, routed, native_mass, routed_mass = (float(value) for value in sums)
        measures = RoutingMeasures(
            layer_steps, native, routed, native_mass, routed_mass, float(tokens), float(kl), float(squared)
        )
        for name in self.totals:
            self.totals[name] += getattr(measures, name)
        if layer_steps:
            self.by_layer[:, 0] += 1
            self.by_layer[:, 1:] += counted
            self._latest = {
                "requests": self._requests,
                "draft_tokens": self._drafts,
                "experts": measures.routed_experts / layer_steps,
                "num_experts": self.layers[0].layer.num_experts,
                "top_k": self.layers[0].layer.top_k,
            }
        self.plugin.call("observe", lambda plugin: plugin.observe(measures), None)

    # --------------------------------------------------------------------------------------------------- what is told

    def report(self) -> dict[str, Any] | None:
        """The report that travels to the engine core with this step's tokens; None in most steps."""
        latest, self._latest = self._latest, None
        if latest is None and self.number % REPORT_EVERY:
            return None
        report = self.described() if self.number % REPORT_EVERY == 0 else {}
        return report | {"count": latest}

    def described(self) -> dict[str, Any]:
        """Totals, the plugin's own numbers and failures, as plain data."""
        return {
            "totals": dict(self.totals),
            "measures": self._own_measures(),
            "failures": failure_counts(self.plugin),
            "shadow_objection": self.shadow_objection,
        }

    def _own_measures(self) -> dict[str, float]:
        nothing: dict[str, float] = {}
        return self.plugin.call("metrics", lambda plugin: gauges(plugin.metrics()), nothing)

    def layers_described(self) -> list[dict[str, Any]]:
        """Means per counted step, by layer."""
        rows = []
        for layer, (steps, native, routed, native_mass, routed_mass) in zip(
            self.layers, self.by_layer.tolist(), strict=True
        ):
            rows.append(
                {
                    "layer": layer.layer.name,
                    "steps": steps,
                    "native_experts": native / steps if steps else None,
                    "routed_experts": routed / steps if steps else None,
                    "kept_mass": routed_mass / native_mass if native_mass else None,
                }
            )
        return rows

    def control(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Pass settings to the plugin, or ``{}`` for a description alone.

        Invalid settings are returned as ``error``; nothing is raised.
        """
        answer: dict[str, Any] = {}
        if settings.pop("forget", False):
            self.totals = dict.fromkeys(self.totals, 0.0)
            self.by_layer[:] = 0.0
        if settings:
            answer = self.plugin.call("control", lambda plugin: _controlled(plugin, settings), answer)
        return self.described() | {"layers": self.layers_described()} | answer
