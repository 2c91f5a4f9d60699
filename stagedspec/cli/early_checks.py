"""Checks of command-line options that need neither torch nor a model, so that errors are reported at once.

The library checks its arguments again. All checks raise ValueError with a message that names the option.
"""

import ctypes
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from stagedspec.decoding.sampling import Sampling, counters
from stagedspec.decoding.stats import marks_wanted
from stagedspec.kernels.common.constants import BACKENDS, DTYPES
from stagedspec.models import checkpoints, embedded
from stagedspec.planning.tree import TreeConfig

OPERATIONS = (
    "linear", "lm_head", "choose", "compact", "ngram_lookup", "grow_pass", "harvest_tree", "verify_commit"
)  # fmt: skip
PRESETS = ("embedded", "embedded-cpu", "tiny", "gpt2-large")


def check_models(
    target: str | None,
    draft: str | None,
    ngram: Path | None,
    device: object,
    dtype: str,
    backend: str,
    tree: Path | None = None,
    shape: dict[str, Any] | None = None,
    modes: Sequence[str] = (),
) -> None:
    """Checks the options that name models, device, dtype, backend and trees.

    shape: fields of a TreeConfig. modes: those that will be used.
    """
    marks_wanted()
    if shape and tree is not None:
        raise ValueError(f"--tree chooses whole trees: leave out --{', --'.join(shape)}, or --tree")
    if shape:
        TreeConfig(**shape)
    if target is None and (draft is not None or ngram is not None):
        raise ValueError("--draft and --ngram belong to a target: add --target")
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    if backend not in BACKENDS:
        raise ValueError(f"--backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    for option, path, written_by in (("--ngram", ngram, "fit-ngram"), ("--tree", tree, "tune-tree")):
        if path is not None:
            check_input(path, option, f"one that `stagedspec {written_by}` wrote")
            if option == "--tree" and path.expanduser().is_file():
                check_json(path.expanduser(), option, written_by)
    for source, role in ((target, "target"), (draft, "draft")):
        if source is not None:
            checkpoints.find(source, role)
    drafting = [mode for mode in modes if mode != "autoregressive"]
    if target is not None and draft is None and drafting:
        or_else = ", or choose --mode autoregressive" if len(modes) == 1 else ""
        raise ValueError(f"{', '.join(drafting)}: a mode that drafts needs a draft model: add --draft{or_else}")
    check_device(device, backend)


def check_device(device: object, backend: str = "auto") -> None:
    """Checks that the device exists and can run the backend. device: a name or a torch.device.

    Imports torch only if there may be a GPU, or if kernels are to be interpreted.
    """
    device = str(device)
    if not re.fullmatch(r"auto|cpu(:0)?|cuda(:\d+)?", device):
        raise ValueError(f"--device must be auto, cpu, or a GPU such as cuda or cuda:1, got {device!r}")
    if not device.startswith("cuda") and backend != "triton":
        return
    if no_gpu():
        if device.startswith("cuda"):
            raise ValueError(f"--device {device}: torch sees no CUDA GPU here; use --device cpu")
        if not os.environ.get("TRITON_INTERPRET"):
            raise ValueError(
                "backend 'triton' cannot run on cpu: kernels need a GPU, or TRITON_INTERPRET=1 set before Python "
                "starts to interpret them; use 'auto' or 'torch'"
            )
    from stagedspec.devices import resolve_device
    from stagedspec.kernels.backends.select import resolve

    where = resolve_device(device)
    if backend == "triton":
        resolve(backend, where)


# Commands that need a GPU: why, and what to do without one.
GPU_TASKS = {
    "warm-up": ("warm-up prepares GPU kernels", "choose --device cuda on a machine with a GPU"),
    "tune": ("kernels are tuned on a GPU", "on a CPU there is nothing to tune"),
    "check": (
        "kernels are checked on a GPU",
        "with TRITON_INTERPRET=1 set before Python starts, tiny models can be checked on a CPU",
    ),
}


def check_gpu(task: str, device: object) -> None:
    """Raises ValueError if a command of GPU_TASKS is to run on a CPU, or if there is no GPU."""
    device = str(device)
    there = not device.startswith("cpu") and not no_gpu()
    if there and device == "auto":
        from stagedspec.devices import resolve_device

        there = resolve_device(device).type == "cuda"
    if not there:
        what, instead = GPU_TASKS[task]
        why = "the device is cpu" if device.startswith("cpu") else "torch sees no CUDA GPU"
        raise ValueError(f"{what}, but {why}; {instead}")


@cache
def no_gpu() -> bool:
    """Whether torch certainly sees no GPU: it was built without CUDA and HIP, or there is no driver.

    False if only torch itself can tell. Does not import torch, which takes a second.
    """
    try:
        package = find_spec("torch")
        if package is None or package.origin is None:
            return False
        version = Path(package.origin).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    cuda, hip = (re.search(rf"^{name}\b.*=\s*['\"]", version, re.MULTILINE) for name in ("cuda", "hip"))
    if hip or not cuda:
        return not hip
    if sys.platform != "linux":
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def check_new_tokens(target: str | None, new_tokens: int | None) -> None:
    """Raises ValueError for more new tokens than the target has positions. A target on the hub is not checked."""
    if new_tokens is None:
        return
    folder = embedded.TARGET if target is None else checkpoints.find(target, "target")
    if folder is None:
        return
    values = checkpoints.read_config(folder, "target")
    positions = values.get("n_positions", values.get("max_position_embeddings", 1024))  # two names of one field
    if isinstance(positions, int) and new_tokens > positions:
        raise ValueError(f"--max-new-tokens can be at most {positions}, the target's n_positions, got {new_tokens}")


def check_sampling(seed: int = 0, **settings: Any) -> dict[str, Any]:
    """Returns the settings that were given, those that are not None. Raises ValueError for values out of range."""
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        Sampling(**given | {"do_sample": True})
        counters(seed, 1)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        rest = rest.replace("use do_sample=False", "leave out --sample")
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None
    return given


def check_at_least(least: float, **options: float | None) -> None:
    """Raises ValueError for an option below `least`; an option that is None is not checked."""
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_folder(path: Path, option: str) -> None:
    """Raises ValueError unless path is a folder or can become one."""
    there = path.expanduser().resolve()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{option} must be a folder, but {there} is a file")
    try:
        with TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write below {there}: {error.strerror}; choose another folder") from None


def check_input(path: Path, option: str, expected: str) -> None:
    """Raises ValueError unless path is a file that can be opened."""
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f"{option} must be a file, {expected}, but {path} is a folder")
    if path.exists() and not path.is_file():
        return  # opening a pipe would consume what it holds
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{option} must be a file, {expected}: cannot read {path} ({error.strerror})") from None


def check_json(path: Path, option: str, written_by: str) -> None:
    """Raises ValueError unless path holds JSON."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{option} must be a file that `stagedspec {written_by}` wrote: {path} is no JSON ({error})"
        ) from None


def check_output(path: Path, option: str, make_folder: bool = False) -> None:
    """Raises ValueError unless a file can be written at path. make_folder: its folder need not exist yet."""
    path = path.expanduser()
    folder = path.resolve().parent
    if path.is_dir():
        raise ValueError(f"{option} must be a file, but {path} is a folder")
    while make_folder and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{option}: cannot write {path}: the folder {folder} does not exist")
    if path.exists() and not path.is_file():
        return  # a pipe or a device: nothing to try
    try:
        # Another process may be about to make the file: only others are made and removed here.
        with path.open("ab") if path.exists() else TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write {path}: {error.strerror}") from None
