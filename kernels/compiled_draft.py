"""The whole pass of a small draft on a CPU, compiled by Numba.

A draft of half a million parameters has 2 MB of weights, which a core reads in a tenth of a millisecond. As separate
tensor operations its pass takes ten times as long: after every target pass the caches are full of other weights, and
each of some thirty operations begins with cache misses on its code, descriptors and data. Here the pass is two loops:
`forward`, the layers with attention over the cache, and `children`, the head and the choice of every node's children.

    forward:  x = embedding; every layer: x += attention(LayerNorm(x)), x += MLP(LayerNorm(x))
    children: log-probabilities of softmax(logits / T + g) over the draft's top k, the best of them
              (`reference.choose_children`)

Bytes: the weights once. fp32, on one thread: waking a second one costs more than it saves. Sums are in another order
than torch's, and the order changes with the number of rows. So results must not decide a token of the output.
"""

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from stagedspec.kernels.common.inputs import DraftConfig
from stagedspec.kernels.common.launch_configs import cache_folder
from stagedspec.kernels.reference.noise import NoiseAt
from stagedspec.kernels.state.host import GREEDY_SHARPNESS, Batch

MAX_ROWS = 16  # of a pass; more are faster as tensor operations on all cores
MAX_PARAMETERS = 1 << 21  # of a model; a larger one is faster as tensor operations too
ACTIVATIONS = {"relu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1}
PATIENCE = 1.0  # seconds of compiling before the log says so
log = logging.getLogger("stagedspec")
f32 = np.float32
NEVER = f32(np.finfo(f32).min)
COMPILED: list[Any] = []  # all functions below that Numba compiles


def compiled(function: Callable) -> Callable:
    """Decorator: Numba compiles the function at its first call and keeps the result on disk.

    Sums may be reordered, but infinities and NaN keep their meaning, since masks are made of them. A division by zero
    raises nothing: a broken draft must not end a generation.
    """
    options: dict[str, Any] = {
        "fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"},
        "nogil": True,
        "error_model": "numpy",
    }
    try:
        COMPILED.append(numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no cache folder can be written
        COMPILED.append(numba.njit(**options)(function))
    return COMPILED[-1]


@compiled
def _multiply(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, y: np.ndarray) -> None:
    """y [M, out] = x [M, in] @ weight [in, out] + bias. Four rows of the weight at a time, for two rows of x."""
    rows, depth = x.shape
    width = weight.shape[1]
    for n in range(rows):
        for j in range(width):
            y[n, j] = bias[j]
    for first in range(0, width, 512):  # a strip of y that stays in the nearest cache
        last = min(width, first + 512)
        whole = depth // 4 * 4
        for i in range(0, whole, 4):
            w0, w1 = weight[i, first:last], weight[i + 1, first:last]
            w2, w3 = weight[i + 2, first:last], weight[i + 3, first:last]
            n = 0
            while n + 2 <= rows:
                a0, a1, a2, a3 = x[n, i], x[n, i + 1], x[n, i + 2], x[n, i + 3]
                b0, b1, b2, b3 = x[n + 1, i], x[n + 1, i + 1], x[n + 1, i + 2], x[n + 1, i + 3]
                above, below = y[n, first:last], y[n + 1, first:last]
                for j in range(last - first):
                    above[j] += a0 * w0[j] + a1 * w1[j] + a2 * w2[j] + a3 * w3[j]
                    below[j] += b0 * w0[j] + b1 * w1[j] + b2 * w2[j] + b3 * w3[j]
                n += 2
            if n < rows:
                a0, a1, a2, a3 = x[n, i], x[n, i + 1], x[n, i + 2], x[n, i + 3]
                above = y[n, first:last]
                for j in range(last - first):
                    above[j] += a0 * w0[j] + a1 * w1[j] + a2 * w2[j] + a3 * w3[j]
        for i in range(whole, depth):
            for n in range(rows):
                for j in range(first, last):
                    y[n, j] += x[n, i] * weight[i, j]


@compiled
def _normalise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: np.float32, y: np.ndarray) -> None:
    """y = LayerNorm(x), both [M, d]."""
    rows, width = x.shape
    for n in range(rows):
        total, squares = f32(0), f32(0)
        for j in range(width):
            total += x[n, j]
        mean = total / f32(width)
        for j in range(width):
            squares += (x[n, j] - mean) ** 2
        scale = f32(1) / np.sqrt(squares / f32(width) + epsilon)
        for j in range(width):
            y[n, j] = (x[n, j] - mean) * scale * weight[j] + bias[j]


