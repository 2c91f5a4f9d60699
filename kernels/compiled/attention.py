"""Attention of one head of some nodes over keys and values that lie in rows of a KV cache, as vector instructions.

Each node has a list of the rows that it attends to, in the order of their positions. The nodes of a tree share most of
them: so a block of keys serves all nodes while it is in the nearest cache, and then a block of values. A score is the
sum over strips of the head, in order, each added up across the lanes of a vector; an output is the sum over the keys,
in order. So a result depends on the query and on the listed keys and values alone, wherever they lie and whatever the
other nodes are.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from stagedspec.kernels.compiled.build import compiled, instruction
from stagedspec.kernels.compiled.product import EXACT, FUSED, LANES

f32 = np.float32
NEVER = f32(np.finfo(f32).min)
WIDE, NARROW = 64, 16  # numbers of a head that are taken at once
BLOCK = 16  # keys that stay in the nearest cache while all nodes take them
GROUP = 16  # most nodes of a task
AHEAD = 16  # keys or values that are fetched ahead: one lies too far from the next for the hardware's own prefetching


class _Loop:
    """What loops over keys share. Between `start` and `end`, `builder` writes into a round of the loop, number k."""

    def __init__(self, builder: ir.IRBuilder, cache: ir.Value, stride: ir.Value, rows: ir.Value, count: ir.Value):
        self.builder, self.count = builder, count
        self.whole, self.real = ir.IntType(64), ir.FloatType()
        self.vector = ir.VectorType(self.real, LANES)
        self.before = builder.block
        self.round, self.after = builder.append_basic_block("keys"), builder.append_basic_block("end")
        self._cache, self._stride, self._rows = cache, stride, rows

    def start(self) -> None:
        """Begins the loop, which has no round if there are no keys."""
        builder = self.builder
        builder.cbranch(builder.icmp_signed(">", self.count, self.number(0)), self.round, self.after)
        builder.position_at_end(self.round)
        self.k = builder.phi(self.whole)
        self.k.add_incoming(self.number(0), self.before)

    def address(self) -> ir.Value:
        """Of the key or value of this round."""
        row = self.builder.sext(self.load(self._rows, self.k, ir.IntType(32), 4), self.whole)
        return self.builder.add(self._cache, self.builder.mul(row, self._stride))

    def fetch(self, address: ir.Value, size: int) -> None:
        """Fetches the key or value AHEAD rows later, of `size` numbers, into the nearest cache. Committed tokens lie in
        order; what is fetched in vain does no harm."""
        byte, index = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), index, index, index])
        prefetch = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        later = self.builder.add(address, self.builder.mul(self._stride, self.number(AHEAD)))
        for part in range(0, size * 4, 64):
            line = self.place(later, part, byte, 1)
            self.builder.call(prefetch, [line, *(ir.Constant(index, value) for value in (0, 3, 1))])

    def end(self) -> None:
        following = self.builder.add(self.k, self.number(1))
        self.k.add_incoming(following, self.round)
        self.builder.cbranch(self.builder.icmp_signed("<", following, self.count), self.round, self.after)
        self.builder.position_at_end(self.after)

    def number(self, value: int) -> ir.Value:
        return ir.Constant(self.whole, value)

    def place(self, start: ir.Value, index: ir.Value | int, kind: ir.Type, size: int) -> ir.Value:
        index = self.number(index) if isinstance(index, int) else index
        offset = self.builder.mul(index, self.number(size))
        return self.builder.inttoptr(self.builder.add(start, offset), kind.as_pointer())

    def load(self, start: ir.Value, index: ir.Value | int, kind: ir.Type, size: int) -> ir.Value:
        return self.builder.load(self.place(start, index, kind, size), align=4)

    def fused(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c."""
        if not FUSED:
            return self.builder.fadd(self.builder.fmul(a, b, flags=EXACT), c, flags=EXACT)
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c]
        )


def _scores(size: int) -> Callable:
    """An intrinsic: scores[k] += query [size] . key k, all by their addresses.

    Arguments: query, the cache, bytes from one row of it to the next, the rows of the keys (int32), how many, scores.
    """

    @instruction
    def scores(
        context: Any, query: Any, cache: Any, stride: Any, rows: Any, count: Any, out: Any
    ) -> tuple[Any, Callable]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> ir.Value:
            query, cache, stride, rows, count, out = arguments
            loop = _Loop(builder, cache, stride, rows, count)
            parts = range(size // LANES)
            queries = [loop.load(query, part, loop.vector, LANES * 4) for part in parts]
            loop.start()
            key = loop.address()
            loop.fetch(key, size)
            total = builder.fmul(queries[0], loop.load(key, 0, loop.vector, LANES * 4), flags=EXACT)
            for part in parts[1:]:
                total = loop.fused(queries[part], loop.load(key, part, loop.vector, LANES * 4), total)
            lanes = LANES
            while lanes > 1:  # the upper half is added to the lower one
                lanes //= 2
                halves = [range(lanes), range(lanes, 2 * lanes)]
                index = ir.IntType(32)
                low, high = (
                    builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(index, lanes), list(half)))
                    for half in halves
                )
                total = builder.fadd(low, high, flags=EXACT)
            place = loop.place(out, loop.k, loop.real, 4)
            one = builder.extract_element(total, ir.Constant(ir.IntType(32), 0))
            builder.store(builder.fadd(builder.load(place, align=4), one, flags=EXACT), place, align=4)
            loop.end()
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return scores


