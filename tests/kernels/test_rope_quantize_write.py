"""Rotation, quantisation and the write to the cache, against plain tensor operations."""

import pytest
import torch
from attention_cases import written
from attention_reference import read_reference, rotated, write_reference
from interpreting import interpreted

from vllm_instant_kernels.cache_layout import row_bytes, split
from vllm_instant_kernels.rope_quantize_write import quantize_write, rope_quantize_write

pytestmark = pytest.mark.kernel
BLOCKS = 5


def _angles(positions, rotary):
    angles = torch.outer(torch.arange(positions), 10_000.0 ** (-torch.arange(0, rotary, 2) / rotary))
    return torch.cat([angles.cos(), angles.sin()], -1)


def _inputs(numbers, head, kv_heads, group, block_size, dtype=torch.float32, cache_dtype=torch.uint8):
    generator = torch.Generator().manual_seed(numbers.randrange(2**31))
    tokens = numbers.randint(3, 20)
    # Query, key and value are columns of one matrix, as a fused projection leaves them.
    heads = (group + 2) * kv_heads
    together = torch.randn(tokens, heads, head, generator=generator)
    # Some rows are all zeros or far from normal.
    together *= (10.0 ** torch.randint(-3, 3, (tokens, heads, 1), generator=generator)).float()
    together[0, -1] = 0
    query, key, value = together.to(dtype).split([group * kv_heads, kv_heads, kv_heads], 1)
    row = row_bytes(head) if cache_dtype == torch.uint8 else 2 * head
    cache = torch.full((BLOCKS, kv_heads, block_size, row), 77, dtype=cache_dtype)
    slots = torch.randperm(BLOCKS * block_size, generator=generator)[:tokens]
    slots[numbers.sample(range(tokens), 2)] = -1
    positions = torch.randint(0, 500, (tokens,), generator=generator)
    return query, key, value, cache, slots, positions


def _untouched(cache, slots):
    """The rows of the cache without a token, ``[rows, heads, row]``."""
    rows = cache.transpose(1, 2).flatten(0, 1)
    mask = torch.ones(len(rows), dtype=torch.bool)
    mask[slots[slots >= 0]] = False
    return rows[mask]


@pytest.mark.parametrize(
    ("head", "kv_heads", "group", "block_size"),
    [(64, 1, 1, 16), (64, 5, 3, 32), (96, 2, 7, 16), (128, 8, 4, 32), (256, 1, 8, 16)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_cache_equals_the_reference(numbers, head, kv_heads, group, block_size, dtype):
    _, key, value, cache, slots, _ = _inputs(numbers, head, kv_heads, group, block_size, dtype)
    (found,) = interpreted(written, key, value, cache, slots, head)
    expected = cache.clone()
    write_reference(key, value, split(expected, head), slots)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize(
    ("head", "kv_heads", "group", "block_size"),
    [(64, 1, 1, 16), (64, 5, 3, 32), (96, 2, 7, 16), (128, 2, 4, 32), (256, 1, 8, 16)],
)
def test_queries_and_keys_are_rotated(numbers, head, kv_heads, group, block_size, partly):
    query, key, value, cache, slots, positions = _inputs(numbers, head, kv_heads, group, block_size)
    cos_sin = _angles(500, head // 2 if partly else head)
    found, rotated_query = interpreted(written, key, value, cache, slots, head, query, positions, cos_sin)
    torch.testing.assert_close(rotated_query, rotated(query, positions, cos_sin), atol=1e-3, rtol=1e-6)
    views = split(found, head)
    real = slots >= 0
    keys, values = rotated(key, positions, cos_sin)[real], value[real].float()
    for x, stored, scales in ((keys, views.keys, views.key_scales), (values, views.values, views.value_scales)):
        block, place = slots[real] // block_size, slots[real] % block_size
        scale = scales[block, place]
        torch.testing.assert_close(scale, (x.abs().amax(-1) / 448).clamp(min=1e-6), rtol=1e-5, atol=0)
        numbers_stored = stored[block, place].view(torch.float8_e4m3fn).float() * scale[..., None]
        # Half of the distance between neighbours: of a number 1/16 of it, at least half of the smallest number.
        allowed = torch.maximum(x.abs() / 16, scale[..., None] * 2**-10) * 1.001
        assert bool(((numbers_stored - x).abs() <= allowed).all())
    assert torch.equal(_untouched(found, slots), _untouched(cache, slots))


def test_an_unquantised_cache_is_written_in_its_type(numbers):
    query, key, value, cache, slots, positions = _inputs(numbers, 64, 2, 4, 16, cache_dtype=torch.float32)
    (found,) = interpreted(written, key, value, cache, slots, 64)
    expected = cache.clone()
    write_reference(key, value, split(expected, 64), slots)
    assert torch.equal(found, expected)
    cos_sin = _angles(500, 64)
    found, _ = interpreted(written, key, value, cache, slots, 64, query, positions, cos_sin)
    write_reference(rotated(key, positions, cos_sin), value, split(expected, 64), slots)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-6)


def test_keys_may_be_longer_than_slots(numbers):
    _, key, value, cache, slots, _ = _inputs(numbers, 64, 2, 4, 16)
    (found,) = interpreted(written, key, value, cache, slots[:-2], 64)
    expected = cache.clone()
    write_reference(key, value, split(expected, 64), slots[:-2])
    assert torch.equal(found, expected)
    assert read_reference(split(found, 64), torch.zeros(1, dtype=torch.int32), 1)[0].shape == (1, 2, 64)


def test_invalid_arguments_are_refused(numbers):
    query, key, value, cache, slots, positions = _inputs(numbers, 64, 2, 4, 16)
    views = split(cache, 64)
    with pytest.raises(ValueError, match=r"value is of shape .* must be of shape \(\d+ or more, 2, 64\)"):
        quantize_write(key, value[:, :1], views, slots)
    with pytest.raises(ValueError, match="rotated_query is of shape"):
        rope_quantize_write(query, key, value, views, slots, positions, _angles(9, 64), query[:, :, :32])
    with pytest.raises(ValueError, match="at most 64"):
        rope_quantize_write(query, key, value, views, slots, positions, _angles(9, 96), query)
