"""The linears of kernel.py and hopper.py as operations: launch settings, launchers, checks of arguments."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    FLOATS,
    Scratch,
    architecture,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    most_registers,
    register,
)
from stagedspec.kernels.linear.kernel import ACTIVATIONS, HOPPER_SPLIT, ROWS, _linear, _row_stats, stat_tiles
from stagedspec.kernels.linear.records import NO_NORM, Epilogue, Norm

MAX_TOKENS = 1024
# Splits: a weight of WIDE tiles of rows has enough programs without them; a narrower one is cut for PROGRAMS.
WIDE = 48
PROGRAMS = 100
MOST_SPLITS = 6  # the program that adds the parts up holds all of them in registers
SHORTEST_SPLIT = 256  # columns
SPILLING = (120,)  # see `most_registers`
ROOMY = 160 << 10  # shared memory a block may take, bytes, as on A100 and H100


def activation_known(name: str) -> bool:
    """Whether the kernels apply the activation, by its name in transformers."""
    return name in ACTIVATIONS


# ---------------------------------------------------------------- launching


def split_columns(outputs: int, inputs: int) -> tuple[int, int]:
    """How many parts the columns are cut into, and how long each is. The weight's shape decides, and nothing else:
    this fixes the order of every sum."""
    tiles = triton.cdiv(outputs, ROWS)
    wanted = 1 if tiles >= WIDE else min(PROGRAMS // tiles, inputs // SHORTEST_SPLIT, MOST_SPLITS)
    length = triton.cdiv(triton.cdiv(inputs, max(1, wanted)), 128) * 128
    return triton.cdiv(inputs, length), length


def token_tile(count: int, itemsize: int) -> int:
    """Tokens a program takes. In fp32, without wide matrix instructions, the tile changes the order of sums, so
    there is only one."""
    return 16 if itemsize == 4 else min(64, max(16, triton.next_power_of_2(count)))


def scratch_size(count: int, outputs: int, inputs: int) -> tuple[int, int]:
    """(partials, counters) that a linear of `count` tokens needs, in any dtype and on any device."""
    splits, on_hopper = split_columns(outputs, inputs)[0], triton.cdiv(inputs, HOPPER_SPLIT)
    splits = max(splits, on_hopper if on_hopper <= MOST_SPLITS else 1)
    tiles, tokens = triton.cdiv(outputs, ROWS), token_tile(count, 2)
    if splits == 1:
        return 0, 0
    return splits * tiles * ROWS * triton.cdiv(count, tokens) * tokens, tiles * triton.cdiv(count, 16)


def by_hopper(itemsize: int, inputs: int, device: torch.device) -> bool:
    """Whether the kernel for Hopper runs, of linears and of heads alike. It copies rows of a multiple of 16 bytes."""
    return itemsize == 2 and inputs % 8 == 0 and inputs <= HOPPER_SPLIT * MOST_SPLITS and architecture(device) == 90


def default_settings(itemsize: int, tokens: int, length: int, roomy: bool = False) -> dict[str, int]:
    """BLOCK_K columns are multiplied at a time, num_stages of them are in flight. AHEAD: load weight columns before
    the previous kernel ends; x is then loaded one block at a time, which pays where there are few blocks. roomy:
    whether a block may take 128 KB of shared memory."""
    if itemsize == 4:
        return {"BLOCK_K": 32, "num_warps": 4, "num_stages": 3, "AHEAD": 0}
    if length <= 256:
        return {"BLOCK_K": 128, "num_warps": 4, "num_stages": 4, "AHEAD": 1}
    return {"BLOCK_K": 64, "num_warps": 4, "num_stages": 8 if roomy or tokens < 64 else 6, "AHEAD": 0}


@cache
def _roomy(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    properties: Any = torch.cuda.get_device_properties(device)  # Any: torch's stub lacks the name
    return properties.shared_memory_per_block_optin >= ROOMY


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
    norm: Norm,
    weight: torch.Tensor,
    epilogue: Epilogue,
    out: torch.Tensor,
    stats_out: torch.Tensor | None,
    scratch: Scratch,
) -> None:
    check_runs(x, "linear")
    count, inputs = x.shape
    if by_hopper(x.element_size(), inputs, x.device):
        from stagedspec.kernels.linear import hopper  # Gluon takes a while to import

        return hopper.launch(x, norm, weight, epilogue, out, stats_out, scratch)
    outputs = weight.shape[0]
    splits, length = split_columns(outputs, inputs)
    tokens = token_tile(count, x.element_size())
    settings = config("linear", (x.element_size(), tokens, outputs, inputs), x.device, candidates)
    launch_kernel(
        _linear,
        (triton.cdiv(outputs, ROWS), splits, triton.cdiv(count, tokens)),
        x,
        norm.stats,
        norm.sums,
        weight,
        epilogue.bias,
        epilogue.residual,
        out,
        stats_out,
        *scratch,
        count,
        norm.epsilon,
        OUT=outputs,
        K=inputs,
        NORM=norm.stats is not None,
        STAT_TILES=stat_tiles(inputs),
        BIAS=epilogue.bias is not None,
        RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
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
    check_tensor(op, "x", x, (None, None), FLOATS, x.device)
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

    x: [M, K] of fp32, fp16 or bf16, M <= MAX_TOKENS. stats: of `row_stats` or `linear_add`. layer: its weight [OUT, K]
    of x's dtype. out: [M, OUT] of x's dtype or fp32. Sums are in fp32. activation: a name `activation_known` knows.

    Raises ValueError for a wrong shape, dtype, device or layout, and for an unknown activation; where hopper.py
    serves also for views: x and the weight must start at a multiple of 16 bytes, stats of 8.
    """
    op = "norm_linear"
    _check(op, x, layer.weight, out, (x.dtype, torch.float32), scratch)
    _check_bias(op, layer.bias, layer.weight, torch.float32)
    check_tensor(op, "sums", layer.sums, (layer.weight.shape[0],), torch.float32, x.device)
    check_tensor(op, "stats", stats, (x.shape[0], stat_tiles(x.shape[1]), 2), torch.float32, x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    norm, epilogue = Norm(stats, layer.sums, epsilon), Epilogue(layer.bias, ACTIVATIONS[activation], None)
    _op(x, *norm, layer.weight, *epilogue, out, None, *scratch)


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

    x: [M, K] of fp32, fp16 or bf16, M <= MAX_TOKENS. weight [OUT, K], bias [OUT] or None, residual and out [M, OUT]: of
    x's dtype; out may be the residual itself. stats: fp32 [M, stat_tiles(OUT), 2] or None. Rounded once.

    Raises ValueError for a wrong shape, dtype, device or layout; where hopper.py serves also for views: x and
    weight must start at a multiple of 16 bytes.
    """
    op = "linear_add"
    _check(op, x, weight, out, (x.dtype,), scratch)
    _check_bias(op, bias, weight, x.dtype)
    check_tensor(op, "residual", residual, tuple(out.shape), x.dtype, x.device)
    if stats is not None:
        check_tensor(op, "stats", stats, (x.shape[0], stat_tiles(out.shape[1]), 2), torch.float32, x.device)
    _op(x, *NO_NORM, weight, *Epilogue(bias, ACTIVATIONS["none"], residual), out, stats, *scratch)


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
    check_tensor(op, "x", x, (None, None), FLOATS, x.device)
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
