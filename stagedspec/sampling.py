"""What `choose` needs to know of a request: how to warp the logits, and the counters of the noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # the command line checks its options without waiting for it


@dataclass(frozen=True)
class Sampling:
    """Greedy, or sampling with transformers' warpers in transformers' order. None leaves a warper out.

    Raises ValueError for values out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        def check(name: str, good: bool, expected: str) -> None:
            if not good:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        def number(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf

        check("do_sample", isinstance(self.do_sample, bool), "True or False")
        # Below 1e-6 logits / temperature can leave fp32; above 1e6 every distribution is flat.
        good = number(self.temperature) and 1e-6 <= self.temperature <= 1e6
        check("temperature", good, "a finite number above 0 (from 1e-6 to 1e6)")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        check("top_k", self.top_k is None or (whole and self.top_k >= 0), "a whole number (0 or None turns it off)")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            low_ok = value is not None and number(value) and (value > 0 if name == "top_p" else value >= 0)
            expected = "in (0, 1]" if name == "top_p" else "in [0, 1]"
            check(name, value is None or (low_ok and value <= 1), f"{expected} or None")

    @property
    def warping(self) -> dict | None:
        """Keywords of the `warp` operation, or None when greedy."""
        if not self.do_sample:
            return None
        return {
            "temperature": float(self.temperature),
            "top_k": self.top_k or None,
            "top_p": self.top_p,
            "min_p": self.min_p,
        }


def counters(seed: "int | Sequence[int] | torch.Tensor", batch: int) -> tuple[list[int], list[int]]:
    """Seeds and streams of the rows. One integer: row b is stream b. One seed a row: every row is stream 0,
    so that a row can be reproduced alone.

    Raises ValueError unless seed is one integer or `batch` integers, each of 64 bits.
    """
    if hasattr(seed, "tolist"):  # a tensor
        seed = seed.tolist()
    single = not isinstance(seed, Sequence)
    seeds = [seed] * batch if single else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"seed must be one integer or one a row: expected {batch}, got {len(seeds)}")
    for value in seeds:
        if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**64:
            raise ValueError(f"seed must be an integer of 64 bits, got {value!r}")
    signed = [value - 2**64 if value >= 2**63 else value for value in seeds]
    return signed, list(range(batch)) if single else [0] * batch
