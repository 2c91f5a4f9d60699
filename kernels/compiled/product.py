"""Matrix products of a few rows, with weights in packed blocks, as vector instructions.

    y [M, out] = x [M, in] @ weight + bias

A weight is cut into blocks of COLUMNS outputs. A block holds all its inputs in turn, so that it streams through a core
once, in order. A tile of up to TILE rows and one block of columns stays in vector registers while the inputs go by.

Bits: an output is the sum over chunks of DEPTH inputs, in order, each chunk's sum a chain of fused multiply-adds, in
order. Neither the number of rows nor the number of threads changes it. Bytes: the weights once, as they are kept: in
fp32, or in fp16 or bf16 where that holds the same numbers (`pack`), as in checkpoints that were saved so.
"""

import platform
from collections.abc import Callable, Iterable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features

from stagedspec.kernels.compiled.build import inlined, instruction


def _features() -> set[str]:
    """The features of the processor that Numba compiles for, by LLVM's names: this one's, unless set otherwise."""
    settings: Any = numba.config  # its names are set when it is imported
    given = settings.CPU_FEATURES
    if given is None:
        given = "" if settings.CPU_NAME else get_host_cpu_features()
    return {name[1:] for name in given.split(",") if name.startswith("+")}


_FEATURES, _X86 = _features(), platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
# Lanes of a vector register, and vectors of a block: with TILE rows of sums, all registers but a few.
LANES, VECTORS = (16, 4) if "avx512f" in _FEATURES else (8, 2) if "avx2" in _FEATURES else (4, 4)
COLUMNS = LANES * VECTORS  # of a block
TILE = 6  # most rows of a tile
DEPTH = 128  # inputs that are summed before their sum is added to the output
STRIP = 32  # inputs that all tiles take before the next ones, where there are several tiles
AHEAD = 4096  # bytes that a block is fetched ahead: the hardware's own prefetching ends at every page
FUSED = "fma" in _FEATURES or not _X86  # other processors have it
HALVES = "f16c" in _FEATURES or not _X86  # fp16 to fp32 as one instruction
EXACT = ("nsz",)  # flags of sums: with none, Numba would let LLVM put them in another order
f32 = np.float32

# How a packed weight is kept: Numba has no 16-bit floats on a CPU, so an integer type stands for each.
_KEPT = {torch.float32: np.float32, torch.float16: np.uint16, torch.bfloat16: np.int16}


def exact_dtype(weights: Iterable[torch.Tensor]) -> torch.dtype:
    """The smallest dtype that holds fp32 weights, looked at one by one, without a change."""
    narrow = [torch.float16, torch.bfloat16] if HALVES else [torch.bfloat16]
    for weight in weights:
        narrow = [dtype for dtype in narrow if torch.equal(weight.to(dtype).float(), weight)]
        if not narrow:
            return torch.float32
    return narrow[0]


