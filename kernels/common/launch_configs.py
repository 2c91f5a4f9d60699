"""Tuned launch settings: JSON by operation, shape and device name, over defaults in code.

A file belongs to one device: {"format": FORMAT, "device": its name, "settings": {op: {shape: {setting: number}}}}.
There are at most two: one in `kernels/configs/` and, taking precedence, one in the user's cache folder, which
`stagedspec tune` writes. A setting may change speed alone. What decides the order of a sum (splits and blocks of the
reduced dimension) depends on the weight's shape, in the operation's own file, and is not tunable.

An operation asks for its settings at every launch and keeps none of them, so that `trying` and `write` take effect.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from stagedspec.kernels.common.files import write_text

FORMAT = "stagedspec kernel settings 1"
PACKAGED = Path(__file__).parents[1] / "configs"
INTERPRETER = "interpreter"  # what the device is called where kernels are interpreted

Table = dict[str, dict[str, dict[str, int]]]
Shape = TypeVar("Shape", bound=tuple[int, ...])

_tried: dict[tuple[str, str], dict[str, int]] = {}
_asked: dict[tuple[str, tuple[int, ...], torch.device], dict[str, int]] = {}  # what `config` answered, once for each


def cache_folder() -> Path:
    """Where the user's own measurements are kept. Raises RuntimeError where there is no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stagedspec"


def slug(device_name: str) -> str:
    """The file name of a device: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def shape_name(shape: tuple[int, ...]) -> str:
    """The key of a shape: (50257, 1280) -> "50257x1280"."""
    return "x".join(map(str, shape))


def user_file(device_name: str) -> Path:
    """The file that `stagedspec tune` writes. Raises RuntimeError where there is no home folder."""
    return cache_folder() / "kernels" / f"{slug(device_name)}.json"


# ---------------------------------------------------------------- reading


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else INTERPRETER


def config(
    op: str,
    shape: Shape,
    device: torch.device,
    candidates: Callable[[Shape, torch.device], list[dict[str, int]]],
) -> dict[str, int]:
    """The tuned settings of `op` at `shape` on the device, else the first of its candidates. Keys that this one lacks
    are ignored.

    Raises ValueError for a file that is damaged or was written for something else.
    """
    asked = op, shape, device
    if asked not in _asked:
        key, default = (op, shape_name(shape)), candidates(shape, device)[0]
        tuned = _tried[key] if key in _tried else _table(device_name(device)).get(op, {}).get(key[1], {})
        _asked[asked] = default | {name: value for name, value in tuned.items() if name in default}
    return _asked[asked]


@cache
def _table(device_name: str) -> Table:
    """The settings of the device: the package's, overridden by the user's."""
    name = f"{slug(device_name)}.json"
    known: Table = {}
    for folder in (PACKAGED, _user_folder()):
        if folder is not None and (folder / name).is_file():
            for op, shapes in read(folder / name, device_name).items():
                known[op] = known.get(op, {}) | shapes
    return known


def _user_folder() -> Path | None:
    try:
        return user_file("").parent
    except RuntimeError:
        return None


def read(path: Path, device_name: str) -> Table:
    """The settings in a file. Raises ValueError, naming file and key, where it is damaged or for something else."""

    def expect(good: bool, key: str, wanted: str, got: object) -> None:
        if not good:
            raise ValueError(
                f"{path}: {key} must be {wanted}, got {got!r}; remove the file and run `stagedspec tune` again"
            )

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it to use the defaults, or run `stagedspec tune` again after that"
        ) from None
    expect(isinstance(content, dict), "the content", "a JSON object", content)
    expect(content.get("format") == FORMAT, "format", repr(FORMAT), content.get("format"))
    expect(content.get("device") == device_name, "device", repr(device_name), content.get("device"))
    table = content.get("settings")
    expect(isinstance(table, dict), "settings", "an object", table)
    for op, shapes in table.items():
        expect(isinstance(shapes, dict), f"settings.{op}", "an object of shapes", shapes)
        for shape, values in shapes.items():
            expect(isinstance(values, dict), f"settings.{op}.{shape}", "an object of settings", values)
            for name, value in values.items():
                good = type(value) is int and 0 <= value < 2**16
                expect(good, f"settings.{op}.{shape}.{name}", "a whole number from 0 to 65535", value)
    return table


# ---------------------------------------------------------------- writing


def write(path: Path, device_name: str, table: Table) -> None:
    """Writes settings over those that the file already has; other operations and shapes keep theirs.

    Raises OSError where it cannot be written, ValueError where there is something else in its place.
    """
    known = read(path, device_name) if path.is_file() else {}
    for op, shapes in table.items():
        known[op] = known.get(op, {}) | shapes
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "device": device_name, "settings": known}
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n", shared=True)
    _table.cache_clear()
    _asked.clear()


@contextmanager
def trying(op: str, shape: tuple[int, ...], settings: dict[str, int]) -> Iterator[None]:
    """Inside the block, `config` returns these settings for the operation at the shape."""
    key = op, shape_name(shape)
    before = dict(_tried)
    _tried[key] = settings
    _asked.clear()
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)
        _asked.clear()
