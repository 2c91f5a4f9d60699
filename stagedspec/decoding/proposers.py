"""Proposers of token trees: the draft cascade, and prompt look-up.

In the cascade the draft grows token trees pass by pass, and draft² (n-grams) guesses ahead of it (Spector & Ré, section
3.2). Draft² is speculative decoding of the draft in tree form: it adds the nodes that the draft will probably want next
to the same pass, so that several levels grow at once. The best tree does not depend on it.

Where trees adapt, a `Controller` chooses the tree of every step. What is launched for a tree never changes, so each
tree can be a CUDA graph. The host then learns what a step did after it has launched the next one: results wait in a
queue, and are told to the controller in order, as soon as the device has made them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch

from stagedspec.decoding.stats import Clock
from stagedspec.kernels.backends.interface import (
    AdaptiveBackend,
    Backend,
    Growth,
    Moves,
    Noise,
    Report,
    Sequences,
    Trees,
    Unread,
)
from stagedspec.kernels.common.host_copy import to_host
from stagedspec.kernels.common.timing import Stopwatch
from stagedspec.models.gpt2 import GPT2, Cache, Reader
from stagedspec.models.model_set import Models
from stagedspec.planning.adapt import WAITS, Controller
from stagedspec.planning.tree import TreeConfig

NOT_COUNTED = -2  # in place of a rank


class Step(NamedTuple):
    """What a step was made of: the draft's passes, the trees, and what was accepted. A captured step always returns the
    same objects, whose tensors the next step with that tree overwrites."""

    passes: int
    trees: Trees
    moves: Moves


class Proposer(Protocol):
    """What proposes the trees of a generation's steps.

    `begin_step` and `end_step` are the host's part, around what may be captured: `propose` and `commit`, whose launches
    the tree decides. controller: chooses the tree of every step; None where trees do not adapt.
    """

    @property
    def controller(self) -> Controller | None: ...

    @property
    def caches(self) -> list[Cache]:
        """The KV caches that it fills."""

    @property
    def readers(self) -> list[tuple[Reader, int]]:
        """What reads the prompts into them, and how many of the last tokens it leaves out."""

    def restart(self, controller: Controller | None) -> None:
        """Begins a generation."""

    def prefill(self, lengths: list[int], new_tokens: int) -> None:
        """Reads the prompts. lengths: of each row's; new_tokens: that a row may gain."""

    def replace(self, index: int, prompt: list[int]) -> None:
        """Reads the prompt of a row that has begun anew."""

    def remove(self) -> None:
        """Goes on with fewer rows: `sequences`, noise and caches have changed."""

    def readings(self) -> Iterator[tuple[Callable, tuple]]:
        """Passes that `begin_step` may make, (pass, arguments), for `Backend.prepare`."""

    def begin_step(self) -> tuple[TreeConfig, int]:
        """The tree of the next step, and how many draft passes were made to read what the draft had missed."""

    def propose(self, config: TreeConfig) -> tuple[Trees, int]:
        """The trees of a step with these settings, and the draft passes that they took."""

    def commit(self, config: TreeConfig, moves: Moves) -> None:
        """Moves what the step accepted into the prefix of the caches."""

    def end_step(self, step: Step) -> None:
        """Takes note of what the step did."""

    def learn(self) -> None:
        """Tells the controller those results that have reached the host."""


class _Made(NamedTuple):
    """A step under way. made: of `Controller.launch`; timed: whether its time says anything."""

    watch: Stopwatch
    made: int
    nodes: int
    passes: int
    report: Report
    timed: bool

    def tell(self, controller: Controller) -> None:
        report, seconds = self.report, self.watch.seconds if self.timed else None
        controller.step(self.made, self.nodes, self.passes, report.accepted, report.depths, report.left, seconds)


class _Reading(NamedTuple):
    """A reading under way. shown [2, B, N]: of each token its rank among the draft's children, -1 for none and
    NOT_COUNTED for tokens that do not count, and its log-probability. tokens: of each row. timed: as of `_Made`."""

    watch: Stopwatch
    shown: torch.Tensor
    tokens: int
    timed: bool

    def tell(self, controller: Controller) -> None:
        rows = zip(*self.shown.tolist(), strict=True)
        controller.read(
            [
                [(int(rank), score) for rank, score in zip(ranks, scores, strict=True) if rank != NOT_COUNTED]
                for ranks, scores in rows
            ],
            self.tokens,
            self.watch.seconds if self.timed else None,
        )


