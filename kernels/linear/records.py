"""Arguments of the linears' launchers: the LayerNorm before the product, and the epilogue after it."""

from typing import NamedTuple

import torch


class Norm(NamedTuple):
    """The LayerNorm that is folded into a weight (`Folded`): statistics of x's rows, sums of the weight's."""

    stats: torch.Tensor | None
    sums: torch.Tensor | None
    epsilon: float


NO_NORM = Norm(None, None, 0.0)


class Epilogue(NamedTuple):
    """What follows the product: + bias, the activation (ACTIVATION of the kernels), + residual."""

    bias: torch.Tensor | None
    activation: int
    residual: torch.Tensor | None
