"""The token-choice rule over logits in memory: warping, noise, argmax; and the draft's children by the same rule.

    choose:   argmax(warp(logits / temperature) + g), the lowest id on ties              (`reference.choose`)
    children: the top m of softmax(warp(logits / temperature) + g), and their logarithms (`reference.choose_children`),
              for `lm_head_topm` alone; without warpers up to 32 of them by likeliest.py

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

A choice under top-p alone looks for no threshold: tokens are taken in the order of their scores, noise included, until
those more likely than the token weigh less than top-p. The first one does with probability top-p or more. More
candidates than needed do no harm there, so they are runs of four tokens: read, kept and given noise as vectors.

top-p sums probabilities in 64-bit fixed point (2^-40 of the largest probability), so the sum has no order. The torch
reference sums in fp32, in sorted order: the two can differ only for a token at which the cumulative probability is
within about 1e-6 of the threshold. Tied tokens go lowest id first, the best stays, as in transformers.
"""

import triton
import triton.language as tl

from stagedspec.kernels.choose.scores import (
    COUNTERS,
    GROUP_SIZE,
    GROUP_UNIT,
    NO_CHOICE,
    UNIT,
    add_noise,
    best_of,
    decided,
    order_key,
    rank_key,
    scale_logits,
    store_groups,
    value_and_id,
    value_of,
)
from stagedspec.kernels.philox import gumbel_at, gumbel_fours

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite fp32

# ---------------------------------------------------------------- scan


