"""Block verification: the kernels equal the paper's algorithm, are lossless, and compile.

Interpreted where there is no device. That the reference's outputs have the target's distribution is measured on a toy
model; the kernels equal the reference given the same random numbers.
"""

import ahead_of_time
import pytest
import torch
from block_verification_reference import verify_blocks_reference
from interpreting import interpreted, kernel_tensors
from scipy.stats import chisquare

from vllm_instant_kernels import block_verification
from vllm_instant_kernels.block_verification import CHUNK, TILE, verify_blocks

pytestmark = pytest.mark.kernel


def _case(seed, lengths, vocab, certain=False, closeness=1.0, favour=1.0, padded=0.0, specials=False):
    """Arguments of ``verify_blocks``: drafts drawn from Q, or the likeliest tokens of Q; P is Q with noise.

    In each row one token is about ``exp(favour)`` times as likely as all others together. ``specials`` makes some rows
    equal, and takes some drafts' probability from the target or the draft.
    """
    random = torch.Generator().manual_seed(seed)
    ends = torch.tensor(lengths).cumsum(0).to(torch.int32) if lengths else torch.empty(0, dtype=torch.int32)
    rows = sum(lengths)
    logits = 3.0 * torch.randn(rows, vocab, generator=random)
    favourite = torch.randint(vocab, (rows,), generator=random)
    logits[range(rows), favourite] = logits.logsumexp(-1) + favour
    q = logits.softmax(-1)
    p = (logits + closeness * torch.randn(rows, vocab, generator=random)).softmax(-1)
    drafts = q.argmax(-1) if certain else q.multinomial(1, generator=random)[:, 0] if rows else torch.empty(0).long()
    if specials and rows:
        what, row = torch.randint(6, (rows,), generator=random), torch.arange(rows)
        p[what == 0] = q[what == 0]
        for mine, kind in ((p, 1), (q, 2)):
            mine[row[what == kind], drafts[what == kind]] = 0.0
            mine /= mine.sum(-1, keepdim=True)
    drafts[torch.rand(rows, generator=random) < padded] = -1
    uniforms = torch.rand(rows, generator=random)
    noise = torch.empty(len(lengths), vocab).exponential_(generator=random)
    return drafts.to(torch.int32), ends, None if certain else q, p, uniforms, noise


def _assert_equal(found, expected):
    assert found[0].dtype == found[1].dtype == torch.int32
    assert found[0].tolist() == expected[0].tolist()
    assert found[1].tolist() == expected[1].tolist()


LENGTHS = [4, 0, 1, 8, 5, 0, 3, 8, 2, 8]


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("vocab", [37, 1000, 5003, 2 * TILE])
def test_results_equal_the_reference(vocab, certain):
    seen = set()
    for seed in range(3):
        arguments = _case(seed, LENGTHS, vocab, certain)
        expected = verify_blocks_reference(*arguments)
        _assert_equal(interpreted(verify_blocks, *arguments), expected)
        of_drafts = [(kept, length) for kept, length in zip(expected[0].tolist(), LENGTHS, strict=True) if length]
        seen |= {(kept > 0) + (kept == length) for kept, length in of_drafts}
    # The cases had something to decide: none, some and all drafts are kept.
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("padded", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("closeness", [0.0, 0.3, 1.0, 3.0])
def test_results_equal_the_reference_for_any_batch(closeness, padded, certain):
    for vocab in (2, 3, 16, 37):
        arguments = _case(vocab, [6, 1, 5, 0, 2, 6, 4], vocab, certain, closeness, padded=padded, specials=True)
        _assert_equal(interpreted(verify_blocks, *arguments), verify_blocks_reference(*arguments))


@pytest.mark.parametrize("certain", [False, True])
def test_long_drafts_take_several_iterations(certain):
    lengths = [2 * CHUNK + 6, 3, CHUNK, CHUNK + 1, 2 * CHUNK]
    arguments = _case(4 if certain else 3, lengths, 40, certain, closeness=0.2, favour=3.0)
    expected = verify_blocks_reference(*arguments)
    kept = expected[0].tolist()
    assert any(CHUNK < k < length for k, length in zip(kept, lengths, strict=True))
    _assert_equal(interpreted(verify_blocks, *arguments), expected)
    drafts = arguments[0]
    drafts[CHUNK + 3] = -1
    _assert_equal(interpreted(verify_blocks, *arguments), verify_blocks_reference(*arguments))


def test_a_prefix_can_be_kept_by_the_mass_of_its_residual():
    """The residual's mass decides about a prefix whose last token is not the draft's last."""
    q = torch.tensor([[0.5, 0.5, 0.0], [0.8, 0.1, 0.1], [0.9, 0.1, 0.0]])
    p = torch.tensor([[0.4, 0.6, 0.0], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0]])
    drafts, ends = torch.tensor([0, 0, 0]), torch.tensor([3], dtype=torch.int32)
    # The first draft's weight is 0.8, its mass 0.54, its chance 0.54 / 0.74, about 0.73; the others have 0.1 and 0.
    noise = torch.tensor([[1.0, 1.0, 1.0]])
    for uniform, expected in ((0.72, (1, 2)), (0.74, (0, 1))):
        arguments = (drafts, ends, q, p, torch.tensor([uniform, 0.5, 0.5]), noise)
        assert tuple(int(x) for x in verify_blocks_reference(*arguments)) == expected
        assert tuple(int(x) for x in interpreted(verify_blocks, *arguments)) == expected


