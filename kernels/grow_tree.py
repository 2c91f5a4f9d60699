"""Growing a step's trees on the device: best-first selection, draft²'s guesses, and the finished trees.

`control.Growth` in two kernels. One CTA holds one sequence; nothing is read back and nothing is allocated.

    grow_pass     records what the draft proposed for the last pass, then chooses the slots of the next: the best
                  `width` candidates that no slot evaluates, and below them `prefetch` levels of draft²'s
                  `prefetch_width` best guesses; writes the inputs of the draft's pass over them
    harvest_tree  records the last pass; the best nodes - 1 candidates become the tree; writes the target's inputs

Words as in control.py: a slot is a row that the draft evaluates (0 the catch-up token, 1 the root), a candidate a
child that an evaluated slot proposed. Candidate c of slot s has the index s * children + c: its parent needs no field.

State, for L slots, C children and W = ceil(L / 32) mask words (`GrowthState`):

    slots            int32 [5, B, L]   token, previous token, depth, parent (of a guess, else -1), candidate
    slot_masks       int32 [B, L, W]   the slots on the path to each slot, itself included
    slot_scores      fp32  [B, L]      log-probability of its path by the draft, -inf for a guess not confirmed
    candidates       int32 [3, B, L*C] token, slot that evaluates it (-1: none), node of the finished tree
    candidate_scores fp32  [B, L*C]    -inf: no candidate

The inputs of a model's pass over N rows: batch int32 [3, B, N] (token, position, position of the noise), masks
[B, N, words] and prefix [B], the committed rows that the pass sees. The tree: tree int32 [5, B, N] (token, parent,
depth, slot, origin); nodes that a row's tree lacks have the parent -1 and see the root alone.

A kernel is compiled for tile sizes alone. It takes the other settings of a tree at run time, and none of its loops over
them is unrolled. So trees share compiled kernels, and no setting makes compilation long.

The best few are found by taking the greatest of int64 keys again and again: the score as an integer of the same order
in the high word, and in the low word whatever decides a tie as control.py's heaps do (candidates: lower index first;
guesses: higher slot, then higher token). A key also says what it stands for, so nothing is gathered to find out.
For the N - 1 nodes of a tree that would be long: there a bisection finds the score that parts them from the rest, and
each of the few that are left counts how many go before it. (`tl.topk` would serve for both, but takes a minute and more
to compile at these sizes.)

Between a store and a load of the same memory by other threads of the CTA stands a barrier.
Bytes: the state, some tens of KB at most, out of L1 and L2. What counts is the chain of dependent loads and barriers.
"""

import math
from dataclasses import dataclass
from functools import partial

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
from stagedspec.kernels.ngram_lookup import check_table, ranks, successors
from stagedspec.kernels.philox import gumbel_at

NEVER = tl.constexpr(float("-inf"))
NOTHING = tl.constexpr(-(2**63))  # below every key
TOKEN_BITS = tl.constexpr(21)  # of a guess's key; slots take the 10 above
TOKEN_MASK = tl.constexpr(2**21 - 1)
GUESSED = tl.constexpr(2)  # origin, as control.NGRAM
DRAFTED = tl.constexpr(1)

# Fields of `slots`, of `candidates`, of `batch`, of `tree`.
TOKEN = tl.constexpr(0)
PREVIOUS, DEPTH, PARENT, CANDIDATE = (tl.constexpr(field) for field in (1, 2, 3, 4))
SLOT, NODE = tl.constexpr(1), tl.constexpr(2)
POSITION, NOISE = tl.constexpr(1), tl.constexpr(2)
TREE_PARENT, TREE_DEPTH, TREE_SLOT, TREE_ORIGIN = (tl.constexpr(field) for field in (1, 2, 3, 4))

BLOCK = 512  # positions of the sequence compared at once: a block is a round trip to L2
MAX_CANDIDATES = 16384
# The least and most that tiles hold: smaller trees share compiled kernels, larger ones loop.
LEAST_CANDIDATES, LEAST_NODES, LEAST_WORDS = 512, 16, 2
MOST_OPTIONS = 4096  # of draft², for a level of guesses
MOST_RECORDED = 2048  # candidates recorded together
MOST_RANKS = 128  # of one slot
MOST_PLACED = 2048  # candidates put into a tree together
MOST_COMPARED = 4096  # pairs of nodes
MOST_SEARCHED = 8192  # contexts times positions of the sequence
MAX_VOCAB = 2**21 - 1
# On these architectures the kernels spill without `most_registers`.
GROW_SPILLING, HARVEST_SPILLING = (90, 100), (80, 89, 90, 100, 120)


# ---------------------------------------------------------------- keys


@triton.jit
def _flip(b_bits):
    """Between the bits of an fp32 and an int32 of the same order; its own inverse."""
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


@triton.jit
def _pack(b_score, b_low):
    """int64 keys that order by score, then by b_low, 0 to 2**31 - 1."""
    b_high = _flip(b_score.to(tl.int32, bitcast=True))
    return (b_high.to(tl.int64) << 32) | b_low.to(tl.int64)


@triton.jit
def _reversed(b_low):
    """2**31 - 1 - b_low: lower ones first. Its own inverse."""
    return b_low ^ 0x7FFFFFFF