class DraftCascade:
    """Grows the trees of a batch with a draft model and its n-grams; owns the draft's KV cache.

    trees: that steps may have, the largest last. sequences, noise: the generation's state, of the backend; noise is
    None when greedy. repeated: the backend's `Backend.repeated`, which prepares a pass for many calls, or None.
    """

    def __init__(
        self,
        models: Models,
        trees: Sequence[TreeConfig],
        sequences: Sequences,
        warping: dict | None,
        noise: Noise | None,
        clock: Clock,
        repeated: Callable[[Callable], Callable] | None = None,
    ):
        self.draft = draft = cast(GPT2, models.draft)
        self.ngram = models.ngram
        self.trees, self.sequences = trees, sequences
        self.warping, self.noise, self.clock = warping, noise, clock
        self.controller: Controller | None = None
        adapts = len(trees) > 1
        rows = max([tree.slots for tree in trees] + [max(WAITS)] * adapts)
        self.cache = Cache(draft, len(sequences.rows), rows, sequences.capacity)
        # Made here, since the first one may compile: a step must not take so long.
        self._growths = self._make_growths()
        self.reader = Reader(draft, self.cache, sequences, repeated)
        self.caches, self.readers = [self.cache], [(self.reader, 2)]
        # Passes over what the draft has missed. A prompt was chosen under no noise.
        self._reads: dict[Noise | None, Callable] = {}
        if adapts:
            count = min(max(tree.children for tree in trees), draft.vocab_size)
            for kind in {None, noise}:
                rank = partial(rank_unread, draft, self.cache, count, warping, kind)
                self._reads[kind] = rank if repeated is None else repeated(rank)
        self._used: set[int] = set()  # levels whose graphs exist
        self._read_before: set[Noise | None] = set()  # kinds of readings whose graphs exist
        self._under_way: deque[_Made | _Reading] = deque()

    def restart(self, controller: Controller | None) -> None:
        """controller: chooses the tree of every step; None: every step has the largest."""
        self.controller = controller
        self._under_way.clear()

    def prefill(self, lengths: list[int], new_tokens: int) -> None:
        """Reads the prompts without the last two tokens, which every step's first draft pass reads; or postpones that
        where the controller expects little of drafting. The controller sees how the draft ranks the last of them."""
        if self.controller is None:
            self.reader.read(max(lengths) - 2)
        elif self.controller.begin(max(lengths), new_tokens):
            last = max((count for count in WAITS if count <= min(lengths) - 2), default=0)
            self.reader.read(max(lengths) - 2 - last)
            if last:
                self._read(last, None)

    def replace(self, index: int, prompt: list[int]) -> None:
        """Reads the prompt, unless all rows will be read as a whole (`_catch_up`) before the draft proposes again."""
        controller = self.controller
        if controller is None or not (controller.unread or controller.missed > max(WAITS)):
            self.reader.read_row(index, prompt[:-2])
        else:
            controller.missed = min(controller.missed, self.sequences.longest)
            if controller.unread:
                controller.unread = max(controller.unread, len(prompt))

    def remove(self) -> None:
        self._growths = self._make_growths()

    def _make_growths(self) -> dict[TreeConfig, Growth]:
        draft, made = self.draft, (self.ngram, self.noise, self.draft.kv_dtype)
        return {tree: draft.ops.make_growth(self.sequences, tree, *made) for tree in self.trees if tree.passes}

    def readings(self) -> Iterator[tuple[Callable, tuple]]:
        for read in self._reads.values():
            yield read, (self._unread(0),)

    def begin_step(self) -> tuple[TreeConfig, int]:
        """The tree that the controller chooses, after the draft has read what it has missed where that is due."""
        controller, reads = self.controller, 0
        if controller is None:
            return self.trees[-1], 0
        self.learn()
        if controller.due:
            with self.clock("draft"):
                reads = self._catch_up()
            self.learn()
        self._level = controller.launch()
        self._watch = Stopwatch(self.draft.device)
        self._watch.start()
        return controller.levels[self._level].tree, reads

    def end_step(self, step: Step) -> None:
        """Queues the results of the step for the controller, and tells those that are known."""
        if self.controller is None:
            return
        ops = cast(AdaptiveBackend, self.draft.ops)
        report = ops.report(step.trees, step.moves)
        self._watch.stop()
        # The first step with a tree captures its graphs.
        timed = not ops.compiles_kernels or self._level in self._used
        self._used.add(self._level)
        self._under_way.append(_Made(self._watch, self._level, step.trees.nodes, step.passes, report, timed))
        self.learn()

    def learn(self) -> None:
        while self._under_way and self._under_way[0].watch.done:
            self._under_way.popleft().tell(cast(Controller, self.controller))

    def propose(self, config: TreeConfig) -> tuple[Trees, int]:
        """Grows the trees of a step, in as many draft passes as are worth their time."""
        draft, cache, clock = self.draft, self.cache, self.clock
        if not config.passes:
            return draft.ops.root_trees(self.sequences), 0
        first, children, passes = cache.tree_rows - config.slots, min(config.children, draft.vocab_size), 0
        with clock("grow"):
            growth = self._growths[config]
            growth.begin()
        for number in range(config.passes):
            if number and not growth.pays():
                break
            passes += 1
            with clock("grow"):
                batch = growth.batch(number)
            with clock("draft"):
                noise = None if self.noise is None else self.noise.at(batch)
                write = first + growth.start
                proposed = draft.children(batch, cache, write, first, children, self.warping, noise)
            with clock("grow"):
                growth.record(*proposed)
        with clock("grow"):
            return growth.harvest(), passes

    def commit(self, config: TreeConfig, moves: Moves) -> None:
        """Moves the accepted nodes' KV into the prefix (`Moves.draft_rows`)."""
        if config.passes:
            self.cache.commit(self.draft, moves.draft_rows(self.cache.tree_rows - config.slots))

    def _catch_up(self) -> int:
        """Reads tokens that were written without the draft, and before them all others if it has not read those, or has
        missed too many. Returns the number of passes that the controller learns of."""
        controller, most = cast(Controller, self.controller), max(WAITS)
        count, whole = min(controller.missed, most), controller.unread or controller.missed > most
        # Plain steps write one token each. What drafted steps wrote before, the host may not know yet.
        written = self.sequences.longest
        if controller.unread:
            written = min(written, controller.unread + controller.missed)
        controller.catch_up()
        if whole:
            self.reader.read(written - 2 - count)
        if not count:
            return 0
        self._read(count, self.noise)
        return 1

    def _read(self, count: int, noise: Noise | None) -> None:
        """Reads `count` tokens that were written without the draft, for the controller to see how the draft ranks them.

        All running rows lack the same number of tokens: plain decoding gives each one token a step.
        """
        if noise is not None:
            noise.advance(self.sequences)
        unread, watch = self._unread(count), Stopwatch(self.draft.device)
        watch.start()
        tokens, logprobs = self._reads[noise](unread)
        if unread.moves is not None:
            self.cache.commit(self.draft, unread.moves)
        hits = tokens == unread.following[..., None]
        ranks = (hits.int().argmax(-1) + 1) * hits.any(-1) - 1
        scores = logprobs.gather(-1, ranks.clamp(min=0)[..., None])[..., 0]
        ranks = torch.where(unread.counted, ranks, NOT_COUNTED)
        shown = to_host(torch.stack((ranks.to(scores.dtype), scores)))
        watch.stop()
        # The first of its kind compiles or captures.
        timed = noise in self._read_before
        self._read_before.add(noise)
        self._under_way.append(_Reading(watch, shown, count, timed))

    def _unread(self, count: int) -> Unread:
        ops, draft = cast(AdaptiveBackend, self.draft.ops), self.draft
        return ops.unread_pass(self.sequences, count, self.cache.tree_rows, draft.kv_dtype)


