"""Block verification of draft tokens (Sun et al. 2024, arXiv 2403.10444) on the device: lossless, one block at a time.

Token-wise rejection accepts each draft token independently; block verification compares the joint probabilities of
all drafts so far under target and draft, keeps the longest accepted prefix, and never keeps fewer tokens in
expectation. With target probabilities ``P``, draft probabilities ``Q`` and draft tokens ``d``, all of one request::

    w[0] = 1,  w[i] = min(1, w[i - 1] * P[i - 1](d[i - 1]) / Q[i - 1](d[i - 1]))  weight of the first i drafts
    S[i] = sum over x of max(w[i] * P[i](x) - Q[i](x), 0)                         mass of the residual
    h[i] = S[i] / (S[i] + 1 - w[i]), but h = w for the last                       probability to keep i if no more
    kept = the largest i with u[i] < h[i], or 0

If not all are kept, the next token is drawn from the residual at row ``kept``.

Four launches without synchronisation with the host: the products of weights (one program per request), the masses of
the residuals (one per row and part of the vocabulary), the decision and the draw (one per request and tile of the
vocabulary), the result of the draw (one per request). If drafts are certain (``Q`` is one-hot), ``S[i]`` is
``w[i] * (1 - P[i](d[i]))`` and the second launch is omitted.

Most masses need not be summed. ``P`` and ``Q`` sum to one, so ``S <= w``, and from that ``h <= w``; also ``w = 1``
makes ``h = 1`` whatever ``S`` is. The mass of a row matters only if ``u < w < 1`` and no later prefix is certain to be
kept. The first launch gathers two numbers per draft and finds these rows; programs of other rows return at once.

Bytes per step, with ``N`` drafts of ``B`` requests, ``V`` tokens and float32 throughout:

* softmax of the target's logits, before these launches: at least ``8 (N + B) V`` (read, write); another ``8 N V`` for
  the draft's if it is a model;
* noise, before these launches: ``4 B V`` (write);
* masses: ``8 V`` per row that matters, at most ``8 (N - B) V`` if every request has drafts;
* draw: ``12 V`` per request that refuses a draft (``P``, ``Q``, noise), ``8 V`` if drafts are certain.

For 16 requests with 8 drafts each that is ``1152 V`` for the target's softmax, ``64 V`` for the noise, at most ``896
V`` for the masses and at most ``192 V`` for the draws. The draws alone (all of it if drafts are certain or no mass
matters) are at most 17 % of the softmax; with one such row per request it is 28 %, in the worst case 94 %. Tensor
operations cannot skip rows: they move the ``896 V`` of the masses, and several times that unless they are fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096
"""Maximum number of tokens of the vocabulary that a program loads at once."""
CHUNK = 32
"""Drafts of a request that are gathered at once; longer drafts take several iterations."""
MASS_PROGRAMS = 1024
"""Approximate number of programs that sum masses. Most rows need no sum, and a program that returns at once still has
a cost: with many rows each gets fewer programs. The sums and their order do not depend on it."""


@triton.jit
def _bounds(ends_ptr, request):
    """First row of a request, and the row after its last."""
    start = tl.load(ends_ptr + request - 1, mask=request > 0, other=0)
    return start, tl.load(ends_ptr + request)


@triton.jit
def _race_winner(weights, noise, inside):
    """Value and index of the maximum of weights / noise: index ``i`` has probability ``weights[i]`` over their sum.

    With exponential noise E_i, E_i / weights_i are arrival times of rates weights_i: the largest inverse arrives first.
    """
    return tl.max(tl.where(inside, weights / noise, -1.0), axis=0, return_indices=True)


@triton.jit
def _weigh_drafts(
    ends_ptr,
    draft_tokens_ptr,
    draft_probs_ptr,
    target_probs_ptr,
    uniforms_ptr,
    settled_ptr,
    settled_weights_ptr,
    open_weights_ptr,
    draft_stride,
    target_stride,
    CHUNK: tl.constexpr,
):
    """Compute the weights of a request's prefixes, the prefix kept in any case, and the rows whose mass matters.

    Grid ``[B]``. Writes the length and weight of the longest prefix that is kept whatever the masses are, and for each
    row ``r`` the weight of the prefix that ends there if the mass of row ``r + 1`` decides whether it is kept, else 0.
    """
    request = tl.program_id(0)
    start, end = _bounds(ends_ptr, request)
    lanes = tl.arange(0, CHUNK)
    weight = 1.0
    real = 0
    settled = 0
    settled_weight = 1.0
    for first in range(start, end, CHUNK):
        rows = first + lanes
        lengths = rows + 1 - start
        tokens = tl.load(draft_tokens_ptr + rows, mask=rows < end, other=-1).to(tl.int64)
        following = tl.load(draft_tokens_ptr + rows + 1, mask=rows + 1 < end, other=-1).to(tl.int64)
        # Everything after padding is padding, also in later iterations.
        count = tl.where(real == first - start, tl.min(tl.where(tokens < 0, lanes, CHUNK)), 0)
        is_real = lanes < count
        is_last = is_real & (following < 0)
        ratios = tl.load(target_probs_ptr + rows.to(tl.int64) * target_stride + tokens, mask=is_real, other=0.0)
        if draft_probs_ptr is not None:
            q = tl.load(draft_probs_ptr + rows.to(tl.int64) * draft_stride + tokens, mask=is_real, other=0.0)
            ratios = tl.where(q > 0.0, ratios / tl.where(q > 0.0, q, 1.0), 0.0)

        # Sequential product over gathered ratios: no memory access within the chain.
        weights = tl.zeros([CHUNK], tl.float32)
        for lane in range(0, count):
            weight = tl.minimum(1.0, weight * tl.sum(tl.where(lanes == lane, ratios, 0.0)))
            weights = tl.where(lanes == lane, weight, weights)

        # The probability to keep a prefix where no mass is needed: h = w for the last draft, and h = 1 for w = 1.
        chances = tl.where(is_last | (weights == 1.0), weights, 0.0)
        if draft_probs_ptr is None:
            # One-hot Q: S = w * (1 - P(next draft)), h = S / (S + 1 - w).
            refusable = is_real & (following >= 0)
            at_next = target_probs_ptr + (rows + 1).to(tl.int64) * target_stride + following
            mass = weights * tl.maximum(1.0 - tl.load(at_next, mask=refusable, other=0.0), 0.0)
            total = tl.where(weights < 1.0, mass + (1.0 - weights), 1.0)
            chances = tl.where(refusable & (weights < 1.0), mass / total, chances)
        uniforms = tl.load(uniforms_ptr + rows, mask=is_real, other=1.0)
        longest = tl.max(tl.where(uniforms < chances, lengths, 0))
        if longest > 0:
            settled = longest
            settled_weight = tl.sum(tl.where(lengths == longest, weights, 0.0))
        if draft_probs_ptr is not None:
            # A later iteration may keep a longer prefix; the sums of this one are then unused.
            is_open = is_real & (following >= 0) & (lengths > settled) & (weights < 1.0) & (uniforms < weights)
            tl.store(open_weights_ptr + rows, tl.where(is_open, weights, 0.0), mask=rows < end)
        real += count
    tl.store(settled_ptr + request, settled)
    tl.store(settled_weights_ptr + request, settled_weight)


@triton.jit
def _sum_masses(
    draft_probs_ptr,
    target_probs_ptr,
    open_weights_ptr,
    masses_ptr,
    draft_stride,
    target_stride,
    vocab,
    TILE: tl.constexpr,
):
    """Sum the residual's mass at row ``r + 1`` per tile if ``open_weights[r]`` is positive.

    Grid ``[N, any]``. Writes ``masses[r, tile]``; other rows are left unchanged.
    """
    row = tl.program_id(0)
    weight = tl.load(open_weights_ptr + row)
    if weight > 0.0:
        draft_row = draft_probs_ptr + (row + 1).to(tl.int64) * draft_stride
        target_row = target_probs_ptr + (row + 1).to(tl.int64) * target_stride
        tiles = tl.cdiv(vocab, TILE)
        for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
            x = tile * TILE + tl.arange(0, TILE)
            p = tl.load(target_row + x, mask=x < vocab, other=0.0)
            q = tl.load(draft_row + x, mask=x < vocab, other=0.0)
            tl.store(masses_ptr + row * tiles + tile, tl.sum(tl.maximum(weight * p - q, 0.0)))


@triton.jit
def _decide_and_race(
    ends_ptr,
    draft_tokens_ptr,
    draft_probs_ptr,
    target_probs_ptr,
    uniforms_ptr,
    noise_ptr,
    settled_ptr,
    settled_weights_ptr,
    open_weights_ptr,
    masses_ptr,
    num_kept_ptr,
    best_values_ptr,
    best_tokens_ptr,
    draft_stride,
    target_stride,
    noise_stride,
    vocab,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Decide how many drafts are kept, and draw the candidate for the next token in one tile of the vocabulary.

    Grid ``[B, tiles]``. Writes ``num_kept[b]`` and, if drafts are refused, ``best_values[b, tile]`` and
    ``best_tokens[b, tile]``. The program of every tile repeats the decision, which is cheaper than another launch.
    """
    request = tl.program_id(0)
    tile = tl.program_id(1)
    tiles = tl.num_programs(1)
    start, end = _bounds(ends_ptr, request)
    kept = tl.load(settled_ptr + request)
    weight = tl.load(settled_weights_ptr + request)
    if draft_probs_ptr is not None:
        parts = tl.arange(0, PADDED_TILES)
        for first in range(start + kept, end, CHUNK):
            rows = first + tl.arange(0, CHUNK)
            lengths = rows + 1 - start
            weights = tl.load(open_weights_ptr + rows, mask=rows < end, other=0.0)
            is_open = weights > 0.0
            uniforms = tl.load(uniforms_ptr + rows, mask=is_open, other=1.0)
            where_summed = is_open[:, None] & (parts < tiles)[None, :]
            masses = tl.load(masses_ptr + rows[:, None] * tiles + parts[None, :], mask=where_summed, other=0.0)
            mass = tl.sum(masses, axis=1)
            longest = tl.max(tl.where(is_open & (uniforms < mass / (mass + (1.0 - weights))), lengths, 0))
            if longest > 0:
                kept = longest
                weight = tl.sum(tl.where(lengths == longest, weights, 0.0))
    if tile == 0:
        tl.store(num_kept_ptr + request, kept)
    if kept < end - start:
        row = start + kept
        refused = tl.load(draft_tokens_ptr + row)
        x = tile * TILE + tl.arange(0, TILE)
        inside = x < vocab
        p = tl.load(target_probs_ptr + row.to(tl.int64) * target_stride + x, mask=inside, other=0.0)
        noise = tl.load(noise_ptr + request.to(tl.int64) * noise_stride + x, mask=inside, other=1.0)
        # A padding row was not drawn from Q: its residual is P.
        if draft_probs_ptr is None:
            residual = tl.where(x == refused, 0.0, p)
        else:
            draft_row = draft_probs_ptr + row.to(tl.int64) * draft_stride
            q = tl.load(draft_row + x, mask=x < tl.where(refused >= 0, vocab, 0), other=0.0)
            residual = tl.maximum(weight * p - q, 0.0)
        value, lane = _race_winner(residual, noise, inside)
        tl.store(best_values_ptr + request * tiles + tile, value)
        tl.store(best_tokens_ptr + request * tiles + tile, tile * TILE + lane)


