"""The operations: noise against published vectors, warping against transformers, everything else against loops."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import transformers_warp
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec.decoding.sampling import Sampling, counters
from stagedspec.kernels import reference as ops
from stagedspec.kernels.reference import Noise, layers
from stagedspec.kernels.state.host import GREEDY_SHARPNESS

# ---------------------------------------------------------------- random numbers

# Known answers of philox4x32-10 from Random123's kat_vectors: counter, key, result.
PHILOX = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


@pytest.mark.parametrize("case", PHILOX)
def test_philox_known_answers(case):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in PHILOX[case])
    words = ops.philox(tuple(torch.tensor([w]) for w in counter), tuple(torch.tensor([w]) for w in key))
    assert [int(word) for word in words] == expected


def philox_by_hand(counter, key):
    """Philox4x32-10 in Python integers."""
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize("seed", [0, 7, -1, -(2**63), 2**63 - 1, 2**63 + 5, 2**64 - 1, 1 << 40])
def test_noise_counters(seed):
    """The documented layout: counter (token // 4, position, stream, 0), key the seed's low and high word."""
    (signed,), _ = counters(seed, 1)
    noise = ops.gumbel_noise(torch.tensor([signed]), torch.tensor([3]), torch.tensor([[11, 900]]), 10)[0]
    for place, position in enumerate((11, 900)):
        for token in range(10):
            key = [seed % 2**32, seed % 2**64 >> 32]
            word = philox_by_hand([token // 4, position, 3, 0], key)[token % 4]
            assert noise[place, token] == ops.gumbel(torch.tensor([word]))[0]


def test_gumbel_values():
    words = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    noise = ops.gumbel(words.clone())
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    # -log(-log1p(-v)) with v = (word + 1/2) / 2^32
    exact = -torch.log(-torch.log1p(-(words.double() + 0.5) / 2**32))
    torch.testing.assert_close(noise[:3].double(), exact[:3], rtol=1e-6, atol=1e-6)
    assert noise[-1] <= -2.8  # the far end is cut off at 24 bits, where nothing wins anyway


def test_gumbel_distribution():
    noise = ops.gumbel_noise(torch.arange(50), torch.zeros(50, dtype=torch.long), torch.arange(40).expand(50, -1), 501)
    values = noise.flatten().double()
    assert abs(values.mean() - 0.5772156649) < 0.005
    assert abs(values.var() - torch.pi**2 / 6) < 0.01
    uniform = torch.exp(-torch.exp(-values))  # the distribution function: uniform if this is Gumbel noise
    counts = torch.histc(uniform, 50, 0, 1)
    expected = len(values) / 50
    assert float(((counts - expected) ** 2 / expected).sum()) < 100  # 49 degrees of freedom


def test_noise_depends_on_its_counters_alone():
    positions = torch.tensor([[4, 5, 6], [9, 10, 11]])
    both = ops.gumbel_noise(torch.tensor([1, 2]), torch.tensor([0, 1]), positions, 13)
    assert torch.equal(
        both[1, 1], ops.gumbel_noise(torch.tensor([2]), torch.tensor([1]), torch.tensor([[10]]), 13)[0, 0]
    )
    assert torch.equal(both[..., :5], ops.gumbel_noise(torch.tensor([1, 2]), torch.tensor([0, 1]), positions, 5))
    one = ops.gumbel_noise(torch.tensor([1]), torch.tensor([0]), torch.tensor([[4]]), 13)
    for seed, stream, position in ((2, 0, 4), (1, 1, 4), (1, 0, 5), (1 + 2**32, 0, 4), (-1, 0, 4)):
        other = ops.gumbel_noise(torch.tensor([seed]), torch.tensor([stream]), torch.tensor([[position]]), 13)
        assert not (other == one).any()


@pytest.mark.parametrize("block", [1, 3, 32])
def test_noise_window(block, monkeypatch):
    """`Noise` gives the same values whenever a block was made, and however far it has advanced; not past the limits."""
    monkeypatch.setattr(Noise, "BLOCK", block)
    noise = Noise([5, 5], [0, 1], 7, 4, [26, 99], torch.device("cpu"))
    depths = [[0, 1, 3, -1], [2, 2, 0, 9]]  # depths outside are clamped
    for step in range(12):
        lengths = [3 + 2 * step, 20 + step]
        noise.advance(SimpleNamespace(lengths=lengths))
        values = noise.at(SimpleNamespace(depths=depths)).of()
        for row in range(2):
            for node, depth in enumerate(depths[row]):
                position = torch.tensor([[lengths[row] + min(max(depth, 0), 3)]])
                if position >= noise.limits[row]:
                    continue
                expected = ops.gumbel_noise(torch.tensor([5]), torch.tensor([row]), position, 7)[0, 0]
                assert torch.equal(values[row, node], expected)
                picked = noise.of(row, [min(max(depth, 0), 3)], [6])
                assert picked == [expected[6].item()]
        tokens = torch.tensor([[[1, 4]] * 4, [[6, 0]] * 4])
        assert torch.equal(noise.at(SimpleNamespace(depths=depths)).of(tokens), values.gather(-1, tokens))


# ---------------------------------------------------------------- warping and choosing


@st.composite
def warpings(draw, size):
    return {
        "temperature": draw(st.sampled_from([1.0, 0.3, 0.7, 1.7, 5.0])),
        "top_k": draw(st.one_of(st.none(), st.integers(1, size + 3))),
        "top_p": draw(st.one_of(st.none(), st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6, 1e-9]))),
        "min_p": draw(st.one_of(st.none(), st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0]))),
    }


