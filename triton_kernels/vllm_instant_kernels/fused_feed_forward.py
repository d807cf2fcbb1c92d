"""The second half of a decoder layer for small batches, in three launches.

::

    x  = residual + attention @ Wo.T                        _project: one program per tile of columns of x
    h  = silu(n @ Wg.T) * (n @ Wu.T),  n = RMSNorm(x) * g   _gate_and_up: one program per tile of columns of h
    y  = h @ Wd.T, plus x if requested                      _down: one program per tile of columns of y and part of h

Every launch needs the complete output of the one before, so fewer than three would need a barrier across the device.
Against one kernel per operation it saves the launches of norm and activation and their memory traffic: ``_project``
adds the residual and writes each tile's sum of squares; ``_gate_and_up`` multiplies x by the norm's weights while
loading it and applies the norm's factor to the products; ``_down`` is cut along h, and the last program to arrive adds
the parts and x (as in ``attention_tiles``, without waiting). Where the next layer's norm adds the residual, as in vLLM,
x and the output of the feed-forward are returned separately.

Roofline. With ``A`` columns of attention, hidden size ``H``, inner size ``I`` and batches up to 16, ``A H + 3 H I``
weights are read once and dominate the traffic. Separate kernels read them equally fast; their extra cost is launches,
each of which drains the device, and activations that go to memory and back: at most ``16 * (6 H + 4 I)`` elements, 1.3
% of the weights for H = 2048, I = 8192. In BF16 the weights of a layer take 33 microseconds at 3.35 TB/s for a 1B model
(A = H = 2048, I = 8192) and 115 for 8B (A = H = 4096, I = 14336). If each of the two saved launches costs 2
microseconds, the upper bound of the gain is 11 % for 1B and 3 % for 8B, and less if a CUDA graph hides launches. Larger
batches are bound by arithmetic, where libraries are better. Small models, hence draft models, gain most; with FP8
weights the relative gain doubles. None of this has been measured on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_instant_kernels.fp8 import from_e4m3

MAX_ROWS = 16
"""Maximum rows of a batch: the rows of the smallest tensor core product."""


@triton.jit
def _product(
    a_ptr,
    a_stride,
    weight_ptr,
    rows,
    columns,
    count,
    first,
    end,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """``a[:, first:end] @ weight[columns, first:end].T`` in float32 ``[ROWS, COLUMNS]``."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, STEP):
        k = start + tl.arange(0, STEP)
        is_k = k < end
        a = tl.load(
            a_ptr + rows[:, None] * a_stride + k[None, :], mask=(rows < count)[:, None] & is_k[None, :], other=0.0
        )
        weight = tl.load(weight_ptr + columns[None, :] * LENGTH + k[:, None], mask=is_k[:, None], other=0.0)
        total = tl.dot(a.to(PRODUCTS), from_e4m3(weight, PRODUCTS), total, input_precision="ieee")
    return total


@triton.jit
def _scaled(product, scales_ptr, columns, IS_BYTES: tl.constexpr):
    """The product times the scale of each output column, if the weights are quantised (256: see ``from_e4m3``)."""
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + columns)
        product = product * (scales * (256.0 if IS_BYTES else 1.0))[None, :]
    return product