def _mix(size: int) -> Callable:
    """An intrinsic: out [size] += sum of shares[k] * value k, in order.

    Arguments: shares, the cache, bytes from one row of it to the next, the rows of the values (int32), how many, out.
    """

    @instruction
    def mix(
        context: Any, shares: Any, cache: Any, stride: Any, rows: Any, count: Any, out: Any
    ) -> tuple[Any, Callable]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> ir.Value:
            shares, cache, stride, rows, count, out = arguments
            loop = _Loop(builder, cache, stride, rows, count)
            parts = range(size // LANES)
            none = ir.Constant(loop.vector, ir.Undefined)
            begin = [loop.load(out, part, loop.vector, LANES * 4) for part in parts]
            loop.start()
            sums = [builder.phi(loop.vector) for _ in parts]
            for one, given in zip(sums, begin, strict=True):
                one.add_incoming(given, loop.before)
            value, share = loop.address(), loop.load(shares, loop.k, loop.real, 4)
            loop.fetch(value, size)
            first = builder.insert_element(none, share, ir.Constant(ir.IntType(32), 0))
            lanes = builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))
            added = [loop.fused(lanes, loop.load(value, part, loop.vector, LANES * 4), sums[part]) for part in parts]
            for one, result in zip(sums, added, strict=True):
                one.add_incoming(result, loop.round)
            loop.end()
            for part, result in zip(parts, added, strict=True):
                final = builder.phi(loop.vector)
                final.add_incoming(begin[part], loop.before)
                final.add_incoming(result, loop.round)
                added[part] = final
            for part in parts:
                builder.store(added[part], loop.place(out, part, loop.vector, LANES * 4), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return mix


_wide_scores, _narrow_scores, _wide_mix, _narrow_mix = _scores(WIDE), _scores(NARROW), _mix(WIDE), _mix(NARROW)


@instruction
def _two_to_the(context: Any, exponent: Any) -> tuple[Any, Callable]:
    """2^exponent as fp32, of a whole number between -126 and 127 in fp32."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> ir.Value:
        whole = ir.IntType(32)
        biased = builder.add(builder.fptosi(arguments[0], whole), ir.Constant(whole, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(whole, 23)), ir.FloatType())

    return types.float32(types.float32), generate


@compiled
def exp(x: np.float32) -> np.float32:
    """e^x within two units in the last place; below -87 it is as at -87; NaN of NaN. A polynomial, so that loops become
    vectors."""
    given, x = x, min(max(x, f32(-87)), f32(88)) if x == x else f32(0)
    whole = np.floor(x * f32(1.44269504) + f32(0.5))
    rest = (x - whole * f32(0.693359375)) + whole * f32(2.12194440e-4)  # ln 2 in two parts
    p = f32(1.9875691500e-4)
    p = p * rest + f32(1.3981999507e-3)
    p = p * rest + f32(8.3334519073e-3)
    p = p * rest + f32(4.1665795894e-2)
    p = p * rest + f32(1.6666665459e-1)
    p = p * rest + f32(5.0000001201e-1)
    p = p * (rest * rest) + rest + f32(1)
    return p * _two_to_the(whole) if given == given else given


@compiled
def attend(
    qkv: np.ndarray, cache: np.ndarray, base: int, head: int, visible: np.ndarray, counts: np.ndarray,
    scale: np.float32, shares: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """Attention of one head of up to GROUP nodes of a sequence: qkv [n, 3*H*D] -> out [n, H*D], the head's part of it.

    cache: [rows, 2, H, D], of which row base + visible[i, k] holds the k-th key and value of node i, of counts[i].
    shares: memory [GROUP, >= keys].
    """
    size, nodes = cache.shape[3], len(qkv)
    stride, begin = cache.shape[1] * cache.shape[2] * size * 4, head * size
    keys, values = cache[base, 0, head].ctypes.data, cache[base, 1, head].ctypes.data
    longest, even = 0, size // NARROW * NARROW
    for i in range(nodes):
        longest = max(longest, counts[i])
        shares[i, : counts[i]] = f32(0)
        out[i, begin : begin + size] = f32(0)
    for first in range(0, longest, BLOCK):
        for i in range(nodes):
            count = min(BLOCK, counts[i] - first)
            rows, scores = visible[i].ctypes.data + first * 4, shares[i].ctypes.data + first * 4
            query, d = qkv[i].ctypes.data + begin * 4, 0
            while d + WIDE <= size:
                _wide_scores(query + d * 4, keys + d * 4, stride, rows, count, scores)
                d += WIDE
            while d < even:
                _narrow_scores(query + d * 4, keys + d * 4, stride, rows, count, scores)
                d += NARROW
    for i in range(nodes):
        row, count = shares[i], counts[i]
        for k in range(count if even < size else 0):
            key = cache[base + visible[i, k], 0, head]
            for d in range(even, size):
                row[k] += qkv[i, begin + d] * key[d]
        top, total = NEVER, f32(0)
        for k in range(count):
            row[k] *= scale
            top = max(top, row[k])
        for k in range(count):
            row[k] = exp(row[k] - top)
        for k in range(count):
            total += row[k]
        for k in range(count):
            row[k] /= total
    for first in range(0, longest, BLOCK):
        for i in range(nodes):
            count = min(BLOCK, counts[i] - first)
            rows, scores = visible[i].ctypes.data + first * 4, shares[i].ctypes.data + first * 4
            mixed, d = out[i].ctypes.data + begin * 4, 0
            while d + WIDE <= size:
                _wide_mix(scores, values + d * 4, stride, rows, count, mixed + d * 4)
                d += WIDE
            while d < even:
                _narrow_mix(scores, values + d * 4, stride, rows, count, mixed + d * 4)
                d += NARROW
    for i in range(nodes if even < size else 0):
        for k in range(counts[i]):
            value = cache[base + visible[i, k], 1, head]
            for d in range(even, size):
                out[i, begin + d] += shares[i, k] * value[d]
