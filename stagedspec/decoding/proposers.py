"""Proposers of token trees: the draft cascade, and prompt look-up.

In the cascade the draft grows token trees pass by pass, and draft² (n-grams) guesses ahead of it (Spector & Ré, section
3.2). Draft² is speculative decoding of the draft in tree form: it adds the nodes that the draft will probably want next
to the same pass, so that several levels grow at once. The best tree does not depend on it.
"""

import time
from collections.abc import Callable
from typing import Protocol, cast

from stagedspec.decoding.stats import Clock
from stagedspec.kernels.backends.interface import (
    AdaptiveBackend,
    AdaptiveMoves,
    AdaptiveTrees,
    Backend,
    Growth,
    Moves,
    Noise,
    Sequences,
    Trees,
)
from stagedspec.models.gpt2 import GPT2, Cache, Reader
from stagedspec.models.model_set import Models
from stagedspec.planning.adapt import WAITS, Controller
from stagedspec.planning.tree import TreeConfig


class Proposer(Protocol):
    """What proposes the trees of a generation's steps.

    passes: of the draft, in the last step. controller: chooses the tree of every step; None where trees do not adapt.
    """

    @property
    def passes(self) -> int: ...

    @property
    def controller(self) -> Controller | None: ...

    @property
    def caches(self) -> list[Cache]:
        """The KV caches that it fills."""

    @property
    def readers(self) -> list[tuple[Reader, int]]:
        """What reads the prompts into them, and how many of the last tokens it leaves out."""

    def prefill(self, lengths: list[int]) -> None:
        """Reads the prompts. lengths: of each row's."""

    def propose(self) -> Trees:
        """The trees of this step."""

    def commit(self, moves: Moves) -> None:
        """Takes note of what the step accepted."""


