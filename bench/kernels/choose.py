"""The token-choice rule alone, over logits in memory."""

from collections.abc import Iterator
from functools import partial

import torch
from harness import SMALL, Case, again, exact
from models import DEVICE, MODELS, Choice

from stagedspec.kernels import reference
from stagedspec.kernels.choose import choose, choose_children, scratch_size
from stagedspec.kernels.registry import Scratch
from stagedspec.kernels.triton_backend import _settings
from stagedspec.workloads import SAMPLINGS, Counters

CHILDREN = 8


def cases(choice: Choice) -> Iterator[Case]:
    for batch, nodes in choice.all("batch", "nodes"):
        for sampling in SAMPLINGS:
            yield _case(batch, nodes, sampling, None)
        yield _case(batch, nodes, "top-k", CHILDREN)


def _case(batch: int, nodes: int, sampling: str, children: int | None) -> Case:
    vocab, rows, warping = MODELS["L"].vocab, batch * nodes, SAMPLINGS[sampling]
    logits = torch.randn(rows, vocab, device=DEVICE) * 2
    at = Counters(batch, nodes, DEVICE)
    known = None if warping is None else at.made(vocab)
    shared = _settings(warping) | {"scratch": Scratch.of([scratch_size(rows, vocab)], DEVICE)}
    counters = logits, at.seeds, at.streams, at.positions
    out = torch.full((rows,) if children is None else (rows, children), -1, dtype=torch.int32, device=DEVICE)
    grouped = logits.unflatten(0, (batch, nodes))

    if children is None:
        ours = partial(choose, *counters, **shared, out=out)
        plain = partial(reference.choose, grouped, warping, known)
    else:
        logprobs = torch.empty(rows, children, device=DEVICE)
        ours = partial(choose_children, *counters, **shared, out_tokens=out, out_logprobs=logprobs)
        plain = partial(reference.choose_children, grouped, children, warping, known)

    def check() -> float:
        given = None if known is None else known.values.flatten(0, 1).contiguous()
        ours(noise=given)
        wanted = plain() if children is None else plain()[0]
        return exact((torch.equal(out.long(), wanted.reshape(out.shape)), True))

    # The peer finds its noise made.
    peers = {"torch eager": again(plain)}
    where = {"B": batch, "N": nodes, "rule": sampling}
    name = "choose" if children is None else "choose_children"
    return Case(name, "L", where, 4 * rows * vocab, SMALL, again(ours), peers, check)
