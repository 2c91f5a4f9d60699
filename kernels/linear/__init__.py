"""Linear layers for few rows: LayerNorm before them, activation or residual after them, in one launch.

kernel.py has the kernel, hopper.py the one for 16-bit types on Hopper, op.py the operations.
"""

from stagedspec.kernels.linear.kernel import ACTIVATIONS, stat_tiles
from stagedspec.kernels.linear.op import (
    MAX_TOKENS,
    Folded,
    activation_known,
    linear_add,
    norm_linear,
    row_stats,
    scratch_size,
)

__all__ = [
    "ACTIVATIONS",
    "MAX_TOKENS",
    "Folded",
    "activation_known",
    "linear_add",
    "norm_linear",
    "row_stats",
    "scratch_size",
    "stat_tiles",
]
