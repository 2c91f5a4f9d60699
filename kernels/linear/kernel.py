"""Linear layers for few rows: LayerNorm before them, activation or residual after them, in one launch.

    norm_linear:  out = activation(LayerNorm(x) @ weight.T + bias)
    linear_add:   out = residual + x @ weight.T + bias

x [M, K], weight [OUT, K], M from 1 to 1024. Bytes: the weight once, 2 * OUT * K in bf16; the rest stays in L2. On a
large GPU one such kernel takes microseconds, so what costs is whatever stands between the end of the kernel before and
the end of this one; the design keeps that chain short:

- A program multiplies ROWS rows of the weight, the wide left operand of the matrix product, with all tokens, the narrow
  right operand. The same matrix instructions serve every M, and a token's result does not depend on M.
- LayerNorm is folded into the linear (`Folded`): its weight into the rows, its bias into the bias. The product takes x
  unchanged, straight from memory into the matrix instructions. The rest of the norm, a scale and a multiple of the
  rows' sums, is applied to the finished tile. Normalising in the loop took as long as the rest of the kernel.
- Mean and variance of whole rows come from statistics that the writer of the residual stream stores beside it, (sum,
  sum of squares around the tile's own mean) of ROWS columns; the reader merges a few of them a row (Chan, Golub,
  LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979). `row_stats` computes
  them for a stream from elsewhere.
- If the rows give too few programs, the columns are split too, at absolute offsets that depend on the weight's shape
  alone. The last program of a tile to finish adds up the parts in their order.
- With programmatic dependent launch the next kernel is resident while this one runs.

For 16-bit types on Hopper, hopper.py does the same and loads all weights into shared memory beforehand. Device and
weight shape decide which of the two runs, the same for every M.
"""

import triton
import triton.language as tl

# Rows of the weight of one program, the fewest that Hopper's matrix instructions take. Also the columns of the residual
# stream that share one entry of its statistics: the program that writes a tile has all of them.
ROWS = 64
# By their names in transformers: ACTIVATION of the kernels.
ACTIVATIONS = {
    "none": 0,
    "linear": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_python": 2,
    "gelu_new": 3,
    "gelu_pytorch_tanh": 3,
    "gelu_fast": 3,
    "silu": 4,
    "swish": 4,
    "quick_gelu": 5,
    "tanh": 6,
    "sigmoid": 7,
    "relu2": 8,
}


def stat_tiles(width: int) -> int:
    """Tiles of a row that have statistics of their own: stats are fp32 [M, stat_tiles(width), 2]."""
    return triton.cdiv(width, ROWS)


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        return tl.maximum(x, 0.0)
    elif ACTIVATION == 2:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        # 0.5 * (1 + tanh(u)) is 1 / (1 + exp(-2 * u)).
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 4:
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == 5:
        return x / (1.0 + tl.exp(-1.702 * x))
    elif ACTIVATION == 6:
        return _tanh(x)
    elif ACTIVATION == 7:
        return 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == 8:
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        return x


@triton.jit
def _row_sum(x):
    """Sums of the rows of x [R, power of 2], as a tree over neighbours. The order of tl.sum is another for every layout
    of the tile, and the compiler lays out a tile of 16 tokens differently from one of 64. Two numbers have one sum."""
    for _ in tl.static_range(12):
        if x.shape[1] > 2:
            left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
            x = left + right
    return tl.sum(x, 1)


