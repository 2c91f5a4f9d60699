"""Early starts (programmatic dependent launch) without a GPU: what a kernel finds that begins as soon as it may."""

from collections.abc import Callable, Iterable
from contextvars import copy_context

import pytest
import torch
import triton.language as tl

from stagedspec.kernels.common import registry


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A view that compares NaN by its bits."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


class EarlyStarts:
    """Runs kernels in the interpreter with PDL on, each of them as early as a GPU could.

    A kernel may begin once the one ahead of it has called `gdc_launch_dependents`, and sees what that one wrote only
    after `gdc_wait`. So it begins with memory as it was before the kernel ahead ran, and the first wait brings in what
    that one changed. A kernel that lets others begin before its own wait passes on the older memory: what lies two
    kernels back need not be there either.

    memory: all tensors that the kernels write.
    """

    def __init__(self, memory: Iterable[torch.Tensor]):
        self.memory = [bits(tensor) for tensor in memory]
        self.names: list[str] = []  # of the kernels that were launched

    def run(self, function: Callable[[], object]) -> None:
        """Fails where a kernel never waits, or writes before its wait what the one ahead writes too."""
        assert registry.interpreted()
        self._before = self._now()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tl.extra.cuda, "gdc_wait", self._wait)
            patch.setattr(tl.extra.cuda, "gdc_launch_dependents", self._let_begin)
            patch.setattr(tl, "inline_asm_elementwise", lambda *_, **__: None)  # fences and prefetches
            copy_context().run(self._collected, function)

    def _collected(self, function: Callable[[], object]) -> None:
        registry.collector.set(self._launch)
        function()

    def _now(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.memory]

    def _launch(self, kernel, grid: tuple, arguments: tuple, options: dict) -> None:
        self.names.append(kernel.__name__)
        self._begin, self._after = self._before, self._now()
        self._waited = self._others_may_begin = False
        for tensor, before in zip(self.memory, self._begin, strict=True):
            tensor.copy_(before)
        kernel[grid](*arguments, **options | {"PDL": True})
        assert self._waited, f"{kernel.__name__} never waits"

    def _wait(self, **_) -> None:
        if self._waited:
            return
        self._waited = True
        for tensor, before, after in zip(self.memory, self._begin, self._after, strict=True):
            coming = before != after
            assert torch.equal(tensor[coming], before[coming]), f"{self.names[-1]} writes too early"
            tensor[coming] = after[coming]
        # What the next kernel begins with: all that is here now, unless it may have begun before.
        self._before = self._begin if self._others_may_begin else self._now()

    def _let_begin(self, **_) -> None:
        self._others_may_begin = True
