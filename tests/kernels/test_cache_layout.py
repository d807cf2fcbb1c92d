"""Rows of the cache: the places of their parts, their size, and refused caches."""

import pytest
import torch

from vllm_instant_kernels.cache_layout import row_bytes, split


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("head", [64, 96, 128, 256])
def test_the_parts_of_a_row_have_the_documented_layout(head, token_major):
    blocks, heads, block_size = 3, 2, 16
    shape = (
        (blocks, block_size, heads, row_bytes(head)) if token_major else (blocks, heads, block_size, row_bytes(head))
    )
    whole = torch.zeros(5, *shape, dtype=torch.uint8)
    cache = whole[3].transpose(1, 2) if token_major else whole[3]
    views = split(cache, head, converts=False)
    # By block, place and head, in the layout's own words.
    views.keys[2, 7, 1] = 1
    views.values[2, 7, 1] = 2
    views.key_scales[2, 7, 1] = 3.5
    views.value_scales[2, 7, 1] = 4.5
    row = cache[2, 1, 7]
    assert row[:head].tolist() == [1] * head
    assert row[head : 2 * head].tolist() == [2] * head
    assert row[2 * head : 2 * head + 8].view(torch.float32).tolist() == [3.5, 4.5]
    assert row[2 * head + 8 :].tolist() == [0] * 8
    assert int((whole != 0).sum()) == 2 * head + int((row[2 * head : 2 * head + 8] != 0).sum())
    for part in (views.keys, views.values):
        assert part.data_ptr() % 16 == 0
        assert all(step % 16 == 0 for step in part.stride()[:3])


def test_a_row_takes_at_most_54_percent_of_bf16_at_head_size_128():
    assert row_bytes(128) == 272
    assert row_bytes(128, 2) == 512
    assert row_bytes(128) / row_bytes(128, 2) <= 0.54


def test_the_cache_has_the_fp8_type_of_devices_that_support_it():
    cache = torch.zeros(2, 1, 16, row_bytes(64), dtype=torch.uint8)
    assert split(cache, 64).keys.dtype == torch.uint8
    assert split(cache, 64, converts=True).values.dtype == torch.float8_e4m3fn
    plain = split(torch.zeros(2, 1, 16, 128, dtype=torch.bfloat16), 64)
    assert not plain.is_quantized
    assert plain.values.shape == (2, 16, 1, 64)


def test_caches_of_another_layout_are_refused():
    with pytest.raises(ValueError, match=r"has no rows of 144 elements of torch\.uint8 for heads of 64"):
        split(torch.zeros(2, 1, 16, 136, dtype=torch.uint8), 64)
    with pytest.raises(ValueError, match="are not aligned to 16 bytes: head size 72"):
        split(torch.zeros(2, 1, 16, row_bytes(72), dtype=torch.uint8), 72)
    shifted = torch.zeros(3 * 16 * row_bytes(64), dtype=torch.uint8)[8 : 8 + 2 * 16 * row_bytes(64)]
    with pytest.raises(ValueError, match="offset 8"):
        split(shifted.view(2, 1, 16, row_bytes(64)), 64)
