"""Completions that show which model first proposed each token (Spector & Ré, Figure 3), as HTML and SVG.

Every origin has a colour of the Okabe-Ito palette, which all kinds of colour vision tell apart, and a cue that needs no
colour: the target's tokens are bold, the draft's italic, the n-gram's underlined, as in the terminal. The files are
self-contained and follow the reader's light or dark setting.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from stagedspec.kernels.common.files import write_text

NAMES = {"ngram": "n-gram", "draft": "draft", "target": "target"}
CUES = {"ngram": "underlined", "draft": "italic", "target": "bold"}
# Control characters of a model's text must not reach a terminal or a file; XML does not allow U+FFFE and U+FFFF.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
_IN_FILES = VISIBLE | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], "\ufffd")
# Text on tint: at least 4.5:1 in both settings.
_LIGHT = {
    "page": ("#1f2328", "#ffffff"),
    "prompt": ("#59636e", "#ffffff"),
    "ngram": ("#8a4b00", "#fdf0d5"),
    "draft": ("#00598c", "#e2f1fb"),
    "target": ("#1f2328", "#e6e8eb"),
}
_DARK = {
    "page": ("#e6edf3", "#0d1117"),
    "prompt": ("#9198a1", "#0d1117"),
    "ngram": ("#f0b23e", "#352503"),
    "draft": ("#7cc7f2", "#0d2b40"),
    "target": ("#f0f3f6", "#343b44"),
}


@dataclass(frozen=True)
class Shown:
    """One completion to show: a heading, the prompt, and the text of each token with its origin (`pieces`)."""

    title: str
    prompt: str
    parts: Sequence[tuple[str, str]]

    def share(self, origin: str) -> float:
        """Fraction of the pieces that `origin` proposed."""
        return sum(part == origin for _, part in self.parts) / max(1, len(self.parts))


def pieces(tokenizer: Any, tokens: list[int], origins: list[str]) -> list[tuple[str, str]]:
    """The text of each token with its origin; tokens that only together make a character share the last one's."""
    result, first = [], 0
    for index, origin in enumerate(origins, 1):
        text = tokenizer.decode(tokens[first:index], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if index == len(tokens) or not text.endswith("\ufffd"):
            result.append((text, origin))
            first = index
    return result


def save(path: str | Path, completions: Sequence[Shown]) -> None:
    """Writes HTML or, to a path that ends in .svg, SVG.

    Raises ValueError if the folder does not exist, OSError if the file cannot be written.
    """
    path = check_path(path)
    write_text(path, (svg if path.suffix.lower() == ".svg" else html)(completions))


def check_path(path: str | Path) -> Path:
    """The path. Raises ValueError if it cannot be a file of an existing folder."""
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.resolve().parent} does not exist")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file")
    return path


# ---------------------------------------------------------------- HTML


def html(completions: Sequence[Shown]) -> str:
    """A page with a legend and every completion. Copied text is exactly what the model wrote."""

    def rules(palette: dict[str, tuple[str, str]]) -> str:
        page, *others = palette.items()
        body = f"body{{color:{page[1][0]};background:{page[1][1]}}}"
        return body + "".join(f".{name}{{color:{ink};background:{tint}}}" for name, (ink, tint) in others)

    style = (
        ":root{color-scheme:light dark}"
        "body{margin:2rem auto;padding:0 1rem;max-width:64rem;font:16px/1.5 system-ui,sans-serif}"
        "pre{font:14px/1.55 ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre-wrap;tab-size:4}"
        "h2{font-size:1rem;margin:1.5rem 0 .5rem}pre span,.legend span{border-radius:3px}"
        ".ngram{text-decoration:underline;text-underline-offset:3px;text-decoration-thickness:2px}"
        ".draft{font-style:italic}.target{font-weight:700}.end::after{content:'\\21b5';opacity:.6}"
        f"{rules(_LIGHT)}@media(prefers-color-scheme:dark){{{rules(_DARK)}}}"
    )
    legend = ", ".join(f'<span class="{name}">{shown}</span> ({CUES[name]})' for name, shown in NAMES.items())
    sections = "".join(_section(shown) for shown in completions)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Who proposed each token</title><style>{style}</style></head>\n<body>"
        f'<p class="legend">First proposed by {legend}; ↵ ends a line; '
        f'<span class="prompt">the prompt</span> is grey.</p>\n{sections}</body></html>\n'
    )


