"""Attention of a pass's nodes over the committed prefix and their own ancestors; appends the pass's K and V.

    out[n, h] = softmax(scale * q[n, h] . k[t, g])_t v[t, g]   over the positions t = 0 .. p(n), g = h's KV head

A node's mask holds its ancestors in the tree and itself, one bit a tree row; its position is
p = prefix + popcount(mask) - 1, and the key at position t >= prefix lies in the row of the mask's (t - prefix)-th bit.

A node's result has the same bits whatever stands beside it and wherever its ancestors lie. So what happens to a key
depends on its distance alone:

- *near* keys, positions (p - window, p]: any ancestor that may not be committed yet. Each node gathers its own, from
  the cache or from this pass's qkv, in order of position. A tile holds the keys of a few nodes one after another.
- *far* keys, positions <= p - window: one row of the cache for all nodes, in splits at absolute multiples of SPLIT.

Of the far part, keys and values are the wide left operand of the matrix products and the queries their narrow right
side, which is one family of matrix instructions for every number of nodes. A near tile has always one shape.
Keys that a node does not see, its neighbours' near keys too, have a weight of exactly zero and add exactly nothing.

Sums run over splits in ascending order, then the near part, each relative to the greatest score so far.

Two launches. The far one leaves (maximum, sum, weighted values) of each split in scratch; the near one adds the near
part and writes the result. With programmatic dependent launch the near one starts when the far one has seen the pass's
qkv complete, does its own part meanwhile, and waits only then. That it sees qkv rests on the far one's waiting in every
program before it lets anything start, and on the fence at its own beginning: what is complete lies in L2. PTX promises
as much only to the grid that waited.

Bytes: the keys and values of the prefix once, 2*L*H_kv*D elements a sequence (and a tile of queries), the qkv
and the appended rows; through L2 also the gathered near rows, 2*window*D a query, and the partial results,
8*(L/SPLIT)*D a query.

Chunks of a prompt have a kernel of their own, `_attend_prompt`: no node has ancestors that may still be dropped, so a
query meets blocks of keys at absolute multiples of their size, in ascending order, as in FlashAttention 2 (arXiv
2307.08691). Its bits are the same in any chunks and any batch, but not those of a pass of a tree. Every mode reads a
prompt the same way, so all modes start from the same keys and values.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from stagedspec.kernels.backends.select import MAX_HEAD_SIZE
from stagedspec.kernels.common.registry import (
    Scratch,
    architecture,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    most_registers,
    register,
)

WINDOW = 32  # near keys; more than the depth of any tree
MAX_NODES = 256
MAX_CHUNK = 1024
WARPS = 4
SPILLING = (80,)  # the near part's, see `most_registers`; heads wider than 64 spill everywhere
LOG2E = 1.4426950408889634
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------- bits of a mask


@triton.jit
def _bit_counts(word):
    """Set bits in every pair, nibble and byte of uint32 words, each in place."""
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return pairs, nibbles, (nibbles + (nibbles >> 4)) & 0x0F0F0F0F


@triton.jit
def _popcount(word):
    # LLVM knows this form and makes one instruction of it.
    return ((_bit_counts(word)[2] * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _descend(counts, position, rank, step: tl.constexpr):
    """One step of `_select`: goes to the upper part if the lower holds fewer set bits than the rank."""
    low = ((counts >> position) & (2 * step - 1)).to(tl.int32)
    upper = rank >= low
    return position + tl.where(upper, step, 0).to(tl.uint32), rank - tl.where(upper, low, 0)


@triton.jit
def _select(word, rank):
    """The place of the set bit with `rank` set bits below it."""
    pairs, nibbles, bytes_ = _bit_counts(word)
    halves = (bytes_ + (bytes_ >> 8)) & 0x00FF00FF
    position = tl.zeros_like(word)
    position, rank = _descend(halves, position, rank, 16)
    position, rank = _descend(bytes_, position, rank, 8)
    position, rank = _descend(nibbles, position, rank, 4)
    position, rank = _descend(pairs, position, rank, 2)
    position, rank = _descend(word, position, rank, 1)
    return position.to(tl.int32)


@triton.jit
def _word(p_masks, nodes, i_word, ok, WORDS: tl.constexpr):
    return tl.load(p_masks + nodes * WORDS + i_word, mask=ok, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _positions(p_masks, nodes, prefix, ok, WORDS: tl.constexpr):
    """Positions of nodes, int32; -1 for a node that sees nothing."""
    count = _popcount(_word(p_masks, nodes, 0, ok, WORDS))
    for i_word in range(1, WORDS):
        count += _popcount(_word(p_masks, nodes, i_word, ok, WORDS))
    return tl.where(count > 0, prefix + count - 1, -1)


# ---------------------------------------------------------------- the kernels


@triton.jit
def _queries(p_q, rows, ok, dims, GROUP: tl.constexpr, D: tl.constexpr, QKV_STRIDE: tl.constexpr):
    """Queries [ROWS, D]; row = node * GROUP + head in the group."""
    p_rows = p_q + (rows // GROUP)[:, None] * QKV_STRIDE + (rows % GROUP)[:, None] * D + dims[None, :]
    return tl.load(p_rows, mask=ok[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _rescaled(b_sum, b_acc, b_max, top):
    """A sum [ROWS] and weighted values [ROWS, D] relative to `b_max`, relative to `top` instead."""
    weight = tl.exp2(b_max - tl.where(top == float("-inf"), 0.0, top))
    return weight * b_sum, weight[:, None] * b_acc


@triton.jit
def _far_end(prefix, first_bit, N, WINDOW: tl.constexpr):
    """The position from which on no node of the pass sees a far key."""
    return tl.minimum(tl.maximum(prefix + first_bit + N - WINDOW, 0), prefix)


INTEGERS = ("N", "S", "first_bit", "tree_rows", "splits")


@triton.jit(do_not_specialize=INTEGERS)
def _attend_far(
    p_qkv,  # [B, N, (H + 2*H_kv)*D]
    p_cache,  # [B, S, 2, H_kv, D]
    p_masks,  # [B, N, WORDS]
    p_prefix,  # [B]
    p_acc,  # [B, H_kv, splits, N*GROUP, D]
    p_max,  # [B, H_kv, splits, N*GROUP]
    p_sum,  # [B, H_kv, splits, N*GROUP]
    scale,
    N,
    S,
    first_bit,
    tree_rows,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    WORDS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One split of keys for one tile of queries. Grid: splits, tiles, B*H_kv."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    QKV_STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    ROW_STRIDE: tl.constexpr = 2 * KV_HEADS * D
    V_STEP: tl.constexpr = KV_HEADS * D
    i_split, i_tile, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_kv = i_head // KV_HEADS, i_head % KV_HEADS
    p_rows = p_cache + (i_b.to(tl.int64) * S + tree_rows) * ROW_STRIDE + i_kv * D
    keys = i_split * SPLIT + tl.arange(0, SPLIT)  # [SPLIT], positions
    if PDL:  # a prefix out of date is good enough for a prefetch
        wanted = keys < tl.minimum(tl.load(p_prefix + i_b), S - tree_rows)
        p_first = p_rows + tl.where(wanted, keys, 0).to(tl.int64) * ROW_STRIDE
        for i_half in tl.static_range(2):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [p_first + i_half * V_STEP],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    prefix = tl.maximum(tl.load(p_prefix + i_b), 0)
    bound = _far_end(prefix, first_bit, N, WINDOW)
    if i_split * SPLIT < bound:
        p_q = p_qkv + i_b.to(tl.int64) * N * QKV_STRIDE + i_kv * (GROUP * D)
        p_masks += i_b * N * WORDS
        queries = N * GROUP
        first_part = i_head.to(tl.int64) * splits * queries
        p_max, p_sum, p_acc = p_max + first_part, p_sum + first_part, p_acc + first_part * D
        dims = tl.arange(0, D_PAD)
        in_head = dims < D
        seen = (keys < bound)[:, None] & in_head[None, :]
        p_k = p_rows + keys.to(tl.int64)[:, None] * ROW_STRIDE + dims[None, :]
        p_v = p_k + V_STEP
        b_k = tl.load(p_k, mask=seen, other=0.0)  # [SPLIT, D]
        b_v = tl.load(p_v, mask=seen, other=0.0)  # [SPLIT, D]
        rows = i_tile * ROWS + tl.arange(0, ROWS)  # [ROWS], node * GROUP + head in the group
        ok = rows < N * GROUP
        b_q = _queries(p_q, rows, ok, dims, GROUP, D, QKV_STRIDE)  # [ROWS, D]
        # The last far position of each query [ROWS].
        last = _positions(p_masks, rows // GROUP, prefix, ok, WORDS) - WINDOW
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale  # [SPLIT, ROWS]
        b_s = tl.where(keys[:, None] <= last[None, :], b_s, float("-inf"))
        b_max = tl.max(b_s, axis=0)
        b_p = tl.exp2(b_s - tl.where(b_max == float("-inf"), 0.0, b_max)[None, :])
        b_acc = tl.dot(tl.trans(b_v), b_p.to(b_v.dtype), input_precision="ieee")  # [D, ROWS]
        part = i_split * queries + rows
        p_part = p_acc + part.to(tl.int64)[None, :] * D + dims[:, None]
        tl.store(p_part, b_acc, mask=ok[None, :] & in_head[:, None])
        tl.store(p_max + part, b_max, mask=ok)
        tl.store(p_sum + part, tl.sum(b_p, axis=0), mask=ok)


@triton.jit(do_not_specialize=INTEGERS)
def _attend_near(
    p_qkv,
    p_cache,
    p_masks,
    p_prefix,
    p_acc,
    p_max,
    p_sum,
    p_out,  # [B, N, H*D]
    scale,
    N,
    S,
    first_bit,
    tree_rows,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    WORDS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    FILLED: tl.constexpr,
    TOGETHER: tl.constexpr,
    PDL: tl.constexpr,
):
    """The near keys of a tile of queries, and the end: adds the far part, writes the result. Appends K and V.

    Grid: tiles, B*H_kv. Arguments as in `_attend_far`.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    QKV_STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    ROW_STRIDE: tl.constexpr = 2 * KV_HEADS * D
    V_STEP: tl.constexpr = KV_HEADS * D
    OUT_STRIDE: tl.constexpr = HEADS * D
    if PDL:  # this multiprocessor's L1 may still hold what lay where qkv, masks and prefix lie now
        tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    i_b, i_kv = i_head // KV_HEADS, i_head % KV_HEADS
    prefix = tl.maximum(tl.load(p_prefix + i_b), 0)
    queries = N * GROUP
    first_part = i_head.to(tl.int64) * splits * queries
    p_max, p_sum, p_acc = p_max + first_part, p_sum + first_part, p_acc + first_part * D
    splits = tl.cdiv(_far_end(prefix, first_bit, N, WINDOW), SPLIT)  # of use
    p_cache += i_b.to(tl.int64) * S * ROW_STRIDE + i_kv * D
    p_pass = p_qkv + i_b.to(tl.int64) * N * QKV_STRIDE  # [N, QKV_STRIDE]
    p_q = p_pass + i_kv * (GROUP * D)
    p_pass += (HEADS + i_kv) * D
    p_masks += i_b * N * WORDS
    p_out += i_b.to(tl.int64) * N * OUT_STRIDE + i_kv * (GROUP * D)
    dims = tl.arange(0, D_PAD)
    in_head = (dims < D)[None, :]

    # Where the near keys lie: WINDOW of each query, one query after another.
    index = tl.arange(0, ROWS * WINDOW)  # [KEYS]
    query = i_tile * ROWS + index // WINDOW  # node * GROUP + head in the group
    node, known = query // GROUP, query < N * GROUP
    position = _positions(p_masks, node, prefix, known, WORDS)
    keys = position - (WINDOW - 1) + index % WINDOW  # [KEYS], positions
    rank = keys - prefix
    bits = tl.full([ROWS * WINDOW], 0, tl.uint32)  # the word that holds the key's bit,
    bit = tl.full([ROWS * WINDOW], 0, tl.int32)  # the first bit of that word,
    rest = tl.full([ROWS * WINDOW], 0, tl.int32)  # and the set bits of that word below the key's
    below = tl.full([ROWS * WINDOW], 0, tl.int32)
    for i_word in tl.static_range(WORDS):
        word = _word(p_masks, node, i_word, known, WORDS)
        above = below + _popcount(word)
        here = (rank >= below) & (rank < above)
        bits = tl.where(here, word, bits)
        bit = tl.where(here, 32 * i_word, bit)
        rest = tl.where(here, rank - below, rest)
        below = above
    bit += _select(bits, rest)
    inside = rank >= 0
    fresh = inside & (bit >= first_bit)
    row = tl.where(inside, tl.where(fresh, bit - first_bit, bit), tree_rows + keys)
    offset = row.to(tl.int64) * tl.where(fresh, QKV_STRIDE, ROW_STRIDE)
    p_k = (tl.where(fresh, p_pass, p_cache) + offset)[:, None] + dims[None, :]  # [KEYS, D]
    p_v = (tl.where(fresh, p_pass + V_STEP, p_cache + V_STEP) + offset)[:, None] + dims[None, :]
    ALIGN: tl.constexpr = 16 if D * p_cache.dtype.element_ty.primitive_bitwidth % 128 == 0 else 1
    p_k, p_v = tl.multiple_of(p_k, [1, ALIGN]), tl.multiple_of(p_v, [1, ALIGN])  # lost in the choice
    seen = (keys >= 0) & (position >= 0) & known
    b_k = tl.load(p_k, mask=seen[:, None] & in_head, other=0.0)
    b_v = tl.load(p_v, mask=seen[:, None] & in_head, other=0.0)

    # Nobody in this launch reads the rows appended here.
    i_row = tl.arange(0, FILLED)  # [FILLED], the queries of the tile, filled up to what a matrix product takes
    rows = i_tile * ROWS + i_row
    nodes, ok = rows // GROUP, (i_row < ROWS) & (rows < queries)
    first_of_group = (ok & (rows % GROUP == 0))[:, None] & in_head
    p_own = p_pass + nodes[:, None] * QKV_STRIDE + dims[None, :]
    p_new = p_cache + (first_bit + nodes).to(tl.int64)[:, None] * ROW_STRIDE + dims[None, :]
    tl.store(p_new, tl.load(p_own, mask=first_of_group), mask=first_of_group)
    tl.store(p_new + V_STEP, tl.load(p_own + V_STEP, mask=first_of_group), mask=first_of_group)

    b_q = _queries(p_q, rows, ok, dims, GROUP, D, QKV_STRIDE)  # [FILLED, D]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [FILLED, KEYS]
    own = i_row[:, None] == (index // WINDOW)[None, :]
    b_s = tl.where(own & seen[None, :], b_s, float("-inf"))
    near_max = tl.max(b_s, axis=1)
    b_p = tl.exp2(b_s - tl.where(near_max == float("-inf"), 0.0, near_max)[:, None])
    near_sum = tl.sum(b_p, axis=1)
    near_acc = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")  # [FILLED, D]

    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b_max = tl.full([FILLED], float("-inf"), tl.float32)
    b_sum, b_acc = tl.zeros([FILLED], tl.float32), tl.zeros([FILLED, D_PAD], tl.float32)
    reach = tl.where(ok, splits, 0)  # [FILLED]
    for start in range(0, splits, TOGETHER):
        top = b_max
        for i_part in tl.static_range(TOGETHER):
            part = (start + i_part) * queries + rows
            there = reach > start + i_part
            top = tl.maximum(top, tl.load(p_max + part, mask=there, other=float("-inf")))
        b_sum, b_acc = _rescaled(b_sum, b_acc, b_max, top)
        for i_part in tl.static_range(TOGETHER):
            part = (start + i_part) * queries + rows
            there = reach > start + i_part
            part_max = tl.load(p_max + part, mask=there, other=float("-inf"))
            p_part = p_acc + part.to(tl.int64)[:, None] * D + dims[None, :]
            part_acc = tl.load(p_part, mask=there[:, None] & in_head, other=0.0)
            part_sum, part_acc = _rescaled(tl.load(p_sum + part, mask=there, other=0.0), part_acc, part_max, top)
            b_sum += part_sum
            b_acc += part_acc
        b_max = top
    top = tl.maximum(b_max, near_max)
    b_sum, b_acc = _rescaled(b_sum, b_acc, b_max, top)
    near_sum, near_acc = _rescaled(near_sum, near_acc, near_max, top)
    b_sum += near_sum
    b_out = (b_acc + near_acc) / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    p_result = p_out + nodes[:, None] * OUT_STRIDE + (rows % GROUP)[:, None] * D + dims[None, :]
    tl.store(p_result, b_out.to(p_out.dtype.element_ty), mask=ok[:, None] & in_head)


@triton.jit(do_not_specialize=INTEGERS)
def _attend_prompt(
    p_qkv,
    p_cache,
    p_prefix,
    p_out,
    scale,
    N,
    S,
    tree_rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of queries of a chunk of a prompt, over all keys before and among them. Appends the tile's K and V.

    Grid: tiles, B*H_kv. Arguments as in `_attend_near`.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    QKV_STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    ROW_STRIDE: tl.constexpr = 2 * KV_HEADS * D
    V_STEP: tl.constexpr = KV_HEADS * D
    OUT_STRIDE: tl.constexpr = HEADS * D
    # The last tiles see most keys and take longest: they come first.
    i_tile, i_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_b, i_kv = i_head // KV_HEADS, i_head % KV_HEADS
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    prefix = tl.maximum(tl.load(p_prefix + i_b), 0)
    p_cache += (i_b.to(tl.int64) * S + tree_rows) * ROW_STRIDE + i_kv * D
    p_pass = p_qkv + i_b.to(tl.int64) * N * QKV_STRIDE
    p_q = p_pass + i_kv * (GROUP * D)
    p_pass += (HEADS + i_kv) * D
    p_out += i_b.to(tl.int64) * N * OUT_STRIDE + i_kv * (GROUP * D)
    dims = tl.arange(0, D_PAD)
    in_head = (dims < D)[None, :]
    rows = i_tile * ROWS + tl.arange(0, ROWS)  # [ROWS], node * GROUP + head in the group
    nodes, ok = rows // GROUP, rows < N * GROUP

    # What is appended here is read by other launches alone: keys of this pass come from the qkv.
    first_of_group = (ok & (rows % GROUP == 0))[:, None] & in_head
    p_own = p_pass + nodes[:, None] * QKV_STRIDE + dims[None, :]
    p_new = p_cache + (prefix + nodes).to(tl.int64)[:, None] * ROW_STRIDE + dims[None, :]
    tl.store(p_new, tl.load(p_own, mask=first_of_group), mask=first_of_group)
    tl.store(p_new + V_STEP, tl.load(p_own + V_STEP, mask=first_of_group), mask=first_of_group)

    b_q = _queries(p_q, rows, ok, dims, GROUP, D, QKV_STRIDE)  # [ROWS, D]
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum, b_acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D_PAD], tl.float32)
    end = prefix + tl.minimum((i_tile * ROWS + ROWS - 1) // GROUP + 1, N)
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)  # positions
        fresh = (keys >= prefix)[:, None]
        p_known = p_cache + keys.to(tl.int64)[:, None] * ROW_STRIDE + dims[None, :]
        p_fresh = p_pass + (keys - prefix)[:, None] * QKV_STRIDE + dims[None, :]
        seen = (keys < end)[:, None] & in_head
        b_k = tl.load(tl.where(fresh, p_fresh, p_known), mask=seen, other=0.0)  # [KEYS, D]
        b_v = tl.load(tl.where(fresh, p_fresh, p_known) + V_STEP, mask=seen, other=0.0)  # [KEYS, D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [ROWS, KEYS]
        b_s = tl.where(keys[None, :] <= (prefix + nodes)[:, None], b_s, float("-inf"))
        top = tl.maximum(b_max, tl.max(b_s, axis=1))  # finite from the first block on: every query sees key 0
        b_p = tl.exp2(b_s - top[:, None])
        b_sum, b_acc = _rescaled(b_sum, b_acc, b_max, top)
        b_sum += tl.sum(b_p, axis=1)
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = top
    b_out = b_acc / b_sum[:, None]
    p_result = p_out + nodes[:, None] * OUT_STRIDE + (rows % GROUP)[:, None] * D + dims[None, :]
    tl.store(p_result, b_out.to(p_out.dtype.element_ty), mask=ok[:, None] & in_head)


