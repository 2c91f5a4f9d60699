"""Prompts of the demo, the checks and the benchmarks: a few that are built in, and files of them."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

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
    """The `prompt` texts of a file of JSON lines (`read_objects`).

    Raises ValueError for a file that is missing, unreadable or empty, or has a line without a prompt text.
    """
    prompts = []
    for number, values in read_objects(path):
        prompt = values.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{path} must hold JSON lines, each with a `prompt` text, but line {number} has none")
        prompts.append(prompt)
    return prompts


def read_objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with their line numbers from 1. It is gzipped if its name ends in .gz. Empty
    lines are skipped.

    Raises ValueError for a file that is missing, unreadable or empty, or has a line that is no JSON object.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read prompts from {path}: {getattr(error, 'strerror', None) or error}") from None
    if not lines:
        raise ValueError(f"{path} must hold JSON lines, each with a prompt, but there are no prompts")
    objects = []
    for number, line in lines:
        try:
            values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # editors put a mark before it
        except UnicodeDecodeError:
            raise ValueError(f"{path} must hold JSON lines, but line {number} is not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            # A position in the file would be one in the line.
            reason = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{path} must hold JSON lines, but line {number} is no JSON: {reason}") from None
        if not isinstance(values, dict):
            raise ValueError(
                f"{path} must hold JSON lines, each an object with a prompt, but line {number} is "
                f"of type {type(values).__name__}"
            )
        objects.append((number, values))
    return objects
