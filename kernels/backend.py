"""Chooses the implementation of the operations, once, when a decoder is made."""

import os
import shutil
from collections.abc import Sequence

import torch

BACKENDS = ("auto", "torch", "triton")
LARGEST_HEAD = 128  # that tests run


def resolve(backend: str, device: torch.device, head_sizes: Sequence[int] = ()):
    """Returns what implements the operations on `device`: reference.py, or a `TritonOps` of its own.

    "auto" is triton on a GPU that can run it, for models of these head sizes, and else torch. "triton" needs a GPU of
    compute capability 8.0 or later; on the CPU it runs in Triton's interpreter, for checking, and only if
    TRITON_INTERPRET=1 was set before Python started.

    Raises ValueError for an unknown backend and for a forced one that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = "torch" if device.type == "cpu" or _triton_problem(device, head_sizes) else "triton"
    elif backend == "triton" and (problem := _triton_problem(device, head_sizes)):
        raise ValueError(f"backend 'triton' cannot run on {device}: {problem}; use 'auto' or 'torch'")
    if backend == "triton":
        from stagedspec.kernels.triton_backend import TritonOps

        return TritonOps()
    from stagedspec.kernels import reference

    return reference


def _triton_problem(device: torch.device, head_sizes: Sequence[int]) -> str:
    """Why kernels cannot run models of these head sizes on the device, or nothing."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if max(head_sizes, default=0) > LARGEST_HEAD:
        return f"a model has heads of {max(head_sizes)}, kernels take at most {LARGEST_HEAD}"
    if device.type == "cpu":
        if triton.knobs.runtime.interpret:
            return ""
        return "kernels need a GPU, or TRITON_INTERPRET=1 set before Python starts to interpret them"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it has compute capability {capability}, kernels need 8.0"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "triton needs a C compiler to launch kernels (gcc, clang, or the one that CC names), and there is none"
    return ""
