"""The command line: demo, generate, fit-ngram, tune-tree, warm-up, tune, check, train. The library does the work.

torch and transformers are imported inside the commands, so that --help answers at once.
"""

import contextlib
import difflib
import functools
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
import typer.core
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

import stagedspec
from stagedspec import early
from stagedspec.kernels.common.progress import reporting
from stagedspec.kernels.state.invalid_logits import InvalidLogitsError
from stagedspec.models import checkpoints
from stagedspec.origins import VISIBLE, Shown, pieces, save
from stagedspec.planning.tree import MODES
from stagedspec.training.sources import check_sources
from stagedspec.tuning.compare import PROMPTS, Run, compare, table

Mode = Enum("Mode", {name: name for name in MODES}, type=str)

# Colours of the Okabe-Ito palette, told apart by every kind of colour vision, each with a second cue.
ORIGIN_STYLES = {
    "target": Style(bold=True),
    "draft": Style(color="#56b4e9", italic=True),
    "ngram": Style(color="#e69f00", underline=True),
}
PROMPT_STYLE = Style(dim=True)
TABLE_WIDTH = 80

DEMO_PROMPTS = PROMPTS[:4]
MOST_ROWS = 4096  # that fit-ngram samples at once


class Commands(typer.core.TyperGroup):
    """The commands; a text in a command's place is answered with the command that completes texts."""

    def resolve_command(self, ctx, args):
        known = args[0] in self.commands or difflib.get_close_matches(args[0], self.commands)
        if not known:
            text = " ".join(args)
            text = shlex.quote(text if len(text) <= 60 else "...")
            ctx.fail(f"There is no command {args[0]!r}. To complete a text: stagedspec generate {text}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="stagedspec",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Decode GPT-2 models faster, with exactly the same output: staged speculative decoding.\n\n"
    "A small draft model and an n-gram table guess a tree of continuations; one pass of the target model checks them "
    "all. Every mode gives the same tokens as plain decoding. Start with [bold]stagedspec demo[/bold].",
)


# ---- what the commands share ------------------------------------------------------------------------------------


def clear_errors(command: Callable) -> Callable:
    """Turns errors that users can cause into one red line on stderr and exit status 2; Ctrl-C into status 130."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            # The reader left (`| head`). Nothing more may be written, at exit either.
            with contextlib.suppress(OSError):  # a stdout without a file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (ValueError, OSError, InvalidLogitsError) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            console = Console(stderr=True)
            console.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("\ninterrupted", style="dim")
            raise typer.Exit(130) from None

    return wrapped


Target = Annotated[
    str | None,
    typer.Option(
        help="Target model: a hub id or a local folder. Default: the embedded trio.", rich_help_panel="Models"
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


def load_decoder(target, draft, ngram, device, dtype, backend, tree=None, modes=(), text=True, **shape):
    """The decoder that the model options ask for: the embedded trio unless a target is named. tree: a tuning's file;
    modes: those that will be used; text: whether it needs a tokenizer; shape: fields of a TreeConfig.

    What is wrong with the options is said before anything is imported or loaded.
    """
    settings = {name: value for name, value in shape.items() if value is not None}
    early.check_models(target, draft, ngram, device, dtype, backend, tree, settings, modes)
    quiet_transformers()
    options = {"device": device, "dtype": dtype, "backend": backend}
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


def as_lines(result: dict) -> str:
    """JSON with an entry a line, but a list of plain values on one. No line ends inside a value."""
    plain_list = r"\[\n *([^][{}]*?)\n *\]"
    return re.sub(plain_list, lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", json.dumps(result, indent=2))


def quiet_transformers() -> None:
    """Keeps notes and progress bars of loading out of the output."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def paint(console: Console, text: str, style: Style) -> None:
    """Writes text as it is: no wrapping, no tab expansion, no newline added."""
    if console.is_terminal:
        text = text.translate(VISIBLE)  # never a control sequence
    console.print(Segments([Segment(text, style)]), soft_wrap=True, end="")
    console.file.flush()


