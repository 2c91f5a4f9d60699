"""The Gumbel noise of token choice, from counters (Philox), in plain torch."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from stagedspec.kernels.state.host import Batch, Sequences


def philox(counters: tuple[torch.Tensor, ...], keys: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words: 4 counters, 2 keys -> 4 words.

    The 64-bit products wrap in int64, which leaves their bits right. Only what is multiplied next must be cut to 32
    bits, and that also drops the sign that a shift draws in.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counters
    k0, k1 = keys
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (high >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(mask), high
        c2, c3 = (low >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(mask), low
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1 & mask, c2, c3 & mask


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Uniform 32-bit words (integers, or rounded to fp32) to standard Gumbel noise, fp32, always finite.

    The exponential -log(1 - v) is built from v near 0, where fp32 is fine-grained: the winners of an argmax over
    a large vocabulary come from there, and 24-bit uniforms near 1 would make them collide.
    """
    v = ((words.float() + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(seeds: torch.Tensor, streams: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The noise g(seed, stream, position, token) of every token: seeds, streams [B], positions [B, P] -> [B, P, V].

    Counter (token // 4, position, stream, 0), key the seed's low and high word; word token % 4 is the token's.
    """
    quads = torch.arange((vocab_size + 3) // 4, device=seeds.device)
    shape = (*positions.shape, len(quads))
    mask = 0xFFFFFFFF
    counters = (
        quads.expand(shape),
        (positions & mask)[..., None].expand(shape),
        (streams & mask)[:, None, None].expand(shape),
        torch.zeros((), dtype=torch.long, device=seeds.device).expand(shape),
    )
    keys = ((seeds & mask)[:, None, None], ((seeds >> 32) & mask)[:, None, None])
    return gumbel(torch.stack(philox(counters, keys), -1).flatten(-2))[..., :vocab_size]


@dataclass(frozen=True)
class NoiseAt:
    """The noise of every node of a pass: values [B, P, V] of P positions, and the position [B, N] of each node."""

    values: torch.Tensor
    index: torch.Tensor

    def rows(self) -> torch.Tensor:
        """Where each node's noise lies among all rows of noise, values.flatten(0, 1): [B, N]."""
        batch, positions, _ = self.values.shape
        if batch == 1:
            return self.index
        return self.index + torch.arange(0, batch * positions, positions, device=self.index.device)[:, None]

    def at_nodes(self, nodes: torch.Tensor) -> "NoiseAt":
        """Of one node [B] of each row."""
        return replace(self, index=self.index.gather(1, nodes[:, None]))

    def of(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """The noise of tokens [B, N, K], or of the whole vocabulary: [B, N, K or V]."""
        rows, vocab_size = self.rows(), self.values.shape[-1]
        if tokens is None:
            return self.values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return self.values.take((rows * vocab_size)[..., None] + tokens)


class Noise:
    """The Gumbel noise g(seed, stream, position, token) of the next positions of every row.

    Computing it takes a hundred small tensor operations, so it is computed for a block of positions at a time, ahead of
    need, and kept in a ring: position p lies in slot p % window. It depends on the counters alone, so it does not
    matter when it is computed.
    """

    BLOCK = 64  # positions made at once: enough for two threads at a vocabulary of 4096
    MEMORY = 1 << 22  # elements made at once, unless one position of every row takes more
    make = staticmethod(gumbel_noise)

    def __init__(
        self,
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
        self.vocab_size, self.reach, self.limits = vocab_size, reach, list(limits)
        self.seeds = torch.tensor(seeds, device=device)
        self.streams = torch.tensor(streams, device=device)
        self.block = max(1, min(self.BLOCK, self.MEMORY // (vocab_size * len(seeds))))
        self.window, self.past = past + reach + self.block, past
        self.values = torch.zeros(len(seeds), self.window, vocab_size, dtype=torch.float32, device=device)
        self.host = self.values.cpu().numpy()  # on a CPU the same memory
        self.lengths: list[int] = []
        self.made: list[int] = []  # the first position of each row that is not made yet

    def replace(self, index: int, seed: int, stream: int, start: int, limit: int) -> None:
        """Begins a row anew: another seed and stream, for the positions from `start` to before `limit`."""
        self.seeds[index], self.streams[index], self.limits[index] = seed, stream, limit
        if self.made:
            self.made[index] = start

    def remove(self, index: int) -> None:
        """Leaves row `index` out; the last row takes its place."""
        for held in (self.limits, self.made):
            if held:
                held[index] = held[-1]
                del held[-1]
        if index < len(self.values) - 1:
            self.seeds[index], self.streams[index], self.values[index] = (
                self.seeds[-1],
                self.streams[-1],
                self.values[-1],
            )
            self.host[index] = self.host[-1]  # on a CPU that is done
        self.seeds, self.streams = self.seeds[:-1], self.streams[:-1]
        self.values, self.host = self.values[:-1], self.host[:-1]

    def advance(self, sequences: Sequences) -> None:
        """Makes the positions that a step of the sequences can choose for available."""
        self.lengths = lengths = sequences.lengths
        self.made = self.made or list(lengths)
        needed = [min(n + self.reach, limit) for n, limit in zip(lengths, self.limits, strict=True)]
        while rows := [row for row, need in enumerate(needed) if self.made[row] < need]:
            count = min(self.block, max(self.limits[row] - self.made[row] for row in rows))
            which = torch.tensor(rows, device=self.seeds.device)
            starts = torch.tensor([self.made[row] for row in rows], device=self.seeds.device)
            positions = starts[:, None] + torch.arange(count, device=self.seeds.device)
            fresh = self.make(self.seeds[which], self.streams[which], positions, self.vocab_size)
            slots = which[:, None], positions % self.window
            self.values[slots] = fresh
            if self.values.device.type != "cpu":
                self.host[tuple(part.cpu().numpy() for part in slots)] = fresh.cpu().numpy()
            for row in rows:
                self.made[row] += count

    def at(self, batch: Batch) -> NoiseAt:
        """For the nodes of a pass: a node of depth d chooses the token d past the row's length."""
        ahead = np.minimum(np.maximum(batch.depths, -self.past), self.reach - 1)
        index = (np.array(self.lengths)[:, None] + ahead) % self.window
        return NoiseAt(self.values, torch.from_numpy(index).to(self.seeds.device))

    def _slot(self, length: int, depth: int) -> int:
        """Nodes outside the reach (the catch-up token, drafted nodes deeper than any tree of this size) can never be
        accepted: any noise does for them."""
        return (length + min(max(depth, -self.past), self.reach - 1)) % self.window

    def of(self, row: int, depths: list[int], tokens: list[int]) -> list[float]:
        """The noise of single tokens below nodes of one row."""
        # Read one by one from host memory: on a CPU that is a view, and far cheaper than a gather of a few numbers.
        values, length = self.host[row], self.lengths[row]
        return [float(values[self._slot(length, depth), token]) for depth, token in zip(depths, tokens, strict=True)]