@pytest.mark.parametrize("vocab", [37, 5003])
def test_certain_drafts_equal_one_hot_distributions(vocab):
    drafts, ends, _, p, uniforms, noise = _case(3, LENGTHS, vocab, certain=True)
    one_hot = torch.nn.functional.one_hot(drafts.long(), vocab).float()
    with_none = interpreted(verify_blocks, drafts, ends, None, p, uniforms, noise)
    _assert_equal(interpreted(verify_blocks, drafts, ends, one_hot, p, uniforms, noise), with_none)


@pytest.mark.parametrize("certain", [False, True])
def test_an_empty_residual_is_replaced_by_the_target(certain):
    vocab = 2 * TILE + 9
    drafts, ends, q, p, uniforms, noise = _case(4, [1] * 6, vocab, certain)
    if certain:
        p = 0.5 * torch.nn.functional.one_hot(drafts.long(), vocab).float()
    else:
        q = 2 * p
    uniforms = torch.full_like(uniforms, 0.99)
    num_kept, next_tokens = interpreted(verify_blocks, drafts, ends, q, p, uniforms, noise)
    assert num_kept.tolist() == [0] * 6
    assert next_tokens.tolist() == (p / noise).argmax(-1).tolist()
    assert next_tokens.max() > TILE
    _assert_equal((num_kept, next_tokens), verify_blocks_reference(drafts, ends, q, p, uniforms, noise))


def test_padding_is_refused_and_the_token_comes_from_the_target():
    drafts, ends, q, p, uniforms, noise = _case(5, [3, 3], 50, closeness=0.0)
    drafts[0] = drafts[5] = -1
    # Rows of padding say nothing.
    q[0] = q[5] = float("nan")
    num_kept, next_tokens = interpreted(verify_blocks, drafts, ends, q, p, uniforms, noise)
    assert num_kept.tolist() == [0, 2]
    assert next_tokens.tolist() == (p[[0, 5]] / noise).argmax(-1).tolist()


def test_only_rows_whose_mass_matters_are_summed():
    lengths = [6, 1, 6, 6, 3, 6, 6]
    arguments = _case(1, lengths, 50, closeness=1.0, padded=0.05)
    drafts, _, q, p, uniforms, _ = arguments
    expected, start, superseded = torch.zeros(len(drafts)), 0, 0
    for length in lengths:
        weight, weights = torch.ones(()), []
        for row in range(start, start + length):
            if drafts[row] < 0:
                break
            weight = (weight * (p[row, drafts[row]] / q[row, drafts[row]])).clamp(max=1.0)
            weights.append(weight)
        below = [bool(uniforms[start + i] < w) for i, w in enumerate(weights)]
        certain = [i for i, w in enumerate(weights) if below[i] and (w == 1 or i == len(weights) - 1)]
        settled = max(certain, default=-1) + 1
        superseded += sum(below[i] and weights[i] < 1 for i in range(settled - 1))
        for i in range(settled, len(weights) - 1):
            expected[start + i] = weights[i] * below[i]
        start += length
    launch = ahead_of_time.launches(block_verification, verify_blocks, *arguments)[0]
    values = dict(launch.arguments)
    tensors = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
    kernel = f"{block_verification.__name__}:{launch.name}"
    left = interpreted(kernel_tensors, kernel, launch.grid, list(values), *values.values())
    open_weights = left[tensors.index("open_weights_ptr")]
    assert torch.equal(open_weights, expected)
    assert superseded
    assert 0 < open_weights.count_nonzero() < len(drafts) / 3


