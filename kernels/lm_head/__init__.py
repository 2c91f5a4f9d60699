"""The language model's head: final LayerNorm, logits, and the choice of a token a node, in one operation.

kernel.py has the kernels, hopper.py the one for 16-bit types on Hopper, op.py the operations; eight_bits.py is
about heads of a draft in 8 bits.
"""

from stagedspec.kernels.lm_head.eight_bits import EIGHT_BITS, from_eight_bits, to_eight_bits
from stagedspec.kernels.lm_head.op import eight_bits_run, lm_head_choose, lm_head_topm, scratch_size

__all__ = [
    "EIGHT_BITS",
    "eight_bits_run",
    "from_eight_bits",
    "lm_head_choose",
    "lm_head_topm",
    "scratch_size",
    "to_eight_bits",
]
