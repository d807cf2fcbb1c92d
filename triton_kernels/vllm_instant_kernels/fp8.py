"""FP8 E4M3 conversions inside kernels, on devices with and without E4M3 instructions.

A tensor of type ``float8_e4m3fn`` is converted by the device (compute capability 8.9 and later). A tensor of type
``uint8`` holds the same bytes and is converted in integer operations: for older devices, and for Triton's interpreter,
whose own conversion to E4M3 rounds incorrectly.

E4M3 has 4 exponent bits with bias 7, 3 mantissa bits, a largest value of 448 and one NaN, 0x7F.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x, TYPE: tl.constexpr):
    """float32 to E4M3 as ``TYPE`` (``float8e4nv`` or ``uint8``): rounded to nearest even, saturating at 448."""
    if TYPE == tl.uint8:
        clamped = tl.minimum(tl.maximum(x, -448.0), 448.0)
        bits = clamped.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Drop 20 of 23 mantissa bits, rounding to nearest even: add half a unit minus 1, plus the last kept bit.
        # 960 = (127 - 7) << 3 changes the bias of the exponent from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        # Below 2^-6 (0.015625) values are multiples of 2^-9; adding and subtracting 2^23 rounds to an integer.
        absolute = magnitude.to(tl.float32, bitcast=True)
        subnormal = ((absolute * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)
        code = tl.where(absolute < 0.015625, subnormal, normal) | ((bits >> 24) & 0x80)
        converted = tl.where(x != x, 0x7F, code).to(tl.uint8)
    else:
        converted = x.to(TYPE)
    return converted


@triton.jit
def from_e4m3(x, TYPE: tl.constexpr):
    """E4M3 to ``TYPE``, exact in float16 and wider; from ``uint8`` the result is divided by 256."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        # The bits are moved to their places in float16, whose exponent bias is 15 instead of 7: 2^-8 of the value.
        converted = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True).to(TYPE)
    else:
        converted = x.to(TYPE)
    return converted


@triton.jit
def scale_of(largest):
    """The scale of a row with this largest magnitude: it maps the row to the range of E4M3, and is never 0."""
    return tl.maximum(largest / 448.0, 1e-6)
