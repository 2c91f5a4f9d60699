"""Sizes of GPT-2 models: those of GPT-2 S to XL and of the embedded models. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A GPT-2's layers, whatever its vocabulary.

    inner: width of the MLP, None for 4 * width. activation: of `GPT2Config`.

    Raises ValueError for sizes that cannot be.
    """

    layers: int
    width: int
    heads: int
    inner: int | None = None
    activation: str = "gelu_pytorch_tanh"  # the same function as "gelu_new", in one kernel

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.inner is not None and self.inner < 1:
            raise ValueError(f"inner must be at least 1, got {self.inner}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def mlp(self) -> int:
        """Width inside the MLP."""
        return self.inner or 4 * self.width


@dataclass(frozen=True)
class ModelShape(Shape):
    """A whole GPT-2: its layers, the size of its vocabulary and its positions."""

    vocab: int = 50257
    positions: int = 1024

    @property
    def without_vocabulary(self) -> Shape:
        return Shape(self.layers, self.width, self.heads, self.inner, self.activation)


SIZES = {
    "S": ModelShape(12, 768, 12),
    "M": ModelShape(24, 1024, 16),
    "L": ModelShape(36, 1280, 20),
    "XL": ModelShape(48, 1600, 25),
    # The embedded models.
    "target": ModelShape(4, 384, 6, inner=1792, activation="relu", vocab=2048, positions=512),
    "draft": ModelShape(2, 96, 3, inner=640, vocab=2048, positions=512),
}
