"""What `choose` needs to know of a request: how to warp the logits, and the counters of the noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from stagedspec.kernels.reference import NoiseAt


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
    if isinstance(seed, torch.Tensor):
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


class Noise:
    """The Gumbel noise g(seed, stream, position, token) of the next positions of every row.

    Making it costs a hundred small tensor operations, so it is made a block of positions at a time, ahead of need, and
    lives on from step to step in a ring: position p lies in slot p % window. It depends on the counters alone, so when
    it is made never matters.
    """

    BLOCK = 64  # positions made at once: enough for two threads at a vocabulary of 4096
    MEMORY = 1 << 22  # elements made at once, unless one position of every row takes more

    def __init__(
        self,
        ops: ModuleType,
        seeds: list[int],
        streams: list[int],
        vocab_size: int,
        reach: int,
        limits: list[int],
        device: torch.device,
        past: int = 0,
    ):
        """reach: positions that a step needs; limits: the position of each row from which on none is ever chosen;
        past: positions that are kept behind."""
        self.ops, self.vocab_size, self.reach, self.limits = ops, vocab_size, reach, limits
        self.seeds = torch.tensor(seeds, device=device)
        self.streams = torch.tensor(streams, device=device)
        self.block = max(1, min(self.BLOCK, self.MEMORY // (vocab_size * len(seeds))))
        self.window, self.past = past + reach + self.block, past
        self.values = torch.zeros(len(seeds), self.window, vocab_size, device=device)
        self.host = self.values.cpu().numpy()  # on a CPU the same memory
        self.lengths: list[int] = []
        self.made: list[int] = []  # the first position of each row that is not made yet

    def advance(self, lengths: list[int]) -> None:
        """Makes positions lengths .. lengths + reach - 1 of every row available."""
        self.lengths = lengths
        self.made = self.made or list(lengths)
        needed = [min(n + self.reach, limit) for n, limit in zip(lengths, self.limits, strict=True)]
        while rows := [row for row, need in enumerate(needed) if self.made[row] < need]:
            count = min(self.block, max(self.limits[row] - self.made[row] for row in rows))
            which = torch.tensor(rows, device=self.seeds.device)
            starts = torch.tensor([self.made[row] for row in rows], device=self.seeds.device)
            positions = starts[:, None] + torch.arange(count, device=self.seeds.device)
            fresh = self.ops.gumbel_noise(self.seeds[which], self.streams[which], positions, self.vocab_size)
            slots = which[:, None], positions % self.window
            self.values[slots] = fresh
            if self.values.device.type != "cpu":
                self.host[tuple(part.cpu().numpy() for part in slots)] = fresh.cpu().numpy()
            for row in rows:
                self.made[row] += count

    def at(self, depths: list[list[int]]) -> NoiseAt:
        """For the nodes of a pass at depths [B][N]: a node of depth d chooses the token d past the row's length."""
        index = [[self._slot(n, depth) for depth in row] for n, row in zip(self.lengths, depths, strict=True)]
        return NoiseAt(self.values, torch.tensor(index, device=self.seeds.device))

    def _slot(self, length: int, depth: int) -> int:
        """Nodes outside the reach (the catch-up token, drafted nodes deeper than any tree of this size) can never be
        accepted: any noise does for them."""
        return (length + min(max(depth, -self.past), self.reach - 1)) % self.window

    def of(self, row: int, depths: list[int], tokens: list[int]) -> list[float]:
        """The noise of single tokens below nodes of one row."""
        # Read one by one from host memory: on a CPU that is a view, and far cheaper than a gather of a few numbers.
        values, length = self.host[row], self.lengths[row]
        return [float(values[self._slot(length, depth), token]) for depth, token in zip(depths, tokens, strict=True)]
