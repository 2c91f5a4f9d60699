"""Compiles kernels before they are launched, in parallel.

A dry run calls the very code that launches kernels. `registry.launch_kernel` then hands every launch to a collector in
place of the GPU, so what is compiled is exactly what will be launched: no list of kernels has to be kept elsewhere.
Triton compiles outside Python's global lock, so threads suffice. They also load each kernel onto the GPU.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from threading import RLock

import torch
from triton import AsyncCompileMode

from stagedspec.kernels import registry

log = logging.getLogger("stagedspec")
Progress = Callable[[int, int], None]  # (kernels that are ready, all kernels)
_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)
PATIENCE = 1.0  # seconds of compiling after which the log hears of it
# One dry run at a time: two would compile the same kernel, and Triton 3.9 unloads the one that it then forgets. What a
# CUDA graph launches must stay loaded, so what was loaded is never let go.
_compiling = RLock()
_all_loaded: list[object] = []


@contextmanager
def reporting(progress: Progress | None) -> Iterator[None]:
    """Inside, compiling is reported to `progress` instead of the log."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def compile_ahead(parts: Iterable[Callable[[], object]], device: torch.device) -> int:
    """Compiles and loads all kernels that the parts would launch; returns how many were not loaded before.

    parts: functions that launch kernels. They are called once, in turn. Triton launches are recorded and not run;
    torch's own operations do run. In the interpreter there is nothing to compile.

    Raises what Triton raises for a kernel that cannot be compiled. Interrupted, it ends with the kernels under way, and
    leaves what was compiled in Triton's cache.
    """
    if registry.interpreted():
        return copy_context().run(_collect, parts, lambda *launch: None)
    with _compiling:
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "compile", torch.cuda.set_device, (device,))
        try:
            # In a context of its own: an error would leave Triton in its asynchronous mode.
            return copy_context().run(_compile, parts, _Loading(pool))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _collect(parts: Iterable[Callable[[], object]], collect: Callable) -> int:
    registry.collector.set(collect)
    for part in parts:
        part()
    return 0


class _Loading:
    """An executor whose threads load a kernel onto the GPU when they have compiled it."""

    def __init__(self, pool: ThreadPoolExecutor):
        self.pool = pool
        self.futures: list[Future] = []

    def submit(self, compile_kernel: Callable[[], object]) -> Future:
        self.futures.append(self.pool.submit(_loaded, compile_kernel))
        return self.futures[-1]


def _loaded(compile_kernel: Callable[[], object]):
    kernel = compile_kernel()
    kernel.run  # noqa: B018 (the property loads the kernel and makes its launcher)
    _all_loaded.append(kernel)
    return kernel


def _compile(parts: Iterable[Callable[[], object]], loading: _Loading) -> int:
    promised = []  # kernels, or what Triton puts in its cache in their place until they are compiled

    def collect(kernel, grid: tuple, arguments: tuple, options: dict) -> None:
        promised.append(kernel.warmup(*arguments, grid=grid, **options))

    try:
        # Errors are raised below: Triton would first wait for all others, and keep what has failed in its cache.
        with AsyncCompileMode(loading, ignore_errors=True):
            try:
                _collect(parts, collect)
                _watch(loading.futures)
            except BaseException:
                for future in loading.futures:
                    future.cancel()
                raise
    finally:
        for kernel in promised:
            if getattr(kernel, "future", None) is not None and kernel.future.done():
                kernel.result(ignore_errors=True)
    for future in loading.futures:
        future.result()
    return len(loading.futures)


def _watch(futures: list[Future]) -> None:
    """Waits for all, and tells of it whoever wants to know."""
    progress, total = _progress.get(), len(futures)
    if progress is None and wait(futures, PATIENCE).not_done:
        log.warning("compiling GPU kernels, %d in all; later processes find them in Triton's cache", total)
    for ready, _ in enumerate(as_completed(futures), 1):
        if progress is not None:
            progress(ready, total)
