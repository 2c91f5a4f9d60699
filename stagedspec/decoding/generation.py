"""One generation: what its steps do, on what, and what they come to."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from stagedspec.decoding.callbacks import Positions
from stagedspec.decoding.proposers import Cascade, Repeats
from stagedspec.decoding.request import Request
from stagedspec.decoding.stats import ORIGINS, Clock, Mark, Stats
from stagedspec.devices import current_device
from stagedspec.models.gpt2 import GPT2, Cache, Reader
from stagedspec.models.ngram import KatzTable
from stagedspec.planning.adapt import WAITS, Controller


class Stepper:
    """The steps of a generation, and all that they work on.

    walks: tokens are chosen along the walk, by the host. repeated: what makes a pass that runs often, the backend's
    `repeated` or None. With a backend that `keeps_generations` one generation after the other can use all of it.
    """

    def __init__(
        self,
        target: GPT2,
        draft: GPT2 | None,
        table: KatzTable | None,
        request: Request,
        walks: bool,
        clock: Clock,
        repeated: Callable[[Callable], Callable] | None = None,
    ):
        ops, config, warping = target.ops, request.tree, request.sampling.warping
        self.target, self.draft, self.warping = target, draft, warping
        self.walks, self.clock = walks, clock
        self.sequences = ops.make_sequences(
            request.prompts, request.new_tokens, request.eos, target.device, most=config.depth + 1
        )
        self.cache = Cache(target, len(request.prompts), config.nodes, self.sequences.capacity)
        self.noise = None
        if request.sampling.do_sample:
            self.noise = ops.make_noise(
                request.seeds,
                request.streams,
                target.vocab_size,
                min(config.depth, config.nodes - 1) + 1,
                [row.limit for row in self.sequences.rows],
                target.device,
                past=max(WAITS) + 1 if request.ladder else 0,
            )
        self.reader = Reader(target, self.cache, self.sequences, repeated)
        self.cascade: Cascade | Repeats | None = None
        if request.repeats:
            self.cascade = Repeats(ops, config.depth, self.sequences, clock)
        elif config.passes:
            controller = None
            if request.ladder:
                controller = Controller(request.ladder, *request.learned)
                request.learned[:] = [controller]
            self.cascade = Cascade(
                draft, table, config, self.sequences, warping, self.noise, clock, controller, repeated
            )

    @torch.inference_mode()  # as whoever made the tensors may have had it
    def restart(self, request: Request) -> None:
        """Makes everything what it was before the first step, in place, for a request of the same shapes."""
        self.sequences.restart(request.prompts, request.new_tokens, request.eos)
        if self.noise is not None:
            self.noise.restart(request.seeds, request.streams)

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(cache.rows.nbytes for cache in self.caches)

    @property
    def caches(self) -> list[Cache]:
        """The target's, and the draft's if there is one."""
        return [self.cache, *([self.cascade.cache] if isinstance(self.cascade, Cascade) else [])]

    def prefill(self, prompts: list[list[int]]) -> None:
        """Reads the prompts, but for what the first step reads."""
        lengths = list(map(len, prompts))
        self.reader.read(max(lengths) - 1)
        if self.cascade is not None:
            self.cascade.prefill(lengths)

    def reading(self, prompts: list[list[int]] | None = None) -> Iterator[tuple[Callable, tuple]]:
        """The passes of `prefill`, or those of any prompts, for the backend's `prepare`."""
        readers = [(self.reader, 1)] + ([(self.cascade.reader, 2)] if isinstance(self.cascade, Cascade) else [])
        for reader, trailing in readers:
            if prompts is None:
                yield from reader.calls(self.sequences.chunk_sizes)
            else:
                chunks = self.sequences.chunks(max(map(len, prompts)) - trailing)
                yield from reader.calls({size for _, size in chunks})

    def step(self, walk: Callable | None = None, propose: Callable | None = None, ask: Callable | None = None) -> int:
        """One step: draft trees, verify them in one target pass, commit what was accepted. Returns the draft passes.

        walk: `Positions.walk`, where the host chooses. propose, ask: in place of the methods of that name.
        """
        trees = (propose or self.propose)()
        chosen, noise = (ask or self.ask)(trees)
        if self.walks:
            with self.clock("target"):
                chosen = walk(self.target.ops, trees, chosen, self.warping, noise)
        with self.clock("verify"):
            moves = trees.verify_commit(chosen)
        with self.clock("commit"):
            self.cache.commit(self.target, moves.target_rows(self.cache.tree_rows - trees.nodes))
            if self.cascade is not None:
                self.cascade.commit(moves)
        return 0 if self.cascade is None else self.cascade.passes

    def propose(self):
        """This step's trees."""
        if self.noise is not None:
            with self.clock("noise"):
                self.noise.advance(self.sequences)
        return self.target.ops.root_trees(self.sequences) if self.cascade is None else self.cascade.propose()

    def ask(self, trees) -> tuple[torch.Tensor, Any]:
        """What the target chooses at every node, or its logits where tokens are chosen along the walk; the noise."""
        target = self.target
        with self.clock("verify"):
            batch = trees.batch(target.kv_dtype)
            noise = None if self.noise is None else self.noise.at(batch)
        with self.clock("target"):
            # The nodes lie right below the prefix, so that no unused rows are attended to.
            first = self.cache.tree_rows - trees.nodes
            hidden = target.forward(batch, self.cache, first, first)
            chosen = target.logits(hidden) if self.walks else target.choose(hidden, self.warping, noise)
        return chosen, noise


