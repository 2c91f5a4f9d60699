"""Completions as HTML and SVG: the text survives, nothing in it is markup, and no cue is a colour alone."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from stagedspec.cli import origins
from stagedspec.cli.origins import Shown

PROMPT = "\n  def f(x):\n\treturn x < 1 & y\n"
PARTS = [
    ("</pre><script>alert('x')</script>", "draft"),
    ("  \n\n    ", "ngram"),
    ('é漢字 &amp; "q"', "target"),
    ("a\x1b[31mb\x00\r\x0b\u2028c", "draft"),
    ("w" * 150, "ngram"),
    ("", "target"),
]
TEXT = PROMPT + "".join(text for text, _ in PARTS)


class Reader(HTMLParser):
    """The text and the classes of what is inside <pre>, and every tag."""

    def __init__(self):
        super().__init__()
        self.inside, self.text, self.tags, self.classes = False, "", set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside = self.inside or tag == "pre"
        if tag == "span" and self.inside:
            self.classes += dict(attributes)["class"].split()

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        self.text += data if self.inside else ""


def test_html_holds_the_text_and_no_markup_of_it():
    page = origins.html([Shown("<title>", PROMPT, PARTS)])
    reader = Reader()
    reader.feed(page)
    # A browser drops the line feed that follows <pre>; what cannot be shown became visible.
    assert reader.text.removeprefix("\n") == TEXT.translate(origins.VISIBLE)
    assert "script" not in reader.tags and "link" not in reader.tags
    assert set(reader.classes) == {"prompt", "ngram", "draft", "target", "end"}
    assert not re.search(r"https?://|[\x00-\x08\x0b-\x1f\x7f]", page)
    assert "prefers-color-scheme:dark" in page


def test_every_origin_has_a_cue_without_colour():
    page = origins.html([])
    for rule in (r"\.ngram\{text-decoration:underline", r"\.draft\{font-style:italic", r"\.target\{font-weight:700"):
        assert re.search(rule, page)
    for cue in origins.CUES.values():
        assert cue in page


def test_svg_is_well_formed_and_holds_the_tokens():
    picture = origins.svg([Shown("greedy", PROMPT, PARTS)], columns=40)
    root = ElementTree.fromstring(picture)
    texts = [(node.get("class"), node.text) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "".join(text for name, text in texts if name == "ngram" and "w" in text) == "w" * 150
    assert max(len(text) for name, text in texts if name == "ngram" and "w" in text) == 40
    assert ("draft", "</pre><script>alert('x')</script>") in texts
    width = float(root.get("width"))
    for node in root.iter("{http://www.w3.org/2000/svg}text"):
        assert float(node.get("x")) + float(node.get("textLength")) <= width or node.get("class") == "page"
    # Below every n-gram token, spaces included, lies a line.
    lines = [node for node in root.iter("{http://www.w3.org/2000/svg}rect") if node.get("class") == "ngram"]
    assert len(lines) >= 5


def test_wide_and_combining_characters_take_their_columns():
    assert origins._columns("é漢字") == 5
    assert origins._columns("e\u0301") == 1


@pytest.mark.parametrize("palette", [origins._LIGHT, origins._DARK])
def test_text_can_be_read_on_its_tint(palette):
    """The contrast ratio of WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ink, tint in palette.values():
        light, dark = sorted((luminance(ink), luminance(tint)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_save_writes_by_the_name_and_refuses_what_cannot_be(tmp_path):
    shown = [Shown("greedy", PROMPT, PARTS)]
    origins.save(tmp_path / "a.svg", shown)
    origins.save(tmp_path / "a.html", shown)
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<svg")
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(ValueError, match="does not exist"):
        origins.save(tmp_path / "none" / "a.html", shown)
    with pytest.raises(ValueError, match="is a folder"):
        origins.save(tmp_path, shown)
    assert Shown("", "", []).share("draft") == 0.0


def test_tabs_end_at_every_fourth_column():
    body = origins.svg([Shown("t", "ab\tc\td", [])])
    assert ">ab  c   d</text>" in body