def test_only_the_row_of_the_refused_draft_is_read():
    drafts, ends, q, p, uniforms, noise = _case(6, [5], 50, closeness=0.0)
    rows = torch.arange(4)
    for table in (p, q):
        at_drafts = table[rows, drafts[:4].long()].clone()
        table[:4] = float("nan")
        table[rows, drafts[:4].long()] = at_drafts
    # Four have a weight of 1 and are kept for certain; the last draft's weight is 0.5.
    p[4], q[4] = 0.02, 0.01
    q[4, drafts[4]], p[4, drafts[4]] = 0.04, 0.02
    uniforms[4] = 0.75
    num_kept, next_tokens = interpreted(verify_blocks, drafts, ends, q, p, uniforms, noise)
    assert num_kept.tolist() == [4]
    assert next_tokens.tolist() == [int((torch.clamp(p[4] - q[4], min=0) / noise[0]).argmax())]


def test_layouts_and_types_of_callers_are_accepted():
    drafts, ends, q, p, uniforms, noise = _case(7, LENGTHS, 100)
    expected = verify_blocks_reference(drafts, ends, q, p, uniforms, noise)
    wide = [torch.full((len(t), 128), float("nan")) for t in (q, p, noise)]
    for padded, t in zip(wide, (q, p, noise), strict=True):
        padded[:, 16:116] = t
    q, p, noise = (padded[:, 16:116] for padded in wide)
    _assert_equal(interpreted(verify_blocks, drafts.long(), ends, q, p, uniforms, noise), expected)


def test_without_drafts_nothing_is_kept_or_drawn():
    arguments = _case(8, [0, 0, 0], 20)
    _assert_equal(verify_blocks(*arguments), ([torch.zeros(3), torch.full((3,), -1)]))
    assert [len(x) for x in verify_blocks(*_case(8, [], 20))] == [0, 0]


@pytest.mark.parametrize("certain", [False, True])
def test_nan_never_becomes_a_token_outside_the_vocabulary(certain):
    drafts, ends, q, p, uniforms, noise = _case(9, [2, 2], 37, certain)
    drafts[:] = -1
    p.fill_(float("nan"))
    num_kept, next_tokens = interpreted(verify_blocks, drafts, ends, q, p, uniforms, noise)
    assert num_kept.tolist() == [0, 0]
    assert all(0 <= token < 37 for token in next_tokens.tolist())


def test_invalid_arguments_are_refused():
    drafts, ends, q, p, uniforms, noise = _case(10, [2, 1], 12)
    with pytest.raises(ValueError, match=r"noise is .*\(2, 11\).* must be torch.float32 of shape \(2, 12\)"):
        verify_blocks(drafts, ends, q, p, uniforms, noise[:, 1:])
    with pytest.raises(ValueError, match=r"draft_probs is .*strides \(1, 3\).* a last stride of 1"):
        verify_blocks(drafts, ends, q.t().contiguous().t(), p, uniforms, noise)
    with pytest.raises(ValueError, match=r"target_probs is torch.float16"):
        verify_blocks(drafts, ends, q, p.half(), uniforms, noise)
    with pytest.raises(ValueError, match=r"ends is torch.int64"):
        verify_blocks(drafts, ends.long(), q, p, uniforms, noise)


# ---- losslessness

SYMBOLS, DRAFTED = 3, 3


class _Toy:
    """A model over few symbols, each token's distribution depending on all before: tables by depth, ``[prefixes, V]``.

    Prefixes are numbers to the base ``SYMBOLS``.
    """

    def __init__(self, seed, sharpness):
        random = torch.Generator().manual_seed(seed)
        self.tables = [
            (sharpness * torch.randn(SYMBOLS**depth, SYMBOLS, generator=random)).softmax(-1) for depth in range(DRAFTED)
        ]

    def joint(self):
        """Probabilities of all sequences of ``DRAFTED`` tokens, in the order of their numbers."""
        probabilities = torch.ones(1)
        for table in self.tables:
            probabilities = (probabilities[:, None] * table).flatten()
        return probabilities


