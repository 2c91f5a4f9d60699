"""Prompts of the demo, the checks and the benchmarks: a few that are built in, and files of them."""

import gzip
import json
from pathlib import Path

# The beginnings of Python files and functions.
PROMPTS = (
    'def read_json(path):\n    """Read a JSON file and return its contents."""\n    with open(path) as',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\nimport argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "    def __eq__(self, other):\n        if not isinstance(other, ",
    "import numpy as np\n\n\ndef normalize(x, axis=-1):\n",
    'def test_empty_input():\n    """An empty list gives nothing."""\n    result = ',
    "    for name, value in sorted(options.items()):\n        if value is None:\n            raise ValueError(",
    "from dataclasses import dataclass\n\n\n@dataclass\nclass Point:\n    x: float\n    y: float\n\n    def ",
)


def read_prompts(path: Path) -> list[str]:
    """The `prompt` texts of a file of JSON lines, gzipped if its name ends in .gz. Empty lines are skipped.

    Raises ValueError for a file that is missing, unreadable or empty, or has a line without a prompt text.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {path}: {error}") from None
    expected = f"{path} must hold JSON lines, each with a `prompt` text"
    if not lines:
        raise ValueError(f"{expected}, but there are no prompts")
    prompts = []
    for number, line in lines:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{expected}, but line {number} has none")
        prompts.append(prompt)
    return prompts
