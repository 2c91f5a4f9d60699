"""The kernel of `grow_pass`: chooses the slots of the draft's next pass (see the package)."""

import triton
import triton.language as tl

from stagedspec.kernels.common.constants import VOCAB_BITS
from stagedspec.kernels.grow_tree.record import NEVER, NOTHING, flip, pack, record_pass, reverse
from stagedspec.kernels.grow_tree.state import CANDIDATE, DEPTH, NOISE, PARENT, POSITION, PREVIOUS, SLOT, TOKEN
from stagedspec.kernels.ngram_lookup import successors
from stagedspec.kernels.philox import gumbel_at

TOKEN_BITS = tl.constexpr(VOCAB_BITS)  # of a guess's key; slots take the 10 above
TOKEN_MASK = tl.constexpr(2**VOCAB_BITS - 1)


@triton.jit
def _score_of(b_key):
    return flip((b_key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


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


# ---------------------------------------------------------------- the kernels


@triton.jit(
    do_not_specialize=(
        "stride", "start", "record", "given", "width", "prefetch", "prefetch_width", "slots", "words", "max_depth",
        "context",
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
    context,  # 1: draft² also guesses what the sequence says, 0: from its table alone
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
        record_pass(
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
        b_keys = tl.where(b_open, pack(b_known_score, reverse(i_candidate)), NOTHING)
        b_best = _best(b_keys, width, LANES)
        b_found = b_parents & (b_best != NOTHING)
        b_candidate = tl.where(b_found, reverse(_low_of(b_best)), -1)
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
                p_sequence, length * context, b_previous, tl.where(b_parents, b_token, -1),
                p_keys, p_rows, p_table_tokens, p_table_logprobs, vocab_size, hash_slots,
                SUCCESSORS, NGRAM_RANKS, BLOCK,
            )  # fmt: skip
            b_value = b_score[:, None] + b_gains  # [LANES, NGRAM_RANKS]
            if SAMPLED:
                b_value += gumbel_at(tl.maximum(b_names, 0), seed, stream, (length + b_depth)[:, None])
            b_low = (i_slot << TOKEN_BITS)[:, None] | tl.maximum(b_names, 0)
            b_options = tl.where(b_parents[:, None] & (b_names >= 0), pack(b_value, b_low), NOTHING)
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
