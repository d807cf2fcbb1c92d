"""The ``experts`` slot: which routed experts the tokens of a step may use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """One mixture-of-experts layer of the model."""

    index: int
    """Counts the model's MoE layers from 0."""
    name: str
    num_experts: int
    top_k: int
    """Experts that the model picks for each token."""
    function: str = "softmax"
    """From what the weights come: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``."""
    renormalizes: bool = True
    """Whether the weights of the picked experts are divided by their sum."""


class RowKind(IntEnum):
    """What a row of a step is."""

    PADDING = 0
    PREFILL = 1
    DECODE = 2
    """The newest token of a request that answers, or a draft token that is verified behind it."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """Who the rows of one step belong to; known on the host before the model runs."""

    number: int
    """Counts the steps of this worker."""
    request_ids: Sequence[str]
    starts: npt.NDArray[np.int64]
    """``[requests + 1]``: request i has the rows from ``starts[i]`` to ``starts[i + 1]``."""
    is_decode: npt.NDArray[np.bool_]
    """``[requests]``: whether its rows are ``RowKind.DECODE``; otherwise they are ``PREFILL``."""
    prompt_classes: Sequence[str]
    """One a request: its kind of prompt, as its client says (``instant_prompt_class`` in ``vllm_xargs``), or empty."""
    first_positions: npt.NDArray[np.int64]
    """``[requests]``: the position of each request's first row in its sequence."""


@dataclass(frozen=True, slots=True)
class RouterStep:
    """What one layer's router is about to decide, as tensors on the device; rows are tokens. Do not write into them."""

    weights: torch.Tensor
    """float32 ``[tokens, experts]``: what each expert would weigh, before any normalisation over the picked ones."""
    ranking: torch.Tensor
    """float32 ``[tokens, experts]``: what the model's top-k compares: the weights, with its bias if it has one; -inf
    where its groups leave a token no choice."""
    picks: torch.Tensor
    """int64 ``[tokens, top_k]``: what the model itself would pick, the best first."""
    pick_weights: torch.Tensor
    """float32 ``[tokens, top_k]``: with what weights it would use them."""
    kinds: torch.Tensor
    """int8 ``[tokens]``: a ``RowKind`` each."""


class Measurement(IntEnum):
    """What is measured in a step."""

    OFF = 0
    COUNTS = 1
    """Distinct experts and router mass, natively and as routed."""
    REFERENCE = 2
    """Counts; and the model runs once more, before, as ``shadow`` says, to compare what it would have answered."""


@dataclass(frozen=True, slots=True)
class ExpertCount:
    """How many distinct experts one step used in a layer on average."""

    requests: int
    """That decoded."""
    draft_tokens: int
    """That were verified behind them."""
    experts: float
    num_experts: int
    """Of a layer."""
    top_k: int


@dataclass(frozen=True, slots=True)
class RoutingMeasures:
    """What was measured since the last time; sums over layers and steps, of decoding rows alone."""

    layer_steps: float
    """Layers times steps that were counted."""
    native_experts: float
    """Distinct experts that the model's own picks would use."""
    routed_experts: float
    """Distinct experts that were used."""
    native_mass: float
    """Weights of the model's own picks."""
    routed_mass: float
    """Weights, as the model's router sees them, of the experts that were used in their place."""
    kl_tokens: float
    """Tokens whose next-token distribution was compared; 0 without a shadow step."""
    kl: float
    """Sum over them of the divergence of what was served from the shadow pass, in nats."""
    kl_squared: float
    """Sum of its squares."""


@runtime_checkable
class ExpertRouter(Protocol):
    """Decides which routed experts the tokens of a step may use. Runs in every worker process, under graph capture.

    Workers that share a model call everything in the same order with the same numbers, and must come to the same
    answers: nothing may depend on time or on chance that is not seeded alike.
    """

    def prepare(self, layers: Sequence[ExpertLayer], max_rows: int, device: torch.device) -> None:
        """Allocate what steps need, before any graph is captured.

        Args:
            layers: all layers that will ask.
            max_rows: no step has more rows.
            device: of the tensors in ``allowed``.

        Raises:
            ValueError: when this model cannot be served; one sentence.

        """
        ...

    def allowed(self, layer: ExpertLayer, step: RouterStep) -> torch.Tensor | None:
        """Which experts each row may use: bool ``[tokens, experts]`` or ``[1, experts]``; None for all of them.

        Only rows of ``RowKind.DECODE`` are held to it, and only if at least ``top_k`` experts remain to them. The
        model's own rule then picks and weighs. Shapes and control flow must not depend on values, and nothing may be
        read back from the device: a CUDA graph repeats what the first call did. What shall change later belongs into
        tensors that ``prepare`` made.
        """
        ...

    def begin_step(self, rows: StepRows) -> bool:
        """The next calls of ``allowed`` are about these rows; False where they are not worth the question. Optional.

        A graph that is replayed asks all the same.
        """
        return True

    def measurement(self, number: int) -> Measurement:
        """What to measure in the step with this number. Optional; nothing by default."""
        return Measurement.OFF

    def reference_pass(self, active: bool) -> None:
        """What ``allowed`` says from now on is for comparison (or no longer). Optional.

        Whoever asks for ``Measurement.REFERENCE`` must route natively while it is active: what the server answers is
        compared with that.
        """
        return None

    def observe(self, measures: RoutingMeasures) -> None:
        """Numbers of steps that were looked at, some steps later. Optional."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Numbers of its own for ``/metrics``. Optional."""
        return {}

    def control(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """What ``POST /v1/instant/experts`` brings, while the server runs. Optional.

        Raises:
            ValueError: when it cannot do that; one sentence.

        """
        raise ValueError("this experts plugin takes no settings while it serves")
