"""Memory that a backend's operations write into, and that CUDA graphs refer to by address."""

import torch

from stagedspec.kernels.common.registry import Scratch


class Memory:
    """Buffers and scratch of the operations of one stream, which run in turn.

    buffers: by operation, width, dtype and device; scratch: for all operations. Both only grow, in the first step.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple, torch.Tensor] = {}
        self.scratch: Scratch | None = None

    def buffer(self, op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A buffer of this shape: the first rows of the longest one that was needed so far."""
        key = (op, shape[1:], dtype, device)
        held = self.buffers.get(key)
        if held is None or held.shape[0] < shape[0]:
            held = self.buffers[key] = torch.empty(shape, dtype=dtype, device=device)
        return held[: shape[0]]

    def scratch_of(self, size: tuple[int, int], device: torch.device) -> Scratch:
        """Scratch of at least `size` (partials, counters)."""
        held = self.scratch
        if held is None or held.partials.numel() < size[0] or held.counters.numel() < size[1]:
            sizes = [size] if held is None else [size, (held.partials.numel(), held.counters.numel())]
            self.scratch = held = Scratch.of(sizes, device)
        return held

    @property
    def held(self) -> tuple:
        """All tensors as they are now, for who must keep them alive."""
        return self.scratch, dict(self.buffers)
