"""What proposes the trees: the draft cascade, or the sequence's own repeats.

In the cascade the draft grows token trees pass by pass, and draft² guesses ahead of it.

Draft² is speculative decoding of the draft in tree form: it puts the nodes that the draft will probably want next
into the same pass, so that several levels grow at once. Which tree is best does not depend on it.
"""

from types import ModuleType

from stagedspec.gpt2 import GPT2, Cache
from stagedspec.ngram import KatzTable
from stagedspec.stats import Clock
from stagedspec.tree import TreeConfig


class Cascade:
    """Grows the trees of a batch with one draft model and its n-grams; owns the draft's cache.

    sequences: the committed tokens, of the backend's `Sequences`; noise: its `Noise`, or None when greedy.
    """

    def __init__(
        self,
        draft: GPT2,
        table: KatzTable | None,
        config: TreeConfig,
        sequences,
        warping: dict | None,
        noise,
        clock: Clock,
    ):
        self.draft, self.config, self.sequences = draft, config, sequences
        self.warping, self.noise, self.clock = warping, noise, clock
        self.children = min(config.children, draft.vocab_size)
        self.growth = draft.ops.Growth(sequences, config, table, noise, draft.kv_dtype)
        self.passes = 0  # of the last step
        self.cache = Cache(draft, len(sequences.rows), config.slots, max(row.limit for row in sequences.rows))

    def prefill(self, prompts: list[list[int]]) -> None:
        """Fills the draft's cache with all but the last two tokens, which every step's first pass starts with."""
        self.draft.prefill(prompts, 2, self.cache)

    def propose(self):
        """Grows this step's trees for as many draft passes as pay; returns the backend's `Trees`."""
        draft, cache, clock = self.draft, self.cache, self.clock
        growth, self.passes = self.growth, 0
        with clock("grow"):
            growth.begin()
        for number in range(self.config.passes):
            if number and not growth.pays():
                break
            self.passes += 1
            with clock("grow"):
                chosen = growth.select(number)
            if self.config.prefetch:
                with clock("ngram"):
                    growth.prefetch(chosen)
            with clock("grow"):
                batch = growth.batch()
            with clock("draft"):
                hidden = draft.forward(batch, cache, growth.start)
                noise = None if self.noise is None else self.noise.at(batch)
                proposed = draft.children(hidden, self.children, self.warping, noise)
            with clock("grow"):
                growth.record(*proposed)
        with clock("grow"):
            return growth.harvest()

    def commit(self, moves) -> None:
        """Moves the accepted nodes' KV into the prefix (`Moves.draft_rows`)."""
        self.cache.commit(self.draft, moves.draft_rows())


class Repeats:
    """Proposes chains by the context n-gram alone (prompt lookup): no draft, no passes, nothing to keep."""

    passes = 0

    def __init__(self, ops: ModuleType, depth: int, sequences, clock: Clock):
        self.ops, self.depth, self.sequences, self.clock = ops, depth, sequences, clock

    def prefill(self, prompts: list[list[int]]) -> None:
        """There is nothing to fill."""

    def propose(self):
        """This step's chains, as the backend's `Trees`."""
        with self.clock("ngram"):
            return self.ops.Trees.repeats(self.sequences, self.depth)

    def commit(self, moves) -> None:
        """There is nothing to move."""
