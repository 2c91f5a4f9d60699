"""Scores of tokens, as `choose` and `lm_head` make and compare them: scaling, noise, the best, groups' maxima."""

import triton
import triton.language as tl

from stagedspec.kernels.common.constants import INVALID
from stagedspec.kernels.philox import gumbel_tile

GROUP = 64  # tokens that share one maximum
# Their alignment differs between batches; specialising on it would only compile more kernels.
COUNTERS = ("p_seeds", "p_streams", "p_positions")

GROUP_SIZE = tl.constexpr(GROUP)
NO_CHOICE = tl.constexpr(INVALID)
UNIT = tl.constexpr(float(2**40))  # fixed point of probabilities relative to the largest
GROUP_UNIT = tl.constexpr(float(2**24))  # the same within a group, where 64 of them fit 31 bits

# NOISE of the kernels.
NOISES = {"none": 0, "made": 1, "given": 2}


@triton.jit
def order_key(values):
    """fp32 -> uint32 of the same order; -0 and +0 are one."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def value_of(key):
    """The inverse of `order_key`."""
    return tl.where((key >> 31) != 0, key & 0x7FFFFFFF, ~key).to(tl.float32, bitcast=True)


@triton.jit
def rank_key(values, tokens):
    """int64 keys ordered by value, then by lower id: the token with the largest key is chosen."""
    return ((order_key(values).to(tl.int64) - 0x80000000) << 32) | (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit
def value_and_id(ranked):
    """The inverse of `rank_key`."""
    return value_of(((ranked >> 32) + 0x80000000).to(tl.uint32)), 0x7FFFFFFF - (ranked & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def scale_logits(values, scale, SCALING: tl.constexpr):
    """SCALING 0: as they are; 1: divided by the temperature, correctly rounded; 2: times the draft's sharpness."""
    if SCALING == 1:
        values = tl.div_rn(values, scale)
    elif SCALING == 2:
        values = values * scale
    return values


@triton.jit
def best_of(scores, tokens, V):
    """The best score of every column and the lowest token that has it: scores [T, R], tokens [T] -> [R], [R].

    NaN beats every score and its token is INVALID, so that whatever is best of it is INVALID too."""
    broken = scores != scores
    scores = tl.where(broken, float("inf"), scores)
    names = tl.where(broken, NO_CHOICE, tokens[:, None])
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best[None, :], names, V), 0)


@triton.jit
def decided(token, best, NOISE: tl.constexpr):
    """The token of the best score, INVALID where that is no choice: NaN, -inf or, when sampling, +inf."""
    wrong = (token < 0) | (best == float("-inf"))
    if NOISE != 0:
        wrong = wrong | (best == float("inf"))
    return tl.where(wrong, NO_CHOICE, token)


@triton.jit
def add_noise(
    scores, first, tokens, rows, real, p_noise, p_seeds, p_streams, p_positions, V, N, NOISE: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """scores [T, R] plus the noise of tokens first .. first + T in rows [R]."""
    if NOISE == 1:
        noise = gumbel_tile(
            first, tl.load(p_seeds + rows // N), tl.load(p_streams + rows // N), tl.load(p_positions + rows), T, R
        )
        scores = scores + noise
    elif NOISE == 2:
        scores = scores + tl.load(p_noise + rows[None, :].to(tl.int64) * V + tokens[:, None], real, 0.0)
    return scores


@triton.jit
def store_groups(
    scores, first, rows, kept, p_maxima, p_masses, G, MASSES: tl.constexpr, T: tl.constexpr, R: tl.constexpr
):
    """Largest score [M, G] of each group, and its mass relative to that in fixed point; absent tokens are -inf, and
    NaN counts as +inf."""
    grouped = tl.reshape(tl.where(scores != scores, float("inf"), scores), (T // GROUP_SIZE, GROUP_SIZE, R))
    maxima = tl.max(grouped, 1)  # [T / 64, R]
    groups = first // GROUP_SIZE + tl.arange(0, T // GROUP_SIZE)
    at = rows[None, :] * G + groups[:, None]
    inside = (groups[:, None] < G) & kept[None, :]
    tl.store(p_maxima + at, maxima, inside)
    if MASSES:
        base = tl.where(maxima == float("-inf"), 0.0, maxima)
        parts = (tl.exp(grouped - base[:, None, :]) * GROUP_UNIT + 0.5).to(tl.int32)
        tl.store(p_masses + at, tl.sum(parts, 1), inside)