def _section(shown: Shown) -> str:
    spans = [f'<span class="prompt">{_escaped(shown.prompt)}</span>']
    for text, origin in shown.parts:
        *lines, rest = text.split("\n")
        title = NAMES[origin]
        spans += [f'<span class="{origin} end" title="{title}">{_escaped(line)}</span>\n' for line in lines]
        spans += [f'<span class="{origin}" title="{title}">{_escaped(rest)}</span>'] * bool(rest)
    # The parser drops a line feed right after <pre>.
    return f"<h2>{_escaped(shown.title)}: {_shares(shown)}</h2>\n<pre>\n{''.join(spans)}</pre>\n"


def _escaped(text: str) -> str:
    return escape(text.translate(_IN_FILES))


def _shares(shown: Shown) -> str:
    return ", ".join(f"{name} {100 * shown.share(origin):.0f}%" for origin, name in NAMES.items())


# ---------------------------------------------------------------- SVG

_CELL, _LINE, _MARGIN, _TAB = 8, 20, 16, 4  # pixels of a character and a line; columns of a tab
_WRAP = "\r"  # never in a text, where VISIBLE has replaced it


def svg(completions: Sequence[Shown], columns: int = 96) -> str:
    """One picture of a legend and every completion, lines broken at `columns`.

    The width of every token is fixed, so that the picture looks the same in every monospaced font.
    """
    body: list[str] = []
    y = _MARGIN + _LINE
    legend_end = _MARGIN
    for text, name in [("first proposed by: ", "page"), *((f"{NAMES[n]} ({CUES[n]})", n) for n in NAMES)]:
        body += _cell(legend_end, y, text, name)
        legend_end += _CELL * (len(text) + 2 * (name != "page"))
    for shown in completions:
        y += 2 * _LINE
        body += _cell(_MARGIN, y, f"{shown.title}: {_shares(shown)}"[:columns], "page", ' style="font-weight:700"')
        y += _LINE // 2
        y += _LINE
        column = 0
        for text, name in [(shown.prompt, "prompt"), *shown.parts]:
            for start, content in _runs(text.translate(_IN_FILES), column, columns):
                if content == "\n" and name != "prompt":
                    body += _cell(_MARGIN + _CELL * start, y, "↵", name, ' opacity=".6"')
                if content in ("\n", _WRAP):
                    column, y = 0, y + _LINE
                    continue
                body += _cell(_MARGIN + _CELL * start, y, content, name)
                column = start + _columns(content)
    width, height = max(2 * _MARGIN + _CELL * (columns + 1), legend_end), y + _LINE

    def rules(palette: dict[str, tuple[str, str]]) -> str:
        return "".join(f".{name}{{fill:{ink}}}.{name}-b{{fill:{tint}}}" for name, (ink, tint) in palette.items())

    style = (
        "text{font:13px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
        ".draft{font-style:italic}.target{font-weight:700}"
        f"{rules(_LIGHT)}@media(prefers-color-scheme:dark){{{rules(_DARK)}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"<title>Who proposed each token</title><style>{style}</style>"
        f'<rect class="page-b" width="100%" height="100%"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _runs(text: str, column: int, columns: int) -> list[tuple[int, str]]:
    """Cuts a text that begins at `column` at line ends and at the right margin, into (first column, content).

    A line end is a run "\\n" of its own, a break at the margin a run _WRAP. Tabs become spaces.
    """
    runs: list[tuple[int, str]] = []
    start, content = column, ""
    for character in text:
        at = start + _columns(content)
        if character == "\t":
            character = " " * (_TAB - at % _TAB)
        over = character != "\n" and at + _columns(character) > columns and at > 0
        if character == "\n" or over:
            runs += [(start, content)] * bool(content) + [(at, _WRAP if over else "\n")]
            start, content = 0, ""
        if character != "\n":
            content += character
    return runs + [(start, content)] * bool(content)


def _columns(text: str) -> int:
    """Width of a text in columns of a monospaced font."""
    invisible = ("Cf", "Me", "Mn")
    seen = (character for character in text if unicodedata.category(character) not in invisible)
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in seen)


def _cell(x: int, y: int, text: str, name: str, more: str = "") -> list[str]:
    """A run of text in its colours, its tint below it, and the n-gram's underline."""
    pixels = _CELL * _columns(text)
    parts = []
    if name in NAMES:
        box = f'x="{x}" y="{y - 14}" width="{pixels - 0.7:g}" height="{_LINE - 1}" rx="2"'
        parts.append(f'<rect class="{name}-b" {box}/>')
    if name == "ngram":
        parts.append(f'<rect class="ngram" x="{x}" y="{y + 3}" width="{pixels - 0.7:g}" height="1.5"/>')
    if text.strip():
        fit = f'textLength="{pixels}" lengthAdjust="spacingAndGlyphs" xml:space="preserve"'
        parts.append(f'<text class="{name}" x="{x}" y="{y}" {fit}{more}>{escape(text)}</text>')
    return parts
