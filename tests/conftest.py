"""Fixtures that several test files use."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from helpers import DTYPES, GPU, PLACES, Place, make_draft, make_gpt2  # first: it sets up triton
from transformers import GPT2LMHeadModel

KERNELS = Path(__file__).with_name("kernels")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs kernels: tests in tests/kernels that take the fixture `device`. Other files mark themselves."""
    for item in items:
        if KERNELS in item.path.parents and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("interpreted")


@pytest.fixture(scope="session", autouse=True)
def brief_measurements() -> Iterator[None]:
    """A decoder that chooses its own trees measures passes first. No test depends on how exact that is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stagedspec.planning.cost.BUDGET", 0.01)
        yield


@pytest.fixture(scope="session")
def target() -> GPT2LMHeadModel:
    return make_gpt2(0)


@pytest.fixture(scope="session")
def drafts(target) -> dict[str, GPT2LMHeadModel]:
    return {kind: make_draft(kind, target) for kind in ("good", "random", "adversarial", "target")}


@pytest.fixture(scope="session", params=PLACES)
def place(request) -> Place:
    return PLACES[request.param]


@pytest.fixture(scope="session")
def make_decoder(place):
    return place.decoder


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def error_ratio() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], float]:
    """Our error against an fp64 reference over that of plain torch in the same low precision (at least 1e-6)."""

    def ratio(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
        scale = exact.norm().item()
        error, allowed = ((got.double() - exact).norm().item() / scale for got in (ours, plain))
        return error / max(allowed, 1e-6)

    return ratio


@pytest.fixture
def fixed_order(monkeypatch) -> None:
    """The interpreter multiplies with numpy, whose order of summation depends on how many columns there are: from here
    on it is one, the order of the inner dimension. On a GPU nothing changes."""

    def matmul(a: numpy.ndarray, b: numpy.ndarray, dtype=None) -> numpy.ndarray:
        out = numpy.zeros((a.shape[0], b.shape[1]), dtype or a.dtype)
        for column, row in zip(a.T.astype(out.dtype), b.astype(out.dtype), strict=True):
            out += column[:, None] * row
        return out

    if not GPU:
        monkeypatch.setattr(numpy, "matmul", matmul)
