"""Where models run: devices and dtypes. Imports no transformers, so that the command line can check them early."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from stagedspec.kernels.common import constants

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in constants.DTYPES}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU's memory is full: torch's, and those of CUDA and Triton that say so in words
    (loading a kernel, making a graph)."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


@contextmanager
def memory_errors(task: str) -> Iterator[None]:
    """Turns running out of GPU memory into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"there is too little GPU memory for {task}: {why}; free some, or use smaller models"
        ) from None


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the GPU if there is one; a GPU without an index is the one that is current now, with its index.

    Raises ValueError for a device that cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu' or a GPU such as 'cuda:0', got {device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch sees no CUDA GPU; use device='cpu' (--device cpu)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} was asked for, but torch sees {torch.cuda.device_count()}: the first is cuda:0"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU that has it, else float32. Raises ValueError for an unknown dtype."""
    if dtype == "auto":
        # On a CPU always fp32: half precision there is computed wider, so that the tokens of all modes agree
        # (kernels/reference/layers.py), and gains nothing.
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype must be 'auto', {', '.join(DTYPES)} or the torch dtype of that name, got {dtype!r}")
    return found


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Makes a GPU the current one, where Triton launches its kernels and torch captures graphs. The caller's autocast
    is off: it would compute a part of every pass in another dtype."""
    gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    mixed = torch.is_autocast_enabled(device.type)
    with gpu, torch.autocast(device.type, enabled=False) if mixed else nullcontext():
        yield
