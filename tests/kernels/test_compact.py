import pytest
import torch

from stagedspec.kernels import reference
from stagedspec.kernels.compact import _op, compact


def make(device, dtype, layers=3, batch=2, rows=21, heads=3, size=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(layers, batch, rows, 2, heads, size, generator=generator).to(device, dtype)


def moved(cache, offset, *rows):
    """The cache as the reference moves it, whose pairs are all to be moved."""
    expected = cache.clone()
    reference.move_rows(expected, offset, [[pair for pair in row if min(pair) >= 0] for row in rows])
    return expected


def pairs(device, *rows):
    """One list of (source, target) a sequence, filled up with -1."""
    count = max(map(len, rows))
    filled = [list(row) + [(-1, -1)] * (count - len(row)) for row in rows]
    source, target = torch.tensor(filled, dtype=torch.int32, device=device).unbind(-1)
    return source.contiguous(), target.contiguous()


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(([(0, 9), (2, 10), (5, 11)], [(1, 20)]), id="ragged"),
        pytest.param(([], [(0, 8)]), id="nothing in one"),
        pytest.param(([(-1, 9), (3, -1), (4, 12)], [(7, 8)]), id="holes"),
        pytest.param(([(0, 1), (1, 0), (2, 3), (3, 4)], [(5, 5)]), id="overlapping"),
        pytest.param(([(i, 20 - i) for i in range(8)], [(i + 1, i) for i in range(20)]), id="many"),
    ],
)
def test_moves_like_the_reference(device, dtype, rows):
    cache = make(device, dtype)
    expected = moved(cache, 0, *rows)
    compact(cache, *pairs(device, *rows))
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("heads, size", [(20, 64), (3, 32), (1, 1), (5, 40)])
def test_any_width(device, dtype, heads, size):
    cache, rows = make(device, dtype, 2, 1, 12, heads, size), [(0, 8), (3, 9), (4, 11)]
    expected = moved(cache, 0, rows)
    compact(cache, *pairs(device, rows))
    assert torch.equal(cache, expected)


def test_targets_behind_an_offset(device, dtype):
    """And the most rows that can be moved."""
    cache, rows = make(device, dtype, 2, 1, 300, 1, 4), [(row, 255 - row) for row in range(256)]
    expected = moved(cache, 40, rows)
    compact(cache, *pairs(device, rows), 40)
    assert torch.equal(cache, expected)


def test_rows_that_do_not_move_are_not_read(device):
    cache = torch.full((1, 1, 6, 2, 1, 4), torch.nan, device=device)
    cache[:, :, 2] = 1.0
    compact(cache, *pairs(device, [(2, 5), (-1, 0)]))
    assert (cache[:, :, [2, 5]] == 1.0).all() and cache[:, :, [0, 1, 3, 4]].isnan().all()


def test_opcheck(device):
    torch.library.opcheck(_op, (make(device, torch.float32), *pairs(device, [(0, 9)], [(1, 8), (2, 9)]), 0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cache": torch.zeros(2, 1, 4, 3, 1, 4)}, "cache must have the shape"),
        ({"cache": torch.zeros(2, 1, 4, 2, 1, 4, dtype=torch.int32)}, "cache must be"),
        ({"cache": torch.zeros(2, 1, 4, 2, 4, 3).mT}, "contiguous"),
        ({"source": torch.zeros(1, 3)}, "source must be torch.int32"),
        ({"target": torch.zeros(1, 2, dtype=torch.int32)}, r"target must have the shape \[1, 3\]"),
        ({name: torch.zeros(1, 0, dtype=torch.int32) for name in ("source", "target")}, "1 to 256 rows"),
        ({name: torch.zeros(1, 257, dtype=torch.int32) for name in ("source", "target")}, "1 to 256 rows"),
    ],
)
def test_errors_name_what_was_expected(device, change, message):
    arguments = {"cache": torch.zeros(2, 1, 4, 2, 1, 4)}
    arguments |= {name: torch.zeros(1, 3, dtype=torch.int32) for name in ("source", "target")} | change
    with pytest.raises(ValueError, match=message):
        compact(**{name: value.to(device) for name, value in arguments.items()})
