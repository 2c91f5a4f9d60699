"""Choosing over logits in memory: equal to the reference on explicit noise; distributed as it must be on its own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec.kernels import reference
from stagedspec.kernels.choose import op as kernels
from stagedspec.kernels.common.launch_configs import trying
from stagedspec.kernels.common.registry import Scratch

pytestmark = pytest.mark.interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARPERS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.83},
    "min_p": {"min_p": 0.07},
    "top_k-top_p": {"temperature": 1.3, "top_k": 40, "top_p": 0.77},
    "all": {"temperature": 0.9, "top_k": 20, "top_p": 0.93, "min_p": 0.02},
}


def counters(batch, nodes, seed=7):
    return (
        torch.full((batch,), seed, device=DEVICE),
        torch.arange(batch, dtype=torch.int32, device=DEVICE),
        (torch.arange(batch * nodes, dtype=torch.int32, device=DEVICE) % 11 + 3).view(batch, nodes),
    )


def scratch_for(rows, vocab_size):
    scratch = Scratch.of([kernels.scratch_size(rows, vocab_size)], DEVICE)
    scratch.partials.fill_(torch.nan)
    return scratch


def choose(logits, batch=1, at=None, **settings):
    rows, vocab_size = logits.shape
    scratch = scratch_for(rows, vocab_size)
    out = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    at = at or counters(batch, rows // batch)
    kernels.choose(logits, *at, **settings, out=out, scratch=scratch)
    assert not scratch.counters.any(), "counters are zero between kernels"
    return out


def warping(settings):
    none = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    return none | {key: value or None for key, value in settings.items()}


def exact_warp(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The rule by sorting, in fp64, a row at a time: the kept tokens [M, V], and whether a threshold is too close."""
    kept = torch.zeros_like(logits, dtype=torch.bool)
    close = torch.zeros(len(logits), dtype=torch.bool)
    for row, values in enumerate((logits.cpu() / temperature).double()):
        alive = values > float("-inf")
        if 0 < top_k < len(values):
            alive &= values >= values.sort(descending=True).values[top_k - 1]
        if top_p < 1.0:
            masked = values.masked_fill(~alive, float("-inf"))
            ordered, order = masked.sort(stable=True)
            total = ordered.softmax(-1).cumsum(-1)
            drop = total <= 1.0 - top_p
            drop[-1] = False
            close[row] |= bool(((total[:-1] - (1.0 - top_p)).abs() < 2e-6).any())
            alive[order[drop]] = False
        if min_p > 0.0:
            ratio = (values - values.max()).exp()
            close[row] |= bool(((ratio / min_p - 1).abs() < 1e-5)[ratio < 1].any())
            alive &= ratio >= min_p
        kept[row] = alive.to(kept.device)
    return kept, close


