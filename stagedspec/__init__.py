"""Staged speculative decoding of GPT-2-architecture models, lossless (Spector & Ré, arXiv 2308.04623)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers: at run time `__getattr__` imports them
    from stagedspec import hf
    from stagedspec.decoder import Chunk, Completion, Decoder
    from stagedspec.decoding.sampling import Sampling, row_seed
    from stagedspec.decoding.stats import Stats
    from stagedspec.models.ngram import KatzTable
    from stagedspec.planning.tree import MODES, TreeConfig

__version__ = "0.1.0"

_EXPORTS = {
    "Chunk": "decoder",
    "Completion": "decoder",
    "Decoder": "decoder",
    "KatzTable": "models.ngram",
    "MODES": "planning.tree",
    "Sampling": "decoding.sampling",
    "Stats": "decoding.stats",
    "TreeConfig": "planning.tree",
    "row_seed": "decoding.sampling",
}
__all__ = [
    "MODES",
    "Chunk",
    "Completion",
    "Decoder",
    "KatzTable",
    "Sampling",
    "Stats",
    "TreeConfig",
    "__version__",
    "hf",
    "row_seed",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `stagedspec --help` does not wait for torch and transformers.
    from importlib import import_module

    if name == "hf":
        return import_module("stagedspec.hf")
    if name in _EXPORTS:
        return getattr(import_module(f"stagedspec.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'stagedspec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
