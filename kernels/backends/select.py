"""Chooses the backend, once, when a decoder is made."""

import os
import shutil
import sysconfig
import warnings
from collections.abc import Collection
from pathlib import Path

import torch

from stagedspec.kernels.backends.interface import Backend
from stagedspec.kernels.common.constants import BACKENDS, MAX_HEAD_SIZE

# "auto" takes the kernels without a check for the compute capability and the head sizes that they were tried with.
TRIED, TRIED_HEAD_SIZE = (9, 0), 128


def resolve(
    backend: str, device: torch.device, head_sizes: Collection[int] = (), dtype: torch.dtype | None = None
) -> Backend:
    """Returns a new backend object for the models of one decoder on `device`.

    backend: "torch", "triton" or "auto". head_sizes, dtype: of the models, none if they are not known yet.

    "triton" needs an NVIDIA GPU of compute capability 8.0 or later, a C compiler and Python's headers. On a CPU it runs
    in Triton's interpreter, for checking, if TRITON_INTERPRET=1 was set before Python started. "auto" is triton where
    it can run on a GPU, if the kernels have been tried on that kind of GPU or `stagedspec check` has passed there
    (trusted.py). Else it is torch, and on a GPU a warning says why.

    Raises ValueError for an unknown backend, and for "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    wanted = backend == "triton" or (backend == "auto" and device.type == "cuda")
    problem = _triton_problem(device, max(head_sizes, default=0)) if wanted else ""
    if backend == "triton" and problem:
        raise ValueError(f"backend 'triton' cannot run on {device}: {problem}; use 'auto' or 'torch'")
    if backend == "auto" and wanted:
        problem = problem or _untried(device, head_sizes, dtype)
        if problem:
            warnings.warn(
                f"backend 'auto' is torch on {device}, which is slower, and where tokens nearly tie modes may "
                f"differ: {problem}",
                stacklevel=3,
            )
    if wanted and not problem:
        import triton

        from stagedspec.kernels.backends.triton_backend import TritonBackend
        from stagedspec.kernels.common import compiling

        if device.type == "cuda" and not triton.knobs.runtime.interpret:
            compiling.hash_sources(_import_gluon)  # while the models are read
        return TritonBackend()
    from stagedspec.kernels.backends.torch_backend import TorchBackend

    return TorchBackend()


def _import_gluon() -> None:
    """Imports the kernels that TritonBackend imports only where they are launched: Gluon takes a while to import."""
    import stagedspec.kernels.linear.hopper
    import stagedspec.kernels.lm_head.hopper
    import stagedspec.kernels.tree_attention.hopper  # noqa: F401


def _triton_problem(device: torch.device, head_size: int) -> str:
    """Why kernels cannot run on the device; "" if they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if head_size > MAX_HEAD_SIZE:
        return f"attention heads can be at most {MAX_HEAD_SIZE} wide, the model's are {head_size}"
    interpreted = triton.knobs.runtime.interpret
    if device.type != "cuda":
        needs = "kernels need a GPU, or TRITON_INTERPRET=1 set before Python starts to interpret them"
        return "" if interpreted else needs
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it has compute capability {capability}, kernels need 8.0"
    return "" if interpreted else _cannot_build()


def _cannot_build() -> str:
    """What Triton lacks to build the modules that launch kernels; "" if nothing.

    Triton takes CC as the name of one program, and looks for no other compiler if CC is set.
    """
    named = os.environ.get("CC")
    if not any(map(shutil.which, ("gcc", "clang") if named is None else (named,))):
        return f"Triton needs a C compiler: install gcc or clang, or name one in CC (now {named!r})"
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not Path(folder, "Python.h").is_file():
        return f"Triton needs Python's headers, and {folder} has no Python.h: install them (Debian: python3-dev)"
    return ""


def _untried(device: torch.device, head_sizes: Collection[int], dtype: torch.dtype | None) -> str:
    """Why "auto" does not take kernels that could run on the GPU; "" if it does."""
    import triton

    from stagedspec.kernels.common import trusted

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set"
    capability = torch.cuda.get_device_capability(device)
    if capability != TRIED:
        tried = f"the kernels have been tried on compute capability {TRIED} alone, it has {capability}"
    elif max(head_sizes, default=0) > TRIED_HEAD_SIZE:
        tried = f"the kernels have been tried with heads up to {TRIED_HEAD_SIZE}, not {max(head_sizes)}"
    else:
        return ""
    every = (trusted.why_not(device, size, dtype) for size in (sorted(head_sizes) or (None,)))
    unchecked = next(filter(None, every), "")
    if not unchecked:
        return ""
    return f"{tried}, and {unchecked}; `stagedspec check` with your models makes 'auto' trust this GPU"