@st.composite
def logits_of(draw):
    """Rows of logits [3, V]: whole numbers tie often; some are extreme."""
    size = draw(st.integers(1, 12))
    values = draw(
        st.sampled_from([st.integers(-3, 3).map(float), st.floats(-8, 8, width=32), st.sampled_from([-1e4, 0.0, 80.0])])
    )
    return torch.tensor(draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=3, max_size=3)))


@given(st.data())
@settings(max_examples=250)
def test_warp_is_transformers(data):
    logits = data.draw(logits_of())
    warping = data.draw(warpings(logits.shape[-1]))
    ours, theirs = ops.warp(logits, **warping), transformers_warp(logits, **warping)
    assert torch.equal(ours, theirs), (logits, warping, ours, theirs)


@given(st.data())
@settings(max_examples=200)
def test_choose_is_argmax_of_warped_plus_noise(data):
    """With the top-k short cut and without, ties included: the lowest of the best ids."""
    logits = data.draw(logits_of())[None]
    warping = data.draw(warpings(logits.shape[-1]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    values = torch.randn(1, 2, logits.shape[-1], generator=generator)
    if data.draw(st.booleans()):
        values = values.round()  # makes ties of the sums too
    noise = ops.NoiseAt(values, torch.tensor([[0, 1, 1]]))
    sums = transformers_warp(logits[0], **warping) + values[0][[0, 1, 1]]
    expected = [int((row == row.max()).nonzero()[0]) for row in sums]
    assert ops.choose(logits, warping, noise)[0].tolist() == expected


def test_short_cut_over_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 40, 997, generator=generator) * 4
    values = ops.gumbel_noise(torch.tensor([1, 1]), torch.tensor([0, 1]), torch.arange(40).expand(2, -1), 997)
    noise = ops.NoiseAt(values, torch.arange(40).expand(2, -1))
    for warping in (
        {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": None},
        {"temperature": 1.5, "top_k": 100, "top_p": 0.95, "min_p": 0.01},
    ):
        expected = (transformers_warp(logits.flatten(0, 1), **warping).view_as(logits) + values).argmax(-1)
        assert torch.equal(ops.choose(logits, warping, noise), expected)
        assert len(expected.unique()) > 20


@pytest.mark.parametrize("k", [1, 2, 7])
def test_noise_does_not_lift_the_first_token_beyond_the_top_k(k):
    """Exactly k logits are larger than that of the best sum."""
    logits, values = torch.arange(9.0, 0, -1).view(1, 1, 9), torch.zeros(1, 1, 9)
    values[..., k] = 50.0
    warping = {"temperature": 1.0, "top_k": k, "top_p": None, "min_p": None}
    assert ops.choose(logits, warping, ops.NoiseAt(values, torch.tensor([[0]]))).tolist() == [[0]]


def test_greedy_takes_the_lowest_of_tied_ids():
    logits = torch.zeros(1, 2, 9)
    logits[0, 1, [4, 7]] = 1.0
    assert ops.choose(logits, None, None).tolist() == [[0, 4]]


@pytest.mark.parametrize(
    "warpers",
    [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.9}],
    ids=lambda warpers: "-".join(warpers) or "plain",
)
def test_choices_do_not_depend_on_the_other_nodes(warpers):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 30, 41, generator=generator).round()  # some nodes have ties and some have not
    values = torch.randn(1, 30, 41, generator=generator)
    warping = {"temperature": 0.9, "top_k": None, "top_p": None, "min_p": None} | warpers
    noise = ops.NoiseAt(values, torch.arange(30)[None])
    together, children = ops.choose(logits, warping, noise), ops.choose_children(logits, 4, warping, noise)
    for node in range(30):
        one, noise = logits[:, node : node + 1], ops.NoiseAt(values, torch.tensor([[node]]))
        assert ops.choose(one, warping, noise).item() == together[0, node]
        tokens, logprobs = (found[:, 0] for found in ops.choose_children(one, 4, warping, noise))
        possible = logprobs.isfinite()
        assert torch.equal(tokens[possible], children[0][:, node][possible])
        torch.testing.assert_close(logprobs, children[1][:, node], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [None, 6])
