"""Embeddings of a pass, with the statistics that the first layer's norm reads."""

from collections.abc import Iterator

import torch
from harness import SMALL, Case, again, exact
from models import DEVICE, MODELS, Choice

from stagedspec.kernels.backends.triton_backend import TritonBackend
from stagedspec.tuning.workloads import randn


def cases(choice: Choice) -> Iterator[Case]:
    for model, batch, nodes in choice.all("model", "batch", "nodes"):
        yield _case(model, batch, nodes)


def _case(model: str, batch: int, nodes: int) -> Case:
    shape, ops = MODELS[model], TritonBackend()
    tables = tuple(randn(size, shape.width, device=DEVICE) for size in (shape.vocab, 1024))
    tokens = torch.randint(shape.vocab, (batch, nodes), dtype=torch.int32, device=DEVICE)
    positions = torch.randint(1024, (batch, nodes), dtype=torch.int32, device=DEVICE)

    def plain() -> torch.Tensor:
        return add(*tables, tokens, positions)

    compiled = torch.compile(add, dynamic=False)

    def check() -> float:
        got = ops.embed(*tables, tokens, positions)
        wanted = tables[0][tokens.long()].float() + tables[1][positions.long()].float()
        return exact((torch.equal(got.view(wanted.shape), wanted.to(got.dtype)), True))

    peers = {"torch eager": again(plain), "torch.compile": again(lambda: compiled(*tables, tokens, positions))}
    moved = 3 * batch * nodes * shape.width * 2
    where = {"B": batch, "N": nodes}
    ours = again(lambda: ops.embed(*tables, tokens, positions))
    return Case("embed", model, where, moved, SMALL, ours, peers, check)


def add(token_table, position_table, tokens, positions):
    return token_table[tokens] + position_table[positions]