@triton.jit
def _merged_stats(p_stats, i_tokens, ok, epsilon, K: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Mean and 1 / standard deviation of whole rows [T] from those of their tiles."""
    WIDE: tl.constexpr = triton.next_power_of_2(TILES)
    i_tile = tl.arange(0, WIDE)
    there = ok[:, None] & (i_tile < TILES)[None, :]
    p_tile = p_stats + (i_tokens[:, None] * TILES + i_tile[None, :]) * 2  # [T, WIDE]
    b_sum = tl.load(p_tile, mask=there, other=0.0)
    b_square = tl.load(p_tile + 1, mask=there, other=0.0)
    b_count = tl.minimum(tl.maximum(K - i_tile * ROWS, 0), ROWS).to(tl.float32)  # columns of each tile
    b_mean = _row_sum(b_sum) / K
    b_apart = tl.where(there, b_sum / tl.maximum(b_count, 1.0)[None, :] - b_mean[:, None], 0.0)
    b_variance = _row_sum(b_square + b_count[None, :] * b_apart * b_apart) / K
    return b_mean, 1.0 / tl.sqrt(b_variance + epsilon)


@triton.jit
def _columns(p, i_k, there, columns, K: tl.constexpr, END: tl.constexpr, EVEN: tl.constexpr):
    """Columns i_k .. i_k + BLOCK_K of a split that ends at END, of the rows that are there; zeros elsewhere."""
    if EVEN:
        return tl.load(p + i_k, mask=there[:, None], other=0.0)
    inside = (columns + i_k < K) & (i_k + tl.arange(0, columns.shape[0]) < END)
    return tl.load(p + i_k, mask=there[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=("M", "epsilon"))
def _linear(
    p_x,  # [M, K]
    p_stats,  # [M, STAT_TILES, 2]
    p_sums,  # [OUT]
    p_weight,  # [OUT, K]
    p_bias,  # [OUT]
    p_residual,  # [M, OUT]
    p_out,  # [M, OUT]
    p_stats_out,  # [M, tiles, 2]
    p_partials,
    p_counters,
    M,
    epsilon,
    OUT: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    STAT_TILES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STATS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (OUT + ROWS - 1) // ROWS
    EVEN: tl.constexpr = K % SPLIT_K == 0 and SPLIT_K % BLOCK_K == 0
    i_tile, i_split, i_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = i_tile * ROWS + tl.arange(0, ROWS)
    real = rows < OUT
    tokens = i_block * TOKENS + tl.arange(0, TOKENS)
    ok = tokens < M
    i_start = i_split * SPLIT_K
    columns = i_start + tl.arange(0, BLOCK_K)
    p_w = p_weight + rows.to(tl.int64)[:, None] * K + columns[None, :]  # [ROWS, BLOCK_K]
    p_t = p_x + tokens[:, None] * K + columns[None, :]  # [TOKENS, BLOCK_K]
    b_acc = tl.zeros((ROWS, TOKENS), tl.float32)
    if AHEAD:
        # The compiler fills its pipeline with weights before the first turn, which waits for the kernel ahead: x cannot
        # be in the pipeline then, it is fetched a turn before it is used.
        b_x = tl.zeros((TOKENS, BLOCK_K), p_x.dtype.element_ty)
        for i_k in range(0, SPLIT_K, BLOCK_K):
            b_w = _columns(p_w, i_k, real, columns, K, SPLIT_K, EVEN)
            if i_k == 0:
                if PDL:
                    tl.extra.cuda.gdc_wait()
                    tl.extra.cuda.gdc_launch_dependents()
                b_x = _columns(p_t, 0, ok, columns, K, SPLIT_K, EVEN)  # [TOKENS, BLOCK_K]
            b_acc = tl.dot(b_w, tl.trans(b_x), b_acc, input_precision="ieee")
            b_x = _columns(p_t, i_k + BLOCK_K, ok, columns, K, SPLIT_K, False)
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        for i_k in range(0, SPLIT_K, BLOCK_K):
            b_w = _columns(p_w, i_k, real, columns, K, SPLIT_K, EVEN)
            b_x = _columns(p_t, i_k, ok, columns, K, SPLIT_K, EVEN)
            b_acc = tl.dot(b_w, tl.trans(b_x), b_acc, input_precision="ieee")
    b_sum = tl.trans(b_acc)  # [TOKENS, ROWS]
    there = ok[:, None] & real[None, :]
    last = True
    if SPLITS > 1:
        i_part = i_block * TILES + i_tile
        inner = tl.arange(0, TOKENS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        p_part = p_partials + i_part.to(tl.int64) * (SPLITS * TOKENS * ROWS) + inner
        tl.store(p_part + i_split * (TOKENS * ROWS), b_sum, mask=there)
        tl.debug_barrier()
        last = tl.atomic_add(p_counters + i_part, 1, sem="acq_rel") == SPLITS - 1
        tl.debug_barrier()
        if last:
            b_sum = tl.load(p_part, mask=there, other=0.0)
            for i in tl.static_range(1, SPLITS):
                b_sum += tl.load(p_part + i * (TOKENS * ROWS), mask=there, other=0.0)
            tl.store(p_counters + i_part, 0)
    if last:
        if NORM:
            b_mean, b_scale = _merged_stats(p_stats, tokens, ok, epsilon, K, ROWS, STAT_TILES)
            b_sum = (b_sum - b_mean[:, None] * tl.load(p_sums + rows, mask=real, other=0.0)[None, :]) * b_scale[:, None]
        if BIAS:
            b_sum += tl.load(p_bias + rows, mask=real, other=0.0).to(tl.float32)[None, :]
        b_sum = activate(b_sum, ACTIVATION)
        i_out = tokens.to(tl.int64)[:, None] * OUT + rows[None, :]
        if RESIDUAL:
            b_sum += tl.load(p_residual + i_out, mask=there, other=0.0).to(tl.float32)
        b_out = b_sum.to(p_out.dtype.element_ty)
        tl.store(p_out + i_out, b_out, mask=there)
        if STATS:
            b_value = tl.where(real[None, :], b_out.to(tl.float32), 0.0)  # what the reader will see
            count = tl.minimum(OUT - i_tile * ROWS, ROWS).to(tl.float32)
            b_total = _row_sum(b_value)
            b_apart = tl.where(real[None, :], b_value - (b_total / count)[:, None], 0.0)
            p_tile = p_stats_out + (tokens * TILES + i_tile) * 2
            tl.store(p_tile, b_total, mask=ok)
            tl.store(p_tile + 1, _row_sum(b_apart * b_apart), mask=ok)


@triton.jit
def _row_stats(p_x, p_stats, K: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):
    WIDE: tl.constexpr = triton.next_power_of_2(TILES)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_token, i_tile = tl.program_id(0), tl.arange(0, WIDE)
    columns = i_tile[:, None] * ROWS + tl.arange(0, ROWS)[None, :]  # [WIDE, ROWS]
    b_x = tl.load(p_x + i_token * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    store_stats(b_x, p_stats + i_token * TILES * 2, K, TILES)


@triton.jit
def store_stats(b_x, p_stats, K: tl.constexpr, TILES: tl.constexpr):
    """Statistics [TILES, 2] of a row of K values in tiles: b_x [power of 2, ROWS], zeros beyond the last."""
    ROWS: tl.constexpr = b_x.shape[1]
    i_tile = tl.arange(0, b_x.shape[0])
    real = i_tile[:, None] * ROWS + tl.arange(0, ROWS)[None, :] < K
    count = tl.minimum(tl.maximum(K - i_tile * ROWS, 1), ROWS).to(tl.float32)
    b_total = _row_sum(b_x)
    b_apart = tl.where(real, b_x - (b_total / count)[:, None], 0.0)
    p_tile = p_stats + i_tile * 2
    tl.store(p_tile, b_total, mask=i_tile < TILES)
    tl.store(p_tile + 1, _row_sum(b_apart * b_apart), mask=i_tile < TILES)
