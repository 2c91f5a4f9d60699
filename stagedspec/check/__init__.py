"""Checks of the GPU kernels on the GPU at hand (`stagedspec check`), and `compare_logits` for any two engines."""

from stagedspec.check.logits import Comparison, compare_logits
from stagedspec.check.suite import Result, check, record

__all__ = ["Comparison", "Result", "check", "compare_logits", "record"]
