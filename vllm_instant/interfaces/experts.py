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
    """Index among the model's MoE layers, from 0."""
    name: str
    """Module name in the model."""
    num_experts: int
    top_k: int
    """Number of experts per token."""
    function: str = "softmax"
    """Function from router logits to weights: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``."""
    renormalizes: bool = True
    """Whether the weights of the selected experts are divided by their sum."""


class RowKind(IntEnum):
    """Kind of a row in a step; a row is one token."""

    PADDING = 0
    PREFILL = 1
    DECODE = 2
    """The newest token of a decoding request, or a draft token that is verified after it."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """The requests of one step's rows, known on the host before the model runs."""

    number: int
    """Number of the step on this worker."""
    request_ids: Sequence[str]
    """Requests in the order of their rows."""
    starts: npt.NDArray[np.int64]
    """int64 ``[requests + 1]``: request ``i`` has the rows ``starts[i]:starts[i + 1]``."""
    is_decode: npt.NDArray[np.bool_]
    """bool ``[requests]``: whether a request's rows are ``RowKind.DECODE``; otherwise they are ``PREFILL``."""
    prompt_classes: Sequence[str]
    """Per request the kind of prompt that its client names (``instant_prompt_class`` in ``vllm_xargs``), or empty."""
    first_positions: npt.NDArray[np.int64]
    """int64 ``[requests]``: position of each request's first row in its sequence."""


@dataclass(frozen=True, slots=True)
class RouterStep:
    """Router outputs of one layer, as read-only tensors on the device; rows are tokens."""

    weights: torch.Tensor
    """float32 ``[tokens, experts]``: weight of each expert, before normalization over the selected ones."""
    ranking: torch.Tensor
    """float32 ``[tokens, experts]``: scores of the model's top-k: the weights plus the layer's bias, if any; -inf for
    experts outside the selected groups."""
    picks: torch.Tensor
    """int64 ``[tokens, top_k]``: the model's own selection, the best expert first."""
    pick_weights: torch.Tensor
    """float32 ``[tokens, top_k]``: weights of ``picks``."""
    kinds: torch.Tensor
    """int8 ``[tokens]``: the ``RowKind`` of each row."""


class Measurement(IntEnum):
    """Kind of measurement in a step."""

    OFF = 0
    COUNTS = 1
    """Distinct experts and sums of router weights, by the model's own selection and as routed."""
    REFERENCE = 2
    """As ``COUNTS``, and the model runs an additional reference pass (``ExpertRouter.reference_pass``) to compare the
    next-token distributions."""


@dataclass(frozen=True, slots=True)
class ExpertCount:
    """Average number of distinct experts per layer in one step."""

    requests: int
    """Number of decoding requests."""
    draft_tokens: int
    """Number of draft tokens that were verified."""
    experts: float
    """Distinct experts per layer."""
    num_experts: int
    """Number of experts in a layer."""
    top_k: int
    """Number of experts per token."""


@dataclass(frozen=True, slots=True)
class RoutingMeasures:
    """Measurements since the last call: sums over layers and steps, over decoding rows only."""

    layer_steps: float
    """Number of layers times counted steps."""
    native_experts: float
    """Distinct experts in the model's own selection."""
    routed_experts: float
    """Distinct experts as routed."""
    native_mass: float
    """Router weights of the model's own selection."""
    routed_mass: float
    """Router weights of the experts as routed."""
    kl_tokens: float
    """Number of compared next-token distributions; 0 without a reference pass."""
    kl: float
    """Sum over these of the KL divergence of the served distribution from the reference pass, in nats."""
    kl_squared: float
    """Sum of the squared divergences."""


class FusedRoute(Protocol):
    """A function that routes one layer's rows in a few launches, for capture in CUDA graphs."""

    def __call__(
        self,
        logits: torch.Tensor,
        weights: torch.Tensor,
        picks: torch.Tensor,
        kinds: torch.Tensor,
        counting: torch.Tensor,
        counted: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route the rows.

        Args:
            logits: Router logits ``[rows, experts]``.
            weights: float32 ``[rows, top_k]``: the native weights.
            picks: int32 ``[rows, top_k]``: the native picks.
            kinds: int8 ``[rows]``: ``RowKind`` of each row.
            counting: float32 scalar: 0 in passes that are not counted.
            counted: float64 ``[4]``: distinct native and routed experts, native and routed weights of decoding rows
                are added to it.

        Returns:
            Final weights and picks, as ``weights`` and ``picks``.

        """
        ...


@runtime_checkable
class ExpertRouter(Protocol):
    """Decides which routed experts the tokens of a step may use. Runs in every worker process, under graph capture.

    Workers that share a model make the same calls in the same order with the same numbers and must return the same
    results: nothing may depend on a clock or on randomness with different seeds.
    """

    def prepare(self, layers: Sequence[ExpertLayer], max_rows: int, device: torch.device) -> None:
        """Allocate buffers, before any graph is captured.

        Args:
            layers: All layers for which ``allowed`` will be called.
            max_rows: Maximum number of rows per step.
            device: Device of the tensors in ``allowed``.

        Raises:
            ValueError: With one sentence, if the model is not supported.

        """
        ...

    def allowed(self, layer: ExpertLayer, step: RouterStep) -> torch.Tensor | None:
        """Return the experts that each row may use: bool ``[tokens, experts]`` or ``[1, experts]``; None for all.

        It applies to rows of ``RowKind.DECODE`` with at least ``top_k`` allowed experts; the model's own rule selects
        and weights among these. Shapes and control flow must not depend on values, and nothing may be read back from
        the device, because a CUDA graph replays the first call. State that changes between steps belongs in tensors
        that ``prepare`` allocates.
        """
        ...

    def fused_route(self, layer: ExpertLayer, bias: torch.Tensor | None, scale: float) -> FusedRoute | None:
        """Return a function that routes ``layer`` in a few launches instead of calls of ``allowed``. Optional.

        It is called once after ``prepare``, on devices that replay CUDA graphs, for layers without expert groups.

        Args:
            layer: The layer.
            bias: float32 ``[experts]``, added to the weights for ranking only; None without.
            scale: Factor on the final weights.

        Returns:
            The function, which must select the same experts as ``allowed``, or None.

        """
        return None

    def begin_step(self, rows: StepRows) -> bool:
        """Receive the rows of the next calls of ``allowed``; return False to skip these calls. Optional.

        A replayed graph makes the calls regardless.
        """
        return True

    def measurement(self, number: int) -> Measurement:
        """Return what to measure in the step with this number. Optional; ``Measurement.OFF`` by default."""
        return Measurement.OFF

    def reference_pass(self, active: bool) -> None:
        """A reference pass begins (``active``) or ends. Optional.

        A router that returns ``Measurement.REFERENCE`` must allow all experts while it is active: the served
        distributions are compared with those of this pass.
        """
        return None

    def observe(self, measures: RoutingMeasures) -> None:
        """Receive measurements, some steps later. Optional."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Return the plugin's own gauges for ``/metrics``, by name. Optional."""
        return {}

    def control(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Change settings of the running server, sent by ``POST /v1/instant/experts``. Optional.

        Returns:
            The settings now in force.

        Raises:
            ValueError: With one sentence, if the settings are not valid.

        """
        raise ValueError("this experts plugin takes no settings while it serves")
