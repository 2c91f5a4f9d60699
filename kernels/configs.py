"""Tuned launch configurations: JSON by operation, shape and device name, over defaults in code.

What a configuration may change is speed alone. What fixes the order of a sum (splits and blocks of the reduced
dimension) is decided by the weight's shape in the operation's own file and is not tunable.
"""

import json
import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"


def slug(device_name: str) -> str:
    """The file name of a device: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@cache
def _table(device_name: str) -> dict:
    path = FOLDER / f"{slug(device_name)}.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to use the defaults") from error


def config(op: str, shape: tuple[int, ...], device_name: str, default: dict) -> dict:
    """The tuned settings of `op` at `shape` on the device, else `default`. Keys that `default` lacks are ignored."""
    tuned = _table(device_name).get(op, {}).get("x".join(map(str, shape)), {})
    return default | {key: value for key, value in tuned.items() if key in default}
