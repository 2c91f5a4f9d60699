"""Attention of a chunk of a prompt over all keys before and among it, as in FlashAttention 2 (see the package)."""

import triton
import triton.language as tl

from stagedspec.kernels.tree_attention.shared import INTEGERS, load_queries, rescaled


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

    b_q = load_queries(p_q, rows, ok, dims, GROUP, D, QKV_STRIDE)  # [ROWS, D]
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
        b_sum, b_acc = rescaled(b_sum, b_acc, b_max, top)
        b_sum += tl.sum(b_p, axis=1)
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = top
    b_out = b_acc / b_sum[:, None]
    p_result = p_out + nodes[:, None] * OUT_STRIDE + (rows % GROUP)[:, None] * D + dims[None, :]
    tl.store(p_result, b_out.to(p_out.dtype.element_ty), mask=ok[:, None] & in_head)
