"""The ``observed`` router: the model's own routing, counted and recorded into a trace of bounded size."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_instant.interfaces.experts import ExpertLayer, ExpertRouter, Measurement, RouterStep, StepRows
from vllm_instant.moe.routing_trace import RoutedModel, Trace

logger = logging.getLogger("vllm.instant")

COUNT_EVERY = 8
UNNAMED = "unnamed"
"""Prompt class of requests whose clients name none."""
MAX_CLASSES = 1000
OTHER = "other"
"""Prompt class of further classes: clients choose their names, and a trace numbers them in 16 bits."""


class TraceRecorder(ExpertRouter):
    """Records which experts the model picks for a sample of tokens, until the trace is full.

    The picks stay on the device until the file is written. The place of a row is chosen on the host before the model
    runs; rows that are not recorded go to one extra place at the end.

    Args:
        file: path of the trace; None to record nothing.
        tokens: maximum number of tokens in the trace.
        share: fraction of the decoded tokens that is recorded.
        prefill_share: fraction of the prompt tokens that is recorded.
        model: name of the model, for the file.
        seed: seed of the sample.

    """

    def __init__(
        self, file: Path | None, tokens: int, share: float, prefill_share: float, model: str, seed: int = 0
    ) -> None:
        self._file = file
        self._capacity = tokens if file is not None else 0
        self._shares = np.array([prefill_share, share])
        self._model = model
        self._random = np.random.default_rng(seed)
        self.used = 0
        """Tokens recorded so far."""
        self._request = np.zeros(self._capacity, np.int32)
        self._step = np.zeros(self._capacity, np.int64)
        self._is_prefill = np.zeros(self._capacity, np.bool_)
        self._number_of_request: dict[str, int] = {}
        self._class_of_request: list[int] = []
        self._number_of_class: dict[str, int] = {}
        self._layers: Sequence[ExpertLayer] = ()
        self._reported_full = False

    def prepare(self, layers: Sequence[ExpertLayer], max_rows: int, device: torch.device) -> None:
        """Allocate the whole trace on the device."""
        self._layers = layers
        if not self._capacity:
            return
        shapes = {(layer.num_experts, layer.top_k) for layer in layers}
        if len(shapes) > 1:
            raise ValueError(f"a trace needs layers with the same number of experts and top_k, found {sorted(shapes)}")
        shape = (len(layers), self._capacity + 1, layers[0].top_k)
        self._experts = torch.zeros(shape, dtype=torch.int16, device=device)
        self._weights = torch.zeros(shape, dtype=torch.float16, device=device)
        self._places = torch.full((max_rows,), self._capacity, dtype=torch.int64, device=device)
        self._host_places = torch.full((max_rows,), self._capacity, dtype=torch.int64)
        if device.type == "cuda":
            self._host_places = self._host_places.pin_memory()

    def begin_step(self, rows: StepRows) -> bool:
        """Choose the rows to record and their places in the trace."""
        if not self._capacity or self.used == self._capacity:
            if self._capacity and not self._reported_full:
                self._reported_full = True
                self._places.fill_(self._capacity)
                logger.info("The expert trace is full (%d tokens); writing it to %s", self.used, self._file)
                self.write()
            return False
        counts = np.diff(rows.starts)
        owner = np.repeat(np.arange(len(counts)), counts)
        is_decode = rows.is_decode[owner]
        chosen = np.flatnonzero(self._random.random(len(owner)) < self._shares[is_decode.astype(int)])
        chosen = chosen[: self._capacity - self.used]
        places = np.arange(self.used, self.used + len(chosen))
        self._host_places.fill_(self._capacity)
        self._host_places[torch.from_numpy(chosen)] = torch.from_numpy(places)
        self._places.copy_(self._host_places, non_blocking=True)
        numbers = np.array([self._register(*pair) for pair in zip(rows.request_ids, rows.prompt_classes, strict=True)])
        self._request[places] = numbers[owner[chosen]]
        self._step[places] = rows.number
        self._is_prefill[places] = ~is_decode[chosen]
        self.used += len(chosen)
        return len(chosen) > 0

    def _register(self, request_id: str, prompt_class: str) -> int:
        number = self._number_of_request.get(request_id)
        if number is None:
            number = self._number_of_request[request_id] = len(self._number_of_request)
            name, known = prompt_class or UNNAMED, len(self._number_of_class)
            if known >= MAX_CLASSES and name not in self._number_of_class:
                name = OTHER
            self._class_of_request.append(self._number_of_class.setdefault(name, known))
        return number

    def allowed(self, layer: ExpertLayer, step: RouterStep) -> torch.Tensor | None:
        """Allow every expert, and record the picks."""
        if self._capacity:
            places = self._places[: len(step.picks)]
            self._experts[layer.index].index_copy_(0, places, step.picks.to(torch.int16))
            self._weights[layer.index].index_copy_(0, places, step.pick_weights.to(torch.float16))
        return None

    def measurement(self, number: int) -> Measurement:
        """Count every ``COUNT_EVERY`` steps."""
        return Measurement.COUNTS if number % COUNT_EVERY == 0 else Measurement.OFF

    def write(self) -> Path | None:
        """Write what was recorded so far."""
        if self._file is None or not self.used:
            return None
        self.trace().write(self._file)
        return self._file

    def trace(self) -> Trace:
        """What was recorded so far."""
        layer, used = self._layers[0], self.used
        model = RoutedModel(
            self._model, len(self._layers), layer.num_experts, layer.top_k, layer.function, layer.renormalizes
        )
        return Trace(
            model,
            self._experts[:, :used].transpose(0, 1).contiguous().cpu().numpy(),
            self._weights[:, :used].transpose(0, 1).contiguous().cpu().numpy(),
            self._request[:used].copy(),
            self._step[:used].copy(),
            self._is_prefill[:used].copy(),
            np.array(self._class_of_request, np.int16),
            tuple(self._number_of_class),
        )

    def metrics(self) -> Mapping[str, float]:
        """Number of recorded tokens."""
        return {"recorded_tokens": float(self.used)} if self._capacity else {}

    def control(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """``{"write": true}`` writes the trace now."""
        if dict(settings) != {"write": True}:
            raise ValueError(f'the plugin observed takes {{"write": true}}, found {dict(settings)!r}')
        path = self.write()
        if path is None:
            raise ValueError("there is nothing to write: no trace file is configured, or no token was recorded")
        return {"trace": str(path), "tokens": self.used}
