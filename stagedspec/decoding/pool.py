"""Keeps generations that have ended, whose memory and CUDA graphs serve the next ones of their kind."""

import time

import torch

from stagedspec.decoding.callbacks import Positions
from stagedspec.decoding.generation import Run, kind_of
from stagedspec.decoding.request import Request
from stagedspec.decoding.stats import Mark
from stagedspec.models.model_set import Models

# Where steps have fixed shapes the last generations leave their memory and CUDA graphs to those that follow: at most so
# many, and so many bytes of keys and values.
KEPT, KEPT_BYTES = 8, 2**31


class GenerationPool:
    """Generations of one decoder that have ended and can be used again."""

    def __init__(self) -> None:
        self.kept: list[Run] = []  # the last one used last

    def take(
        self, models: Models, request: Request, positions: Positions | None, mark: Mark | None, began: float | None
    ) -> Run:
        """A generation of the request: one that is kept and fits, with the least room, else a new one.

        began: when the call began, of `time.perf_counter`; None for now.
        """
        wanted = models.target, models.draft, models.ngram, request, positions, mark
        kind, began = kind_of(*wanted), time.perf_counter() if began is None else began
        with models.target.ops.lock:
            fitting = [run for run in self.kept if run.fits(kind, request)]
            run = min(fitting, key=lambda run: run.sequences.capacity, default=None)
            if run is not None:
                self.kept.remove(run)
        if run is not None:
            run.restart(request, positions, began)
            return run
        try:
            return Run(*wanted, began)
        except torch.OutOfMemoryError:
            pass  # inside, the error would hold on to what had been made
        self.release(models)
        return Run(*wanted, began)

    def give(self, run: Run, models: Models) -> None:
        """Keeps a generation that has ended and of which nothing more is wanted, if it can serve these models again."""
        run.walk = None  # whose processors are the caller's
        stepper, ops = run.stepper, models.target.ops
        if stepper.target is not models.target or stepper.draft is not models.draft:
            return  # their weights have changed meanwhile
        if not ops.keeps_generations or run.clock.mark is not None or stepper.nbytes > KEPT_BYTES:
            return
        with ops.lock:
            self.kept.append(run)
            while len(self.kept) > KEPT or sum(kept.stepper.nbytes for kept in self.kept) > KEPT_BYTES:
                del self.kept[0]

    def release(self, models: Models) -> None:
        """Frees all that is kept, and the backend's buffers."""
        with models.target.ops.lock:
            self.kept.clear()
            models.target.ops.release()
