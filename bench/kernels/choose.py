"""Token choice alone, from logits in memory."""

from collections.abc import Iterator
from functools import partial

import torch
from harness import SMALL, Case, again, exact
from models import DEVICE, MODELS, Choice

from stagedspec.kernels import reference
from stagedspec.tuning.workloads import SAMPLINGS, ChooseWorkload


def cases(choice: Choice) -> Iterator[Case]:
    for batch, nodes in choice.all("batch", "nodes"):
        choosing = ChooseWorkload(MODELS["L"].vocab, batch, nodes, DEVICE)
        for sampling in SAMPLINGS:
            yield _case(choosing, sampling)


def _case(choosing: ChooseWorkload, sampling: str) -> Case:
    logits = choosing.logits.unflatten(0, (choosing.batch, choosing.nodes))
    warping = SAMPLINGS[sampling]
    noise = None if warping is None else choosing.counters.made(choosing.vocab)
    ours = partial(choosing.choose, sampling)
    plain = partial(reference.choose, logits, warping, noise)

    def check() -> float:
        got, wanted = ours(None if noise is None else noise.values.flatten(0, 1).contiguous()), plain()
        return exact((torch.equal(got.long(), wanted.reshape(got.shape)), True))

    # The peer finds its noise made.
    where = {"B": choosing.batch, "N": choosing.nodes, "rule": sampling}
    bytes_read = choosing.logits.numel() * 4
    return Case("choose", "L", where, bytes_read, SMALL, again(ours), {"torch eager": again(plain)}, check)
