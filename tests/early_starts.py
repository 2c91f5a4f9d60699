"""Early starts (programmatic dependent launch) without a GPU: what a kernel finds that begins as soon as it may."""

from collections.abc import Callable, Iterable
from contextvars import copy_context

import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from stagedspec.kernels.common import registry


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A view that compares NaN by its bits."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def scramble(tensors: Iterable[torch.Tensor]) -> None:
    """Other values: NaN, and 0 or 1 of what counts."""
    for tensor in tensors:
        tensor.copy_(
            torch.where(tensor == 0, 1, 0) if not tensor.is_floating_point() else torch.full_like(tensor, torch.nan)
        )


class EarlyStarts:
    """Runs kernels in the interpreter with PDL on, every program of them as early as a GPU could.

    A program may begin once the kernel ahead has called `gdc_launch_dependents`, and sees what that one wrote only
    after its own `gdc_wait`. So it begins with memory as it was before the kernel ahead ran, and its first wait brings
    in what that one changed. A kernel that lets others begin before its own wait passes on the older memory: what lies
    two kernels back need not be there either. What is not seen here: a write before the wait to what the kernel ahead
    still reads, for that one has ended.

    memory: all tensors that the kernels write, and `ahead`: those that a kernel before the first one has written.
    """

    def __init__(self, memory: Iterable[torch.Tensor], ahead: Iterable[torch.Tensor] = ()):
        self.tensors = [*memory, *ahead]
        self.memory = [bits(tensor) for tensor in self.tensors]
        self.ahead = list(ahead)
        self.names: list[str] = []  # of the kernels that were launched

    def run(self, function: Callable[[], object]) -> None:
        """Fails where a program never waits, or writes before its wait what the kernel ahead writes too."""
        assert registry.interpreted()
        now = self._now()
        scramble(self.ahead)
        self._before = self._now()
        for tensor, values in zip(self.memory, now, strict=True):
            tensor.copy_(values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tl.extra.cuda, "gdc_wait", self._wait)
            patch.setattr(tl.extra.cuda, "gdc_launch_dependents", self._let_begin)
            patch.setattr(tl, "inline_asm_elementwise", lambda *_, **__: None)  # fences and prefetches
            place = interpreter.interpreter_builder.set_grid_idx
            patch.setattr(interpreter.interpreter_builder, "set_grid_idx", lambda *at: (self._start(), place(*at)))
            copy_context().run(self._collected, function)

    def _collected(self, function: Callable[[], object]) -> None:
        registry.collector.set(self._launch)
        function()

    def _now(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.memory]

    def _launch(self, kernel, grid: tuple, arguments: tuple, options: dict) -> None:
        self.names.append(kernel.__name__)
        self._begin, self._after = self._before, self._now()
        self._waited, self._others_may_begin, self._first = True, False, True
        kernel[grid](*arguments, **options | {"PDL": True})
        assert self._waited, f"{kernel.__name__}: its last program never waits"

    def _start(self) -> None:
        """A program begins: what the kernel ahead wrote is not there, what other programs of this kernel wrote is."""
        assert self._waited, f"{self.names[-1]}: a program never waits"
        self._waited = False
        self._pending = []
        for tensor, before, after in zip(self.memory, self._begin, self._after, strict=True):
            pending = (before != after) & (tensor == after)
            tensor[pending] = before[pending]
            self._pending.append(pending)

    def _wait(self, **_) -> None:
        if self._waited:
            return
        self._waited = True
        parts = zip(self.memory, self._pending, self._begin, self._after, strict=True)
        for tensor, pending, before, after in parts:
            assert torch.equal(tensor[pending], before[pending]), f"{self.names[-1]} writes too early"
            tensor[pending] = after[pending]
        if self._first:
            # What the next kernel begins with: all that is here now, unless it may have begun before.
            self._before = self._begin if self._others_may_begin else self._now()
            self._first = False

    def _let_begin(self, **_) -> None:
        self._others_may_begin = True


class Settled(TorchDispatchMode):
    """Fails where attention over a tree takes masks, prefix or a cache for settled that were written after `embed`, the
    first kernel of its pass, by anything but the pass itself. checked: how often it did not fail."""

    OF_A_PASS = ("stagedspec.row_stats", "stagedspec.linear", "stagedspec.tree_attention")

    def __init__(self):
        super().__init__()
        self.passes = self.checked = 0
        self.written: dict[int, int] = {}  # memory -> how many passes had begun when it was written last

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        name = str(func)
        self.passes += name.startswith("stagedspec.embed")
        if name.startswith("stagedspec.tree_attention") and given["settled"] and not given["chunk"]:
            for key in ("masks", "prefix", "cache"):
                last = self.written.get(given[key].untyped_storage().data_ptr(), 0)
                assert last < self.passes, f"{key}: written after embed, read before the wait"
            self.checked += 1
        if not name.startswith(self.OF_A_PASS):
            for argument in func._schema.arguments:
                value = given.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write and value is not None:
                    self.written[value.untyped_storage().data_ptr()] = self.passes
        return func(*args, **(kwargs or {}))
