"""Limits of the kernels that are needed where Triton may be missing."""

MAX_HEAD_SIZE = 256  # widest attention head of `tree_attention`