def test_choose_children(top_k):
    """The likeliest tokens under softmax(warped + noise), and their log-probabilities; the first is `choose`'s."""
    generator = torch.Generator().manual_seed(0)
    logits, values = torch.randn(2, 5, 23, generator=generator), torch.randn(2, 5, 23, generator=generator)
    index = torch.tensor([[0, 1, 2, 3, 4], [4, 0, 0, 1, 2]])
    warping = {"temperature": 0.7, "top_k": top_k, "top_p": None, "min_p": None}
    noise = ops.NoiseAt(values, index)
    tokens, logprobs = ops.choose_children(logits, 4, warping, noise)
    for row in range(2):
        for node in range(5):
            scores = transformers_warp(logits[row, node][None], 0.7, top_k)[0] + values[row, index[row, node]]
            best = scores.log_softmax(-1).topk(4)
            assert tokens[row, node].tolist() == best.indices.tolist()
            torch.testing.assert_close(logprobs[row, node], best.values.clamp(max=-1e-4), rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens[..., 0], ops.choose(logits, warping, noise))
    tokens, logprobs = ops.choose_children(logits, 50, None, None)  # greedy; more children than tokens
    assert tokens.shape == (2, 5, 23)
    torch.testing.assert_close(
        logprobs, (logits * GREEDY_SHARPNESS).log_softmax(-1).gather(-1, tokens), rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_a_certain_child_is_less_likely_than_its_parent(sampled):
    """A little less: the best nodes must form a tree."""
    logits = torch.tensor([[[30.0, 0.0, 1.0]]])
    noise = ops.NoiseAt(torch.zeros(1, 1, 3), torch.tensor([[0]])) if sampled else None
    warping = Sampling(do_sample=True, top_k=None).warping if sampled else None
    tokens, logprobs = ops.choose_children(logits, 2, warping, noise)
    assert tokens.tolist() == [[[0, 2]]] and logprobs[0, 0, 0] == torch.tensor(-1e-4)


def test_children_that_cannot_come_up():
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    noise = ops.NoiseAt(torch.zeros(1, 1, 4), torch.tensor([[0]]))
    warping = Sampling(do_sample=True, top_k=None, min_p=0.3).warping  # keeps tokens 0 and 1
    tokens, logprobs = ops.choose_children(logits, 4, warping, noise)
    assert tokens[0, 0, :2].tolist() == [0, 1]
    assert logprobs[0, 0, :2].isfinite().all() and (logprobs[0, 0, 2:] == float("-inf")).all()


# ---------------------------------------------------------------- linear layers

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_against_fp64(activation, invariant):
    torch.manual_seed(0)
    x, weight, bias, gain, shift = (
        torch.randn(7, 24),
        torch.randn(37, 24),
        torch.randn(37),
        torch.rand(24),
        torch.rand(24),
    )
    layer = ops.pack_linear(weight, bias, invariant)
    inner = F.layer_norm(x.double(), (24,), gain.double(), shift.double(), 1e-3) @ weight.double().T + bias.double()
    ours = ops.norm_linear(x, gain, shift, 1e-3, layer, activation)
    torch.testing.assert_close(ours.double(), ACTIVATIONS[activation](inner), rtol=1e-5, atol=1e-5)
    residual = torch.randn(7, 37)
    expected = residual.double() + x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(ops.linear_add(x, layer, residual).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 72), (37, 24), (192, 768), (1472, 384), (1280, 1003), (5120, 640)])
