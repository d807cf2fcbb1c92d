"""Decode and verification over a paged cache, in the interpreter, against plain tensor operations.

Caches are poisoned wherever no request has a token, tables wherever no block is, the workspace and the output all over:
whatever is read by mistake shows.
"""

import pytest
import torch
from attention_cases import QUANTIZED, assert_exact_to_float32, attended, batch, largest_error, random_requests
from attention_reference import attention_reference, paged_attention_reference
from interpreting import interpreted

from vllm_instant_kernels.attention_launch import MAX_PROGRAMS, splits_for
from vllm_instant_kernels.attention_tiles import MIN_TILES
from vllm_instant_kernels.cache_layout import split
from vllm_instant_kernels.paged_attention import paged_attention, workspace_for

pytestmark = pytest.mark.kernel

LENGTHS = [1, 15, 16, 17, 1023]
ALLOWED = {"float16": 1e-3, "bfloat16": 1e-2}
"""Largest error against float64 on the cache as it is, where the largest output is up to 1, otherwise relative to that:
the last digit of a result grows with it. 16-bit results are rounded, and the interpreter only truncates to bfloat16."""


def _found(made, options, splits, kernel="paged_attention", rounded_to=""):
    most = int((made.starts[1:] - made.starts[:-1]).max())
    arguments = (made.query, made.cache, made.block_tables, made.lengths, made.starts, made.head, most)
    found, arrivals = interpreted(attended, kernel, *arguments, options, splits, rounded_to)
    assert not arrivals.any(), "counters are not back at 0"
    return found


def _expected(made, options):
    views = split(made.cache, made.head, converts=False)
    expected = torch.full_like(made.query, torch.nan, dtype=torch.float64)
    arguments = (made.query, views, made.block_tables, made.lengths, made.starts, expected)
    paged_attention_reference(*arguments, scale=made.head**-0.5, **options)
    return expected


def _assert_exact(made, options, splits):
    assert_exact_to_float32(_found(made, options, splits), _expected(made, options), made)


def _error(made, options, splits, **more):
    return largest_error(_found(made, options, splits, **more), _expected(made, options))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("head", [64, 96, 128, 256])
def test_it_equals_the_reference_for_all_shapes(numbers, head, group):
    """Lengths, blocks, query tokens, features and splits are random: over many runs all combinations are tested."""
    most = numbers.choice([1, 2, 5, 16])
    requests = random_requests(numbers, [*numbers.sample(LENGTHS[:-1], 3), numbers.choice([200, 300, 1023])], most)
    options = {"window": numbers.choice([0, 0, 1, 40, 300]), "soft_cap": numbers.choice([0.0, 0.0, 0.5, 30.0])}
    splits = numbers.choice([None, 1, 2, 4])
    made = batch(
        numbers.randrange(2**31),
        requests,
        head=head,
        kv_heads=numbers.choice([1, 2]) if most == 1 else 1,
        group=group,
        block_size=numbers.choice([16, 32]),
        token_major=numbers.random() < 0.5,
    )
    print(f"{requests}, {options}, splits {splits}")
    _assert_exact(made, options, splits)


