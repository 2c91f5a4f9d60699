"""Markdown tables, and the parts of bench/README.md that the benchmarks write themselves."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from stagedspec.kernels.common.files import write_text

HERE = Path(__file__).resolve().parent
README, FIGURES = HERE / "README.md", HERE / "figures"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table padded to line up as plain text: first column left-aligned, the others right-aligned."""
    cells = [list(headings), *map(list, rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headings))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(parts)} |"

    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A number as text; a dash for None."""
    return "-" if value is None else f"{value:{form}}{unit}"


def replace_between(text: str, name: str, content: str) -> str:
    """text with the lines between `<!-- name: begin -->` and `<!-- name: end -->` replaced.

    Raises ValueError unless both marks are there, once, in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected the marks {begin} and {end}, once each and in this order")
    return f"{text[: text.index(begin) + len(begin)]}\n{content.strip()}\n{text[text.index(end) :]}"


def update_readme(
    name: str, content: str, figures: Iterable[Path], readme: Path | None = None, prefix: str = ""
) -> None:
    """Writes a benchmark's tables between its marks in the README, by default bench/README.md, and its figures beside
    it, in figures/, their names with the prefix."""
    readme = readme or README
    text = replace_between(readme.read_text(encoding="utf-8"), name, content)
    folder = readme.parent / FIGURES.name
    folder.mkdir(exist_ok=True)
    for figure in figures:
        shutil.copyfile(figure, folder / (prefix + figure.name))
    write_text(readme, text)
