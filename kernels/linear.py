"""Linear layers for few rows: LayerNorm before them, activation or residual after them, in one launch.

    norm_linear:  out = activation(LayerNorm(x) @ weight.T + bias)
    linear_add:   out = residual + x @ weight.T + bias

x [M, K], weight [OUT, K], M from 1 to 256. What must be moved is the weight, once: 2 * OUT * K bytes in bf16. All else
stays in L2, so the design is about keeping loads of weights in flight:

- A program multiplies ROWS rows of the weight, the wide left operand of the matrix product, with all tokens, its narrow
  right side. One family of matrix instructions serves every M, and a token's result does not depend on M.
- Where that makes too few programs to pull at the memory of a whole GPU, the columns are split at absolute offsets that
  the weight's shape decides. The last program of a tile to arrive adds the parts up in their order.
- The weight does not depend on the kernel before: with programmatic dependent launch a program asks for all of its part
  to be brought into L2 and only then waits.

LayerNorm needs the mean and the variance of whole rows. Were each program to read all of x for them, a layer would read
more of x from L2 than of weights from memory. So whoever writes the residual stream leaves statistics of its tiles
beside it, (sum, sum of squares around the tile's own mean) of ROWS columns, and the reader merges a few of them a row
(Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979). `row_stats`
makes them for a stream that comes from elsewhere.
"""

import torch
import triton
import triton.language as tl

from stagedspec.kernels.registry import (
    CompileCase,
    Scratch,
    check_runs,
    check_tensor,
    launch_options,
    register,
)

ROWS = 64  # of the weight, a program: the least that Hopper's matrix instructions take
MAX_TOKENS = 256
PROGRAMS = 128  # about as many as a large GPU has multiprocessors
SHORTEST_SPLIT = 128  # columns
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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


