"""Attention of prompt chunks over a cache, in the interpreter, against plain tensor operations."""

import pytest
import torch
from attention_cases import assert_exact_to_float32, attended, batch, largest_error
from attention_reference import paged_attention_reference
from interpreting import interpreted

from vllm_instant_kernels.cache_layout import split

pytestmark = pytest.mark.kernel


def _found_and_expected(made, options, splits, rounded_to=""):
    arguments = (made.query, made.cache, made.block_tables, made.lengths, made.starts, made.head, 0)
    found, arrivals = interpreted(attended, "prefill_attention", *arguments, options, splits, rounded_to)
    assert not arrivals.any()
    expected = torch.full_like(made.query, torch.nan, dtype=torch.float64)
    arguments = (
        made.query,
        split(made.cache, made.head, False),
        made.block_tables,
        made.lengths,
        made.starts,
        expected,
    )
    paged_attention_reference(*arguments, scale=made.head**-0.5, **options)
    return found, expected


def _assert_exact(made, options, splits):
    assert_exact_to_float32(*_found_and_expected(made, options, splits), made)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head", [64, 96, 128, 256])
def test_it_equals_the_reference_for_all_shapes(numbers, head, group):
    """Chunks of all sizes, whole prompts, decoding requests and requests without tokens, in any order."""
    most = max(24, 48 // group)
    requests = [
        (numbers.randint(100, 400), numbers.randint(16, most)),  # a piece with much before it
        (numbers.randint(1, most),) * 2,  # a whole prompt
        (numbers.choice([1, 15, 16, 17]), 1),
        (numbers.randint(1, 50), 0),
    ]
    numbers.shuffle(requests)
    options = {"window": numbers.choice([0, 0, 30]), "soft_cap": numbers.choice([0.0, 0.0, 2.0])}
    splits = numbers.choice([None, 1, 2])
    made = batch(
        numbers.randrange(2**31),
        requests,
        head=head,
        kv_heads=1,
        group=group,
        block_size=numbers.choice([16, 32]),
        token_major=numbers.random() < 0.5,
    )
    print(f"{requests}, {options}, splits {splits}")
    _assert_exact(made, options, splits)


def test_requests_without_tokens_do_not_shift_others(numbers):
    """The bisection finds the request of a chunk also among many requests without tokens."""
    requests = [(9, 0)] * 5 + [(70, 33)] + [(9, 0)] * 6 + [(40, 40)] + [(5, 0)] * 3
    made = batch(numbers.randrange(2**31), requests, kv_heads=1, group=2)
    _assert_exact(made, {}, 1)


def test_sixteen_bit_queries(numbers):
    made = batch(numbers.randrange(2**31), [(150, 40), (33, 33)], head=128, kv_heads=1, dtype=torch.bfloat16)
    made.query = made.query.float()
    assert largest_error(*_found_and_expected(made, {}, 2, rounded_to="bfloat16")) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("head", [64, 96, 128, 256])
def test_the_device_equals_the_reference(numbers, head):
    requests = [(3000, 700), (1, 1), (512, 512), (80, 0), (5000, 16)]
    made = batch(numbers.randrange(2**31), requests, head=head, dtype=torch.float16)
    on_device = [t.cuda() for t in (made.query, made.cache, made.block_tables, made.lengths, made.starts)]
    expected = torch.full_like(made.query, torch.nan, dtype=torch.float64)
    arguments = (made.query, split(made.cache, head, False), made.block_tables, made.lengths, made.starts, expected)
    paged_attention_reference(*arguments, scale=head**-0.5)
    for splits in (None, 1):
        found, _ = attended("prefill_attention", *on_device, head, 0, {}, splits)
        assert largest_error(found.cpu(), expected) <= 1e-3