def _outputs(verify, target, draft, count, certain, seed, device="cpu"):
    """``DRAFTED`` tokens for each of ``count`` requests, as numbers to the base ``SYMBOLS``.

    Drafts differ in length, some are padded; what verification leaves open is drawn from the target.
    """
    random = torch.Generator(device).manual_seed(seed)
    lengths = torch.randint(DRAFTED + 1, (count,), generator=random, device=device)
    drafts, p, q = (torch.zeros(count, DRAFTED, *more, device=device) for more in ((), (SYMBOLS,), (SYMBOLS,)))
    drafts = drafts.long()
    prefix = torch.zeros(count, dtype=torch.long, device=device)
    for depth in range(DRAFTED):
        p[:, depth] = target.tables[depth].to(device)[prefix]
        q[:, depth] = draft.tables[depth].to(device)[prefix]
        of_draft = q[:, depth]
        drafts[:, depth] = of_draft.argmax(-1) if certain else of_draft.multinomial(1, generator=random)[:, 0]
        prefix = prefix * SYMBOLS + drafts[:, depth]
    padded_from = torch.randint(2 * DRAFTED, (count,), generator=random, device=device)
    depths = torch.arange(DRAFTED, device=device)
    drafts[depths >= padded_from[:, None]] = -1

    there = depths < lengths[:, None]
    uniforms = torch.rand(int(there.sum()), generator=random, device=device)
    noise = torch.empty(count, SYMBOLS, device=device).exponential_(generator=random)
    ends = lengths.cumsum(0).to(torch.int32)
    num_kept, next_tokens = verify(drafts[there], ends, None if certain else q[there], p[there], uniforms, noise)

    output = torch.zeros(count, dtype=torch.long, device=device)
    for depth in range(DRAFTED):
        drawn = target.tables[depth].to(device)[output].multinomial(1, generator=random)[:, 0]
        at_next = (num_kept == depth) & (next_tokens >= 0)
        token = torch.where(num_kept > depth, drafts[:, depth], torch.where(at_next, next_tokens.long(), drawn))
        output = output * SYMBOLS + token
    return output, num_kept


def _fit(outputs, target):
    """The p-value of a chi-squared test of the outputs against the target's distribution."""
    counts = torch.bincount(outputs.cpu(), minlength=SYMBOLS**DRAFTED)
    expected = target.joint().double()
    return chisquare(counts.numpy(), (expected / expected.sum() * len(outputs)).numpy()).pvalue


@pytest.mark.parametrize("certain", [False, True])
def test_outputs_have_the_distribution_of_the_target(certain):
    target, draft = _Toy(0, 1.0), _Toy(1, 1.0)
    outputs, num_kept = _outputs(verify_blocks_reference, target, draft, 20_000, certain, seed=2)
    assert _fit(outputs, target) > 0.01
    assert {0, 1, 2, 3} == set(num_kept.tolist())
    # The measurement sees the difference to a model that is nearly the same.
    near = _Toy(0, 1.0)
    near.tables[0] = near.tables[0] * torch.tensor([1.2, 1.0, 1.0])
    near.tables[0] /= near.tables[0].sum()
    assert _fit(outputs, near) < 1e-4


def test_the_kernels_equal_the_reference_on_the_small_model():
    seen = []

    def both(*arguments):
        seen.append((interpreted(verify_blocks, *arguments), verify_blocks_reference(*arguments)))
        return seen[-1][0]

    for certain in (False, True):
        _outputs(both, _Toy(0, 1.0), _Toy(1, 1.0), 150, certain, seed=3)
    for found, expected in seen:
        _assert_equal(found, expected)


# ---- machine code


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize(("vocab", "token_type"), [(32_000, torch.int32), (150_001, torch.int64)])
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_without_spills(capability, vocab, token_type, certain, tmp_path):
    drafts, *others = _case(0, [8, 3, 8], vocab, certain)
    arguments = (drafts.to(token_type), *others)
    launches = ahead_of_time.launches(block_verification, verify_blocks, *arguments)
    sums = [] if certain else ["_sum_masses"]
    assert [launch.name for launch in launches] == ["_weigh_drafts", *sums, "_decide_and_race", "_finish_race"]
    for launch in launches:
        machine = ahead_of_time.compiled(launch, capability, tmp_path)
        print(f"{launch.name} sm_{capability}, vocabulary {vocab}: {machine.registers} registers")
        assert machine.cubin[:4] == b"\x7fELF"
        assert machine.spilled == 0


# ---- on a device


def _on_device(arguments):
    return [None if t is None else t.cuda() for t in arguments]


@pytest.mark.gpu
@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("vocab", [37, 1000, 5003, 150_001])
def test_the_device_equals_the_reference(vocab, certain):
    for seed in range(4):
        arguments = _case(seed, LENGTHS * 4, vocab, certain, padded=0.05, specials=True)
        found = verify_blocks(*_on_device(arguments))
        _assert_equal([x.cpu() for x in found], verify_blocks_reference(*arguments))


@pytest.mark.gpu
def test_the_device_replays_it_in_a_graph():
    arguments = _on_device(_case(0, LENGTHS, 5003))
    expected = verify_blocks(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = verify_blocks(*arguments)
    graph.replay()
    _assert_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("certain", [False, True])
def test_outputs_of_the_device_have_the_distribution_of_the_target(certain):
    target, draft = _Toy(0, 1.0), _Toy(1, 1.0)
    outputs, _ = _outputs(verify_blocks, target, draft, 500_000, certain, seed=2, device="cuda")
    assert _fit(outputs, target) > 1e-3
