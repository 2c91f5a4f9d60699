"""Kernel tests: on a GPU with bf16 added, else in Triton's interpreter (tests/conftest.py turns it on)."""

from collections.abc import Callable

import pytest
import torch

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def error_ratio() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], float]:
    """Our error against an fp64 reference over that of plain torch in the same low precision (at least 1e-6)."""

    def ratio(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
        scale = exact.norm().item()
        error, allowed = ((got.double() - exact).norm().item() / scale for got in (ours, plain))
        return error / max(allowed, 1e-6)

    return ratio
