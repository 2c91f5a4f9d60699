"""Steps as CUDA graphs: captured when they first run, replayed from then on."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any, Protocol

import torch

from stagedspec.kernels.backends.memory import Memory
from stagedspec.kernels.common import registry

_CAPTURING = Lock()  # torch allows one capture at a time in a process


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """The stream of a GPU that steps are captured on.

    torch hands out streams in turn, and launches by other code on the same stream would end up in the graph. So this
    one has priority: such streams are seldom used.
    """
    return torch.cuda.Stream(index, priority=-1)


@contextmanager
def _without_disturbance() -> Iterator[None]:
    """One capture at a time, without garbage collection: a CUDA graph that is destroyed would spoil the capture."""
    with _CAPTURING:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


class Preparing(Protocol):
    """What a graph needs of the backend whose operations it captures.

    memory: what these operations write into; another object after a `release`.
    """

    @property
    def memory(self) -> Memory: ...

    def prepare(self, calls: Iterable[tuple[Callable, tuple]], device: torch.device) -> int:
        """Compiles the kernels of calls (function, arguments), and makes their buffers."""


class Captured:
    """A step, or a part of one, as a CUDA graph. In the interpreter it is a plain call.

    The first call captures it, after `ops.prepare` has compiled its kernels and made its buffers. Arguments
    and results must be the same tensors at every call; numbers among them must not change what is launched.
    """

    def __init__(self, part: Callable, ops: Preparing):
        self.part, self.ops = part, ops
        self.graph: Any = None  # the torch.cuda.CUDAGraph
        self.memory: Memory | None = None  # that of the backend when this was prepared
        self.value = None

    @property
    def prepared(self) -> bool:
        """Whether its kernels are compiled and its buffers exist: none may be made while it is captured."""
        return self.graph is not None or self.memory is self.ops.memory

    def __call__(self, *given: Any) -> Any:
        if registry.interpreted():
            return self.part(*given)
        self.capture(*given)
        self.graph.replay()
        return self.value

    def capture(self, *given: Any) -> None:
        """Makes the graph, unless there is one, without running it."""
        if self.graph is not None or registry.interpreted():
            return
        self.ops.prepare([(self, given)], torch.device("cuda", torch.cuda.current_device()))
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may go on using the GPU. The first graph makes torch objects that all graphs
        # share: these must not belong to inference mode.
        stream = _capture_stream(torch.cuda.current_device())
        captured = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with _without_disturbance(), torch.inference_mode(False), captured, torch.inference_mode():
            self.value = self.part(*given)
        # The graph reads and writes at fixed addresses: what lies there must outlive it.
        self.graph, self.held = graph, self.ops.memory.held
