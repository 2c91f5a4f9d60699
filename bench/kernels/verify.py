"""The walk down the trees and what it commits, for a target that follows one path of each tree to its end."""

from collections.abc import Iterator

from grow import on_host
from harness import SMALL, Case, again, exact
from models import DEVICE, MODELS, Choice

from stagedspec.tuning.workloads import TreeWorkload, katz_table

ROOM = 16384  # tokens, so that no sequence ends while it is measured


def cases(choice: Choice) -> Iterator[Case]:
    for batch, nodes in choice.all("batch", "nodes"):
        yield _case(batch, nodes)


def _case(batch: int, nodes: int) -> Case:
    growing = TreeWorkload(nodes, 512, batch, katz_table(MODELS["L"].vocab, DEVICE), DEVICE, room=ROOM)
    trees = growing.passes()
    chosen = growing.likely(trees)

    def ours() -> None:
        trees.verify_commit(chosen)

    def check() -> float:
        host = on_host(growing)
        wanted, got = host.verify_commit(chosen.cpu()[:, : host.nodes]), trees.verify_commit(chosen)
        rows, positions = got.target_rows().tolist()
        moves = [
            [pair for pair in zip(row, where, strict=True) if pair[0] >= 0]
            for row, where in zip(rows, positions, strict=True)
        ]
        return exact((got.accepted.tolist(), wanted.accepted), (moves, wanted.target_rows(0)))

    return Case("verify_commit", "L", {"B": batch, "N": nodes}, 0, SMALL, again(ours), {}, check)
