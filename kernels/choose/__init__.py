"""The token-choice rule over logits in memory: warping, noise, argmax.

kernel.py has the kernels, scores.py what they share with the head, op.py the operation.
"""

from stagedspec.kernels.choose.op import choose, scratch_size, warped

__all__ = ["choose", "scratch_size", "warped"]
