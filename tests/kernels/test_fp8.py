"""FP8 conversion in integer operations is exact to the bit, in both directions."""

import pytest
import torch
import triton
import triton.language as tl
from interpreting import interpreted

from vllm_instant_kernels.fp8 import from_e4m3, to_e4m3

pytestmark = pytest.mark.kernel


@triton.jit
def _convert(numbers_ptr, codes_ptr, back_ptr, SIZE: tl.constexpr):  # noqa: N803
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    codes = to_e4m3(tl.load(numbers_ptr + index), tl.uint8)
    tl.store(codes_ptr + index, codes)
    tl.store(back_ptr + index, from_e4m3(codes, tl.float16))


def converted(numbers):
    padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % 4096))
    codes, back = torch.empty_like(padded, dtype=torch.uint8), torch.empty_like(padded, dtype=torch.float16)
    _convert[(len(padded) // 4096,)](padded, codes, back, SIZE=4096)
    return codes[: len(numbers)], back[: len(numbers)]


def _all_numbers():
    """Every finite E4M3 number, the midpoints between them, and the float32 numbers next to those."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(halfway, torch.tensor(towards)) for towards in (0.0, 1e9)]
    positive = torch.cat([codes, halfway, *beside])
    return torch.cat([positive, -positive])


def test_conversion_equals_pytorch(numbers):
    drawn = torch.randn(50_000, generator=torch.Generator().manual_seed(numbers.randrange(2**31)))
    exponents = torch.tensor([numbers.uniform(-12, 8.8) for _ in range(1000)]).repeat(50)
    x = torch.cat([_all_numbers(), (drawn * exponents.exp2()).clamp(-448, 448)])
    codes, back = interpreted(converted, x)
    expected = x.to(torch.float8_e4m3fn)
    assert torch.equal(codes, expected.view(torch.uint8))
    assert torch.equal(back.float() * 256, expected.float())


def test_conversion_saturates_and_keeps_nan():
    codes, _ = interpreted(converted, torch.tensor([449.0, 1e30, torch.inf, -torch.inf, -470.0, torch.nan]))
    assert codes.tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0xFE, 0x7F]
