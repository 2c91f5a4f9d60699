"""Recording what the draft proposed for a pass, which both kernels begin with; and keys that order candidates."""

import triton
import triton.language as tl

from stagedspec.kernels.grow_tree.state import CANDIDATE, DEPTH, PARENT, SLOT, TOKEN

NEVER = tl.constexpr(float("-inf"))
NOTHING = tl.constexpr(-(2**63))  # below every key


@triton.jit
def flip(b_bits):
    """Between the bits of an fp32 and an int32 of the same order; its own inverse."""
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


@triton.jit
def pack(b_score, b_low):
    """int64 keys that order by score, then by b_low, 0 to 2**31 - 1."""
    b_high = flip(b_score.to(tl.int32, bitcast=True))
    return (b_high.to(tl.int64) << 32) | b_low.to(tl.int64)


@triton.jit
def reverse(b_low):
    """2**31 - 1 - b_low: lower ones first. Its own inverse."""
    return b_low ^ 0x7FFFFFFF


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
def record_pass(
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
