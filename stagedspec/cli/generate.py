"""`stagedspec generate`: complete a prompt, or the prompts of a file."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from stagedspec.cli import early_checks, many
from stagedspec.cli.options import (
    STAGED,
    Backend,
    Depth,
    Device,
    Draft,
    Dtype,
    Json,
    Mode,
    Ngram,
    NoColor,
    Nodes,
    Passes,
    Target,
    Tree,
    Width,
    load_decoder,
    tokenizer_of,
)
from stagedspec.cli.origins import Shown, pieces, save
from stagedspec.cli.output import as_lines, preparing, stream
from stagedspec.decoding.limits import MAX_BATCH, NEW_TOKENS, check_batch

if TYPE_CHECKING:
    from stagedspec.decoder import Decoder

FIELD, TEXT_FIELD = "prompt", "text"

EXAMPLES = (
    "Examples: [bold]stagedspec generate 'def fibonacci(n):'[/bold]; with sampling: [bold]stagedspec generate "
    "--sample --top-k 50 --seed 7 'import os'[/bold]; from a pipe: "
    "[bold]head -20 file.py | stagedspec generate -[/bold]; a file of prompts: [bold]stagedspec generate "
    "--prompts prompts.jsonl --out completions.jsonl[/bold]"
)
MANY = "Many prompts"
# Names of statistics that would be read otherwise.
SHOWN = {
    "total_seconds": "seconds of prefill and steps",
    "seconds_to_first_token": "seconds from call to first token",
}


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to complete; - reads it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file instead; - is stdin.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help="New tokens at most. Default: 128, or what the model has room for; with --prompts 128, and a prompt "
            "that leaves no room for them is skipped.",
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="How to decode; the output is the same in every mode.")] = STAGED,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample; without it, greedy.", rich_help_panel="Sampling")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Above 0; default 1.", rich_help_panel="Sampling")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.", rich_help_panel="Sampling")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.", rich_help_panel="Sampling")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest.", rich_help_panel="Sampling")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="The same seed gives the same text, so runs repeat unless it is changed.", rich_help_panel="Sampling"
        ),
    ] = 0,
    target: Target = None,
    draft: Draft = None,
    ngram: Ngram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    nodes: Nodes = None,
    depth: Depth = None,
    width: Width = None,
    passes: Passes = None,
    tree: Tree = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print statistics to stderr at the end.")] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Complete the prompts of a file of JSON lines, gzipped if it ends in .gz, into the file --out.",
            rich_help_panel=MANY,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of completions, a JSON line a sample, in the order of the prompts once all are there. What it "
            "holds already is not done again, so the same command goes on after an interruption; settings are kept in "
            "OUT.run.json.",
            rich_help_panel=MANY,
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Field of the prompt's text.", rich_help_panel=MANY)] = FIELD,
    id_field: Annotated[
        str | None,
        typer.Option(help="Field that names a prompt, which its completions have too.", rich_help_panel=MANY),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="Field of the completion's text in --out.", rich_help_panel=MANY)
    ] = TEXT_FIELD,
    num_samples: Annotated[int, typer.Option(help="Completions of each prompt.", rich_help_panel=MANY)] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End a completion before this text; may be given several times, and may hold \\n for a line break.",
            rich_help_panel=MANY,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Prompts decoded together, at most 16; in plain decoding 64.", rich_help_panel=MANY)
    ] = MAX_BATCH,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Write token ids, too.", rich_help_panel=MANY)] = False,
    save_html: Annotated[
        Path | None, typer.Option(help="Also write the coloured completion to a file: HTML, or SVG if it ends in .svg.")
    ] = None,
    as_json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Complete a prompt, streaming to the terminal; each token is coloured by the model that first proposed it.

    With --prompts, complete all prompts of a file into another one.
    """
    early_checks.check_at_least(1, max_new_tokens=max_new_tokens, num_samples=num_samples, batch=batch)
    warpers = early_checks.check_sampling(seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if warpers and not sample:
        options = ", ".join("--" + name.replace("_", "-") for name in warpers)
        raise ValueError(f"{options} given without --sample: greedy decoding would ignore it; add --sample")
    if save_html is not None:
        early_checks.check_output(save_html, "--save-html")
    early_checks.check_new_tokens(target, max_new_tokens)

    def load() -> "Decoder":
        return load_decoder(
            target, draft, ngram, device, dtype, backend, tree, (mode.value,),
            nodes=nodes, depth=depth, width=width, passes=passes,
        )  # fmt: skip

    if prompts is not None:
        for option, given in (
            ("a prompt", prompt), ("--file", file), ("--json", as_json), ("--stats", stats), ("--save-html", save_html)
        ):  # fmt: skip
            if given:
                raise ValueError(f"there is both {option} and --prompts: leave one of them out")
        check_batch(batch, mode.value)
        strings = [text.replace("\\n", "\n") for text in stop or []]
        if not all(strings):
            raise ValueError("--stop must not be empty")
        shape = {"nodes": nodes, "depth": depth, "width": width, "passes": passes}
        early_checks.check_models(
            target, draft, ngram, device, dtype, backend, tree,
            {name: value for name, value in shape.items() if value is not None}, (mode.value,),
        )  # fmt: skip
        new_tokens = NEW_TOKENS if max_new_tokens is None else max_new_tokens
        decides: dict[str, Any] = {
            "target": target, "dtype": dtype, "field": field, "max_new_tokens": new_tokens, "sample": sample,
            **{name: warpers.get(name) for name in ("temperature", "top_k", "top_p", "min_p")},
            "seed": seed, "num_samples": num_samples, "stop": strings, "token_ids": token_ids,
        }  # fmt: skip
        given_prompts, completions = many.check(prompts, out, field, id_field, text_field, decides)
        many.complete(
            load, given_prompts, completions, id_field, text_field, token_ids, strings, num_samples,
            max_new_tokens=new_tokens, mode=mode.value, do_sample=sample, seed=seed, batch=batch,
            stop_strings=strings or None, **warpers,
        )  # fmt: skip
        return
    for option, needless in (
        ("--out", out), ("--field", field != FIELD), ("--id-field", id_field),
        ("--text-field", text_field != TEXT_FIELD), ("--num-samples", num_samples > 1), ("--stop", stop),
        ("--batch", batch != MAX_BATCH), ("--token-ids", token_ids),
    ):  # fmt: skip
        if needless:
            raise ValueError(f"{option} belongs to a file of prompts: add --prompts")
    text = _prompt_text(prompt, file)
    decoder = load()
    tokenizer = tokenizer_of(decoder)
    if max_new_tokens is None:
        length = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        max_new_tokens = max(1, min(128, decoder.target.positions - length))
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "mode": mode.value,
        "do_sample": sample,
        "seed": seed,
        **warpers,
    }
    with preparing():
        decoder.tree_for(mode.value, do_sample=sample)
    if as_json:
        completion = decoder.complete(text, **settings)
        result = {
            "prompt": text,
            "text": completion.text,
            "tokens": list(completion.tokens),
            "origins": list(completion.origins),
            "settings": settings,
            "stats": completion.stats.as_dict(),
        }
        typer.echo(as_lines(result))
        parts = pieces(tokenizer, completion.tokens, completion.origins)
    else:
        parts = stream(Console(no_color=no_color or None, highlight=False), decoder, text, **settings)
        if stats and decoder.last_stats is not None:
            _print_stats(decoder.last_stats.as_dict())
    if save_html is not None:
        title = f"{mode.value}, {f'sampled, seed {seed}' if sample else 'greedy'}"
        save(save_html, [Shown(title, text, parts)])


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    if prompt is None and file is None:
        raise ValueError("there is no prompt: give a text, - to read stdin, or --file")
    if prompt is not None and file is not None:
        raise ValueError("there is both a prompt and --file: leave one of them out")
    if file is not None and str(file) != "-" and (file.is_dir() or not file.exists()):  # it may be a pipe
        raise ValueError(f"{file} is a folder: name a file" if file.is_dir() else f"no such file: {file}")
    try:
        if "-" in (prompt, str(file)):
            text = sys.stdin.read()
        else:
            text = prompt if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text: {error}") from None
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    return text


def _print_stats(values: dict[str, Any]) -> None:
    from rich.table import Table

    grid = Table(show_header=False, box=None)
    grid.add_column(no_wrap=True)
    for name, value in values.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {_number(part)}" for key, part in value.items())
        elif isinstance(value, list):
            while value and not value[-1]:  # depths that no step reached
                value = value[:-1]
            shown = ", ".join(_number(part) for part in value)
        else:
            shown = _number(value)
        if shown:
            grid.add_row(SHOWN.get(name, name.replace("_", " ")), shown)
    Console(stderr=True).print(grid)


def _number(value: float | str | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
