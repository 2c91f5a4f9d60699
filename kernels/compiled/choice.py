"""The choice of tokens from logits: the target's at a node, and the children that a draft proposes."""

import numpy as np

from stagedspec.kernels.common.constants import INVALID
from stagedspec.kernels.compiled.attention import exp
from stagedspec.kernels.compiled.build import compiled

f32 = np.float32
NEVER, INFINITE = f32(np.finfo(f32).min), f32(np.inf)


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
    for value in row[k:]:
        if value > heap[0]:
            _sift(heap, 0, value)
    return heap[0]


@compiled
def best_children(
    row: np.ndarray, scale: np.float32, k: int, noise: np.ndarray, sampled: bool, found: np.ndarray, best: np.ndarray
) -> None:
    """The likeliest children under logits row [V], which it overwrites -> found, their tokens, and best, their
    log-probabilities, both [C], best first, as `reference.choose_children`.

    scale: multiplies logits. k: children are among the k largest logits. noise: added to them if sampled.
    """
    count, size = len(found), len(row)
    least = kth(row, k) if k < size else NEVER
    for c in range(count):
        best[c], found[c] = NEVER, 0  # a valid token, even if all logits are NaN
    for token in range(size):
        if row[token] < least:
            row[token] = NEVER
            continue
        score = row[token] * scale
        if sampled:
            score += noise[token]
        row[token] = score
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
        best[c] = min(logprob, f32(-1e-4)) if logprob > NEVER else NEVER  # not NaN, where logits are infinite


@compiled
def _largest(row: np.ndarray, noise: np.ndarray, least: np.float32) -> int:
    """The first token of the largest sum with noise, of logits that are at least `least`; 0 if there is none."""
    at, most = 0, -INFINITE
    for token in range(len(row)):
        score = row[token] + noise[token]
        if row[token] >= least and score > most:
            at, most = token, score
    return at


@compiled
def choose_token(row: np.ndarray, temperature: np.float32, k: int, noise: np.ndarray, sampled: bool) -> int:
    """The token chosen by logits row [V], which it may overwrite, as `reference.choose`: of the largest, or, if
    sampled, of the largest sum of logit / temperature and noise [V] among the k largest and their ties. INVALID where
    that is undefined."""
    at, top, broken = 0, row[0], False
    for token in range(len(row)):
        broken |= np.isnan(row[token])
        if row[token] > top:
            at, top = token, row[token]
    if not sampled:
        return INVALID if broken or top == -INFINITE else at
    if broken or not np.isfinite(top / temperature):
        return INVALID
    for token in range(len(row)):
        row[token] = row[token] / temperature
    at = _largest(row, noise, -INFINITE)
    if k < len(row):
        above = 0
        for token in range(len(row)):
            above += row[token] > row[at]
        if above >= k:
            at = _largest(row, noise, kth(row, k))
    return at
