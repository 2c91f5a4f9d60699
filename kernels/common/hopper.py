"""Helpers of the Gluon kernels for Hopper: bulk tensor copies, their layouts, and how much shared memory there is."""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stagedspec.kernels.common.registry import SHARED_LIMIT

copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name in Triton 3.9 and in 3.6
MULTIPROCESSORS = 132  # of an H100 or H200
SHARED = SHARED_LIMIT[90]  # bytes of shared memory that a block may take
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # between Triton 3.6 and 3.9
SPARE = 2048  # bytes of it that stay free for barriers


@gluon.jit
def reinterpreted(shared, shape, layout: gl.constexpr):
    """The same shared memory with another shape and layout."""
    if RENAMED:
        return shared.reinterpret(shared.dtype, shape, layout)
    else:
        return shared._reinterpret(shared.dtype, shape, layout)


@gluon.jit
def fetch_to_l2(pointers):
    """The lines of 128 bytes that hold these places."""
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], gl.int32, False, 1)


@cache
def layout(rows: int, columns: int, itemsize: int = 2) -> gl.NVMMASharedLayout:
    """How blocks [rows, columns] of a type of 16 or 8 bits lie in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16 if itemsize == 2 else gl.float8e4nv)


def described(op: str, name: str, tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The tensor, to be copied in blocks [rows, columns]."""
    if tensor.data_ptr() % 16:
        raise ValueError(f"{op}: {name} must start at a multiple of 16 bytes, got {tensor.data_ptr():#x}; clone it")
    return TensorDescriptor.from_tensor(tensor, [rows, columns], layout(rows, columns, tensor.itemsize))
