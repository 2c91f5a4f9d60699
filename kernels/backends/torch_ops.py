"""Every operation of a model pass in plain torch: the CPU path, and the oracle for the kernels.

Letters: B batch, N nodes of one pass, M = B*N rows, S rows of a KV cache, H heads, D head size, V vocabulary,
L prefix length, C children per node.

A row's result should not depend on which other rows are in the batch. On a CPU the target's linear layers keep that
bitwise: oneDNN's pre-packed matrix multiply uses one instruction sequence per row from some number of rows on, which
`pack_linear` finds by trying (plain `torch.addmm` switches algorithm below four rows).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from stagedspec.kernels.state.host import GREEDY_SHARPNESS, INVALID, NEVER, Batch, Sequences

# oneDNN's fused epilogues: the name and the algorithm of `mkldnn::_linear_pointwise`.
_FUSED = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
}


# ---------------------------------------------------------------- linear layers


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] and bias [out] in the layout the backend likes best.

    rows: a multiply of fewer rows is filled up to so many, from where on a row's bits are always the same;
    0: no such number was found, and every row is multiplied alone.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed: bool
    dtype: torch.dtype
    rows: int = 1


def pack_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    invariant: bool,
    norm: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Linear:
    """Prepares weight [out, in] and bias [out] once, at load. norm: the LayerNorm before it, which others fold in.

    On a CPU the weight is reordered for oneDNN, in fp32 whatever its dtype (exact: half is a subset of fp32).
    invariant=False gives that up where a plain multiply is faster: for a small draft, whose numerics are free,
    oneDNN's 50 microseconds a call would cost more than the arithmetic.
    """
    dtype = weight.dtype
    small = weight.numel() < 1 << 18
    if not invariant and small and weight.device.type == "cpu":
        # As GPT-2 stores all but its head, [in, out]: MKL multiplies a few rows by it up to twice as fast.
        weight = weight.float().t().contiguous().t()
        return Linear(weight, None if bias is None else bias.float(), False, dtype)
    if weight.device.type != "cpu":
        return Linear(weight, bias, False, dtype)
    weight, bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    packed = torch.backends.mkldnn.is_available()
    if packed:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    layer = Linear(weight, bias, packed, dtype)
    return replace(layer, rows=_invariant_rows(layer)) if invariant else layer


_TRIED = (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 32, 48, 64)
_known_rows: dict[tuple, int] = {}


def _invariant_rows(layer: Linear) -> int:
    """`Linear.rows`, found by trying once for every shape of weight.

    On AVX-512 oneDNN multiplies one row by a weight of more than 1024 columns in another order than two rows.
    """
    key = (*layer.weight.shape, layer.packed)
    if key not in _known_rows:
        generator = torch.Generator("cpu").manual_seed(0)
        distinct = torch.randn(4, layer.weight.shape[1], generator=generator, device="cpu", dtype=torch.float32)
        results = {count: _linear(distinct.repeat(16, 1)[:count], layer, "none") for count in _TRIED}

        def agree(least: int) -> bool:
            alone = torch.cat([_linear(row.repeat(least, 1), layer, "none")[:1] for row in distinct.split(1)])
            expected = alone.repeat(16, 1)
            return all(torch.equal(y, expected[: len(y)]) for count, y in results.items() if count >= least)

        _known_rows[key] = next(filter(agree, (1, 2, 4, 8)), 0)
    return _known_rows[key]


def _in_rows(multiply: Callable[..., torch.Tensor], layer: Linear, *inputs: torch.Tensor) -> torch.Tensor:
    """multiply(*inputs), inputs [M, ...], in the number of rows that gives every row the same bits (`Linear.rows`)."""
    count = len(inputs[0])
    if count >= layer.rows > 0:
        return multiply(*inputs)
    if layer.rows == 0:
        return torch.cat([multiply(*rows) for rows in zip(*(x.split(1) for x in inputs), strict=True)])
    return multiply(*(F.pad(x, (0, 0, 0, layer.rows - count)) for x in inputs))[:count]


def _linear(x: torch.Tensor, layer: Linear, activation: str | Callable) -> torch.Tensor:
    if layer.rows == 1:
        return _multiply(x, layer, activation)
    return _in_rows(lambda x: _multiply(x, layer, activation), layer, x)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in dtype. `Tensor.to` takes 2.5 microseconds to find that there is nothing to do, a dozen times a layer."""
    return x if x.dtype == dtype else x.to(dtype)


