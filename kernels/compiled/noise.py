"""The Gumbel noise of token choice on a CPU: the same bits as `reference.gumbel_noise`, whose integer arithmetic torch
does one operation after the other."""

import numpy as np
import torch

from stagedspec.kernels import reference
from stagedspec.kernels.compiled.build import entry

u32, u64, f32 = np.uint32, np.uint64, np.float32
HALF = u64(32)


@entry
def _words(seeds: np.ndarray, streams: np.ndarray, positions: np.ndarray, words: np.ndarray) -> None:
    """Philox4x32-10 (Salmon et al., SC 2011) of seeds, streams int64 [B], positions int64 [B, P] -> words fp32
    [B, P, Q, 4], word w of counter q, as numbers rounded to fp32."""
    for b in range(positions.shape[0]):
        for p in range(positions.shape[1]):
            for q in range(words.shape[2]):
                c0, c1, c2, c3 = u32(q), u32(positions[b, p]), u32(streams[b]), u32(0)
                k0, k1 = u32(seeds[b]), u32(seeds[b] >> 32)
                for _ in range(10):
                    low, high = u64(c0) * u64(0xD2511F53), u64(c2) * u64(0xCD9E8D57)
                    c0, c1 = u32(high >> HALF) ^ c1 ^ k0, u32(high)
                    c2, c3 = u32(low >> HALF) ^ c3 ^ k1, u32(low)
                    k0, k1 = u32(k0 + u32(0x9E3779B9)), u32(k1 + u32(0xBB67AE85))
                words[b, p, q, 0], words[b, p, q, 1] = f32(c0), f32(c1)
                words[b, p, q, 2], words[b, p, q, 3] = f32(c2), f32(c3)


def gumbel_noise(seeds: torch.Tensor, streams: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """As `reference.gumbel_noise`."""
    words = np.empty((*positions.shape, (vocab_size + 3) // 4, 4), f32)
    _words(seeds.numpy(), streams.numpy(), positions.numpy(), words)
    return reference.gumbel(torch.from_numpy(words).flatten(-2)[..., :vocab_size])


class Noise(reference.Noise):
    """`reference.Noise` of a CPU, made faster."""

    make = staticmethod(gumbel_noise)


def try_out() -> None:
    """Makes noise, which compiles the function for the types of all noise."""
    zeros = torch.zeros(1, 1, dtype=torch.int64, device="cpu")  # whatever the default is
    gumbel_noise(zeros[0], zeros[0], zeros, 1)
