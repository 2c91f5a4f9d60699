"""The head and the choice of tokens in one operation, and a step's end: choice, walk, commit, KV rows moved."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, error_ratio, exact
from models import DEVICE, MODELS, Choice

from stagedspec.kernels import lm_head, reference
from stagedspec.kernels.backends.triton_backend import warping_settings
from stagedspec.kernels.common.registry import Scratch
from stagedspec.kernels.state.host import GREEDY_SHARPNESS
from stagedspec.tuning.workloads import CHILDREN, SAMPLINGS, CompactWorkload, HeadWorkload, TreeWorkload, katz_table

COPIES = 2  # of the head's weights, which together are more than the cache holds
# Without norm and choice, and without the last rows: an odd number of outputs makes cuBLAS thrice as slow.
MATRIX, EVEN = "cuBLAS alone", 64


def cases(choice: Choice) -> Iterator[Case]:
    for model, batch, count in choice.all("model", "batch", "nodes"):
        head = HeadWorkload(MODELS[model], batch, count, DEVICE, COPIES)
        shape = {"B": batch, "N": count}
        weights = head.heads[0].weight.numel() * 2
        for sampling in SAMPLINGS:
            peers = {"torch eager": partial(plain, head, sampling, choose), MATRIX: partial(matrix_alone, head)}
            if sampling in ("greedy", "top-k"):
                peers["torch.compile"] = partial(plain, head, sampling, torch.compile(choose, dynamic=False))
            where = shape | {"rule": sampling}
            run, check = partial(head.choose, sampling), partial(check_choice, head, sampling)
            yield Case("lm_head_choose", model, where, weights, COPIES, run, peers, check)
            if sampling in ("greedy", "top-k"):
                run, check = partial(head.children, sampling), partial(check_children, head, sampling)
                peers = {"torch eager": partial(plain, head, sampling, likeliest), MATRIX: partial(matrix_alone, head)}
                yield Case("lm_head_topm", model, where, head.of_draft[0].weight.nbytes, COPIES, run, peers, check)
    for model, count in choice.all("model", "nodes"):
        for sampling in ("greedy", "top-k", "top-p"):
            yield step_end(model, sampling, count)


def step_end(model: str, sampling: str, nodes: int) -> Case:
    """All work of a step after the target's last layer, for a target that follows a path of the tree to its end."""
    context, room = 512, 4096
    heads = [HeadWorkload(MODELS[model], 1, nodes, DEVICE) for _ in range(COPIES)]
    growing = TreeWorkload(nodes, context, 1, katz_table(MODELS[model].vocab, DEVICE), DEVICE, room=room)
    moving = CompactWorkload(MODELS[model], 1, nodes, context + room, 1, DEVICE)
    trees = growing.passes()
    chosen = growing.likely(trees)

    def ours() -> None:
        for head in heads:
            head.choose(sampling)
            moves = trees.verify_commit(chosen)
            moving.ops.move_rows(moving.cache, nodes, moves.target_rows())

    def matrices() -> None:
        for head in heads:
            matrix_alone(head)

    where = {"N": nodes, "rule": sampling, "path": int((trees.tree[2] * (trees.tree[1] >= 0)).max())}
    weights, peers = heads[0].heads[0].weight.numel() * 2, {MATRIX: matrices}
    return Case("choose, walk, move", model, where, weights, COPIES, ours, peers, None, 15.0, MATRIX)


# ---------------------------------------------------------------- peers


def matrix_alone(head: HeadWorkload) -> None:
    vocab = head.shape.vocab // EVEN * EVEN
    for part in head.heads:
        F.linear(head.x, part.weight[:vocab])


def plain(head: HeadWorkload, sampling: str, rule: Callable) -> None:
    for part in head.heads:
        rule(head.x, *head.norm, part.weight, SAMPLINGS[sampling])


