"""The trace of a small model: its rows, its requests, its bound and its sample."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_instant.interfaces.experts import ExpertLayer, RouterStep, RowKind, StepRows
from vllm_instant.moe.routing_trace import Trace
from vllm_instant_plugins.super_expert.trace_recorder import TraceRecorder

LAYERS = [ExpertLayer(index, f"layers.{index}", 16, 2, "sigmoid", False) for index in range(3)]


class Model:
    """Picks from which the token can be told."""

    def __init__(self, recorder):
        self.recorder, self.number = recorder, 0
        recorder.prepare(LAYERS, 64, torch.device("cpu"))

    def step(self, *requests, padding=0):
        """Each request: id, class, rows, whether it decodes."""
        self.number += 1
        lengths = [rows for _, _, rows, _ in requests]
        total = sum(lengths)
        rows = StepRows(
            self.number,
            [name for name, *_ in requests],
            np.concatenate([[0], np.cumsum(lengths)]),
            np.array([decodes for *_, decodes in requests]),
            [kind for _, kind, *_ in requests],
            np.zeros(len(requests), np.int64),
        )
        asked = self.recorder.begin_step(rows)
        weights = torch.rand(total + padding, 16)
        for layer in LAYERS:
            first = (torch.arange(total + padding) + layer.index + self.number) % 16
            picks = torch.stack([first, (first + 1) % 16], -1)
            kinds = torch.full((total + padding,), RowKind.DECODE, dtype=torch.int8)
            step = RouterStep(weights, weights, picks, torch.full((total + padding, 2), 0.25), kinds)
            assert self.recorder.allowed(layer, step) is None
        return asked


def test_the_trace_holds_the_picks(tmp_path):
    recorder = TraceRecorder(tmp_path / "trace.npz", 100, 1.0, 1.0, "toy")
    model = Model(recorder)
    model.step(("a", "code", 5, False), ("b", "", 1, True), padding=2)
    model.step(("a", "code", 1, True), ("b", "", 3, True))
    assert recorder.control({"write": True}) == {"trace": str(tmp_path / "trace.npz"), "tokens": 10}
    trace = Trace.read(tmp_path / "trace.npz")
    assert trace.model.score_function == "sigmoid"
    assert not trace.model.renormalise
    assert trace.classes == ("code", "unnamed")
    assert trace.request.tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    assert trace.step.tolist() == [1] * 6 + [2] * 4
    assert trace.is_prefill.tolist() == [True] * 5 + [False] * 5
    for token, (step, row) in enumerate([*((1, row) for row in range(6)), *((2, row) for row in range(4))]):
        for layer in range(3):
            first = (row + layer + step) % 16
            assert trace.experts[token, layer].tolist() == [first, (first + 1) % 16]
    assert (trace.weights == np.float16(0.25)).all()


def test_a_full_trace_ends_the_recording_and_is_written(tmp_path):
    recorder = TraceRecorder(tmp_path / "trace.npz", 7, 1.0, 1.0, "toy")
    model = Model(recorder)
    asked = [model.step(("a", "code", 3, True)) for _ in range(5)]
    assert asked == [True, True, True, False, False]
    assert len(Trace.read(tmp_path / "trace.npz")) == recorder.used == 7
    assert len(recorder.trace().request) == 7


def test_the_configured_fractions_are_sampled():
    recorder = TraceRecorder(Path("unused.npz"), 5000, 0.5, 0.1, "toy")
    model = Model(recorder)
    for _ in range(50):
        model.step(("a", "x", 20, False), ("b", "y", 20, True))
    prefill = recorder.trace().is_prefill
    assert (~prefill).sum() == pytest.approx(500, rel=0.15)
    assert prefill.sum() == pytest.approx(100, rel=0.3)


def test_clients_that_name_more_classes_than_a_trace_can_number_share_one():
    recorder = TraceRecorder(Path("unused.npz"), 40_000, 1.0, 1.0, "toy")
    model = Model(recorder)
    for first in range(0, 33_000, 60):
        model.step(*((f"r{number}", f"class {number}", 1, True) for number in range(first, first + 60)))
    model.step(("again", "class 3", 1, True), ("late", "class 40000", 1, True))
    trace = recorder.trace()
    assert len(trace.classes) == 1001
    assert [trace.classes[code] for code in trace.class_of_request[-2:]] == ["class 3", "other"]


def test_without_a_file_nothing_is_recorded():
    recorder = TraceRecorder(None, 1000, 1.0, 1.0, "toy")
    model = Model(recorder)
    assert not model.step(("a", "x", 4, True))
    assert recorder.metrics() == {}
    with pytest.raises(ValueError, match="nothing to write"):
        recorder.control({"write": True})
    with pytest.raises(ValueError, match="found"):
        recorder.control({"budget": 1})