class Run:
    """One generation; with `restart` another one of its kind, by the same CUDA graphs.

    positions: what is called at every position, if anything; mark: what phases are marked with for a profiler; began:
    when the call began, of `time.perf_counter`, None for now.
    """

    def __init__(
        self,
        target: GPT2,
        draft: GPT2 | None,
        table: KatzTable | None,
        request: Request,
        positions: Positions | None = None,
        mark: Mark | None = None,
        began: float | None = None,
    ):
        self._arrive(began)
        self.clock = Clock(None if target.ops.times_phases else ("prefill",), mark)
        repeated = target.ops.repeated if mark is None else None
        self.stepper = Stepper(target, draft, table, request, _walk(positions) is not None, self.clock, repeated)
        self.kind = kind_of(target, draft, table, request, positions, mark)
        self._begin(request, positions)
        self._step = self._repeated()
        self._prepared = False

    def _arrive(self, began: float | None) -> None:
        now = time.perf_counter()
        self._before = now - (now if began is None else began)  # seconds of the call that are gone

    def _begin(self, request: Request, positions: Positions | None) -> None:
        self.request, self.walk = request, _walk(positions)
        self.passes: list[int] = []  # of the draft, in each step
        self.seconds = 0.0

    def fits(self, kind: tuple, request: Request) -> bool:
        """Whether `restart` can take a request of this kind (`kind_of`): by the same steps, in the room there is."""
        return self.kind == kind and self.sequences.fits(request.prompts, request.new_tokens, request.eos)

    def restart(self, request: Request, positions: Positions | None, began: float | None = None) -> None:
        """Begins another generation, which `fits`, where this one has ended and all that is wanted of it was read."""
        self._arrive(began)
        self._begin(request, positions)
        self.clock.seconds.clear()
        self.stepper.restart(request)

    @property
    def sequences(self):
        """The committed tokens, of the backend's `Sequences`."""
        return self.stepper.sequences

    @torch.inference_mode()
    def steps(self) -> Iterator[None]:
        """Runs until every row has stopped; yields after each step. Time spent by the consumer is not counted.

        Raises InvalidLogitsError, a RuntimeError, where no next token of a row can be chosen, once all tokens before it
        were yielded.
        """
        begin = time.perf_counter()
        target = self.stepper.target
        with target.ops.lock, current_device(target.device):
            self.prepare()
            with self.clock("prefill"):
                self.stepper.prefill(self.request.prompts)
        while not self.sequences.finished:
            with target.ops.lock, current_device(target.device):  # given back before the consumer's code runs
                self.passes.append(self._step(self.walk))
                self.sequences.publish()
            self.seconds += time.perf_counter() - begin
            yield
            begin = time.perf_counter()
        self.sequences.check()

    def prepare(self) -> int:
        """Compiles, in parallel, the kernels that this generation needs and no earlier one did; returns how many."""
        if self.clock.mark is not None:  # a profiler would see the dry run's phases
            return 0
        return self.stepper.target.ops.prepare(self._unprepared(), self.stepper.target.device)

    def _unprepared(self) -> Iterator[tuple[Callable, tuple]]:
        stepper = self.stepper
        yield from stepper.reading(self.request.prompts)
        if not self._prepared:
            self._prepared = True
            host = stepper.walks or self.request.repeats  # what it does is not known ahead
            yield (lambda: stepper.ask(stepper.propose()), ()) if host else (self._step, (None,))

    @torch.inference_mode()
    def warm_up(self) -> int:
        """Compiles, and captures where nothing stands against it, what generations of this kind need, whatever their
        prompts; returns how many kernels were new."""
        stepper, target = self.stepper, self.stepper.target
        with target.ops.lock, current_device(target.device):
            calls = [*stepper.reading(), *self._unprepared()]
            made = target.ops.prepare(calls, target.device)
            for part, given in calls:
                if hasattr(part, "capture"):
                    part.capture(*given)
        return made

    def _repeated(self) -> Callable[..., int]:
        """A step, captured if the backend does that: all of it, or what lies between the parts of the host in it."""
        stepper, repeated = self.stepper, self.stepper.target.ops.repeated
        if self.clock.mark is not None:
            return stepper.step
        if not stepper.walks and not self.request.repeats:
            return repeated(stepper.step)
        propose = stepper.propose if self.request.repeats else repeated(stepper.propose)
        return partial(stepper.step, propose=propose, ask=repeated(stepper.ask))

    def stop(self, index: int, count: int) -> None:
        """Ends a row after `count` new tokens; what was decoded beyond is dropped."""
        self.sequences.stop(index, len(self.request.prompts[index]) + count)

    def new_tokens(self, pad: int) -> torch.Tensor:
        """The new tokens, LongTensor [B, most], shorter rows filled up with `pad`."""
        rows = zip(self.sequences.rows, self.request.prompts, strict=True)
        new = [row.tokens[len(prompt) :] for row, prompt in rows]
        most = max(map(len, new))
        return torch.tensor([row + [pad] * (most - len(row)) for row in new], device="cpu")

    def stats(self) -> Stats:
        """Of what has run so far, without the steps that ran in vain until the host knew that all rows had stopped."""
        steps, config = self.sequences.steps, self.request.tree
        origins = [origin for row in self.sequences.rows for origin in row.origins]
        accepted, target, draft = self.sequences.accepted, self.stepper.target, self.stepper.draft
        cascade = self.stepper.cascade
        controller = None if cascade is None else cascade.controller
        first = self.sequences.seconds_to_first_token
        return Stats(
            mode=self.request.mode,
            tree=asdict(config),
            adapted={} if controller is None else controller.made,
            steps=steps,
            row_steps=accepted.total(),
            new_tokens=len(origins),
            target_passes=steps,
            draft_passes=sum(self.passes[:steps]),
            accepted_per_depth=[
                sum(times for count, times in accepted.items() if count > depth) for depth in range(config.depth)
            ],
            origins={name: origins.count(index) for index, name in enumerate(ORIGINS)},
            seconds=dict(self.clock.seconds),
            total_seconds=self.seconds,
            seconds_to_first_token=None if first is None else self._before + first,
            target_bytes=target.weight_bytes,
            draft_bytes=0 if draft is None else draft.weight_bytes,
        )


def kind_of(target, draft, table, request: Request, positions: Positions | None, mark: Mark | None) -> tuple:
    """What decides, of the arguments of `Run`, which operations a step runs; but not how much room its tensors have."""
    models = id(target), id(draft), id(table)  # a table would be compared by its tensors
    return *models, request.tree, request.sampling, request.repeats, _walk(positions) is not None, mark


def _walk(positions: Positions | None) -> Callable | None:
    """Chooses the tokens along the walk, where something has to see them one by one."""
    return positions.walk if positions is not None and positions.walks else None
