"""Exact selection without a sort: order-preserving keys, the k-th largest key, picks in their order, copies of rows."""

import triton
import triton.language as tl


@triton.jit
def ascending_key(score):
    """uint32 keys that sort as float32 scores do, +0 equal to -0; the lowest, of -inf, is 0x007FFFFF."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)


@triton.jit
def order_key(score, alive):
    """Keys in the order of selection: above 1 for every score, 1 for an unmasked NaN, 0 for a masked token."""
    key = tl.where(score != score, 1, ascending_key(score))
    return tl.where(alive, key, 0).to(tl.uint32)


@triton.jit
def load_keys(scores, mask, mask_stride, n, size):
    """Scores and keys of the tokens `n` of a segment; the key is 0 out of range."""
    valid = n < size
    score = tl.load(scores + n, mask=valid, other=0.0)
    alive = valid
    if mask is not None:
        alive = tl.load(mask + n.to(tl.int64) * mask_stride, mask=valid, other=0) != 0
    return score, order_key(score, alive)


@triton.jit
def largest_key(key, count):
    """The `count`-th largest of the keys, found bit by bit; 0 where there are fewer."""
    threshold = tl.max(key * 0, 0)
    bit = threshold + 0x80000000
    for _bit in range(32):
        enough = tl.sum((key >= (threshold | bit)).to(tl.int32), 0) >= count
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    return threshold


@triton.jit
def largest_key_of_many(scores, mask, mask_stride, size, count, BLOCK: tl.constexpr):
    """The `count`-th largest key of a segment too long to hold at once, and how many of the keys equal to it count.

    Four histograms of 8 bits, from the highest; with `count` in 0..size.
    """
    digit = tl.arange(0, 256)
    wanted = count
    threshold = (count * 0).to(tl.uint32)
    for level in range(4):
        shift = 24 - 8 * level
        counts = tl.zeros([256], tl.int32)
        first = size * 0
        while first < size:
            n = first + tl.arange(0, BLOCK)
            _score, key = load_keys(scores, mask, mask_stride, n, size)
            # Only keys that begin with the digits found so far; a shift by 32 is undefined, hence two.
            same = (key >> shift >> 8) == (threshold >> shift >> 8)
            counts += tl.histogram(((key >> shift) & 0xFF).to(tl.int32), 256, mask=same & (n < size))
            first += BLOCK
        at_least = tl.cumsum(counts, 0, reverse=True)
        best = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(digit > best, counts, 0), 0)
        threshold = threshold | (best.to(tl.uint32) << shift)
    return threshold, wanted


@triton.jit
def place_picks(key, threshold, ties_wanted):
    """Which keys are picked, and how many picks there are up to and with each.

    A key is picked if it is above the threshold, or among the first `ties_wanted` that equal it. There are at most
    32,767 keys, since one scan carries both counts.
    """
    above = key > threshold
    ties = key == threshold
    counts = tl.cumsum(above.to(tl.int32) + (ties.to(tl.int32) << 16), 0)
    ties_so_far = counts >> 16
    picked = above | (ties & (ties_so_far <= ties_wanted))
    return picked, (counts & 0xFFFF) + tl.minimum(ties_so_far, ties_wanted)


@triton.jit
def copy_rows(source, target, source_row, target_row, valid, source_stride, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copies source[source_row] to target[target_row], a row of a contiguous tensor of the same width."""
    from_row = source + source_row.to(tl.int64) * source_stride[1]
    to_row = target + target_row.to(tl.int64) * WIDTH
    for step in range(0, WIDTH, BLOCK_D):
        d = step + tl.arange(0, BLOCK_D)
        inside = valid[:, None] & (d < WIDTH)[None, :]
        value = tl.load(from_row[:, None] + d.to(tl.int64)[None, :] * source_stride[2], mask=inside, other=0.0)
        tl.store(to_row[:, None] + d[None, :], value, mask=inside)