@st.composite
def cases(draw):
    size = draw(st.sampled_from([1, 5, 61, 64, 65, 257]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    logits = torch.randn(3, size, generator=generator) * draw(st.sampled_from([0.3, 2.0, 6.0]))
    if draw(st.booleans()):
        logits = logits.round()  # ties
    if draw(st.booleans()):
        logits[torch.rand(3, size, generator=generator) < 0.3] = float("-inf")
        logits[:, size // 2] = 0.0
    noise = torch.randn(3, size, generator=generator)
    if draw(st.booleans()):
        noise = noise.round()  # ties of the sums
    settings = {
        "temperature": draw(st.sampled_from([1.0, 0.3, 1.7])),
        "top_k": draw(st.sampled_from([0, 1, 2, 7, 50, 300])),
        "top_p": draw(st.sampled_from([1.0, 0.999, 0.83, 0.47, 1e-6])),
        "min_p": draw(st.sampled_from([0.0, 1e-4, 0.07, 1.0])),
    }
    return logits.to(DEVICE), noise.to(DEVICE), settings


@given(cases())
@settings(max_examples=60 if DEVICE.type == "cuda" else 20)
def test_choice_on_given_noise_is_the_rules(case):
    """Against the fp64 rule wherever no threshold is within rounding, and there against the torch reference too."""
    logits, noise, options = case
    ours = choose(logits, noise=noise, **options)
    kept, close = exact_warp(logits, **options)
    scores = (logits if options["temperature"] == 1.0 else logits / options["temperature"]) + noise
    expected = scores.masked_fill(~kept, float("-inf")).argmax(-1)
    plain = reference.warp(logits, **warping(options)) + noise
    for row in range(len(logits)):
        if not close[row]:
            assert ours[row] == expected[row] == plain[row].argmax(), (row, options)


@pytest.mark.parametrize("name", ["top_k", "top_p", "top_k-top_p", "all"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_thresholds_of_few_and_of_many(name, ties, monkeypatch):
    """Comparing each candidate with all finds the threshold that the search finds."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 700, generator=generator) * 2
    logits[1, 30:] = float("-inf")  # fewer candidates than top-k asks for
    logits = (logits.round() if ties else logits).to(DEVICE)
    noise = torch.randn(4, 700, generator=generator).to(DEVICE)
    found = []
    for few in (1, 32, 1024):
        monkeypatch.setattr(kernels, "FEW", few)
        found.append(choose(logits, noise=noise, **WARPERS[name]))
    assert all(torch.equal(found[0], other) for other in found[1:])
    kept, close = exact_warp(logits, **WARPERS[name])
    scores = logits / WARPERS[name].get("temperature", 1.0) + noise
    expected = scores.masked_fill(~kept, float("-inf")).argmax(-1)
    assert torch.equal(found[0][~close].long(), expected[~close]) and (~close).sum() >= 3


@pytest.mark.parametrize("name", ["top_p", "min_p"])
@pytest.mark.parametrize("noise", ["given", "made"])
def test_candidates_in_registers_and_in_memory(name, noise, monkeypatch):
    """Tokens depend neither on how many candidates stay in registers, nor on how many are compacted together, nor on
    whether they are taken by fours, where those beside a candidate come along: here one is better and must not win."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 300, generator=generator) * torch.tensor([[0.5], [1.5], [4.0]])
    given = torch.randn(3, 300, generator=generator)
    logits[2, 4:8], given[2, 5] = torch.tensor([20.0, -20.0, -20.0, -20.0]), 99.0
    given = given.to(DEVICE) if noise == "given" else None
    options, found = WARPERS[name] | {"temperature": 0.9}, []
    for wide, setting in ((1, {}), (4, {}), (1, {"block": 16}), (4, {"block": 16}), (4, {"span": 1, "block": 128})):
        monkeypatch.setattr(kernels, "WIDE", wide)
        with trying("choose", (300,), setting):
            found.append(choose(logits.to(DEVICE), noise=given, **options))
    assert all(torch.equal(found[0], other) for other in found[1:])
    kept, close = exact_warp(logits, **options)
    made = reference.gumbel_noise(*(part.long() for part in counters(1, 3)), 300)[0]
    scores = logits.to(DEVICE) / options["temperature"] + (made if given is None else given)
    expected = scores.masked_fill(~kept.to(DEVICE), float("-inf")).argmax(-1)
    assert not close.any(), "choose another seed"
    assert torch.equal(found[0].long(), expected)


@pytest.mark.parametrize(("size", "kept"), [(5, 3), (7, 4), (333, 167)])
@pytest.mark.parametrize("better", [False, True])
def test_of_tied_tokens_top_p_drops_the_lowest_ids_first(size, kept, better):
    """With and without a better token among them, which is the last that would be dropped."""
    logits, left = torch.zeros(1, size), list(range(size - kept, size))
    if better:
        best = size // 2 - 1
        logits[0, best] = 1e-3
        left = sorted({best, *left[1:]} if best < left[0] else left)
    for wanted in (left[0], left[-1]):
        noise = torch.full((1, size), 9.0)  # for those that must have gone
        noise[0, left] = 0.0
        noise[0, wanted] = 5.0
        assert choose(logits.to(DEVICE), noise=noise.to(DEVICE), top_p=0.5).tolist() == [wanted]
        assert (reference.warp(logits, 1.0, None, 0.5, None) + noise).argmax().item() == wanted


@pytest.mark.parametrize("name", ["top_k", "top_p", "top_k-top_p", "min_p"])
def test_floor_of_many_groups(name):
    """What a floor from the groups' maxima leaves out cannot survive, however the maxima lie."""
    generator = torch.Generator().manual_seed(6)
    size = 64 * 45 + 7
    logits = torch.randn(11, size, generator=generator) * 5
    logits[1] = logits[1] - 90  # all below zero
    logits[2, 1234] = 3e4  # one alone far above the rest
    logits[3, 700:] = torch.finfo(torch.float32).min  # as masked tokens are: the range of maxima overflows
    logits[4, 700:] = float("-inf")
    logits[5] = logits[5, 0]
    logits[6] = logits[6].round()  # ties at every threshold
    logits[7] = logits[7].sort().values
    logits[8, : 64 * 40] = -logits[8, : 64 * 40].abs() * 1e-3  # close together, on both sides of zero
    noise = torch.randn(11, size, generator=generator)
    logits[9], logits[9, ::64], logits[9, 5] = -40.0, -2.2, 0.0  # groups of a single token, a little below the best
    noise[9, 64 * 30] = 9.0
    logits[10], logits[10, 5], logits[10, 64 * 20] = -40.0, 0.0, math.log(WARPERS["min_p"]["min_p"]) + 0.005
    noise[10, 64 * 20] = 9.0  # alone in its group, just within min_p
    options = WARPERS[name]
    kept, close = exact_warp(logits, **options)
    assert not close[[0, 1, 2, 4, 6, 7]].any() or "top_p" in options, "choose another seed"
    ours = choose(logits.to(DEVICE), noise=noise.to(DEVICE), **options).cpu()
    scores = (logits if "temperature" not in options else logits / options["temperature"]) + noise
    expected = scores.masked_fill(~kept, float("-inf")).argmax(-1)
    assert torch.equal(ours[~close].long(), expected[~close])


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("vocab_size", [61, 1003])
def test_choice_by_counters(name, vocab_size):
    """Made noise differs from the reference's by an ulp or two: the same token unless two scores are that close."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(6, vocab_size, generator=generator) * 3).to(DEVICE)
    seeds, streams, positions = counters(2, 3)
    ours = choose(logits, 2, **WARPERS[name])
    noise = reference.gumbel_noise(seeds, streams.long(), positions.long(), vocab_size).flatten(0, 1)
    scores = reference.warp(logits, **warping(WARPERS[name])) + noise
    best = scores.topk(2, -1).values
    sure = best[:, 0] - best[:, 1] > 1e-5
    assert sure.all(), "choose another seed"
    assert torch.equal(ours.long(), scores.argmax(-1))


def test_zeros_of_both_signs_are_equal():
    """The lowest id of the best ones is chosen."""
    for first, second in ((-0.0, 0.0), (0.0, -0.0)):
        logits = torch.full((1, 200), -1.0)
        logits[0, 70], logits[0, 150] = first, second
        assert choose(logits.to(DEVICE), greedy=True).tolist() == [70]


def test_greedy():
    logits = torch.zeros(3, 257, device=DEVICE)
    logits[0, [70, 200]] = 1.0
    logits[1, 256] = 1e-3
    assert choose(logits, greedy=True, temperature=0.5, top_k=3).tolist() == [70, 256, 0]


def g_test(counts, expected):
    """The p-value of counts under expected probabilities."""
    assert counts[expected == 0].sum() == 0, "drew what cannot come up"
    seen = counts > 0
    g = 2 * (counts[seen] * (counts[seen] / (expected[seen] * counts.sum())).log()).sum()
    freedom = torch.tensor(float((expected > 0).sum() - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, g.clamp(min=0) / 2))


@pytest.mark.parametrize("name", ["plain", "top_k-top_p", "min_p"])
def test_frequencies(name):
    rows, rounds = (512, 2) if DEVICE.type == "cpu" else (65536, 16)
    if name != "plain" and DEVICE.type == "cpu":
        rows, rounds = 150, 1
    generator = torch.Generator().manual_seed(2)
    one = torch.randn(1, 13, generator=generator) * 1.5
    options = WARPERS[name] | ({"top_k": 6} if "top_k" in WARPERS[name] else {})
    counts = torch.zeros(13, dtype=torch.float64)
    for seed in range(rounds):
        at = (
            torch.tensor([seed], device=DEVICE),
            torch.tensor([0], dtype=torch.int32, device=DEVICE),
            torch.arange(rows, dtype=torch.int32, device=DEVICE)[None],
        )
        chosen = choose(one.expand(rows, -1).contiguous().to(DEVICE), at=at, **options)
        counts += torch.bincount(chosen.long(), minlength=13).cpu()
    kept, close = exact_warp(one, **options)
    assert not close.any()
    exact = (one / options.get("temperature", 1.0)).double().masked_fill(~kept, float("-inf")).softmax(-1)[0]
    assert g_test(counts, exact) > 1e-4


@pytest.mark.parametrize("name", WARPERS)
def test_rows_do_not_depend_on_each_other(name):
    """Bitwise: alone, and among others."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(7, 321, generator=generator) * 2).to(DEVICE)
    noise = torch.randn(7, 321, generator=generator).to(DEVICE)
    chosen = choose(logits, noise=noise, **WARPERS[name])
    for row in (0, 3, 6):
        one = slice(row, row + 1)
        assert choose(logits[one].clone(), noise=noise[one].clone(), **WARPERS[name])[0] == chosen[row]


def test_opcheck():
    logits = torch.randn(2, 61, device=DEVICE)
    scratch = scratch_for(2, 61)
    scratch.partials.zero_()
    at = counters(1, 2)
    out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for top_k in (0, 5):
        args = (logits, *at, 0.9, top_k, 1.0, 0.0, False, None, out, scratch.partials, scratch.counters)
        torch.library.opcheck(torch.ops.stagedspec.choose.default, args)


BAD = {
    "dtype": ({"logits": torch.zeros(2, 61, dtype=torch.float16)}, "logits must be torch.float32, got torch.float16"),
    "layout": ({"logits": torch.zeros(61, 2).T}, "logits must be contiguous"),
    "positions": ({"positions": torch.zeros(1, 3, dtype=torch.int32)}, r"B \* N = 2 rows, got \[1, 3\]"),
    "seeds": ({"seeds": torch.zeros(1, dtype=torch.int32)}, "seeds must be torch.int64"),
    "out": ({"out": torch.zeros(3, dtype=torch.int32)}, r"out must have the shape \[2\], got \[3\]"),
    "noise": ({"noise": torch.zeros(2, 60)}, r"noise must have the shape \[2, 61\]"),
    "temperature": ({"temperature": 0.0}, "temperature must be above 0"),
    "top_p": ({"top_p": 0.0}, "top_p must be in"),
    "scratch": ({"scratch": Scratch(torch.zeros(4), torch.zeros(4, dtype=torch.int32))}, "scratch must hold"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    changes, message = BAD[case]
    seeds, streams, positions = counters(1, 2)
    args = {
        "logits": torch.zeros(2, 61, device=DEVICE), "seeds": seeds, "streams": streams, "positions": positions,
        "out": torch.zeros(2, dtype=torch.int32, device=DEVICE), "scratch": scratch_for(2, 61),
    }  # fmt: skip
    to_device = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) and value.is_contiguous() else value
        for key, value in changes.items()
    }
    if case == "layout":
        to_device["logits"] = torch.zeros(61, 2, device=DEVICE).T
    if case == "scratch":
        to_device["scratch"] = Scratch.of([(4, 4)], DEVICE)
    with pytest.raises(ValueError, match=message):
        kernels.choose(**(args | to_device))