def _multiply(x: torch.Tensor, layer: Linear, activation: str | Callable) -> torch.Tensor:
    fused = _FUSED.get(activation)
    name, algorithm = fused or _FUSED["none"]
    if layer.packed:
        multiply = torch.ops.mkldnn._linear_pointwise.default
        y = _cast(multiply(x.float(), layer.weight, layer.bias, name, [], algorithm), layer.dtype)
    else:
        y = _cast(F.linear(_cast(x, layer.weight.dtype), layer.weight, layer.bias), layer.dtype)
        if name == "relu":
            y = F.relu(y)
        elif name == "gelu":
            y = F.gelu(y, approximate=algorithm)
    return y if fused else activation(y)


def fused_activation(name: str) -> bool:
    """Whether `norm_linear` knows the activation by name; others are passed as callables."""
    return name in _FUSED


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    epsilon: float,
    layer: Linear,
    activation: str | Callable = "none",
) -> torch.Tensor:
    """activation(LayerNorm(x) @ weight.T + bias): x [M, d] -> [M, out]."""
    return _linear(torch.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, epsilon), layer, activation)


def linear_add(x: torch.Tensor, layer: Linear, residual: torch.Tensor) -> torch.Tensor:
    """residual + x @ weight.T + bias: x [M, in], residual [M, out] -> [M, out]."""
    if layer.packed and layer.dtype == torch.float32:

        def multiply(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, layer.weight, layer.bias, "add")

        return _in_rows(multiply, layer, x, residual)
    return residual + _linear(x, layer, "none")


