"""The kernel of `harvest_tree`: the best candidates become the tree (see the package)."""

import triton
import triton.language as tl

from stagedspec.kernels.common.constants import DRAFT, NGRAM, ROOT_ALONE
from stagedspec.kernels.grow_tree.record import NEVER, NOTHING, flip, pack, record_pass, reverse
from stagedspec.kernels.grow_tree.state import (
    CANDIDATE,
    DEPTH,
    NODE,
    NOISE,
    PARENT,
    POSITION,
    SLOT,
    TOKEN,
    TREE_DEPTH,
    TREE_ORIGIN,
    TREE_PARENT,
    TREE_SLOT,
)

GUESSED, DRAFTED, ALONE = tl.constexpr(NGRAM), tl.constexpr(DRAFT), tl.constexpr(ROOT_ALONE)


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


@triton.jit
def _order(p_known_score, i_candidate, known):
    """The scores of candidates as uint32 of the same order, 0 where there is none."""
    b_score = tl.load(p_known_score + i_candidate, mask=i_candidate < known, other=NEVER)
    b_bits = flip(b_score.to(tl.int32, bitcast=True)) ^ -(2**31)
    return tl.where(b_score > NEVER, b_bits, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _taken(p_taken, p_known_score, i_place, taken):
    """The candidates at places of the list of those taken, and their keys: NOTHING beyond its end."""
    b_found = i_place < taken
    b_candidate = tl.load(p_taken + i_place, mask=b_found, other=0)
    b_score = tl.load(p_known_score + b_candidate, mask=b_found, other=NEVER)
    return b_candidate, tl.where(b_found, pack(b_score, reverse(b_candidate)), NOTHING)


@triton.jit(
    do_not_specialize=(
        "stride", "start", "record", "given", "prefetch", "prefetch_width", "slots", "max_depth", "nodes", "words",
    )
)  # fmt: skip
def harvest_tree_kernel(
    p_tokens,  # [B, S]
    p_lengths,  # [B]
    p_running,  # [B]
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
        record_pass(
            p_names, p_values, p_slots, p_scores, p_candidates, p_candidate_scores, start, record, given, prefetch,
            prefetch_width, slots, max_depth, floor, CHILDREN, RECORDED, RANKS,
        )  # fmt: skip
        every = rows * slots * CHILDREN
        p_candidate = p_candidates + i_row * slots * CHILDREN
        p_known_score = p_candidate_scores + i_row * slots * CHILDREN
        known = (start + record + prefetch * prefetch_width) * CHILDREN
        b_every = _order(p_known_score, tl.arange(0, CANDIDATES), known)
        most = tl.where(tl.load(p_running + i_row) == ALONE, 0, nodes - 1)
        taken = tl.minimum(tl.sum((b_every > 0).to(tl.int32), 0), most)
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
