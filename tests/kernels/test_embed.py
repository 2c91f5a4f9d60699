"""The embedding gather against indexing."""

import inspect

import pytest
import torch

from stagedspec.kernels.embed import _embed, _op, embed
from stagedspec.kernels.linear import row_stats, stat_tiles


@pytest.mark.parametrize("width", [24, 37, 96])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_embed(device, dtype, width, index):
    generator = torch.Generator().manual_seed(width)
    table, places = (torch.randn(n, width, generator=generator).to(device, dtype) for n in (61, 20))
    tokens = torch.randint(0, 61, (3, 5), generator=generator).to(device, index)
    tokens[0, 0], tokens[1, 1] = 61, -1  # outside the table, as the last two positions are
    positions = torch.tensor([[0, 19, 3, 20, -1]] * 3).to(device, index)
    out = torch.full((15, width), float("nan"), dtype=dtype, device=device)
    stats, known = torch.full((2, 15, stat_tiles(width), 2), float("nan"), device=device)
    embed(table, places, tokens, positions, out, stats)
    expected = table[tokens.long().clamp(0, 60)].float() + places[positions.long().clamp(0, 19)].float()
    assert torch.equal(out, expected.to(dtype).flatten(0, 1))
    row_stats(out, known)
    assert torch.equal(stats, known)


def test_nothing_starts_before_it_has_waited():
    """Attention reads what is settled before its own wait: it may, because `embed` comes first in every pass."""
    source = inspect.getsource(_embed.fn)
    assert source.index("gdc_wait()") < source.index("gdc_launch_dependents()")


def test_nothing_is_written_behind_the_last_row(device, dtype):
    """A row that is no power of two wide."""
    room = torch.full((3, 37), 7.0, dtype=dtype, device=device)
    ids = torch.zeros(1, 2, dtype=torch.int32, device=device)
    stats = torch.full((3, 1, 2), 7.0, device=device)
    embed(*torch.randn(2, 4, 37, device=device).to(dtype), ids, ids, room[:2], stats[:2])
    assert (room[2] == 7.0).all() and (stats[2] == 7.0).all()


def test_opcheck(device):
    tokens = torch.zeros(2, 3, dtype=torch.int32, device=device)
    table, out, stats = (torch.zeros(*shape, device=device) for shape in ((9, 8), (6, 8), (6, 1, 2)))
    torch.library.opcheck(_op, (table, table, tokens, tokens, out, stats))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_table": torch.zeros(4, 7)}, r"position_table must have the shape \[any, 8\], got \[4, 7\]"),
        ({"position_table": torch.zeros(4, 8).half()}, r"position_table must be torch.float32, got torch.float16"),
        ({"tokens": torch.zeros(2, 3)}, r"tokens must be torch.int32 or torch.int64, got torch.float32"),
        ({"positions": torch.zeros(3, 2, dtype=torch.int32)}, r"positions must have the shape \[2, 3\]"),
        ({"out": torch.zeros(5, 8)}, r"out must have the shape \[6, 8\], got \[5, 8\]"),
        ({"out": torch.zeros(8, 6).t()}, r"out must be contiguous"),
        ({"stats": torch.zeros(6, 2, 2)}, r"stats must have the shape \[6, 1, 2\], got \[6, 2, 2\]"),
    ],
)
def test_errors(device, change, message):
    ids = torch.zeros(2, 3, dtype=torch.int32)
    values = {"token_table": torch.zeros(9, 8), "position_table": torch.zeros(4, 8), "tokens": ids, "positions": ids}
    room = {"out": torch.zeros(6, 8), "stats": torch.zeros(6, 1, 2)}
    values = {key: value.to(device) for key, value in (values | room | change).items()}
    if change.get("out") is not None and not change["out"].is_contiguous():
        values["out"] = values["out"].t().contiguous().t()
    with pytest.raises(ValueError, match=message):
        embed(**values)