@compiled
def _add(x: np.ndarray, y: np.ndarray) -> None:
    """x += y, both [M, d]."""
    for n in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[n, j] += y[n, j]


@compiled
def _activate(x: np.ndarray, kind: int) -> None:
    """Activation in place: relu (kind 0) or GELU by tanh (kind 1).

    The tanh is a continued fraction of nine terms, with an error of at most 1e-5: calling exp for every element would
    take a tenth of the pass.
    """
    for n in range(x.shape[0]):
        row = x[n]
        for j in range(x.shape[1]):
            v = row[j]
            if kind == 0:
                row[j] = max(v, f32(0))
            else:
                u = f32(0.7978845608) * (v + f32(0.044715) * v * v * v)
                u = min(max(u, f32(-6.2)), f32(6.2))
                q = u * u
                over = u * (f32(34459425) + q * (f32(4729725) + q * (f32(135135) + q * (f32(990) + q))))
                under = f32(34459425) + q * (f32(16216200) + q * (f32(945945) + q * (f32(13860) + q * f32(45))))
                row[j] = f32(0.5) * v * (f32(1) + over / under)


@compiled
def _attend(
    qkv: np.ndarray, cache: np.ndarray, write: int, first: int, bias: np.ndarray, scale: np.float32, out: np.ndarray
) -> None:
    """Attention of the N nodes of one sequence: qkv [N, 3*H*D], cache [S, 2, H, D], bias [N, R] -> out [N, H*D].

    Writes K and V to cache rows write .. write + N. bias, of 0 and -inf, is the mask of the R rows from `first` on.
    """
    nodes, width = out.shape
    heads, size = cache.shape[2:]
    for n in range(nodes):
        for h in range(heads):
            for d in range(size):
                cache[write + n, 0, h, d] = qkv[n, width + h * size + d]
                cache[write + n, 1, h, d] = qkv[n, 2 * width + h * size + d]
    scores = np.empty(bias.shape[1], f32)
    for n in range(nodes):
        for h in range(heads):
            query, mixed = qkv[n, h * size : (h + 1) * size], out[n, h * size : (h + 1) * size]
            top, total = NEVER, f32(0)
            for r in range(bias.shape[1]):
                if bias[n, r] == 0:
                    key, score = cache[first + r, 0, h], f32(0)
                    for d in range(size):
                        score += query[d] * key[d]
                    scores[r] = score * scale
                    top = max(top, scores[r])
            for d in range(size):
                mixed[d] = f32(0)
            for r in range(bias.shape[1]):
                if bias[n, r] == 0:
                    value, share = cache[first + r, 1, h], np.exp(scores[r] - top)
                    total += share
                    for d in range(size):
                        mixed[d] += share * value[d]
            for d in range(size):
                mixed[d] /= total


@compiled
def _forward(
    tokens: np.ndarray,
    positions: np.ndarray,
    bias: np.ndarray,
    cache: np.ndarray,
    write: int,
    first: int,
    tables: tuple[np.ndarray, ...],
    layers: tuple[np.ndarray, ...],
    scales: np.ndarray,
    epsilon: np.float32,
    activation: int,
    x: np.ndarray,
) -> None:
    """All layers: tokens, positions [B, N], bias [B or 1, N, R], cache [layers, B, S, 2, H, D] -> x [B*N, d].

    tables: of tokens and positions; layers: of `CompiledDraft.layers`; scales: of attention scores [layers].
    """
    token_table, position_table = tables
    norm_1w, norm_1b, qkv_w, qkv_b, out_w, out_b, norm_2w, norm_2b, up_w, up_b, down_w, down_b = layers
    batch, nodes = tokens.shape
    width = x.shape[1]
    for b in range(batch):
        for n in range(nodes):
            token, position = tokens[b, n], min(positions[b, n], position_table.shape[0] - 1)
            for j in range(width):
                x[b * nodes + n, j] = token_table[token, j] + position_table[position, j]
    y, mixed = np.empty_like(x), np.empty_like(x)
    qkv = np.empty((len(x), 3 * width), f32)
    inner = np.empty((len(x), up_w.shape[2]), f32)
    for i in range(len(scales)):
        _normalise(x, norm_1w[i], norm_1b[i], epsilon, y)
        _multiply(y, qkv_w[i], qkv_b[i], qkv)
        for b in range(batch):
            rows = slice(b * nodes, (b + 1) * nodes)
            _attend(qkv[rows], cache[i, b], write, first, bias[min(b, len(bias) - 1)], scales[i], mixed[rows])
        _multiply(mixed, out_w[i], out_b[i], y)
        _add(x, y)
        _normalise(x, norm_2w[i], norm_2b[i], epsilon, y)
        _multiply(y, up_w[i], up_b[i], inner)
        _activate(inner, activation)
        _multiply(inner, down_w[i], down_b[i], y)
        _add(x, y)