@triton.jit
def _project(
    attention_ptr,
    weight_ptr,
    scales_ptr,
    residual_ptr,
    x_ptr,
    squares_ptr,
    count,
    HIDDEN: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Grid ``[HIDDEN / COLUMNS]``. Writes ``x``, and ``squares[tile, row]``, the sum of squares of a tile of x."""
    tile = tl.program_id(0)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    product = _product(
        attention_ptr, LENGTH, weight_ptr, rows, columns, count, 0, LENGTH, LENGTH, ROWS, COLUMNS, STEP, PRODUCTS
    )
    product = _scaled(product, scales_ptr, columns, weight_ptr.dtype.element_ty == tl.uint8)
    mask = (rows < count)[:, None]
    cells = rows[:, None] * HIDDEN + columns[None, :]
    x = product + tl.load(residual_ptr + cells, mask=mask, other=0.0).to(tl.float32)
    x = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + cells, x, mask=mask)
    # The norm is of the rounded sum, as without fusion.
    x = x.to(tl.float32)
    tl.store(squares_ptr + tile * ROWS + rows, tl.sum(x * x, axis=1))


@triton.jit
def _gate_and_up(
    x_ptr,
    gain_ptr,
    weight_ptr,
    scales_ptr,
    squares_ptr,
    h_ptr,
    count,
    epsilon,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Grid ``[INNER / COLUMNS]``. Writes ``h``; the weight has the rows of the gate, then the rows of up."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Both products in one loop, so that x is loaded once.
    for start in range(0, HIDDEN, STEP):
        k = start + tl.arange(0, STEP)
        is_k = k < HIDDEN
        x = tl.load(
            x_ptr + rows[:, None] * HIDDEN + k[None, :], mask=(rows < count)[:, None] & is_k[None, :], other=0.0
        )
        gain = tl.load(gain_ptr + k, mask=is_k, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * gain[None, :]).to(PRODUCTS)
        at = weight_ptr + columns[None, :] * HIDDEN + k[:, None]
        gate = tl.dot(x, from_e4m3(tl.load(at, mask=is_k[:, None], other=0.0), PRODUCTS), gate, input_precision="ieee")
        weight = tl.load(at + INNER * HIDDEN, mask=is_k[:, None], other=0.0)
        up = tl.dot(x, from_e4m3(weight, PRODUCTS), up, input_precision="ieee")
    tiles = tl.arange(0, TILES_PADDED)
    squares = tl.load(squares_ptr + tiles[:, None] * ROWS + rows[None, :], mask=(tiles < TILES)[:, None], other=0.0)
    # RMSNorm: x / sqrt(mean(x^2) + epsilon); the factor of a row commutes with the product.
    factor = tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + epsilon)[:, None]
    is_bytes: tl.constexpr = weight_ptr.dtype.element_ty == tl.uint8
    gate = _scaled(gate, scales_ptr, columns, is_bytes) * factor
    up = _scaled(up, scales_ptr, INNER + columns, is_bytes) * factor
    # silu(g) = g / (1 + e^-g)
    h = gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * up
    tl.store(
        h_ptr + rows[:, None] * INNER + columns[None, :], h.to(h_ptr.dtype.element_ty), mask=(rows < count)[:, None]
    )


@triton.jit
def _down(
    h_ptr,
    weight_ptr,
    scales_ptr,
    x_ptr,
    y_ptr,
    sums_ptr,
    arrivals_ptr,
    count,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    PART: tl.constexpr,
    SPLITS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Grid ``[HIDDEN / COLUMNS, SPLITS]``. Writes ``y``, to which x is added if ``ADDS``."""
    tile, split = tl.program_id(0), tl.program_id(1)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    first = split * PART
    end = tl.minimum(first + PART, INNER)
    product = _product(h_ptr, INNER, weight_ptr, rows, columns, count, first, end, INNER, ROWS, COLUMNS, STEP, PRODUCTS)
    cells = rows[:, None] * HIDDEN + columns[None, :]
    tl.store(sums_ptr + split * ROWS * HIDDEN + cells, product)
    # Every thread must have stored before one of them increments the counter.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLITS - 1:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in range(0, SPLITS):
            total += tl.load(sums_ptr + part * ROWS * HIDDEN + cells, cache_modifier=".cg")
        total = _scaled(total, scales_ptr, columns, weight_ptr.dtype.element_ty == tl.uint8)
        mask = (rows < count)[:, None]
        if ADDS:
            total += tl.load(x_ptr + cells, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cells, total.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(arrivals_ptr + tile, 0)


@dataclass(frozen=True)
class Weight:
    """A matrix of a linear layer, ``[outputs, inputs]``, contiguous.

    FP8 weights are ``float8_e4m3fn``, or ``uint8`` with the same bytes for devices without FP8.
    """

    numbers: torch.Tensor
    scales: torch.Tensor | None = None
    """float32 ``[outputs]`` for FP8: factors on the stored numbers."""

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """Raise ValueError unless shape, layout and scales are as expected."""
        is_fp8 = self.numbers.element_size() == 1
        found = None if self.scales is None else tuple(self.scales.shape)
        wanted = (outputs,) if is_fp8 else None
        if self.numbers.shape != (outputs, inputs) or not self.numbers.is_contiguous() or found != wanted:
            raise ValueError(
                f"{name} is {self.numbers.dtype} of shape {tuple(self.numbers.shape)} with scales of shape {found}; it "
                f"must be contiguous, of shape {(outputs, inputs)}, with scales of shape {wanted}"
            )


@dataclass(frozen=True)
class FeedForwardWeights:
    """The weights of the second half of a decoder layer."""

    output: Weight
    """Output projection of the attention, ``[H, A]``."""
    norm: torch.Tensor
    """``[H]``."""
    gate_and_up: Weight
    """``[2 I, H]``, the rows of the gate first."""
    down: Weight
    """``[H, I]``."""
    epsilon: float = 1e-5


def _columns(outputs: int, largest: int) -> int:
    """The largest power of two that divides ``outputs``, from 16 to ``largest``."""
    columns = largest
    while columns > 16 and outputs % columns:
        columns //= 2
    if outputs % columns:
        raise ValueError(f"{outputs} is not a multiple of 16")
    return columns


def counters_for(hidden: int, device: torch.device) -> torch.Tensor:
    """Arrival counters for layers of this hidden size, int32; every call resets them to 0.

    A call without counters allocates and clears its own, which is one more launch. Calls that may run at the same time
    must not share counters.
    """
    return torch.zeros(hidden // 16, dtype=torch.int32, device=device)


def fused_feed_forward(
    attention: torch.Tensor, residual: torch.Tensor, weights: FeedForwardWeights, splits: int = 4
) -> torch.Tensor:
    """The residual stream after a layer, from the attention's output and the residual before it.

    Three launches on the current stream, without synchronisation. The output of a row does not depend on the others.

    Args:
        attention: float16, bfloat16 or float32 ``[rows, A]`` with 1 to 16 rows, contiguous.
        residual: ``[rows, H]``, contiguous.
        weights: the layer's weights; H and I must be multiples of 16.
        splits: number of parts of the last product.

    Returns:
        ``[rows, H]``, of the residual's type.

    Raises:
        ValueError: a shape or layout is not as above.

    """
    return _launch(attention, residual, weights, splits, True, None)[0]


def feed_forward_parts(
    attention: torch.Tensor,
    residual: torch.Tensor,
    weights: FeedForwardWeights,
    splits: int = 4,
    counters: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``fused_feed_forward``, in two parts: the output of the feed-forward, and the residual stream to add it to.

    Args:
        attention: as above.
        residual: as above.
        weights: as above.
        splits: as above.
        counters: from ``counters_for``; None to allocate them.

    Returns:
        ``h @ Wd.T`` and ``x``, each ``[rows, H]`` and of the residual's type.

    Raises:
        ValueError: a shape or layout is not as above.

    """
    return _launch(attention, residual, weights, splits, False, counters)


def _launch(
    attention: torch.Tensor,
    residual: torch.Tensor,
    weights: FeedForwardWeights,
    splits: int,
    adds: bool,
    counters: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, length), (residual_rows, hidden) = attention.shape, residual.shape
    inner = weights.down.numbers.shape[1]
    if not 1 <= rows <= MAX_ROWS or residual_rows != rows:
        raise ValueError(
            f"attention has {rows} rows and residual {residual_rows}; both must have the same 1 to {MAX_ROWS}"
        )
    if not attention.is_contiguous() or not residual.is_contiguous():
        raise ValueError("attention and residual must be contiguous")
    weights.output.check("output", hidden, length)
    weights.gate_and_up.check("gate_and_up", 2 * inner, hidden)
    weights.down.check("down", hidden, inner)
    if counters is not None and len(counters) < hidden // 16:
        raise ValueError(f"there are {len(counters)} counters; hidden size {hidden} needs {hidden // 16}")

    kinds = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    products = kinds[attention.dtype]
    if products == tl.bfloat16 and triton.knobs.runtime.interpret:
        # Triton's interpreter computes products of bfloat16 wrongly.
        products = tl.float32
    of_hidden, of_inner = _columns(hidden, 32), _columns(inner, 32)
    tiles = hidden // of_hidden
    common = {"ROWS": MAX_ROWS, "PRODUCTS": products, "num_warps": 4, "num_stages": 4}
    x, y = torch.empty_like(residual), torch.empty_like(residual)
    h = residual.new_empty(rows, inner)
    squares = residual.new_empty(tiles, MAX_ROWS, dtype=torch.float32)
    _project[(tiles,)](
        attention,
        weights.output.numbers,
        weights.output.scales,
        residual,
        x,
        squares,
        rows,
        HIDDEN=hidden,
        LENGTH=length,
        COLUMNS=of_hidden,
        STEP=128,
        **common,
    )
    _gate_and_up[(inner // of_inner,)](
        x,
        weights.norm,
        weights.gate_and_up.numbers,
        weights.gate_and_up.scales,
        squares,
        h,
        rows,
        weights.epsilon,
        HIDDEN=hidden,
        INNER=inner,
        TILES=tiles,
        TILES_PADDED=triton.next_power_of_2(tiles),
        COLUMNS=of_inner,
        STEP=128,
        **common,
    )
    part = triton.cdiv(triton.cdiv(inner, splits), 128) * 128
    splits = triton.cdiv(inner, part)
    sums = residual.new_empty(splits, MAX_ROWS, hidden, dtype=torch.float32)
    arrivals = counters_for(hidden, residual.device) if counters is None else counters
    _down[(tiles, splits)](
        h,
        weights.down.numbers,
        weights.down.scales,
        x,
        y,
        sums,
        arrivals,
        rows,
        HIDDEN=hidden,
        INNER=inner,
        PART=part,
        SPLITS=splits,
        ADDS=adds,
        COLUMNS=of_hidden,
        STEP=128,
        **common,
    )
    return y, x