@triton.jit
def _score_of(b_key):
    return _flip((b_key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _low_of(b_key):
    return (b_key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _best(b_keys, count, LANES: tl.constexpr):
    """The `count` greatest of distinct keys [n], descending: [LANES], NOTHING where there are no more."""
    i_lane = tl.arange(0, LANES)
    b_best = tl.full([LANES], NOTHING, tl.int64)
    for i in range(count):
        best = tl.max(b_keys, 0)
        b_best = tl.where(i_lane == i, best, b_best)
        b_keys = tl.where(b_keys == best, NOTHING, b_keys)
    return b_best


@triton.jit
def _parting(b_order, count):
    """The greatest t such that at least `count` of b_order uint32 [n] are t or more."""
    part = tl.zeros([], tl.uint32)
    bit = tl.full([], 1 << 31, tl.uint32)
    while bit != 0:
        known = tl.sum((b_order >= (part | bit)).to(tl.int32), 0)
        part = tl.where(known >= count, part | bit, part)
        bit = tl.where(known == count, 0, bit >> 1).to(tl.uint32)  # exactly those: no need to be more precise
    return part


# ---------------------------------------------------------------- slots


@triton.jit
def _write_slots(
    p_slots, p_masks, p_scores, p_batch, p_batch_masks,
    i_slot, i_node, b_inside, b_token, b_previous, b_depth, b_parent, b_candidate, b_score, b_mask,
    length, count, slots, words, WORDS_BLOCK: tl.constexpr,
):  # fmt: skip
    """New slots [K] and the rows i_node of the draft's pass that evaluate them; b_mask [K, WORDS_BLOCK]."""
    i_row, rows = tl.program_id(0), tl.num_programs(0)
    field = rows * slots
    p_slot = p_slots + i_row * slots + i_slot
    tl.store(p_slot + TOKEN * field, b_token, mask=b_inside)
    tl.store(p_slot + PREVIOUS * field, b_previous, mask=b_inside)
    tl.store(p_slot + DEPTH * field, b_depth, mask=b_inside)
    tl.store(p_slot + PARENT * field, b_parent, mask=b_inside)
    tl.store(p_slot + CANDIDATE * field, b_candidate, mask=b_inside)
    tl.store(p_scores + i_row * slots + i_slot, b_score, mask=b_inside)
    field = rows * count
    p_node = p_batch + i_row * count + i_node
    tl.store(p_node + TOKEN * field, tl.maximum(b_token, 0), mask=b_inside)
    tl.store(p_node + POSITION * field, tl.maximum(length - 1 + b_depth, 0), mask=b_inside)
    tl.store(p_node + NOISE * field, tl.maximum(length + b_depth, 0), mask=b_inside)
    i_word = tl.arange(0, WORDS_BLOCK)
    b_words = b_inside[:, None] & (i_word < words)[None, :]
    tl.store(p_masks + (i_row * slots + i_slot)[:, None] * words + i_word[None, :], b_mask, mask=b_words)
    tl.store(p_batch_masks + (i_row * count + i_node)[:, None] * words + i_word[None, :], b_mask, mask=b_words)


@triton.jit
def _add_slots(
    p_slots, p_masks, p_scores, p_batch, p_batch_masks,
    i_slot, i_node, b_inside, b_token, b_above, b_parent, b_candidate, b_score,
    length, count, slots, words, WORDS_BLOCK: tl.constexpr,
):  # fmt: skip
    """New slots [K] below the slots b_above [K]; returns their previous tokens and depths."""
    i_row, rows = tl.program_id(0), tl.num_programs(0)
    p_above = p_slots + i_row * slots + b_above
    b_previous = tl.load(p_above + TOKEN * rows * slots, mask=b_inside, other=0)
    b_depth = tl.load(p_above + DEPTH * rows * slots, mask=b_inside, other=0) + 1
    i_word = tl.arange(0, WORDS_BLOCK)[None, :]
    b_words = b_inside[:, None] & (i_word < words)
    b_mask = tl.load(p_masks + (i_row * slots + b_above)[:, None] * words + i_word, mask=b_words, other=0)
    b_mask |= tl.where(i_word == (i_slot >> 5)[:, None], (1 << (i_slot & 31))[:, None], 0)
    _write_slots(
        p_slots, p_masks, p_scores, p_batch, p_batch_masks,
        i_slot, i_node, b_inside, b_token, b_previous, b_depth, b_parent, b_candidate, b_score, b_mask,
        length, count, slots, words, WORDS_BLOCK,
    )  # fmt: skip
    return b_previous, b_depth


# ---------------------------------------------------------------- recording


@triton.jit
def _record(
    p_names, p_values, p_slots, p_scores, p_candidates, p_candidate_scores, first, number, is_guess, start, count,
    given, slots, max_depth, floor, CHILDREN: tl.constexpr, RECORDED: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Notes the candidates of slots first .. first + number, of the pass of `count` slots that began at slot start."""
    i_row, rows = tl.program_id(0), tl.num_programs(0)
    field = rows * slots
    p_candidate = p_candidates + i_row * slots * CHILDREN
    p_candidate_score = p_candidate_scores + i_row * slots * CHILDREN
    every = rows * slots * CHILDREN
    for i_first in range(0, number, RECORDED):
        i_lane = i_first + tl.arange(0, RECORDED)  # [K]
        b_inside = i_lane < number
        i_slot = first + i_lane
        p_slot = p_slots + i_row * slots + i_slot
        p_score = p_scores + i_row * slots + i_slot
        b_depth = tl.load(p_slot + DEPTH * field, mask=b_inside, other=max_depth)
        b_score = tl.load(p_score, mask=b_inside, other=NEVER)
        if is_guess:
            # A guess is confirmed where its parent, evaluated in the same pass, proposes it too.
            b_token = tl.load(p_slot + TOKEN * field, mask=b_inside, other=-1)
            b_parent = tl.load(p_slot + PARENT * field, mask=b_inside, other=-1)
            b_match = tl.full([RECORDED], -1, tl.int32)
            b_score = tl.full([RECORDED], NEVER, tl.float32)
            for i_child in range(0, CHILDREN, RANKS):
                i_rank = i_child + tl.arange(0, RANKS)[None, :]
                i_known = b_parent[:, None] * CHILDREN + i_rank  # [K, RANKS]
                b_known = (b_parent >= 0)[:, None] & (i_rank < CHILDREN)
                b_known_token = tl.load(p_candidate + TOKEN * every + i_known, mask=b_known, other=-1)
                b_known_score = tl.load(p_candidate_score + i_known, mask=b_known, other=NEVER)
                b_same = b_known & (b_known_token == b_token[:, None]) & (b_known_score > NEVER)
                b_match = tl.maximum(b_match, tl.max(tl.where(b_same, i_known, -1), 1))
                b_score = tl.maximum(b_score, tl.max(tl.where(b_same, b_known_score, NEVER), 1))
            b_confirmed = b_match >= 0
            tl.store(p_candidate + SLOT * every + b_match, i_slot, mask=b_confirmed)
            tl.store(p_slot + CANDIDATE * field, b_match, mask=b_confirmed)
            tl.store(p_score, b_score, mask=b_confirmed)
        b_alive = b_inside & (b_score > NEVER) & (b_depth < max_depth)
        for i_child in range(0, CHILDREN, RANKS):
            i_rank = i_child + tl.arange(0, RANKS)[None, :]
            b_given = b_inside[:, None] & (i_rank < given)
            i_given = (i_row * count + i_slot - start)[:, None] * given + i_rank
            b_name = tl.load(p_names + i_given, mask=b_given, other=0).to(tl.int32)
            b_value = tl.load(p_values + i_given, mask=b_given, other=NEVER)
            b_new = b_score[:, None] + b_value
            b_end = tl.min(tl.where(b_new > floor, CHILDREN + RANKS, i_rank), 1)
            b_new = tl.where(b_alive[:, None] & (i_rank < b_end[:, None]), b_new, NEVER)
            b_alive &= b_end == CHILDREN + RANKS  # from the first that is too unlikely on, all are
            i_new = i_slot[:, None] * CHILDREN + i_rank
            b_written = b_inside[:, None] & (i_rank < CHILDREN)
            tl.store(p_candidate + TOKEN * every + i_new, b_name, mask=b_written)
            tl.store(p_candidate + SLOT * every + i_new, tl.full([RECORDED, RANKS], -1, tl.int32), mask=b_written)
            tl.store(p_candidate_score + i_new, b_new, mask=b_written)


@triton.jit
def _record_pass(
    p_names, p_values, p_slots, p_scores, p_candidates, p_candidate_scores, start, record, given, prefetch,
    prefetch_width, slots, max_depth, floor, CHILDREN: tl.constexpr, RECORDED: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Level by level, so that a guess's parent has its candidates before the guess looks among them."""
    count = record + prefetch * prefetch_width
    first, number = start, record
    for level in range(prefetch + 1):
        _record(
            p_names, p_values, p_slots, p_scores, p_candidates, p_candidate_scores, first, number, level > 0, start,
            count, given, slots, max_depth, floor, CHILDREN, RECORDED, RANKS,
        )  # fmt: skip
        tl.debug_barrier()
        first, number = first + number, prefetch_width


# ---------------------------------------------------------------- the kernels


@triton.jit(
    do_not_specialize=(
        "stride", "start", "record", "given", "width", "prefetch", "prefetch_width", "slots", "words", "max_depth",
    )
)  # fmt: skip
def grow_pass_kernel(
    p_tokens,  # [B, S]
    p_lengths,  # [B]
    p_seeds,  # [B] int64
    p_streams,  # [B]
    p_keys,  # the table, as in ngram_lookup
    p_rows,
    p_table_tokens,
    p_table_logprobs,
    p_names,  # [B, pass, given], what the draft proposed in the last pass
    p_values,
    p_slots,  # state, as above
    p_masks,
    p_scores,
    p_candidates,
    p_candidate_scores,
    p_batch,  # [3, B, N]
    p_batch_masks,  # [B, N, W]
    p_prefix,  # [B]
    stride,
    vocab_size,
    hash_slots,
    start,  # first slot of the pass to record
    record,  # slots of that pass that are no guesses
    given,  # children that the draft proposed for each
    width,
    prefetch,
    prefetch_width,
    slots,
    words,
    max_depth,
    floor,
    FIRST: tl.constexpr,  # the first pass: there is none to record
    GUESSES: tl.constexpr,  # whether prefetch > 0
    SAMPLED: tl.constexpr,
    SUCCESSORS: tl.constexpr,
    CHILDREN: tl.constexpr,
    WORDS_BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # of a tile of slots that are chosen together
    RECORDED: tl.constexpr,  # of a tile of slots that are recorded together
    RANKS: tl.constexpr,  # of a tile of children
    NGRAM_RANKS: tl.constexpr,  # of a tile of draft²'s options
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row, rows = tl.program_id(0), tl.num_programs(0)
    i_lane = tl.arange(0, LANES)
    length = tl.load(p_lengths + i_row)
    p_sequence = p_tokens + i_row * stride
    tl.store(p_prefix + i_row, tl.maximum(length - 2, 0))

    if FIRST:
        begin = start
        chosen = 2
        count = chosen + prefetch * prefetch_width
        b_parents = i_lane == 1  # draft² looks below the root
        b_inside = i_lane < 2
        last = tl.load(p_sequence + length - 1)
        previous = tl.load(p_sequence + length - 2, mask=length > 1, other=-1)
        b_token = tl.where(b_parents, last, tl.maximum(previous, 0))
        b_previous = tl.where(b_parents, previous, -1)
        b_depth = i_lane - 1
        b_score = tl.where(b_parents, 0.0, NEVER)
        b_none = tl.full([LANES], -1, tl.int32)
        b_root = tl.where(b_parents, tl.where(previous >= 0, 3, 2), 1)
        b_mask = tl.where(tl.arange(0, WORDS_BLOCK)[None, :] == 0, b_root[:, None], 0)
        _write_slots(
            p_slots, p_masks, p_scores, p_batch, p_batch_masks,
            i_lane, i_lane, b_inside, b_token, b_previous, b_depth, b_none, b_none, b_score, b_mask,
            length, count, slots, words, WORDS_BLOCK,
        )  # fmt: skip
    else:
        _record_pass(
            p_names, p_values, p_slots, p_scores, p_candidates, p_candidate_scores, start, record, given, prefetch,
            prefetch_width, slots, max_depth, floor, CHILDREN, RECORDED, RANKS,
        )  # fmt: skip
        begin = start + record + prefetch * prefetch_width
        chosen = width
        count = chosen + prefetch * prefetch_width
        b_parents = i_lane < width
        # The best open candidates: no slot evaluates them, and their children would not be too deep.
        every = rows * slots * CHILDREN
        p_candidate = p_candidates + i_row * slots * CHILDREN
        i_candidate = tl.arange(0, CANDIDATES)
        b_known = i_candidate < begin * CHILDREN
        b_known_score = tl.load(p_candidate_scores + i_row * slots * CHILDREN + i_candidate, mask=b_known, other=NEVER)
        b_slot = tl.load(p_candidate + SLOT * every + i_candidate, mask=b_known, other=0)
        p_depth = p_slots + DEPTH * rows * slots + i_row * slots + i_candidate // CHILDREN
        b_above_depth = tl.load(p_depth, mask=b_known, other=max_depth)
        b_open = (b_known_score > NEVER) & (b_slot < 0) & (b_above_depth < max_depth - 1)
        b_keys = tl.where(b_open, _pack(b_known_score, _reversed(i_candidate)), NOTHING)
        b_best = _best(b_keys, width, LANES)
        b_found = b_parents & (b_best != NOTHING)
        b_candidate = tl.where(b_found, _reversed(_low_of(b_best)), -1)
        b_score = tl.where(b_found, _score_of(b_best), NEVER)
        b_token = tl.load(p_candidate + TOKEN * every + b_candidate, mask=b_found, other=0)
        b_above = tl.where(b_found, b_candidate // CHILDREN, 0)
        tl.debug_barrier()
        tl.store(p_candidate + SLOT * every + b_candidate, begin + i_lane, mask=b_found)
        b_none = tl.full([LANES], -1, tl.int32)
        b_previous, b_depth = _add_slots(
            p_slots, p_masks, p_scores, p_batch, p_batch_masks,
            begin + i_lane, i_lane, b_parents, b_token, b_above, b_none, b_candidate, b_score,
            length, count, slots, words, WORDS_BLOCK,
        )  # fmt: skip

    if GUESSES:
        i_slot = begin + i_lane
        if SAMPLED:
            seed = tl.load(p_seeds + i_row)
            stream = tl.load(p_streams + i_row).to(tl.int32)
        for level in range(prefetch):
            tl.debug_barrier()
            b_parents &= (b_depth < max_depth - 1) & (b_token >= 0)
            b_names, b_gains = successors(
                p_sequence, length, b_previous, tl.where(b_parents, b_token, -1),
                p_keys, p_rows, p_table_tokens, p_table_logprobs, vocab_size, hash_slots,
                SUCCESSORS, NGRAM_RANKS, BLOCK,
            )  # fmt: skip
            b_value = b_score[:, None] + b_gains  # [LANES, NGRAM_RANKS]
            if SAMPLED:
                b_value += gumbel_at(tl.maximum(b_names, 0), seed, stream, (length + b_depth)[:, None])
            b_low = (i_slot << TOKEN_BITS)[:, None] | tl.maximum(b_names, 0)
            b_options = tl.where(b_parents[:, None] & (b_names >= 0), _pack(b_value, b_low), NOTHING)
            b_best = _best(tl.reshape(b_options, [LANES * NGRAM_RANKS]), prefetch_width, LANES)
            b_inside = i_lane < prefetch_width
            b_parents = b_inside & (b_best != NOTHING)
            b_parent = tl.where(b_parents, _low_of(b_best) >> TOKEN_BITS, -1)
            b_token = tl.where(b_parents, _low_of(b_best) & TOKEN_MASK, -1)
            b_score = _score_of(b_best)
            i_node = chosen + level * prefetch_width + i_lane
            i_slot = begin + i_node
            b_none = tl.full([LANES], -1, tl.int32)
            b_unknown = tl.full([LANES], NEVER, tl.float32)
            b_previous, b_depth = _add_slots(
                p_slots, p_masks, p_scores, p_batch, p_batch_masks,
                i_slot, i_node, b_inside, b_token, tl.maximum(b_parent, 0), b_parent, b_none, b_unknown,
                length, count, slots, words, WORDS_BLOCK,
            )  # fmt: skip


@triton.jit
def _order(p_known_score, i_candidate, known):
    """The scores of candidates as uint32 of the same order, 0 where there is none."""
    b_score = tl.load(p_known_score + i_candidate, mask=i_candidate < known, other=NEVER)
    b_bits = _flip(b_score.to(tl.int32, bitcast=True)) ^ -(2**31)
    return tl.where(b_score > NEVER, b_bits, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _taken(p_taken, p_known_score, i_place, taken):
    """The candidates at places of the list of those taken, and their keys: NOTHING beyond its end."""
    b_found = i_place < taken
    b_candidate = tl.load(p_taken + i_place, mask=b_found, other=0)
    b_score = tl.load(p_known_score + b_candidate, mask=b_found, other=NEVER)
    return b_candidate, tl.where(b_found, _pack(b_score, _reversed(b_candidate)), NOTHING)


@triton.jit(
    do_not_specialize=(
        "stride", "start", "record", "given", "prefetch", "prefetch_width", "slots", "max_depth", "nodes", "words",
    )
)  # fmt: skip
def harvest_tree_kernel(
    p_tokens,  # [B, S]
    p_lengths,  # [B]
    p_names,  # [B, pass, given]
    p_values,
    p_slots,
    p_scores,
    p_candidates,
    p_candidate_scores,
    p_tree,  # [5, B, N]
    p_batch,  # [3, B, N]
    p_batch_masks,  # [B, N, words]
    p_prefix,  # [B]
    stride,
    start,
    record,
    given,
    prefetch,
    prefetch_width,
    slots,
    max_depth,
    nodes,
    words,
    floor,
    GROWN: tl.constexpr,  # whether nodes > 1
    CHILDREN: tl.constexpr,
    WORDS_BLOCK: tl.constexpr,
    RECORDED: tl.constexpr,
    RANKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PLACED: tl.constexpr,  # candidates that get their places among those taken at once
    NODES_BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,  # nodes that all are compared with at once
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row, rows = tl.program_id(0), tl.num_programs(0)
    length = tl.load(p_lengths + i_row)
    tl.store(p_prefix + i_row, length - 1)

    # Node 0: the last committed token.
    field = rows * nodes
    p_node = p_tree + i_row * nodes
    p_input = p_batch + i_row * nodes
    root = tl.load(p_tokens + i_row * stride + length - 1)
    tl.store(p_node + TOKEN * field, root)
    tl.store(p_node + TREE_PARENT * field, 0)
    tl.store(p_node + TREE_DEPTH * field, 0)
    tl.store(p_node + TREE_SLOT * field, 1)
    tl.store(p_node + TREE_ORIGIN * field, 0)
    tl.store(p_input + TOKEN * field, root)
    tl.store(p_input + POSITION * field, length - 1)
    tl.store(p_input + NOISE * field, length)
    i_word = tl.arange(0, WORDS_BLOCK)
    tl.store(p_batch_masks + i_row * nodes * words + i_word, (i_word == 0).to(tl.int32), mask=i_word < words)

    if GROWN:
        _record_pass(
            p_names, p_values, p_slots, p_scores, p_candidates, p_candidate_scores, start, record, given, prefetch,
            prefetch_width, slots, max_depth, floor, CHILDREN, RECORDED, RANKS,
        )  # fmt: skip
        every = rows * slots * CHILDREN
        p_candidate = p_candidates + i_row * slots * CHILDREN
        p_known_score = p_candidate_scores + i_row * slots * CHILDREN
        known = (start + record + prefetch * prefetch_width) * CHILDREN
        b_every = _order(p_known_score, tl.arange(0, CANDIDATES), known)
        taken = tl.minimum(tl.sum((b_every > 0).to(tl.int32), 0), nodes - 1)
        # All scores above the one that parts the best from the rest, and the first of those that equal it.
        part = _parting(b_every, taken)
        above, at = tl.zeros([], tl.int32), tl.sum((b_every > part).to(tl.int32), 0)
        for i_first in range(0, known, PLACED):
            i_candidate = i_first + tl.arange(0, PLACED)
            b_order = _order(p_known_score, i_candidate, known)
            b_above_part, b_at_part = b_order > part, (b_order == part) & (b_order > 0)
            b_above_place = above + tl.cumsum(b_above_part.to(tl.int32), 0) - 1
            b_at_place = at + tl.cumsum(b_at_part.to(tl.int32), 0) - 1
            b_place = tl.where(b_above_part, b_above_place, b_at_place)
            b_taken = b_above_part | (b_at_part & (b_at_place < taken))
            tl.store(p_node + 1 + b_place, i_candidate, mask=b_taken)  # for a moment, in place of tokens
            above += tl.sum(b_above_part.to(tl.int32), 0)
            at += tl.sum(b_at_part.to(tl.int32), 0)
        tl.debug_barrier()
        i_place = tl.arange(0, NODES_BLOCK)
        b_found = i_place < taken
        b_candidate, b_key = _taken(p_node + 1, p_known_score, i_place, taken)
        b_rank = tl.zeros([NODES_BLOCK], tl.int32)
        for i_first in range(0, taken, COMPARED):
            _, b_other = _taken(p_node + 1, p_known_score, i_first + tl.arange(0, COMPARED), taken)
            b_before = b_other[:, None] > b_key[None, :]  # [COMPARED, n]: the first goes before the second
            b_rank += tl.sum(b_before.to(tl.int32), 0)
        i_node = 1 + tl.where(b_found, b_rank, i_place)
        b_inside = i_node < nodes
        tl.debug_barrier()
        b_above = b_candidate // CHILDREN
        tl.store(p_candidate + NODE * every + b_candidate, i_node, mask=b_found)
        b_token = tl.load(p_candidate + TOKEN * every + b_candidate, mask=b_found, other=0)
        b_slot = tl.load(p_candidate + SLOT * every + b_candidate, mask=b_found, other=-1)
        p_slot = p_slots + i_row * slots
        b_guess = tl.load(p_slot + PARENT * rows * slots + b_slot, mask=b_slot >= 0, other=-1)
        b_depth = tl.load(p_slot + DEPTH * rows * slots + b_above, mask=b_found, other=-1) + 1
        b_proposal = tl.load(p_slot + CANDIDATE * rows * slots + b_above, mask=b_found, other=-1)
        tl.debug_barrier()
        b_parent = tl.load(p_candidate + NODE * every + b_proposal, mask=b_proposal >= 0, other=0)
        b_parent = tl.where(b_found, b_parent, -1)
        tl.store(p_node + TOKEN * field + i_node, b_token, mask=b_inside)
        tl.store(p_node + TREE_PARENT * field + i_node, b_parent, mask=b_inside)
        tl.store(p_node + TREE_DEPTH * field + i_node, b_depth, mask=b_inside)
        tl.store(p_node + TREE_SLOT * field + i_node, b_slot, mask=b_inside)
        b_origin = tl.where(b_found, tl.where(b_guess >= 0, GUESSED, DRAFTED), 0)
        tl.store(p_node + TREE_ORIGIN * field + i_node, b_origin, mask=b_inside)
        tl.store(p_input + TOKEN * field + i_node, b_token, mask=b_inside)
        tl.store(p_input + POSITION * field + i_node, length - 1 + b_depth, mask=b_inside)
        tl.store(p_input + NOISE * field + i_node, length + b_depth, mask=b_inside)
        tl.debug_barrier()
        # Up the tree from every node at once, a level a turn.
        b_at = tl.where(b_found, i_node, 0)
        b_mask = tl.where(i_word[None, :] == 0, 1, 0) | tl.zeros([NODES_BLOCK, WORDS_BLOCK], tl.int32)
        for _ in range(tl.minimum(max_depth, nodes - 1)):
            b_mask |= tl.where(i_word[None, :] == (b_at >> 5)[:, None], (1 << (b_at & 31))[:, None], 0)
            b_at = tl.load(p_node + TREE_PARENT * field + b_at, mask=b_at > 0, other=0)
        i_out = (i_row * nodes + i_node)[:, None] * words + i_word[None, :]
        tl.store(p_batch_masks + i_out, b_mask, mask=b_inside[:, None] & (i_word < words)[None, :])


# ---------------------------------------------------------------- state


@dataclass(frozen=True)
class GrowthState:
    """What a step's growth keeps on the device (the module's docstring has the fields)."""

    slots: torch.Tensor
    slot_masks: torch.Tensor
    slot_scores: torch.Tensor
    candidates: torch.Tensor
    candidate_scores: torch.Tensor

    @classmethod
    def of(cls, batch: int, slots: int, children: int, device: torch.device) -> "GrowthState":
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        slots = max(slots, 1)
        return cls(
            zeros(5, batch, slots),
            zeros(batch, slots, words(slots)),
            zeros(batch, slots, dtype=torch.float32),
            zeros(3, batch, slots * children),
            zeros(batch, slots * children, dtype=torch.float32),
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.slots, self.slot_masks, self.slot_scores, self.candidates, self.candidate_scores


def words(bits: int) -> int:
    """The int32 words of a mask of so many rows."""
    return -(-bits // 32)


def _blocks(
    width: int, prefetch: int, prefetch_width: int, children: int, slots: int, nodes: int = 1
) -> dict[str, int]:
    """Tile sizes of a setting: powers of two. nodes: of the tree to be harvested, if one is."""
    up = triton.next_power_of_2
    lanes = up(max(width, prefetch_width if prefetch else 1, 2))
    ranks = min(up(max(children, 2)), MOST_RANKS)
    return {
        "LANES": lanes,
        "RECORDED": min(lanes, MOST_RECORDED // ranks),
        "RANKS": ranks,
        "CANDIDATES": up(max(slots * children, lanes, nodes - 1, LEAST_CANDIDATES)),
    }


def pass_constants(
    width: int, prefetch: int, prefetch_width: int, children: int, slots: int, successors_: int, block: int
) -> dict[str, object]:
    """The compile-time arguments of `grow_pass_kernel` that a tree, a table and its settings decide."""
    blocks = _blocks(width, prefetch, prefetch_width, children, slots)
    return blocks | {
        "GUESSES": prefetch > 0,
        "CHILDREN": children,
        "WORDS_BLOCK": max(triton.next_power_of_2(words(slots)), LEAST_WORDS),
        "SUCCESSORS": successors_,
        "NGRAM_RANKS": ranks(successors_),
        "BLOCK": min(block, MOST_SEARCHED // blocks["LANES"]),
    }


def harvest_constants(
    width: int, prefetch: int, prefetch_width: int, children: int, slots: int, nodes: int
) -> dict[str, object]:
    """The compile-time arguments of `harvest_tree_kernel` that a tree decides."""
    up = triton.next_power_of_2
    blocks = _blocks(width, prefetch, prefetch_width, children, slots, nodes)
    nodes_block = max(up(nodes - 1), LEAST_NODES)
    return {
        "GROWN": nodes > 1,
        "CHILDREN": children,
        "RECORDED": blocks["RECORDED"],
        "RANKS": blocks["RANKS"],
        "CANDIDATES": blocks["CANDIDATES"],
        "PLACED": min(blocks["CANDIDATES"], MOST_PLACED),
        "NODES_BLOCK": nodes_block,
        "COMPARED": min(nodes_block, MOST_COMPARED // nodes_block),
        "WORDS_BLOCK": max(up(words(nodes)), LEAST_WORDS),
    }


def tile(op: str, config) -> int:
    """The candidates that grow_pass or harvest_tree looks at together, by which its settings are kept."""
    nodes = config.nodes if op == "harvest_tree" else 1
    tree = config.width, config.prefetch, config.prefetch_width, config.children, config.slots
    return _blocks(*tree, nodes)["CANDIDATES"]


def default_warps(op: str, size: int) -> int:
    most = 8 if op == "harvest_tree" else 16  # which spills with 16
    return min(most, 4 if size <= 2048 else 8 if size <= 4096 else 16)


def pass_warps(warps: int, constants: dict[str, int]) -> int:
    """Of grow_pass: more than are set where draft²'s options would not fit into their registers."""
    options = constants["LANES"] * constants["NGRAM_RANKS"]
    return warps if options < 2048 else max(warps, 16 if options >= 4096 else 8)


def candidates(op: str, shape: tuple[int], device: torch.device) -> list[dict[str, int]]:
    """Settings of grow_pass or harvest_tree to try at the shape (tile of candidates,), the default first."""
    every = [{"warps": warps} for warps in (default_warps(op, *shape), 1, 2, 4, 8, 16)]
    if op == "grow_pass":
        every = [one | {"block": block} for block in (BLOCK, 256, 1024) for one in every]
    return [one for index, one in enumerate(every) if one not in every[:index]]


def _settings(op: str, size: int, device: torch.device) -> dict[str, int]:
    return config(op, (size,), device, partial(candidates, op))


# ---------------------------------------------------------------- operations


def _launch_pass(
    tokens, lengths, seeds, streams, keys, rows, table_tokens, table_logprobs, names, values,
    slots, slot_masks, slot_scores, candidates, candidate_scores, batch, batch_masks, prefix,
    vocab_size, start, record, floor, width, prefetch, prefetch_width, depth,
) -> None:  # fmt: skip
    count, size = slots.shape[1:]
    children = candidates.shape[2] // size
    successors_ = 0 if table_tokens is None else table_tokens.shape[1]
    tree = width, prefetch, prefetch_width, children, size
    settings = _settings("grow_pass", _blocks(*tree)["CANDIDATES"], tokens.device)
    constants = pass_constants(*tree, successors_, settings["block"])
    warps = pass_warps(settings["warps"], constants)
    launch_kernel(
        grow_pass_kernel,
        (count,),
        tokens, lengths, seeds, streams, keys, rows, table_tokens, table_logprobs, names, values,
        slots, slot_masks, slot_scores, candidates, candidate_scores, batch, batch_masks, prefix,
        tokens.shape[1], vocab_size, 0 if keys is None else keys.shape[0], start,
        record, 0 if names is None else names.shape[2], width, prefetch, prefetch_width, size, words(size), depth,
        floor, FIRST=names is None, SAMPLED=seeds is not None, **constants,
        num_warps=warps, maxnreg=most_registers(architecture(tokens.device), warps, GROW_SPILLING),
        **launch_options(tokens.device),
    )  # fmt: skip


_grow_pass = register(
    "grow_pass(Tensor tokens, Tensor lengths, Tensor? seeds, Tensor? streams, Tensor? keys, Tensor? rows, "
    "Tensor? table_tokens, Tensor? table_logprobs, Tensor? names, Tensor? values, Tensor(a!) slots, "
    "Tensor(b!) slot_masks, Tensor(c!) slot_scores, Tensor(d!) candidates, Tensor(e!) candidate_scores, "
    "Tensor(f!) batch, Tensor(g!) batch_masks, Tensor(h!) prefix, int vocab_size, int start, int record, float floor, "
    "int width, int prefetch, int prefetch_width, int depth) -> ()",
    _launch_pass,
)


def _launch_harvest(
    tokens, lengths, names, values, slots, slot_scores, candidates, candidate_scores, tree, batch, batch_masks, prefix,
    start, record, floor, width, prefetch, prefetch_width, depth,
) -> None:  # fmt: skip
    count, size = slots.shape[1:]
    children, nodes = candidates.shape[2] // size, tree.shape[2]
    constants = harvest_constants(width, prefetch, prefetch_width, children, size, nodes)
    warps = _settings("harvest_tree", constants["CANDIDATES"], tokens.device)["warps"]
    launch_kernel(
        harvest_tree_kernel,
        (count,),
        tokens, lengths, names, values, slots, slot_scores, candidates, candidate_scores,
        tree, batch, batch_masks, prefix, tokens.shape[1], start, record, 0 if names is None else names.shape[2],
        prefetch, prefetch_width, size, depth, nodes, words(nodes), floor, **constants,
        num_warps=warps, maxnreg=most_registers(architecture(tokens.device), warps, HARVEST_SPILLING),
        **launch_options(tokens.device),
    )  # fmt: skip


_harvest_tree = register(
    "harvest_tree(Tensor tokens, Tensor lengths, Tensor? names, Tensor? values, Tensor(a!) slots, "
    "Tensor(b!) slot_scores, Tensor(c!) candidates, Tensor(d!) candidate_scores, Tensor(e!) tree, Tensor(f!) batch, "
    "Tensor(g!) batch_masks, Tensor(h!) prefix, int start, int record, float floor, int width, int prefetch, "
    "int prefetch_width, int depth) -> ()",
    _launch_harvest,
)


def check_candidates(name: str, config) -> None:
    """Raises ValueError for a `TreeConfig` with more candidates than are held together."""
    size, children = max(config.slots, 1), config.children
    if size * children > MAX_CANDIDATES:
        raise ValueError(
            f"{name}: a tree may have at most {MAX_CANDIDATES} candidates on a GPU, got {size} draft evaluations with "
            f"{children} children each; use fewer passes, guesses or children"
        )


def check_options(name: str, config, table) -> None:
    """Raises ValueError for a `TreeConfig` and a table (or None) that give draft² too many options to choose from."""
    if config.prefetch and _options(config, 0 if table is None else table.successors) > MOST_OPTIONS:
        raise ValueError(
            f"{name}: draft² may have at most {MOST_OPTIONS} options a level on a GPU, got a table of "
            f"{0 if table is None else table.successors} successors, width {config.width} and prefetch_width "
            f"{config.prefetch_width}; lower one"
        )


def _options(config, successors: int) -> int:
    blocks = _blocks(config.width, config.prefetch, config.prefetch_width, config.children, config.slots)
    return blocks["LANES"] * ranks(successors)


def _check_state(name: str, state: GrowthState, batch: int, config, device: torch.device) -> None:
    check_candidates(name, config)
    size, children = max(config.slots, 1), config.children
    check_tensor(name, "slots", state.slots, (5, batch, size), torch.int32, device)
    check_tensor(name, "slot_masks", state.slot_masks, (batch, size, words(size)), torch.int32, device)
    check_tensor(name, "slot_scores", state.slot_scores, (batch, size), torch.float32, device)
    check_tensor(name, "candidates", state.candidates, (3, batch, size * children), torch.int32, device)
    check_tensor(name, "candidate_scores", state.candidate_scores, (batch, size * children), torch.float32, device)


def _check_proposals(name: str, number: int, config, batch: int, names, values, device: torch.device) -> None:
    """What the draft proposed in pass `number`."""
    shape = (batch, pass_size(config, number), None)
    check_tensor(name, "names", names, shape, (torch.int32, torch.int64), device)
    check_tensor(name, "values", values, tuple(names.shape), torch.float32, device)
    if not 1 <= names.shape[2] <= config.children:
        raise ValueError(f"{name}: names must hold 1 to {config.children} children, got {names.shape[2]}")


def pass_size(config, number: int) -> int:
    """The rows of draft pass `number`."""
    return (config.width if number else 2) + config.guesses


def pass_start(config, number: int) -> int:
    """The first slot of draft pass `number`."""
    return 2 + config.guesses + (number - 1) * pass_size(config, 1) if number else 0


def _floor(config) -> float:
    return math.log(config.node_floor) if config.node_floor else -math.inf


def grow_pass(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    state: GrowthState,
    config,
    number: int,
    proposed: tuple[torch.Tensor, torch.Tensor] | None,
    table,
    noise: tuple[torch.Tensor, torch.Tensor] | None,
    batch: torch.Tensor,
    batch_masks: torch.Tensor,
    prefix: torch.Tensor,
) -> None:
    """Records what the draft `proposed` in pass number - 1 and writes the inputs of pass `number`.

    tokens int32 [B, S], lengths int32 [B]: what is committed. config: a TreeConfig. proposed: tokens int32 or int64
    and log-probabilities fp32 [B, rows of the last pass, children], descending; None before pass 0. table: a
    `KatzTable`, or None. noise: seeds int64 [B] and streams int32 or int64 [B], or None when greedy. batch,
    batch_masks, prefix: see the module's docstring. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    name, device = "grow_pass", tokens.device
    check_runs(tokens, name)
    check_tensor(name, "tokens", tokens, (None, None), torch.int32, device)
    rows = tokens.shape[0]
    check_tensor(name, "lengths", lengths, (rows,), torch.int32, device)
    _check_state(name, state, rows, config, device)
    if not 0 <= number < config.passes:
        raise ValueError(f"{name}: a step has the passes 0 to {config.passes - 1}, got {number}")
    names, values = None, None
    if number:
        names, values = proposed if proposed is not None else (None, None)
        _check_proposals(name, number - 1, config, rows, names, values, device)
    *tensors, vocab_size = check_table(name, table, device)
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"{name}: the vocabulary may have at most {MAX_VOCAB} tokens, got {vocab_size}")
    check_options(name, config, table)
    seeds, streams = noise or (None, None)
    if noise is not None:
        check_tensor(name, "seeds", seeds, (rows,), torch.int64, device)
        check_tensor(name, "streams", streams, (rows,), (torch.int32, torch.int64), device)
    count = pass_size(config, number)
    check_tensor(name, "batch", batch, (3, rows, count), torch.int32, device)
    check_tensor(name, "batch_masks", batch_masks, (rows, count, words(config.slots)), torch.int32, device)
    check_tensor(name, "prefix", prefix, (rows,), torch.int32, device)
    _grow_pass(
        tokens, lengths, seeds, streams, *tensors, names, values, *state.tensors, batch, batch_masks, prefix,
        vocab_size, pass_start(config, max(number - 1, 0)), (config.width if number > 1 else 2) if number else 0,
        _floor(config), config.width, config.prefetch, config.prefetch_width, config.depth,
    )  # fmt: skip


def harvest_tree(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    state: GrowthState,
    config,
    proposed: tuple[torch.Tensor, torch.Tensor] | None,
    tree: torch.Tensor,
    batch: torch.Tensor,
    batch_masks: torch.Tensor,
    prefix: torch.Tensor,
) -> None:
    """Records what the draft `proposed` in the last pass and writes the finished trees and the target's inputs.

    Arguments as of `grow_pass`; with config.nodes 1 nothing is recorded, and the trees are roots. tree int32 [5, B, N].
    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    name, device = "harvest_tree", tokens.device
    check_runs(tokens, name)
    check_tensor(name, "tokens", tokens, (None, None), torch.int32, device)
    rows, nodes = tokens.shape[0], config.nodes
    check_tensor(name, "lengths", lengths, (rows,), torch.int32, device)
    _check_state(name, state, rows, config, device)
    names, values, number = None, None, max(config.passes - 1, 0)
    if nodes > 1:
        names, values = proposed if proposed is not None else (None, None)
        _check_proposals(name, number, config, rows, names, values, device)
    check_tensor(name, "tree", tree, (5, rows, nodes), torch.int32, device)
    check_tensor(name, "batch", batch, (3, rows, nodes), torch.int32, device)
    check_tensor(name, "batch_masks", batch_masks, (rows, nodes, words(nodes)), torch.int32, device)
    check_tensor(name, "prefix", prefix, (rows,), torch.int32, device)
    _harvest_tree(
        tokens, lengths, names, values, state.slots, state.slot_scores, state.candidates, state.candidate_scores,
        tree, batch, batch_masks, prefix, pass_start(config, number), config.width if number else 2,
        _floor(config), config.width, config.prefetch, config.prefetch_width, config.depth,
    )  # fmt: skip
