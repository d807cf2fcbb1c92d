"""FP8 E4M3 numbers inside kernels, on devices that have such numbers and on those that do not.

A cache tensor of type ``float8_e4m3fn`` is converted by the device (compute capability 8.9 and later). A tensor of type
``uint8`` is taken for the same bytes and converted in integer operations: for older devices, and for Triton's
interpreter, whose own conversion to E4M3 rounds wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = 448.0
"""The largest finite number."""
SMALLEST_SCALE = 1e-6
"""Of a row of zeros: what it is divided by must not be zero."""


@triton.jit
def to_e4m3(x, TYPE: tl.constexpr):
    """float32 to E4M3, rounded to nearest even, saturating; as ``TYPE``, which is ``float8e4nv`` or ``uint8``."""
    if TYPE == tl.uint8:
        clamped = tl.minimum(tl.maximum(x, -448.0), 448.0)
        bits = clamped.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # 20 bits of the mantissa go; the exponent's bias falls from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        # Below 2^-6 numbers are multiples of 2^-9; adding 2^23 makes the hardware round to whole ones.
        absolute = magnitude.to(tl.float32, bitcast=True)
        subnormal = ((absolute * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)
        code = tl.where(absolute < 0.015625, subnormal, normal) | ((bits >> 24) & 0x80)
        converted = tl.where(x != x, 0x7F, code).to(tl.uint8)
    else:
        converted = x.to(TYPE)
    return converted


@triton.jit
def from_e4m3(x, TYPE: tl.constexpr):
    """E4M3 to ``TYPE``, exact in float16 and wider; of ``uint8`` it is the 256th part (see ``unit``)."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        # The exponent's bias is 7 here and 15 in float16: taken over as it is, a number is 2^8 times too small.
        converted = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True).to(TYPE)
    else:
        converted = x.to(TYPE)
    return converted


@triton.jit
def scale_of(largest):
    """What a row with this largest magnitude is divided by, so that it fills the range."""
    return tl.maximum(largest / 448.0, 1e-6)
