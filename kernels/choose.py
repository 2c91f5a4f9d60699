"""The token-choice rule over logits in memory: warping, noise, argmax; and the draft's children by the same rule.

    choose:   argmax(warp(logits / temperature) + g), the lowest id on ties             (`reference.choose`)
    children: the top m of softmax(warp(logits / temperature) + g), and their logarithms (`reference.choose_children`)

logits [M, V] fp32, M = B*N nodes. Nothing here sums in floating point across nodes or in an order that depends on
them: a row's result is a function of the row alone, bit for bit.

Without warpers one kernel reads every logit once (4*M*V bytes), each program the best of a slice; the last program of
a row reduces the slices. With warpers two kernels run:

1. `scan`, once over the logits: the largest of each group of 64, [M, V/64], and for top-p the group's probability mass
   in fixed point. (`lm_head` writes these from its own tiles, and this pass is not needed.)
2. `select`, one program a row, reads only what can survive: the k-th largest of the groups' maxima is a lower bound of
   the k-th largest logit, so for top-k of 50 about 50 groups of 64 are read and 50 to 200 candidates remain. Thresholds
   are then found exactly on order-preserving integer keys of the candidates: by comparing each with all while they are
   few, else four bits at a time.

top-p sums probabilities in 64-bit fixed point (2^-40 of the largest probability), so the sum has no order. The torch
reference sums in fp32, in sorted order: the two can differ only for a token at which the cumulative probability is
within about 1e-6 of the threshold. Tied tokens go lowest id first, the best stays, as in transformers.
"""

import torch
import triton
import triton.language as tl

from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    architecture,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    most_registers,
    register,
)
from stagedspec.kernels.philox import gumbel_at, gumbel_tile
from stagedspec.kernels.state.host import INVALID

GROUP = 64  # tokens that share one maximum
SLICE = 2048  # tokens of one program of `scan`
BLOCK = 256  # candidates looked at together
FEW = 128  # and four times as many: candidates that are compared with each other
TOGETHER = 32  # of them at a time
SPAN = 64  # groups compacted together
WARPS = {"scan_warps": 4, "select_warps": 8}
# Parts of a batch, which start aligned in one and not in another: a kernel of its own for each would gain nothing.
COUNTERS = ("p_seeds", "p_streams", "p_positions")
SPILLING = (80, 89, 90, 100, 120)  # `select_kernel`'s, see `most_registers`

_GROUP = tl.constexpr(GROUP)
_INVALID = tl.constexpr(INVALID)
_UNIT = tl.constexpr(float(2**40))  # fixed point of probabilities relative to the largest
_GROUP_UNIT = tl.constexpr(float(2**24))  # the same within a group, where 64 of them fit 31 bits

NOISES = {"none": 0, "made": 1, "given": 2}


# ---------------------------------------------------------------- shared with lm_head


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
def _ranked(values, tokens):
    """int64 in the order of the values, among equal ones of falling ids: its largest is the choice."""
    return ((order_key(values).to(tl.int64) - 0x80000000) << 32) | (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit
def _value_and_id(ranked):
    """The inverse of `_ranked`."""
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
    names = tl.where(broken, _INVALID, tokens[:, None])
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best[None, :], names, V), 0)