@triton.jit
def _finish_race(
    ends_ptr,
    target_probs_ptr,
    noise_ptr,
    num_kept_ptr,
    best_values_ptr,
    best_tokens_ptr,
    next_tokens_ptr,
    target_stride,
    noise_stride,
    vocab,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """Write the next token of a request: the winner of all tiles, or -1 if all drafts are kept. Grid ``[B]``."""
    request = tl.program_id(0)
    start, end = _bounds(ends_ptr, request)
    kept = tl.load(num_kept_ptr + request)
    token = -1
    if kept < end - start:
        tiles = tl.cdiv(vocab, TILE)
        parts = tl.arange(0, PADDED_TILES)
        values = tl.load(best_values_ptr + request * tiles + parts, mask=parts < tiles, other=-1.0)
        best, winner = tl.max(values, axis=0, return_indices=True)
        token = tl.load(best_tokens_ptr + request * tiles + winner)
        # Rounding can leave an empty residual: draw from P then. This is rare, so one program may read the whole row.
        if best <= 0.0:
            target_row = target_probs_ptr + (start + kept).to(tl.int64) * target_stride
            noise_row = noise_ptr + request.to(tl.int64) * noise_stride
            for first in range(0, vocab, TILE):
                x = first + tl.arange(0, TILE)
                p = tl.load(target_row + x, mask=x < vocab, other=0.0)
                noise = tl.load(noise_row + x, mask=x < vocab, other=1.0)
                value, lane = _race_winner(p, noise, x < vocab)
                token = tl.where(value > best, first + lane, token)
                best = tl.maximum(best, value)
        # NaN in P must not produce a token id outside the vocabulary.
        token = tl.minimum(token, vocab - 1)
    tl.store(next_tokens_ptr + request, token)


def verify_blocks(
    draft_token_ids: torch.Tensor,
    ends: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of drafts kept per request, and the next token where not all are kept.

    Launches on the current stream without synchronisation; all shapes depend on shapes only, so that it can be captured
    in a CUDA graph. The result of a request does not depend on the others of the batch.

    Args:
        draft_token_ids: int32 or int64 ``[N]``: the drafts of all requests one after another, in ``[0, V)`` or -1 for
            padding, which is refused together with everything after it.
        ends: int32 ``[B]``: inclusive cumulative sum of the numbers of drafts.
        draft_probs: float32 ``[N, V]``: the distribution that each draft token was drawn from (rows of padding are not
            read); None if every draft is certain (one-hot distributions).
        target_probs: float32 ``[N, V]``, the target's distribution at each draft's position, given the drafts before.
        uniforms: float32 ``[N]``, uniform in [0, 1), independent.
        noise: float32 ``[B, V]``, exponential with mean 1, strictly positive, independent.

    Returns:
        int32 ``[B]``: number of drafts kept; int32 ``[B]``: the next token, -1 where all are kept.

    Raises:
        ValueError: a type or shape is not as above, or a last dimension is not contiguous.

    """
    (num_rows, vocab), num_requests = target_probs.shape, ends.shape[0]
    for name, tensor, dtype, shape in (
        ("draft_token_ids", draft_token_ids, draft_token_ids.dtype, (num_rows,)),
        ("ends", ends, torch.int32, (num_requests,)),
        ("draft_probs", draft_probs, torch.float32, (num_rows, vocab)),
        ("target_probs", target_probs, torch.float32, (num_rows, vocab)),
        ("uniforms", uniforms, torch.float32, (num_rows,)),
        ("noise", noise, torch.float32, (num_requests, vocab)),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape or tensor.stride(-1) != 1):
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            raise ValueError(f"{name} is {found}; it must be {dtype} of shape {shape} with a last stride of 1")

    num_kept = torch.zeros_like(ends, dtype=torch.int32)
    next_tokens = torch.full_like(num_kept, -1)
    if not num_rows:
        return num_kept, next_tokens
    tile = min(TILE, triton.next_power_of_2(vocab))
    tiles = triton.cdiv(vocab, tile)
    padded_tiles = triton.next_power_of_2(tiles)
    settled = torch.empty_like(num_kept)
    settled_weights = torch.empty_like(num_kept, dtype=torch.float32)
    best_values = noise.new_empty(num_requests, tiles)
    best_tokens = num_kept.new_empty(num_requests, tiles)
    open_weights = masses = None
    draft_stride, target_stride, noise_stride = 0, target_probs.stride(0), noise.stride(0)
    if draft_probs is not None:
        open_weights = torch.empty_like(uniforms)
        masses = uniforms.new_empty(num_rows, tiles)
        draft_stride = draft_probs.stride(0)

    _weigh_drafts[(num_requests,)](
        ends,
        draft_token_ids,
        draft_probs,
        target_probs,
        uniforms,
        settled,
        settled_weights,
        open_weights,
        draft_stride,
        target_stride,
        CHUNK=CHUNK,
        num_warps=1,
    )
    if draft_probs is not None:
        _sum_masses[(num_rows, min(tiles, triton.cdiv(MASS_PROGRAMS, num_rows)))](
            draft_probs,
            target_probs,
            open_weights,
            masses,
            draft_stride,
            target_stride,
            vocab,
            TILE=tile,
            num_warps=8,
        )
    _decide_and_race[(num_requests, tiles)](
        ends,
        draft_token_ids,
        draft_probs,
        target_probs,
        uniforms,
        noise,
        settled,
        settled_weights,
        open_weights,
        masses,
        num_kept,
        best_values,
        best_tokens,
        draft_stride,
        target_stride,
        noise_stride,
        vocab,
        TILE=tile,
        PADDED_TILES=padded_tiles,
        CHUNK=CHUNK,
        num_warps=8,
    )
    _finish_race[(num_requests,)](
        ends,
        target_probs,
        noise,
        num_kept,
        best_values,
        best_tokens,
        next_tokens,
        target_stride,
        noise_stride,
        vocab,
        TILE=tile,
        PADDED_TILES=padded_tiles,
        num_warps=8,
    )
    return num_kept, next_tokens
