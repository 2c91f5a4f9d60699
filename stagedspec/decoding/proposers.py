"""What proposes the trees: the draft cascade, or the sequence's own repeats.

In the cascade the draft grows token trees pass by pass, and draft² guesses ahead of it.

Draft² is speculative decoding of the draft in tree form: it puts the nodes that the draft will probably want next
into the same pass, so that several levels grow at once. Which tree is best does not depend on it.
"""

import time
from collections.abc import Callable

from stagedspec.decoding.stats import Clock
from stagedspec.kernels.backends.interface import Backend
from stagedspec.models.gpt2 import GPT2, Cache, Reader
from stagedspec.models.ngram import KatzTable
from stagedspec.planning.adapt import WAITS, Controller
from stagedspec.planning.tree import TreeConfig


class Cascade:
    """Grows the trees of a batch with one draft model and its n-grams; owns the draft's cache.

    sequences: the committed tokens, of the backend's `Sequences`; noise: its `Noise`, or None when greedy.
    controller: chooses every step's tree, at most as large as config; None: every step's is config.
    timer: the seconds that the controller goes by.
    """

    timer = staticmethod(time.perf_counter)

    def __init__(
        self,
        draft: GPT2,
        table: KatzTable | None,
        config: TreeConfig,
        sequences,
        warping: dict | None,
        noise,
        clock: Clock,
        controller: Controller | None = None,
        repeated: Callable[[Callable], Callable] | None = None,
    ):
        self.draft, self.table, self.config, self.sequences = draft, table, config, sequences
        self.warping, self.noise, self.clock, self.controller = warping, noise, clock, controller
        self.passes = 0  # of the last step
        trees = [config] if controller is None else [rung.tree for rung in controller.ladder]
        rows = max([tree.slots for tree in trees] + ([] if controller is None else [max(WAITS)]))
        self.cache = Cache(draft, len(sequences.rows), rows, sequences.capacity)
        self._growths: dict[TreeConfig, object] = {}
        self.reader = Reader(draft, self.cache, sequences, repeated)

    def prefill(self, lengths: list[int]) -> None:
        """Reads the prompts, but for the last two tokens, with which every step's first draft pass starts; or leaves
        that for later where the controller expects little of it."""
        if self.controller is None:
            self.reader.read(max(lengths) - 2)
            return
        left = max(row.limit - len(row.tokens) for row in self.sequences.rows)
        if self.controller.begin(max(lengths), left):
            last = max((count for count in WAITS if count <= min(lengths) - 2), default=0)
            self._read_all(lengths, last, None)  # a prompt was not chosen under any noise

    def _read_all(self, lengths: list[int], last: int, noise) -> None:
        """The draft reads all tokens of all rows but two; the controller hears of the last ones of these."""
        self.reader.read(max(lengths) - 2 - last)
        if last:
            self._read(last, noise)
        else:
            self.controller.read([])

    def _growth(self, config: TreeConfig):
        """The backend's `Growth` of a tree's settings, ready for a step."""
        if config not in self._growths:
            ops, dtype = self.draft.ops, self.draft.kv_dtype
            self._growths[config] = ops.make_growth(self.sequences, config, self.table, self.noise, dtype)
        growth = self._growths[config]
        growth.begin()
        return growth

    def propose(self):
        """Grows this step's trees for as many draft passes as pay; returns the backend's `Trees`."""
        draft, cache, clock, controller = self.draft, self.cache, self.clock, self.controller
        self.passes = 0
        if controller is not None:
            if controller.due:
                with clock("draft"):
                    self._catch_up()
            self.config = controller.rung.tree
            self._begin = self.timer()
        config, before = self.config, self.passes
        if not config.passes:
            self._seen = draft.ops.root_trees(self.sequences), 0
            return self._seen[0]
        first, children = cache.tree_rows - config.slots, min(config.children, draft.vocab_size)
        with clock("grow"):
            growth = self._growth(config)
        for number in range(config.passes):
            if number and not growth.pays():
                break
            self.passes += 1
            with clock("grow"):
                chosen = growth.select(number)
            if config.prefetch:
                with clock("ngram"):
                    growth.prefetch(chosen)
            with clock("grow"):
                batch = growth.batch()
            with clock("draft"):
                hidden = draft.forward(batch, cache, first + growth.start, first)
                noise = None if self.noise is None else self.noise.at(batch)
                proposed = draft.children(hidden, children, self.warping, noise)
            with clock("grow"):
                growth.record(*proposed)
        with clock("grow"):
            trees = growth.harvest()
        self._seen = trees, self.passes - before
        return trees

    def commit(self, moves) -> None:
        """Moves the accepted nodes' KV into the prefix (`Moves.draft_rows`), and tells the controller."""
        if self.config.passes:
            self.cache.commit(self.draft, moves.draft_rows(self.cache.tree_rows - self.config.slots))
        if self.controller is not None:
            trees, passes = self._seen
            rows = zip(self.sequences.rows, moves.lengths, strict=True)
            left = [row.limit - length for row, length in rows]
            seconds = self.timer() - self._begin
            self.controller.step(trees.nodes, passes, moves.accepted, trees.depths, left, seconds)

    def _catch_up(self) -> None:
        """The draft reads what was written without it, and before that the prompts if it has not read them."""
        controller, most = self.controller, max(WAITS)
        if controller.unread or controller.missed > most:
            lengths = self.sequences.lengths
            self._read_all(lengths, max(0, min(controller.missed, most, min(lengths) - 2)), self.noise)
        else:
            self._read(controller.missed, self.noise)

    def _read(self, count: int, noise) -> None:
        """The draft reads `count` tokens that were written without it, and the controller hears what it thinks of them.

        All running rows lack the same number of tokens: plain decoding gives each one a step.
        """
        draft, children = self.draft, max(rung.tree.children for rung in self.controller.ladder)
        unread = draft.ops.unread_pass(self.sequences, count, self.cache.tree_rows, draft.kv_dtype)
        hidden = draft.forward(unread.batch, self.cache, 0)
        at = None if noise is None else noise.at(unread.batch)
        tokens, logprobs = draft.children(hidden, min(children, draft.vocab_size), self.warping, at)
        self.passes += 1
        hits = tokens == unread.following[..., None]
        ranks = (hits.int().argmax(-1) + 1) * hits.any(-1) - 1
        values = logprobs.gather(-1, ranks.clamp(min=0)[..., None])[..., 0]
        # Slots that stand for no token have nothing to say.
        self.controller.read(
            [
                list(zip(row, scores, strict=True))[count - len(moves) :]
                for row, scores, moves in zip(ranks.tolist(), values.tolist(), unread.moves, strict=True)
            ]
        )
        self.cache.commit(draft, unread.moves)


class Repeats:
    """Proposes chains by the context n-gram alone (prompt lookup): no draft, no passes, nothing to keep."""

    passes, controller = 0, None

    def __init__(self, ops: Backend, depth: int, sequences, clock: Clock):
        self.ops, self.depth, self.sequences, self.clock = ops, depth, sequences, clock

    def prefill(self, lengths: list[int]) -> None:
        """There is nothing to fill."""

    def propose(self):
        """This step's chains, as the backend's `Trees`."""
        with self.clock("ngram"):
            return self.ops.lookup_trees(self.sequences, self.depth)

    def commit(self, moves) -> None:
        """There is nothing to move."""
