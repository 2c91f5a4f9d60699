"""The far part of tree attention: one split of the committed keys for a tile of queries (see the package)."""

import triton
import triton.language as tl

from stagedspec.kernels.tree_attention.shared import INTEGERS, far_end, load_queries, node_positions


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
    bound = far_end(prefix, first_bit, N, WINDOW)
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
        b_q = load_queries(p_q, rows, ok, dims, GROUP, D, QKV_STRIDE)  # [ROWS, D]
        # The last far position of each query [ROWS].
        last = node_positions(p_masks, rows // GROUP, prefix, ok, WORDS, False) - WINDOW
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