class DraftCascade:
    """Grows the trees of a batch with a draft model and its n-grams; owns the draft's KV cache.

    config: the largest tree. sequences, noise: the generation's state, of the backend; noise is None when greedy.
    controller: chooses the tree of every step; None: every step has `config`. timer: the controller's clock, seconds.
    """

    timer = staticmethod(time.perf_counter)

    def __init__(
        self,
        models: Models,
        config: TreeConfig,
        sequences: Sequences,
        warping: dict | None,
        noise: Noise | None,
        clock: Clock,
        controller: Controller | None = None,
        repeated: Callable[[Callable], Callable] | None = None,
    ):
        self.draft = draft = cast(GPT2, models.draft)
        self.table, self.config, self.sequences = models.ngram, config, sequences
        self.warping, self.noise, self.clock, self.controller = warping, noise, clock, controller
        self.passes = 0  # of the last step
        self._seen: tuple[Trees | None, int] = None, 0  # trees and draft passes of the last step
        trees = [config] if controller is None else [level.tree for level in controller.levels]
        rows = max([tree.slots for tree in trees] + ([] if controller is None else [max(WAITS)]))
        self.cache = Cache(draft, len(sequences.rows), rows, sequences.capacity)
        make, noise, dtype = draft.ops.make_growth, self.noise, draft.kv_dtype
        # Made here, since the first one may compile: a step must not take so long.
        self._growths: dict[TreeConfig, Growth] = {
            tree: make(sequences, tree, self.table, noise, dtype) for tree in trees if tree.passes
        }
        self.reader = Reader(draft, self.cache, sequences, repeated)
        self.caches, self.readers = [self.cache], [(self.reader, 2)]

    def prefill(self, lengths: list[int]) -> None:
        """Reads the prompts without the last two tokens, which every step's first draft pass reads; or postpones that
        where the controller expects little of drafting."""
        if self.controller is None:
            self.reader.read(max(lengths) - 2)
            return
        left = max(row.limit - len(row.tokens) for row in self.sequences.rows)
        if self.controller.begin(max(lengths), left):
            last = max((count for count in WAITS if count <= min(lengths) - 2), default=0)
            self._read_all(lengths, last, None)  # a prompt was chosen under no noise

    def _read_all(self, lengths: list[int], last: int, noise: Noise | None) -> None:
        """Reads all tokens of all rows but two, and shows the controller the `last` ones of them."""
        self.reader.read(max(lengths) - 2 - last)
        if last:
            self._read(last, noise)
        else:
            cast(Controller, self.controller).read([])

    def propose(self) -> Trees:
        """Grows the trees of this step, in as many draft passes as are worth their time."""
        draft, cache, clock, controller = self.draft, self.cache, self.clock, self.controller
        self.passes = 0
        if controller is not None:
            if controller.due:
                with clock("draft"):
                    self._catch_up()
            self.config = controller.level.tree
            self._begin = self.timer()
        config, before = self.config, self.passes
        if not config.passes:
            roots = draft.ops.root_trees(self.sequences)
            self._seen = roots, 0
            return roots
        first, children = cache.tree_rows - config.slots, min(config.children, draft.vocab_size)
        with clock("grow"):
            growth = self._growths[config]
            growth.begin()
        for number in range(config.passes):
            if number and not growth.pays():
                break
            self.passes += 1
            with clock("grow"):
                batch = growth.batch(number)
            with clock("draft"):
                noise = None if self.noise is None else self.noise.at(batch)
                write = first + growth.start
                proposed = draft.children(batch, cache, write, first, children, self.warping, noise)
            with clock("grow"):
                growth.record(*proposed)
        with clock("grow"):
            trees = growth.harvest()
        self._seen = trees, self.passes - before
        return trees

    def commit(self, moves: Moves) -> None:
        """Moves the accepted nodes' KV into the prefix (`Moves.draft_rows`), and informs the controller."""
        if self.config.passes:
            self.cache.commit(self.draft, moves.draft_rows(self.cache.tree_rows - self.config.slots))
        if self.controller is not None:
            trees, passes = cast(AdaptiveTrees, self._seen[0]), self._seen[1]
            moves = cast(AdaptiveMoves, moves)
            rows = zip(self.sequences.rows, moves.lengths, strict=True)
            left = [row.limit - length for row, length in rows]
            seconds = self.timer() - self._begin
            self.controller.step(trees.nodes, passes, moves.accepted, trees.depths, left, seconds)

    def _catch_up(self) -> None:
        """Reads tokens that were written without the draft, and before them the prompts if it has not read those."""
        controller, most = cast(Controller, self.controller), max(WAITS)
        if controller.unread or controller.missed > most:
            lengths = self.sequences.lengths
            self._read_all(lengths, max(0, min(controller.missed, most, min(lengths) - 2)), self.noise)
        else:
            self._read(controller.missed, self.noise)

    def _read(self, count: int, noise: Noise | None) -> None:
        """Reads `count` tokens that were written without the draft, and shows the controller how the draft ranks them.

        All running rows lack the same number of tokens: plain decoding gives each one token a step.
        """
        controller, draft = cast(Controller, self.controller), self.draft
        children = max(level.tree.children for level in controller.levels)
        unread = cast(AdaptiveBackend, draft.ops).unread_pass(
            self.sequences, count, self.cache.tree_rows, draft.kv_dtype
        )
        at, count_of = None if noise is None else noise.at(unread.batch), min(children, draft.vocab_size)
        tokens, logprobs = draft.children(unread.batch, self.cache, 0, 0, count_of, self.warping, at)
        self.passes += 1
        hits = tokens == unread.following[..., None]
        ranks = (hits.int().argmax(-1) + 1) * hits.any(-1) - 1
        values = logprobs.gather(-1, ranks.clamp(min=0)[..., None])[..., 0]
        # Rows with fewer tokens begin with slots that stand for none.
        controller.read(
            [
                list(zip(row, scores, strict=True))[count - len(moves) :]
                for row, scores, moves in zip(ranks.tolist(), values.tolist(), unread.moves, strict=True)
            ]
        )
        self.cache.commit(draft, unread.moves)


class PromptLookup:
    """Proposes chains by the context n-gram alone: continuations of earlier occurrences of the last tokens."""

    passes, controller = 0, None  # no draft

    def __init__(self, ops: Backend, depth: int, sequences: Sequences, clock: Clock):
        self.caches: list[Cache] = []
        self.readers: list[tuple[Reader, int]] = []
        self.ops, self.depth, self.sequences, self.clock = ops, depth, sequences, clock

    def prefill(self, lengths: list[int]) -> None:
        """There is nothing to fill."""

    def propose(self) -> Trees:
        """The chains of this step."""
        with self.clock("ngram"):
            return self.ops.lookup_trees(self.sequences, self.depth)

    def commit(self, moves: Moves) -> None:
        """There is nothing to move."""
