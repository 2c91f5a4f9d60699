"""Kernels of layers, head and token choice against the reference at a model's shapes, for `stagedspec check`.

The result of an exact operation must equal the reference's. The error of other operations against fp64 may be at most
twice that of plain torch in the same dtype. A row must have the same bits whether it is computed alone or with few or
many others: a pass that verifies k+1 tokens must not differ from passes of one token. Outputs start as NaN, so that
elements that a kernel does not write are noticed.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from stagedspec.kernels import choose, compact, embed, linear, lm_head, reference
from stagedspec.kernels import tree_attention as attention
from stagedspec.kernels.backends.triton_backend import WINDOW, warping_settings
from stagedspec.kernels.common.registry import Scratch
from stagedspec.kernels.state.host import GREEDY_SHARPNESS
from stagedspec.models.gpt2 import GPT2
from stagedspec.tuning.workloads import CHILDREN, SAMPLINGS, Counters

ROWS = (1, 5, 16, 64)  # of a pass; the smaller passes are parts of the largest
WIDE_ROWS = (*ROWS, 256)  # for linears, which also read prompts
CONTEXT = 300  # tokens, fewer where the model has fewer positions
ALLOWED = 2.0  # times the error of plain torch


# ---------------------------------------------------------------- what is expected of a result


class Wrong(Exception):
    """An operation gave a wrong result."""


def expect(good: bool, message: str) -> None:
    """Raises Wrong with the message unless `good`."""
    if not good:
        raise Wrong(message)


def expect_close(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> str:
    """Raises Wrong if the error of ours against fp64 (exact) is over ALLOWED times plain torch's. Returns a remark."""
    expect(bool(ours.isfinite().all()), "the result holds values that are not finite")
    scale = exact.norm().item()
    error, usual = ((got.double() - exact).norm().item() / scale for got in (ours, plain))
    ratio = error / max(usual, 1e-6)
    expect(ratio <= ALLOWED, f"error {ratio:.3g} times that of plain torch (at most {ALLOWED:g})")
    return f"error {ratio:.2f}x torch's"


Run = Callable[[slice], tuple[torch.Tensor, ...]]  # the results of some of the rows
Parts = list[tuple[slice, tuple[torch.Tensor, ...]]]


def in_parts(run: Run, total: int, rows: Sequence[int] | None = None) -> Parts:
    """The results of the first and of the last few of `total` rows.

    Everything is launched before a result is read, so that a dry run meets all kernels.
    """
    starts = [(first, count) for count in rows or ROWS if count < total for first in (0, total - count)]
    return [(slice(first, first + count), run(slice(first, first + count))) for first, count in starts]


def expect_same_rows(parts: Parts, whole: tuple[torch.Tensor, ...]) -> None:
    """Raises Wrong unless each row has the bits that it has in the pass of all rows."""
    for rows, some in parts:
        same = all(torch.equal(part, every[rows]) for part, every in zip(some, whole, strict=True))
        expect(same, f"a row's bits differ between passes of {rows.stop - rows.start} and {len(whole[0])} rows")


