"""The choice of tokens from logits: the target's at a node, and the children that a draft proposes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from stagedspec.kernels.common.constants import INVALID
from stagedspec.kernels.compiled.attention import exp
from stagedspec.kernels.compiled.build import compiled, inlined, instruction

f32, i32 = np.float32, np.int32
NEVER, INFINITE = f32(np.finfo(f32).min), f32(np.inf)
BLOCK = 64  # logits that are looked at one by one only where their largest matters


@instruction
def _bits(context: Any, value: Any) -> tuple[Any, Callable]:
    """The bits of an fp32 number as int32."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> ir.Value:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@instruction
def _from_bits(context: Any, bits: Any) -> tuple[Any, Callable]:
    """The inverse of `_bits`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> ir.Value:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled
def _ordered(bits: np.int32) -> np.int32:
    """The bits of numbers as integers of the same order, NaN beyond both ends; its own inverse. A loop that looks for
    the largest integer becomes vectors; one that looks for the largest number must mind NaN."""
    return i32(bits ^ ((bits >> i32(31)) & i32(0x7FFFFFFF)))


@compiled
def _score(row: np.ndarray, noise: np.ndarray, sampled: bool, least: np.float32, token: int) -> np.float32:
    """What a token is chosen by: its logit, with noise if sampled, if the logit is at least `least`."""
    if sampled:
        return row[token] + noise[token] if row[token] >= least else -INFINITE
    return row[token]


@compiled
def _may_exceed(
    row: np.ndarray, noise: np.ndarray, sampled: bool, least: np.float32, first: int, last: int, best: np.float32
) -> bool:
    """Whether one of the scores of tokens first to last is larger than `best`; also true where one may be NaN."""
    most = i32(-(2**31))
    for token in range(first, last):
        most = max(most, _ordered(_bits(_score(row, noise, sampled, least, token))))
    return not (_from_bits(_ordered(most)) <= best)


@compiled
def _sift(heap: np.ndarray, at: int, value: np.float32) -> None:
    """Puts a value in the place of heap[at], or as far below as it must go. The smallest is on top."""
    below = 2 * at + 1
    while below < len(heap):
        if below + 1 < len(heap) and heap[below + 1] < heap[below]:
            below += 1
        if heap[below] >= value:
            break
        heap[at] = heap[below]
        at, below = below, 2 * below + 1
    heap[at] = value


@compiled
def kth(row: np.ndarray, k: int) -> np.float32:
    """The k-th largest of row [V], from a heap of the k largest so far with the smallest on top."""
    heap = row[:k].copy()
    for start in range(k // 2 - 1, -1, -1):
        _sift(heap, start, heap[start])
    for first in range(k, len(row), BLOCK):
        last = min(len(row), first + BLOCK)
        if _may_exceed(row, row, False, NEVER, first, last, heap[0]):
            for value in row[first:last]:
                if value > heap[0]:
                    _sift(heap, 0, value)
    return heap[0]


@compiled
def _weight(row: np.ndarray, top: np.float32, value: np.float32, token: int) -> float:
    """What tokens more likely than one weigh together, which has the logit `value`: of equal logits that of the larger
    token counts as more likely. Weights are relative to that of a logit `top`."""
    total = 0.0
    for other in range(len(row)):
        more = row[other] > value or (row[other] == value and other > token)
        total += float(exp(row[other] - top)) if more else 0.0
    return total


@compiled
def _nucleus(row: np.ndarray, scale: np.float32, top: np.float32, least: np.float32, top_p: np.float32) -> np.float32:
    """The least logit of the likeliest tokens that together have the probability `top_p` among those of logits row [V]
    times `scale` that are at least `least`. top: the largest logit. Only to a millionth: a draft's numerics are
    free."""
    weights = np.empty_like(row)
    for token in range(len(row)):
        weights[token] = exp((row[token] - top) * scale) if row[token] >= least else f32(0)
    wanted = top_p * weights.sum()
    low, high = top - f32(80) / scale, top
    for _ in range(26):
        middle = (low + high) * f32(0.5)
        total = f32(0)
        for token in range(len(row)):
            total += weights[token] if row[token] >= middle else f32(0)
        low, high = (middle, high) if total >= wanted else (low, middle)
    return max(least, low)


@inlined
def best_children(
    row: np.ndarray, settings: np.ndarray, k: int, noise: np.ndarray, sampled: bool, found: np.ndarray, best: np.ndarray
) -> None:
    """The likeliest children under logits row [V], which it overwrites -> found, their tokens, and best, their
    log-probabilities, both [C], best first, as `reference.choose_children`.

    settings: what logits are multiplied by, top-p, min-p. k: children are among the k largest logits. noise: added to
    them if sampled.
    """
    count, size = len(found), len(row)
    scale, top_p, min_p = settings[0], settings[1], settings[2]
    least = kth(row, k) if k < size else NEVER
    if top_p < 1 or min_p > 0:
        top = row[_largest(row, noise, False, NEVER)]
        if top_p < 1:
            least = _nucleus(row, scale, top, least, top_p)
        least = max(least, top + np.log(min_p) / scale)
    for c in range(count):
        best[c], found[c] = NEVER, 0  # a valid token, even if all logits are NaN
    for token in range(size):
        if row[token] < least:
            row[token] = NEVER
        else:
            row[token] = row[token] * scale + noise[token] if sampled else row[token] * scale
    for first in range(0, size, BLOCK):
        last = min(size, first + BLOCK)
        if _may_exceed(row, noise, False, NEVER, first, last, best[count - 1]):
            for token in range(first, last):
                score = row[token]
                if score > best[count - 1]:
                    at = count - 1
                    while at > 0 and best[at - 1] < score:
                        best[at], found[at] = best[at - 1], found[at - 1]
                        at -= 1
                    best[at], found[at] = score, token
    top, total = best[0], f32(0)
    for token in range(size):
        total += exp(row[token] - top)
    norm_of_all = top + np.log(total)
    for c in range(count):
        logprob = best[c] - norm_of_all
        best[c] = min(logprob, f32(-1e-4)) if logprob > NEVER else -INFINITE  # not NaN, where logits are infinite


@compiled
def _largest(row: np.ndarray, noise: np.ndarray, sampled: bool, least: np.float32) -> int:
    """The first token of the largest score; 0 if there is none."""
    at, most = 0, -INFINITE
    for first in range(0, len(row), BLOCK):
        last = min(len(row), first + BLOCK)
        if _may_exceed(row, noise, sampled, least, first, last, most):
            for token in range(first, last):
                score = _score(row, noise, sampled, least, token)
                if score > most:
                    at, most = token, score
    return at


@inlined
def choose_token(row: np.ndarray, settings: np.ndarray, k: int, noise: np.ndarray, sampled: bool) -> int:
    """The token chosen by logits row [V], which it may overwrite, as `reference.choose`: of the largest, or, if
    sampled, of the largest sum of logit / temperature and noise [V] among the k largest and their ties, and what top-p
    and min-p leave of these. settings: temperature, top-p, min-p. INVALID where that is undefined.

    Tokens are tried in the order of their sums. One is in the nucleus if those more likely weigh less than top-p; what
    is less likely than one outside is outside, too. So nothing is sorted, and mostly the first token is the one.
    """
    temperature, top_p, min_p = settings[0], settings[1], settings[2]
    broken = False
    for token in range(len(row)):
        broken |= np.isnan(row[token])
    at = _largest(row, noise, False, -INFINITE)
    if not sampled:
        return INVALID if broken or row[at] == -INFINITE else at
    if broken or not np.isfinite(row[at] / temperature):
        return INVALID
    for token in range(len(row)):
        row[token] = row[token] / temperature
    top, least, total, bounded = row[at], -INFINITE, 0.0, k >= len(row)
    if top_p < 1:
        if not bounded:
            least, bounded = kth(row, k), True
        total = _weight(row, top, least, -1)
    while True:
        at = _largest(row, noise, True, least)
        if not bounded:  # mostly it is among the k largest, and to see that takes no search for the k-th
            above, bounded = 0, True
            for token in range(len(row)):
                above += row[token] > row[at]
            if above >= k:
                least = kth(row, k)
                continue
        outside = top_p < 1 and 0 < _weight(row, top, row[at], at) >= top_p * total
        if not outside and exp(row[at] - top) >= min_p:
            return at
        least = row[at]
        for token in range(at + 1):  # of equally likely tokens the smaller ones are outside, too
            if row[token] == least:
                row[token] = -INFINITE
