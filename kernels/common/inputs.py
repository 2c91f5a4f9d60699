"""Types of the objects that the decoder gives to the kernels' state; their classes are in packages above this one."""

from typing import Protocol

import torch


class TreeSettings(Protocol):
    """Limits of one step's tree: `planning.tree.TreeConfig`, which documents them."""

    @property
    def nodes(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def passes(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def children(self) -> int: ...

    @property
    def prefetch(self) -> int: ...

    @property
    def prefetch_width(self) -> int: ...

    @property
    def node_floor(self) -> float: ...

    @property
    def pass_floor(self) -> float: ...

    @property
    def context(self) -> bool: ...

    @property
    def guesses(self) -> int: ...

    @property
    def slots(self) -> int: ...


class NgramTable(Protocol):
    """The table of draft² (n-grams): `models.ngram.KatzTable`, which documents it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def successors(self) -> int: ...

    @property
    def slots(self) -> torch.Tensor: ...

    @property
    def rows(self) -> torch.Tensor: ...

    @property
    def tokens(self) -> torch.Tensor: ...

    @property
    def logprobs(self) -> torch.Tensor: ...

    def successors_of(self, first: int, last: int) -> list[tuple[int, float]]: ...


class ModelConfig(Protocol):
    """What a compiled model needs of transformers' `GPT2Config`."""

    n_layer: int
    n_head: int
    layer_norm_epsilon: float
    activation_function: str
