"""Chooses the implementation of the operations, once, when a decoder is made."""

import torch

BACKENDS = ("auto", "torch", "triton")


def resolve(backend: str, device: torch.device):
    """Returns what implements the operations on `device`: reference.py, or a `TritonOps` of its own.

    "auto" is torch: the kernels are tested on GPUs, the whole package on top of them is not yet, so the Triton backend
    must be asked for. "triton" needs a GPU of compute capability 8.0 or later; on the CPU it runs in Triton's
    interpreter, for checking, and only if TRITON_INTERPRET=1 was set before Python started.

    Raises ValueError for an unknown backend and for a forced one that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    problem = _triton_problem(device) if backend == "triton" else ""
    if problem:
        raise ValueError(f"backend 'triton' cannot run on {device}: {problem}; use 'auto' or 'torch'")
    if backend == "triton":
        from stagedspec.kernels.triton_backend import TritonOps

        return TritonOps()
    from stagedspec.kernels import reference

    return reference


def _triton_problem(device: torch.device) -> str:
    """Why kernels cannot run on the device, or nothing."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "" if capability >= (8, 0) else f"it has compute capability {capability}, kernels need 8.0"
    if triton.knobs.runtime.interpret:
        return ""
    return "kernels need a GPU, or TRITON_INTERPRET=1 set before Python starts to interpret them"
