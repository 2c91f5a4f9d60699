"""Sampling is exact: 200,000 draws of a continuation against its enumerated probabilities, by a G-test."""

import itertools
import math

import pytest
import torch
from helpers import g_test, make_draft, make_gpt2, transformers_warp
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec import Decoder, Sampling, TreeConfig
from stagedspec.decoding.sampling import counters
from stagedspec.kernels import reference as ops

SIZE, PROMPT, DRAWS = 5, [3, 0, 4], 204_800

WARPERS = {
    "plain": {},
    "temperature-high": {"temperature": 2.0},
    "temperature-low": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_k-above-vocabulary": {"top_k": 9},
    "top_p": {"top_p": 0.85},
    "min_p": {"min_p": 0.15},
    "top_k-top_p": {"temperature": 1.5, "top_k": 4, "top_p": 0.9},
    "all": {"temperature": 1.3, "top_k": 4, "top_p": 0.95, "min_p": 0.05},
}


@pytest.fixture(scope="module")
def model():
    return make_gpt2(2, vocab_size=SIZE, n_embd=16, n_head=2, initializer_range=0.12)


@pytest.fixture(scope="module")
def conditionals(model):
    """transformers' logits after the prompt and every continuation of up to two tokens: a list by length, [V^n, V]."""
    result = []
    for length in range(3):
        texts = [[*PROMPT, *more] for more in itertools.product(range(SIZE), repeat=length)]
        with torch.no_grad():
            result.append(model(torch.tensor(texts)).logits[:, -1].float())
    return result


@pytest.fixture(scope="module")
def noise():
    """Three positions of 204,800 streams, spread over 64 seeds."""
    seeds = torch.arange(64).repeat_interleave(DRAWS // 64) * 7919 - 5
    streams = torch.arange(DRAWS // 64).repeat(64)
    positions = torch.arange(len(PROMPT), len(PROMPT) + 3).expand(DRAWS, -1)
    return ops.gumbel_noise(seeds, streams, positions, SIZE)


def probabilities(conditionals, length: int, warper: dict) -> torch.Tensor:
    """Of every continuation of `length` tokens [V^length], by transformers' warpers."""
    joint = torch.ones(1, dtype=torch.float64)
    for logits in conditionals[:length]:
        joint = (joint[:, None] * transformers_warp(logits, **warper).double().softmax(-1)).flatten()
    return joint


def draw(conditionals, noise, warper: dict, length: int) -> torch.Tensor:
    """Counts [V^length] of continuations chosen one token after the other, all streams at once."""
    warping = Sampling(do_sample=True, **warper).warping
    state = torch.zeros(len(noise), dtype=torch.long)
    for step, logits in enumerate(conditionals[:length]):
        at = ops.NoiseAt(noise[:, step : step + 1], torch.zeros(len(noise), 1, dtype=torch.long))
        state = state * SIZE + ops.choose(logits[state][:, None], warping, at)[:, 0]
    return torch.bincount(state, minlength=SIZE**length).double()


@pytest.mark.parametrize("name", WARPERS)
def test_distribution_of_continuations(conditionals, noise, name):
    warper = WARPERS[name]
    for length in (2, 3):
        p_value = g_test(draw(conditionals, noise, warper, length), probabilities(conditionals, length, warper))
        assert p_value > 1e-4, (name, length, p_value)


def test_the_g_test_sees_small_errors(conditionals, noise):
    """A temperature that is 5% off, and a warper left out, are found."""
    counts = draw(conditionals, noise, {}, 2)
    assert g_test(counts, probabilities(conditionals, 2, {"temperature": 1.05})) < 1e-4
    counts = draw(conditionals, noise, {"top_k": 4}, 2)
    assert g_test(counts, probabilities(conditionals, 2, {})) < 1e-4
    fair = torch.full((10,), 0.1, dtype=torch.float64)
    assert g_test(torch.full((10,), 1000.0, dtype=torch.float64), fair) > 0.999
    # Chi-square with 1 degree of freedom exceeds 3.841 with probability 0.05; G is close to it for large counts.
    off = math.sqrt(3.841 * 1e6) / 2
    counts = torch.tensor([5e5 + off, 5e5 - off], dtype=torch.float64)
    assert g_test(counts, torch.tensor([0.5, 0.5], dtype=torch.float64)) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "all"])
