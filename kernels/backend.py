"""Chooses the implementation of the operations, once, when a decoder is made."""

import os
import shutil

import torch

BACKENDS = ("auto", "torch", "triton")
MAX_HEAD_SIZE = 256  # that tree_attention.py takes


def resolve(backend: str, device: torch.device, head_size: int = 64):
    """Returns what implements the operations on `device`: reference.py, or a `TritonOps` of its own.

    "auto" is triton on a GPU where it can run, else torch. "triton" needs a GPU of compute capability 8.0 or later and
    the C compiler that Triton builds its launchers with; on the CPU it runs in Triton's interpreter, for checking, and
    only if TRITON_INTERPRET=1 was set before Python started. head_size: the largest of the models'.

    Raises ValueError for an unknown backend and for a forced one that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    problem = "" if backend == "torch" else _triton_problem(device, head_size)
    if backend == "triton" and problem:
        raise ValueError(f"backend 'triton' cannot run on {device}: {problem}; use 'auto' or 'torch'")
    if backend == "triton" or (backend == "auto" and device.type == "cuda" and not problem):
        from stagedspec.kernels.triton_backend import TritonOps

        return TritonOps()
    from stagedspec.kernels import reference

    return reference


def _triton_problem(device: torch.device, head_size: int) -> str:
    """Why kernels cannot run on the device, or nothing."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if head_size > MAX_HEAD_SIZE:
        return f"attention heads can be at most {MAX_HEAD_SIZE} wide, the model's are {head_size}"
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return "kernels need a GPU, or TRITON_INTERPRET=1 set before Python starts to interpret them"
    if device.type == "cuda" and not triton.knobs.runtime.interpret:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it has compute capability {capability}, kernels need 8.0"
        if not ("CC" in os.environ or shutil.which("gcc") or shutil.which("clang")):
            return "Triton needs a C compiler: install gcc or clang, or name one in CC"
    return ""