@triton.jit
def decided(token, best, NOISE: tl.constexpr):
    """The token of the best score, INVALID where that is no choice: NaN, -inf or, when sampling, +inf."""
    wrong = (token < 0) | (best == float("-inf"))
    if NOISE != 0:
        wrong = wrong | (best == float("inf"))
    return tl.where(wrong, _INVALID, token)


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
    grouped = tl.reshape(tl.where(scores != scores, float("inf"), scores), (T // _GROUP, _GROUP, R))
    maxima = tl.max(grouped, 1)  # [T / 64, R]
    groups = first // _GROUP + tl.arange(0, T // _GROUP)
    at = rows[None, :] * G + groups[:, None]
    inside = (groups[:, None] < G) & kept[None, :]
    tl.store(p_maxima + at, maxima, inside)
    if MASSES:
        base = tl.where(maxima == float("-inf"), 0.0, maxima)
        parts = (tl.exp(grouped - base[:, None, :]) * _GROUP_UNIT + 0.5).to(tl.int32)
        tl.store(p_masses + at, tl.sum(parts, 1), inside)


# ---------------------------------------------------------------- scan


@triton.jit(do_not_specialize=("N",), do_not_specialize_on_alignment=COUNTERS)
def scan_kernel(
    p_logits, p_noise, p_seeds, p_streams, p_positions, p_scores, p_maxima, p_masses, p_best, p_ids, p_counters, p_out,
    N, scale, V: tl.constexpr, G: tl.constexpr, T: tl.constexpr, SLICES: tl.constexpr, SLICES_UP: tl.constexpr,
    SCALING: tl.constexpr,
    NOISE: tl.constexpr, CHOOSE: tl.constexpr, MASSES: tl.constexpr, SCORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, slice). CHOOSE: the best token of the row; else the groups' maxima and masses of the scores."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row, i_slice = tl.program_id(0), tl.program_id(1)
    first = i_slice * T
    tokens = first + tl.arange(0, T)  # [T]
    rows = i_row + tl.arange(0, 1)  # [1]
    real = (tokens < V)[:, None]  # [T, 1]
    at = rows[None, :].to(tl.int64) * V + tokens[:, None]
    scores = scale_logits(tl.load(p_logits + at, real, float("-inf")), scale, SCALING)
    scores = add_noise(scores, first, tokens, rows, real, p_noise, p_seeds, p_streams, p_positions, V, N, NOISE, T, 1)
    scores = tl.where(real, scores, float("-inf"))
    if SCORES:
        tl.store(p_scores + at, scores, real)
    if CHOOSE:
        best, ids = best_of(scores, tokens, V)
        tl.store(p_best + rows * SLICES + i_slice, best)
        tl.store(p_ids + rows * SLICES + i_slice, ids)
        tl.debug_barrier()
        if tl.atomic_add(p_counters + i_row, 1, sem="acq_rel") == SLICES - 1:
            slices = tl.arange(0, SLICES_UP)
            inside = slices < SLICES
            all_best = tl.load(p_best + i_row * SLICES + slices, inside, float("-inf"), cache_modifier=".cg")
            all_ids = tl.load(p_ids + i_row * SLICES + slices, inside, V, cache_modifier=".cg")
            top = tl.max(all_best, 0)
            chosen = tl.min(tl.where(all_best == top, all_ids, V), 0)
            tl.store(p_out + i_row, decided(tl.minimum(chosen, V - 1), top, NOISE))
            tl.store(p_counters + i_row, 0)
    else:
        store_groups(scores, first, rows, rows >= 0, p_maxima, p_masses, G, MASSES, T, 1)


# ---------------------------------------------------------------- select


@triton.jit
def _floor(values, target, top, TESTS: tl.constexpr):
    """At most the `target`-th largest of values [n] up to `top`, and how many reach it: nearly `target`, or all of them
    where no bound is known. Absent values are -inf.

    Where the bound lies is narrowed down between the smallest and the largest in steps of a TESTS-th, until a quarter
    too many reach it, which takes two or three rounds for logits as models make them.
    """
    low = tl.min(tl.where(values > float("-inf"), values, top), 0)
    step = (top - low) * (1.0 / TESTS)
    reached = tl.sum((values > float("-inf")).to(tl.int32), 0)
    rounds = 0
    while (reached > target + tl.maximum(target // 4, 8)) & (rounds < 8):
        tests = low + step * tl.arange(0, TESTS)
        total = tl.sum((values[None, :] >= tests[:, None]).to(tl.int32), 1)
        low = tl.maximum(low, tl.max(tl.where(total >= target, tests, float("-inf")), 0))
        reached = tl.minimum(reached, tl.min(tl.where(total >= target, total, reached), 0))
        step = step * (1.0 / TESTS)
        rounds += 1
    return tl.where(reached >= target, low, float("-inf")), reached


@triton.jit
def _threshold(
    p_values, p_ids, count, target, top, WHAT: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """`_search` for WHAT 0 and 1, where there are few values by `_compare`."""
    if count <= FEW:
        bound = _compare(p_values, count, target, top, WHAT, FEW, TOGETHER)
    elif count <= 4 * FEW:
        bound = _compare(p_values, count, target, top, WHAT, 4 * FEW, TOGETHER // 2)
    else:
        bound = _search(p_values, p_ids, count, target, top, 0, WHAT, BLOCK)
    return bound


@triton.jit
def _compare(p_values, count, target, top, WHAT: tl.constexpr, FEW: tl.constexpr, TOGETHER: tl.constexpr):
    """`_search` for WHAT 0 and 1 and at most FEW values, by comparing each with all: there are no rounds."""
    at = tl.arange(0, FEW)
    keys = order_key(tl.load(p_values + at, at < count, float("-inf")))
    if WHAT == 1:
        parts = tl.full((FEW, TOGETHER), 0, tl.int64)
    else:
        parts = tl.full((FEW, TOGETHER), 0, tl.int32)
    for start in range(0, count, TOGETHER):
        others = start + tl.arange(0, TOGETHER)
        values = tl.load(p_values + others, others < count, float("-inf"))
        above = (order_key(values)[None, :] >= keys[:, None]) & (others < count)[None, :]  # [FEW, TOGETHER]
        if WHAT == 1:
            parts += tl.where(above, (tl.exp(values - top) * _UNIT).to(tl.int64)[None, :], 0)
        else:
            parts += above.to(tl.int32)
    # Signed integers of the keys' order, which every reduction takes.
    reached = (at < count) & (tl.sum(parts, 1) >= target)
    bound = tl.max(tl.where(reached, (keys ^ 0x80000000).to(tl.int32, bitcast=True), -(2**31)), 0)
    return bound.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _search(p_values, p_ids, count, target, top, tie, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest uint32 t with at least `target` above or at it, four bits at a time.

    WHAT 0: counts values with key >= t. 1: sums their probability, relative to exp(top), in fixed point. 2: counts
    ids >= t among the values with key == tie.
    """
    bound = tl.full((), 0, tl.uint32)
    shift = tl.full((), 28, tl.uint32)
    for _ in range(8):
        tests = bound + (tl.arange(0, 16).to(tl.uint32) << shift)
        if WHAT == 1:
            total = tl.full((16,), 0, tl.int64)
        else:
            total = tl.full((16,), 0, tl.int32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            values = tl.load(p_values + at, at < count, float("-inf"))
            keys = order_key(values)
            if WHAT == 2:
                hits = keys == tie
                keys = tl.load(p_ids + at, at < count, 0).to(tl.uint32)
                above = (keys[None, :] >= tests[:, None]) & (hits & (at < count))[None, :]
            else:
                above = (keys[None, :] >= tests[:, None]) & (at < count)[None, :]
            if WHAT == 1:
                parts = (tl.exp(values - top) * _UNIT).to(tl.int64)
                total += tl.sum(tl.where(above, parts[None, :], 0), 1)
            else:
                total += tl.sum(above.to(tl.int32), 1)
        digit = tl.maximum(tl.sum((total >= target).to(tl.int32), 0) - 1, 0)
        bound = bound + (digit.to(tl.uint32) << shift)
        shift = (shift - 4) & 31
    return bound


@triton.jit
def _mass(p_values, count, top, least, BLOCK: tl.constexpr):
    """Probability, in fixed point relative to exp(top), of the values whose key is at least `least`."""
    total = tl.full((), 0, tl.int64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(p_values + at, at < count, float("-inf"))
        parts = (tl.exp(values - top) * _UNIT).to(tl.int64)
        total += tl.sum(tl.where((order_key(values) >= least) & (at < count), parts, 0), 0)
    return total


@triton.jit(do_not_specialize=("N",), do_not_specialize_on_alignment=COUNTERS)
def select_kernel(
    p_logits, p_maxima, p_masses, p_noise, p_seeds, p_streams, p_positions, p_groups, p_values, p_ids, p_out,
    p_logprobs,
    N, scale, top_p, min_p, V: tl.constexpr, STRIDE: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr,
    SCALING: tl.constexpr, NOISE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    CHILDREN: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr, TOGETHER: tl.constexpr,
    SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row. CHILDREN 0: the choice; m: the m best and their log-probabilities.

    WHOLE: no warpers, the scores are final and every token of the vocabulary is in the normaliser (children only).
    p_groups [M, G], p_values, p_ids [M, V]: lists of candidates.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row = tl.program_id(0)
    row = i_row.to(tl.int64)
    p_logits += row * STRIDE
    p_maxima += i_row * G
    p_masses += i_row * G
    p_groups += i_row * G
    p_values += row * V
    p_ids += row * V
    if NOISE == 1:
        seed, stream = tl.load(p_seeds + i_row // N), tl.load(p_streams + i_row // N)
        position = tl.load(p_positions + i_row)

    # A floor below which nothing can survive, from the groups' maxima.
    groups = tl.arange(0, GROUPS)
    inside = groups < G
    maxima = tl.load(p_maxima + groups, inside, float("-inf"))  # [GROUPS]
    top = tl.max(maxima, 0)
    valid = (top > float("-inf")) & (top < float("inf"))  # else the row has no candidates
    maxima = tl.where(valid, maxima, float("-inf"))
    top = tl.where(valid, top, 0.0)
    floor = tl.full((), float("-inf"), tl.float32)
    least: tl.constexpr = CHILDREN if WHOLE else TOP_K
    COUNTED: tl.constexpr = least > 0 and least <= G
    if COUNTED:
        floor, n_groups = _floor(maxima, least, top, 8)
    total = tl.full((), 0, tl.int64)
    if WHOLE or (TOP_P and TOP_K == 0):
        peaks = tl.where(inside & (maxima > float("-inf")), tl.exp(maxima - top), 0.0)
        weights = tl.load(p_masses + groups, inside, 0).to(tl.float32) * (1.0 / _GROUP_UNIT) * peaks
        total = tl.sum((weights * _UNIT).to(tl.int64), 0)
        if not WHOLE and top_p < 0.9999:
            # What a group has below t weighs at most 64 exp(t), and at most what it weighs without its largest if that
            # is not below t. All groups' together: safely less than is dropped?
            spare = total.to(tl.float32) * (0.9 / _UNIT) * (1.0 - top_p)
            step = tl.full((), 64, tl.int32)
            for start in range(0, 64, 16):
                steps = start + tl.arange(0, 16)
                depths = 0.5 * (steps + 1).to(tl.float32)[:, None]  # [16, 1]
                most = tl.where(maxima[None, :] >= top - depths, (weights - peaks)[None, :], weights[None, :])
                below = tl.sum(tl.minimum(most, _GROUP * tl.exp(-depths)), 1)
                step = tl.minimum(step, tl.min(tl.where(below <= spare, steps, 64), 0))
            floor = tl.where(step < 64, top - 0.5 * (step + 1).to(tl.float32), float("-inf"))
    elif MIN_P and TOP_K == 0:
        floor = tl.where(min_p > 1e-37, top + tl.log(tl.maximum(min_p, 1e-37)) - 0.01, float("-inf"))

    # The groups that reach the floor, then their tokens that do.
    alive = inside & (maxima >= floor) & (maxima > float("-inf"))
    place = tl.cumsum(alive.to(tl.int32), 0) - 1
    tl.store(p_groups + place, groups, alive)
    if not COUNTED:
        n_groups = tl.sum(alive.to(tl.int32), 0)
    tl.debug_barrier()
    count = tl.full((), 0, tl.int32)
    for start in range(0, n_groups, SPAN):
        at = start + tl.arange(0, SPAN)
        group = tl.load(p_groups + at, at < n_groups, G)  # [SPAN]
        tokens = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]  # [SPAN, 64]
        real = tokens < V
        if STRIDE >= G * _GROUP:  # there is something behind the row: whole groups may be read at once
            values = tl.load(p_logits + tokens, (group < G)[:, None], float("-inf"))
        else:
            values = tl.load(p_logits + tokens, real, float("-inf"))
        values = scale_logits(values, scale, SCALING)
        found = tl.reshape(real & (values >= floor) & (values > float("-inf")), (SPAN * _GROUP,))
        slot = count + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(p_values + slot, tl.reshape(values, (SPAN * _GROUP,)), found)
        tl.store(p_ids + slot, tl.reshape(tokens, (SPAN * _GROUP,)), found)
        count += tl.sum(found.to(tl.int32), 0)
    tl.debug_barrier()

    # Thresholds: keys above `least_key` stay; of the keys equal to it the ids from `least_id` on.
    least_key = tl.full((), 0, tl.uint32)
    least_id = tl.full((), 0, tl.uint32)
    if TOP_K > 0:
        least_key = _threshold(p_values, p_ids, count, TOP_K, top, 0, BLOCK, FEW, TOGETHER)
    if TOP_P:
        if TOP_K > 0:
            total = _mass(p_values, count, top, least_key, BLOCK)
        target = tl.maximum((total.to(tl.float64) * top_p).to(tl.int64), 1)
        key = _threshold(p_values, p_ids, count, target, top, 1, BLOCK, FEW, TOGETHER)
        if key >= least_key:
            least_key = key
            above = _mass(p_values, count, top, key + 1, BLOCK)
            tied = _mass(p_values, count, top, key, BLOCK) - above
            one = (tl.exp(value_of(key) - top) * _UNIT).to(tl.int64)
            if tied > one:
                stay = (target - above + one - 1) // tl.maximum(one, 1)
                least_id = _search(p_values, p_ids, count, stay.to(tl.int32), top, key, 2, BLOCK)

    # The scores of what stays, over the candidates' values.
    nothing = _ranked(tl.full((), float("-inf"), tl.float32), tl.full((), V, tl.int32))
    winner = nothing
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(p_values + at, at < count, float("-inf"))
        tokens = tl.load(p_ids + at, at < count, V)
        keys = order_key(values)
        stays = (at < count) & ((keys > least_key) | ((keys == least_key) & (tokens.to(tl.uint32) >= least_id)))
        if MIN_P:
            stays = stays & ((values == top) | (tl.exp(values - top) >= min_p))  # the best stays
        if NOISE == 1:
            values = values + gumbel_at(tokens, seed, stream, position)
        elif NOISE == 2:
            values = values + tl.load(p_noise + row * V + tokens, at < count, 0.0)
        values = tl.where(stays, values, float("-inf"))
        if CHILDREN > 0:
            tl.debug_barrier()  # in a small vocabulary several warps hold the same values: all have read them
            tl.store(p_values + at, values, at < count)
        winner = tl.maximum(winner, tl.max(tl.where(stays, _ranked(values, tokens), nothing), 0))
    best, chosen = _value_and_id(winner)
    if CHILDREN == 0:
        tl.store(p_out + i_row, tl.where(valid & (chosen < V), chosen, _INVALID))
    else:
        tl.debug_barrier()
        if WHOLE:
            normaliser = total.to(tl.float32) * (1.0 / _UNIT)
        else:
            mass = tl.full((), 0, tl.int64)
            for start in range(0, count, BLOCK):
                at = start + tl.arange(0, BLOCK)
                values = tl.load(p_values + at, at < count, float("-inf"))
                mass += tl.sum((tl.exp(values - best) * _UNIT).to(tl.int64), 0)
            normaliser = mass.to(tl.float32) * (1.0 / _UNIT)
        for child in range(CHILDREN):
            value, token = _value_and_id(winner)
            possible = value > float("-inf")
            logprob = tl.minimum(value - best - tl.log(normaliser), -1e-4)
            tl.store(p_out + i_row * CHILDREN + child, tl.where(possible, token, 0))
            tl.store(p_logprobs + i_row * CHILDREN + child, tl.where(possible, logprob, float("-inf")))
            last, winner = winner, nothing
            for start in range(0, count, BLOCK):
                at = start + tl.arange(0, BLOCK)
                values = tl.load(p_values + at, at < count, float("-inf"))
                ranked = _ranked(values, tl.load(p_ids + at, at < count, V))
                winner = tl.maximum(winner, tl.max(tl.where(ranked < last, ranked, nothing), 0))


# ---------------------------------------------------------------- launchers


def groups_of(vocab_size: int) -> int:
    return -(-vocab_size // GROUP)


def warped(greedy: bool, top_k: int, top_p: float, min_p: float, vocab_size: int) -> bool:
    """Whether any warper but the temperature is on."""
    return not greedy and (0 < top_k < vocab_size or top_p < 1.0 or min_p > 0.0)


def rounded(count: int) -> int:
    """Elements of a part of the scratch memory: whole 128-byte lines."""
    return -(-count // 32) * 32


class Parts:
    """Cuts one after the other off a scratch tensor of fp32."""

    def __init__(self, partials: torch.Tensor):
        self.partials, self.start = partials, 0

    def take(self, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`count` 32-bit elements, or as many bytes seen as dtype."""
        part = self.partials[self.start : self.start + count]
        if part.numel() < count:
            raise RuntimeError(f"scratch memory of {self.partials.numel()} elements ends before {self.start + count}")
        self.start += rounded(count)
        return part.view(dtype)


def scratch_size(rows: int, vocab_size: int) -> tuple[int, int]:
    """Partials and counters for M rows of any operation of this file."""
    groups = groups_of(vocab_size)
    return 3 * rounded(rows * groups) + 3 * rounded(rows * vocab_size), rows


def scaling(greedy: bool, temperature: float, sharpness: float = 1.0) -> tuple[int, float]:
    """SCALING of the kernels and its number."""
    if greedy:
        return (2, sharpness) if sharpness != 1.0 else (0, 1.0)
    return (1, temperature) if temperature != 1.0 else (0, 1.0)


def noise_kind(greedy: bool, noise: torch.Tensor | None) -> int:
    return NOISES["none" if greedy else "made" if noise is None else "given"]


def candidates(shape: tuple[int], device: torch.device) -> list[dict[str, int]]:
    """Settings to try at the shape (V,), the default first."""
    default = {"slice": SLICE, "block": BLOCK, "span": SPAN} | WARPS
    others = [{"slice": size, "scan_warps": warps} for size in (1024, 2048, 4096) for warps in (2, 4, 8)]
    others += [{"block": 512}]
    others += [{"span": span, "select_warps": warps} for span in (16, 32, 64) for warps in (4, 8, 16)]
    return [default, *(default | other for other in others if default | other != default)]


def _settings(vocab_size: int, device: torch.device) -> dict[str, int]:
    return config("choose", (vocab_size,), device, candidates)


def launch_select(
    logits, maxima, masses, parts, noise, seeds, streams, positions, scale, top_k, top_p, min_p, kind, out, logprobs,
    whole
):  # fmt: skip
    """`select_kernel` for every row of logits, which need not lie close together; scale: (SCALING, number); kind:
    NOISE; whole: children of final scores."""
    rows, vocab_size = logits.shape
    groups, settings = groups_of(vocab_size), _settings(vocab_size, logits.device)
    warps = settings["select_warps"]
    members = parts.take(rows * groups, torch.int32)
    values, ids = parts.take(rows * vocab_size), parts.take(rows * vocab_size, torch.int32)
    launch_kernel(
        select_kernel,
        (rows,),
        logits, maxima, masses, logits if noise is None else noise, seeds, streams, positions, members, values, ids,
        out, out if logprobs is None else logprobs, positions.shape[1], scale[1], top_p, min_p, V=vocab_size,
        STRIDE=logits.stride(0), G=groups, GROUPS=triton.next_power_of_2(groups), SCALING=scale[0], NOISE=kind,
        TOP_K=top_k if 0 < top_k < vocab_size else 0, TOP_P=top_p < 1.0, MIN_P=min_p > 0.0,
        CHILDREN=0 if logprobs is None else out.shape[1], WHOLE=whole,
        BLOCK=min(settings["block"], triton.next_power_of_2(vocab_size)),
        FEW=FEW, TOGETHER=TOGETHER, SPAN=min(settings["span"], triton.next_power_of_2(groups)),
        num_warps=warps, maxnreg=most_registers(architecture(logits.device), warps, SPILLING),
        **launch_options(logits.device),
    )  # fmt: skip


def _scan(logits, noise, seeds, streams, positions, scores, maxima, masses, best, ids, counters, out, scale, kind,
          choose, need_masses):  # fmt: skip
    rows, vocab_size = logits.shape
    settings = _settings(vocab_size, logits.device)
    size = min(settings["slice"], max(GROUP, triton.next_power_of_2(vocab_size)))
    slices = -(-vocab_size // size)
    launch_kernel(
        scan_kernel,
        (rows, slices),
        logits, logits if noise is None else noise, seeds, streams, positions, scores, maxima, masses, best, ids,
        counters, out, positions.shape[1], scale[1], V=vocab_size, G=groups_of(vocab_size), T=size, SLICES=slices,
        SLICES_UP=triton.next_power_of_2(slices), SCALING=scale[0], NOISE=kind, CHOOSE=choose, MASSES=need_masses,
        SCORES=scores is not logits, num_warps=settings["scan_warps"], **launch_options(logits.device),
    )  # fmt: skip


def _launch_choose(
    logits, seeds, streams, positions, temperature, top_k, top_p, min_p, greedy, noise, out, partials, counters
):
    rows, vocab_size = logits.shape
    scale, kind = scaling(greedy, temperature), noise_kind(greedy, noise)
    parts = Parts(partials)
    groups = rows * groups_of(vocab_size)
    maxima, masses = parts.take(groups), parts.take(groups, torch.int32)
    if not warped(greedy, top_k, top_p, min_p, vocab_size):
        _scan(logits, noise, seeds, streams, positions, logits, maxima, masses, maxima, masses, counters, out, scale,
              kind, True, False)  # fmt: skip
        return
    need = top_p < 1.0 and not 0 < top_k < vocab_size
    _scan(logits, None, seeds, streams, positions, logits, maxima, masses, maxima, masses, counters, out, scale, 0,
          False, need)  # fmt: skip
    launch_select(logits, maxima, masses, parts, noise, seeds, streams, positions, scale, top_k, top_p, min_p, kind,
                  out, None, False)  # fmt: skip


def _launch_children(
    logits, seeds, streams, positions, temperature, top_k, top_p, min_p, greedy, sharpness, noise, out_tokens,
    out_logprobs, partials, counters,
):  # fmt: skip
    rows, vocab_size = logits.shape
    scale, kind = scaling(greedy, temperature, sharpness), noise_kind(greedy, noise)
    parts = Parts(partials)
    groups = rows * groups_of(vocab_size)
    maxima, masses = parts.take(groups), parts.take(groups, torch.int32)
    whole = not warped(greedy, top_k, top_p, min_p, vocab_size)
    if whole:  # the scan writes the final scores
        scores = parts.take(rows * vocab_size).view(rows, vocab_size)
        _scan(logits, noise, seeds, streams, positions, scores, maxima, masses, maxima, masses, counters, out_tokens,
              scale, kind, False, True)  # fmt: skip
        logits, scale, kind, noise = scores, (0, 1.0), 0, None
    else:
        need = top_p < 1.0 and not 0 < top_k < vocab_size
        _scan(logits, None, seeds, streams, positions, logits, maxima, masses, maxima, masses, counters, out_tokens,
              scale, 0, False, need)  # fmt: skip
    launch_select(logits, maxima, masses, parts, noise, seeds, streams, positions, scale, top_k, top_p, min_p, kind,
                  out_tokens, out_logprobs, whole)  # fmt: skip


SAMPLING = (
    "Tensor seeds, Tensor streams, Tensor positions, "
    "float temperature, int top_k, float top_p, float min_p, bool greedy"
)

_choose = register(
    f"choose(Tensor logits, {SAMPLING}, Tensor? noise, Tensor(a!) out, Tensor(b!) partials, Tensor(c!) counters) -> ()",
    _launch_choose,
)
_children = register(
    f"choose_children(Tensor logits, {SAMPLING}, float sharpness, Tensor? noise, Tensor(a!) out_tokens, "
    "Tensor(b!) out_logprobs, Tensor(c!) partials, Tensor(d!) counters) -> ()",
    _launch_children,
)


# ---------------------------------------------------------------- public functions


def check_sampling(
    op, rows, vocab_size, device, seeds, streams, positions, temperature, top_k, top_p, min_p, noise, scratch, needed
):
    """Checks of the arguments that all choosing operations share; `needed`: their `scratch_size`."""
    if positions.dim() != 2 or positions.numel() != rows:
        raise ValueError(f"{op}: positions must be [B, N] with B * N = {rows} rows, got {list(positions.shape)}")
    batch = positions.shape[0]
    check_tensor(op, "positions", positions, (batch, rows // batch), torch.int32, device)
    check_tensor(op, "seeds", seeds, (batch,), torch.int64, device)
    check_tensor(op, "streams", streams, (batch,), torch.int32, device)
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"{op}: top_k must be at least 0 (0: none), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1] (1: none), got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{op}: min_p must be in [0, 1] (0: none), got {min_p}")
    if noise is not None:
        check_tensor(op, "noise", noise, (rows, vocab_size), torch.float32, device)
    check_tensor(op, "scratch.partials", scratch.partials, (None,), torch.float32, device)
    check_tensor(op, "scratch.counters", scratch.counters, (None,), torch.int32, device)
    got = scratch.partials.numel(), scratch.counters.numel()
    if got[0] < needed[0] or got[1] < needed[1]:
        raise ValueError(f"{op}: scratch must hold (partials, counters) of {needed}, got {got}; see scratch_size")


def check_children(op, rows, vocab_size, device, out_tokens, out_logprobs):
    if out_tokens.dim() != 2 or not 1 <= out_tokens.shape[1] <= vocab_size:
        raise ValueError(
            f"{op}: out_tokens must be [M, m], m from 1 to the vocabulary {vocab_size}, got {list(out_tokens.shape)}"
        )
    check_tensor(op, "out_tokens", out_tokens, (rows, out_tokens.shape[1]), torch.int32, device)
    check_tensor(op, "out_logprobs", out_logprobs, tuple(out_tokens.shape), torch.float32, device)


def choose(
    logits, seeds, streams, positions, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, greedy=False, noise=None, out,
    scratch,
):  # fmt: skip
    """The one token-choice rule (`reference.choose`): logits [M, V] fp32 -> out [M] int32.

    seeds [B] int64, streams [B] int32, positions [B, N] int32, the absolute position of the token each row chooses,
    M = B*N. top_k 0, top_p 1, min_p 0 leave a warper out; greedy leaves out all of them and the noise. noise: [M, V]
    fp32 in place of the counters' noise. -inf is never chosen. out is INVALID, -2, for a row with a NaN, without a
    finite logit or, when sampling, with +inf.

    Raises ValueError for a wrong shape, dtype, device or layout, a setting out of range, or too little scratch memory.
    """
    check_tensor("choose", "logits", logits, (None, None), torch.float32, logits.device)
    rows, vocab_size = logits.shape
    check_sampling(
        "choose", rows, vocab_size, logits.device, seeds, streams, positions, temperature, top_k, top_p, min_p, noise,
        scratch, scratch_size(rows, vocab_size),
    )  # fmt: skip
    check_tensor("choose", "out", out, (rows,), torch.int32, logits.device)
    check_runs(logits, "choose")
    _choose(
        logits, seeds, streams, positions, temperature, top_k, top_p, min_p, greedy, noise, out, scratch.partials,
        scratch.counters,
    )  # fmt: skip


def choose_children(
    logits, seeds, streams, positions, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, greedy=False, sharpness=1.0,
    noise=None, out_tokens, out_logprobs, scratch,
):  # fmt: skip
    """The draft's likeliest children (`reference.choose_children`): logits [M, V] fp32 -> out_tokens [M, m] int32 and
    out_logprobs [M, m] fp32, best first, at most -1e-4, -inf (and token 0) where fewer than m tokens can come up.

    sharpness multiplies the logits when greedy. The other arguments and the errors are those of `choose`.
    """
    check_tensor("choose_children", "logits", logits, (None, None), torch.float32, logits.device)
    rows, vocab_size = logits.shape
    check_sampling(
        "choose_children", rows, vocab_size, logits.device, seeds, streams, positions, temperature, top_k, top_p, min_p,
        noise, scratch, scratch_size(rows, vocab_size),
    )  # fmt: skip
    check_children("choose_children", rows, vocab_size, logits.device, out_tokens, out_logprobs)
    check_runs(logits, "choose_children")
    _children(
        logits, seeds, streams, positions, temperature, top_k, top_p, min_p, greedy, sharpness, noise, out_tokens,
        out_logprobs, scratch.partials, scratch.counters,
    )  # fmt: skip
