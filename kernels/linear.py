"""Linear layers for few rows: LayerNorm before them, activation or residual after them, in one launch.

    norm_linear:  out = activation(LayerNorm(x) @ weight.T + bias)
    linear_add:   out = residual + x @ weight.T + bias

x [M, K], weight [OUT, K], M from 1 to 256. What must be moved is the weight, once: 2 * OUT * K bytes in bf16. All else
stays in L2. On a large GPU one such kernel takes microseconds, so what costs is whatever stands between the end of the
kernel before and the end of this one; the design keeps that chain short:

- A program multiplies ROWS rows of the weight, the wide left operand of the matrix product, with all tokens, its narrow
  right side. One family of matrix instructions serves every M, and a token's result does not depend on M.
- LayerNorm is folded into the linear (`Folded`): its weight into the rows, its bias into the bias. The product is with
  x as it is, straight from memory into the matrix instructions; what is left of the norm, a scale and a multiple of
  the rows' sums, is applied to the finished tile. Normalising in the loop cost as much as the rest of the kernel.
- Mean and variance of whole rows come from statistics that whoever writes the residual stream leaves beside it, (sum,
  sum of squares around the tile's own mean) of ROWS columns; the reader merges a few of them a row (Chan, Golub,
  LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979). `row_stats` makes them
  for a stream that comes from elsewhere.
- Where rows alone make too few programs, the columns are split at absolute offsets that the weight's shape decides. The
  last program of a tile to arrive adds the parts up in their order.
- With programmatic dependent launch the next kernel is resident while this one runs.

In 16-bit types on Hopper linear_hopper.py does the same with all of its weights in shared memory beforehand; a device
and a weight's shape have one of the two, for every M.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from stagedspec.kernels.common.launch_configs import config
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

# Rows of the weight, a program: the least that Hopper's matrix instructions take. Columns of the residual stream that
# have statistics of their own: who writes a tile has all of it.
ROWS = 64
MAX_TOKENS = 1024
# Splits: a weight of WIDE tiles of rows has enough programs without them; a narrower one is cut for PROGRAMS.
WIDE = 48
PROGRAMS = 100
MOST_SPLITS = 6  # whoever adds the parts up holds all of them in registers
SHORTEST_SPLIT = 256  # columns
HOPPER_SPLIT = 1280  # columns that linear_hopper.py has in shared memory at most
SPILLING = (120,)  # see `most_registers`
ROOMY = 160 << 10  # shared memory a block may take, bytes, as on A100 and H100
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
        b_sum = _activate(b_sum, ACTIVATION)
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
    real = columns < K
    b_x = tl.load(p_x + i_token * K + columns, mask=real, other=0.0).to(tl.float32)
    count = tl.minimum(tl.maximum(K - i_tile * ROWS, 1), ROWS).to(tl.float32)
    b_total = _row_sum(b_x)
    b_apart = tl.where(real, b_x - (b_total / count)[:, None], 0.0)
    p_tile = p_stats + (i_token * TILES + i_tile) * 2
    tl.store(p_tile, b_total, mask=i_tile < TILES)
    tl.store(p_tile + 1, _row_sum(b_apart * b_apart), mask=i_tile < TILES)


# ---------------------------------------------------------------- launching


def stat_tiles(width: int) -> int:
    """Tiles of a row that have statistics of their own: stats are fp32 [M, stat_tiles(width), 2]."""
    return triton.cdiv(width, ROWS)


def split_columns(outputs: int, inputs: int) -> tuple[int, int]:
    """How many parts the columns are cut into, and how long each is. The weight's shape decides, and nothing else:
    this fixes the order of every sum."""
    tiles = triton.cdiv(outputs, ROWS)
    wanted = 1 if tiles >= WIDE else min(PROGRAMS // tiles, inputs // SHORTEST_SPLIT, MOST_SPLITS)
    length = triton.cdiv(triton.cdiv(inputs, max(1, wanted)), 128) * 128
    return triton.cdiv(inputs, length), length


def token_tile(count: int, itemsize: int) -> int:
    """Tokens a program takes. In fp32 there are no wide matrix instructions and another tile is another order of sums:
    there is one."""
    return 16 if itemsize == 4 else min(64, max(16, triton.next_power_of_2(count)))


def scratch_size(count: int, outputs: int, inputs: int) -> tuple[int, int]:
    """(partials, counters) that a linear of `count` tokens needs, in any dtype and on any device."""
    splits, hopper = split_columns(outputs, inputs)[0], triton.cdiv(inputs, HOPPER_SPLIT)
    splits = max(splits, hopper if hopper <= MOST_SPLITS else 1)
    tiles, tokens = triton.cdiv(outputs, ROWS), token_tile(count, 2)
    if splits == 1:
        return 0, 0
    return splits * tiles * ROWS * triton.cdiv(count, tokens) * tokens, tiles * triton.cdiv(count, 16)


def by_hopper(itemsize: int, inputs: int, device: torch.device) -> bool:
    """Whether linear_hopper.py serves (and lm_head_hopper.py, for heads). Its copies are of rows of a multiple of 16
    bytes."""
    return itemsize == 2 and inputs % 8 == 0 and inputs <= HOPPER_SPLIT * MOST_SPLITS and architecture(device) == 90


def default_settings(itemsize: int, tokens: int, length: int, roomy: bool = False) -> dict[str, int]:
    """BLOCK_K columns are multiplied at a time, num_stages of them are in flight. AHEAD: the weight's are asked for
    before the kernel ahead has ended; then x's come a block at a time, which pays where there are few blocks. roomy:
    whether a block may take 128 KB of shared memory."""
    if itemsize == 4:
        return {"BLOCK_K": 32, "num_warps": 4, "num_stages": 3, "AHEAD": 0}
    if length <= 256:
        return {"BLOCK_K": 128, "num_warps": 4, "num_stages": 4, "AHEAD": 1}
    return {"BLOCK_K": 64, "num_warps": 4, "num_stages": 8 if roomy or tokens < 64 else 6, "AHEAD": 0}


@cache
def _roomy(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= ROOMY


def candidates(shape: tuple[int, ...], device: torch.device) -> list[dict[str, int]]:
    """Settings to try at the shape (bytes of an element, tokens of a program, outputs, inputs), the default first.
    Splits, which fix the order of every sum, are not among them."""
    itemsize, tokens, outputs, inputs = shape
    default = default_settings(itemsize, tokens, split_columns(outputs, inputs)[1], _roomy(device))
    if itemsize == 4:
        others = [default | {"num_stages": stages} for stages in (2, 4)]
    else:
        others = [
            {"BLOCK_K": block, "num_warps": 4, "num_stages": stages, "AHEAD": ahead}
            for block, stages in ((64, 4), (64, 6), (64, 8), (128, 3), (128, 4))
            for ahead in (0, 1)
        ]
    return [default] + [other for other in others if other != default]


def _launch(
    x: torch.Tensor,
    stats: torch.Tensor | None,
    sums: torch.Tensor | None,
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
    if by_hopper(x.element_size(), inputs, x.device):
        from stagedspec.kernels import linear_hopper

        arguments = stats, sums, epsilon, weight, bias, activation, residual, out, stats_out, partials, counters
        return linear_hopper.launch(x, *arguments)
    outputs = weight.shape[0]
    splits, length = split_columns(outputs, inputs)
    tokens = token_tile(count, x.element_size())
    settings = config("linear", (x.element_size(), tokens, outputs, inputs), x.device, candidates)
    launch_kernel(
        _linear,
        (triton.cdiv(outputs, ROWS), splits, triton.cdiv(count, tokens)),
        x,
        stats,
        sums,
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
        NORM=stats is not None,
        STAT_TILES=stat_tiles(inputs),
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        ACTIVATION=activation,
        STATS=stats_out is not None,
        SPLITS=splits,
        SPLIT_K=length,
        ROWS=ROWS,
        TOKENS=tokens,
        maxnreg=most_registers(architecture(x.device), settings["num_warps"], SPILLING),
        **settings,
        **launch_options(x.device),
    )


_op = register(
    "linear(Tensor x, Tensor? stats, Tensor? sums, float epsilon, Tensor weight, Tensor? bias, int activation, "
    "Tensor? residual, Tensor(a!) out, Tensor(b!)? stats_out, Tensor(c!) partials, Tensor(d!) counters) -> ()",
    _launch,
)


def _launch_stats(x: torch.Tensor, stats: torch.Tensor) -> None:
    check_runs(x, "row_stats")
    launch_kernel(
        _row_stats,
        (x.shape[0],),
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


@dataclass(frozen=True)
class Folded:
    """A linear with the LayerNorm before it folded in: LayerNorm(x) @ W.T + b with the norm's weight g and bias h is

        (x @ weight.T - mean * sums) / deviation + bias,    weight = W * g, sums = weight.sum(1), bias = b + W @ h

    weight [OUT, K] is rounded to W's dtype, where plain torch rounds the normalised x: as many roundings. sums and bias
    [OUT] are fp32, of the rounded weight and of the exact one.
    """

    weight: torch.Tensor
    sums: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(
        cls, norm_weight: torch.Tensor, norm_bias: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> "Folded":
        """norm_weight, norm_bias [K], weight [OUT, K], bias [OUT] or None."""
        wide = weight.double()
        folded = (wide * norm_weight.double()).to(weight.dtype).contiguous()
        shift = wide @ norm_bias.double()
        if bias is not None:
            shift = shift + bias.double()
        return cls(folded, folded.double().sum(1).float(), shift.float())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, scratch: Scratch):
    """out = x @ weight.T + bias. Arguments as of `norm_linear`, bias of x's dtype or None."""
    _check("linear", x, weight, out, (x.dtype, torch.float32), scratch)
    _check_bias("linear", bias, weight, x.dtype)
    _op(x, None, None, 0.0, weight, bias, 0, None, out, None, scratch.partials, scratch.counters)


