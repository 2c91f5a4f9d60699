"""The choice of tokens in plain torch: warping, the rule for the target's one token, and for the draft's children.

`lm_head_choose` and `lm_head_children` begin with the final LayerNorm and the head.
"""

from typing import cast

import numpy as np
import torch

from stagedspec.kernels.reference.layers import Linear, norm_linear
from stagedspec.kernels.reference.noise import NoiseAt
from stagedspec.kernels.state.host import GREEDY_SHARPNESS, INVALID, NEVER


def warp(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> torch.Tensor:
    """Temperature, then top-k, top-p and min-p as `transformers` applies them: logits [..., V] fp32 -> [..., V].

    Ties follow transformers: every token tied with the k-th largest stays; top-p drops from the bottom of a
    stable ascending sort, so of tied tokens the lowest id goes first; the best token always stays.
    """
    if temperature != 1.0:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, NEVER)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, stable=True)
        drop = ordered.softmax(-1).cumsum(-1) <= 1.0 - top_p
        drop[..., -1:] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), NEVER)
    if min_p is not None and min_p > 0.0:
        probabilities = logits.softmax(-1)
        drop = probabilities < min_p * probabilities.amax(-1, keepdim=True)
        # transformers keeps the first of a descending sort whatever min_p is.
        drop.scatter_(-1, logits.argmax(-1, keepdim=True), False)
        logits = logits.masked_fill(drop, NEVER)
    return logits


def head_logits(
    x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, epsilon: float, head: Linear
) -> torch.Tensor:
    """Final LayerNorm and head: x [..., d] -> fp32 logits [..., V]."""
    shape = x.shape[:-1]
    return norm_linear(x.flatten(0, -2), norm_weight, norm_bias, epsilon, head).float().unflatten(0, shape)


def _best(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The k largest logits [..., k] and their tokens, ascending; None where the k-th is tied, so that more stay."""
    size = logits.shape[-1]
    rows = logits.reshape(-1, size).numpy()
    places = np.flatnonzero(rows >= _kth(rows, k))
    if len(places) != len(rows) * k:
        return None
    shape = (*logits.shape[:-1], k)
    return torch.from_numpy(rows.ravel()[places]).view(shape), torch.from_numpy(places % size).view(shape)


def _kth(rows: np.ndarray, k: int) -> np.ndarray:
    """The k-th largest of each of rows [M, V]: [M, 1]. torch.topk, which sorts, takes several times as long."""
    place = rows.shape[-1] - k
    return np.partition(rows, place, -1)[:, place, None]


def _choose_of_best(logits: torch.Tensor, noise: torch.Tensor, k: int) -> torch.Tensor:
    """The best sum of logits and noise [B, N, V] among the k largest logits and their ties: tokens [B, N]. CPU only.

    Mostly the best sum of all is one of them, and to see that takes no search for the k-th.
    """
    rows = logits.reshape(-1, logits.shape[-1]).numpy()
    scores = rows + noise.reshape(rows.shape).numpy()
    best = scores.argmax(-1)
    for i, row in enumerate(rows):
        if np.count_nonzero(row > row[best[i]]) >= k:
            scores[i][row < _kth(row[None], k)[0]] = NEVER
            best[i] = scores[i].argmax()
    return torch.from_numpy(best).view(logits.shape[:-1])


def choose(logits: torch.Tensor, warping: dict | None, noise: NoiseAt | None) -> torch.Tensor:
    """The one token-choice rule: logits [B, N, V], noise or None (greedy) -> tokens [B, N].

    Gumbel-max: an exact sample of the warped distribution, fixed by the logits and the noise. Lowest id on ties.
    INVALID where no token can be chosen: a logit is NaN, all are -inf or, when sampling, one is +inf.
    """
    return _best_token(logits, warping, noise).masked_fill_(_undecided(logits, warping), INVALID)


def _undecided(logits: torch.Tensor, warping: dict | None) -> torch.Tensor:
    """Where logits [B, N, V] allow no choice: bool [B, N]. The largest is NaN if any is."""
    # numpy takes a fifth of torch's time for it.
    top = torch.from_numpy(logits.numpy().max(-1)) if logits.device.type == "cpu" else logits.amax(-1)
    if warping is None:
        return ~(top > NEVER)
    return ~(top / warping["temperature"]).isfinite()


def _best_token(logits: torch.Tensor, warping: dict | None, noise: NoiseAt | None) -> torch.Tensor:
    """`choose` where a token can be chosen. On a CPU with top-k the rest of the vocabulary is neither warped nor
    sorted."""
    cpu, tokens = logits.device.type == "cpu", None
    if noise is not None:
        warping = cast(dict, warping)  # given with noise
        k = warping["top_k"]
        if cpu and k is not None and k < logits.shape[-1]:
            if warping["temperature"] != 1.0:
                logits, warping = logits / warping["temperature"], warping | {"temperature": 1.0}
            if warping["top_p"] is None and warping["min_p"] is None:
                return _choose_of_best(logits, noise.of(), k)
            if (found := _best(logits, k)) is not None:
                (logits, tokens), warping = found, warping | {"top_k": None}
        logits = warp(logits, **warping) + noise.of(tokens)
    # numpy takes a tenth of torch's time for it.
    best = torch.from_numpy(logits.numpy().argmax(-1)) if cpu else logits.argmax(-1)
    return best if tokens is None else tokens.gather(-1, best[..., None])[..., 0]


def choose_children(
    logits: torch.Tensor, count: int, warping: dict | None, noise: NoiseAt | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The draft's likeliest children under the shared noise: logits [B, N, V] -> tokens, log-probabilities [B, N, C].

    The probability is softmax(log q + g): how likely the draft holds each token to be the one the target will
    choose with the same noise (Daliri, Musco, Suresh, arXiv 2408.07978). At least a little is lost at every
    level, so that a parent always outranks its children. Tokens that cannot come up have the probability 0.
    """
    tokens = None
    if noise is None:
        scores = logits * GREEDY_SHARPNESS
    else:
        warping = cast(dict, warping)  # given with noise
        k = warping["top_k"]
        if k is not None and k < logits.shape[-1]:
            # Before temperature, and without the ties: the draft's numerics are free.
            (logits, tokens), warping = logits.topk(k, -1), warping | {"top_k": None}
        # A draft may have fewer tokens than the target, whose noise it is.
        scores = warp(logits, **warping) + noise.of(tokens)[..., : logits.shape[-1]]
    top, best = scores.softmax(-1).topk(min(count, scores.shape[-1]), -1)
    return best if tokens is None else tokens.gather(-1, best), top.log_().clamp_(max=-1e-4)


def lm_head_choose(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    epsilon: float,
    head: Linear,
    warping: dict | None,
    noise: NoiseAt | None,
) -> torch.Tensor:
    """`choose` from hidden states x [B, N, d] -> tokens [B, N]."""
    return choose(head_logits(x, norm_weight, norm_bias, epsilon, head), warping, noise)


def lm_head_children(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    epsilon: float,
    head: Linear,
    count: int,
    warping: dict | None,
    noise: NoiseAt | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`choose_children` from hidden states x [B, N, d] -> tokens, log-probabilities [B, N, C]."""
    return choose_children(head_logits(x, norm_weight, norm_bias, epsilon, head), count, warping, noise)
