"""The compiled noise against the one in plain torch: the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec.kernels import reference
from stagedspec.kernels.backends import torch_backend
from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.kernels.compiled import noise

CPU = torch.device("cpu")
WORDS = st.integers(-(2**63), 2**63 - 1)


@given(
    seeds=st.lists(WORDS, min_size=1, max_size=3), position=st.integers(0, 2**33), stream=st.integers(0, 2**31),
    vocabulary=st.integers(1, 70),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_bits_of_the_reference(seeds, position, stream, vocabulary):
    seeds = torch.tensor(seeds)
    streams = torch.arange(len(seeds)) + stream
    positions = position + torch.arange(4).expand(len(seeds), 4)
    arguments = seeds, streams, positions, vocabulary
    found, expected = noise.gumbel_noise(*arguments), reference.gumbel_noise(*arguments)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_large_vocabulary():
    arguments = torch.tensor([2**40 + 3]), torch.tensor([5]), torch.tensor([[7, 1000]]), 50257
    assert torch.equal(noise.gumbel_noise(*arguments), reference.gumbel_noise(*arguments))


@pytest.mark.parametrize("numba", [True, False])
def test_where_it_is_used(monkeypatch, numba):
    if not numba:
        monkeypatch.setattr(torch_backend, "_compiled_noise", lambda: None)
    made = TorchBackend().make_noise([1], [0], 11, 2, [5], CPU)
    assert type(made) is (noise.Noise if numba else reference.Noise)