def pack(weight: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """weight [out, in] -> blocks [ceil(out / COLUMNS), in, COLUMNS], filled up with zeros. dtype: of `exact_dtype`."""
    blocks = -(-weight.shape[0] // COLUMNS)
    whole = torch.zeros(blocks * COLUMNS, weight.shape[1], dtype=dtype, device="cpu")
    whole[: weight.shape[0]] = weight
    packed = whole.view(blocks, COLUMNS, -1).transpose(1, 2)
    kept = packed if dtype == torch.float32 else packed.view(torch.int16)
    return kept.numpy().view(_KEPT[dtype]).copy(order="C")


def _vector(builder: ir.IRBuilder, kept: Any, address: ir.Value, vector: ir.VectorType) -> ir.Value:
    """The LANES weights at an address, as fp32."""
    if kept == types.float32:
        return builder.load(builder.inttoptr(address, vector.as_pointer()), align=4)
    if kept == types.uint16:
        half = ir.VectorType(ir.HalfType(), LANES)
        return builder.fpext(builder.load(builder.inttoptr(address, half.as_pointer()), align=2), vector)
    short, whole = (ir.VectorType(ir.IntType(bits), LANES) for bits in (16, 32))
    bits = builder.zext(builder.load(builder.inttoptr(address, short.as_pointer()), align=2), whole)
    return builder.bitcast(builder.shl(bits, ir.Constant(whole, [16] * LANES)), vector)


def _tile(rows: int, alone: bool = True) -> Callable:
    """An intrinsic function: y [rows, COLUMNS] += x [rows, depth] @ block [depth, COLUMNS], all by their addresses.

    Arguments: x, bytes from one row of x to the next, the array of blocks (for its type), the block's address, depth,
    y, bytes from one row of y to the next, the address to fetch for later (ahead), and by how many bytes that moves on
    with each input (pace). For each input as much is fetched as it has weights.

    not alone: one of several tiles. y is where its sums begin and end, not what they are added to, and it fetches half
    as much.
    """

    @instruction
    def tile(
        context: Any,
        x: Any,
        x_stride: Any,
        weights: Any,
        block: Any,
        depth: Any,
        y: Any,
        y_stride: Any,
        ahead: Any,
        pace: Any,
    ) -> tuple[Any, Callable]:
        kept = weights.dtype
        size = kept.bitwidth // 8

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> ir.Value:
            x, x_stride, _, block, depth, y, y_stride, ahead, pace = arguments
            whole, real, byte = ir.IntType(64), ir.FloatType(), ir.IntType(8)
            vector, index = ir.VectorType(real, LANES), ir.IntType(32)
            number = lambda value: ir.Constant(whole, value)  # noqa: E731
            if FUSED:
                kind = ir.FunctionType(vector, [vector] * 3)
                fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
            kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), index, index, index])
            prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")

            places = []
            for row in range(rows):
                start = builder.add(y, builder.mul(y_stride, number(row)))
                for part in range(VECTORS):
                    place = builder.add(start, number(part * LANES * 4))
                    places.append(builder.inttoptr(place, vector.as_pointer()))
            none_so_far = ir.Constant(vector, [0.0] * LANES)
            begin = [none_so_far if alone else builder.load(place, align=4) for place in places]
            before, loop = builder.block, builder.append_basic_block("inputs")
            after = builder.append_basic_block("sums")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(whole)
            k.add_incoming(number(0), before)
            sums = [builder.phi(vector) for _ in range(rows * VECTORS)]
            for one, given in zip(sums, begin, strict=True):
                one.add_incoming(given, before)
            line = builder.add(block, builder.mul(k, number(COLUMNS * size)))
            weights = [
                _vector(builder, kept, builder.add(line, number(part * LANES * size)), vector)
                for part in range(VECTORS)
            ]
            for part in range(0, COLUMNS * size // (1 if alone else 2), 64):
                place = builder.add(builder.add(ahead, builder.mul(k, pace)), number(part))
                line_ahead = builder.inttoptr(place, byte.as_pointer())
                builder.call(prefetch, [line_ahead, index(0), index(2), index(1)])
            added = []
            for row in range(rows):
                place = builder.add(x, builder.mul(x_stride, number(row)))
                place = builder.add(place, builder.mul(k, number(4)))
                value = builder.load(builder.inttoptr(place, real.as_pointer()), align=4)
                none = ir.Constant(vector, ir.Undefined)
                lanes = builder.insert_element(none, value, index(0))
                lanes = builder.shuffle_vector(lanes, none, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))
                for part, weight in enumerate(weights):
                    sum_so_far = sums[row * VECTORS + part]
                    if FUSED:
                        added.append(builder.call(fused, [lanes, weight, sum_so_far]))
                    else:
                        step = builder.fmul(lanes, weight, flags=EXACT)
                        added.append(builder.fadd(sum_so_far, step, flags=EXACT))
            following = builder.add(k, number(1))
            k.add_incoming(following, loop)
            for one, result in zip(sums, added, strict=True):
                one.add_incoming(result, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
            builder.position_at_end(after)
            for place, result in zip(places, added, strict=True):
                if alone:
                    result = builder.fadd(builder.load(place, align=4), result, flags=EXACT)
                builder.store(result, place, align=4)
            return context.get_dummy_value()

        place = types.intp
        return types.void(place, place, weights, place, place, place, place, place, place), generate

    return tile


_one, _two, _three, _four, _five, _six = (_tile(rows) for rows in range(1, TILE + 1))
_next_three, _next_four, _next_five, _next_six = (_tile(rows, alone=False) for rows in range(3, TILE + 1))


@inlined
def multiply(
    x: np.ndarray, rows: int, weights: np.ndarray, bias: np.ndarray, y: np.ndarray, block: int, spare: np.ndarray
) -> None:
    """The columns of one block of y [>= rows, out] = x [>= rows, in] @ weights + bias.

    weights: blocks of `pack`; bias: fp32 [blocks * COLUMNS]. x and y are contiguous; spare: memory
    [2, >= rows, COLUMNS].
    """
    first = block * COLUMNS
    last, sums = min(y.shape[1], first + COLUMNS), spare[0]
    for n in range(rows):
        for j in range(COLUMNS):
            sums[n, j] = bias[first + j]
    _add_products(x, rows, weights, block, sums, spare[1])
    for n in range(rows):
        for j in range(first, last):
            y[n, j] = sums[n, j - first]


@inlined
def _add_products(x: np.ndarray, rows: int, weights: np.ndarray, block: int, y: np.ndarray, chunk: np.ndarray) -> None:
    """y [>= rows, COLUMNS] += x [>= rows, in] @ block. chunk: memory of the shape of y."""
    depth = x.shape[1]
    x_stride, y_stride = depth * 4, COLUMNS * 4
    start, line = weights[block].ctypes.data, COLUMNS * weights.itemsize
    tiles = (rows + TILE - 1) // TILE
    for k in range(0, depth, DEPTH):
        count = min(DEPTH, depth - k)
        w, a, b = start + k * line, x.ctypes.data + k * 4, y.ctypes.data
        if tiles == 1:
            ahead = w + AHEAD
            if rows == 1:
                _one(a, x_stride, weights, w, count, b, y_stride, ahead, line)
            elif rows == 2:
                _two(a, x_stride, weights, w, count, b, y_stride, ahead, line)
            elif rows == 3:
                _three(a, x_stride, weights, w, count, b, y_stride, ahead, line)
            elif rows == 4:
                _four(a, x_stride, weights, w, count, b, y_stride, ahead, line)
            elif rows == 5:
                _five(a, x_stride, weights, w, count, b, y_stride, ahead, line)
            else:
                _six(a, x_stride, weights, w, count, b, y_stride, ahead, line)
            continue
        # A few inputs at a time for all tiles, so that their weights stay in the nearest cache. Each tile fetches its
        # part of what comes next.
        for n in range(rows):
            for j in range(COLUMNS):
                chunk[n, j] = f32(0)
        for part in range(0, count, STRIP):
            strip = min(STRIP, count - part)
            c, n = chunk.ctypes.data, 0
            a, w_part = x.ctypes.data + (k + part) * 4, w + part * line
            for t in range(tiles):
                size = (rows - n + tiles - t - 1) // (tiles - t)  # of tiles as equal as can be
                ahead, pace = w_part + strip * line + t * (strip * line // tiles), line // tiles
                if size == 3:
                    _next_three(a, x_stride, weights, w_part, strip, c, y_stride, ahead, pace)
                elif size == 4:
                    _next_four(a, x_stride, weights, w_part, strip, c, y_stride, ahead, pace)
                elif size == 5:
                    _next_five(a, x_stride, weights, w_part, strip, c, y_stride, ahead, pace)
                else:
                    _next_six(a, x_stride, weights, w_part, strip, c, y_stride, ahead, pace)
                n, a, c = n + size, a + size * x_stride, c + size * y_stride
        for n in range(rows):
            for j in range(COLUMNS):
                y[n, j] += chunk[n, j]
