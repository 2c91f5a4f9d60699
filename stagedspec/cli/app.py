"""The Typer app: its commands, and errors as one line.

torch and transformers are imported inside the commands, so that --help answers at once.
"""

import contextlib
import difflib
import functools
import os
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

import stagedspec
from stagedspec.cli import check, demo, fit_ngram, generate, train, tune, tune_tree, warm_up
from stagedspec.kernels.state.invalid_logits import InvalidLogitsError


class Commands(typer.core.TyperGroup):
    """The commands. If text is given in place of a command, the error names the command that completes text."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
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


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns errors that users can cause into one red line on stderr and exit status 2; Ctrl-C into status 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            # The reader has closed the pipe (`| head`): write nothing more, not even what Python flushes at exit.
            with contextlib.suppress(OSError):  # a stdout without a file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (ValueError, OSError, InvalidLogitsError) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            console = Console(stderr=True)
            console.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stopped:
            said = f"\ninterrupted: {stopped}" if str(stopped) else "\ninterrupted"
            Console(stderr=True).print(said, style="dim", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None

    return wrapped


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


# In the order of --help. A command is named like its function, with hyphens.
for command, examples in (
    (demo.demo, demo.EXAMPLES),
    (generate.generate, generate.EXAMPLES),
    (fit_ngram.fit_ngram, fit_ngram.EXAMPLES),
    (tune_tree.tune_tree, tune_tree.EXAMPLES),
    (warm_up.warm_up, warm_up.EXAMPLES),
    (tune.tune, tune.EXAMPLES),
    (check.check, check.EXAMPLES),
    (train.train, train.EXAMPLES),
):
    app.command(epilog=examples)(clear_errors(command))
