"""State and step loop of one generation."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import cast

import torch

from stagedspec.decoding.callbacks import Callbacks
from stagedspec.decoding.engine import Chooser, Engine
from stagedspec.decoding.proposers import Step
from stagedspec.decoding.request import Request, RequestRow
from stagedspec.decoding.stats import ORIGINS, Clock, Mark, Stats
from stagedspec.devices import current_device
from stagedspec.kernels.backends.interface import CompilingBackend, ReusableSequences, Sequences
from stagedspec.models.model_set import Models
from stagedspec.planning.adapt import Controller
from stagedspec.planning.tree import TreeConfig


class Generation:
    """One generation. `restart` begins another one of the same kind, with the same memory and CUDA graphs.

    callbacks: logits processors, criteria and streamer, if there are any. mark: marks phases for a profiler.
    controller: of `TreePlanner.controller`, None where every step has the request's tree. began: when the call began,
    by `time.perf_counter`; None for now.
    """

    def __init__(
        self,
        models: Models,
        request: Request,
        callbacks: Callbacks | None = None,
        mark: Mark | None = None,
        controller: Controller | None = None,
        began: float | None = None,
    ):
        self._set_start(began)
        ops = models.target.ops
        self.clock = Clock(None if ops.times_phases else ("prefill",), mark)
        repeated = ops.repeated if mark is None else None
        self.engine = Engine(models, request, _chooser(callbacks) is not None, self.clock, repeated)
        self.kind = kind_of(models, request, callbacks, mark)
        self._begin(request, callbacks, controller)
        self._steps = {tree: self._repeated(tree) for tree in self.engine.trees}
        self._prepared = False

    def _set_start(self, began: float | None) -> None:
        now = time.perf_counter()
        self._before = now - (now if began is None else began)  # seconds of the call before this object was made

    def _begin(self, request: Request, callbacks: Callbacks | None, controller: Controller | None) -> None:
        self.engine.begin(controller)
        self.request, self.choose = request, _chooser(callbacks)
        self.passes: list[int] = []  # of the draft, in each step and right before it
        self.seconds = 0.0
        self._entered = [(0, 0.0)] * len(request.rows)  # steps and seconds before each row began

    def fits(self, kind: tuple, request: Request) -> bool:
        """Whether `restart` can take a request of this kind (`kind_of`): the same operations, and enough memory."""
        sequences = cast(ReusableSequences, self.sequences)
        return self.kind == kind and sequences.fits(request.prompts, request.new_tokens, request.eos)

    def restart(
        self,
        request: Request,
        callbacks: Callbacks | None,
        controller: Controller | None = None,
        began: float | None = None,
    ) -> None:
        """Begins another generation, for which `fits` is true, after this one has ended."""
        self._set_start(began)
        self._begin(request, callbacks, controller)
        self.clock.seconds.clear()
        self.engine.restart(request)

    @property
    def sequences(self) -> Sequences:
        """The committed tokens."""
        return self.engine.sequences

    @torch.inference_mode()
    def steps(self) -> Iterator[None]:
        """Runs until every row has stopped, and yields after each step. Time of the consumer is not counted.

        Raises InvalidLogitsError, a RuntimeError, where no next token of a row can be chosen, once all tokens before it
        were yielded.
        """
        begin = time.perf_counter()
        target = self.engine.target
        with target.ops.lock, current_device(target.device):
            self.prepare()
            with self.clock("prefill"):
                self.engine.prefill(self.request)
        while not self.sequences.finished:
            with target.ops.lock, current_device(target.device):  # given back before the consumer's code runs
                self._step()
            self.seconds += time.perf_counter() - begin
            yield
            begin = time.perf_counter()
        if self.engine.proposer is not None:
            self.engine.proposer.learn()
        self.sequences.check()

    @torch.inference_mode()
    def replace(self, index: int, row: RequestRow) -> None:
        """Lets another prompt take the place of a row that has ended, between two steps. Only where the backend
        `replaces_rows`, and only if `sequences.capacity` tokens are enough for it."""
        begin = time.perf_counter()
        target = self.engine.target
        with target.ops.lock, current_device(target.device), self.clock("prefill"):
            self.engine.replace(index, row)
        self.request.rows[index] = row
        self._entered[index] = len(self.passes), self.seconds
        self.seconds += time.perf_counter() - begin

    @torch.inference_mode()
    def remove(self, index: int) -> None:
        """Leaves a row that has ended out of all further steps, between two of them; the last row takes its index. Only
        where the backend `replaces_rows`."""
        begin = time.perf_counter()
        with self.engine.target.ops.lock:
            self.engine.remove(index)
        rows, entered = self.request.rows, self._entered
        rows[index], entered[index] = rows[-1], entered[-1]
        del rows[-1], entered[-1]
        self.seconds += time.perf_counter() - begin

    def _step(self) -> None:
        tree, reads = self.engine.begin_step()
        step = self._steps[tree](self.choose)
        self.engine.end_step(step)
        self.passes.append(reads + step.passes)
        self.sequences.publish()

    def prepare(self) -> int:
        """Compiles, in parallel, the kernels that this generation needs and no earlier one did; returns how many."""
        if self.clock.mark is not None:  # a profiler would see the dry run's phases
            return 0
        return self.engine.target.ops.prepare(self._unprepared(), self.engine.target.device)

    def _unprepared(self) -> Iterator[tuple[Callable, tuple]]:
        engine = self.engine
        yield from engine.prefill_passes(self.request.prompts)
        if not self._prepared:
            self._prepared = True
            host = engine.host_chooses or self.request.prompt_lookup  # the host's part cannot run without results

            def without_host(tree: TreeConfig) -> None:
                engine.verify_forward(engine.propose(tree)[0])

            yield from ((without_host, (tree,)) if host else (step, (None,)) for tree, step in self._steps.items())
            if engine.proposer is not None:
                yield from engine.proposer.readings()

    @torch.inference_mode()
    def warm_up(self) -> int:
        """Compiles what generations of this kind need for prompts of any length, and captures their CUDA graphs where
        that is possible; returns how many kernels were new. Only with a backend that `compiles_kernels`."""
        engine, target = self.engine, self.engine.target
        with target.ops.lock, current_device(target.device):
            calls, ops = [*engine.prefill_passes(), *self._unprepared()], cast(CompilingBackend, target.ops)
            made = ops.prepare(calls, target.device)
            ops.capture(calls)
        return made

    def _repeated(self, tree: TreeConfig) -> Callable[..., Step]:
        """A step with this tree, captured as a CUDA graph if the backend does that: all of it, or the parts that need
        no host."""
        engine, repeated = self.engine, self.engine.target.ops.repeated
        step = partial(engine.step, tree)
        if self.clock.mark is not None:
            return step
        if not engine.host_chooses and not self.request.prompt_lookup:
            return repeated(step)
        propose = engine.propose if self.request.prompt_lookup else repeated(engine.propose)
        return partial(step, propose=propose, verify_forward=repeated(engine.verify_forward))

    @property
    def prompt_lengths(self) -> list[int]:
        """For each row, the tokens that its prompt has."""
        return [len(prompt) for prompt in self.request.prompts]

    def new_tokens(self, pad: int) -> torch.Tensor:
        """The new tokens, LongTensor [B, most], shorter rows filled up with `pad`."""
        rows = zip(self.sequences.rows, self.request.prompts, strict=True)
        new = [row.tokens[len(prompt) :] for row, prompt in rows]
        most = max(map(len, new))
        return torch.tensor([row + [pad] * (most - len(row)) for row in new], device="cpu")

    def stats(self, index: int | None = None) -> Stats:
        """Statistics so far, excluding steps launched before the host saw that all rows had finished; of one row since
        it began, or of all rows. The seconds of a row are those since it began: other rows were decoded meanwhile."""
        config, sequences, models = self.request.tree, self.sequences, self.engine.models
        rows, counts = sequences.rows, sequences.accepted
        if index is not None:
            rows, counts = [rows[index]], [counts[index]]
        accepted = sum(counts, Counter())
        steps = sequences.steps if index is None else accepted.total()
        began, before = (0, 0.0) if index is None else self._entered[index]
        first = sequences.seconds_to_first_token if index is None else None
        controller = None if self.engine.proposer is None else self.engine.proposer.controller
        origins = [origin for row in rows for origin in row.origins]
        return Stats(
            mode=self.request.mode,
            tree=asdict(config),
            adapted={} if controller is None or index is not None else controller.made,
            steps=steps,
            row_steps=accepted.total(),
            new_tokens=len(origins),
            target_passes=steps,
            draft_passes=sum(self.passes[began : began + steps]),
            accepted_per_depth=[
                sum(times for count, times in accepted.items() if count > depth) for depth in range(config.depth)
            ],
            origins={name: origins.count(number) for number, name in enumerate(ORIGINS)},
            seconds=dict(self.clock.seconds) if index is None else {},
            total_seconds=self.seconds - before,
            seconds_to_first_token=None if first is None else self._before + first,
            target_bytes=models.target.weight_bytes,
            draft_bytes=0 if models.draft is None else models.draft.weight_bytes,
        )


def kind_of(models: Models, request: Request, callbacks: Callbacks | None, mark: Mark | None) -> tuple:
    """The arguments of `Generation` that decide which operations a step runs; sizes of tensors are left out."""
    parts = id(models.target), id(models.draft), id(models.ngram)  # a table would be compared by its tensors
    return *parts, request.trees, request.sampling, request.prompt_lookup, _chooser(callbacks) is not None, mark


def _chooser(callbacks: Callbacks | None) -> Chooser | None:
    """The callbacks, if they choose tokens on the host (for processors or recorded scores); else None."""
    return callbacks.choose_with_processors if callbacks is not None and callbacks.chooses else None
