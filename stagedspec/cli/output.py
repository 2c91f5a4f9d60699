"""What the commands print: coloured tokens, tables, progress bars, JSON."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from stagedspec.cli.origins import VISIBLE, pieces
from stagedspec.kernels.common.progress import reporting

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn
    from rich.table import Table

    from stagedspec.decoder import Decoder

# Colours of the Okabe-Ito palette, told apart by every kind of colour vision, each with a second cue.
ORIGIN_STYLES = {
    "target": Style(bold=True),
    "draft": Style(color="#56b4e9", italic=True),
    "ngram": Style(color="#e69f00", underline=True),
}
PROMPT_STYLE = Style(dim=True)
TABLE_WIDTH = 80


def as_lines(result: dict) -> str:
    """Indented JSON with each list of plain values on one line.

    Line breaks within texts are escaped in JSON, so the pattern cannot change a text.
    """
    plain_list = r"\[\n *([^][{}]*?)\n *\]"
    return re.sub(plain_list, lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", json.dumps(result, indent=2))


def quiet_transformers() -> None:
    """Silences the log messages and progress bars of transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def paint(console: Console, text: str, style: Style) -> None:
    """Writes text as it is: no wrapping, no tab expansion, no newline added."""
    if console.is_terminal:
        text = text.translate(VISIBLE)  # never a control sequence
    console.print(Segments([Segment(text, style)]), soft_wrap=True, end="")
    console.file.flush()


def stream(console: Console, decoder: "Decoder", prompt: str, **settings: Any) -> list[tuple[str, str]]:
    """Completes a prompt on the console, each token in the style of the model that first proposed it.

    settings: arguments of Decoder.stream. Returns the text's pieces with their origins, as `pieces` does.
    """
    chunks = decoder.stream(prompt, **settings)
    paint(console, prompt, PROMPT_STYLE)
    written: list[tuple[str, str]] = []
    tokens: list[int] = []
    origins: list[str] = []
    for chunk in chunks:
        tokens += chunk.tokens
        origins += chunk.origins
        parts = pieces(decoder.tokenizer, tokens, origins)
        if parts and parts[-1][0].endswith("\ufffd"):  # the next chunk completes this character
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
    """Prints what the styles mean, unless the console has no colours."""
    if console.color_system is None:
        return
    console.print(
        "proposed by the ",
        *(f"[{style}]{'n-gram' if name == 'ngram' else name}[/]" for name, style in ORIGIN_STYLES.items()),
    )


def wide_console(no_color: bool, **options: Any) -> Console:
    """A console of at least TABLE_WIDTH columns: on a narrower terminal lines wrap, where rich would cut the cells."""
    console = Console(no_color=no_color or None, highlight=False, **options)
    console.width = max(console.width, TABLE_WIDTH)
    return console


def empty_table(title: str | None = None) -> "Table":
    """A table without rows and columns, in the style of all tables here."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Shows a status line on a terminal while models load, kernels compile and pass times are measured."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with (
        console.status("loading; at first use also compiling and measuring") as status,
        reporting(lambda ready, total: status.update(f"compiling GPU kernels: {ready} of {total} are ready")),
    ):
        yield


def progress_bar(*columns: "ProgressColumn", auto_refresh: bool = True, transient: bool = True) -> "Progress":
    """A rich Progress on stderr, disabled if that is no terminal.

    columns: further rich columns. auto_refresh: False while time is measured, so that no thread draws.
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