def stream(console: Console, decoder, prompt: str, **settings) -> list[tuple[str, str]]:
    """Completes a prompt on the console, each token in the style of the model that first proposed it, and gives the
    text's pieces with their origins."""
    chunks = decoder.stream(prompt, **settings)
    paint(console, prompt, PROMPT_STYLE)
    written, tokens, origins = [], [], []
    for chunk in chunks:
        tokens += chunk.tokens
        origins += chunk.origins
        parts = pieces(decoder.tokenizer, tokens, origins)
        if parts and parts[-1][0].endswith("\ufffd"):  # bytes of a character that the next chunk goes on with
            continue
        for text, origin in parts:
            paint(console, text, ORIGIN_STYLES[origin])
        written += parts
        tokens, origins = [], []
    rest = pieces(decoder.tokenizer, tokens, origins)
    for text, origin in rest:
        paint(console, text, ORIGIN_STYLES[origin])
    paint(console, "\n", Style())
    return written + rest


def print_legend(console: Console) -> None:
    """What the styles mean, where there are any."""
    if console.color_system is None:
        return
    console.print(
        "proposed by the ",
        *(f"[{style}]{'n-gram' if name == 'ngram' else name}[/]" for name, style in ORIGIN_STYLES.items()),
    )


def wide_console(no_color: bool, **options) -> Console:
    """A console of at least TABLE_WIDTH columns. A narrower terminal wraps lines; rich would cut the cells."""
    console = Console(no_color=no_color or None, highlight=False, **options)
    console.width = max(console.width, TABLE_WIDTH)
    return console


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Says on a terminal why nothing happens for a while: loading, and at first use compiling and measuring."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with (
        console.status("loading; at first use also compiling and measuring") as status,
        reporting(lambda ready, total: status.update(f"compiling GPU kernels: {ready} of {total} are ready")),
    ):
        yield


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stagedspec {stagedspec.__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# ---- demo -------------------------------------------------------------------------------------------------------


@app.command(
    epilog="Example: [bold]stagedspec demo[/bold]. The same with other models: "
    "[bold]stagedspec demo --target gpt2-large --draft distilgpt2[/bold]"
)
@clear_errors
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
    """Complete a few Python prompts in all four modes: the text, the speed, and whether the outputs are the same.

    Each token is coloured by the model that first proposed it. Exit status 1 if any output differs from plain
    (autoregressive) decoding.
    """
    early.check_at_least(1, max_new_tokens=max_new_tokens)
    early.check_sampling(seed)
    early.check_room(target, max_new_tokens)
    console = wide_console(no_color, quiet=as_json)
    decoder = load_decoder(target, draft, ngram, device, dtype, backend, tree, modes=MODES)
    rows, max_new_tokens = _that_fit(DEMO_PROMPTS, decoder, max_new_tokens, 96)
    prompts = [decoder.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]
    samplings = {
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


def _that_fit(texts: Sequence[str], decoder, wanted: int | None, usual: int) -> tuple[list[list[int]], int]:
    """The tokens of texts, and how many new tokens follow each: `wanted`, or as many of `usual` as there is room for.

    Texts that leave too little room are cut, to half of the model's positions at most. Raises ValueError where there is
    no room for `wanted`.
    """
    positions = decoder.target.positions
    keep = max(1, positions // 2, positions - (wanted or usual))
    rows = [decoder.tokenizer(text, add_special_tokens=False).input_ids[:keep] for text in texts]
    room = positions - max(map(len, rows))
    if wanted is not None and wanted > room:
        raise ValueError(
            f"after these prompts the model has room for {room} new tokens, got {wanted}; lower --max-new-tokens"
        )
    return rows, min(usual, room) if wanted is None else wanted


def _measure(decoder, prompts: list[str], settings: dict, repeats: int) -> tuple[list, list[dict]]:
    """Times all modes on the prompts, a warm-up first; gives the rows and the staged completions."""
    completions: dict[str, dict] = {}

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


def progress_bar(*columns, auto_refresh: bool = True, transient: bool = True):
    """A rich Progress on stderr, silent where that is no terminal.

    columns: further rich columns. auto_refresh: False where time is measured, so that no thread draws meanwhile.
    transient: whether the bar vanishes at the end.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *columns,
        console=console,
        transient=transient,
        auto_refresh=auto_refresh,
        disable=not console.is_terminal,
    )


# ---- generate ---------------------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: [bold]stagedspec generate 'def fibonacci(n):'[/bold]; with sampling: [bold]stagedspec generate "
    "--sample --top-k 50 --seed 7 'import os'[/bold]; from a pipe: "
    "[bold]head -20 file.py | stagedspec generate -[/bold]"
)
@clear_errors
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to complete; - reads it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file instead; - is stdin.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "-n", help="New tokens at most. Default: 128, or what the model has room for."
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="How to decode; the output is the same in every mode.")] = Mode.staged,
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
    save_html: Annotated[
        Path | None, typer.Option(help="Also write the coloured completion to a file: HTML, or SVG if it ends in .svg.")
    ] = None,
    as_json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Complete a prompt, streaming to the terminal; each token is coloured by the model that first proposed it."""
    early.check_at_least(1, max_new_tokens=max_new_tokens)
    warpers = early.check_sampling(seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if warpers and not sample:
        options = ", ".join("--" + name.replace("_", "-") for name in warpers)
        raise ValueError(f"{options} given without --sample: greedy decoding would ignore it; add --sample")
    if save_html is not None:
        early.check_output(save_html, "--save-html")
    early.check_room(target, max_new_tokens)
    text = _prompt_text(prompt, file)
    decoder = load_decoder(
        target, draft, ngram, device, dtype, backend, tree, (mode.value,),
        nodes=nodes, depth=depth, width=width, passes=passes,
    )  # fmt: skip
    if max_new_tokens is None:
        length = len(decoder.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        max_new_tokens = max(1, min(128, decoder.target.positions - length))
    settings = {"max_new_tokens": max_new_tokens, "mode": mode.value, "do_sample": sample, "seed": seed, **warpers}
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
        parts = pieces(decoder.tokenizer, completion.tokens, completion.origins)
    else:
        parts = stream(Console(no_color=no_color or None, highlight=False), decoder, text, **settings)
        if stats:
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


def _print_stats(values: dict) -> None:
    from rich.table import Table

    grid = Table(show_header=False, box=None)
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
            grid.add_row(name.replace("_", " "), shown)
    Console(stderr=True).print(grid)


def _number(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- fit-ngram --------------------------------------------------------------------------------------------------


@app.command(
    "fit-ngram",
    epilog="Examples: [bold]stagedspec fit-ngram --draft distilgpt2 --out ngram.safetensors[/bold] samples the draft; "
    "[bold]stagedspec fit-ngram --draft distilgpt2 --text src/ --out ngram.safetensors[/bold] reads files. "
    "Then: [bold]stagedspec generate --target gpt2-large --draft distilgpt2 --ngram ngram.safetensors ...[/bold]",
)
@clear_errors
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
        Path | None, typer.Option(help="Folder of finished samples, for going on later. Default: OUT.samples")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Fit the n-gram table (Katz back-off trigram) that guesses ahead of the draft.

    By default on samples of the draft, as the paper did; interrupted, the same command goes on. With --text, on files.
    """
    early.check_output(out, "--out", make_folder=True)
    if work_dir is not None:
        early.check_folder(work_dir, "--work-dir")
    early.check_at_least(1, tokens=tokens, batch=batch)
    if batch > MOST_ROWS:
        raise ValueError(f"--batch can be at most {MOST_ROWS} rows, got {batch}: more are sampled batch after batch")
    early.check_sampling(seed, temperature=temperature)
    files = _text_files(text) if text else []
    if tokenizer is not None and not files:
        raise ValueError("--tokenizer reads the files of --text: add --text, or leave out --tokenizer")
    if draft is None:
        assets = Path(stagedspec.__file__).parent / "assets"
        if not (assets / "draft").is_dir():
            raise ValueError("this installation has no embedded models; name a draft with --draft")
        draft, tokenizer = str(assets / "draft"), tokenizer or str(assets / "target")
    early.check_device(device)
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

            def report(values: dict) -> None:
                rate = f"{values['tokens_per_second']:.0f} tokens/s"
                progress.update(task, completed=values["step"], total=values["steps"], rate=rate)

            import torch

            shards = sample_shards(
                model.to(where).eval(),
                tokens,
                temperature,
                work_dir or out.with_name(out.name + ".samples"),
                torch.full((2,), end_of_text),  # every row starts from the end of text alone
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
            early.check_input(file, "--text", "or a folder")
        files += found
    return files


# ---- tune-tree --------------------------------------------------------------------------------------------------


@app.command(
    "tune-tree",
    epilog="Examples: [bold]stagedspec tune-tree[/bold] keeps what it finds for later runs with the same models on "
    "this machine; [bold]stagedspec tune-tree --target gpt2-large --draft distilgpt2 --prompts mine.jsonl --out "
    "tree.json[/bold] writes a file, for Decoder.from_pretrained(..., tree='tree.json').",
)
@clear_errors
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
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    as_json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Choose token trees for a pair of models on this machine: the fastest of those that measured passes and acceptance
    promise most. Saves them.

    For the torch backend, on a GPU too: the Triton backend's trees are of one shape, which the cost model chooses.

    Prints the cost model's predicted speed beside the measured one. Exit status 1 if any output differs from plain
    (autoregressive) decoding. The launch settings of GPU kernels are another matter: `stagedspec tune`.
    """
    if out is not None:
        early.check_output(out, "--out")
    texts = list(PROMPTS) if prompts is None else _prompt_lines(prompts)
    if backend == "triton":
        raise ValueError("tuning trees is not supported by backend 'triton': choose --backend torch, or leave it out")
    backend = "torch" if backend == "auto" else backend
    early.check_room(target, max_new_tokens)
    decoder = load_decoder(target, draft, ngram, device, dtype, backend, modes=MODES)
    encoded, max_new_tokens = _that_fit(texts[:limit], decoder, max_new_tokens, 96)

    from stagedspec.planning.profile import keep
    from stagedspec.tuning.trees import tune

    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, refresh=True)

        tuning = tune(decoder, encoded, max_new_tokens, batch or [1], report)
    if out is None:
        saved = keep(decoder, tuning)
    else:
        saved = out.expanduser()
        tuning.save(saved)
    same = all(row["identical"] for row in tuning.measured)
    if as_json:
        trees = [
            {"mode": mode, "batch": size, "sampled": sampled, "tree": vars(ladder[-1])}
            for (mode, size, sampled), ladder in tuning.trees.items()
        ]
        result = {"saved": None if saved is None else str(saved), "identical": same, "trees": trees}
        typer.echo(as_lines(result | {"measured": tuning.measured}))
    else:
        _print_tuning(wide_console(no_color), tuning)
        typer.echo("The cache folder cannot be written; use --out." if saved is None else f"Saved in {saved}")
        if decoder.device.type == "cuda":
            typer.echo("It holds for --backend torch.")
    if far := _far_from_predicted(tuning.measured):
        typer.echo(
            f"warning: the speed-up was predicted badly ({'; '.join(far)}). If the machine was busy, tune again when "
            "it is not; else give prompts of the kind that you complete (--prompts)",
            err=True,
        )
    if not same:
        raise typer.Exit(1)


def _far_from_predicted(measured: list[dict]) -> list[str]:
    """What was measured at less than half or more than twice what was predicted."""
    found = []
    for row in measured:
        predicted, speedup = row["predicted_speedup"], row["measured_speedup"]
        if speedup is not None and not 0.5 <= predicted / speedup <= 2:
            name = row["mode"] + (", sampled" if row["sampled"] else "")
            found.append(f"{name}, {row['batch']} rows: {predicted:.2f}x predicted, {speedup:.2f}x measured")
    return found


def _prompt_lines(path: Path) -> list[str]:
    import gzip

    early.check_input(path, "--prompts", "JSON lines with a `prompt` text")
    texts: list[str] = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                value = json.loads(line)
                text = value.get("prompt") if isinstance(value, dict) else None
                if not isinstance(text, str) or not text:
                    raise ValueError(f"line {number} has none")
                texts.append(text)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"--prompts {path} must hold JSON lines, each with a `prompt` text: {error}") from None
    if not texts:
        raise ValueError(f"--prompts {path} must hold JSON lines, each with a `prompt` text, but it is empty")
    return texts


def _print_tuning(console: Console, tuning) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "predicted / measured"
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    grid.add_column("mode", no_wrap=True)
    for name in ("rows", "nodes", "tokens/s", "speed-up", "tokens/step"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in tuning.measured:
        ladder = tuning.trees.get((row["mode"], row["batch"], row["sampled"]))
        speedup = "-" if row["measured_speedup"] is None else f"{row['measured_speedup']:.2f}x"
        grid.add_row(
            row["mode"] + (", sampled" if row["sampled"] else ""),
            str(row["batch"]),
            "1" if ladder is None else str(ladder[-1].nodes),
            f"{row['predicted_tokens_per_second']:.0f}/{row['measured_tokens_per_second']:.0f}",
            f"{row['predicted_speedup']:.2f}x/{speedup}",
            f"{row['predicted_tokens_per_step']:.2f}/{row['measured_tokens_per_step']:.2f}",
        )
    console.print(grid)


# ---- warm-up ----------------------------------------------------------------------------------------------------


@app.command(
    "warm-up",
    epilog="Examples: [bold]stagedspec warm-up --target gpt2-large --draft distilgpt2[/bold] when a container image is "
    "built; [bold]stagedspec warm-up --mode staged --batch 1 --batch 8 --tokens 512[/bold] for what a service uses.",
)
@clear_errors
def warm_up(
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Mode; may be given several times. Default: all that the models allow.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=16, help="Batch size; may be given several times. Default: 1.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="The longest prompt and its new tokens together. Default: the model's room.")
    ] = None,
    greedy: Annotated[bool, typer.Option(help="Make greedy decoding ready.", rich_help_panel="Sampling")] = True,
    sample: Annotated[bool, typer.Option(help="Make sampling ready.", rich_help_panel="Sampling")] = True,
    temperature: Annotated[float | None, typer.Option(help="Above 0; default 1.", rich_help_panel="Sampling")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.", rich_help_panel="Sampling")] = 50,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.", rich_help_panel="Sampling")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest.", rich_help_panel="Sampling")
    ] = None,
    target: Target = None,
    draft: Draft = None,
    ngram: Ngram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    tree: Tree = None,
) -> None:
    """Compile what the first generations on this GPU would wait for, and measure what trees are chosen by.

    What it leaves lies in Triton's cache (TRITON_CACHE_DIR, else ~/.triton/cache) and in the user's cache folder
    (XDG_CACHE_HOME, else ~/.cache): keep both to keep it. It needs the GPU that will be used, or one of its kind.
    Interrupted, it leaves what was compiled, and goes on from there when it is run again.
    """
    if not greedy and not sample:
        raise ValueError("nothing to make ready: leave out --no-greedy or --no-sample")
    early.check_at_least(2, tokens=tokens)
    sampled = early.check_sampling(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    early.check_device(device, backend)
    if backend == "torch":
        raise ValueError("warm-up prepares GPU kernels, but backend torch has none; leave out --backend")
    if backend != "triton":
        early.check_gpu("warm-up", device)
    wanted = () if mode is None else tuple(one.value for one in mode)
    decoder = load_decoder(target, draft, ngram, device, dtype, backend, tree, wanted, text=False)
    begin = time.perf_counter()
    with progress_bar() as progress:
        tasks: dict = {}

        def report(name: str, ready: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name)
            progress.update(tasks[name], completed=ready, total=total)

        made = decoder.warm_up(
            None if mode is None else [one.value for one in mode],
            [{}] * greedy + [sampled] * sample,
            batch or [1],
            tokens,
            report,
        )
    typer.echo(f"ready: {made} kernels compiled or loaded in {time.perf_counter() - begin:.1f} s")


# ---- tune -------------------------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: [bold]stagedspec tune[/bold] tunes for the embedded models and keeps what it finds for later "
    "runs on this GPU; [bold]stagedspec tune --model L --op lm_head[/bold] tunes one operation at the shapes of GPT-2 "
    "L; [bold]stagedspec tune --model path/to/model --out settings.json[/bold] writes a file of its own."
)
@clear_errors
def tune(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Shapes to tune for: S, M, L, XL (GPT-2's sizes), embedded, or a model, a hub id or a folder; may be "
            "given several times. Default: embedded."
        ),
    ] = None,
    op: Annotated[
        list[str] | None, typer.Option(help="Operation; may be given several times. Default: all that can be tuned.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, JSON. Default: in the user's cache, where kernels look first.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, ...")] = "auto",
    as_json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Tune the launch settings of the GPU kernels for this GPU: speed alone, the results stay the same bit by bit.

    Settings whose results differ in any bit from the default's are refused. Which token trees to grow is another
    matter: `stagedspec tune-tree`.
    """
    if out is not None:
        early.check_output(out, "--out")
    early.check_device(device)
    for name in op or ():
        if name not in early.OPERATIONS:
            raise ValueError(f"--op must be one of {', '.join(early.OPERATIONS)}, got {name!r}")
    for name in model or ():
        if name not in ("embedded", "S", "M", "L", "XL"):
            try:
                checkpoints.find(name, "--model")
            except ValueError as error:
                raise ValueError(f"{error}, or S, M, L, XL or embedded") from None

    early.check_gpu("tune", device)

    import torch

    from stagedspec.devices import resolve_device
    from stagedspec.kernels.common import launch_configs as configs
    from stagedspec.tuning import kernels as tune_kernels

    where = resolve_device(device)
    ops = op or list(tune_kernels.PROBLEMS)
    shapes = tune_kernels.shapes(model or ["embedded"])
    name = configs.device_name(where)
    saved = (configs.user_file(name) if out is None else out).expanduser()
    if saved.is_file():  # what it says of other shapes stays: better damaged now than after the tuning
        configs.read(saved, name)
    torch.cuda.set_device(where)  # kernels are launched, and graphs captured, on the current device
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("tuning", total=None)

        def report(name: str, done: int, total: int) -> None:
            progress.update(task, description=f"tuning {name}", completed=done, total=total, refresh=True)

        def keep(one: tune_kernels.Tuned) -> None:
            configs.write(saved, name, tune_kernels.table([one]))

        found = tune_kernels.tune_all(ops, shapes, where, report, keep=keep)
    if not found:
        raise ValueError(
            f"nothing to tune: on {name} there are no settings to choose from for {', '.join(ops)} at these shapes; "
            "name other operations (--op) or models (--model)"
        )
    if as_json:
        result = {"saved": str(saved), "device": name, "tuned": [one.as_dict() for one in found]}
        typer.echo(as_lines(result))
        return
    _print_tuned(wide_console(no_color), found)
    typer.echo(f"Saved in {saved}")


def _print_tuned(console: Console, found: list) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("operation", "shape", "settings"):
        grid.add_column(name)
    for name in ("µs, default", "µs, tuned", "speed-up", "refused", "failed"):
        grid.add_column(name, justify="right", no_wrap=True)
    for one in found:
        settings = " ".join(f"{name}={value}" for name, value in one.settings.items())
        times = (" ".join(f"{time:.1f}" for time in side) for side in one.times)
        gain = "default" if one.settings == one.default else f"{one.speedup:.2f}x"
        shape = "x".join(map(str, one.shape))
        grid.add_row(one.op, shape, settings, *times, gain, str(len(one.refused)), str(len(one.failed)))
    console.print(grid)


# ---- check ------------------------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: [bold]stagedspec check[/bold] checks the kernels at the shapes of the embedded models; "
    "[bold]stagedspec check --target gpt2-large --draft distilgpt2[/bold] at those of the models that you use."
)
@clear_errors
def check(
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="Mode to compare with plain decoding; may be given several times. Default: all, which backend auto "
            "needs to trust the GPU."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the record. Default: in the user's cache, where backend auto looks.")
    ] = None,
    target: Target = None,
    draft: Draft = None,
    ngram: Ngram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Check the GPU kernels on this GPU: each against plain torch, and every mode against plain decoding, bit by bit.

    If everything passes, backend auto uses the kernels on this GPU from then on, for models with these head sizes in
    this dtype, until the driver, torch, Triton or the kernels change. Exit status 1 if anything fails.
    """
    for one in mode or ():
        if one not in MODES:
            raise ValueError(f"--mode must be one of {', '.join(MODES)}, got {one!r}")
    if out is not None:
        early.check_folder(out, "--out")
    early.check_models(target, draft, ngram, device, dtype, "auto")
    if not os.environ.get("TRITON_INTERPRET"):
        early.check_gpu("check", device)

    from stagedspec import check as checks
    from stagedspec.kernels.common import launch_configs as configs

    where = checks.check_device(device)
    decoder = load_decoder(target, draft, ngram, where, dtype, "triton", text=False)
    with progress_bar() as progress:
        task = progress.add_task("checking", total=None)
        results = checks.check(
            decoder,
            mode or (),
            report=lambda name, done, total: progress.update(task, description=name, completed=done, total=total),
        )
    failed = sum(not result.passed for result in results)
    saved = checks.record(decoder, results, out) if failed or not mode else None
    name = configs.device_name(where)
    if as_json:
        shown = {"device": name, "passed": not failed, "saved": None if saved is None else str(saved)}
        typer.echo(as_lines(shown | {"checks": [result.as_dict() for result in results]}))
    else:
        console = wide_console(no_color)
        _print_checks(console, results)
        if failed:
            console.print(
                f"{failed} of {len(results)} checks FAILED on {name}: use --backend torch there, and please report it.",
                style="bold red",
            )
        else:
            trust = f"backend auto trusts {name} from now on ({saved})" if out is None else f"recorded in {saved}"
            trust = "nothing was recorded" if saved is None else trust
            console.print(f"All {len(results)} checks passed; {trust}.", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _print_checks(console: Console, results: list) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("check", "shape", "passed"):
        grid.add_column(name, no_wrap=True)
    grid.add_column("remark")
    for result in results:
        passed = Text("yes") if result.passed else Text("NO", style="bold red")
        grid.add_row(Text(result.name), result.shape, passed, Text(result.remark))
    console.print(grid)


# ---- train ------------------------------------------------------------------------------------------------------


@app.command(
    epilog="Examples: [bold]stagedspec train --out run --preset tiny[/bold] takes a minute; "
    "[bold]stagedspec train --out run --source ~/code[/bold] trains on your own Python; "
    "[bold]stagedspec train --out run --preset gpt2-large --source ~/code[/bold] on a GPU. "
    "Then: [bold]stagedspec demo --target run/assets/target --draft run/assets/draft "
    "--ngram run/assets/ngram.safetensors[/bold]"
)
@clear_errors
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; the models come to lie in OUT/assets.")],
    preset: Annotated[
        str,
        typer.Option(
            help="embedded (what is shipped: 12 minutes on an H100), embedded-cpu (the same sizes on far less data: "
            "hours on 2 CPU cores), tiny (a trial: a minute) or gpt2-large (one GPU)."
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
    target_samples: Annotated[int | None, typer.Option(help="Tokens sampled from the target for the draft.")] = None,
    draft_samples: Annotated[int | None, typer.Option(help="Tokens sampled from the draft for the n-gram.")] = None,
    target_micro_batch: Annotated[
        int | None, typer.Option(help="Blocks of one target pass; lower it when memory runs out.")
    ] = None,
    draft_micro_batch: Annotated[int | None, typer.Option(help="Blocks of one draft pass.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between two held-out evaluations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial weights and the samples.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print progress as JSON lines instead of bars.")] = False,
) -> None:
    """Train a target, a draft distilled from it, and the n-gram table: the whole recipe, resumable.

    Interrupted, the same command goes on where it was. The models then serve in --target, --draft and --ngram.
    """
    early.check_at_least(257, vocab_size=vocab_size)  # 256 bytes and the end of text
    early.check_at_least(
        1, target_tokens=target_tokens, draft_tokens=draft_tokens, target_samples=target_samples,
        draft_samples=draft_samples, target_micro_batch=target_micro_batch, draft_micro_batch=draft_micro_batch,
        evaluate_every=evaluate_every,
    )  # fmt: skip
    if seed is not None:
        early.check_sampling(seed)
    if preset not in early.PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(early.PRESETS)}, got {preset!r}")
    early.check_folder(out, "--out")
    early.check_device(device)
    if source and not (out / "corpus.safetensors").exists():
        check_sources(source)

    from dataclasses import replace

    from rich.progress import TextColumn

    from stagedspec.training import recipe

    given = {
        "sources": tuple(source) if source else None,
        "vocab_size": vocab_size,
        "target_samples": target_samples,
        "draft_samples": draft_samples,
        "target_micro_batch": target_micro_batch,
        "draft_micro_batch": draft_micro_batch,
        "evaluate_every": evaluate_every,
        "seed": seed,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    config = recipe.preset(preset, device=device)
    for name, budget in (("target_fit", target_tokens), ("draft_fit", draft_tokens)):
        if budget is not None:
            settings[name] = replace(getattr(config, name), tokens=budget)
    config = replace(config, **settings)
    quiet_transformers()
    with progress_bar(TextColumn("{task.fields[figures]}"), transient=False) as progress:
        tasks: dict[str, int] = {}
        latest: dict[str, dict] = {}

        def show(values: dict) -> None:
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
            # Where no bar is drawn, a log still wants the evaluations and the ends of stages.
            if progress.disable and not as_json and ("heldout_bpb" in values or values["step"] == values["steps"]):
                typer.echo(f"{stage} {values['step']}/{values['steps']} {figures}".rstrip())

        assets = recipe.train(config, out, show)
    if not as_json:
        typer.echo(f"The models are in {assets}; the model card is {assets / 'README.md'}.")


def training_figures(values: dict) -> str:
    """The figures of a training stage that are known so far, in one line."""
    forms = (
        ("loss", "loss {:.3f}"),
        ("heldout_bpb", "held-out {:.3f} bits/byte"),
        ("agreement", "accepted {:.1%}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("tflops", "{:.3g} TFLOP/s"),
    )
    return ", ".join(form.format(values[name]) for name, form in forms if values.get(name) is not None)
