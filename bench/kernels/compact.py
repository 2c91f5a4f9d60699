"""KV compaction: the accepted rows of all layers moved into the prefix."""

from collections.abc import Iterator

import torch
from harness import SMALL, Case, again, exact
from models import DEVICE, MODELS, Choice

from stagedspec.kernels import reference
from stagedspec.tuning.workloads import CompactWorkload

PATH = 13  # rows of an accepted path of depth 12


def cases(choice: Choice) -> Iterator[Case]:
    for model, batch, nodes in choice.all("model", "batch", "nodes"):
        yield _case(model, batch, nodes, min(PATH, nodes))


def _case(model: str, batch: int, nodes: int, count: int) -> Case:
    shape = MODELS[model]
    moving = CompactWorkload(shape, batch, nodes, 512, count, DEVICE)
    cache, (sources, targets) = moving.cache, moving.moves
    flat = cache.flatten(1, 2).flatten(2)
    first = torch.arange(batch, device=DEVICE)[:, None] * cache.shape[2]
    source, target = (first + sources).flatten(), (first + nodes + targets).flatten()

    def plain() -> None:
        flat.index_copy_(1, target, flat.index_select(1, source))

    def check() -> float:
        wanted = cache.clone()
        reference.move_rows(wanted, nodes, moving.moves.permute(1, 2, 0).tolist())  # pairs of each sequence
        moving.compact()
        return exact((torch.equal(cache, wanted), True))

    moved = 2 * shape.layers * batch * count * 2 * shape.width * cache.element_size()
    where = {"B": batch, "N": nodes, "rows": count}
    return Case("compact", model, where, moved, SMALL, again(moving.compact), {"torch eager": again(plain)}, check)
