"""CUDA graphs where there are none: a stand-in that checks what a graph would get wrong."""

import helpers  # noqa: F401 (it sets up triton)
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stagedspec.kernels.backends.cuda_graph import Captured
from stagedspec.kernels.backends.memory import Memory

VIEWS = (
    "aten.view",
    "aten.split",
    "aten.slice",
    "aten.select",
    "aten.unbind",
    "aten.alias",
    "aten.detach",
    "aten.expand",
)


class Replay(TorchDispatchMode, Captured):
    """In place of a CUDA graph, where there is none: every call after the first must launch the same operations on the
    same addresses, whatever the backend's buffers have become since. What a part allocates for itself after the first
    lies in its graph's own memory, wherever that is.
    """

    def __init__(self, part, ops):
        TorchDispatchMode.__init__(self)
        Captured.__init__(self, part, ops)
        self.calls = 0

    def __call__(self, *given):
        ops = self.ops
        newest = ops.memory
        if self.graph is not None:
            ops.memory = Memory()
            ops.memory.scratch, ops.memory.buffers = self.held
        self.launches, self.own = [], {}
        with self:
            value = self.part(*given)
        self.calls += 1
        if self.graph is not None:
            assert self.launches == self.graph
            ops.memory = newest
        elif self.calls > 1:
            self.graph, self.held = self.launches, ops.memory.held
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if str(func).startswith("stagedspec."):
            self.launches.append((str(func), [self.named(value) for value in (*args, *kwargs.items())]))
        elif self.calls and not str(func).startswith((*VIEWS, "aten.flatten", "aten.unflatten")):
            assert str(func).startswith("aten.empty"), func
            self.own[result.data_ptr()] = f"own {len(self.own)}"
        return result

    def named(self, value):
        if not isinstance(value, torch.Tensor):
            return repr(value)
        address = value.data_ptr()
        return self.own.get(address, address), value.shape, value.stride(), value.dtype
