"""`stagedspec train`: train a target, a draft and the n-gram table."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stagedspec.cli import early_checks
from stagedspec.cli.output import progress_bar, quiet_transformers
from stagedspec.training.sources import check_sources

EXAMPLES = (
    "Examples: [bold]stagedspec train --out run --preset tiny[/bold] takes a minute; "
    "[bold]stagedspec train --out run --source ~/code[/bold] trains on your own Python; "
    "[bold]stagedspec train --out run --preset gpt2-large --source ~/code[/bold] on a GPU. "
    "Then: [bold]stagedspec demo --target run/assets/target --draft run/assets/draft "
    "--ngram run/assets/ngram.safetensors[/bold]"
)


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; the models are written to OUT/assets.")],
    preset: Annotated[
        str,
        typer.Option(
            help="embedded (what is shipped: 12 minutes on an H100), embedded-cpu (the same sizes on far less data: "
            "hours on 2 CPU cores), tiny (a trial: a minute) or gpt2-large (one H200: 13 minutes of training)."
        ),
    ] = "embedded",
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Python source: stdlib, an installed package or a folder; may be given several times. "
            "Default: the preset's."
        ),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens of the vocabulary.")] = None,
    target_tokens: Annotated[int | None, typer.Option(help="Tokens the target is trained on.")] = None,
    draft_tokens: Annotated[int | None, typer.Option(help="Tokens the draft is distilled on.")] = None,
    target_seconds: Annotated[
        float | None, typer.Option(help="Train the target for so long, in place of a number of tokens.")
    ] = None,
    pretraining_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the corpus the draft is trained on before it is distilled; 0: none.")
    ] = None,
    pretraining_seconds: Annotated[
        float | None, typer.Option(help="Train the draft on the corpus for so long before, in place of tokens.")
    ] = None,
    draft_seconds: Annotated[
        float | None, typer.Option(help="Distil the draft for so long, in place of a number of tokens.")
    ] = None,
    target_samples: Annotated[int | None, typer.Option(help="Tokens sampled from the target for the draft.")] = None,
    draft_samples: Annotated[int | None, typer.Option(help="Tokens sampled from the draft for the n-gram.")] = None,
    target_micro_batch: Annotated[
        int | None, typer.Option(help="Blocks of one target pass; lower it when memory runs out.")
    ] = None,
    draft_micro_batch: Annotated[int | None, typer.Option(help="Blocks of one draft pass.")] = None,
    sampled_together: Annotated[
        int | None, typer.Option(help="Rows sampled in one batch, at most 64; lower it when memory runs out.")
    ] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between two held-out evaluations.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile layers when training on a GPU. Default: yes.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial weights and the samples.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print progress as JSON lines instead of bars.")] = False,
) -> None:
    """Train a target, a draft distilled from it, and the n-gram table: the whole recipe.

    After an interruption, the same command continues. Use the models with --target, --draft and --ngram.
    """
    early_checks.check_at_least(257, vocab_size=vocab_size)  # 256 bytes and the end of text
    early_checks.check_at_least(
        1, target_tokens=target_tokens, draft_tokens=draft_tokens, target_samples=target_samples,
        draft_samples=draft_samples, target_micro_batch=target_micro_batch, draft_micro_batch=draft_micro_batch,
        evaluate_every=evaluate_every, sampled_together=sampled_together,
    )  # fmt: skip
    early_checks.check_at_least(0, pretraining_tokens=pretraining_tokens)
    budgets = {
        "target": (target_tokens, target_seconds),
        "pretraining": (pretraining_tokens, pretraining_seconds),
        "draft": (draft_tokens, draft_seconds),
    }
    for name, (tokens, seconds) in budgets.items():
        if tokens is not None and seconds is not None:
            raise ValueError(f"give --{name}-tokens or --{name}-seconds, not both")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise ValueError(f"--{name}-seconds must be a positive number, got {seconds}")
    if seed is not None:
        early_checks.check_sampling(seed)
    if preset not in early_checks.PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(early_checks.PRESETS)}, got {preset!r}")
    early_checks.check_folder(out, "--out")
    early_checks.check_device(device)
    if source and not (out / "corpus.safetensors").exists():
        check_sources(source)

    from dataclasses import replace

    from rich.progress import TaskID, TextColumn

    from stagedspec.training import recipe

    given = {
        "sources": tuple(source) if source else None,
        "vocab_size": vocab_size,
        "target_samples": target_samples,
        "draft_samples": draft_samples,
        "target_micro_batch": target_micro_batch,
        "draft_micro_batch": draft_micro_batch,
        "evaluate_every": evaluate_every,
        "sampled_together": sampled_together,
        "compiled": compiled,
        "seed": seed,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config = recipe.preset(preset, device=device)
    for name, (tokens, seconds) in budgets.items():
        fit = getattr(config, f"{name}_fit") or config.draft_fit  # a preset may have no pretraining
        if tokens is not None:
            settings[f"{name}_fit"] = replace(fit, tokens=tokens, seconds=None) if tokens else None
        if seconds is not None:
            settings[f"{name}_fit"] = replace(fit, seconds=seconds)
    config = replace(config, **settings)
    quiet_transformers()
    with progress_bar(TextColumn("{task.fields[figures]}"), transient=False) as progress:
        tasks: dict[str, TaskID] = {}
        latest: dict[str, dict[str, Any]] = {}

        def show(values: dict[str, Any]) -> None:
            stage = values["stage"]
            if as_json:
                typer.echo(json.dumps(values))
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=None, figures="")
            if values.get("skipped"):
                progress.update(tasks[stage], completed=1, total=1, figures="done before")
                return
            known = latest.setdefault(stage, {})
            known.update(values)
            figures = training_figures(known)
            progress.update(tasks[stage], completed=values["step"], total=values["steps"], figures=figures)
            # Without bars, print the evaluations and the ends of stages, for a log.
            if progress.disable and not as_json and ("heldout_bpb" in values or values["step"] == values["steps"]):
                typer.echo(f"{stage} {values['step']}/{values['steps']} {figures}".rstrip())

        assets = recipe.train(config, out, show)
    if not as_json:
        typer.echo(f"The models are in {assets}; the model card is {assets / 'README.md'}.")


def training_figures(values: dict[str, Any]) -> str:
    """The figures of a training stage that are known so far, in one line."""
    forms = (
        ("loss", "loss {:.3f}"),
        ("heldout_bpb", "held-out {:.3f} bits/byte"),
        ("agreement", "accepted {:.1%}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("tflops", "{:.3g} TFLOP/s"),
    )
    return ", ".join(form.format(values[name]) for name, form in forms if values.get(name) is not None)
