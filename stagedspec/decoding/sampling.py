"""Sampling settings of a request: how `choose` warps the logits, and the counters of its noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagedspec.values import at_least, plain, real, truth, whole

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """Greedy, or sampling with transformers' warpers in transformers' order. None leaves a warper out, and so do
    temperature 1, top_k 0, top_p of 1 or more and min_p 0, as in transformers.

    Raises ValueError for values that are no numbers and, when sampling, for values out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "do_sample", truth("do_sample", self.do_sample))
        if self.temperature is None:
            object.__setattr__(self, "temperature", 1.0)
        # Below 1e-6 logits / temperature can leave fp32; above 1e6 every distribution is flat.
        self._read(
            "temperature",
            real,
            lambda value: 1e-6 <= value <= 1e6,
            "a finite number above 0 (from 1e-6 to 1e6); for greedy decoding use do_sample=False",
        )
        self._read("top_k", whole, lambda value: value >= 0, "a whole number of at least 0 (0 or None turns it off)")
        self._read("top_p", real, lambda value: value >= 0, "a number of at least 0 (1 or None turns it off)")
        self._read("min_p", real, lambda value: 0 <= value <= 1, "in [0, 1] or None")

    def _read(self, name: str, kind: Callable, good: Callable, expected: str) -> None:
        """Makes the number called `name` Python's own and checks it."""
        given = getattr(self, name)
        if given is None:
            return
        value = kind(given)
        if value is None or (self.do_sample and not good(value)):
            raise ValueError(f"{name} must be {expected}, got {given!r}")
        object.__setattr__(self, name, value)

    @property
    def warping(self) -> dict | None:
        """Keywords of the `warp` operation, or None when greedy."""
        if not self.do_sample:
            return None
        return {
            "temperature": self.temperature,
            "top_k": self.top_k or None,
            # The kernels want it above 0: fp32 does not tell 1 - 1e-9 from 1.
            "top_p": None if self.top_p is None else min(max(self.top_p, 1e-9), 1.0),
            "min_p": self.min_p,
        }


def row_seed(seed: int, index: int, sample: int = 0) -> int:
    """The seed of sample `sample` of prompt `index`, both from 0, in a run with this seed of 64 bits.

    It is below 2**53, so that every reader of JSON keeps it: the upper bits of one 64-bit word of NumPy's
    `SeedSequence` of the three numbers, which stays the same in all releases.

    Raises ValueError for a seed that is no integer of 64 bits, and for an index or sample below 0.
    """
    words = [_seed(seed) % 2**64, at_least("index", index, 0), at_least("sample", sample, 0)]
    from numpy import uint64
    from numpy.random import SeedSequence

    return int(SeedSequence(words).generate_state(1, uint64)[0]) >> 11


def counters(seed: "int | Sequence[int] | torch.Tensor", batch: int) -> tuple[list[int], list[int]]:
    """Seeds and streams of the rows. One integer: row b is stream b. One seed a row: every row is stream 0,
    so that a row can be reproduced alone.

    Raises ValueError unless seed is one integer or `batch` integers, each of 64 bits.
    """
    given = plain(seed)
    single = not isinstance(given, Sequence) or isinstance(given, str)
    seeds = [given] * batch if single else list(given)
    if len(seeds) != batch:
        raise ValueError(f"seed must be one integer or one a row: expected {batch}, got {len(seeds)}")
    return list(map(_seed, seeds)), list(range(batch)) if single else [0] * batch


def _seed(value: object) -> int:
    """A seed as a signed integer. Raises ValueError unless it is an integer of 64 bits, signed or not."""
    number = whole(value)
    if number is None or not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be an integer of 64 bits, got {value!r}")
    return number - 2**64 if number >= 2**63 else number