def norm_linear(
    x: torch.Tensor,
    stats: torch.Tensor,
    epsilon: float,
    layer: Folded,
    activation: str,
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    """out = activation(LayerNorm(x) @ weight.T + bias).

    x: [M, K] of fp32, fp16 or bf16, M from 1 to 256. stats: of `row_stats` or `linear_add`. layer: its weight [OUT, K]
    of x's dtype. out: [M, OUT] of x's dtype or fp32. Sums are in fp32. activation: a name `activation_known` knows.

    Raises ValueError for a wrong shape, dtype, device or layout, and for an unknown activation; where linear_hopper.py
    serves also for views: x and the weight must start at a multiple of 16 bytes, stats of 8.
    """
    op = "norm_linear"
    _check(op, x, layer.weight, out, (x.dtype, torch.float32), scratch)
    _check_bias(op, layer.bias, layer.weight, torch.float32)
    check_tensor(op, "sums", layer.sums, (layer.weight.shape[0],), torch.float32, x.device)
    check_tensor(op, "stats", stats, (x.shape[0], stat_tiles(x.shape[1]), 2), torch.float32, x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _op(
        x, stats, layer.sums, epsilon, layer.weight, layer.bias, ACTIVATIONS[activation],
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

    Raises ValueError for a wrong shape, dtype, device or layout; where linear_hopper.py serves also for views: x and
    weight must start at a multiple of 16 bytes.
    """
    op = "linear_add"
    _check(op, x, weight, out, (x.dtype,), scratch)
    _check_bias(op, bias, weight, x.dtype)
    check_tensor(op, "residual", residual, tuple(out.shape), x.dtype, x.device)
    if stats is not None:
        check_tensor(op, "stats", stats, (x.shape[0], stat_tiles(out.shape[1]), 2), torch.float32, x.device)
    _op(x, None, None, 0.0, weight, bias, 0, residual, out, stats, scratch.partials, scratch.counters)


def _check_bias(op: str, bias: torch.Tensor | None, weight: torch.Tensor, dtype: torch.dtype) -> None:
    if bias is not None:
        check_tensor(op, "bias", bias, (weight.shape[0],), dtype, weight.device)


def _check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
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
    check_tensor(op, "out", out, (count, outputs), out_dtypes, x.device)
    check_tensor(op, "scratch.partials", scratch.partials, (None,), torch.float32, x.device)
    check_tensor(op, "scratch.counters", scratch.counters, (None,), torch.int32, x.device)
    need, have = scratch_size(count, outputs, inputs), (scratch.partials.numel(), scratch.counters.numel())
    if have[0] < need[0] or have[1] < need[1]:
        raise ValueError(f"{op}: scratch must hold {need} (partials, counters), got {have}; see scratch_size")
