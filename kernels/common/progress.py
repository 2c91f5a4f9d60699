"""Reports progress of compiling to a progress bar or the log. Apart from compiling.py, so that it needs no Triton."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Progress = Callable[[int, int], None]  # (kernels that are ready, all kernels)
current: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def reporting(progress: Progress | None) -> Iterator[None]:
    """Inside the block, compiling is reported to `progress` instead of the log."""
    token = current.set(progress)
    try:
        yield
    finally:
        current.reset(token)