def test_a_row_does_not_depend_on_the_batch(shape, dtype):
    """Bitwise: rows alone against the same rows among 2 to 70."""
    torch.manual_seed(0)
    inner, outer = shape
    x, gain, shift = torch.randn(70, inner).to(dtype), torch.rand(inner).to(dtype), torch.rand(inner).to(dtype)
    residual = torch.randn(70, outer).to(dtype)
    layer = ops.pack_linear(torch.randn(outer, inner).to(dtype), torch.randn(outer).to(dtype), invariant=True)
    alone = [ops.norm_linear(x[i : i + 1], gain, shift, 1e-5, layer, "gelu_new") for i in range(70)]
    added = [ops.linear_add(x[i : i + 1], layer, residual[i : i + 1]) for i in range(70)]
    alone, added = torch.cat(alone), torch.cat(added)
    assert alone.dtype == added.dtype == dtype
    for rows in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 70):
        assert torch.equal(ops.norm_linear(x[:rows], gain, shift, 1e-5, layer, "gelu_new"), alone[:rows]), rows
        assert torch.equal(ops.linear_add(x[:rows], layer, residual[:rows]), added[:rows]), rows
        last = ops.norm_linear(x[70 - rows :].contiguous(), gain, shift, 1e-5, layer, "gelu_new")
        assert torch.equal(last, alone[70 - rows :]), rows


@pytest.mark.parametrize("rows", [0, 4])
def test_rows_are_filled_up_or_multiplied_alone(rows, monkeypatch):
    torch.manual_seed(0)
    layer = replace(ops.pack_linear(torch.randn(5, 6), torch.randn(5), invariant=True), rows=rows)
    x, residual, counts = torch.randn(3, 6), torch.randn(3, 5), []
    multiply = layers._multiply
    monkeypatch.setattr(layers, "_multiply", lambda x, *rest: (counts.append(len(x)), multiply(x, *rest))[1])
    y = ops.norm_linear(x, torch.ones(6), torch.zeros(6), 1e-5, layer)
    assert counts == ([4] if rows else [1, 1, 1])
    torch.testing.assert_close(y, multiply(F.layer_norm(x, (6,)), layer, "none"))
    torch.testing.assert_close(ops.linear_add(x, layer, residual), residual + multiply(x, layer, "none"))


def test_the_number_of_rows_is_found(monkeypatch):
    """A multiply that rounds otherwise below so many rows, and one that always does."""
    monkeypatch.setattr(layers, "_known_rows", {})
    multiply = layers._multiply
    for index, (least, found) in enumerate([(1, 1), (2, 2), (3, 4), (5, 8), (99, 0)]):
        monkeypatch.setattr(
            layers,
            "_multiply",
            lambda x, *rest, n=least: multiply(x, *rest) * (1 if len(x) >= n else 1 + 1e-6 * len(x)),
        )
        assert ops.pack_linear(torch.randn(7, 5 + index), None, invariant=True).rows == found


def test_positions_past_the_table_use_its_last_row():
    tokens, positions = torch.randn(7, 4), torch.randn(5, 4)
    ours = ops.embed(tokens, positions, torch.tensor([[6, 0, 2]]), torch.tensor([[4, 5, 99]]))
    assert torch.equal(ours, tokens[[6, 0, 2]] + positions[4])


# ---------------------------------------------------------------- rows of the cache


def test_move_rows():
    torch.manual_seed(0)
    cache = torch.randn(3, 2, 9, 2, 2, 4)
    before = cache.clone()
    moves = [[(0, 1), (3, 2), (1, 3)], [(2, 0)]]
    ops.move_rows(cache, 4, moves)
    expected = before.clone()
    for row, pairs in enumerate(moves):
        for source, position in pairs:
            expected[:, row, 4 + position] = before[:, row, source]
    assert torch.equal(cache, expected)
    ops.move_rows(cache, 4, [[], []])
    assert torch.equal(cache, expected)
    overlapping = [[(0, -3), (1, -4)], []]  # swaps rows 0 and 1 of the tree region: all is read before it is written
    ops.move_rows(cache, 4, overlapping)
    assert torch.equal(cache[:, 0, [0, 1]], expected[:, 0, [1, 0]])
