"""Keeps generations that have ended, whose memory and CUDA graphs serve the next ones of their kind."""

import time

import torch

from stagedspec.decoding.callbacks import Callbacks
from stagedspec.decoding.generation import Generation, kind_of
from stagedspec.decoding.request import Request
from stagedspec.decoding.stats import Mark
from stagedspec.models.model_set import Models
from stagedspec.planning.adapt import Controller

KEPT = 8  # generations at most


def kept_bytes(device: torch.device) -> int:
    """How many bytes of keys and values are kept at most: 2 GiB, or a sixteenth of the GPU's memory if that is more."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(2**31, memory // 16)


class GenerationPool:
    """Generations of one decoder that have ended and can be used again, with a backend that `keeps_generations`."""

    def __init__(self) -> None:
        self.kept: list[Generation] = []  # the most recently used at the end

    def take(
        self,
        models: Models,
        request: Request,
        callbacks: Callbacks | None = None,
        mark: Mark | None = None,
        controller: Controller | None = None,
        began: float | None = None,
    ) -> Generation:
        """A generation for the request: the smallest of those kept that fit, else a new one.

        controller: chooses its trees, None where they do not adapt. began: when the call began, by `time.perf_counter`;
        None for now.
        """
        wanted = models, request, callbacks, mark
        kind, began = kind_of(*wanted), time.perf_counter() if began is None else began
        with models.target.ops.lock:
            fitting = [generation for generation in self.kept if generation.fits(kind, request)]
            found = min(fitting, key=lambda generation: generation.sequences.capacity, default=None)
            if found is not None:
                self.kept.remove(found)
        if found is not None:
            found.restart(request, callbacks, controller, began)
            return found
        try:
            return Generation(*wanted, controller, began)
        except torch.OutOfMemoryError:
            pass  # leave the handler first: the error keeps the tensors made so far alive
        self.release(models)
        return Generation(*wanted, controller, began)

    def give(self, generation: Generation, models: Models) -> None:
        """Keeps a generation that has ended and whose results have been read, if it can serve these models again."""
        generation.choose = None  # it refers to the caller's processors
        engine, ops = generation.engine, models.target.ops
        if engine.models.target is not models.target or engine.models.draft is not models.draft:
            return  # their weights have changed meanwhile
        most = kept_bytes(models.device)
        if not ops.keeps_generations or generation.clock.mark is not None or engine.nbytes > most:
            return
        with ops.lock:
            self.kept.append(generation)
            while len(self.kept) > KEPT or sum(kept.engine.nbytes for kept in self.kept) > most:
                del self.kept[0]

    def release(self, models: Models) -> None:
        """Frees all that is kept, and the backend's buffers."""
        with models.target.ops.lock:
            self.kept.clear()
            models.target.ops.release()
