"""The models of a decoder: target, draft and n-gram table."""

from dataclasses import dataclass

import torch

from stagedspec.models.gpt2 import GPT2
from stagedspec.models.ngram import KatzTable


@dataclass(frozen=True)
class Models:
    """The models as they are at one moment; a decoder whose weights change takes a new one."""

    target: GPT2
    draft: GPT2 | None = None
    ngram: KatzTable | None = None

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.target.device

    @property
    def backend(self) -> str:
        """What runs their operations: "torch" or "triton"."""
        return self.target.ops.name