def embed(
    token_table: torch.Tensor, position_table: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Token plus position embedding: tokens, positions [B, N] -> [M, d]. Positions past the table use its last row."""
    positions = positions.clamp(0, position_table.shape[0] - 1)
    return torch.embedding(token_table, tokens).add_(torch.embedding(position_table, positions)).flatten(0, 1)


# ---------------------------------------------------------------- attention


def layer_views(
    cache: torch.Tensor, tree_rows: int, batch: Batch, write: int, first: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """For each layer of a KV cache [layers, B, S, 2, H, D]: where the pass's rows go, [B, N, 2, H, D], and the keys and
    values visible under its bias, [B, H, R, D], from row `first` on. What lies where is in the bias: tree_rows is not
    needed here."""
    nodes, visible = batch.tokens.shape[1], batch.bias.shape[-1]
    store = cache.narrow(2, write, nodes).unbind(0)
    keys, values = cache.narrow(2, first, visible).permute(3, 0, 1, 4, 2, 5).unbind(0)
    return zip(store, keys.unbind(0), values.unbind(0), strict=True)


def kv_dtype(dtype: torch.dtype, device: torch.device, invariant: bool) -> torch.dtype:
    """The dtype of keys, values and masks of a model computed in dtype.

    The order in which attention sums over keys depends on the other nodes of a pass. On a CPU an invariant model keeps
    its keys and values in fp64: the sums then differ by 1e-16, and once rounded to fp32 they are the same bits but for
    about one in 1e8. In fp32 alone one sampled token in 16,000 came out different.
    """
    if device.type != "cpu":
        return dtype
    return torch.float64 if invariant else torch.float32


def tree_attention(
    qkv: torch.Tensor, view: tuple[torch.Tensor, ...], batch: Batch, scale: float, upcast: bool
) -> torch.Tensor:
    """Attention of N nodes over the committed prefix and their own ancestors; appends the nodes' K and V.

    qkv: [M, 3*H*D]. view: of `layer_views`. batch.bias: [B or 1, 1, N, R] of 0 and -inf, in the cache's dtype, which
    is what attention is computed in (with `upcast` at least in fp32). Returns [M, H*D] in the dtype of qkv.
    Bytes: the keys and values once, 2*B*R*H*D elements.
    """
    store, keys, values = view
    bias = batch.bias
    rows, nodes, _, heads, size = store.shape
    qkv = qkv.view(rows, nodes, 3, heads, size)
    store.copy_(qkv.narrow(2, 1, 2))
    q = _cast(qkv.select(2, 0).transpose(1, 2), keys.dtype)
    if upcast and keys.dtype.itemsize < 4:
        q, keys, values, bias = q.float(), keys.float(), values.float(), bias.float()
    out = _cast(F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale), qkv.dtype)
    return out.transpose(1, 2).reshape(rows * nodes, heads * size)


# ---------------------------------------------------------------- noise and token choice


def philox(counters: tuple[torch.Tensor, ...], keys: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words: 4 counters, 2 keys -> 4 words.

    The 64-bit products wrap in int64, which leaves their bits right. Only what is multiplied next must be cut to 32
    bits, and that also drops the sign that a shift draws in.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counters
    k0, k1 = keys
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (high >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(mask), high
        c2, c3 = (low >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(mask), low
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1 & mask, c2, c3 & mask


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Uniform 32-bit words (int64) to standard Gumbel noise, fp32, always finite.

    The exponential -log(1 - v) is built from v near 0, where fp32 is fine-grained: the winners of an argmax over
    a large vocabulary come from there, and 24-bit uniforms near 1 would make them collide.
    """
    v = ((words.float() + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(seeds: torch.Tensor, streams: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The noise g(seed, stream, position, token) of every token: seeds, streams [B], positions [B, P] -> [B, P, V].

    Counter (token // 4, position, stream, 0), key the seed's low and high word; word token % 4 is the token's.
    """
    quads = torch.arange((vocab_size + 3) // 4, device=seeds.device)
    shape = (*positions.shape, len(quads))
    mask = 0xFFFFFFFF
    counters = (
        quads.expand(shape),
        (positions & mask)[..., None].expand(shape),
        (streams & mask)[:, None, None].expand(shape),
        torch.zeros((), dtype=torch.long, device=seeds.device).expand(shape),
    )
    keys = ((seeds & mask)[:, None, None], ((seeds >> 32) & mask)[:, None, None])
    return gumbel(torch.stack(philox(counters, keys), -1).flatten(-2))[..., :vocab_size]


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


@dataclass(frozen=True)
class NoiseAt:
    """The noise of every node of a pass: values [B, P, V] of P positions, and the position [B, N] of each node."""

    values: torch.Tensor
    index: torch.Tensor

    def rows(self) -> torch.Tensor:
        """Where each node's noise lies among all rows of noise, values.flatten(0, 1): [B, N]."""
        batch, positions, _ = self.values.shape
        if batch == 1:
            return self.index
        return self.index + torch.arange(0, batch * positions, positions, device=self.index.device)[:, None]

    def at_nodes(self, nodes: torch.Tensor) -> "NoiseAt":
        """Of one node [B] of each row."""
        return replace(self, index=self.index.gather(1, nodes[:, None]))

    def of(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """The noise of tokens [B, N, K], or of the whole vocabulary: [B, N, K or V]."""
        rows, vocab_size = self.rows(), self.values.shape[-1]
        if tokens is None:
            return self.values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return self.values.take((rows * vocab_size)[..., None] + tokens)


class Noise:
    """The Gumbel noise g(seed, stream, position, token) of the next positions of every row.

    Making it costs a hundred small tensor operations, so it is made a block of positions at a time, ahead of need, and
    lives on from step to step in a ring: position p lies in slot p % window. It depends on the counters alone, so when
    it is made never matters.
    """

    BLOCK = 64  # positions made at once: enough for two threads at a vocabulary of 4096
    MEMORY = 1 << 22  # elements made at once, unless one position of every row takes more

    def __init__(
        self,
        seeds: list[int],
        streams: list[int],
        vocab_size: int,
        reach: int,
        limits: list[int],
        device: torch.device,
        past: int = 0,
    ):
        """reach: positions that a step needs; limits: the position of each row from which on none is ever chosen;
        past: positions that are kept behind."""
        self.vocab_size, self.reach, self.limits = vocab_size, reach, limits
        self.seeds = torch.tensor(seeds, device=device)
        self.streams = torch.tensor(streams, device=device)
        self.block = max(1, min(self.BLOCK, self.MEMORY // (vocab_size * len(seeds))))
        self.window, self.past = past + reach + self.block, past
        self.values = torch.zeros(len(seeds), self.window, vocab_size, dtype=torch.float32, device=device)
        self.host = self.values.cpu().numpy()  # on a CPU the same memory
        self.lengths: list[int] = []
        self.made: list[int] = []  # the first position of each row that is not made yet

    def advance(self, sequences: Sequences) -> None:
        """Makes the positions that a step of the sequences can choose for available."""
        self.lengths = lengths = sequences.lengths
        self.made = self.made or list(lengths)
        needed = [min(n + self.reach, limit) for n, limit in zip(lengths, self.limits, strict=True)]
        while rows := [row for row, need in enumerate(needed) if self.made[row] < need]:
            count = min(self.block, max(self.limits[row] - self.made[row] for row in rows))
            which = torch.tensor(rows, device=self.seeds.device)
            starts = torch.tensor([self.made[row] for row in rows], device=self.seeds.device)
            positions = starts[:, None] + torch.arange(count, device=self.seeds.device)
            fresh = gumbel_noise(self.seeds[which], self.streams[which], positions, self.vocab_size)
            slots = which[:, None], positions % self.window
            self.values[slots] = fresh
            if self.values.device.type != "cpu":
                self.host[tuple(part.cpu().numpy() for part in slots)] = fresh.cpu().numpy()
            for row in rows:
                self.made[row] += count

    def at(self, batch: Batch) -> NoiseAt:
        """For the nodes of a pass: a node of depth d chooses the token d past the row's length."""
        index = [[self._slot(n, depth) for depth in row] for n, row in zip(self.lengths, batch.depths, strict=True)]
        return NoiseAt(self.values, torch.from_numpy(np.array(index)).to(self.seeds.device))

    def _slot(self, length: int, depth: int) -> int:
        """Nodes outside the reach (the catch-up token, drafted nodes deeper than any tree of this size) can never be
        accepted: any noise does for them."""
        return (length + min(max(depth, -self.past), self.reach - 1)) % self.window

    def of(self, row: int, depths: list[int], tokens: list[int]) -> list[float]:
        """The noise of single tokens below nodes of one row."""
        # Read one by one from host memory: on a CPU that is a view, and far cheaper than a gather of a few numbers.
        values, length = self.host[row], self.lengths[row]
        return [float(values[self._slot(length, depth), token]) for depth, token in zip(depths, tokens, strict=True)]


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


# ---------------------------------------------------------------- n-grams


def context_lookup(sequence: torch.Tensor, lengths: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """The context n-gram: what followed the latest earlier occurrence of two tokens in this very sequence.

    sequence [B, S], lengths [B], contexts [B, K, 2] -> token [B, K], -1 where the pair has not occurred.
    """
    first, second = sequence[:, None, :-2], sequence[:, None, 1:-1]
    ends = torch.arange(2, sequence.shape[1], device=sequence.device)
    found = (first == contexts[..., :1]) & (second == contexts[..., 1:]) & (ends < lengths[:, None])[:, None]
    where = (found * ends).amax(-1)
    return torch.where(where > 0, sequence.gather(1, where), -1)


# ---------------------------------------------------------------- KV compaction


def move_rows(cache: torch.Tensor, tree_rows: int, moves: list[list[tuple[int, int]]]) -> None:
    """Moves rows of a KV cache [layers, B, S, ...] in place, all layers at once.

    moves: (tree row, position) pairs of each sequence; position p lives in row tree_rows + p. Every source is read
    before any target is written.
    """
    layers, batch, rows = cache.shape[:3]
    flat = cache.view(layers, batch * rows, -1)
    source = [index * rows + row for index, pairs in enumerate(moves) for row, _ in pairs]
    target = [index * rows + tree_rows + position for index, pairs in enumerate(moves) for _, position in pairs]
    if cache.device.type == "cpu" and set(source).isdisjoint(target):
        # A copy for every run of neighbours takes less time there than indexing.
        start = 0
        for stop in range(1, len(source) + 1):
            count = stop - start
            if stop == len(source) or source[stop] - source[start] != count or target[stop] - target[start] != count:
                flat.narrow(1, target[start], count).copy_(flat.narrow(1, source[start], count))
                start = stop
    elif source:
        indices = torch.tensor((source, target), device=cache.device)
        flat.index_copy_(1, indices[1], flat.index_select(1, indices[0]))
