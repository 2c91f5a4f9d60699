"""Tree attention on Hopper, for 16-bit heads of 64, in one launch (see the package for what is near and far).

A program has all keys of 8 or 16 queries of a KV head: no program waits for another, and nothing is passed on through
memory. Each of its eight warps takes 32 keys at a time through both products in its own registers, with a greatest
score, a sum and weighted values of its own (FlashAttention 2, arXiv 2307.08691, section 3.3); the warps' meet in
shared memory at the end and are added up in one order, the far part and the near one apart. The near keys of a query
are those of one warp, so the window must be 32. The matrix instructions are those of a single warp on registers
(mma_v2), which needs no other warp; Hopper's wgmma takes four warps together and one operand from shared memory. They
have 16 rows and 8 columns: 16 queries are their rows; 8 are their columns, and keys the rows of the first product, a
head's columns those of the second. Half of each product would be thrown away otherwise. The bits are the same.

Keys and values come straight into the registers from which the matrix instructions read them. A matrix instruction sums
over 16 columns, in any order that both operands share: so the 16 bytes of a key's row that a thread loads stay together
(a dot operand with k_width 8). The 16 bytes of a value's row are the same column of eight instructions, so column
j * 8 + g of the result is column g * 8 + j of the head.

`settings` chooses among launches that give the same bits:

    ROWS         queries of a program, 8 or 16
    AHEAD        loads the first far keys and values before the kernel ahead has ended (if SETTLED), and each block
                 while the one before it is computed; else one block at a time, in so few registers that two programs
                 fit a multiprocessor
    STARTS       when the next kernel may start: 0 at once, 1 when the kernel ahead has ended, 2 when the keys and
                 values are done with
    ALONE        takes so much shared memory that no program of the next kernel's fits beside it
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra import cuda

from stagedspec.kernels.common.hopper import MULTIPROCESSORS, fetch_to_l2
from stagedspec.kernels.common.registry import launch_kernel
from stagedspec.kernels.tree_attention.shared import INTEGERS, far_end, near_rows, node_positions

MOST_ROWS, CHUNK, CHUNKS = 16, 32, 8  # queries of a program; keys of a warp at a time; warps


@gluon.jit(do_not_specialize=INTEGERS)
def _attend(
    p_qkv,  # [B, N, (H + 2*H_kv)*D]
    p_cache,  # [B, S, 2, H_kv, D]
    p_masks,  # [B, N, WORDS]
    p_prefix,  # [B]
    p_out,  # [B, N, H*D]
    scale,
    N,
    S,
    first_bit,
    tree_rows,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    WORDS: gl.constexpr,
    WINDOW: gl.constexpr,
    D: gl.constexpr,
    ROWS: gl.constexpr,
    CHUNK: gl.constexpr,
    CHUNKS: gl.constexpr,
    AHEAD: gl.constexpr,
    STARTS: gl.constexpr,
    ALONE: gl.constexpr,
    SETTLED: gl.constexpr,
    PDL: gl.constexpr,
):
    """Appends the queries' K and V, too. Grid: tiles of ROWS queries, B*H_kv."""
    HEADS: gl.constexpr = KV_HEADS * GROUP
    QKV_STRIDE: gl.constexpr = (HEADS + 2 * KV_HEADS) * D
    ROW_STRIDE: gl.constexpr = 2 * KV_HEADS * D
    V_STEP: gl.constexpr = KV_HEADS * D
    OUT_STRIDE: gl.constexpr = HEADS * D
    BLOCK: gl.constexpr = CHUNKS * CHUNK
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [CHUNKS, 1, 1], [1, 16, 8])
    # Eight queries are the columns of the products, [CHUNKS, keys or the head's columns, queries]; 16 are their rows,
    # [CHUNKS, queries, keys or columns]. A matrix instruction has 16 rows and 8 columns.
    KEYS: gl.constexpr = 1 if ROWS == 8 else 2
    QUERIES: gl.constexpr = 3 - KEYS
    WARPS: gl.constexpr = [[1, 0, 0], [2, 0, 0], [4, 0, 0]]
    # Queries [CHUNKS, ROWS, D], the same for every warp; keys [CHUNKS, CHUNK, D].
    Q: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4]] + ([[0, 8, 0], [0, 0, 32]] if ROWS == 16 else [[0, 0, 32]]),
        [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        WARPS,
        [],
        [CHUNKS, ROWS, D],
    )
    K: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 8, 0], [0, 0, 32], [0, 16, 0]],
        [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        WARPS,
        [],
        [CHUNKS, CHUNK, D],
    )
    # Values [CHUNKS, CHUNK, 8, 8]: column 8 * g + j.
    V: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 1, 0, 0], [0, 8, 0, 0], [0, 16, 0, 0]],
        [[0, 2, 0, 0], [0, 4, 0, 0], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        [[1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        [],
        [CHUNKS, CHUNK, 8, 8],
    )
    K_KEYS: gl.constexpr = gl.SliceLayout(2, K)
    V_KEYS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, V))
    S_KEYS: gl.constexpr = gl.SliceLayout(QUERIES, MMA)
    S_ROWS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(KEYS, MMA))
    PER_ROW: gl.constexpr = gl.SliceLayout(KEYS, MMA)
    if PDL and not SETTLED:
        cuda.gdc_wait()
    if PDL and STARTS == 0:
        cuda.gdc_launch_dependents()
    i_tile, i_head = gl.program_id(0), gl.program_id(1)
    i_b, i_kv = i_head // KV_HEADS, i_head % KV_HEADS
    p_cache += i_b.to(gl.int64) * S * ROW_STRIDE + i_kv * D
    p_pass = p_qkv + i_b.to(gl.int64) * N * QKV_STRIDE  # [N, QKV_STRIDE]
    p_q = p_pass + i_kv * (GROUP * D)
    p_pass += (HEADS + i_kv) * D
    p_masks += i_b * N * WORDS
    p_far = p_cache + tree_rows.to(gl.int64) * ROW_STRIDE
    first_query, queries = i_tile * ROWS, N * GROUP

    # If SETTLED, before the kernel ahead has ended: what was there before this pass.
    prefix = gl.maximum(gl.load(p_prefix + i_b, cache_modifier=".cg"), 0)
    bound = far_end(prefix, first_bit, N, WINDOW)
    k_index, v_index = _index(K_KEYS, CHUNKS, CHUNK), _index(V_KEYS, CHUNKS, CHUNK)
    s_index = _index(S_KEYS, CHUNKS, CHUNK)
    rows = first_query + gl.arange(0, ROWS, S_ROWS)
    rows = gl.where(rows < queries, rows, -1)
    # The last far position of each query.
    last = node_positions(p_masks, rows // GROUP, prefix, rows >= 0, WORDS, True) - WINDOW
    last, rows = gl.expand_dims(gl.expand_dims(last, 0), KEYS), gl.expand_dims(gl.expand_dims(rows, 0), KEYS)
    near_blocks = gl.cdiv(gl.minimum(queries - first_query, ROWS) * WINDOW, BLOCK)
    p_index = _index(gl.BlockedLayout([1, 1], [1, 32], [CHUNKS, 1], [1, 0]), CHUNKS, CHUNK)
    s_codes = gl.allocate_shared_memory(
        gl.int32, [ROWS * WINDOW // BLOCK, CHUNKS, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    for i in range(near_blocks):
        row, fresh, seen = near_rows(
            p_masks, first_query, i * BLOCK + p_index, prefix, first_bit, tree_rows, queries, GROUP, WORDS, WINDOW, True
        )
        s_codes.index(i).store(gl.where(seen, 2 * row + gl.where(fresh, 1, 0), -1))  # see `_at`
    k_code, v_code = s_codes.index(0).load(K_KEYS), s_codes.index(0).load(V_KEYS)
    if AHEAD:
        b_k = _far_keys(p_far, k_index, bound, ROW_STRIDE, D, K)
        b_v = _far_values(p_far + V_STEP, v_index, bound, ROW_STRIDE, V)
    for start in range(BLOCK if AHEAD else 0, bound, BLOCK):  # the others into L2: a row of 128 bytes a thread
        p_row = p_far + gl.where(start + p_index < bound, start + p_index, 0).to(gl.int64) * ROW_STRIDE
        for i_half in gl.static_range(2):
            fetch_to_l2(p_row + i_half * V_STEP)
    if PDL:
        cuda.gdc_wait()
    if PDL and STARTS == 1:
        cuda.gdc_launch_dependents()
    b_q = _operand(_queries(p_q, first_query, queries, GROUP, QKV_STRIDE, CHUNKS, ROWS, D, Q), KEYS == 2, 8, MMA)
    # The warps' results; the queries' own keys and values [ROWS, D].
    WIDE: gl.constexpr = ROWS // 4 if AHEAD else 4  # columns a thread; in turn, 2 would spill
    SUM: gl.constexpr = (
        gl.BlockedLayout([CHUNKS, 1, 1], [1, 4, 8], [1, CHUNKS, 1], [2, 1, 0])
        if KEYS == 1
        else gl.BlockedLayout([CHUNKS, 1, WIDE], [1, WIDE // 2, 64 // WIDE], [1, CHUNKS, 1], [2, 1, 0])
    )
    OUT: gl.constexpr = gl.SliceLayout(0, SUM)
    OWN: gl.constexpr = gl.BlockedLayout([1, ROWS // 4], [ROWS // 8, 256 // ROWS], [CHUNKS, 1], [1, 0])
    passed = p_pass, p_cache, first_query, queries, first_bit  # what `_own_rows` goes by
    if AHEAD:
        p_own, p_new, own = _own_rows(passed, GROUP, QKV_STRIDE, ROW_STRIDE, ROWS, D, OWN)
        own_k, own_v = gl.load(p_own, mask=own), gl.load(p_own + V_STEP, mask=own)
    far_max = gl.full([CHUNKS, ROWS], float("-inf"), gl.float32, PER_ROW)
    far_sum = gl.zeros([CHUNKS, ROWS], gl.float32, PER_ROW)
    far_acc = gl.zeros(_block(KEYS, CHUNKS, D, ROWS), gl.float32, MMA)
    near_max, near_sum, near_acc = far_max, far_sum, far_acc
    owner = gl.where(s_codes.index(0).load(S_KEYS) >= 0, first_query + s_index // WINDOW, -2)
    if AHEAD:
        near_k = _near_keys(p_pass, p_cache, k_code, QKV_STRIDE, ROW_STRIDE, D, K)
        near_v = _near_values(p_pass + V_STEP, p_cache + V_STEP, v_code, QKV_STRIDE, ROW_STRIDE, V)
        b_p, far_max, far_sum, far_acc = _weights(
            b_q, b_k, gl.expand_dims(s_index, QUERIES) <= last, scale, far_max, far_sum, far_acc, MMA, KEYS, True
        )
        far_acc = _valued(b_p, b_v, far_acc, MMA, KEYS)
        b_k = _far_keys(p_far, BLOCK + k_index, bound, ROW_STRIDE, D, K)
        b_v = _far_values(p_far + V_STEP, BLOCK + v_index, bound, ROW_STRIDE, V)
        b_p, near_max, near_sum, near_acc = _weights(
            b_q, near_k, gl.expand_dims(owner, QUERIES) == rows, scale, near_max, near_sum, near_acc, MMA, KEYS, True
        )
        near_acc = _valued(b_p, near_v, near_acc, MMA, KEYS)
        for start in range(BLOCK, bound, BLOCK):
            next_k = _far_keys(p_far, start + BLOCK + k_index, bound, ROW_STRIDE, D, K)
            next_v = _far_values(p_far + V_STEP, start + BLOCK + v_index, bound, ROW_STRIDE, V)
            b_p, far_max, far_sum, far_acc = _weights(
                b_q, b_k, gl.expand_dims(start + s_index, QUERIES) <= last, scale, far_max, far_sum, far_acc, MMA, KEYS
            )
            far_acc = _valued(b_p, b_v, far_acc, MMA, KEYS)
            b_k, b_v = next_k, next_v
    else:
        for start in range(0, bound, BLOCK):
            b_k = _far_keys(p_far, start + k_index, bound, ROW_STRIDE, D, K)
            b_p, far_max, far_sum, far_acc = _weights(
                b_q, b_k, gl.expand_dims(start + s_index, QUERIES) <= last, scale, far_max, far_sum, far_acc, MMA, KEYS
            )
            b_v = _far_values(p_far + V_STEP, start + v_index, bound, ROW_STRIDE, V)
            far_acc = _valued(b_p, b_v, far_acc, MMA, KEYS)
    if AHEAD:  # nobody in this launch reads the rows appended here
        gl.store(p_new, own_k, mask=own)
        gl.store(p_new + V_STEP, own_v, mask=own)
    # The warps' results meet in shared memory: the far ones at once, so that their registers are free.
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SWIZZLED: gl.constexpr = (
        gl.SwizzledSharedLayout(8, 2, ROWS // 8, [2, 1, 0])
        if KEYS == 1
        else gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0])
    )
    s_far_max = gl.allocate_shared_memory(gl.float32, [CHUNKS, ROWS], FLAT, far_max)
    s_far_sum = gl.allocate_shared_memory(gl.float32, [CHUNKS, ROWS], FLAT, far_sum)
    s_acc = gl.allocate_shared_memory(gl.float32, _parts(KEYS, CHUNKS, D, ROWS, ALONE), SWIZZLED)
    s_acc.index(0).store(far_acc)
    for i in range(1 if AHEAD else 0, near_blocks):
        k_code = s_codes.index(i).load(K_KEYS)
        near_k = _near_keys(p_pass, p_cache, k_code, QKV_STRIDE, ROW_STRIDE, D, K)
        owner = gl.where(s_codes.index(i).load(S_KEYS) >= 0, first_query + (i * BLOCK + s_index) // WINDOW, -2)
        b_p, near_max, near_sum, near_acc = _weights(
            b_q, near_k, gl.expand_dims(owner, QUERIES) == rows, scale, near_max, near_sum, near_acc, MMA, KEYS
        )
        v_code = s_codes.index(i).load(V_KEYS)
        near_v = _near_values(p_pass + V_STEP, p_cache + V_STEP, v_code, QKV_STRIDE, ROW_STRIDE, V)
        near_acc = _valued(b_p, near_v, near_acc, MMA, KEYS)
    if PDL and STARTS == 2:
        cuda.gdc_launch_dependents()
    s_near_max = gl.allocate_shared_memory(gl.float32, [CHUNKS, ROWS], FLAT, near_max)
    s_near_sum = gl.allocate_shared_memory(gl.float32, [CHUNKS, ROWS], FLAT, near_sum)
    s_acc.index(1).store(near_acc)
    far_max, far_sum, far_acc = _over_chunks(s_far_max, s_far_sum, s_acc.index(0), KEYS, SUM)
    near_max, near_sum, near_acc = _over_chunks(s_near_max, s_near_sum, s_acc.index(1), KEYS, SUM)
    top = gl.maximum(far_max, near_max)
    top = gl.where(top == float("-inf"), 0.0, top)
    far_weight, near_weight = gl.exp2(far_max - top), gl.exp2(near_max - top)
    b_sum = far_weight * far_sum + near_weight * near_sum
    b_out = gl.expand_dims(far_weight, KEYS - 1) * far_acc + gl.expand_dims(near_weight, KEYS - 1) * near_acc
    b_out /= gl.expand_dims(gl.where(b_sum > 0.0, b_sum, 1.0), KEYS - 1)
    i_row, columns = (
        gl.arange(0, ROWS, gl.SliceLayout(KEYS - 1, OUT)),
        gl.arange(0, D, gl.SliceLayout(QUERIES - 1, OUT)),
    )
    row = first_query + i_row
    ok, nodes = row < queries, row // GROUP
    dims = columns % 8 * 8 + columns // 8
    p_out += i_b.to(gl.int64) * N * OUT_STRIDE + i_kv * (GROUP * D)
    p_result = p_out + gl.expand_dims(nodes * OUT_STRIDE + row % GROUP * D, KEYS - 1)
    p_result += gl.expand_dims(dims, QUERIES - 1)
    gl.store(p_result, b_out.to(p_out.dtype.element_ty), mask=gl.expand_dims(ok, KEYS - 1))
    if not AHEAD:  # here, not earlier, for want of registers
        p_own, p_new, own = _own_rows(passed, GROUP, QKV_STRIDE, ROW_STRIDE, ROWS, D, OWN)
        gl.store(p_new, gl.load(p_own, mask=own), mask=own)
        gl.store(p_new + V_STEP, gl.load(p_own + V_STEP, mask=own), mask=own)


@gluon.jit
def _index(LAYOUT: gl.constexpr, CHUNKS: gl.constexpr, CHUNK: gl.constexpr):
    """The keys of a block [CHUNKS, CHUNK]."""
    chunks = gl.arange(0, CHUNKS, gl.SliceLayout(1, LAYOUT))
    return gl.expand_dims(chunks * CHUNK, 1) + gl.expand_dims(gl.arange(0, CHUNK, gl.SliceLayout(0, LAYOUT)), 0)


@gluon.jit
def _own_rows(
    passed,
    GROUP: gl.constexpr,
    QKV_STRIDE: gl.constexpr,
    ROW_STRIDE: gl.constexpr,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Where the keys of the queries' nodes are [ROWS, D], where they go, and for which rows: one of each node."""
    p_pass, p_cache, first_query, queries, first_bit = passed
    row = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    nodes = row // GROUP
    p_own = p_pass + gl.expand_dims(nodes * QKV_STRIDE, 1) + gl.expand_dims(columns, 0)
    p_new = p_cache + gl.expand_dims((first_bit + nodes).to(gl.int64) * ROW_STRIDE, 1) + gl.expand_dims(columns, 0)
    own = gl.expand_dims((row < queries) & (row % GROUP == 0), 1)
    return gl.multiple_of(p_own, [1, 8]), gl.multiple_of(p_new, [1, 8]), own


@gluon.jit
def _queries(
    p_q,
    first_query,
    queries,
    GROUP: gl.constexpr,
    QKV_STRIDE: gl.constexpr,
    CHUNKS: gl.constexpr,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """[CHUNKS, ROWS, D], the same for every chunk."""
    rows = first_query + gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    p_rows = gl.expand_dims(gl.expand_dims(p_q + (rows // GROUP) * QKV_STRIDE + (rows % GROUP) * D, 0), 2)
    dims = gl.expand_dims(gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))), 0), 1)
    chunks = gl.expand_dims(gl.expand_dims(gl.arange(0, CHUNKS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))), 1), 2)
    p_rows = gl.multiple_of(p_rows + dims + chunks * 0, [1, 1, 16])
    return gl.load(p_rows, mask=gl.expand_dims(gl.expand_dims(rows < queries, 0), 2), other=0.0)


@gluon.jit
def _at(p_pass, p_cache, code, QKV_STRIDE: gl.constexpr, ROW_STRIDE: gl.constexpr):
    """Where near keys begin, by their codes: 2 * row + 1 for a row of the pass's qkv, 2 * row for one of the cache, -1
    for a key that its query does not see."""
    fresh = (code & 1) == 1
    return gl.where(fresh, p_pass, p_cache) + (code >> 1).to(gl.int64) * gl.where(fresh, QKV_STRIDE, ROW_STRIDE)


@gluon.jit
def _near_keys(
    p_pass, p_cache, code, QKV_STRIDE: gl.constexpr, ROW_STRIDE: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr
):
    return _keys(_at(p_pass, p_cache, code, QKV_STRIDE, ROW_STRIDE), code >= 0, D, LAYOUT)


@gluon.jit
def _near_values(p_pass, p_cache, code, QKV_STRIDE: gl.constexpr, ROW_STRIDE: gl.constexpr, LAYOUT: gl.constexpr):
    return _values(_at(p_pass, p_cache, code, QKV_STRIDE, ROW_STRIDE), code >= 0, LAYOUT)


@gluon.jit
def _far_keys(p_far, keys, bound, ROW_STRIDE: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    return _keys(p_far + keys.to(gl.int64) * ROW_STRIDE, keys < bound, D, LAYOUT)


@gluon.jit
def _far_values(p_far, keys, bound, ROW_STRIDE: gl.constexpr, LAYOUT: gl.constexpr):
    return _values(p_far + keys.to(gl.int64) * ROW_STRIDE, keys < bound, LAYOUT)


@gluon.jit
def _keys(p_keys, seen, D: gl.constexpr, LAYOUT: gl.constexpr):
    """[CHUNKS, CHUNK, D] from where they begin [CHUNKS, CHUNK]. Past L1, which may hold what lay there earlier."""
    dims = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    p_keys = gl.expand_dims(p_keys, 2) + gl.expand_dims(gl.expand_dims(dims, 0), 1)
    return gl.load(gl.multiple_of(p_keys, [1, 1, 16]), mask=gl.expand_dims(seen, 2), other=0.0, cache_modifier=".cg")


@gluon.jit
def _values(p_values, seen, LAYOUT: gl.constexpr):
    """[CHUNKS, CHUNK, 8, 8] likewise."""
    groups = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    groups = gl.expand_dims(gl.expand_dims(gl.expand_dims(groups, 0), 1), 3)
    columns = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    columns = gl.expand_dims(gl.expand_dims(gl.expand_dims(columns, 0), 1), 2)
    p_values = gl.expand_dims(gl.expand_dims(p_values, 2), 3) + (8 * groups + columns)
    seen = gl.expand_dims(gl.expand_dims(seen, 2), 3)
    return gl.load(gl.multiple_of(p_values, [1, 1, 16, 16]), mask=seen, other=0.0, cache_modifier=".cg")


@triton.constexpr_function
def _block(keys: int, chunks: int, columns: int, queries: int) -> list[int]:
    """The shape of a block of queries by keys, or by columns of the head."""
    return [chunks, columns, queries] if keys == 1 else [chunks, queries, columns]


@triton.constexpr_function
def _parts(keys: int, chunks: int, columns: int, queries: int, alone: bool) -> list[int]:
    """Room for the far part, the near one, and if alone as much again, which nobody uses."""
    return [4 if alone else 2, *_block(keys, chunks, columns, queries)]


@gluon.jit
def _operand(b_x, LEFT: gl.constexpr, WIDTH: gl.constexpr, MMA: gl.constexpr):
    """b_x [CHUNKS, rows, columns that are summed over] as the left operand of a product, or transposed as the right."""
    if LEFT:
        return gl.convert_layout(b_x, gl.DotOperandLayout(0, MMA, WIDTH), assert_trivial=True)
    else:
        return gl.convert_layout(gl.permute(b_x, (0, 2, 1)), gl.DotOperandLayout(1, MMA, WIDTH), assert_trivial=True)


@gluon.jit
def _product(b_columns, b_queries, b_acc, KEYS: gl.constexpr):
    """Adds the product of two operands; b_queries is the right one if KEYS is 1, else the left one."""
    if KEYS == 1:
        return mma_v2(b_columns, b_queries, b_acc)
    else:
        return mma_v2(b_queries, b_columns, b_acc)


@gluon.jit
def _weights(
    b_q, b_k, here, scale, b_max, b_sum, b_acc, MMA: gl.constexpr, KEYS: gl.constexpr, FIRST: gl.constexpr = False
):
    """Weights of a block's keys, CHUNK of each query; the greatest score so far [CHUNKS, ROWS]; the sum of weights and
    the weighted values before, relative to it. FIRST: there are none before to rescale."""
    b_s = _product(_operand(b_k, KEYS == 1, 8, MMA), b_q, gl.zeros(here.shape, gl.float32, MMA), KEYS) * scale
    b_s = gl.where(here, b_s, float("-inf"))
    top = gl.max(b_s, KEYS) if FIRST else gl.maximum(b_max, gl.max(b_s, KEYS))
    finite = gl.where(top == float("-inf"), 0.0, top)
    b_p = gl.exp2(b_s - gl.expand_dims(finite, KEYS))
    total = gl.convert_layout(_sum(b_p, KEYS), top.type.layout, assert_trivial=True)
    if FIRST:
        return b_p, top, total, b_acc
    before = gl.exp2(b_max - finite)
    return b_p, top, before * b_sum + total, gl.expand_dims(before, KEYS) * b_acc


@gluon.jit
def _sum(b_p, KEYS: gl.constexpr):
    """Sums over a block's 32 keys in one order for both values of KEYS: keys 8 apart, which are in one thread, then
    halves of what is left."""
    if KEYS == 1:
        b_p = gl.sum(gl.reshape(b_p, [b_p.shape[0], 4, 8, b_p.shape[2]]), 1)
        return gl.sum(b_p, 1)
    else:
        b_p = gl.sum(gl.reshape(b_p, [b_p.shape[0], b_p.shape[1], 4, 4, 2]), 2)
        return gl.sum(gl.sum(b_p, 2), 2)


@gluon.jit
def _valued(b_p, b_v, b_acc, MMA: gl.constexpr, KEYS: gl.constexpr):
    """Adds the weighted values of a block."""
    CHUNKS: gl.constexpr = b_v.shape[0]
    CHUNK: gl.constexpr = b_v.shape[1]
    b_p, b_v = b_p.to(b_v.dtype), gl.reshape(gl.permute(b_v, (0, 3, 2, 1)), [CHUNKS, 64, CHUNK])
    if KEYS == 1:
        # Each matrix of 8 keys and 8 queries is transposed between the threads of a warp, and then by name.
        ROWS: gl.constexpr = b_p.shape[2]
        b_p = gl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [b_p], b_p.dtype, True, 2
        )
        b_p = gl.permute(gl.reshape(b_p, [CHUNKS, CHUNK // 8, 8, ROWS // 8, 8]), (0, 1, 4, 3, 2))
        b_p = gl.reshape(b_p, [CHUNKS, CHUNK, ROWS])
        b_p = gl.convert_layout(b_p, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
    else:
        b_p = gl.convert_layout(b_p, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
    b_v = _operand(b_v, KEYS == 1, 2, MMA)
    return _product(b_v, b_p, b_acc, KEYS)


@gluon.jit
def _over_chunks(s_max, s_sum, s_acc, KEYS: gl.constexpr, SUM: gl.constexpr):
    """Of all chunks together: greatest scores [ROWS], sums, weighted values."""
    PER_ROW: gl.constexpr = gl.SliceLayout(KEYS, SUM)
    b_max, b_sum, b_acc = s_max.load(PER_ROW), s_sum.load(PER_ROW), s_acc.load(SUM)
    top = gl.max(b_max, 0)
    weight = gl.exp2(b_max - gl.expand_dims(gl.where(top == float("-inf"), 0.0, top), 0))
    b_sum, b_acc = gl.sum(weight * b_sum, 0), gl.sum(gl.expand_dims(weight, KEYS) * b_acc, 0)
    of_row: gl.constexpr = gl.SliceLayout(KEYS - 1, b_acc.type.layout)  # the same by another name
    return gl.convert_layout(top, of_row), gl.convert_layout(b_sum, of_row), b_acc


# ---------------------------------------------------------------- launcher


def settings(queries: int, groups: int) -> dict[str, int | None]:
    """Of a launch over `queries` queries of each of `groups` KV heads, those of all sequences together."""
    rows = 8 if queries <= 8 or groups * triton.cdiv(queries, 8) <= MULTIPROCESSORS else MOST_ROWS
    programs = groups * triton.cdiv(queries, rows)
    ahead, most = programs <= MULTIPROCESSORS, 2 * programs > MULTIPROCESSORS
    # With few queries what the next kernel reads early costs more than it gains.
    few = queries < 8 and not most
    starts = 2 if few or not ahead else 0 if most else 1
    return {"ROWS": rows, "AHEAD": ahead, "STARTS": starts, "ALONE": few, "maxnreg": None if ahead else 128}


def launch(queries: int, groups: int, *given: torch.Tensor | float, **constants: int) -> None:
    """given, constants: the kernel's, and options of a launch."""
    chosen = settings(queries, groups)
    grid = triton.cdiv(queries, chosen["ROWS"]), groups
    tiles = {"CHUNK": CHUNK, "CHUNKS": CHUNKS, "num_warps": CHUNKS}
    launch_kernel(_attend, grid, *given, **tiles, **chosen, **constants)