class Draw:
    """Random tensors for a model's kernels, the same in every run."""

    def __init__(self, model: GPT2):
        self.device, self.dtype = model.device, model.dtype
        self.generator = torch.Generator(model.device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        """Normal, in the model's dtype."""
        return (self.fp32(*shape) * scale + shift).to(self.dtype)

    def fp32(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def unset(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output tensor filled with NaN, or with -1 for integers."""
        dtype = dtype or self.dtype
        return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype, device=self.device)

    def scratch(self, size: tuple[int, int]) -> Scratch:
        scratch = Scratch.of([size], self.device)
        scratch.partials.fill_(torch.nan)
        return scratch


# ---------------------------------------------------------------- layers


def check_embed(model: GPT2) -> str:
    draw, rows = Draw(model), ROWS[-1]
    tokens = torch.arange(rows, dtype=torch.int32, device=model.device)[None] * 7 % model.vocab_size
    positions = torch.arange(rows, dtype=torch.int32, device=model.device)[None] % model.positions
    out = draw.unset(rows, model.config.n_embd)
    stats = draw.unset(rows, linear.stat_tiles(out.shape[1]), 2, dtype=torch.float32)
    embed.embed(model.token_table, model.position_table, tokens, positions, out, stats)
    wanted = model.token_table[tokens[0].long()].float() + model.position_table[positions[0].long()].float()
    expect(torch.equal(out, wanted.to(model.dtype)), "the sum of both embeddings differs")
    known = draw.unset(*stats.shape, dtype=torch.float32)
    linear.row_stats(out, known)
    expect(torch.allclose(stats, known), "the statistics of the rows differ")
    return "exact"


def check_norm_linear(model: GPT2, outputs: int, inputs: int, activation: str | Callable) -> str:
    draw = Draw(model)
    x, norm = draw(WIDE_ROWS[-1], inputs, scale=3.0, shift=1.0), (draw(inputs, shift=1.0), draw(inputs))
    weight, bias = draw(outputs, inputs, scale=inputs**-0.5), draw(outputs)
    layer = linear.Folded.of(*norm, weight, bias)
    name = activation if isinstance(activation, str) else "none"  # others run in torch, after the kernel

    def run(rows: slice) -> tuple[torch.Tensor, ...]:
        some = x[rows].contiguous()
        stats = draw.unset(len(some), linear.stat_tiles(inputs), 2, dtype=torch.float32)
        linear.row_stats(some, stats)
        out = draw.unset(len(some), outputs)
        need = draw.scratch(linear.scratch_size(len(some), outputs, inputs))
        linear.norm_linear(some, stats, model.epsilon, layer, name, out, need)
        return (out,)

    def by_torch(*tensors: torch.Tensor) -> torch.Tensor:
        x, gain, shift, weight, bias = tensors
        y = F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, model.epsilon), weight, bias)
        return y if name == "none" else ACT2FN[name](y)

    given = x, *norm, weight, bias
    whole, parts = run(slice(None)), in_parts(run, len(x), WIDE_ROWS)
    remark = expect_close(whole[0], by_torch(*given), by_torch(*(tensor.double() for tensor in given)))
    expect_same_rows(parts, whole)
    return remark


def check_linear_add(model: GPT2, outputs: int, inputs: int) -> str:
    draw = Draw(model)
    x, residual = draw(WIDE_ROWS[-1], inputs), draw(WIDE_ROWS[-1], outputs)
    weight, bias = draw(outputs, inputs, scale=inputs**-0.5), draw(outputs)

    def run(rows: slice) -> tuple[torch.Tensor, ...]:
        """In place, and with the statistics of what was written."""
        some, out = x[rows].contiguous(), residual[rows].clone()
        stats = draw.unset(len(some), linear.stat_tiles(outputs), 2, dtype=torch.float32)
        need = draw.scratch(linear.scratch_size(len(some), outputs, inputs))
        linear.linear_add(some, weight, bias, out, out, stats, need)
        return out, stats

    given = x, weight, bias
    (out, stats), parts = run(slice(None)), in_parts(run, len(x), WIDE_ROWS)
    exact = residual.double() + F.linear(*(tensor.double() for tensor in given))
    remark = expect_close(out, residual + F.linear(*given), exact)
    tiles = out.double().split(64, 1)
    known = [torch.stack((tile.sum(1), tile.var(1, correction=0) * tile.shape[1]), 1) for tile in tiles]
    same = torch.allclose(stats.double(), torch.stack(known, 1), rtol=1e-4, atol=1e-4)
    expect(same, "the statistics of the rows, which the next norm takes, differ")
    expect_same_rows(parts, (out, stats))
    return remark


def check_attention(model: GPT2) -> str:
    """Of a tree of the largest number of nodes over a short and a long prefix; rows that nobody may read are NaN."""
    draw, nodes, heads, size = Draw(model), ROWS[-1], model.heads, model.head_size
    positions = min(CONTEXT, model.positions)
    prefix = torch.tensor([positions // 9, positions - 7], dtype=torch.int32, device=model.device)
    qkv = draw(2, nodes, 3 * heads * size)
    cache = draw(2, nodes + positions, 2, heads, size)
    cache[:, :nodes] = torch.nan
    for row, length in enumerate(prefix.tolist()):
        cache[row, nodes + length :] = torch.nan
    parents = [-1] + [node - 1 if node % 8 else node // 2 for node in range(1, nodes)]
    sees = torch.eye(nodes, dtype=torch.bool)
    for node, parent in enumerate(parents[1:], 1):
        sees[node] |= sees[parent]
    masks = attention.mask_words(sees).expand(2, -1, -1).contiguous().to(model.device)
    scale = model.layers[0].scale

    def run(rows: slice, cache: torch.Tensor, sequences: int = 2) -> torch.Tensor:
        """Nodes of the first sequences, beside others that the cache holds already."""
        some = qkv[:sequences, rows].contiguous()
        first, count = rows.indices(nodes)[0], some.shape[1]
        out = draw.unset(sequences * count, heads * size)
        need = attention.scratch_size(sequences, count, heads, heads, size, cache.shape[1], nodes)
        attention.tree_attention(
            some.flatten(0, 1), cache[:sequences], masks[:sequences, rows].contiguous(), prefix[:sequences], first,
            False, nodes, scale, out, draw.scratch(need), WINDOW,
        )  # fmt: skip
        return out.view(sequences, count, -1)

    after = cache.clone()
    whole = run(slice(0, nodes), after)
    parts = [
        (sequences, count, run(slice(nodes - count, nodes), after.clone(), sequences))
        for sequences in (1, 2)
        for count in ROWS
    ]
    q, k, v = qkv.view(2, nodes, 3, heads, size).unbind(2)
    expected = cache.clone()
    expected[:, :nodes] = torch.stack((k, v), 2)
    expect(torch.equal(after.nan_to_num(7.0), expected.nan_to_num(7.0)), "the KV rows that it wrote differ")

    committed = torch.arange(positions, device=model.device) < prefix[:, None, None]
    seen = torch.cat((sees.to(model.device).expand(2, -1, -1), committed.expand(-1, nodes, -1)), 2)[:, None]
    q, k, v = q.transpose(1, 2), *expected.nan_to_num(0.0).permute(2, 0, 3, 1, 4).unbind()
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2).flatten(2)
    scores = (q.double() @ k.double().mT * scale).masked_fill(~seen, -torch.inf)
    exact = (scores.softmax(-1) @ v.double()).transpose(1, 2).flatten(2)
    remark = expect_close(whole, plain, exact)
    for sequences, count, some in parts:
        same = torch.equal(some, whole[:sequences, nodes - count :])
        expect(same, f"a node's bits differ between passes of {count} and {nodes} nodes, {sequences} sequences")
    return remark


def check_prompts(model: GPT2) -> str:
    """Attention of a chunk of a prompt after others, whole and in chunks of 16; rows that nobody may read are NaN."""
    draw, heads, size = Draw(model), model.heads, model.head_size
    start = min(9, model.positions // 5)
    count = min(256, model.positions - start)
    qkv = draw(count, 3 * heads * size)
    cache = draw(1, 4 + model.positions, 2, heads, size)
    cache[:, :4], cache[:, 4 + start :] = torch.nan, torch.nan
    scale = model.layers[0].scale

    def run(first: int, last: int, cache: torch.Tensor) -> torch.Tensor:
        nodes = last - first
        chain = torch.ones(nodes, nodes, dtype=torch.bool, device=model.device).tril()
        prefix = torch.full((1,), start + first, dtype=torch.int32, device=model.device)
        out = draw.unset(nodes, heads * size)
        need = attention.scratch_size(1, nodes, heads, heads, size, cache.shape[1], 4)
        attention.tree_attention(
            qkv[first:last].contiguous(), cache, attention.mask_words(chain)[None].contiguous(), prefix, 0, True, 4,
            scale, out, draw.scratch(need), WINDOW,
        )  # fmt: skip
        return out

    after, pieces = cache.clone(), cache.clone()
    whole = run(0, count, after)
    parts = [run(first, min(first + 16, count), pieces) for first in range(0, count, 16)]
    q, k, v = qkv.view(count, 3, heads, size).unbind(1)
    expected = cache.clone()
    expected[0, 4 + start : 4 + start + count] = torch.stack((k, v), 1)
    expect(torch.equal(after.nan_to_num(7.0), expected.nan_to_num(7.0)), "the KV rows that it wrote differ")
    seen = torch.ones(count, start + count, dtype=torch.bool, device=model.device).tril(start)
    q, k, v = (t.transpose(0, 1) for t in (q, *expected[0, 4 : 4 + start + count].unbind(1)))
    plain = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=scale)[0]
    scores = (q.double() @ k.double().mT * scale).masked_fill(~seen, -torch.inf)
    flat = [t.transpose(0, 1).flatten(1) for t in (plain, scores.softmax(-1) @ v.double())]
    remark = expect_close(whole, *flat)
    expect(torch.equal(torch.cat(parts), whole), f"a token's bits differ between chunks of 16 and {count} tokens")
    return remark


def check_compact(model: GPT2) -> str:
    draw, nodes = Draw(model), 16
    cache = draw(len(model.layers), 2, 2 * nodes, 2, model.heads, model.head_size)
    source = torch.tensor([[0, 3, 7, -1], [2, 5, 6, 15]], dtype=torch.int32, device=model.device)
    target = torch.tensor([[0, 1, 2, -1], [9, 10, 11, 12]], dtype=torch.int32, device=model.device)
    expected = cache.clone()
    pairs = torch.stack((source, target), -1).tolist()
    reference.move_rows(expected, nodes, [[pair for pair in row if min(pair) >= 0] for row in pairs])
    compact.compact(cache, source, target, nodes)
    expect(torch.equal(cache, expected), "the cache after moving rows differs")
    return "exact"


# ---------------------------------------------------------------- head and token choice


class HeadCalls:
    """The head of a model over random hidden states, called as a decoder calls it: kernels make the noise."""

    def __init__(self, model: GPT2, sampling: str = "greedy"):
        self.model, self.draw, self.warping = model, Draw(model), SAMPLINGS[sampling]
        self.x = self.draw(ROWS[-1], model.config.n_embd)
        self.counters = Counters(1, ROWS[-1], model.device)
        self.scales = model.head.scales

    def _arguments(self, rows: slice) -> tuple[tuple, Scratch]:
        model, at, x = self.model, self.counters, self.x[rows].contiguous()
        positions = at.positions[:, rows].contiguous()
        need = lm_head.scratch_size(len(x), model.vocab_size, x.shape[1], True)
        arguments = x, *model.final_norm, model.epsilon, model.head.weight, at.seeds, at.streams, positions
        return arguments, self.draw.scratch(need)

    def logits(self, rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
        """[M, V], and the likeliest tokens [M]."""
        arguments, scratch = self._arguments(rows)
        out = self.draw.unset(len(arguments[0]), dtype=torch.int32)
        logits = self.draw.unset(len(out), self.model.vocab_size, dtype=torch.float32)
        lm_head.lm_head_choose(*arguments, scales=self.scales, greedy=True, logits=logits, out=out, scratch=scratch)
        return logits, out

    def choose(self, rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
        """Tokens [M]."""
        arguments, scratch = self._arguments(rows)
        out = self.draw.unset(len(arguments[0]), dtype=torch.int32)
        warping = warping_settings(self.warping)
        lm_head.lm_head_choose(*arguments, scales=self.scales, **warping, out=out, scratch=scratch)
        return (out,)

    def children(self, rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
        """Tokens and log-probabilities [M, C]."""
        arguments, scratch = self._arguments(rows)
        tokens = self.draw.unset(len(arguments[0]), min(CHILDREN, self.model.vocab_size), dtype=torch.int32)
        logprobs = self.draw.unset(*tokens.shape, dtype=torch.float32)
        lm_head.lm_head_topm(
            *arguments, **warping_settings(self.warping), sharpness=GREEDY_SHARPNESS, out_tokens=tokens,
            out_logprobs=logprobs, scales=self.scales, scratch=scratch,
        )  # fmt: skip
        return tokens, logprobs


def check_head_logits(model: GPT2) -> str:
    head = HeadCalls(model)
    (logits, likeliest), parts = head.logits(), in_parts(head.logits, ROWS[-1])
    weight = model.head.weight
    if model.head.scales is not None:
        weight = lm_head.from_eight_bits(weight, model.head.scales, head.x.shape[1])

    def by_torch(dtype: torch.dtype) -> torch.Tensor:
        x, gain, shift = (tensor.to(dtype) for tensor in (head.x, *model.final_norm))
        normed = F.layer_norm(x, x.shape[-1:], gain, shift, model.epsilon)
        return torch.cat([normed @ part.to(dtype).T for part in weight.split(4096)], 1)  # fp64: four times the memory

    remark = expect_close(logits, by_torch(model.dtype), by_torch(torch.float64))
    expect(torch.equal(likeliest.long(), logits.argmax(-1)), "the likeliest tokens differ")
    expect_same_rows(parts, (logits, likeliest))
    return remark


def check_choice(model: GPT2, sampling: str) -> str:
    head = HeadCalls(model, sampling)
    logits, _ = head.logits()
    (tokens,), parts = head.choose(), in_parts(head.choose, ROWS[-1])
    remark = expect_chosen(tokens, logits, head.warping, head.counters)
    expect_same_rows(parts, (tokens,))
    return remark


def check_rule(model: GPT2, sampling: str) -> str:
    """The choice from logits in memory, which is used if the host takes part in it."""
    draw, warping, rows = Draw(model), SAMPLINGS[sampling], ROWS[-1]
    logits, counters = draw.fp32(rows, model.vocab_size) * 5, Counters(1, rows, model.device)
    tokens = draw.unset(rows, dtype=torch.int32)
    choose.choose(
        logits, counters.seeds, counters.streams, counters.positions, **warping_settings(warping), out=tokens,
        scratch=draw.scratch(choose.scratch_size(rows, model.vocab_size)),
    )  # fmt: skip
    return expect_chosen(tokens, logits, warping, counters)


def expect_chosen(tokens: torch.Tensor, logits: torch.Tensor, warping: dict | None, counters: Counters) -> str:
    """Raises Wrong unless tokens [M] are the choices from logits [M, V]. Returns a remark.

    The kernels' noise differs from the reference's by an ulp or two, so either of two scores as close as that may win.
    """
    expect(bool(((tokens >= 0) & (tokens < logits.shape[1])).all()), "a chosen token is outside the vocabulary")
    if warping is None:
        expect(torch.equal(tokens.long(), logits.argmax(-1)), "the chosen tokens differ")
        return "exact"
    scores = reference.warp(logits, **warping) + counters.made(logits.shape[1]).values[0]
    short = scores.amax(-1) - scores.gather(-1, tokens.long()[:, None])[:, 0]
    expect(bool((short <= 1e-5).all()), "a chosen token is not the best one")
    return f"{int((short == 0).sum())} of {len(tokens)} the same" if bool(short.any()) else "exact"


def check_children(model: GPT2, sampling: str) -> str:
    """Children must have the reference's probabilities, the likeliest first."""
    head = HeadCalls(model, sampling)
    logits, _ = head.logits()
    (tokens, logprobs), parts = head.children(), in_parts(head.children, ROWS[-1])
    noise = None if head.warping is None else head.counters.made(model.vocab_size)
    (_,), (best,) = reference.choose_children(logits[None], tokens.shape[1], head.warping, noise)
    if noise is None or head.warping is None:
        scores = logits * GREEDY_SHARPNESS
    else:
        scores = reference.warp(logits, **cast("dict[str, Any]", head.warping)) + noise.values[0]
    expect(bool(((tokens >= 0) & (tokens < model.vocab_size)).all()), "a child is outside the vocabulary")
    expect(bool((tokens.sort().values.diff() > 0).all()), "a child comes twice")
    known = scores.double().log_softmax(-1).clamp(max=-1e-4).gather(-1, tokens.long())
    for expected in (best.double(), known):
        expect(torch.allclose(logprobs.double(), expected, rtol=1e-5, atol=1e-4), "the children's probabilities differ")
    expect_same_rows(parts, (tokens, logprobs))
    return "within rounding"
