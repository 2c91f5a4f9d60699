"""One step of decoding: propose token trees, verify them in one pass of the target, commit what was accepted."""

from collections.abc import Callable, Iterator
from typing import TypeAlias, cast

import torch

from stagedspec.decoding.proposers import DraftCascade, PromptLookup, Proposer, Step
from stagedspec.decoding.request import Request, RequestRow
from stagedspec.decoding.stats import Clock
from stagedspec.kernels.backends.interface import (
    Backend,
    Noise,
    NoiseAt,
    ReplaceableNoise,
    ReplaceableSequences,
    ReusableNoise,
    ReusableSequences,
    Sequences,
    Trees,
)
from stagedspec.models.gpt2 import Cache, Reader
from stagedspec.models.model_set import Models
from stagedspec.planning.adapt import WAITS, Controller
from stagedspec.planning.tree import TreeConfig

# `Callbacks.choose_with_processors`: trees, logits, warping and noise to the token chosen at each node.
Chooser: TypeAlias = Callable[[Backend, Trees, torch.Tensor, dict | None, NoiseAt | None], torch.Tensor]


class Engine:
    """The state of a generation and the step that advances it.

    request: what to generate. host_chooses: tokens are chosen on the host (`Callbacks.choose_with_processors`), so the
    target's pass ends with logits. repeated: the backend's `repeated`, which prepares a pass for many calls, or None.
    trees: that steps may have, the largest last. With a backend that `keeps_generations` the same tensors serve one
    generation after the other.
    """

    def __init__(
        self,
        models: Models,
        request: Request,
        host_chooses: bool,
        clock: Clock,
        repeated: Callable[[Callable], Callable] | None = None,
    ):
        target, tree = models.target, request.tree
        ops, prompts = target.ops, request.prompts
        self.models, self.target, self.warping = models, target, request.sampling.warping
        self.host_chooses, self.clock = host_chooses, clock
        self.trees = request.trees
        # `ReusableSequences` and `ReusableNoise` with a backend that `keeps_generations`.
        self.sequences: Sequences = ops.make_sequences(
            prompts, request.new_tokens, request.eos, target.device, most=tree.depth + 1
        )
        self.cache = Cache(target, len(prompts), tree.nodes, self.sequences.capacity)
        self.noise: Noise | None = None
        if request.sampling.do_sample:
            self.noise = ops.make_noise(
                request.seeds,
                request.streams,
                target.vocab_size,
                min(tree.depth, tree.nodes - 1) + 1,
                [row.limit for row in self.sequences.rows],
                target.device,
                past=max(WAITS) + 1 if request.levels else 0,
            )
        self.reader = Reader(target, self.cache, self.sequences, repeated)
        self.proposer: Proposer | None = None  # none in plain decoding
        if request.prompt_lookup:
            self.proposer = PromptLookup(ops, tree, self.sequences, clock)
        elif tree.passes:
            self.proposer = DraftCascade(models, self.trees, self.sequences, self.warping, self.noise, clock, repeated)

    @torch.inference_mode()  # the tensors may have been made in it
    def restart(self, request: Request) -> None:
        """Resets all state in place for another request of the same shapes."""
        cast(ReusableSequences, self.sequences).restart(request.prompts, request.new_tokens, request.eos)
        if self.noise is not None:
            cast(ReusableNoise, self.noise).restart(request.seeds, request.streams)

    def replace(self, index: int, row: RequestRow) -> None:
        """Begins a row that has ended anew, with another prompt: resets its state and fills its part of the caches.
        Only where the backend `replaces_rows`."""
        cast(ReplaceableSequences, self.sequences).replace(index, row.prompt, row.new_tokens)
        if self.noise is not None:
            noise, start = cast(ReplaceableNoise, self.noise), len(row.prompt)
            noise.replace(index, row.seed, row.stream, start, row.limit)
        self.reader.read_row(index, row.prompt[:-1])
        if self.proposer is not None:
            self.proposer.replace(index, row.prompt)

    def remove(self, index: int) -> None:
        """Leaves a row out of all further passes; the last row takes its index. Only where the backend
        `replaces_rows`."""
        sequences = cast(ReplaceableSequences, self.sequences)
        last = len(sequences.rows) - 1
        for cache in self.caches:
            cache.move_row(last, index, len(sequences.rows[last].tokens))
        sequences.remove(index)
        if self.noise is not None:
            cast(ReplaceableNoise, self.noise).remove(index)
        if self.proposer is not None:
            self.proposer.remove()

    def begin(self, controller: Controller | None) -> None:
        """Begins a generation. controller: chooses the tree of every step; None where each has the request's."""
        if self.proposer is not None:
            self.proposer.restart(controller)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(cache.rows.nbytes for cache in self.caches)

    @property
    def caches(self) -> list[Cache]:
        """The KV caches: the target's, and the draft's if there is one."""
        return [self.cache] if self.proposer is None else [self.cache, *self.proposer.caches]

    def prefill(self, request: Request) -> None:
        """Fills the caches with the prompts, without the last tokens, which the first step reads."""
        lengths = list(map(len, request.prompts))
        self.reader.read(max(lengths) - 1)
        if self.proposer is not None:
            self.proposer.prefill(lengths, max(request.new_tokens))

    def prefill_passes(self, prompts: list[list[int]] | None = None) -> Iterator[tuple[Callable, tuple]]:
        """The passes of `prefill`, (pass, arguments), for `Backend.prepare`. None: those of prompts of any length."""
        readers = [] if self.proposer is None else self.proposer.readers
        for reader, trailing in [(self.reader, 1), *readers]:
            if prompts is None:
                yield from reader.calls(cast(ReusableSequences, self.sequences).chunk_sizes)
            else:
                chunks = self.sequences.chunks(max(map(len, prompts)) - trailing)
                yield from reader.calls({size for _, size in chunks})

    def begin_step(self) -> tuple[TreeConfig, int]:
        """The host's part before a step: its tree, one of `trees`, and the draft passes that had to go before it."""
        return (self.trees[-1], 0) if self.proposer is None else self.proposer.begin_step()

    def end_step(self, step: Step) -> None:
        """The host's part after a step."""
        if self.proposer is not None:
            self.proposer.end_step(step)

    def step(
        self,
        tree: TreeConfig,
        choose: Chooser | None = None,
        propose: Callable[[TreeConfig], tuple[Trees, int]] | None = None,
        verify_forward: Callable[[Trees], tuple[torch.Tensor, NoiseAt | None]] | None = None,
    ) -> Step:
        """Makes one step with the tree of `begin_step`.

        choose: must be given where the host chooses. propose, verify_forward: captured versions
        of the methods of that name.
        """
        trees, passes = (propose or self.propose)(tree)
        chosen, noise = (verify_forward or self.verify_forward)(trees)
        if self.host_chooses:
            with self.clock("target"):
                chosen = cast(Chooser, choose)(self.target.ops, trees, chosen, self.warping, noise)
        with self.clock("verify"):
            moves = trees.verify_commit(chosen)
        with self.clock("commit"):
            self.cache.commit(self.target, moves.target_rows(self.cache.tree_rows - trees.nodes))
            if self.proposer is not None:
                self.proposer.commit(tree, moves)
        return Step(passes, trees, moves)

    def propose(self, tree: TreeConfig) -> tuple[Trees, int]:
        """The token trees of a step, and the draft passes that they took."""
        if self.noise is not None:
            with self.clock("noise"):
                self.noise.advance(self.sequences)
        if self.proposer is None:
            return self.target.ops.root_trees(self.sequences), 0
        return self.proposer.propose(tree)

    def verify_forward(self, trees: Trees) -> tuple[torch.Tensor, NoiseAt | None]:
        """The target's pass over all nodes: the token chosen at each, int [B, N], or, where the host chooses, logits
        fp32 [B, N, V]; and the noise at the nodes."""
        target = self.target
        with self.clock("verify"):
            batch = trees.batch(target.kv_dtype)
            noise = None if self.noise is None else self.noise.at(batch)
        with self.clock("target"):
            # The nodes lie right below the prefix, so that no unused rows are attended to.
            first = self.cache.tree_rows - trees.nodes
            if self.host_chooses:
                chosen = target.logits(target.forward(batch, self.cache, first, first))
            else:
                chosen = target.choose(batch, self.cache, first, first, self.warping, noise)
        return chosen, noise
