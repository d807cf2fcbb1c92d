"""Projection, norm, feed-forward and both residuals in three launches, in the interpreter, against float64."""

import pytest
import torch
from feed_forward_cases import (
    fed_forward,
    fed_forward_parts,
    feed_forward_parts_reference,
    feed_forward_reference,
    matrices,
)
from interpreting import interpreted

from vllm_instant_kernels.fused_feed_forward import (
    FeedForwardWeights,
    Weight,
    feed_forward_parts,
    fused_feed_forward,
)

pytestmark = pytest.mark.kernel
ALLOWED = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
"""Relative L2 error; in 16 bits x, its product with the norm's weights, h and y are rounded."""


def _case(numbers, rows, length, hidden, inner, fp8, dtype=torch.float32):
    seed = numbers.randrange(2**31)
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(rows, length, generator=generator).to(dtype)
    residual = 3 * torch.randn(rows, hidden, generator=generator)
    norm = 1 + 0.3 * torch.randn(hidden, generator=generator)
    return attention, residual.to(dtype), norm.to(dtype), matrices(seed, length, hidden, inner, fp8, dtype)


def _error(case, splits, rounded_to=""):
    (found,) = interpreted(fed_forward_packed, *_flat(case), splits, rounded_to)
    expected = feed_forward_reference(*case, 1e-5)
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def _flat(case):
    attention, residual, norm, made = case
    return attention, residual, norm, *(part for matrix in made for part in matrix)


def fed_forward_packed(attention, residual, norm, *rest):
    *parts, splits, rounded_to = rest
    made = list(zip(parts[::2], parts[1::2], strict=True))
    return fed_forward(attention, residual, norm, made, splits, rounded_to)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 15, 16])
@pytest.mark.parametrize(
    ("length", "hidden", "inner", "splits"),
    [(64, 64, 128, 1), (192, 96, 272, 2), (128, 256, 700 // 16 * 16, 4), (32, 48, 1040, 8)],
)
def test_results_equal_the_reference(numbers, length, hidden, inner, splits, rows, fp8):
    assert _error(_case(numbers, rows, length, hidden, inner, fp8), splits) <= ALLOWED["float32"]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bit_activations(numbers, name, fp8):
    made = _case(numbers, 5, 128, 128, 384, fp8, getattr(torch, name))
    attention, residual, norm, weights = made
    # Numbers of one type are among those of another: bfloat16 ones travel as float32.
    wide = (
        attention.float(),
        residual.float(),
        norm.float(),
        [(w if s is not None else w.float(), s) for w, s in weights],
    )
    assert _error(wide, 2, name) <= ALLOWED[name]


def fed_forward_parts_packed(attention, residual, norm, *rest):
    *parts, splits = rest
    return fed_forward_parts(attention, residual, norm, list(zip(parts[::2], parts[1::2], strict=True)), splits)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 16])
def test_both_parts_equal_the_reference(numbers, rows, fp8):
    case = _case(numbers, rows, 96, 144, 272, fp8)
    found = interpreted(fed_forward_parts_packed, *_flat(case), 2)
    expected = feed_forward_parts_reference(*case, 1e-5)
    for one, other in zip(found[:2], expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm() / other.norm()) <= ALLOWED["float32"]
    assert not found[2].any(), "counters are not back at 0"


def test_a_row_does_not_depend_on_the_others(numbers):
    attention, residual, norm, made = _case(numbers, 16, 64, 64, 144, False)
    (together,) = interpreted(fed_forward_packed, *_flat((attention, residual, norm, made)), 2, "")
    row = numbers.randrange(16)
    alone = (attention[row : row + 1].clone(), residual[row : row + 1].clone(), norm, made)
    (found,) = interpreted(fed_forward_packed, *_flat(alone), 2, "")
    # The interpreter multiplies with the BLAS at hand, which rounds by where its operands lie in memory.
    torch.testing.assert_close(found[0], together[row], rtol=1e-5, atol=1e-5)


def test_invalid_arguments_are_refused(numbers):
    attention, residual, norm, made = _case(numbers, 2, 64, 64, 128, False)
    output, both, down = (Weight(*matrix) for matrix in made)
    weights = FeedForwardWeights(output, norm, both, down)
    with pytest.raises(ValueError, match="attention has 17 rows and residual 2"):
        fused_feed_forward(attention.repeat(9, 1)[:17], residual, weights)
    with pytest.raises(ValueError, match=r"gate_and_up is .* must be contiguous, of shape \(256, 64\)"):
        fused_feed_forward(attention, residual, FeedForwardWeights(output, norm, down, down))
    fp8 = Weight(torch.zeros(64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"with scales of shape None; .* with scales of shape \(64,\)"):
        fused_feed_forward(attention, residual, FeedForwardWeights(fp8, norm, both, down))
    with pytest.raises(ValueError, match="there are 3 counters; hidden size 64 needs 4"):
        feed_forward_parts(attention, residual, weights, counters=torch.zeros(3, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_the_device_equals_the_reference(numbers, rows, fp8):
    attention, residual, norm, made = _case(numbers, rows, 2048, 2048, 8192, fp8, torch.float16)
    native = torch.cuda.get_device_capability() >= (8, 9)
    on_device = [
        (w.cuda().view(torch.float8_e4m3fn) if s is not None and native else w.cuda(), s if s is None else s.cuda())
        for w, s in made
    ]
    (found,) = fed_forward(attention.cuda(), residual.cuda(), norm.cuda(), on_device, 4)
    added, x = feed_forward_parts_reference(attention, residual, norm, made, 1e-5)
    *parts, counters = fed_forward_parts(attention.cuda(), residual.cuda(), norm.cuda(), on_device, 4)
    for one, other in zip((found, *parts), (x + added, added, x), strict=True):
        assert float((one.cpu() - other).norm() / other.norm()) <= ALLOWED["float16"]
    assert not counters.any()