def _scores(x, norm_weight, norm_bias, weight, warping):
    """Warps and samples with torch's own noise: another sample of the same distribution."""
    logits = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-5), weight).float()
    if warping is None:
        return logits
    logits = logits / warping["temperature"]
    if warping["top_k"]:
        logits = logits.masked_fill(logits < logits.topk(warping["top_k"], -1).values[..., -1:], -torch.inf)
    if warping["top_p"]:
        ordered, order = logits.sort(-1)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - warping["top_p"]
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return logits - torch.empty_like(logits).exponential_().log()


def choose(*arguments):
    return _scores(*arguments).argmax(-1)


def likeliest(*arguments):
    return _scores(*arguments).log_softmax(-1).topk(CHILDREN, -1)


# ---------------------------------------------------------------- checks


def given(head: HeadWorkload, sampling: str) -> tuple[torch.Tensor | None, reference.NoiseAt | None]:
    """Noise of every node from the reference, for both sides."""
    if sampling == "greedy":
        return None, None
    made = head.counters.made(head.shape.vocab)
    return made.values.flatten(0, 1).contiguous(), made


def arguments(head: HeadWorkload) -> tuple:
    at = head.counters
    return head.x.flatten(0, 1), *head.norm, 1e-5, head.heads[0].weight, at.seeds, at.streams, at.positions


def check_choice(head: HeadWorkload, sampling: str) -> float:
    """Checks the logits by their error, and the tokens exactly for these logits and this noise."""
    rows = head.batch * head.nodes
    x, norm_weight, norm_bias, epsilon, weight, *_ = arguments(head)
    scratch = Scratch.of([lm_head.scratch_size(rows, *weight.shape)], DEVICE)
    logits = torch.full((rows, weight.shape[0]), torch.nan, device=DEVICE)
    out = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    noise, at = given(head, sampling)
    rule = warping_settings(SAMPLINGS[sampling])
    lm_head.lm_head_choose(*arguments(head), **rule, noise=noise, logits=logits, out=out, scratch=scratch)
    wanted = reference.choose(logits.unflatten(0, (head.batch, head.nodes)), SAMPLINGS[sampling], at)
    if not torch.equal(out.long(), wanted.flatten()):
        return float("inf")

    def head_in(dtype: torch.dtype) -> torch.Tensor:
        parts = (part.to(dtype) for part in (x, norm_weight, norm_bias, weight))
        h, w, b, m = parts
        return F.linear(F.layer_norm(h, h.shape[-1:], w, b, epsilon), m)

    return error_ratio(logits, head_in(x.dtype), head_in(torch.float64))


def check_children(head: HeadWorkload, sampling: str) -> float:
    """Checks the tokens exactly for our own logits, and the log-probabilities approximately."""
    rows, vocab, narrow = head.batch * head.nodes, head.shape.vocab, head.of_draft[0]
    inputs = [*arguments(head)[:4], narrow.weight, *arguments(head)[5:]]
    scratch = Scratch.of([lm_head.scratch_size(rows, vocab, head.shape.width)], DEVICE)
    logits = torch.empty(rows, vocab, device=DEVICE)
    out = torch.empty(rows, dtype=torch.int32, device=DEVICE)
    lm_head.lm_head_choose(*inputs, scales=narrow.scales, greedy=True, logits=logits, out=out, scratch=scratch)
    noise, at = given(head, sampling)
    tokens = torch.full((rows, CHILDREN), -1, dtype=torch.int32, device=DEVICE)
    logprobs = torch.full((rows, CHILDREN), torch.nan, device=DEVICE)
    lm_head.lm_head_topm(
        *inputs, scales=narrow.scales, **warping_settings(SAMPLINGS[sampling]), sharpness=GREEDY_SHARPNESS, noise=noise,
        out_tokens=tokens, out_logprobs=logprobs, scratch=scratch,
    )  # fmt: skip
    logits = logits.unflatten(0, (head.batch, head.nodes))
    wanted, gains = reference.choose_children(logits, CHILDREN, SAMPLINGS[sampling], at)
    near = torch.allclose(logprobs, gains.flatten(0, 1), rtol=1e-4, atol=1e-4)
    return exact((torch.equal(tokens.long(), wanted.flatten(0, 1)), True), (near, True))
