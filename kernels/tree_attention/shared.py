"""What the attention kernels share: bits of a mask, positions of nodes, queries, sums relative to a maximum."""

import triton
import triton.language as tl

# Integers that vary from launch to launch.
INTEGERS = ("N", "S", "first_bit", "tree_rows", "splits")


@triton.jit
def _bit_counts(word):
    """Set bits in every pair, nibble and byte of uint32 words, each in place."""
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return pairs, nibbles, (nibbles + (nibbles >> 4)) & 0x0F0F0F0F


@triton.jit
def popcount(word):
    # LLVM knows this form and makes one instruction of it.
    return ((_bit_counts(word)[2] * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _descend(counts, position, rank, step: tl.constexpr):
    """One step of `place_of_bit`: goes to the upper part if the lower holds fewer set bits than the rank."""
    low = ((counts >> position) & (2 * step - 1)).to(tl.int32)
    upper = rank >= low
    return position + tl.where(upper, step, 0).to(tl.uint32), rank - tl.where(upper, low, 0)


@triton.jit
def place_of_bit(word, rank):
    """The place of the set bit with `rank` set bits below it."""
    pairs, nibbles, bytes_ = _bit_counts(word)
    halves = (bytes_ + (bytes_ >> 8)) & 0x00FF00FF
    position = word & 0  # zeros, in Gluon too, where `zeros_like` lacks a layout
    position, rank = _descend(halves, position, rank, 16)
    position, rank = _descend(bytes_, position, rank, 8)
    position, rank = _descend(nibbles, position, rank, 4)
    position, rank = _descend(pairs, position, rank, 2)
    position, rank = _descend(word, position, rank, 1)
    return position.to(tl.int32)


@triton.jit
def mask_word(p_masks, nodes, i_word, ok, WORDS: tl.constexpr, PAST_L1: tl.constexpr):
    """PAST_L1: L1 may hold what lay there earlier."""
    p_words = p_masks + nodes * WORDS + i_word
    word = tl.load(p_words, mask=ok, other=0, cache_modifier=".cg" if PAST_L1 else "")
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def node_positions(p_masks, nodes, prefix, ok, WORDS: tl.constexpr, PAST_L1: tl.constexpr):
    """Positions of nodes, int32; -1 for a node that sees nothing."""
    count = popcount(mask_word(p_masks, nodes, 0, ok, WORDS, PAST_L1))
    for i_word in range(1, WORDS):
        count += popcount(mask_word(p_masks, nodes, i_word, ok, WORDS, PAST_L1))
    return tl.where(count > 0, prefix + count - 1, -1)


@triton.jit
def near_rows(
    p_masks,
    first_query,
    index,
    prefix,
    first_bit,
    tree_rows,
    queries,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    WINDOW: tl.constexpr,
    PAST_L1: tl.constexpr,
):
    """Where near keys lie, WINDOW of each query, one query after another; `index` counts from `first_query`.

    Returns rows, whether these are of the pass's qkv (else of the cache), and whether the query sees the key.
    """
    query = first_query + index // WINDOW  # node * GROUP + head in the group
    node, known = query // GROUP, query < queries
    position = node_positions(p_masks, node, prefix, known, WORDS, PAST_L1)
    key = position - (WINDOW - 1) + index % WINDOW  # its position
    rank = key - prefix
    zero = index & 0
    bits = zero.to(tl.uint32)  # the word that holds the key's bit,
    bit, rest, below = zero, zero, zero  # the first bit of that word, and the set bits of that word below the key's
    for i_word in tl.static_range(WORDS):
        word = mask_word(p_masks, node, i_word, known, WORDS, PAST_L1)
        above = below + popcount(word)
        here = (rank >= below) & (rank < above)
        bits = tl.where(here, word, bits)
        bit = tl.where(here, 32 * i_word, bit)
        rest = tl.where(here, rank - below, rest)
        below = above
    bit += place_of_bit(bits, rest)
    fresh = (rank >= 0) & (bit >= first_bit)
    row = tl.where(rank >= 0, tl.where(fresh, bit - first_bit, bit), tree_rows + key)
    return row, fresh, (key >= 0) & (position >= 0) & known


@triton.jit
def load_queries(p_q, rows, ok, dims, GROUP: tl.constexpr, D: tl.constexpr, QKV_STRIDE: tl.constexpr):
    """Queries [ROWS, D]; row = node * GROUP + head in the group."""
    p_rows = p_q + (rows // GROUP)[:, None] * QKV_STRIDE + (rows % GROUP)[:, None] * D + dims[None, :]
    return tl.load(p_rows, mask=ok[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def rescaled(b_sum, b_acc, b_max, top):
    """A sum [ROWS] and weighted values [ROWS, D] relative to `b_max`, relative to `top` instead."""
    weight = tl.exp2(b_max - tl.where(top == float("-inf"), 0.0, top))
    return weight * b_sum, weight[:, None] * b_acc


@triton.jit
def far_end(prefix, first_bit, N, WINDOW: tl.constexpr):
    """The position from which on no node of the pass sees a far key."""
    return tl.minimum(tl.maximum(prefix + first_bit + N - WINDOW, 0), prefix)
