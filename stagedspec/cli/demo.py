"""`stagedspec demo`: complete a few prompts in every mode."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    Tree,
    fit_prompts,
    load_decoder,
    tokenizer_of,
)
from stagedspec.cli.output import as_lines, preparing, print_legend, progress_bar, stream, wide_console
from stagedspec.planning.tree import MODES
from stagedspec.tuning.compare import Row, Run, compare, table
from stagedspec.tuning.prompts import PROMPTS

if TYPE_CHECKING:
    from stagedspec.decoder import Decoder

DEMO_PROMPTS = PROMPTS[:4]

EXAMPLES = (
    "Example: [bold]stagedspec demo[/bold]. The same with other models: "
    "[bold]stagedspec demo --target gpt2-large --draft distilgpt2[/bold]"
)


def demo(
    max_new_tokens: Annotated[
        int | None, typer.Option(help="New tokens of each completion. Default: 96, or what the model has room for.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each mode on each prompt.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the sampled half.")] = 0,
    target: Target = None,
    draft: Draft = None,
    ngram: Ngram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    tree: Tree = None,
    as_json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Complete a few Python prompts in all four modes, print text and speed, and compare the outputs.

    Each token is coloured by the model that first proposed it. Exit status 1 if any output differs from plain
    (autoregressive) decoding.
    """
    early_checks.check_at_least(1, max_new_tokens=max_new_tokens)
    early_checks.check_sampling(seed)
    early_checks.check_new_tokens(target, max_new_tokens)
    console = wide_console(no_color, quiet=as_json)
    decoder = load_decoder(target, draft, ngram, device, dtype, backend, tree, modes=MODES)
    encoded, max_new_tokens = fit_prompts(DEMO_PROMPTS, decoder, max_new_tokens, 96)
    tokenizer = tokenizer_of(decoder)
    prompts = [str(tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in encoded]
    samplings: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "sampled, top-k 50, T=1": {"do_sample": True, "top_k": 50, "seed": seed},
    }
    report, same = [], True
    for name, sampling in samplings.items():
        settings = {"max_new_tokens": max_new_tokens, **sampling}
        console.rule(f"[bold]{name}[/bold]", align="left")
        with preparing():
            for mode in MODES:
                decoder.tree_for(mode, do_sample=sampling["do_sample"])
        if not as_json:
            print_legend(console)
            for prompt in prompts:
                console.print()
                stream(console, decoder, prompt, mode="staged", **settings)
        rows, completions = _measure(decoder, prompts, settings, repeats)
        console.print()
        title = f"{len(prompts)} prompts, up to {max_new_tokens} new tokens, {name}; medians"
        console.print(table(rows, title))
        same = same and all(row.identical for row in rows)
        report.append({"sampling": name, "modes": [row.as_dict() for row in rows], "completions": completions})
    if as_json:
        typer.echo(as_lines({"identical": same, "samplings": report}))
    elif same:
        console.print("Every mode gave exactly the tokens of autoregressive decoding.")
    else:
        console.print("OUTPUTS DIFFER from autoregressive decoding: this is a bug, please report it.", style="bold red")
    if not same:
        raise typer.Exit(1)


def _measure(
    decoder: "Decoder", prompts: list[str], settings: dict[str, Any], repeats: int
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Times every mode on the prompts, after a warm-up. Returns a row for each mode, and the staged completions."""
    completions: dict[str, dict[str, Any]] = {}

    def side(mode: str) -> Callable[[str], Run]:
        def run(prompt: str) -> Run:
            completion = decoder.complete(prompt, mode=mode, **settings)
            if mode == "staged":
                parts = {"prompt": prompt, "text": completion.text, "origins": list(completion.origins)}
                completions.setdefault(prompt, parts)
            return Run(list(completion.tokens), completion.stats.as_dict())

        return run

    sides = {mode: side(mode) for mode in MODES}
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("timing the modes", total=len(MODES) * (len(prompts) * repeats + 1))
        for run in sides.values():
            run(prompts[0])
            progress.update(task, advance=1, refresh=True)
        rows = compare(sides, prompts, repeats, on_run=lambda *_: progress.update(task, advance=1, refresh=True))
    return rows, list(completions.values())
