"""Linears against plain torch in fp64, by the rule that our error is at most twice plain torch's in the same dtype."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import triton
from helpers import GPU
from transformers.activations import ACT2FN

from stagedspec.kernels.common import launch_configs as configs
from stagedspec.kernels.common.constants import HOPPER_SPLIT, MOST_SPLITS
from stagedspec.kernels.common.hopper import SHARED
from stagedspec.kernels.common.registry import Scratch, by_hopper
from stagedspec.kernels.linear import (
    ACTIVATIONS,
    Folded,
    activation_known,
    hopper,
    linear_add,
    norm_linear,
    op,
    row_stats,
    scratch_size,
    stat_tiles,
)
from stagedspec.kernels.linear.kernel import ROWS
from stagedspec.kernels.linear.records import NO_NORM, Epilogue

EPSILON = 1e-5
# Tokens, outputs, inputs: odd, aligned, one split and several, more tokens than a program takes.
# The last two: several splits, and tokens that take turns in shared memory, on Hopper.
SHAPES = [
    *((1, 96, 64), (7, 37, 61), (16, 130, 384), (33, 64, 640), (150, 40, 129), (20, 70, 1100)),
    *((20, 72, 2600), (150, 72, 1288)),
]


def drawn(device, dtype, *shape, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale + shift).to(device, dtype)


def taken(rows, *tensors):
    """These rows of each tensor, the first so many, or all."""
    if rows is None:
        return tensors
    return tuple(t[:rows].contiguous() if isinstance(rows, int) else t[rows] for t in tensors)


class Problem:
    def __init__(self, device, dtype, count, outputs, inputs):
        self.x = drawn(device, dtype, count, inputs, scale=3.0, shift=1.0)
        self.norm = drawn(device, dtype, inputs, shift=1.0), drawn(device, dtype, inputs + 1)[1:].contiguous()
        self.weight = drawn(device, dtype, outputs, inputs, scale=inputs**-0.5)
        self.bias = drawn(device, dtype, outputs)
        self.folded = Folded.of(*self.norm, self.weight, self.bias)
        self.residual = drawn(device, dtype, count, outputs)
        self.scratch = Scratch.of([scratch_size(count, outputs, inputs)], self.x.device)
        self.scratch.partials.fill_(float("nan"))

    def stats(self, x):
        result = torch.full((len(x), stat_tiles(x.shape[1]), 2), float("nan"), device=x.device)
        row_stats(x, result)
        return result

    def normed(self, rows=None, activation="none", out_dtype=None):
        (x,) = taken(rows, self.x)
        out = torch.full((len(x), len(self.weight)), float("nan"), dtype=out_dtype or x.dtype, device=x.device)
        norm_linear(x, self.stats(x), EPSILON, self.folded, activation, out, self.scratch)
        return out

    def added(self, rows=None):
        x, out = taken(rows, self.x, self.residual.clone())
        stats = torch.full((len(x), stat_tiles(out.shape[1]), 2), float("nan"), device=x.device)
        linear_add(x, self.weight, self.bias, out, out, stats, self.scratch)
        return out, stats

    def plain(self, dtype=None, activation="none"):
        x, gain, shift, weight, bias = (
            t if dtype is None else t.to(dtype) for t in (self.x, *self.norm, self.weight, self.bias)
        )
        y = F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, EPSILON), weight, bias)
        return y if activation in ("none", "linear") else ACT2FN[activation](y)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_linear(device, dtype, shape, error_ratio):
    problem = Problem(device, dtype, *shape)
    assert error_ratio(problem.normed(), problem.plain(), problem.plain(torch.float64)) <= 2
    wide = problem.normed(out_dtype=torch.float32)
    assert error_ratio(wide, problem.plain(), problem.plain(torch.float64)) <= 2
    assert not problem.scratch.counters.any()


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
def test_activations(device, name, error_ratio):
    """Each by its name in transformers."""
    problem = Problem(device, torch.float32, 5, 70, 33)
    exact = problem.plain(torch.float64, name)
    assert error_ratio(problem.normed(activation=name), problem.plain(activation=name), exact) <= 2
    assert activation_known(name) and not activation_known("prelu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_add(device, dtype, shape, error_ratio):
    """In place, and with the statistics of what was written."""
    problem = Problem(device, dtype, *shape)
    out, stats = problem.added()
    x, weight, bias, residual = (t.double() for t in (problem.x, problem.weight, problem.bias, problem.residual))
    plain = problem.residual + F.linear(problem.x, problem.weight, problem.bias)
    assert error_ratio(out, plain, residual + F.linear(x, weight, bias)) <= 2
    for tile, values in enumerate(out.double().split(64, 1)):
        torch.testing.assert_close(stats[:, tile, 0].double(), values.sum(1), rtol=1e-4, atol=1e-4)
        apart = (values - values.mean(1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(stats[:, tile, 1].double(), apart, rtol=1e-4, atol=1e-4)


def test_mean_far_from_zero(device):
    """Statistics are merged around each tile's own mean: a large common offset costs no digits of the variance."""
    problem = Problem(device, torch.float32, 3, 40, 300)
    problem.x += 4096.0
    torch.testing.assert_close(problem.normed(), problem.plain(torch.float64).float(), rtol=2e-3, atol=2e-3)


