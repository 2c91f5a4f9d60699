"""The near part of tree attention: each node's last keys, merged with the splits of far.py (see the package)."""

import triton
import triton.language as tl

from stagedspec.kernels.tree_attention.shared import INTEGERS, far_end, load_queries, near_rows, rescaled


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
    splits = tl.cdiv(far_end(prefix, first_bit, N, WINDOW), SPLIT)  # of use
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
    row, fresh, seen = near_rows(
        p_masks, i_tile * ROWS, index, prefix, first_bit, tree_rows, queries, GROUP, WORDS, WINDOW, False
    )
    offset = row.to(tl.int64) * tl.where(fresh, QKV_STRIDE, ROW_STRIDE)
    p_k = (tl.where(fresh, p_pass, p_cache) + offset)[:, None] + dims[None, :]  # [KEYS, D]
    p_v = (tl.where(fresh, p_pass + V_STEP, p_cache + V_STEP) + offset)[:, None] + dims[None, :]
    ALIGN: tl.constexpr = 16 if D * p_cache.dtype.element_ty.primitive_bitwidth % 128 == 0 else 1
    p_k, p_v = tl.multiple_of(p_k, [1, ALIGN]), tl.multiple_of(p_v, [1, ALIGN])  # tl.where drops it
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

    b_q = load_queries(p_q, rows, ok, dims, GROUP, D, QKV_STRIDE)  # [FILLED, D]
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
        b_sum, b_acc = rescaled(b_sum, b_acc, b_max, top)
        for i_part in tl.static_range(TOGETHER):
            part = (start + i_part) * queries + rows
            there = reach > start + i_part
            part_max = tl.load(p_max + part, mask=there, other=float("-inf"))
            p_part = p_acc + part.to(tl.int64)[:, None] * D + dims[None, :]
            part_acc = tl.load(p_part, mask=there[:, None] & in_head, other=0.0)
            part_sum, part_acc = rescaled(tl.load(p_sum + part, mask=there, other=0.0), part_acc, part_max, top)
            b_sum += part_sum
            b_acc += part_acc
        b_max = top
    top = tl.maximum(b_max, near_max)
    b_sum, b_acc = rescaled(b_sum, b_acc, b_max, top)
    near_sum, near_acc = rescaled(near_sum, near_acc, near_max, top)
    b_sum += near_sum
    b_out = (b_acc + near_acc) / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    p_result = p_out + nodes[:, None] * OUT_STRIDE + (rows % GROUP)[:, None] * D + dims[None, :]
    tl.store(p_result, b_out.to(p_out.dtype.element_ty), mask=ok[:, None] & in_head)
