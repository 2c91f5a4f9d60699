"""The shapes that are measured, and random weights of them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """A GPT-2: layers, width, heads, vocabulary."""

    layers: int
    width: int
    heads: int
    vocab: int = 50257

    @property
    def size(self) -> int:
        return self.width // self.heads


MODELS = {"S": Shape(12, 768, 12), "L": Shape(36, 1280, 20)}


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)
