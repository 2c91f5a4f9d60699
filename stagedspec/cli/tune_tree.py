"""`stagedspec tune-tree`: choose token trees for a pair of models on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from stagedspec.cli import early_checks
from stagedspec.cli.options import (
    Backend,
    Device,
    Draft,
    Dtype,
    Json,
    Ngram,
    NoColor,
    Target,
    fit_prompts,
    load_decoder,
)
from stagedspec.cli.output import as_lines, empty_table, progress_bar, wide_console
from stagedspec.planning.tree import MODES
from stagedspec.tuning.prompts import PROMPTS, read_prompts

if TYPE_CHECKING:
    from stagedspec.planning.profile import Tuning

EXAMPLES = (
    "Examples: [bold]stagedspec tune-tree[/bold] keeps what it finds for later runs with the same models on "
    "this machine; [bold]stagedspec tune-tree --target gpt2-large --draft distilgpt2 --prompts mine.jsonl --out "
    "tree.json[/bold] writes a file, for Decoder.from_pretrained(..., tree='tree.json')."
)


def tune_tree(
    out: Annotated[Path | None, typer.Option(help="File to write, JSON. Default: the user's cache.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with a `prompt` field. Default: a few beginnings of Python.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts at most.")] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "-n", min=8, help="New tokens of each. Default: 96, or what the model has room for."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=16, help="Batch size; may be given several times. Default: 1.")
    ] = None,
    target: Target = None,
    draft: Draft = None,
    ngram: Ngram = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="After so long, take the cost model's best trees without timing others. Default: no limit, with the "
            "Triton backend 75.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    as_json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Measure a pair of models on this machine, find the fastest token trees for it, and save them.

    With the Triton backend, where every tree has kernels of its own to compile, fewer trees are timed.

    Prints the cost model's predicted speed beside the measured one. Exit status 1 if any output differs from plain
    (autoregressive) decoding. To tune the launch settings of GPU kernels, use `stagedspec tune`.
    """
    if out is not None:
        early_checks.check_output(out, "--out")
    if prompts is not None:
        early_checks.check_input(prompts, "--prompts", "JSON lines with a `prompt` text")
    texts = PROMPTS if prompts is None else read_prompts(prompts)
    early_checks.check_new_tokens(target, max_new_tokens)
    decoder = load_decoder(target, draft, ngram, device, dtype, backend, modes=MODES)
    encoded, max_new_tokens = fit_prompts(texts[:limit], decoder, max_new_tokens, 96)

    from stagedspec.planning.profile import keep
    from stagedspec.tuning.trees import tune

    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, refresh=True)

        tuning = tune(decoder, encoded, max_new_tokens, batch or [1], report, seconds)
    if out is None:
        saved = keep(decoder.models, tuning)
    else:
        saved = out.expanduser()
        tuning.save(saved)
    same = all(row["identical"] for row in tuning.measured)
    if as_json:
        trees = [
            {"mode": mode, "batch": size, "sampled": sampled, "tree": vars(levels[-1])}
            for (mode, size, sampled), levels in tuning.trees.items()
        ]
        result = {"saved": None if saved is None else str(saved), "identical": same, "trees": trees}
        typer.echo(as_lines(result | {"measured": tuning.measured}))
    else:
        _print_tuning(wide_console(no_color), tuning)
        typer.echo("The cache folder cannot be written; use --out." if saved is None else f"Saved in {saved}")
        if decoder.device.type == "cuda":
            typer.echo(f"It applies to this GPU and --backend {decoder.backend} only.")
    if far := _far_from_predicted(tuning.measured):
        typer.echo(
            f"warning: the speed-up was predicted badly ({'; '.join(far)}). If the machine was busy, tune again when "
            "it is idle; otherwise give prompts like those that you complete (--prompts)",
            err=True,
        )
    if not same:
        raise typer.Exit(1)


def _far_from_predicted(measured: list[dict[str, Any]]) -> list[str]:
    """Describes the speed-ups that were less than half or more than twice what was predicted."""
    found = []
    for row in measured:
        predicted, speedup = row["predicted_speedup"], row["measured_speedup"]
        if speedup is not None and not 0.5 <= predicted / speedup <= 2:
            name = row["mode"] + (", sampled" if row["sampled"] else "")
            found.append(f"{name}, {row['batch']} rows: {predicted:.2f}x predicted, {speedup:.2f}x measured")
    return found


def _print_tuning(console: Console, tuning: "Tuning") -> None:
    grid = empty_table("predicted / measured")
    grid.add_column("mode", no_wrap=True)
    for name in ("rows", "nodes", "tokens/s", "speed-up", "tokens/step"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in tuning.measured:
        levels = tuning.trees.get((row["mode"], row["batch"], row["sampled"]))
        speedup = "-" if row["measured_speedup"] is None else f"{row['measured_speedup']:.2f}x"
        grid.add_row(
            row["mode"] + (", sampled" if row["sampled"] else ""),
            str(row["batch"]),
            "1" if levels is None else str(levels[-1].nodes),
            f"{row['predicted_tokens_per_second']:.0f}/{row['measured_tokens_per_second']:.0f}",
            f"{row['predicted_speedup']:.2f}x/{speedup}",
            f"{row['predicted_tokens_per_step']:.2f}/{row['measured_tokens_per_step']:.2f}",
        )
    console.print(grid)
