"""The choice of tokens from logits: the target's at a node, and the children that a draft proposes."""

import numpy as np

from stagedspec.kernels.common.constants import INVALID
from stagedspec.kernels.compiled.attention import exp
from stagedspec.kernels.compiled.build import compiled, entry

f32 = np.float32
NEVER = f32(np.finfo(f32).min)


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


@entry
def best_children(
    logits: np.ndarray,
    scale: np.float32,
    k: int,
    noise: np.ndarray,
    places: np.ndarray,
    tokens: np.ndarray,
    logprobs: np.ndarray,
) -> None:
    """The likeliest children under logits [M, V], which it overwrites -> tokens, logprobs [M, C], best first.

    noise [P, V], places [M]: row n takes the noise noise[places[n]]; greedy without places. k: children are among the k
    largest logits. scale: multiplies logits.
    """
    count, size = tokens.shape[1], logits.shape[1]
    for n in range(len(logits)):
        row, best, found = logits[n], logprobs[n], tokens[n]
        least = kth(row, k) if k < size else NEVER
        for c in range(count):
            best[c], found[c] = NEVER, 0  # a valid token, even if all logits are NaN
        for token in range(size):
            if row[token] < least:
                row[token] = NEVER
                continue
            score = row[token] * scale
            if len(places):
                score += noise[places[n], token]
            row[token] = score
            if score > best[count - 1]:
                at = count - 1
                while at > 0 and best[at - 1] < score:
                    best[at], found[at] = best[at - 1], found[at - 1]
                    at -= 1
                best[at], found[at] = score, token
        top, total = best[0], f32(0)
        for token in range(size):
            total += exp(row[token] - top)  # smaller terms than e^-17 are lost in rounding
        norm_of_all = top + np.log(total)
        for c in range(count):
            logprob = best[c] - norm_of_all
            best[c] = min(logprob, f32(-1e-4)) if logprob > NEVER else NEVER  # not NaN, where logits are infinite


@compiled
def _best(row: np.ndarray) -> int:
    """The index of the largest, the first of equal ones; 0 for all NaN."""
    at = 0
    for token in range(len(row)):
        if row[token] > row[at]:
            at = token
    return at


@entry
def choose_tokens(
    logits: np.ndarray, temperature: np.float32, k: int, noise: np.ndarray, places: np.ndarray, tokens: np.ndarray
) -> None:
    """The token of each row of logits [M, V], which it may overwrite -> tokens [M], as `reference.choose`: of the
    largest logit, or, with places, of the largest sum of logit / temperature and noise among the k largest logits and
    their ties. noise [P, V], places [M]: as of `best_children`. INVALID where that is undefined."""
    for n in range(len(logits)):
        row = logits[n]
        broken = False
        for token in range(len(row)):
            broken |= np.isnan(row[token])
        at = _best(row)
        top = row[at]
        if len(places) == 0:
            tokens[n] = INVALID if broken or not top > f32(-np.inf) else at
            continue
        if broken or not np.isfinite(top / temperature):
            tokens[n] = INVALID
            continue
        for token in range(len(row)):
            row[token] = row[token] / temperature
        at, most = 0, f32(-np.inf)
        for token in range(len(row)):
            score = row[token] + noise[places[n], token]
            if score > most:
                at, most = token, score
        if k < len(row):
            above = 0
            for token in range(len(row)):
                above += row[token] > row[at]
            if above >= k:
                least, most = kth(row, k), f32(-np.inf)
                for token in range(len(row)):
                    score = row[token] + noise[places[n], token]
                    if row[token] >= least and score > most:
                        at, most = token, score
        tokens[n] = at
