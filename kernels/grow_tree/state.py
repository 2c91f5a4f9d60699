"""State of a step's tree growth on the device, and where its fields lie (the package's docstring has them)."""

from typing import NamedTuple

import torch
import triton.language as tl

# Fields of `slots`, of `candidates`, of `batch`, of `tree`.
TOKEN = tl.constexpr(0)
PREVIOUS, DEPTH, PARENT, CANDIDATE = (tl.constexpr(field) for field in (1, 2, 3, 4))
SLOT, NODE = tl.constexpr(1), tl.constexpr(2)
POSITION, NOISE = tl.constexpr(1), tl.constexpr(2)
TREE_PARENT, TREE_DEPTH, TREE_SLOT, TREE_ORIGIN = (tl.constexpr(field) for field in (1, 2, 3, 4))


class GrowthState(NamedTuple):
    """State of a step's tree growth (the package's docstring has the fields)."""

    slots: torch.Tensor
    slot_masks: torch.Tensor
    slot_scores: torch.Tensor
    candidates: torch.Tensor
    candidate_scores: torch.Tensor

    @classmethod
    def of(cls, batch: int, slots: int, children: int, device: torch.device) -> "GrowthState":
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        slots = max(slots, 1)
        return cls(
            zeros(5, batch, slots),
            zeros(batch, slots, words(slots)),
            zeros(batch, slots, dtype=torch.float32),
            zeros(3, batch, slots * children),
            zeros(batch, slots * children, dtype=torch.float32),
        )

    @property
    def recorded(self) -> "Recorded":
        return Recorded(self.slots, self.slot_scores, self.candidates, self.candidate_scores)


class Recorded(NamedTuple):
    """`GrowthState` without the masks, which finished trees do not need."""

    slots: torch.Tensor
    slot_scores: torch.Tensor
    candidates: torch.Tensor
    candidate_scores: torch.Tensor


def words(bits: int) -> int:
    """The int32 words of a mask of so many rows."""
    return -(-bits // 32)
