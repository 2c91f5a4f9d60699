"""Helpers of every kernel file: registering operations, launching, checks of arguments, scratch memory.

Operations are registered with `torch.library` define/impl (a call costs 2 microseconds; `custom_op` costs 11). All of
them write into tensors that the caller gives and return nothing: a step allocates nothing and can be captured.
"""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from inspect import signature
from threading import RLock
from typing import Any, NamedTuple, get_type_hints

import torch
import triton

from stagedspec.kernels.common.constants import HOPPER_SPLIT, MOST_SPLITS

LIBRARY = torch.library.Library("stagedspec", "DEF")


def register(schema: str, launch: Callable, fake: Callable | None = None) -> Callable:
    """Registers `launch` as the operation `schema`, on CUDA and (for the interpreter) on the CPU; returns it.

    schema: "name(Tensor x, ..., Tensor(a!) out) -> ()". It is flat. A parameter of `launch` that is annotated with a
    NamedTuple takes as many of the flat arguments as it has fields; a call of the operation gives `*record`.
    fake: checks for tensors without data; by default nothing.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operation = getattr(torch.ops.stagedspec, name).default
    for key in ("CUDA", "CPU"):
        LIBRARY.impl(name, _with_records(launch, len(operation._schema.arguments)), key)
    torch.library.register_fake(f"stagedspec::{name}", fake or (lambda *_: None), lib=LIBRARY)
    return operation


def _with_records(launch: Callable, count: int) -> Callable:
    """`launch` for the `count` flat arguments of an operation: makes its records of them."""
    types, end = get_type_hints(launch), 0
    places: list[tuple[Any, Any]] = []  # of an argument: its record or None, and which flat arguments it is
    for name in signature(launch).parameters:
        fields = getattr(types.get(name), "_fields", None)
        start, end = end, end + (1 if fields is None else len(fields))
        places.append((None, start) if fields is None else (types[name], slice(start, end)))
    if end != count:
        raise TypeError(f"{launch.__module__}.{launch.__name__} takes {end} flat arguments, its schema has {count}")
    if all(record is None for record, _ in places):
        return launch
    make = tuple.__new__  # a record's own constructor takes twice as long

    def launch_flat(*flat: object) -> None:
        launch(*[flat[at] if record is None else make(record, flat[at]) for record, at in places])

    return launch_flat


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


# Shared memory a block may take, bytes, by architecture (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@cache
def architecture(device: torch.device) -> int:
    """The device's compute capability, 90 for 9.0; 0 where kernels are interpreted."""
    if device.type != "cuda" or interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def by_hopper(itemsize: int, inputs: int, device: torch.device) -> bool:
    """Whether the kernel for Hopper runs, of linears and of heads alike. It copies rows of a multiple of 16 bytes."""
    return itemsize == 2 and inputs % 8 == 0 and inputs <= HOPPER_SPLIT * MOST_SPLITS and architecture(device) == 90


def pdl(arch: int) -> bool:
    """Whether kernels are launched before the one ahead of them ends (programmatic dependent launch)."""
    return arch >= 90


# Products and sums stay separate. Which of them fuse is up to the compiler: it differs between releases of Triton and
# between tiles of 8 and of 64 tokens, and with it the bits of a row.
FUSION = False


def launch_options(device: torch.device) -> dict[str, bool]:
    """Options of every launch: the kernel's PDL (`pdl`), and the compiler's and launcher's own, which the interpreter
    lacks."""
    if interpreted():
        return {"PDL": False}
    early = pdl(architecture(device))
    return {"PDL": early, "enable_fp_fusion": FUSION} | ({"launch_pdl": True} if early else {})


_keyed: set[str] = set()  # modules
_keying = RLock()


def key_functions(module: str) -> None:
    """Computes the cache keys of a module's jitted functions, in the order in which they are defined.

    In Triton 3.6 a kernel's key leaves out the constants of functions that have no key yet when its own is computed. So
    keys depended on which kernels a process had launched before, and a second process compiled again what the first
    one had left in the cache. Defined first are the functions that others call.
    """
    with _keying:
        for function in list(vars(sys.modules[module]).values()):
            if isinstance(function, triton.JITFunction):
                home = function.__module__
                if home != module and home not in _keyed and home.startswith("stagedspec."):
                    key_functions(home)
                function.cache_key  # noqa: B018 (the property computes it)
        _keyed.add(module)


def key_loaded() -> None:
    """`key_functions` of all of our modules that have been imported."""
    for module in list(sys.modules):
        if module.startswith("stagedspec.kernels."):
            key_functions(module)


# Takes launches (kernel, grid, arguments, options) in place of the GPU: a dry run, see compiling.py.
collector: ContextVar[Callable[[triton.JITFunction, tuple, tuple, dict], None] | None] = ContextVar(
    "collector", default=None
)


def launch_kernel(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches a Triton or Gluon kernel, or hands the launch to the collector of a dry run. All launches go through
    here."""
    if kernel.__module__ not in _keyed and not interpreted():
        key_functions(kernel.__module__)
    collect = collector.get()
    if collect is None:
        kernel[grid](*arguments, **options)
    else:
        collect(kernel, grid, arguments, options)


def most_registers(arch: int, warps: int, spilling: tuple[int, ...]) -> int | None:
    """`maxnreg` of a kernel that spills on some architectures if the compiler decides how many registers a thread has:
    it aims at more programs a multiprocessor than the grid or shared memory allows. On those architectures: the most
    registers that a thread can have. Elsewhere None: the compiler's own choice is better.
    """
    return min(255, 2048 // warps) if arch in spilling else None


# ---------------------------------------------------------------- checks

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what models may be in


def check_runs(tensor: torch.Tensor, op: str) -> None:
    """Raises ValueError where no kernel can run on the tensor's device."""
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and interpreted()):
        return
    raise ValueError(
        f"{op}: tensors on {tensor.device} cannot be reached by a kernel: use a GPU, or set TRITON_INTERPRET=1 before "
        "Python starts to interpret kernels on the CPU"
    )


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raises ValueError unless `tensor` is contiguous, on `device`, of one of the dtypes and of `shape` (None: any)."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.shape == shape or (  # first, since it is fast
        tensor.dim() == len(shape)
        and all(want is None or size == want for size, want in zip(tensor.shape, shape, strict=True))
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have the shape [{wanted}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()} for {list(tensor.shape)}")


# ---------------------------------------------------------------- scratch memory


class Scratch(NamedTuple):
    """Memory that kernels pass partial results through; one serves all kernels of a stream, which run in turn.

    partials: fp32 [n], garbage between kernels. counters: int32 [m], zero between kernels: the program that brings one
    to its final value resets it.
    """

    partials: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def of(cls, sizes: list[tuple[int, int]], device: torch.device) -> "Scratch":
        """Enough for each of `sizes`, (partials, counters) as the operations' `scratch_size` return them."""
        partials, counters = (max((size[i] for size in sizes), default=1) for i in (0, 1))
        return cls(
            torch.empty(max(partials, 1), dtype=torch.float32, device=device),
            torch.zeros(max(counters, 1), dtype=torch.int32, device=device),
        )