@triton.jit(do_not_specialize=("N",), do_not_specialize_on_alignment=COUNTERS)
def scan_kernel(
    p_logits, p_noise, p_seeds, p_streams, p_positions, p_maxima, p_masses, p_best, p_ids, p_counters, p_out,
    N, scale, V: tl.constexpr, G: tl.constexpr, T: tl.constexpr, SLICES: tl.constexpr, SLICES_UP: tl.constexpr,
    SCALING: tl.constexpr,
    NOISE: tl.constexpr, CHOOSE: tl.constexpr, MASSES: tl.constexpr, PDL: tl.constexpr,
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
    """A lower bound of the `target`-th largest of values [n], which reach up to `top`, and how many values reach the
    bound; -inf and the number of all if none was found. Absent values are -inf.

    The bound is narrowed down between the smallest and the largest in steps of a TESTS-th, until a quarter
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
    return tl.where(reached >= target, low, float("-inf"))


@triton.jit
def _floor_of_mass(maxima, weights, peaks, top, spare, TESTS: tl.constexpr):
    """A score below which all tokens together weigh at most `spare`, or -inf.

    maxima [n]: of groups, up to `top`; weights, peaks [n]: of a whole group and of its largest token. What a group has
    below top - d weighs at most 64 exp(-d), and at most what it weighs without its largest if that is not below. The
    second round of tests narrows the first one's step down to a TESTS-th.
    """
    step: tl.constexpr = 19.2 / TESTS
    depth = 0.0
    for i_round in tl.static_range(2):
        tests = tl.arange(0, TESTS).to(tl.float32)
        if i_round == 0:
            tests = (tests + 1.0) * step
        else:
            tests = depth - tests * (step / TESTS)
        most = tl.where(maxima[None, :] >= top - tests[:, None], (weights - peaks)[None, :], weights[None, :])
        below = tl.sum(tl.minimum(most, (tl.exp(-tests) * GROUP_SIZE)[:, None]), 1)  # [TESTS]
        depth = tl.min(tl.where(below <= spare, tests, float("inf")), 0)
    return top - depth


@triton.jit
def _places(found, SIZE: tl.constexpr, LANES: tl.constexpr):
    """A place of its own, from 0 on, for each of the elements found [SIZE], and how many there are. The places go
    through the elements in columns, which are LANES apart: a thread has a column, so only columns are compared."""
    COLUMNS: tl.constexpr = min(SIZE, LANES)
    table = tl.reshape(found.to(tl.int32), (SIZE // COLUMNS, COLUMNS))
    counts = tl.sum(table, 0)  # [COLUMNS]
    places = (tl.cumsum(counts, 0) - counts)[None, :] + tl.cumsum(table, 0) - table
    return tl.reshape(places, (SIZE,)), tl.sum(counts, 0)


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
            parts += tl.where(above, (tl.exp(values - top) * UNIT).to(tl.int64)[None, :], 0)
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
                parts = (tl.exp(values - top) * UNIT).to(tl.int64)
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
        parts = (tl.exp(values - top) * UNIT).to(tl.int64)
        total += tl.sum(tl.where((order_key(values) >= least) & (at < count), parts, 0), 0)
    return total


@triton.jit
def _candidates(p_values, p_ids, start, count, V, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Values and tokens [BLOCK, WIDE] of the runs of candidates from `start` on, and each run's first token; -inf where
    there are none."""
    runs = start + tl.arange(0, BLOCK)
    within = tl.arange(0, WIDE)[None, :]
    values = tl.load(p_values + runs[:, None] * WIDE + within, (runs < count)[:, None], float("-inf"))
    first = tl.load(p_ids + runs, runs < count, V)
    return values, first[:, None] + within, first


@triton.jit
def _ranked(
    p_values, p_ids, start, count, least_key, least_id, top, min_p, p_noise, seed, stream, position,
    V: tl.constexpr, MIN_P: tl.constexpr, NOISE: tl.constexpr, CHILDREN: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """`_candidates`, and rank keys of their scores, noise included; the least key for those that the thresholds drop.
    For children the scores take the values' place in memory."""
    values, tokens, first = _candidates(p_values, p_ids, start, count, V, BLOCK, WIDE)
    keys = order_key(values)
    stays = (values >= LOWEST) & ((keys > least_key) | ((keys == least_key) & (tokens.to(tl.uint32) >= least_id)))
    if MIN_P:
        stays = stays & ((values == top) | (tl.exp(values - top) >= min_p))  # the best stays
    scores = values
    if NOISE == 1 and WIDE == 4:
        scores += gumbel_fours(first, seed, stream, position)
    elif NOISE == 1:
        scores += gumbel_at(tokens, seed, stream, position)
    elif NOISE == 2:
        scores += tl.load(p_noise + tokens, stays, 0.0)
    scores = tl.where(stays, scores, float("-inf"))
    if CHILDREN > 0:
        at = start + tl.arange(0, BLOCK)[:, None] + tl.arange(0, WIDE)[None, :]
        tl.debug_barrier()  # in a small vocabulary several warps hold the same values: all have read them
        tl.store(p_values + at, scores, at < count)
    return values, tokens, rank_key(scores, tl.where(stays, tokens, V))


@triton.jit
def _mass_before(values, tokens, least, token, least_key, top):
    """Probability, as of `_mass`, of the candidates above `least_key` that top-p takes before the value `least` of
    `token`: the larger, and of equal ones the larger ids."""
    before = ((values > least) | ((values == least) & (tokens > token))) & (order_key(values) >= least_key)
    return tl.sum(tl.where(before, (tl.exp(values - top) * UNIT).to(tl.int64), 0))


@triton.jit(do_not_specialize=("N",), do_not_specialize_on_alignment=COUNTERS)
def select_kernel(
    p_logits, p_maxima, p_masses, p_noise, p_seeds, p_streams, p_positions, p_groups, p_values, p_ids, p_out,
    p_logprobs,
    N, scale, top_p, min_p, V: tl.constexpr, STRIDE: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr,
    SCALING: tl.constexpr, NOISE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    CHILDREN: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr, TOGETHER: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row. CHILDREN 0: the choice; m: the m best and their log-probabilities.

    WHOLE: no warpers, the scores are final and every token of the vocabulary is in the normaliser (children only).
    p_groups [M, G], p_values, p_ids [M, 64 G]: lists of candidates, WIDE tokens in a row.
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
    p_values += row * (G * GROUP_SIZE)
    p_ids += row * (G * GROUP_SIZE)
    p_noise += row * V
    seed, stream = tl.load(p_seeds + i_row // N), tl.load(p_streams + i_row // N)
    position = tl.load(p_positions + i_row)

    # A floor below which nothing can survive, from the groups' maxima.
    groups = GROUPS - 1 - tl.arange(0, GROUPS)
    inside = groups < G
    MASSES: tl.constexpr = WHOLE or (TOP_P and TOP_K == 0)
    maxima = tl.load(p_maxima + groups, inside, float("-inf"))  # [GROUPS]
    if MASSES:
        masses = tl.load(p_masses + groups, inside, 0)
    top = tl.max(maxima, 0)
    valid = (top > float("-inf")) & (top < float("inf"))  # else the row has no candidates
    maxima = tl.where(valid, maxima, float("-inf"))
    top = tl.where(valid, top, 0.0)
    floor = tl.full((), float("-inf"), tl.float32)
    least: tl.constexpr = CHILDREN if WHOLE else TOP_K
    if least > 0 and least <= G:
        floor = _floor(maxima, least, top, 8)
    total = tl.full((), 0, tl.int64)
    if MASSES:
        peaks = tl.where(inside & (maxima > float("-inf")), tl.exp(maxima - top), 0.0)
        weights = masses.to(tl.float32) * (1.0 / GROUP_UNIT) * peaks
        total = tl.sum((weights * UNIT).to(tl.int64), 0)
        if not WHOLE and top_p < 0.9999:
            spare = total.to(tl.float32) * (0.98 / UNIT) * (1.0 - top_p)  # safely less than is dropped
            floor = _floor_of_mass(maxima, weights, peaks, top, spare, 8)
    elif MIN_P and TOP_K == 0:
        floor = tl.where(min_p > 1e-37, top + tl.log(tl.maximum(min_p, 1e-37)) - 0.01, float("-inf"))

    # The groups that reach the floor, then their tokens that do, in any order. Groups and a group's tokens are taken
    # backwards: forwards the compiler gives threads several in a row, and passes them on to store them one by one.
    floor = tl.maximum(floor, LOWEST)  # -inf is no candidate
    place, n_groups = _places(maxima >= floor, GROUPS, LANES)
    tl.store(p_groups + place, groups, maxima >= floor)
    tl.debug_barrier()
    count = tl.full((), 0, tl.int32)
    RUNS: tl.constexpr = GROUP_SIZE // WIDE  # of a group
    runs = tl.arange(0, SPAN * RUNS)
    for start in range(0, n_groups, SPAN):
        at = start + runs // RUNS
        group = tl.load(p_groups + at, at < n_groups, G)
        first = group * GROUP_SIZE + (RUNS - 1 - runs % RUNS) * WIDE
        tokens = first[:, None] + tl.arange(0, WIDE)[None, :]  # [SPAN * RUNS, WIDE]
        if STRIDE >= G * GROUP_SIZE:  # there is something behind the row: whole groups may be read at once
            values = tl.load(p_logits + tokens, (group < G)[:, None], float("-inf"))
        else:
            values = tl.load(p_logits + tokens, tokens < V, float("-inf"))
        values = tl.where(tokens < V, scale_logits(values, scale, SCALING), float("-inf"))
        found = tl.max(values, 1) >= floor
        slot, more = _places(found, SPAN * RUNS, LANES)
        slot += count
        tl.store(p_ids + slot, first, found)
        tl.store(p_values + slot[:, None] * WIDE + tl.arange(0, WIDE)[None, :], values, found[:, None])
        count += more
    tl.debug_barrier()

    # Thresholds: keys above `least_key` stay; of the keys equal to it the ids from `least_id` on. For a choice the one
    # of top-p is not searched for.
    PARTS: tl.constexpr = min(BLOCK, 256)  # candidates that are compared with several tests at once
    least_key = tl.full((), 0, tl.uint32)
    least_id = tl.full((), 0, tl.uint32)
    target = tl.full((), 1 << 62, tl.int64)
    if TOP_K > 0:
        least_key = _threshold(p_values, p_ids, count, TOP_K, top, 0, PARTS, FEW, TOGETHER)
    if TOP_P:
        if TOP_K > 0:
            total = _mass(p_values, count, top, least_key, BLOCK)
        target = tl.maximum((total.to(tl.float64) * top_p).to(tl.int64), 1)
        if CHILDREN > 0:
            key = _threshold(p_values, p_ids, count, target, top, 1, PARTS, FEW, TOGETHER)
            if key >= least_key:
                least_key = key
                above = _mass(p_values, count, top, key + 1, BLOCK)
                tied = _mass(p_values, count, top, key, BLOCK) - above
                one = (tl.exp(value_of(key) - top) * UNIT).to(tl.int64)
                if tied > one:
                    stay = (target - above + one - 1) // tl.maximum(one, 1)
                    least_id = _search(p_values, p_ids, count, stay.to(tl.int32), top, key, 2, PARTS)

    # The best of what stays. A choice under top-p takes tokens in the order of their scores, until those more likely
    # than the token weigh less than top-p: mostly the first one. The first candidates, mostly all, stay in registers.
    nothing = rank_key(tl.full((), float("-inf"), tl.float32), tl.full((), V, tl.int32))
    winner, last = nothing, tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    least = tl.full((), float("-inf"), tl.float32)
    held_values, held_tokens, held_ranks = _ranked(
        p_values, p_ids, 0, count, least_key, least_id, top, min_p, p_noise, seed, stream, position,
        V, MIN_P, NOISE, CHILDREN, BLOCK, WIDE,
    )  # fmt: skip
    searching = count > 0
    while searching:
        winner = tl.max(tl.where((held_values >= least) & (held_ranks < last), held_ranks, nothing))
        for start in range(BLOCK, count, BLOCK):
            values, _, ranks = _ranked(
                p_values, p_ids, start, count, least_key, least_id, top, min_p, p_noise, seed, stream, position,
                V, MIN_P, NOISE, CHILDREN, BLOCK, WIDE,
            )  # fmt: skip
            winner = tl.maximum(winner, tl.max(tl.where((values >= least) & (ranks < last), ranks, nothing)))
        searching = False
        if TOP_P and CHILDREN == 0:
            last, token = winner, value_and_id(winner)[1]
            if token < V:
                least = scale_logits(tl.load(p_logits + token), scale, SCALING)  # what is less likely is out, too
                above = _mass_before(held_values, held_tokens, least, token, least_key, top)
                for start in range(BLOCK, count, BLOCK):
                    values, tokens, _ = _candidates(p_values, p_ids, start, count, V, BLOCK, WIDE)
                    above += _mass_before(values, tokens, least, token, least_key, top)
                searching = above >= target
    best, chosen = value_and_id(winner)
    if CHILDREN == 0:
        tl.store(p_out + i_row, tl.where(valid & (chosen < V), chosen, NO_CHOICE))
    else:
        tl.debug_barrier()
        if WHOLE:
            normaliser = total.to(tl.float32) * (1.0 / UNIT)
        else:
            mass = tl.full((), 0, tl.int64)
            for start in range(0, count, BLOCK):
                at = start + tl.arange(0, BLOCK)
                values = tl.load(p_values + at, at < count, float("-inf"))
                mass += tl.sum((tl.exp(values - best) * UNIT).to(tl.int64), 0)
            normaliser = mass.to(tl.float32) * (1.0 / UNIT)
        for child in range(CHILDREN):
            value, token = value_and_id(winner)
            possible = value > float("-inf")
            logprob = tl.minimum(value - best - tl.log(normaliser), -1e-4)
            tl.store(p_out + i_row * CHILDREN + child, tl.where(possible, token, 0))
            tl.store(p_logprobs + i_row * CHILDREN + child, tl.where(possible, logprob, float("-inf")))
            last, winner = winner, nothing
            for start in range(0, count, BLOCK):
                at = start + tl.arange(0, BLOCK)
                values = tl.load(p_values + at, at < count, float("-inf"))
                ranked = rank_key(values, tl.load(p_ids + at, at < count, V))
                winner = tl.maximum(winner, tl.max(tl.where(ranked < last, ranked, nothing), 0))