def test_mean_far_from_zero_in_half_precision(device, error_ratio):
    """What is taken off for the mean is that of the rounded weight: its rounding is not multiplied by the mean."""
    problem = Problem(device, torch.float16, 3, 40, 128)
    problem.x += 100.0
    assert error_ratio(problem.normed(), problem.plain(), problem.plain(torch.float64)) <= 2


# The last: two tiles of outputs and splits that are not even. On Hopper, x takes turns in shared memory at 64 tokens of
# 1600 columns. At 20 and more tokens of 1280, and of 2400 without a norm (in blocks of 64), it comes to where weights
# were.
@pytest.mark.parametrize("shape", [(40, 192), (40, 640), (40, 1280), (40, 1600), (72, 2400 if GPU else 700)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(device, dtype, shape, fixed_order):
    problem = Problem(device, dtype, 150, *shape)
    normed, (added, stats) = problem.normed(), problem.added()
    elsewhere = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    for rows in (1, 2, 7, 16, 20, 33, 64, elsewhere, torch.tensor([70]), torch.tensor([149, 3])):
        assert torch.equal(problem.normed(rows), *taken(rows, normed)), rows
        some, known = problem.added(rows)
        assert torch.equal(some, *taken(rows, added)) and torch.equal(known, *taken(rows, stats)), rows


def test_settings_change_no_bit(device, dtype, fixed_order):
    problem = Problem(device, dtype, 20, 70, 640)
    normed, (added, stats) = problem.normed(), problem.added()
    shape = dtype.itemsize, op.token_tile(20, dtype.itemsize), 70, 640
    default, *others = op.candidates(shape, device)
    for settings in others:
        if device.type == "cpu" and settings["BLOCK_K"] != default["BLOCK_K"]:
            continue  # the interpreter sums a block and then adds it, where matrix instructions go on summing
        with configs.trying("linear", shape, settings):
            assert torch.equal(problem.normed(), normed), settings
            some, known = problem.added()
        assert torch.equal(some, added) and torch.equal(known, stats), settings


@pytest.mark.parametrize("count", [9, 20, 64, 130] if GPU else [9])
def test_settings_on_hopper_change_no_bit(device, dtype, count):
    """Where the Hopper kernel serves; there is nothing to choose elsewhere. The columns are split, too."""
    problem = Problem(device, dtype, count, 72, 2400)
    normed, (added, stats) = problem.normed(), problem.added()
    shape = hopper.padded(count), 72, 2400
    for settings in hopper.candidates(shape, device)[1:]:
        with configs.trying("linear_hopper", shape, settings):
            assert torch.equal(problem.normed(), normed), settings
            some, known = problem.added()
        assert torch.equal(some, added) and torch.equal(known, stats), settings


def test_opcheck(device):
    problem = Problem(device, torch.float32, 3, 40, 130)
    out, stats = problem.residual.clone(), torch.zeros(3, 3, 2, device=device)
    scratch = problem.scratch
    torch.library.opcheck(op._stats_op, (problem.x, stats))
    known = problem.stats(problem.x)
    weight, sums, bias = problem.folded.weight, problem.folded.sums, problem.folded.bias
    torch.library.opcheck(
        op._op,
        (problem.x, known, sums, EPSILON, weight, bias, 3, None, out, None, scratch.partials, scratch.counters),
    )
    more = torch.zeros(3, 1, 2, device=device)
    torch.library.opcheck(
        op._op,
        (problem.x, None, None, 0.0, problem.weight, problem.bias, 0, problem.residual, out, more,
         scratch.partials, scratch.counters),
    )  # fmt: skip


def test_errors(device):
    problem = Problem(device, torch.float32, 3, 40, 130)
    x, known, layer = problem.x, problem.stats(problem.x), problem.folded
    out = torch.zeros(3, 40, device=device)

    def run(**changes):
        values = {
            "x": x, "stats": known, "epsilon": EPSILON, "layer": layer, "activation": "none", "out": out,
            "scratch": problem.scratch,
        }  # fmt: skip
        norm_linear(**values | changes)

    wrong = {
        r"x must have the shape \[any, any\], got \[390\]": {"x": x.flatten()},
        r"1 to 1024 rows, got 0": {"x": x[:0], "stats": known[:0], "out": out[:0]},
        r"1 to 1024 rows, got 1025; split it": {
            name: torch.zeros(1025, *shape, device=device)
            for name, shape in (("x", (130,)), ("stats", (3, 2)), ("out", (40,)))
        },
        r"weight must have the shape \[any, 130\], got \[130, 40\]": {"layer": replace(layer, weight=layer.weight.t())},
        r"weight must be contiguous": {"layer": replace(layer, weight=layer.weight.t().contiguous().t())},
        r"weight must be torch.float32, got torch.float16": {"layer": replace(layer, weight=layer.weight.half())},
        r"bias must have the shape \[40\], got \[39\]": {"layer": replace(layer, bias=layer.bias[1:])},
        r"sums must be torch.float32, got torch.float64": {"layer": replace(layer, sums=layer.sums.double())},
        r"stats must have the shape \[3, 3, 2\]": {"stats": known[:, :2]},
        r"out must be torch.float32 or torch.float32, got torch.float16": {"out": out.half()},
        r"activation must be one of none, .* got 'prelu'": {"activation": "prelu"},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            run(**changes)
    with pytest.raises(ValueError, match=r"linear_add: bias must have the shape \[40\], got \[39\]"):
        linear_add(x, problem.weight, problem.bias[1:], problem.residual, out, None, problem.scratch)
    with pytest.raises(ValueError, match=r"linear_add: bias must be torch.float32, got torch.float64"):
        linear_add(x, problem.weight, problem.bias.double(), problem.residual, out, None, problem.scratch)
    big = Problem(device, torch.float32, 3, 40, 640)
    small = Scratch.of([(1, 1)], device)
    with pytest.raises(ValueError, match=r"scratch must hold .* see scratch_size"):
        linear_add(big.x, big.weight, big.bias, big.residual, big.residual, None, small)


def test_hopper_has_room():
    """Every block of x has a slot, or the place of weights that are in registers, or takes turns in three slots at
    least, at every width it serves; every block of weights is asked for; parts begin at the same columns for any number
    of tokens."""
    assert not by_hopper(2, 640, torch.device("cpu"))
    for inputs in range(8, HOPPER_SPLIT * MOST_SPLITS + 1, 8):
        splits, part = hopper.splits_of(inputs)
        assert splits <= triton.cdiv(inputs, HOPPER_SPLIT) <= MOST_SPLITS
        assert (splits == 1) == (inputs <= hopper.WHOLE)
        for count, norm in product((1, 9, 20, 40, 200), (False, True)):
            chosen = hopper.settings(min(64, hopper.padded(count)), inputs, norm=norm)
            length, slots, held = chosen["SPLIT_K"], chosen["SLOTS"], chosen["HELD"]
            assert chosen["SPLITS"] == splits and length * splits >= inputs and (splits == 1 or length == part)
            blocks, rest = divmod(length, chosen["BLOCK_K"])
            assert rest == 0 and (held + slots == blocks or (held == 0 and 3 <= slots < blocks))
            assert held * chosen["BLOCK_K"] <= hopper.MOST_HELD and chosen["TOKENS"] <= ROWS
            assert 0 < chosen["ASKED"] <= blocks and held + chosen["ASKED"] >= blocks == chosen["WEIGHT_SLOTS"]
            elements = length * ROWS + slots * chosen["BLOCK_K"] * chosen["TOKENS"]
            assert elements * 2 + (blocks + held + slots) * 8 <= SHARED


def test_hopper_refuses_more_than_32_bits_can_place():
    x, weight = torch.empty(1024, 5120, device="meta"), torch.empty(2**19, 5120, device="meta")
    with pytest.raises(ValueError, match=r"under 2\*\*31, got 1024 x 524288 x 4; give fewer rows"):
        hopper.launch(x, NO_NORM, weight, Epilogue(None, 0, None), x, None, Scratch.of([], torch.device("cpu")))


@pytest.mark.parametrize("count", [20, 64] if GPU else [9])
def test_weights_of_programs_that_start_late_are_fetched_early(device, dtype, count, monkeypatch):
    """On Hopper: two of four programs are late, and their last rows and columns do not exist. No bit changes."""
    problem = Problem(device, dtype, count, 72, 2400)
    before = problem.normed(), *problem.added()
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 2400 // 64 + 3)
    assert hopper.late(72, 2400, hopper.settings(64, 2400)) == 2
    assert all(map(torch.equal, (problem.normed(), *problem.added()), before))


def test_how_many_programs_start_late():
    """Of GPT-2 L's down-projection, since 80 of 132 multiprocessors have one of the kernel ahead; of others none."""
    assert not hopper.late(1600, 6400, hopper.settings(64, 6400))  # XL's: more than those that could fetch
    late = {tokens: hopper.late(1280, 5120, hopper.settings(tokens, 5120)) for tokens in (8, 16, 32, 64, 128)}
    assert late == {8: 0, 16: 0, 32: 28, 64: 28, 128: 0}
    assert not hopper.late(5120, 1280, hopper.settings(64, 1280)) and not hopper.late(
        1280, 5120, hopper.settings(64, 5120, 2)
    )


@pytest.mark.parametrize("outputs", [200, 64 * op.WIDE])  # kernel.py splits the columns of the first alone
@pytest.mark.parametrize("inputs", [640, 2600, 5120])
def test_hopper_s_parts_have_room_with_any_settings(inputs, outputs):
    splits, _ = hopper.splits_of(inputs)
    for count in range(1, op.MAX_TOKENS + 1):
        partials, counters = scratch_size(count, outputs, inputs)
        shape = hopper.padded(count), outputs, inputs
        for tried in hopper.candidates(shape, torch.device("cpu")):
            tokens, groups = tried["TOKENS"], tried["GROUPS"]
            chosen = hopper.settings(tokens, inputs, groups)
            assert (chosen["TOKENS"], chosen["GROUPS"], chosen["SPLITS"]) == (tokens, groups, splits)
            if splits > 1:
                tiles = triton.cdiv(outputs, groups * ROWS) * triton.cdiv(count, tokens)
                assert tiles <= counters and splits * count * outputs <= partials


@pytest.mark.parametrize(("tokens", "groups"), [(128, 2), (128, 1), (64, 2)])
def test_hopper_s_rings_have_room(tokens, groups):
    """Operands that take turns: at least two blocks of each, parts as long as those of any other program."""
    for inputs in range(8, HOPPER_SPLIT * MOST_SPLITS + 1, 8):
        splits, part = hopper.splits_of(inputs)
        chosen = hopper.settings(tokens, inputs, groups)
        assert chosen["SPLITS"] == splits and chosen["SPLIT_K"] == part and part % chosen["BLOCK_K"] == 0
        slots = chosen["SLOTS"]
        assert chosen["WEIGHT_SLOTS"] == slots >= min(2, part // chosen["BLOCK_K"])
        elements = slots * chosen["BLOCK_K"] * (tokens + groups * ROWS)
        assert elements * 2 + slots * 16 <= SHARED


def test_hopper_refuses_settings_that_it_has_no_scratch_for():
    x, weight = torch.zeros(20, 64, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16)
    part, out = torch.zeros(16), torch.zeros(20, 16, dtype=torch.bfloat16)
    with (
        configs.trying("linear_hopper", (32, 16, 64), {"TOKENS": 8, "GROUPS": 1}),
        pytest.raises(ValueError, match="no such settings"),
    ):
        hopper.launch(x, op.NO_NORM, weight, op.Epilogue(None, 0, None), out, None, Scratch(part, part))


@pytest.mark.parametrize(("x_from", "stats_from"), [(1, 0), (0, 1)])
def test_hopper_refuses_views(x_from, stats_from):
    x = torch.zeros(65, dtype=torch.bfloat16)[x_from:][:64].view(1, 64)
    stats = torch.zeros(3)[stats_from:][:2].view(1, 1, 2)
    rest = [torch.zeros(16, dtype=torch.float32) for _ in range(4)]
    weight, out = torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must start at a multiple of"):
        norm, epilogue = op.Norm(stats, rest[0], 1e-5), op.Epilogue(rest[1], 0, None)
        hopper.launch(x, norm, weight, epilogue, out, None, Scratch(rest[2], rest[3]))
