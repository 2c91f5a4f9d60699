"""Options that several commands share, and the decoder that they ask for."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import stagedspec
from stagedspec.cli import early_checks
from stagedspec.cli.output import preparing, quiet_transformers
from stagedspec.planning.tree import MODES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stagedspec.decoder import Decoder


# typer takes an Enum for choices.
Mode = Enum("Mode", {name: name for name in MODES}, type=str)  # type: ignore[misc]
STAGED = Mode("staged")

Target = Annotated[
    str | None,
    typer.Option(
        help="Target model: a hub id or a local folder. Default: the embedded target, draft and table.",
        rich_help_panel="Models",
    ),
]
Draft = Annotated[str | None, typer.Option(help="Draft model with the target's vocabulary.", rich_help_panel="Models")]
Ngram = Annotated[Path | None, typer.Option(help="N-gram table written by fit-ngram.", rich_help_panel="Models")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="Models")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel="Models")]
Backend = Annotated[
    str,
    typer.Option(
        help="auto (triton on Hopper and on GPUs that passed `stagedspec check`, else torch), triton, torch.",
        rich_help_panel="Models",
    ),
]
Nodes = Annotated[int | None, typer.Option(help="Nodes of the verified tree.", rich_help_panel="Token tree")]
Depth = Annotated[int | None, typer.Option(help="Depth of the tree.", rich_help_panel="Token tree")]
Width = Annotated[int | None, typer.Option(help="Nodes of one draft pass.", rich_help_panel="Token tree")]
Passes = Annotated[int | None, typer.Option(help="Draft passes of one step.", rich_help_panel="Token tree")]
Tree = Annotated[
    Path | None, typer.Option(help="Trees that `stagedspec tune-tree` wrote.", rich_help_panel="Token tree")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="Print without colours.")]


def load_decoder(
    target: str | None,
    draft: str | None,
    ngram: Path | None,
    device: "str | torch.device",
    dtype: str,
    backend: str,
    tree: Path | None = None,
    modes: Sequence[str] = (),
    text: bool = True,
    **shape: int | None,
) -> "Decoder":
    """Loads the models that the options name; without a target, the embedded models.

    tree: a file that tune-tree wrote. modes: those that will be used. text: whether a tokenizer is needed. shape:
    fields of a TreeConfig; None is left out.

    Raises ValueError for invalid options before torch is imported or a model is loaded.
    """
    settings: dict[str, Any] = {name: value for name, value in shape.items() if value is not None}
    early_checks.check_models(target, draft, ngram, device, dtype, backend, tree, settings, modes)
    quiet_transformers()
    options: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend}
    if tree is not None:
        options["tree"] = tree
    elif settings:
        options["tree"] = stagedspec.TreeConfig(**settings)
    from stagedspec.devices import memory_errors

    with preparing(), memory_errors("the models"):
        if target is None:
            decoder = stagedspec.Decoder.default(**options)
        else:
            decoder = stagedspec.Decoder.from_pretrained(target, draft=draft, ngram=ngram, **options)
    if text and decoder.tokenizer is None:
        raise ValueError(
            f"{target} has no tokenizer, so text cannot be turned into tokens; save one in the same folder"
        )
    return decoder


def tokenizer_of(decoder: "Decoder") -> "PreTrainedTokenizerBase":
    """The decoder's tokenizer. Raises ValueError if it has none."""
    if decoder.tokenizer is None:
        raise ValueError("there is no tokenizer, so text cannot be turned into tokens; save one in the target's folder")
    return decoder.tokenizer


def fit_prompts(
    texts: Sequence[str], decoder: "Decoder", wanted: int | None, usual: int
) -> tuple[list[list[int]], int]:
    """Token ids of the texts, and how many new tokens to generate after each: `wanted`, or `usual` if that is None.

    Prompts are cut to leave room for the new tokens, but not below half of the model's positions. `usual` is lowered
    to the room that is left. Raises ValueError if `wanted` is more than that.
    """
    positions, tokenizer = decoder.target.positions, tokenizer_of(decoder)
    keep = max(1, positions // 2, positions - (wanted or usual))
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:keep] for text in texts]
    room = positions - max(map(len, rows))
    if wanted is not None and wanted > room:
        raise ValueError(
            f"after these prompts the model has room for {room} new tokens, got {wanted}; lower --max-new-tokens"
        )
    return rows, min(usual, room) if wanted is None else wanted
