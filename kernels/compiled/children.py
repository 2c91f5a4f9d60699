"""The choice of a node's children from a draft's logits, in one loop over the vocabulary."""

import numpy as np

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
        for score in row:
            if score > top - f32(17):  # smaller terms are lost in rounding
                total += np.exp(score - top)
        norm_of_all = top + np.log(total)
        for c in range(count):
            logprob = best[c] - norm_of_all
            best[c] = min(logprob, f32(-1e-4)) if logprob > NEVER else NEVER  # not NaN, where logits are infinite
