"""Philox against published vectors and the reference, bit for bit; the noise within 2 ulp, and Gumbel distributed."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec.kernels import philox, reference

# Known answers of philox4x32-10 from Random123's kat_vectors: counter, key, result.
PHILOX = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


@triton.jit
def words_kernel(p_in, p_out, n, BLOCK: tl.constexpr):
    """p_in: int64 [6, n], counters and keys; p_out: int64 [4, n]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < n
    c0 = tl.load(p_in + at, real, 0).to(tl.uint32)
    c1 = tl.load(p_in + n + at, real, 0).to(tl.uint32)
    c2 = tl.load(p_in + 2 * n + at, real, 0).to(tl.uint32)
    c3 = tl.load(p_in + 3 * n + at, real, 0).to(tl.uint32)
    k0 = tl.load(p_in + 4 * n + at, real, 0).to(tl.uint32)
    k1 = tl.load(p_in + 5 * n + at, real, 0).to(tl.uint32)
    w0, w1, w2, w3 = philox.philox(c0, c1, c2, c3, k0, k1)
    tl.store(p_out + at, w0.to(tl.int64), real)
    tl.store(p_out + n + at, w1.to(tl.int64), real)
    tl.store(p_out + 2 * n + at, w2.to(tl.int64), real)
    tl.store(p_out + 3 * n + at, w3.to(tl.int64), real)


@triton.jit
def gumbel_kernel(p_words, p_out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(p_words + at, at < n, 0).to(tl.uint32)
    tl.store(p_out + at, philox.gumbel(words), at < n)


@triton.jit
def noise_kernel(p_seeds, p_streams, p_positions, p_tile, p_single, V, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """One program for TOKENS tokens of ROWS rows, both ways."""
    rows = tl.arange(0, ROWS)
    seeds, streams = tl.load(p_seeds + rows), tl.load(p_streams + rows)
    positions = tl.load(p_positions + rows)
    first = tl.program_id(0) * TOKENS
    tokens = first + tl.arange(0, TOKENS)
    at = rows[None, :] * V + tokens[:, None]
    real = tokens[:, None] < V
    tl.store(p_tile + at, philox.gumbel_tile(first, seeds, streams, positions, TOKENS, ROWS), real)
    single = philox.gumbel_at(tokens[:, None], seeds[None, :], streams[None, :], positions[None, :])
    tl.store(p_single + at, single, real)


def ulps(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error in units in the last place, of numbers of at least 1 in magnitude."""
    ours, exact = ours.cpu().double(), exact.cpu().double()
    unit = 2.0 ** (exact.abs().clamp(min=1.0).log2().floor() - 23)
    return float(((ours - exact).abs() / unit).max())


def run_words(inputs: torch.Tensor) -> torch.Tensor:
    out = torch.full((4, inputs.shape[1]), -1, dtype=torch.long, device=inputs.device)
    words_kernel[(triton.cdiv(inputs.shape[1], 64),)](inputs, out, inputs.shape[1], 64)
    return out


@pytest.mark.parametrize("case", PHILOX)
def test_known_answers(case, device):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in PHILOX[case])
    words = run_words(torch.tensor([[word] for word in counter + key], device=device))
    assert words[:, 0].tolist() == expected


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6), min_size=1, max_size=70))
@settings(max_examples=20)
def test_words_are_the_references(values):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = torch.tensor(values, device=device).T.contiguous()
    expected = torch.stack(reference.philox(tuple(inputs[:4]), tuple(inputs[4:])))
    assert torch.equal(run_words(inputs), expected)


def test_gumbel_within_two_ulp(device):
    """All magnitudes of words, both ends included, against fp64 and against the reference."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (40_000,), generator=generator)
    ends = torch.arange(300)
    words = torch.cat((words, words >> (words % 33), 2**32 - 1 - (words >> (words % 33)), ends, 2**32 - 1 - ends))
    ours = torch.full((len(words),), torch.nan, device=device)
    gumbel_kernel[(triton.cdiv(len(words), 1024),)](words.to(device), ours, len(words), 1024)
    assert ours.isfinite().all()
    # The exact noise of the uniform number that fp32 holds: (word + 1/2) / 2^32 after rounding.
    v = ((words.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24).double()
    assert ulps(ours, -(-(-v).log1p()).log()) <= 2
    assert ulps(ours, reference.gumbel(words)) <= 2
    order = words.argsort()
    assert (ours.cpu()[order].diff() <= 3e-7).all(), "noise falls as the word grows"


@pytest.mark.parametrize("vocab_size", [1, 61, 257])
def test_noise_of_counters(vocab_size, device):
    """Tiles of tokens and single tokens are the same bits, and the reference's within 2 ulp."""
    seeds = torch.tensor([0, -1, 2**63 - 1, 1 << 40], device=device)
    streams = torch.tensor([0, 3, 2**31 - 1, 15], dtype=torch.int32, device=device)
    positions = torch.tensor([0, 1023, 5, 2**31 - 1], dtype=torch.int32, device=device)
    tile, single = (torch.full((4, vocab_size), torch.nan, device=device) for _ in range(2))
    noise_kernel[(triton.cdiv(vocab_size, 64),)](seeds, streams, positions, tile, single, vocab_size, 64, 4)
    assert torch.equal(tile, single)
    expected = reference.gumbel_noise(seeds, streams.long(), positions.long()[:, None], vocab_size)[:, 0]
    assert ulps(tile, expected) <= 2


def test_distribution(device):
    count = 200_000 if device.type == "cpu" else 20_000_000
    words = torch.randint(0, 2**32, (count,), device=device)
    ours = torch.empty(count, device=device)
    gumbel_kernel[(triton.cdiv(count, 8192),)](words, ours, count, 8192)
    uniform = torch.exp(-torch.exp(-ours.double())).cpu()  # the distribution function: uniform if this is Gumbel noise
    counts = torch.histc(uniform, 50, 0, 1)
    assert float(((counts - count / 50) ** 2 / (count / 50)).sum()) < 100  # 49 degrees of freedom
