"""The language model's head: final LayerNorm, logits, and the choice of a token a node, in one operation.

kernel.py has the kernels, hopper.py the one for 16-bit types on Hopper, op.py the operations.
"""

from stagedspec.kernels.lm_head.op import lm_head_choose, lm_head_topm, scratch_size

__all__ = ["lm_head_choose", "lm_head_topm", "scratch_size"]