def rank_unread(
    draft: GPT2, cache: Cache, children: int, warping: dict | None, noise: Noise | None, unread: Unread
) -> tuple[torch.Tensor, torch.Tensor]:
    """The draft's pass over unread tokens: the likeliest children of each and their log-probabilities, [B, N, C].

    No method of the cascade: a cycle of references would keep the cache until Python collects garbage.
    """
    at = None if noise is None else noise.at(unread.batch)
    return draft.children(unread.batch, cache, unread.write, unread.first, children, warping, at)


class PromptLookup:
    """Proposes chains by the context n-gram alone: continuations of earlier occurrences of the last tokens."""

    controller = None

    def __init__(self, ops: Backend, tree: TreeConfig, sequences: Sequences, clock: Clock):
        self.caches: list[Cache] = []
        self.readers: list[tuple[Reader, int]] = []
        self.ops, self.tree, self.sequences, self.clock = ops, tree, sequences, clock

    def restart(self, controller: Controller | None) -> None:
        """There is nothing to choose."""

    def prefill(self, lengths: list[int], new_tokens: int) -> None:
        """There is nothing to fill."""

    def replace(self, index: int, prompt: list[int]) -> None:
        """There is nothing to fill."""

    def remove(self) -> None:
        """There is nothing that depends on the number of rows."""

    def readings(self) -> Iterator[tuple[Callable, tuple]]:
        return iter(())

    def begin_step(self) -> tuple[TreeConfig, int]:
        return self.tree, 0

    def propose(self, config: TreeConfig) -> tuple[Trees, int]:
        """The chains of this step."""
        with self.clock("ngram"):
            return self.ops.lookup_trees(self.sequences, config.depth), 0

    def commit(self, config: TreeConfig, moves: Moves) -> None:
        """There is nothing to move."""

    def end_step(self, step: Step) -> None:
        """There is nothing to note."""

    def learn(self) -> None:
        """There is nobody to tell."""
