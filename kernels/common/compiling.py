"""Compiles kernels before they are launched, in parallel.

A dry run calls the very code that launches kernels. `registry.launch_kernel` then hands every launch to a collector in
place of the GPU, so what is compiled is exactly what will be launched: no list of kernels has to be kept elsewhere.
Launches that need the same compiled kernel count once: a pass has 36 layers of the same kernels, and Triton takes most
of a millisecond to find that out. Triton compiles outside Python's global lock, so threads suffice. They also load each
kernel onto the GPU.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from contextvars import copy_context
from dataclasses import is_dataclass
from threading import RLock, Thread
from typing import Any

import torch
import triton
from triton import AsyncCompileMode
from triton.compiler import CompiledKernel
from triton.runtime.cache import triton_key

from stagedspec.kernels.common import progress, registry

log = logging.getLogger("stagedspec")
PATIENCE = 1.0  # seconds of compiling after which it is logged
# One dry run at a time: two would compile the same kernel, and Triton 3.9 unloads the one that it then forgets. What a
# CUDA graph launches must stay loaded, so what was loaded is never let go.
_compiling = RLock()
_all_loaded: list[CompiledKernel] = []


_hashing: list[Thread] = []  # the thread of `hash_sources`, once it has been called


def hash_sources(import_kernels: Callable[[], object]) -> None:
    """Computes the hashes by which Triton finds compiled kernels, once a process, in a thread of its own.

    Hashed are Triton itself, some hundred megabytes, and our kernels. It takes half a second, which costs no time while
    a model is read from files. import_kernels: imports the modules of kernels that are imported late; those that are
    imported already are hashed in any case.
    """

    def work() -> None:
        with suppress(Exception):  # compiling raises the same error again
            triton_key()
            import_kernels()
            registry.key_loaded()

    if not _hashing:
        thread = Thread(target=work, name="hash sources", daemon=True)
        thread.start()
        _hashing.append(thread)


def compile_ahead(parts: Iterable[Callable[[], object]], device: torch.device) -> int:
    """Compiles and loads all kernels that the parts would launch; returns how many were not loaded before.

    parts: functions that launch kernels. They are called once, in turn. Triton launches are recorded and not run;
    torch's own operations do run. In the interpreter there is nothing to compile.

    Raises what Triton raises for a kernel that cannot be compiled. Interrupted, it ends with the kernels under way, and
    leaves what was compiled in Triton's cache.
    """
    if registry.interpreted():
        return copy_context().run(_collect, parts, lambda *launch: None)
    for thread in _hashing:
        thread.join()
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
    """An executor whose threads compile a kernel and load it onto the GPU. Then they free the text of its compilation
    stages, half a megabyte that Triton keeps and nothing reads any more."""

    def __init__(self, pool: ThreadPoolExecutor):
        self.pool = pool
        self.futures: list[Future] = []

    def submit(self, compile_kernel: Callable[[], CompiledKernel]) -> Future:
        self.futures.append(self.pool.submit(_loaded, compile_kernel))
        return self.futures[-1]


def _loaded(compile_kernel: Callable[[], CompiledKernel]) -> CompiledKernel:
    kernel = compile_kernel()
    kernel.run  # noqa: B018 (the property loads the kernel and makes its launcher)
    kernel.asm.clear()
    _all_loaded.append(kernel)
    return kernel


def _compile(parts: Iterable[Callable[[], object]], loading: _Loading) -> int:
    launches: dict[Hashable, tuple] = {}

    def collect(kernel: triton.JITFunction, grid: tuple, arguments: tuple, options: dict) -> None:
        kind = kernel, _kind(arguments), _kind(tuple(options.items()))
        launches.setdefault(kind, (kernel, grid, arguments, options))

    _collect(parts, collect)
    often = Counter(launch[0] for launch in launches.values())
    # Kernels of few kinds first, and the longest of them: the many kinds of the linear layers' even out the end.
    order = sorted(launches.values(), key=lambda launch: (often[launch[0]], -len(launch[0].src)))
    promised: list[Any] = []  # kernels, or what Triton puts in its cache in their place until they are compiled
    try:
        # Errors are raised below: Triton would first wait for all others, and keep what has failed in its cache.
        with AsyncCompileMode(loading, ignore_errors=True):
            try:
                promised.extend(kernel.warmup(*given, grid=grid, **options) for kernel, grid, given, options in order)
                launches.clear()  # which hold tensors
                order.clear()
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


def _kind(argument: object) -> Hashable:
    """A key of an argument: equal keys mean the same compiled kernel. Triton tells apart fewer arguments than this."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, (tuple, list)):
        return tuple(map(_kind, argument))
    if is_dataclass(argument):  # a tensor descriptor, and its layout
        return type(argument), *map(_kind, vars(argument).values())
    return type(argument), argument  # 1, 1.0 and True are equal


def _watch(futures: list[Future]) -> None:
    """Waits for all, and reports progress to `progress.current`, or to the log if it takes long."""
    report, total = progress.current.get(), len(futures)
    if report is None and wait(futures, PATIENCE).not_done:
        log.warning("compiling GPU kernels, %d in all; later processes find them in Triton's cache", total)
    for ready, _ in enumerate(as_completed(futures), 1):
        if report is not None:
            report(ready, total)