def activation_known(name: str) -> bool:
    """Whether the kernels apply the activation, by its name in transformers."""
    return name in ACTIVATIONS


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        return tl.maximum(x, 0.0)
    elif ACTIVATION == 2:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
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
def _merged_stats(p_stats, i_tokens, ok, epsilon, K: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Mean and 1 / standard deviation of whole rows [T] from those of their tiles."""
    WIDE: tl.constexpr = triton.next_power_of_2(TILES)
    i_tile = tl.arange(0, WIDE)
    there = ok[:, None] & (i_tile < TILES)[None, :]
    p_tile = p_stats + (i_tokens[:, None] * TILES + i_tile[None, :]) * 2  # [T, WIDE]
    b_sum = tl.load(p_tile, mask=there, other=0.0)
    b_square = tl.load(p_tile + 1, mask=there, other=0.0)
    b_count = tl.minimum(tl.maximum(K - i_tile * TILE, 0), TILE).to(tl.float32)  # columns of each tile
    b_mean = tl.sum(b_sum, 1) / K
    b_apart = tl.where(there, b_sum / tl.maximum(b_count, 1.0)[None, :] - b_mean[:, None], 0.0)
    b_variance = tl.sum(b_square + b_count[None, :] * b_apart * b_apart, 1) / K
    return b_mean, 1.0 / tl.sqrt(b_variance + epsilon)


@triton.jit
def _prefetch(p_weight, rows, i_start, K: tl.constexpr, COLUMNS: tl.constexpr, LINE: tl.constexpr):
    """Asks for columns [i_start, i_start + COLUMNS) of the rows to be brought into L2, a line of LINE elements each."""
    LINES: tl.constexpr = triton.next_power_of_2((COLUMNS + LINE - 1) // LINE)
    i_column = tl.minimum(i_start + tl.minimum(tl.arange(0, LINES) * LINE, COLUMNS - 1), K - 1)
    p_line = (p_weight + rows.to(tl.int64)[:, None] * K + i_column[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p_line], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=("M", "epsilon"))
def _linear(
    p_x,  # [M, K]
    p_stats,  # [M, STAT_TILES, 2]
    p_norm_weight,  # [K]
    p_norm_bias,  # [K]
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
    LINE: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (OUT + ROWS - 1) // ROWS
    i_tile, i_split, i_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = i_tile * ROWS + tl.arange(0, ROWS)
    here = tl.minimum(rows, OUT - 1)  # rows past the end repeat the last one and are never stored
    tokens = i_block * TOKENS + tl.arange(0, TOKENS)
    ok = tokens < M
    i_start = i_split * SPLIT_K
    if PDL:
        _prefetch(p_weight, here, i_start, K, SPLIT_K, LINE)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if NORM:
        b_mean, b_scale = _merged_stats(p_stats, tokens, ok, epsilon, K, ROWS, STAT_TILES)
    columns = i_start + tl.arange(0, BLOCK_K)
    p_w = p_weight + here.to(tl.int64)[:, None] * K + columns[None, :]  # [ROWS, BLOCK_K]
    p_t = p_x + tl.minimum(tokens, M - 1)[None, :] * K + columns[:, None]  # [BLOCK_K, TOKENS]
    b_acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for i_k in range(0, SPLIT_K, BLOCK_K):
        if K % SPLIT_K == 0:
            b_w = tl.load(p_w + i_k)
            b_x = tl.load(p_t + i_k)
            if NORM:
                b_gain = tl.load(p_norm_weight + columns + i_k)
                b_shift = tl.load(p_norm_bias + columns + i_k)
        else:
            inside = columns + i_k < K
            b_w = tl.load(p_w + i_k, mask=inside[None, :], other=0.0)
            b_x = tl.load(p_t + i_k, mask=inside[:, None], other=0.0)
            if NORM:
                b_gain = tl.load(p_norm_weight + columns + i_k, mask=inside, other=0.0)
                b_shift = tl.load(p_norm_bias + columns + i_k, mask=inside, other=0.0)
        if NORM:
            b_normal = (b_x.to(tl.float32) - b_mean[None, :]) * b_scale[None, :]
            b_normal = b_normal * b_gain.to(tl.float32)[:, None] + b_shift.to(tl.float32)[:, None]
            b_x = b_normal.to(p_x.dtype.element_ty)
        b_acc = tl.dot(b_w, b_x, b_acc, input_precision="ieee")
    b_sum = tl.trans(b_acc)  # [TOKENS, ROWS]
    if SPLITS > 1:
        i_part = i_block * TILES + i_tile
        inner = tl.arange(0, TOKENS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        p_part = p_partials + i_part.to(tl.int64) * (SPLITS * TOKENS * ROWS) + inner
        tl.store(p_part + i_split * (TOKENS * ROWS), b_sum)
        tl.debug_barrier()
        arrived = tl.atomic_add(p_counters + i_part, 1, sem="acq_rel")
        tl.debug_barrier()
        if arrived == SPLITS - 1:
            b_sum = tl.load(p_part)
            for i in range(1, SPLITS):
                b_sum += tl.load(p_part + i * (TOKENS * ROWS))
            tl.store(p_counters + i_part, 0)
            _finish(
                b_sum, tokens, ok, rows, i_tile, p_bias, p_residual, p_out, p_stats_out,
                OUT, TILES, ROWS, BIAS, RESIDUAL, ACTIVATION, STATS,
            )  # fmt: skip
    else:
        _finish(
            b_sum, tokens, ok, rows, i_tile, p_bias, p_residual, p_out, p_stats_out,
            OUT, TILES, ROWS, BIAS, RESIDUAL, ACTIVATION, STATS,
        )  # fmt: skip


@triton.jit
def _finish(
    b_sum, tokens, ok, rows, i_tile, p_bias, p_residual, p_out, p_stats_out,
    OUT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Bias, activation, residual and the statistics of one finished tile [TOKENS, ROWS]."""
    real = rows < OUT
    there = ok[:, None] & real[None, :]
    i_out = tokens.to(tl.int64)[:, None] * OUT + rows[None, :]
    if BIAS:
        b_sum += tl.load(p_bias + rows, mask=real, other=0.0).to(tl.float32)[None, :]
    b_sum = _activate(b_sum, ACTIVATION)
    if RESIDUAL:
        b_sum += tl.load(p_residual + i_out, mask=there, other=0.0).to(tl.float32)
    b_out = b_sum.to(p_out.dtype.element_ty)
    tl.store(p_out + i_out, b_out, mask=there)
    if STATS:
        b_value = tl.where(real[None, :], b_out.to(tl.float32), 0.0)  # what the reader will see
        count = tl.minimum(OUT - i_tile * ROWS, ROWS).to(tl.float32)
        b_total = tl.sum(b_value, 1)
        b_apart = tl.where(real[None, :], b_value - (b_total / count)[:, None], 0.0)
        p_tile = p_stats_out + (tokens * TILES + i_tile) * 2
        tl.store(p_tile, b_total, mask=ok)
        tl.store(p_tile + 1, tl.sum(b_apart * b_apart, 1), mask=ok)


@triton.jit
def _row_stats(p_x, p_stats, K: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):
    WIDE: tl.constexpr = triton.next_power_of_2(TILES)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_token, i_tile = tl.program_id(0), tl.arange(0, WIDE)
    columns = i_tile[:, None] * ROWS + tl.arange(0, ROWS)[None, :]  # [WIDE, ROWS]
    real = columns < K
    b_x = tl.load(p_x + i_token * K + columns, mask=real, other=0.0).to(tl.float32)
    count = tl.minimum(tl.maximum(K - i_tile * ROWS, 1), ROWS).to(tl.float32)
    b_total = tl.sum(b_x, 1)
    b_apart = tl.where(real, b_x - (b_total / count)[:, None], 0.0)
    p_tile = p_stats + (i_token * TILES + i_tile) * 2
    tl.store(p_tile, b_total, mask=i_tile < TILES)
    tl.store(p_tile + 1, tl.sum(b_apart * b_apart, 1), mask=i_tile < TILES)


# ---------------------------------------------------------------- launching


def stat_tiles(width: int) -> int:
    """Tiles of a row that have statistics of their own: stats are fp32 [M, stat_tiles(width), 2]."""
    return triton.cdiv(width, ROWS)


def _splits(outputs: int, inputs: int) -> tuple[int, int]:
    """How many parts the columns are cut into, and how long each is. The weight's shape decides, and nothing else:
    this fixes the order of every sum."""
    wanted = max(1, round(PROGRAMS / triton.cdiv(outputs, ROWS)))
    wanted = min(wanted, max(1, inputs // SHORTEST_SPLIT))
    length = triton.cdiv(triton.cdiv(inputs, wanted), 64) * 64
    return triton.cdiv(inputs, length), length


def _tokens(count: int) -> int:
    """Tokens a program takes."""
    return min(128, max(16, triton.next_power_of_2(count)))


def scratch_size(count: int, outputs: int, inputs: int) -> tuple[int, int]:
    """(partials, counters) that a linear of `count` tokens needs."""
    splits, _ = _splits(outputs, inputs)
    tiles = triton.cdiv(outputs, ROWS) * triton.cdiv(count, _tokens(count))
    return (splits * tiles * _tokens(count) * ROWS, tiles) if splits > 1 else (0, 0)


def _launch(
    x: torch.Tensor,
    stats: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    epsilon: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    stats_out: torch.Tensor | None,
    partials: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    check_runs(x, "linear")
    count, inputs = x.shape
    outputs = weight.shape[0]
    splits, length = _splits(outputs, inputs)
    tokens = _tokens(count)
    settings = _settings(x.element_size(), tokens)
    _linear[(triton.cdiv(outputs, ROWS), splits, triton.cdiv(count, tokens))](
        x,
        stats,
        norm_weight,
        norm_bias,
        weight,
        bias,
        residual,
        out,
        stats_out,
        partials,
        counters,
        count,
        epsilon,
        OUT=outputs,
        K=inputs,
        NORM=norm_weight is not None,
        STAT_TILES=stat_tiles(inputs),
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        ACTIVATION=activation,
        STATS=stats_out is not None,
        SPLITS=splits,
        SPLIT_K=length,
        ROWS=ROWS,
        TOKENS=tokens,
        LINE=128 // x.element_size(),
        **settings,
        **launch_options(x.device),
    )


def _settings(itemsize: int, tokens: int) -> dict[str, int]:
    """BLOCK_K and how many of them are in flight: three programs must fit on a multiprocessor."""
    return {"BLOCK_K": 128 // itemsize, "num_warps": 4, "num_stages": 4 if tokens <= 64 else 3}


_op = register(
    "linear(Tensor x, Tensor? stats, Tensor? norm_weight, Tensor? norm_bias, float epsilon, Tensor weight, "
    "Tensor? bias, int activation, Tensor? residual, Tensor(a!) out, Tensor(b!)? stats_out, Tensor(c!) partials, "
    "Tensor(d!) counters) -> ()",
    _launch,
)


def _launch_stats(x: torch.Tensor, stats: torch.Tensor) -> None:
    check_runs(x, "row_stats")
    _row_stats[(x.shape[0],)](
        x,
        stats,
        K=x.shape[1],
        TILES=stat_tiles(x.shape[1]),
        ROWS=ROWS,
        num_warps=4,
        **launch_options(x.device),
    )


_stats_op = register("row_stats(Tensor x, Tensor(a!) stats) -> ()", _launch_stats)


# ---------------------------------------------------------------- public functions


def row_stats(x: torch.Tensor, stats: torch.Tensor) -> None:
    """Statistics of x [M, K] for `norm_linear`: fp32 [M, stat_tiles(K), 2], the sum of each tile of 64 columns and the
    sum of squares around the tile's mean.

    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    op = "row_stats"
    check_runs(x, op)
    check_tensor(op, "x", x, (None, None), DTYPES, x.device)
    check_tensor(op, "stats", stats, (x.shape[0], stat_tiles(x.shape[1]), 2), torch.float32, x.device)
    _stats_op(x, stats)


def norm_linear(
    x: torch.Tensor,
    stats: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    epsilon: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    """out = activation(LayerNorm(x) @ weight.T + bias).

    x: [M, K] of fp32, fp16 or bf16, M from 1 to 256. stats: of `row_stats` or `linear_add`. norm_weight, norm_bias [K],
    weight [OUT, K], bias [OUT] or None: of x's dtype. out: [M, OUT] of x's dtype or fp32. Sums are in fp32; what
    LayerNorm gives is rounded to x's dtype, as in plain torch. activation: a name that `activation_known` knows.

    Raises ValueError for a wrong shape, dtype, device or layout, and for an unknown activation.
    """
    op = "norm_linear"
    _check(op, x, weight, bias, out, (x.dtype, torch.float32), scratch)
    for name, part in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_tensor(op, name, part, (x.shape[1],), x.dtype, x.device)
    check_tensor(op, "stats", stats, (x.shape[0], stat_tiles(x.shape[1]), 2), torch.float32, x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _op(
        x, stats, norm_weight, norm_bias, epsilon, weight, bias, ACTIVATIONS[activation],
        None, out, None, scratch.partials, scratch.counters,
    )  # fmt: skip


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor | None,
    scratch: Scratch,
) -> None:
    """out = residual + x @ weight.T + bias, and the statistics of out for the LayerNorm that comes next.

    x: [M, K] of fp32, fp16 or bf16, M from 1 to 256. weight [OUT, K], bias [OUT] or None, residual and out [M, OUT]: of
    x's dtype; out may be the residual itself. stats: fp32 [M, stat_tiles(OUT), 2] or None. Rounded once.

    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    op = "linear_add"
    _check(op, x, weight, bias, out, (x.dtype,), scratch)
    check_tensor(op, "residual", residual, tuple(out.shape), x.dtype, x.device)
    if stats is not None:
        check_tensor(op, "stats", stats, (x.shape[0], stat_tiles(out.shape[1]), 2), torch.float32, x.device)
    _op(
        x, None, None, None, 0.0, weight, bias, 0, residual, out, stats, scratch.partials, scratch.counters,
    )  # fmt: skip


def _check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    out_dtypes: tuple[torch.dtype, ...],
    scratch: Scratch,
) -> None:
    check_runs(x, op)
    check_tensor(op, "x", x, (None, None), DTYPES, x.device)
    count, inputs = x.shape
    if not 1 <= count <= MAX_TOKENS:
        raise ValueError(f"{op}: x must have 1 to {MAX_TOKENS} rows, got {count}; split it")
    check_tensor(op, "weight", weight, (None, inputs), x.dtype, x.device)
    outputs = weight.shape[0]
    if bias is not None:
        check_tensor(op, "bias", bias, (outputs,), x.dtype, x.device)
    check_tensor(op, "out", out, (count, outputs), out_dtypes, x.device)
    check_tensor(op, "scratch.partials", scratch.partials, (None,), torch.float32, x.device)
    check_tensor(op, "scratch.counters", scratch.counters, (None,), torch.int32, x.device)
    need, have = scratch_size(count, outputs, inputs), (scratch.partials.numel(), scratch.counters.numel())
    if have[0] < need[0] or have[1] < need[1]:
        raise ValueError(f"{op}: scratch must hold {need} (partials, counters), got {have}; see scratch_size")


# ---------------------------------------------------------------- compiling without a GPU

_POINTERS = (
    "p_x", "p_norm_weight", "p_norm_bias", "p_weight", "p_bias", "p_residual", "p_out"
)  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """The four linears of GPT-2 S to XL and of the embedded models in bf16, at 16 and 64 tokens."""
    models = {"s": (768, 3072), "m": (1024, 4096), "l": (1280, 5120), "xl": (1600, 6400), "target": (384, 1728)}
    cases = []
    for model, (width, inner) in models.items():
        layers = {
            "qkv": (3 * width, width, True, 0),
            "projection": (width, width, False, 0),
            "up": (inner, width, True, 3),
            "down": (width, inner, False, 0),
        }
        for layer, (outputs, inputs, norm, activation) in layers.items():
            for tokens in (16, 64):
                cases.append(_case(f"{model} {layer} {tokens}", outputs, inputs, norm, activation, tokens))
    return cases


def _case(name: str, outputs: int, inputs: int, norm: bool, activation: int, tokens: int) -> CompileCase:
    splits, length = _splits(outputs, inputs)
    settings = _settings(2, tokens)
    absent = ("p_residual", "p_stats_out") if norm else ("p_stats", "p_norm_weight", "p_norm_bias")
    pointers = dict.fromkeys(_POINTERS, "*bf16") | dict.fromkeys(("p_stats", "p_stats_out", "p_partials"), "*fp32")
    kinds = pointers | {"p_counters": "*i32", "M": "i32", "epsilon": "fp32"}
    constants = {
        "OUT": outputs,
        "K": inputs,
        "NORM": norm,
        "STAT_TILES": stat_tiles(inputs),
        "BIAS": True,
        "RESIDUAL": not norm,
        "ACTIVATION": activation,
        "STATS": not norm,
        "SPLITS": splits,
        "SPLIT_K": length,
        "ROWS": ROWS,
        "BLOCK_K": settings["BLOCK_K"],
        "TOKENS": tokens,
        "LINE": 64,
        "PDL": False,
    }
    signature = {name: kinds.get(name, "constexpr") for name in _linear.arg_names}
    present = tuple(name for name, kind in kinds.items() if kind.startswith("*") and name not in absent)
    return CompileCase(
        name,
        _linear,
        signature,
        constants | dict.fromkeys(absent),
        settings["num_warps"],
        settings["num_stages"],
        matrix=True,
        aligned=present,
    )