@compiled
def _kth(row: np.ndarray, k: int) -> np.float32:
    """The k-th largest of row [V], from a heap of the k largest so far with the smallest on top."""
    heap = row[:k].copy()
    heap.sort()
    for value in row[k:]:
        if value > heap[0]:
            at, below = 0, 1
            while below < k:
                if below + 1 < k and heap[below + 1] < heap[below]:
                    below += 1
                if heap[below] >= value:
                    break
                heap[at] = heap[below]
                at, below = below, 2 * below + 1
            heap[at] = value
    return heap[0]


@compiled
def _children(
    x: np.ndarray,
    norm: tuple[np.ndarray, ...],
    head: tuple[np.ndarray, ...],
    epsilon: np.float32,
    scale: np.float32,
    k: int,
    noise: np.ndarray,
    places: np.ndarray,
    tokens: np.ndarray,
    logprobs: np.ndarray,
) -> None:
    """The likeliest children of hidden states x [M, d] -> tokens, logprobs [M, C], best first.

    noise [P, V], places [M]: row n takes the noise noise[places[n]]; greedy without places. k: children are among the k
    largest logits. scale: multiplies logits.
    """
    weight, bias = head
    count, size = tokens.shape[1], weight.shape[1]
    y, logits = np.empty_like(x), np.empty((len(x), size), f32)
    _normalise(x, norm[0], norm[1], epsilon, y)
    _multiply(y, weight, bias, logits)
    for n in range(len(x)):
        row, best, found = logits[n], logprobs[n], tokens[n]
        least = _kth(row, k) if k < size else NEVER
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


