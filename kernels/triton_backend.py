"""The Triton backend: the interface of reference.py on our kernels, with a step's state on the device.

An instance serves the models of one decoder. It owns the buffers that a step's operations write into, one for each
operation and shape: after the first step nothing is allocated, nothing is read back, and the step can be captured as a
CUDA graph. Operations run in turn on one stream, so buffers of one shape are shared between layers and models.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from stagedspec.kernels import compact, device, embed, linear, lm_head, registry
from stagedspec.kernels import tree_attention as attention
from stagedspec.kernels.reference import GREEDY_SHARPNESS

ROWS = 256  # the most rows that one launch of a linear or one pass of attention takes
# Keys nearer than this are gathered node by node, so that it does not matter whether they are committed. A constant:
# it fixes the order of every sum, so it must be the same for every tree that a decoder may use.
WINDOW = 32


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] and bias [out], contiguous."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class NoiseAt:
    """The counters of the noise of every node of a pass: seeds, streams [B], positions [B, N]."""

    seeds: torch.Tensor
    streams: torch.Tensor
    positions: torch.Tensor


class Noise:
    """The Gumbel noise as counters: kernels make each value where they need it. Arguments as in reference.Noise."""

    def __init__(
        self,
        seeds: list[int],
        streams: list[int],
        vocab_size: int,
        reach: int,
        limits: list[int],
        device: torch.device,
    ):
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self.streams = torch.tensor(streams, dtype=torch.int32, device=device)

    def advance(self, sequences) -> None:
        """Nothing is made ahead."""

    def at(self, batch: device.Batch) -> NoiseAt:
        return NoiseAt(self.seeds, self.streams, batch.noise_positions)


class TritonOps:
    """See reference.py for what each operation computes."""

    Batch, Sequences, Growth, Trees, Moves = (
        device.Batch,
        device.Sequences,
        device.Growth,
        device.Trees,
        device.Moves,
    )
    Noise, NoiseAt = Noise, NoiseAt
    max_depth = WINDOW - 2  # the draft's pass begins one token above the root
    fixed_shapes = True

    def __init__(self) -> None:
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._scratch: registry.Scratch | None = None

    # ---------------------------------------------------------------- memory

    def _buffer(self, op: str, shape: tuple[int, ...], dtype: torch.dtype, place: torch.device) -> torch.Tensor:
        key = (op, shape, dtype, place)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(shape, dtype=dtype, device=place)
        return self._buffers[key]

    def _need(self, size: tuple[int, int], place: torch.device) -> registry.Scratch:
        """Scratch of at least `size`; grows in the first step alone."""
        held = self._scratch
        if held is None or held.partials.numel() < size[0] or held.counters.numel() < size[1]:
            sizes = [size] if held is None else [size, (held.partials.numel(), held.counters.numel())]
            self._scratch = registry.Scratch.of(sizes, place)
        return self._scratch