@pytest.mark.parametrize("cache_dtype", [QUANTIZED, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bit_queries(numbers, name, cache_dtype):
    made = batch(
        numbers.randrange(2**31),
        random_requests(numbers, LENGTHS, 4),
        head=128,
        kv_heads=1,
        dtype=getattr(torch, name),
        cache_dtype=cache_dtype,
    )
    # Numbers of one type are among those of another: bfloat16 ones travel as float32.
    made.query = made.query.float()
    assert _error(made, {}, 2, rounded_to=name) <= ALLOWED[name]


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_an_unquantised_cache(numbers, cache_dtype):
    requests = random_requests(numbers, LENGTHS, 5)
    made = batch(numbers.randrange(2**31), requests, head=96, group=3, cache_dtype=cache_dtype)
    _assert_exact(made, {"window": 100}, 2)


def test_quantisation_costs_at_most_four_percent(numbers):
    """Relative L2 error against attention over the unquantised data, which is random normal."""
    requests = [(900, 16), (1023, 16)]
    made = batch(numbers.randrange(2**31), requests, head=128, kv_heads=1, group=4)
    found = _found(made, {}, None)
    exact = torch.cat(
        [
            attention_reference(made.query[made.starts[i] : made.starts[i + 1]], keys, values, made.head**-0.5)
            for i, (keys, values) in enumerate(zip(made.keys, made.values, strict=True))
        ]
    )
    error = float((found - exact).norm() / exact.norm())
    print(f"relative L2 error {error:.2%}")
    assert 0.02 < error <= 0.04


def test_a_needle_is_found_in_sixteen_bit_products(numbers):
    """One key dominates a thousand others, with values ten thousand times smaller than theirs."""
    made = batch(numbers.randrange(2**31), [(1023, 1)], head=64, kv_heads=1, group=1, dtype=torch.float16)
    needle = numbers.randrange(1000)
    made.keys[0].mul_(0.05)
    made.values[0].mul_(100.0)
    made.keys[0][needle] = 3.0 * made.query[0]
    made.values[0][needle] *= 1e-4
    from attention_reference import write_reference

    write_reference(made.keys[0], made.values[0], split(made.cache, 64), made.slots[0])
    expected = _expected(made, {})
    made.query = made.query.float()
    found = _found(made, {}, 4, rounded_to="float16")
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_all_parts_are_merged(numbers):
    """Requests whose caches have more, fewer and exactly as many parts as there are programs."""
    tile = 64
    lengths = [tile * MIN_TILES, tile * MIN_TILES + 1, 2 * tile * MIN_TILES, 1023, 5]
    made = batch(numbers.randrange(2**31), [(length, 2) for length in lengths], kv_heads=1)
    for splits in (2, 8):
        _assert_exact(made, {}, splits)


def test_the_number_of_parts_fills_the_device():
    device = torch.device("cpu")
    assert splits_for(1, device) == 32
    assert splits_for(8, device) == 32
    assert splits_for(128, device) == 2
    assert splits_for(200, device) == splits_for(100_000, device) == 1
    assert all(programs * splits_for(programs, device) <= MAX_PROGRAMS for programs in range(1, 300))


def test_a_batch_without_requests_or_tokens_launches_nothing(numbers):
    made = batch(1, [(5, 0), (17, 0)])
    output = torch.empty(0, 8, 64)
    views, workspace = split(made.cache, 64), workspace_for(made.cache.device, 64)
    arguments = (views, made.block_tables, made.lengths, made.starts, output)
    paged_attention(made.query, *arguments, max_query_tokens=0, scale=1.0, workspace=workspace)


def test_invalid_arguments_are_refused():
    made = batch(1, [(20, 2)])
    views, workspace = split(made.cache, 64), workspace_for(made.cache.device, 64)
    keywords = {"max_query_tokens": 2, "scale": 1.0, "workspace": workspace}
    tables, lengths, starts, output = made.block_tables, made.lengths, made.starts, torch.empty_like(made.query)
    with pytest.raises(ValueError, match=r"query is of shape \(2, 8, 32\) .* does not match 1 requests and 2 KV heads"):
        paged_attention(made.query[:, :, :32], views, tables, lengths, starts, output, **keywords)
    with pytest.raises(ValueError, match="starts is of shape"):
        paged_attention(made.query, views, tables, lengths, starts[:1], output, **keywords)
    with pytest.raises(ValueError, match="output is of shape"):
        paged_attention(made.query, views, tables, lengths, starts, output[:1], **keywords)
    with pytest.raises(ValueError, match="2048 programs; at most 1024"):
        paged_attention(made.query, views, tables, lengths, starts, output, splits=1024, **keywords)
    odd = batch(1, [(20, 2)], block_size=24)
    with pytest.raises(ValueError, match="blocks have 24 tokens"):
        paged_attention(odd.query, split(odd.cache, 64), odd.block_tables, odd.lengths, odd.starts, output, **keywords)


# ---- on a device


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("head", [64, 96, 128, 256])
def test_the_device_equals_the_reference(numbers, head, name):
    for group in (1, 4, 7, 8):
        requests = random_requests(numbers, [*LENGTHS, 5000], 16)
        made = batch(numbers.randrange(2**31), requests, head=head, group=group, dtype=getattr(torch, name))
        on_device = [t.cuda() for t in (made.query, made.cache, made.block_tables, made.lengths, made.starts)]
        for splits in (None, 1, 4):
            found, arrivals = attended("paged_attention", *on_device, made.head, 16, {}, splits)
            assert not arrivals.any()
            assert largest_error(found.cpu(), _expected(made, {})) <= ALLOWED[name]


@pytest.mark.gpu
def test_the_last_program_to_arrive_merges(numbers):
    """Ten thousand launches over different batches without resetting the counters show no race in the merge."""
    made = batch(numbers.randrange(2**31), [(5000, 3), (700, 1), (2048, 4), (1, 1)], head=64, dtype=torch.float16)
    query, cache, tables, lengths, starts = (
        t.cuda() for t in (made.query, made.cache, made.block_tables, made.lengths, made.starts)
    )
    views, workspace = split(cache, 64), workspace_for(query.device, 64)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    outputs = {}
    for _ in range(10_000):
        splits = numbers.choice([2, 4, 8, 16])
        output = torch.full_like(query, torch.nan)
        keywords = {"max_query_tokens": 4, "scale": 64**-0.5, "workspace": workspace, "splits": splits}
        paged_attention(query, views, tables, lengths, starts, output, **keywords)
        # Which program merges differs from launch to launch; the order of its sum does not.
        wrong += (output != outputs.setdefault(splits, output)).sum()
    assert int(wrong) == 0
    assert not workspace.arrivals.any()