def test_distribution_end_to_end(model, conditionals, name):
    """Whole generations in staged mode, batches of 16, a bad draft."""
    tree = TreeConfig(nodes=4, depth=2, passes=1, width=1, children=4, prefetch=1, prefetch_width=1)
    decoder = Decoder.from_pretrained(model, draft=make_draft("adversarial", model), device="cpu", dtype="float32")
    counts = torch.zeros(SIZE**2, dtype=torch.float64)
    prompts = torch.tensor([PROMPT] * 16)
    for seed in range(150):
        new = decoder.generate(prompts, max_new_tokens=2, tree=tree, seed=seed, do_sample=True, **WARPERS[name])[
            :, len(PROMPT) :
        ]
        counts += torch.bincount(new[:, 0] * SIZE + new[:, 1], minlength=SIZE**2)
    assert g_test(counts, probabilities(conditionals, 2, WARPERS[name])) > 1e-4


# ---------------------------------------------------------------- requests


@given(st.integers(-(2**63), 2**64 - 1), st.integers(1, 16))
@settings(max_examples=50)
def test_counters(seed, batch):
    seeds, streams = counters(seed, batch)
    assert streams == list(range(batch)) and len(set(seeds)) == 1
    assert seeds[0] % 2**64 == seed % 2**64 and -(2**63) <= seeds[0] < 2**63
    assert counters([seed] * batch, batch) == (seeds, [0] * batch)
    assert counters((seed,) * batch, batch) == (seeds, [0] * batch)


@pytest.mark.parametrize(
    ("seed", "signed"),
    [(2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**63 + 1, -(2**63) + 1), (2**64 - 1, -1), (-(2**63), -(2**63))],
)
def test_counters_at_the_ends_of_64_bits(seed, signed):
    assert counters(seed, 1) == ([signed], [0])


def test_counters_of_tensors():
    assert counters(torch.tensor(7), 3) == ([7, 7, 7], [0, 1, 2])
    assert counters(torch.tensor([7, 8]), 2) == ([7, 8], [0, 0])


BAD_SEEDS = {
    "bool": (True, 1, "integer of 64 bits, got True"),
    "float": (1.5, 1, "integer of 64 bits, got 1.5"),
    "none": (None, 1, "integer of 64 bits, got None"),
    "text": ("7", 1, "integer of 64 bits, got '7'"),
    "too-large": (2**64, 1, "64 bits"),
    "too-small": (-(2**63) - 1, 1, "64 bits"),
    "too-few": ([1, 2], 3, "one a row: expected 3, got 2"),
    "too-many": ([1, 2], 1, "one a row: expected 1, got 2"),
    "list-with-bool": ([1, False], 2, "64 bits, got False"),
    "float-tensor": (torch.tensor([1.0]), 1, "64 bits, got 1.0"),
}


@pytest.mark.parametrize("case", BAD_SEEDS)
def test_bad_seeds(case):
    seed, batch, message = BAD_SEEDS[case]
    with pytest.raises(ValueError, match=message):
        counters(seed, batch)


BAD_SAMPLING = {
    "temperature": [0, -1.0, math.nan, math.inf, "1", True],
    "top_k": [-1, 1.5, "5", True],
    "top_p": [-0.1, math.nan, "0.5", True],
    "min_p": [-0.1, 1.01, math.nan, "0.5", False],
    "do_sample": [2, 0.5, "yes"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SAMPLING.items() for value in values]
)
def test_bad_sampling_values(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value!r}"):
        Sampling(**({"do_sample": True} | {name: value}))


def test_warping_of_a_request():
    assert Sampling(temperature=0.5, top_k=3).warping is None  # greedy
    everything = Sampling(do_sample=True, temperature=2, top_k=0, top_p=1.0, min_p=0.0).warping
    assert everything == {"temperature": 2.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}
    assert Sampling(do_sample=True, top_p=0.0).warping["top_p"] > 0  # as the kernels want it
    off = Sampling(do_sample=True, temperature=None, top_k=None, top_p=1.5, min_p=None)
    assert off.warping == {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": None}
