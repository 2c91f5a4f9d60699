"""Chooses the implementation of the operations, once, when a decoder is made."""

from types import ModuleType

import torch

BACKENDS = ("auto", "torch", "triton")


def resolve(backend: str, device: torch.device) -> ModuleType:
    """Returns the module that implements the operations on `device`.

    Raises ValueError for an unknown backend and for a forced one that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        raise ValueError(
            f"backend 'triton' cannot run on {device}: this version has no Triton kernels yet; use 'auto' or 'torch'"
        )
    from stagedspec.kernels import reference

    return reference
