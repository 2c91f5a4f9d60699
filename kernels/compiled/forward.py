"""The passes of a GPT-2 in fp32 on a CPU, each as the stages of one `team` pass:

    embed:   x = embeddings; by the caller alone
    layers:  every layer: x += attention(LayerNorm(x)), x += MLP(LayerNorm(x))
    head:    logits = LayerNorm(x) @ head
    choice:  a token, or children, of each row's logits

A pass has the first two, the head, or all.

Bits: every row is computed alone, in an order that depends on nothing but its own place: products as `product` says,
attention over its visible keys in the order of their positions, wherever in the cache they lie. So a token has the same
hidden state alone, in a tree, in a prompt and in a batch. Bytes: the weights once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types

from stagedspec.kernels.compiled import team
from stagedspec.kernels.compiled.attention import GROUP, attend, exp
from stagedspec.kernels.compiled.build import compiled, entry, inlined, instruction
from stagedspec.kernels.compiled.choice import best_children, choose_token
from stagedspec.kernels.compiled.product import multiply
from stagedspec.kernels.compiled.team import begin_tasks, end_tasks, wait_for_tasks

f32 = np.float32
# What is done with a product: an activation; keys and values go into the cache; it is added to hidden states.
RELU, GELU_TANH, KEEP, ADD, NOTHING = np.arange(5)  # as NumPy's, since Numba would compile a function for each literal
ACTIVATIONS = {"relu": RELU, "gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH}
LAYER_STAGES, HEAD_STAGES = 7, 3
TOKEN, CHILDREN = 1, 2


class Arrays(NamedTuple):
    """What a pass over M = B * N rows reads and writes, beside `Workspace`. Empty where it is not needed.

    x: hidden states, fp32 [M, d]; inputs: tokens and positions, int64 [2, B, N]; seen: bool [B or 1, N, R], which of R
    rows of the cache each node attends to, parents before children; prefixes: int64 [B], how many rows it attends to
    whose positions come before. logits: fp32 [M, V]. noise: fp32 [.., V or more], and places, int64 [M], which row of
    it each has. tokens: int64 [M, C], and logprobs, fp32: what is chosen.
    """

    x: np.ndarray
    inputs: np.ndarray = np.empty((2, 0, 0), np.int64)
    seen: np.ndarray = np.empty((0, 0, 0), np.bool_)
    prefixes: np.ndarray = np.empty(0, np.int64)
    logits: np.ndarray = np.empty((0, 0), f32)
    noise: np.ndarray = np.empty((0, 0), f32)
    places: np.ndarray = np.empty(0, np.int64)
    tokens: np.ndarray = np.empty((0, 0), np.int64)
    logprobs: np.ndarray = np.empty((0, 0), f32)


class Settings(NamedTuple):
    """What else a pass is, as numbers on the board.

    layers, head: 1 for what is run; choice: TOKEN or CHILDREN of the logits, or 0; k: of how many of the largest.
    nodes: N; seen_at: the first of the R rows of the cache that `seen` is about; prefix_at: the first of those before;
    write: that of node 0. cache: address of the KV cache, which has cache_rows rows for each of cache_sequences;
    sequence: the one that the first row belongs to.
    """

    layers: int
    head: int
    choice: int = 0
    k: int = 0
    nodes: int = 1
    seen_at: int = 0
    prefix_at: int = 0
    write: int = 0
    cache: int = 0
    cache_rows: int = 0
    cache_sequences: int = 0
    sequence: int = 0


SETTINGS = slice(team.INPUTS, team.INPUTS + len(Settings._fields))
(
    LAYERS, HEAD, CHOICE, K, NODES, SEEN_AT, PREFIX_AT, WRITE, CACHE, CACHE_ROWS, CACHE_SEQUENCES, SEQUENCE,
) = range(SETTINGS.start, SETTINGS.stop)  # fmt: skip
# Where the caller leaves addresses and sizes of its arrays for the helpers.
ROWS, X, LOGITS, NOISE, NOISE_SIZE, PLACES, TOKENS, EACH, LOGPROBS = range(SETTINGS.stop, SETTINGS.stop + 9)


class Weights(NamedTuple):
    """A model's weights, as the compiled functions take them.

    tables: of tokens [V, d] and positions; norms: weight and bias of ln_1 and ln_2 [layers, d]; products: weight
    [layers, blocks, in, COLUMNS] of `product.pack` of qkv, projection, up and down; biases: of the same, [layers,
    blocks * COLUMNS]; final: weight and bias of the last norm [d]; head: packed; zeros: its bias; scales: of attention
    scores [layers]; epsilon: of all norms; vocabulary: V; heads: of attention; activation: of ACTIVATIONS.
    """

    tables: tuple[np.ndarray, ...]
    norms: tuple[np.ndarray, ...]
    products: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    final: tuple[np.ndarray, ...]
    head: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    epsilon: np.float32
    vocabulary: int
    heads: int
    activation: int


class Workspace(NamedTuple):
    """Memory of one pass of up to M rows.

    x: hidden states that nobody wants, normed, mixed, added [M, d], qkv [M, 3d], inner [M, inner]; visible: the rows of
    the cache that each row attends to, in the order of their positions, int32 [M, most]; counts: how many, [M]; shares:
    of attention, by thread [threads, GROUP, most]; columns: of a product, by thread [threads, 2, M, COLUMNS]; warping:
    [3], of logits in `choice`: the temperature, or what multiplies them for children, top-p and min-p.
    """

    x: np.ndarray
    normed: np.ndarray
    mixed: np.ndarray
    added: np.ndarray
    qkv: np.ndarray
    inner: np.ndarray
    visible: np.ndarray
    counts: np.ndarray
    shares: np.ndarray
    columns: np.ndarray
    warping: np.ndarray


@instruction
def _pointer(context: Any, address: Any) -> tuple[Any, Callable]:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> ir.Value:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


# ---------------------------------------------------------------- one row


@inlined
def _normalise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: np.float32, y: np.ndarray) -> None:
    """y = LayerNorm(x), both [d]."""
    width = x.size
    total, squares = f32(0), f32(0)
    for j in range(width):
        total += x[j]
    mean = total / f32(width)
    for j in range(width):
        squares += (x[j] - mean) * (x[j] - mean)
    scale = f32(1) / np.sqrt(squares / f32(width) + epsilon)
    for j in range(width):
        y[j] = (x[j] - mean) * scale * weight[j] + bias[j]


@inlined
def _activate(row: np.ndarray, kind: int) -> None:
    """Activation in place. GELU by tanh is v * sigmoid(2u)."""
    if kind == RELU:
        for j in range(row.size):
            row[j] = f32(0) if row[j] < f32(0) else row[j]  # NaN stays
    else:
        for j in range(row.size):
            v = row[j]
            u = f32(0.7978845608028654) * (v + f32(0.044715) * v * v * v)
            row[j] = v / (f32(1) + exp(f32(-2) * u))


# ---------------------------------------------------------------- stages of all rows


@compiled
def _norm_stage(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    epsilon: np.float32,
    y: np.ndarray,
    shared: np.ndarray,
    stage: int,
) -> None:
    """y = LayerNorm(x), both [M, d]."""
    rows = len(x)
    first, last = begin_tasks(shared, stage, rows)
    while first < last:
        for n in range(first, last):
            _normalise(x[n], weight, bias, epsilon, y[n])
        end_tasks(shared, stage, last - first)
        first, last = begin_tasks(shared, stage, rows)
    wait_for_tasks(shared, stage, rows)


@compiled
def _product_stage(
    x: np.ndarray,
    weights: np.ndarray,
    bias: np.ndarray,
    y: np.ndarray,
    then: int,
    target: np.ndarray,
    shared: np.ndarray,
    stage: int,
    spare: np.ndarray,
) -> None:
    """y [>= M, out] = x [M, in] @ weights + bias, and what is done `then` with each block of it. spare: of `multiply`.

    One function for all products, since each that contains `multiply` takes as long to compile as all the rest.
    """
    rows, blocks, columns = len(x), weights.shape[0], weights.shape[2]
    first, last = begin_tasks(shared, stage, blocks)
    while first < last:
        for block in range(first, last):
            multiply(x, rows, weights, bias, y, block, spare)
            begin, end = block * columns, min((block + 1) * columns, y.shape[1])
            if then == KEEP:
                nodes, width = shared[NODES], y.shape[1] // 3
                for n in range(rows):
                    row = (shared[SEQUENCE] + n // nodes) * shared[CACHE_ROWS] + shared[WRITE] + n % nodes
                    for j in range(max(begin, width), end):
                        target[row, j - width] = y[n, j]
            elif then == ADD:
                for n in range(rows):
                    for j in range(begin, end):
                        target[n, j] += y[n, j]
            elif then != NOTHING:
                for n in range(rows):
                    _activate(y[n, begin:end], then)
        end_tasks(shared, stage, last - first)
        first, last = begin_tasks(shared, stage, blocks)
    wait_for_tasks(shared, stage, blocks)


@inlined
def _layer(
    weights: Weights, work: Workspace, x: np.ndarray, cache: np.ndarray, i: int, shared: np.ndarray, thread: int
) -> None:
    """One layer: x [M, d] in place. cache: rows of all layers and sequences [.., 2, H, D]."""
    stage = LAYER_STAGES * i
    rows, width = x.shape
    heads, nodes, per_sequence = cache.shape[2], shared[NODES], shared[CACHE_ROWS]
    per_layer = shared[CACHE_SEQUENCES] * per_sequence
    first_row = i * per_layer + shared[SEQUENCE] * per_sequence
    flat = cache[i * per_layer : (i + 1) * per_layer].reshape(per_layer, 2 * width)
    normed, mixed, added, qkv, inner = work.normed[:rows], work.mixed[:rows], work.added, work.qkv, work.inner[:rows]
    norms, products, biases, spare = weights.norms, weights.products, weights.biases, work.columns[thread]

    _norm_stage(x, norms[0][i], norms[1][i], weights.epsilon, normed, shared, stage)
    _product_stage(normed, products[0][i], biases[0][i], qkv, KEEP, flat, shared, stage + 1, spare)

    groups = (nodes + GROUP - 1) // GROUP
    tasks = rows // nodes * heads * groups
    first, last = begin_tasks(shared, stage + 2, tasks)
    while first < last:
        for task in range(first, last):
            row, head, group = task // (heads * groups), task // groups % heads, task % groups
            begin = row * nodes + group * GROUP
            end = min(begin + GROUP, (row + 1) * nodes)
            attend(
                qkv[begin:end], cache, first_row + row * per_sequence, head, work.visible[begin:end],
                work.counts[begin:end], weights.scales[i], work.shares[thread], mixed[begin:end],
            )  # fmt: skip
        end_tasks(shared, stage + 2, last - first)
        first, last = begin_tasks(shared, stage + 2, tasks)
    wait_for_tasks(shared, stage + 2, tasks)

    _product_stage(mixed, products[1][i], biases[1][i], added, ADD, x, shared, stage + 3, spare)
    _norm_stage(x, norms[2][i], norms[3][i], weights.epsilon, normed, shared, stage + 4)
    _product_stage(normed, products[2][i], biases[2][i], inner, weights.activation, x, shared, stage + 5, spare)
    _product_stage(inner, products[3][i], biases[3][i], added, ADD, x, shared, stage + 6, spare)


@inlined
def _head(
    weights: Weights, work: Workspace, x: np.ndarray, logits: np.ndarray, shared: np.ndarray, stage: int, thread: int
) -> None:
    """logits [M, V] of hidden states x [M, d], in the stages from `stage` on."""
    rows = len(x)
    normed = work.normed[:rows]
    _norm_stage(x, weights.final[0], weights.final[1], weights.epsilon, normed, shared, stage)
    spare = work.columns[thread]
    _product_stage(normed, weights.head, weights.zeros, logits, NOTHING, x, shared, stage + 1, spare)


@inlined
def _share(arrays: Arrays, shared: np.ndarray) -> None:
    """Tells helpers where the arrays are that all write."""
    shared[ROWS], shared[X] = len(arrays.x), arrays.x.ctypes.data
    shared[LOGITS] = arrays.logits.ctypes.data
    shared[NOISE], shared[NOISE_SIZE] = arrays.noise.ctypes.data, arrays.noise.shape[1]
    shared[PLACES] = arrays.places.ctypes.data
    shared[TOKENS], shared[EACH] = arrays.tokens.ctypes.data, arrays.tokens.shape[1]
    shared[LOGPROBS] = arrays.logprobs.ctypes.data


@inlined
def _embed(weights: Weights, work: Workspace, arrays: Arrays, shared: np.ndarray) -> None:
    """The beginning of a pass: hidden states, and what each row attends to."""
    token_table, position_table = weights.tables
    inputs, seen, prefixes = arrays.inputs, arrays.seen, arrays.prefixes
    sequences, nodes = inputs.shape[1:]
    for b in range(sequences):
        mask = seen[min(b, len(seen) - 1)]
        for n in range(nodes):
            row = b * nodes + n
            token = min(max(inputs[0, b, n], 0), len(token_table) - 1)
            position = min(max(inputs[1, b, n], 0), len(position_table) - 1)
            for j in range(token_table.shape[1]):
                arrays.x[row, j] = token_table[token, j] + position_table[position, j]
            count = max(prefixes[b], 0)
            for r in range(count):
                work.visible[row, r] = shared[PREFIX_AT] + r
            for r in range(mask.shape[1]):
                if mask[n, r]:
                    work.visible[row, count] = shared[SEEN_AT] + r
                    count += 1
            work.counts[row] = count


@inlined
def _choose(work: Workspace, logits: np.ndarray, shared: np.ndarray, stage: int) -> None:
    """The choice by logits [M, V], which it overwrites."""
    rows, each, size = len(logits), shared[EACH], shared[NOISE_SIZE]
    tokens = carray(_pointer(shared[TOKENS]), (rows, each), np.int64)
    logprobs = carray(_pointer(shared[LOGPROBS]), (rows, each), f32)
    places = carray(_pointer(shared[PLACES]), (rows,), np.int64)
    sampled = size > 0
    first, last = begin_tasks(shared, stage, rows)
    while first < last:
        for n in range(first, last):
            row, place = logits[n], places[n] if sampled else 0
            noise = carray(_pointer(shared[NOISE] + 4 * size * place), (size,), f32)
            if shared[CHOICE] == CHILDREN:
                best_children(row, work.warping, shared[K], noise, sampled, tokens[n], logprobs[n])
            else:
                tokens[n, 0] = choose_token(row, work.warping, shared[K], noise, sampled)
        end_tasks(shared, stage, last - first)
        first, last = begin_tasks(shared, stage, rows)
    wait_for_tasks(shared, stage, rows)


@entry
def run_passes(weights: Weights, work: Workspace, arrays: Arrays, shared: np.ndarray, helper: int, model: int) -> int:
    """The part of one thread. The caller of a pass (`team.CALLER`): all of it. A helper: in all passes of a
    model, until it must sleep or another model runs; returns what `team.next_pass` does. The caller opens the pass and
    closes it here, so that nothing can come between.

    One function for both, since Numba would compile all below it for each.
    """
    thread = helper + 1
    while True:
        if helper == team.CALLER:
            _share(arrays, shared)
            if shared[LAYERS]:
                _embed(weights, work, arrays, shared)
            team.open_pass(shared)
        else:
            found = team.next_pass(shared, helper, model)
            if found != 1:
                return found
        rows, width = shared[ROWS], weights.tables[0].shape[1]
        x = carray(_pointer(shared[X]), (rows, width), f32)
        layers, heads = len(weights.scales), weights.heads
        if shared[LAYERS]:
            shape = (layers * shared[CACHE_SEQUENCES] * shared[CACHE_ROWS], 2, heads, width // heads)
            cache = carray(_pointer(shared[CACHE]), shape, f32)
            for i in range(layers):
                _layer(weights, work, x, cache, i, shared, thread)
        if shared[HEAD]:
            logits = carray(_pointer(shared[LOGITS]), (rows, weights.vocabulary), f32)
            stage = LAYER_STAGES * layers if shared[LAYERS] else 0
            _head(weights, work, x, logits, shared, stage, thread)
            if shared[CHOICE]:
                _choose(work, logits, shared, stage + 2)
        if helper == team.CALLER:
            team.close_pass(shared)
            return 0
        team.leave_pass(shared)
