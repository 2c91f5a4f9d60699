"""The shapes that are measured, and random weights for them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product

import torch

from stagedspec.models.shapes import SIZES
from stagedspec.tuning import workloads

MODELS = {name: SIZES[name] for name in ("S", "L")}
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")  # a CPU for their own tests


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return workloads.randn(*shape, device=DEVICE, scale=scale)


@dataclass(frozen=True)
class Choice:
    """The values to measure of each parameter, as tuples."""

    model: tuple[str, ...]
    nodes: tuple[int, ...]
    context: tuple[int, ...]
    batch: tuple[int, ...]

    def all(self, *names: str) -> Iterator[tuple]:
        """Every combination of the values of these fields."""
        return product(*(getattr(self, name) for name in names))

    def split(self, **values: tuple) -> tuple["Choice", list["Choice"]]:
        """The part that has these values, and parts for all other combinations, each of which is in one part."""
        first, rest = self, []
        for name, wanted in values.items():
            some, others = (
                tuple(value for value in getattr(first, name) if (value in wanted) is inside)
                for inside in (True, False)
            )
            rest.append(replace(first, **{name: others}))
            first = replace(first, **{name: some})
        return first, rest

    def __str__(self) -> str:
        return " ".join(f"{part.name}={','.join(map(str, getattr(self, part.name)))}" for part in fields(self))


SOME = Choice(("L",), (1, 16, 64), (512, 1024), (1,))
ALL = Choice(("L", "S"), (1, 8, 16, 32, 64, 128), (64, 256, 512, 1024), (1, 8))
