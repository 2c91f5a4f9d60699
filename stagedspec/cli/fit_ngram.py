"""`stagedspec fit-ngram`: fit the n-gram table of a draft."""

from pathlib import Path
from typing import Annotated, Any

import typer

from stagedspec.cli import early_checks
from stagedspec.cli.output import progress_bar, quiet_transformers
from stagedspec.models import checkpoints, embedded

MOST_ROWS = 4096  # sampled at once

EXAMPLES = (
    "Examples: [bold]stagedspec fit-ngram --draft distilgpt2 --out ngram.safetensors[/bold] samples the draft; "
    "[bold]stagedspec fit-ngram --draft distilgpt2 --text src/ --out ngram.safetensors[/bold] reads files. "
    "Then: [bold]stagedspec generate --target gpt2-large --draft distilgpt2 --ngram ngram.safetensors ...[/bold]"
)


def fit_ngram(
    out: Annotated[Path, typer.Option(help="File to write, safetensors.")],
    draft: Annotated[
        str | None,
        typer.Option(help="Draft model to fit for, a hub id or a folder. Default: the embedded draft."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Fit on text files instead, or all .py files of folders; may be given several times."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer for --text, a hub id or a folder. Default: the draft's own.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to sample, rounded up to whole batches; the paper used 120 million.")
    ] = 1_000_000,
    temperature: Annotated[float, typer.Option(help="Of the samples; the paper used 1.5.")] = 1.5,
    batch: Annotated[int, typer.Option(help="Rows sampled at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of finished samples, so that an interrupted run can continue. Default: OUT.samples"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Fit the n-gram table (Katz back-off trigram) that guesses ahead of the draft.

    By default it is fitted on samples of the draft, as in the paper; after an interruption the same command continues.
    With --text it is fitted on files.
    """
    early_checks.check_output(out, "--out", make_folder=True)
    if work_dir is not None:
        early_checks.check_folder(work_dir, "--work-dir")
    early_checks.check_at_least(1, tokens=tokens, batch=batch)
    if batch > MOST_ROWS:
        raise ValueError(f"--batch can be at most {MOST_ROWS} rows, got {batch}: more are sampled batch after batch")
    early_checks.check_sampling(seed, temperature=temperature)
    files = _text_files(text) if text else []
    if tokenizer is not None and not files:
        raise ValueError("--tokenizer reads the files of --text: add --text, or leave out --tokenizer")
    if draft is None:
        embedded.check_installed("name a draft with --draft")
        draft, tokenizer = str(embedded.DRAFT), tokenizer or str(embedded.TARGET)
    early_checks.check_device(device)
    checkpoints.find(draft, "draft")
    from rich.progress import TextColumn

    from stagedspec.devices import resolve_device
    from stagedspec.models.loading import load_tokenizer, read_checkpoint
    from stagedspec.models.ngram_fit import fit_from_text, fit_table
    from stagedspec.training.sample import sample_shards

    where = resolve_device(device)
    quiet_transformers()
    model = read_checkpoint(draft, "draft")
    vocab_size, end_of_text = model.config.vocab_size, model.config.eos_token_id
    with progress_bar(TextColumn("{task.fields[rate]}")) as progress:
        task = progress.add_task("fitting" if files else "sampling", total=None, rate="")
        if files:
            loaded = load_tokenizer(tokenizer or draft)
            if loaded is None:
                raise ValueError(
                    f"{tokenizer or draft} has no tokenizer to read --text with; name one with --tokenizer"
                )
            table = fit_from_text(
                files,
                loaded,
                vocab_size,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        else:
            if not isinstance(end_of_text, int) or not 0 <= end_of_text < vocab_size:
                raise ValueError(f"{draft} names no end-of-text token (eos_token_id), from which sampling starts")

            def report(values: dict[str, Any]) -> None:
                rate = f"{values['tokens_per_second']:.0f} tokens/s"
                progress.update(task, completed=values["step"], total=values["steps"], rate=rate)

            import torch

            from stagedspec.decoder import Decoder

            shards = sample_shards(
                Decoder.from_pretrained(model, device=where),
                tokens,
                temperature,
                work_dir or out.with_name(out.name + ".samples"),
                torch.full((2,), end_of_text),  # every row starts with the end of text alone
                batch=batch,
                length=min(256, model.config.n_positions),
                longest_prompt=1,
                seed=seed,
                report=report,
            )
            table = fit_table(shards, vocab_size, separator=end_of_text)
        table.save(out)
    typer.echo(f"{out}: fitted on {table.fitted_tokens:,} tokens, {out.stat().st_size / 1e6:.1f} MB")


def _text_files(paths: list[Path]) -> list[Path]:
    """The files named, and all .py files of the folders named."""
    files = []
    for path in paths:
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"the folder {path} holds no .py file")
        for file in found:
            early_checks.check_input(file, "--text", "or a folder")
        files += found
    return files
