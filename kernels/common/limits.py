"""Limits of the kernels that are asked for before Triton is imported."""

MAX_HEAD_SIZE = 256  # of attention
