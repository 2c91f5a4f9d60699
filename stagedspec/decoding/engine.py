"""One step of decoding: propose token trees, verify them in one pass of the target, commit what was accepted."""

from collections.abc import Callable, Iterator
from typing import TypeAlias, cast

import torch

from stagedspec.decoding.proposers import DraftCascade, PromptLookup, Proposer
from stagedspec.decoding.request import Request
from stagedspec.decoding.stats import Clock
from stagedspec.kernels.backends.interface import (
    Backend,
    Noise,
    NoiseAt,
    ReusableNoise,
    ReusableSequences,
    Sequences,
    Trees,
)
from stagedspec.models.gpt2 import Cache, Reader
from stagedspec.models.model_set import Models
from stagedspec.planning.adapt import WAITS, Controller

# `Callbacks.choose_with_processors`: trees, logits, warping and noise to the token chosen at each node.
Chooser: TypeAlias = Callable[[Backend, Trees, torch.Tensor, dict | None, NoiseAt | None], torch.Tensor]


class Engine:
    """The state of a generation and the step that advances it.

    request: what to generate. controller: chooses the tree of every step; None where each has the request's.
    host_chooses: tokens are chosen on the host (`Callbacks.choose_with_processors`), so the target's pass ends with
    logits. repeated: the backend's `Backend.repeated`, which prepares a pass for many calls, or None. With a backend
    that `keeps_generations` the same tensors serve one generation after the other.
    """

    def __init__(
        self,
        models: Models,
        request: Request,
        controller: Controller | None,
        host_chooses: bool,
        clock: Clock,
        repeated: Callable[[Callable], Callable] | None = None,
    ):
        target, tree = models.target, request.tree
        ops, prompts = target.ops, request.prompts
        self.models, self.target, self.warping = models, target, request.sampling.warping
        self.host_chooses, self.clock = host_chooses, clock
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
            self.proposer = PromptLookup(ops, tree.depth, self.sequences, clock)
        elif tree.passes:
            self.proposer = DraftCascade(
                models, tree, self.sequences, self.warping, self.noise, clock, controller, repeated
            )

    @torch.inference_mode()  # the tensors may have been made in it
    def restart(self, request: Request) -> None:
        """Resets all state in place for another request of the same shapes."""
        cast(ReusableSequences, self.sequences).restart(request.prompts, request.new_tokens, request.eos)
        if self.noise is not None:
            cast(ReusableNoise, self.noise).restart(request.seeds, request.streams)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(cache.rows.nbytes for cache in self.caches)

    @property
    def caches(self) -> list[Cache]:
        """The KV caches: the target's, and the draft's if there is one."""
        return [self.cache] if self.proposer is None else [self.cache, *self.proposer.caches]

    def prefill(self, prompts: list[list[int]]) -> None:
        """Fills the caches with the prompts, without the last tokens, which the first step reads."""
        lengths = list(map(len, prompts))
        self.reader.read(max(lengths) - 1)
        if self.proposer is not None:
            self.proposer.prefill(lengths)

    def prefill_passes(self, prompts: list[list[int]] | None = None) -> Iterator[tuple[Callable, tuple]]:
        """The passes of `prefill`, (pass, arguments), for `Backend.prepare`. None: those of prompts of any length."""
        readers = [] if self.proposer is None else self.proposer.readers
        for reader, trailing in [(self.reader, 1), *readers]:
            if prompts is None:
                yield from reader.calls(cast(ReusableSequences, self.sequences).chunk_sizes)
            else:
                chunks = self.sequences.chunks(max(map(len, prompts)) - trailing)
                yield from reader.calls({size for _, size in chunks})

    def step(
        self,
        choose: Chooser | None = None,
        propose: Callable[[], Trees] | None = None,
        verify_forward: Callable[[Trees], tuple[torch.Tensor, NoiseAt | None]] | None = None,
    ) -> int:
        """Makes one step. Returns the number of draft passes.

        choose: must be given where the host chooses. propose, verify_forward: captured versions
        of the methods of that name.
        """
        trees = (propose or self.propose)()
        chosen, noise = (verify_forward or self.verify_forward)(trees)
        if self.host_chooses:
            with self.clock("target"):
                chosen = cast(Chooser, choose)(self.target.ops, trees, chosen, self.warping, noise)
        with self.clock("verify"):
            moves = trees.verify_commit(chosen)
        with self.clock("commit"):
            self.cache.commit(self.target, moves.target_rows(self.cache.tree_rows - trees.nodes))
            if self.proposer is not None:
                self.proposer.commit(moves)
        return 0 if self.proposer is None else self.proposer.passes

    def propose(self) -> Trees:
        """The token trees of this step."""
        if self.noise is not None:
            with self.clock("noise"):
                self.noise.advance(self.sequences)
        return self.target.ops.root_trees(self.sequences) if self.proposer is None else self.proposer.propose()

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
