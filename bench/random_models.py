"""Models of random weights in the shapes of known ones, saved as checkpoints: benchmarks need no model files."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from stagedspec.models import embedded
from stagedspec.models.loading import no_bars
from stagedspec.models.shapes import SIZES, ModelShape

SHAPES = ("S", "M", "L", "embedded")
HEAD = 64


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose models, device, dtype and backend. Default: the embedded models."""
    parser.add_argument("--target", help="hub id or folder; default: the embedded target, draft and n-gram table")
    parser.add_argument("--draft", help="hub id or folder of the draft")
    parser.add_argument("--ngram", type=Path, help="n-gram table")
    parser.add_argument(
        "--random", choices=SHAPES, metavar="SHAPE", help=f"random weights of a GPT-2's shape: {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--draft-shape", metavar="LxD", help="layers and width of the random draft (default 8x512; embedded: 2x96)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of all sides (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")


def draft_shape(text: str | None, target: str) -> ModelShape:
    """ "8x512" to a shape with the vocabulary of the target's. Raises ValueError for other words."""
    vocab = shape_of(target).vocab
    if text is None:
        return SIZES["draft"] if target == "embedded" else ModelShape(8, 512, 8, vocab=vocab)
    try:
        layers, width = map(int, text.split("x"))
    except ValueError:
        raise ValueError(f"--draft-shape must be layers x width, such as 8x512, got {text!r}") from None
    if layers < 1 or width < HEAD or width % HEAD:
        raise ValueError(f"--draft-shape needs at least one layer and a width of a multiple of {HEAD}, got {text!r}")
    return ModelShape(layers, width, width // HEAD, vocab=vocab)


def shape_of(name: str) -> ModelShape:
    return SIZES["target" if name == "embedded" else name]


@contextmanager
def checkpoints(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str | None, str | None]]:
    """Target, draft and n-gram table that the options name, as paths or hub ids.

    Random models are made on `device` and saved as bfloat16 in a temporary folder. Raises ValueError for options that
    do not fit together.
    """
    named = options.target or options.draft or options.ngram
    if options.draft_shape is not None and options.random is None:
        raise ValueError("--draft-shape is the shape of a random draft: add --random SHAPE")
    if options.random is not None:
        if named:
            raise ValueError("--random takes random weights: leave out --target, --draft and --ngram")
        shapes = {"target": shape_of(options.random), "draft": draft_shape(options.draft_shape, options.random)}
        positions = 512 if options.random == "embedded" else 1024
        with tempfile.TemporaryDirectory(prefix="stagedspec-models-") as folder:
            for seed, (name, shape) in enumerate(shapes.items()):
                save_random(shape, positions, Path(folder, name), seed, device)
            yield str(Path(folder, "target")), str(Path(folder, "draft")), None
    elif options.target is not None:
        yield options.target, options.draft, None if options.ngram is None else str(options.ngram)
    elif named:
        raise ValueError("--draft and --ngram belong to a target: add --target")
    else:
        embedded.check_installed("name some with --target, or use --random L")
        yield str(embedded.TARGET), str(embedded.DRAFT), str(embedded.NGRAM)


def make_random(shape: ModelShape, positions: int, seed: int, device: torch.device) -> GPT2LMHeadModel:
    """A GPT-2 of random weights in bfloat16."""
    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=positions,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        n_inner=shape.mlp,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    with device:
        return GPT2LMHeadModel(config).to(torch.bfloat16).eval()


def save_random(shape: ModelShape, positions: int, folder: Path, seed: int, device: torch.device) -> None:
    """Saves a GPT-2 of random weights as bfloat16 safetensors, without a tokenizer."""
    with no_bars():
        make_random(shape, positions, seed, device).save_pretrained(folder)
