"""Which rows of packed segments each policy of `prune_tokens_varlen` keeps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .selection import largest_key_of_many, load_keys, place_picks


def launch_selection(scores: Tensor, bounds: Tensor, budget: Tensor, policy: str) -> tuple[Tensor, Tensor]:
    """Select rows by their scores [R]; returns (place [R], counts [programs]) of `select_rows_kernel`."""
    rows, segments = scores.shape[0], bounds.shape[0] - 1
    programs = 1 if policy == "per_clip" else segments
    place = scores.new_empty(rows, dtype=torch.int32)
    counts = scores.new_empty(programs, dtype=torch.int32)
    long = rows > 2048 * programs
    select_rows_kernel[(programs,)](
        scores,
        scores.new_empty(rows, dtype=torch.int64) if policy == "top_p" else None,
        bounds,
        budget,
        place,
        counts,
        segments,
        budget.stride(0) if budget.dim() else 0,
        POLICY=policy,
        BLOCK=4096 if long else 1024,
        num_warps=16 if long else 8,
    )
    return place, counts


@triton.jit
def mass_from(mass, scores, start, size, threshold, BLOCK: tl.constexpr):
    """Sum of the masses of a segment's tokens whose key is at least `threshold`."""
    total = tl.zeros([BLOCK], tl.int64)
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        _score, key = load_keys(scores + start, None, 0, n, size)
        weight = tl.load(mass + start + n, mask=n < size, other=0)
        total += tl.where(key >= threshold, weight, 0)
        first += BLOCK
    return tl.sum(total, 0)


@triton.jit
def share_threshold(mass, scores, start, size, share, BLOCK: tl.constexpr):
    """Key of the last token that the top-p rule keeps, and how many of the tokens of that key it keeps.

    A token stays when the tokens before it hold less than `share` of the mass. Masses are softmax numerators in
    units of 2^-32, so that their sums are exact, and the same in any order.
    """
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        value = tl.load(scores + start + n, mask=n < size, other=float("-inf"))
        best = tl.maximum(best, tl.where(value != value, float("-inf"), value))
        first += BLOCK
    top = tl.max(best, 0)
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        value = tl.load(scores + start + n, mask=n < size, other=0.0)
        part = tl.where(value == top, 1.0, tl.exp((value - top).to(tl.float64)))
        part = tl.where(part == part, part, 0.0)
        weight = tl.floor(part * 4294967296.0 + 0.5).to(tl.int64)
        tl.store(mass + start + n, weight, mask=n < size)
        first += BLOCK
    tl.debug_barrier()  # the masses may be read by other threads than wrote them
    zero = (size * 0).to(tl.uint32)
    limit = share * mass_from(mass, scores, start, size, zero, BLOCK).to(tl.float64)
    wanted = tl.where(limit > 0.0, tl.ceil(limit), 0.0).to(tl.int64)  # 0 too where the share is NaN
    threshold = zero
    bit = zero + 0x80000000
    for _bit in range(32):
        enough = mass_from(mass, scores, start, size, threshold | bit, BLOCK) >= wanted
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    threshold = tl.maximum(threshold, zero + 1)  # never an unmasked NaN, whose key is 1
    above = mass_from(mass, scores, start, size, threshold + 1, BLOCK)
    each = tl.zeros([BLOCK], tl.int64)
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        _score, key = load_keys(scores + start, None, 0, n, size)
        weight = tl.load(mass + start + n, mask=n < size, other=0)
        each = tl.maximum(each, tl.where(key == threshold, weight, 0))
        first += BLOCK
    one = tl.maximum(tl.max(each, 0), 1)
    ties = (tl.maximum(wanted - above, 0) + one - 1) // one
    none = (threshold == 1) | (threshold == 0xFFFFFFFF)
    return threshold, tl.where(none, 0, tl.minimum(ties, size)).to(tl.int32)


@triton.jit(do_not_specialize=["segments", "budget_stride"])
def select_rows_kernel(
    scores, mass, bounds, budget, place, counts, segments, budget_stride, POLICY: tl.constexpr, BLOCK: tl.constexpr
):
    """Finds which rows the policy keeps: one program a segment, or one for all segments with "per_clip".

    Args:
        scores: [R] float32.
        mass: [R] int64 scratch of "top_p", else None.
        budget: [] (stride 0) or [S].
        place: [R] int32, written: how many rows the program keeps before this one, p, as p if kept, else -1 - p.
        counts: [programs] int32, written: how many rows each keeps.
    """
    program = tl.program_id(0)
    start = tl.load(bounds + program)
    end = tl.load(bounds + (segments if POLICY == "per_clip" else program + 1))
    size = (end - start).to(tl.int32)
    limit = tl.load(budget + program.to(tl.int64) * budget_stride)
    wanted = size * 0
    threshold = wanted.to(tl.uint32)
    if POLICY == "top_p":
        threshold, wanted = share_threshold(mass, scores, start, size, limit.to(tl.float64), BLOCK)
    elif POLICY != "threshold":
        fits = tl.minimum(tl.maximum(limit.to(tl.int64), 0), size.to(tl.int64)).to(tl.int32)
        threshold, wanted = largest_key_of_many(scores + start, None, 0, size, fits, BLOCK)
    picks = size * 0
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        value, key = load_keys(scores + start, None, 0, n, size)
        if POLICY == "threshold":
            picked = (n < size) & (value.to(tl.float64) >= limit.to(tl.float64))
            count = tl.cumsum(picked.to(tl.int32), 0)
        else:
            picked, count = place_picks(key, threshold, wanted)
            picked = picked & (n < size)
            wanted = tl.maximum(wanted - tl.sum(((key == threshold) & (n < size)).to(tl.int32), 0), 0)
        code = picks + tl.where(picked, count - 1, 0)
        code = tl.where(picked, code, -1 - (picks + count))
        tl.store(place + start + n, code, mask=n < size)
        picks += tl.sum(picked.to(tl.int32), 0)
        first += BLOCK
    tl.store(counts + program, picks)