@dataclass(frozen=True)
class CompiledDraft:
    """A small draft whose whole passes are compiled: its weights, laid out for one loop over each.

    tables: of tokens and positions; layers: weights and biases of all layers, stacked [layers, ...], in the order of
    `of`; norm: the last LayerNorm; head: weight [d, V] and a bias of zeros; scales: of attention scores, by layer;
    activation: as of ACTIVATIONS.
    """

    tables: tuple[np.ndarray, ...]
    layers: tuple[np.ndarray, ...]
    norm: tuple[np.ndarray, ...]
    head: tuple[np.ndarray, ...]
    scales: np.ndarray
    epsilon: np.float32
    activation: int

    @classmethod
    def of(cls, config: DraftConfig, weights: dict[str, torch.Tensor], scales: list[float]) -> "CompiledDraft | None":
        """Lays out a model. None if tensor operations are faster (a large model, a GPU), if its activation or dtype is
        not supported, or if Numba fails (`ready`).

        config: `GPT2Config`; weights: by their names in a `GPT2LMHeadModel`, copied; scales: factors of each layer's
        attention scores.
        """
        tensors = weights.values()
        known = config.activation_function in ACTIVATIONS
        plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        size = sum({tensor.data_ptr(): tensor.numel() for tensor in tensors}.values())  # a tied head once
        if not known or not plain or size > MAX_PARAMETERS or not ready():
            return None

        def stacked(name: str) -> np.ndarray:
            parts = [weights[f"transformer.h.{index}.{name}"] for index in range(config.n_layer)]
            return torch.stack(parts).numpy()

        names = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        head = weights.get("lm_head.weight", weights["transformer.wte.weight"]).numpy().T.copy()
        return cls(
            tables=tuple(weights[f"transformer.{name}.weight"].numpy().copy() for name in ("wte", "wpe")),
            layers=tuple(stacked(f"{name}.{part}") for name in names for part in ("weight", "bias")),
            norm=tuple(weights[f"transformer.ln_f.{part}"].numpy().copy() for part in ("weight", "bias")),
            head=(head, np.zeros(head.shape[1], f32)),
            scales=np.array(scales, f32),
            epsilon=f32(config.layer_norm_epsilon),
            activation=ACTIVATIONS[config.activation_function],
        )

    def forward(self, batch: Batch, rows: torch.Tensor, write: int, first: int) -> torch.Tensor:
        """Hidden states [B, N, d] of a pass, before the last norm, as `GPT2.forward`. batch: `host.Batch`; rows: the KV
        cache [layers, B, S, 2, H, D]; write: the row of node 0; first: the first row that is attended to."""
        tokens, positions = (np.ascontiguousarray(part.numpy()) for part in (batch.tokens, batch.positions))
        x = np.empty((tokens.size, self.norm[0].size), f32)
        bias = np.ascontiguousarray(batch.bias.numpy()[:, 0])
        _forward(
            tokens, positions, bias, rows.numpy(), write, first, self.tables, self.layers, self.scales, self.epsilon,
            self.activation, x,
        )  # fmt: skip
        return torch.from_numpy(x).view(*tokens.shape, -1)

    def knows(self, rows: int, warping: dict | None = None) -> bool:
        """Whether `forward` should take a pass of so many rows, and `children` this warping."""
        return rows <= MAX_ROWS and (warping is None or (warping["top_p"] is None and warping["min_p"] is None))

    def children(
        self, hidden: torch.Tensor, count: int, warping: dict | None, noise: NoiseAt | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest children of hidden states [B, N, d]: tokens, log-probabilities [B, N, C], as
        `reference.choose_children`. noise: `reference.NoiseAt`, or None when greedy."""
        size = self.head[0].shape[1]
        k, scale = (None, GREEDY_SHARPNESS) if warping is None else (warping["top_k"], 1.0 / warping["temperature"])
        k = size if k is None else min(k, size)
        x = hidden.flatten(0, 1).numpy()
        values, places = np.empty((0, size), f32), np.empty(0, np.int64)
        if noise is not None:
            values = noise.values.flatten(0, 1).numpy()
            places = np.ascontiguousarray(noise.rows().flatten().numpy())
        tokens, logprobs = np.empty((len(x), min(count, k)), np.int64), np.empty((len(x), min(count, k)), f32)
        _children(x, self.norm, self.head, self.epsilon, f32(scale), k, values, places, tokens, logprobs)
        shape = (*hidden.shape[:-1], -1)
        return torch.from_numpy(tokens).view(shape), torch.from_numpy(logprobs).view(shape)


# ---------------------------------------------------------------- compiling when a draft is loaded


@cache
def ready() -> bool:
    """Compiles the pass, or loads it from Numba's cache, once in a process. If that fails, warns and returns
    False: drafts then run as tensor operations.

    Ctrl-C is delayed until the end, because Numba would stay broken after an interrupt.
    """
    with _delayed(signal.SIGINT), _announced():
        try:
            _try_out()
        except Exception:  # the cache is damaged or full; Numba's errors have no common type
            try:
                _keep_in(cache_folder() / "numba")
                _try_out()
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                warnings.warn(f"the draft's pass cannot be compiled, so it is slower: {reason}", stacklevel=2)
                return False
    return True


def _keep_in(folder: Path) -> None:
    """Moves Numba's cache of this file's functions to a folder."""
    settings: Any = numba.config  # its names are set when it is imported
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(folder)
    try:
        for function in COMPILED:
            function.enable_caching()
    finally:
        settings.CACHE_DIR = before


def _try_out() -> None:
    """Runs one pass of a tiny model, which compiles the functions for the types of all passes."""
    zeros = lambda *shape: np.zeros(shape, f32)  # noqa: E731
    layers: tuple[np.ndarray, ...] = (
        zeros(1, 1),
        zeros(1, 1),
        zeros(1, 1, 3),
        zeros(1, 3),
        zeros(1, 1, 1),
        zeros(1, 1),
    )
    layers += (zeros(1, 1), zeros(1, 1), zeros(1, 1, 1), zeros(1, 1), zeros(1, 1, 1), zeros(1, 1))
    tiny = CompiledDraft(
        (zeros(1, 1), zeros(1, 1)), layers, (zeros(1), zeros(1)), (zeros(1, 1), zeros(1)), zeros(1), f32(1), 0
    )
    one = np.zeros((1, 1), np.int64)
    x, cache_rows = zeros(1, 1), zeros(1, 1, 1, 2, 1, 1)
    _forward(one, one, zeros(1, 1, 1), cache_rows, 0, 0, tiny.tables, layers, tiny.scales, tiny.epsilon, 0, x)
    _children(x, tiny.norm, tiny.head, tiny.epsilon, f32(1), 1, zeros(1, 1), one[0], one.copy(), zeros(1, 1))


@contextmanager
def _announced() -> Iterator[None]:
    """Logs that the pass is being compiled, if it takes longer than PATIENCE. Loading from the cache does not."""
    timer = threading.Timer(
        PATIENCE, log.warning, ["making the draft's pass ready: Numba compiles it once on this machine"]
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _delayed(number: int) -> Iterator[None]:
    """Delays a signal until the end of the block. Only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    before = signal.signal(number, lambda *_: received.append(number))
    try:
        yield
    finally:
        signal.signal(number, before)
        if received:
            signal.raise_signal(number)
