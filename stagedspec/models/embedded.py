"""Where the embedded models are installed. Imports no torch, so that the command line can check early."""

from pathlib import Path

_ASSETS = Path(__file__).parents[1] / "assets"
TARGET = _ASSETS / "target"  # with its tokenizer
DRAFT = _ASSETS / "draft"
NGRAM = _ASSETS / "ngram.safetensors"


def check_installed(instead: str) -> None:
    """Raises ValueError, which ends with what to do instead, if this installation has no embedded models."""
    if not (TARGET / "config.json").is_file():
        raise ValueError(f"this installation has no embedded models; {instead}")