# Alignment decides layouts, and layouts the order of sums. Where heads are no multiple of 16 bytes, a layer's rows can
# start aligned in one batch size and not in another.
_KERNELS = {
    True: (_attend_far, _attend_near, _attend_prompt),
    False: tuple(
        triton.jit(
            kernel.fn,
            do_not_specialize=INTEGERS,
            do_not_specialize_on_alignment=("p_qkv", "p_cache", "p_out"),
        )
        for kernel in (_attend_far, _attend_near, _attend_prompt)
    ),
}


# ---------------------------------------------------------------- launcher


def tree_tiles(head_size: int, itemsize: int, window: int) -> dict[str, int]:
    """Tile sizes, by the head, the dtype and the window only: they fix the order of every sum."""
    padded = max(triton.next_power_of_2(head_size), 64)  # the least left side of Hopper's matrix instructions
    split = 128 if padded * itemsize <= 256 and itemsize == 2 else 64
    near = min(max(split // window, 1), 16)
    # fp32 has no matrix instructions: wider products only make longer programs. Products of fewer columns than 64 are
    # swizzled otherwise than their keys, and the ptxas of CUDA 12.8 gives them wrong addresses in shared memory.
    far = 16 if itemsize == 4 else 64
    return {"D_PAD": padded, "SPLIT": split, "FAR_ROWS": far, "NEAR_ROWS": near, "TOGETHER": 8}


def prompt_tiles(head_size: int, itemsize: int) -> dict[str, int]:
    """Of `_attend_prompt`, by the head and the dtype only, for the same reason."""
    padded = max(triton.next_power_of_2(head_size), 16)
    rows, keys = (64, 64) if itemsize == 2 and padded <= 128 else (16, 32)
    return {"D_PAD": padded, "ROWS": rows, "KEYS": keys}


def far_warps(arch: int, head_size: int) -> int:
    """Wide heads spill in four warps where the matrix instructions take their operands from registers."""
    return 2 * WARPS if head_size > 64 and arch in (80, 120) else WARPS


def near_warps(head_size: int, itemsize: int) -> int:
    """A near tile of heads of 64 is small: with two warps more of them run at once (on an H200 at 64 nodes attention
    takes 4% to 7% less). Wider heads, and those that do not begin where wide loads can, spill then."""
    return 2 if itemsize == 2 and head_size <= 64 and head_size * itemsize % 16 == 0 else WARPS


def near_registers(arch: int, head_size: int, warps: int) -> int | None:
    return most_registers(arch, warps, SPILLING if head_size <= 64 else (arch,))


def _splits(rows: int, tree_rows: int, split: int) -> int:
    return triton.cdiv(max(rows - tree_rows, 1), split)


def scratch_size(
    batch: int, nodes: int, heads: int, kv_heads: int, head_size: int, rows: int, tree_rows: int
) -> tuple[int, int]:
    """(partials, counters) that `tree_attention` needs with a cache of `rows` rows, for any dtype and window."""
    queries = nodes * heads // kv_heads
    return batch * kv_heads * _splits(rows, tree_rows, 64) * queries * (head_size + 2), 0


def _launch(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    masks: torch.Tensor,
    prefix: torch.Tensor,
    first_bit: int,
    chunk: bool,
    tree_rows: int,
    window: int,
    scale: float,
    out: torch.Tensor,
    partials: torch.Tensor,
) -> None:
    check_runs(qkv, "tree_attention")
    batch, nodes, words = masks.shape
    _, rows, _, kv_heads, size = cache.shape
    group = out.shape[1] // size // kv_heads
    whole = size * qkv.element_size() % 16 == 0  # heads begin where wide loads can
    if whole and (qkv.data_ptr() | cache.data_ptr()) % 16:
        raise ValueError("tree_attention: qkv and cache must start at a multiple of 16 bytes, got views: copy them")
    far, near, prompt = _KERNELS[whole]
    shared = {"KV_HEADS": kv_heads, "GROUP": group, "D": size, **launch_options(qkv.device)}
    scale *= LOG2E
    queries = nodes * group
    if chunk:
        tiles = prompt_tiles(size, qkv.element_size())
        grid = triton.cdiv(queries, tiles["ROWS"]), batch * kv_heads
        launch_kernel(
            prompt, grid, qkv, cache, prefix, out, scale, nodes, rows, tree_rows,
            num_warps=far_warps(architecture(qkv.device), size), **tiles, **shared,
        )  # fmt: skip
        return
    tiles = tree_tiles(size, qkv.element_size(), window)
    splits = _splits(rows, tree_rows, tiles["SPLIT"])
    count = batch * kv_heads * splits * queries
    acc, top, total = partials[: count * size], partials[count * size :], partials[count * (size + 1) :]
    shared |= {"WORDS": words, "WINDOW": window} | {name: tiles[name] for name in ("D_PAD", "SPLIT")}
    inputs, parts, sizes = (qkv, cache, masks, prefix), (acc, top, total), (nodes, rows, first_bit, tree_rows, splits)
    launch_kernel(
        far,
        (splits, triton.cdiv(queries, tiles["FAR_ROWS"]), batch * kv_heads),
        *inputs,
        *parts,
        scale,
        *sizes,
        ROWS=tiles["FAR_ROWS"],
        num_warps=far_warps(architecture(qkv.device), size),
        **shared,
    )
    warps = near_warps(size, qkv.element_size())
    launch_kernel(
        near,
        (triton.cdiv(queries, tiles["NEAR_ROWS"]), batch * kv_heads),
        *inputs, *parts, out, scale, *sizes,
        ROWS=tiles["NEAR_ROWS"], FILLED=16, TOGETHER=tiles["TOGETHER"], num_warps=warps,
        maxnreg=near_registers(architecture(qkv.device), size, warps), **shared,
    )  # fmt: skip


_op = register(
    "tree_attention(Tensor qkv, Tensor(a!) cache, Tensor masks, Tensor prefix, int first_bit, bool chunk, "
    "int tree_rows, int window, float scale, Tensor(b!) out, Tensor(c!) partials) -> ()",
    _launch,
)


# ---------------------------------------------------------------- public functions


def mask_words(seen: torch.Tensor) -> torch.Tensor:
    """What nodes see, bool [..., N, K] by tree row, as the int32 words [..., N, (K + 31) // 32] of their masks."""
    bits = F.pad(seen, (0, -seen.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    words = (bits << torch.arange(32, device=seen.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def tree_attention(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    masks: torch.Tensor,
    prefix: torch.Tensor,
    first_bit: int,
    chunk: bool,
    tree_rows: int,
    scale: float,
    out: torch.Tensor,
    scratch: Scratch,
    window: int = WINDOW,
) -> None:
    """Attention of a pass of N nodes a sequence; writes out and appends the nodes' K and V to the cache.

    qkv: [B*N, (H + 2*H_kv)*D] of fp32, fp16 or bf16: queries, keys, values; H_kv divides H. cache: [B, S, 2, H_kv, D]
    of the same dtype, rows [0, tree_rows) the tree region, position t in row tree_rows + t. masks: int32 [B, N, W], the
    tree rows that a node sees and its own; a node with no bit set gets zeros. prefix: int32 [B], committed rows that
    are seen; below 0 counts as 0. first_bit: tree row of the pass's node 0; rows before it are read from the cache.
    out: [B*N, H*D].

    chunk: False for a pass of a tree: its K and V go to the tree rows from first_bit on, and no node may have more than
    `window` bits set. True for a chunk of a prompt: every node sees those before it, masks and scratch are not read,
    and the K and V follow the prefix. window: a power of two, the same for everything that must agree bitwise. Scores
    and sums are in fp32.

    What lies in masks and prefix is on the device and not checked: bits below first_bit + N only, prefix at most
    S - tree_rows, of a chunk at most S - tree_rows - N.

    Raises ValueError for a wrong shape, dtype, device or layout, N over 256 (of a chunk 1024), and rows out of range.
    """
    op = "tree_attention"
    check_runs(qkv, op)
    device = qkv.device
    check_tensor(op, "qkv", qkv, (None, None), DTYPES, device)
    check_tensor(op, "cache", cache, (None, None, 2, None, None), qkv.dtype, device)
    batch, rows, _, kv_heads, size = cache.shape
    check_tensor(op, "masks", masks, (batch, None, None), torch.int32, device)
    nodes, words = masks.shape[1:]
    check_tensor(op, "prefix", prefix, (batch,), torch.int32, device)
    check_tensor(op, "out", out, (batch * nodes, None), qkv.dtype, device)
    check_tensor(op, "scratch.partials", scratch.partials, (None,), torch.float32, device)
    most = MAX_CHUNK if chunk else MAX_NODES
    if not 1 <= nodes <= most:
        raise ValueError(f"{op}: a pass must have 1 to {most} nodes, got masks for {nodes}")
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise ValueError(f"{op}: the head size must be 1 to {MAX_HEAD_SIZE}, got a cache of {size}")
    heads = out.shape[1] // size
    if out.shape[1] % size or heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: out must have H*{size} columns with H a multiple of the cache's {kv_heads}, got {out.shape[1]}"
        )
    check_tensor(op, "qkv", qkv, (batch * nodes, (heads + 2 * kv_heads) * size), DTYPES, device)
    if not (8 <= window <= 256 and window & (window - 1) == 0):
        raise ValueError(f"{op}: window must be a power of two from 8 to 256, got {window}")
    if not 0 <= tree_rows <= rows:
        raise ValueError(f"{op}: tree_rows must be 0 to the cache's {rows} rows, got {tree_rows}")
    if not chunk and not 0 <= first_bit <= tree_rows - nodes:
        raise ValueError(
            f"{op}: a pass of a tree must lie inside the {tree_rows} tree rows, got {nodes} nodes from row {first_bit} "
            "on"
        )
    if chunk and (first_bit != 0 or tree_rows + nodes > rows):
        raise ValueError(
            f"{op}: a chunk of a prompt must have first_bit 0 and fit into the cache's {rows - tree_rows} rows after "
            f"the tree, got first_bit {first_bit} and {nodes} nodes"
        )
    if 32 * words < first_bit + nodes:
        raise ValueError(f"{op}: masks must have {triton.cdiv(first_bit + nodes, 32)} words a node, got {words}")
    need = (0, 0) if chunk else scratch_size(batch, nodes, heads, kv_heads, size, rows, tree_rows)
    if scratch.partials.numel() < need[0]:
        have = scratch.partials.numel()
        raise ValueError(f"{op}: scratch must hold {need[0]} partials, got {have}; see scratch_size")
    _op(
        qkv,
        cache,
        masks,
        prefix,
        first_bit,
        chunk,
        tree_rows,
        window,
        scale,
        out,
        scratch.partials,
    )
