"""Where "auto" trusts the kernels beyond the GPUs they were developed on: records that `stagedspec check` writes.

A record is a JSON file in the user's cache folder, one for each GPU: {"format": FORMAT, "setup": what was checked,
"checked": {head size: [dtype, ...]}}. It holds for exactly that setup: another driver, torch, Triton or change of the
kernels ends the trust. A damaged record is ignored with a warning.
"""

import json
import re
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from stagedspec.kernels.common.files import write_text
from stagedspec.kernels.common.launch_configs import PACKAGED, cache_folder, device_name, slug

FORMAT = "stagedspec trusted GPU 1"

Checked = dict[str, list[str]]  # head size to dtypes
_Device = torch.device  # which a type checker does not find in `Setup`: a field hides torch there


@dataclass(frozen=True)
class Setup:
    """Everything on which the kernels' results may depend. gpu: its name; kernels: a digest of their source."""

    gpu: str
    driver: str
    torch: str
    triton: str
    kernels: str

    @classmethod
    def of(cls, device: _Device) -> "Setup":
        """The setup here. In the interpreter the GPU is called "interpreter"."""
        import triton

        name = device_name(device)
        return cls(name, _driver(), torch.__version__, triton.__version__, _kernels(name))


def _driver() -> str:
    """The version of the NVIDIA driver; where the system does not tell it, the CUDA version that it supports."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)*", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found is not None:
        return found[0]
    supported = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "none" if supported is None else f"CUDA {supported()}"


def _kernels(gpu: str) -> str:
    """A digest of the kernels, and of the launch settings that were tuned for the GPU."""
    digest = sha256(_sources())
    folders = [PACKAGED]
    with suppress(RuntimeError):  # no home folder
        folders.append(default_folder().parent)
    for path in (folder / f"{slug(gpu)}.json" for folder in folders):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _sources() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))


def default_folder() -> Path:
    """Where "auto" looks for records. Raises RuntimeError where there is no home folder."""
    return cache_folder() / "kernels" / "trusted"


def file_of(setup: Setup, folder: Path | None = None) -> Path:
    """The record of a GPU, in the default folder unless another one is named."""
    return (folder or default_folder()) / f"{slug(setup.gpu)}.json"


# ---------------------------------------------------------------- reading


def why_not(device: torch.device, head_size: int | None = None, dtype: torch.dtype | None = None) -> str:
    """Why "auto" cannot trust the kernels on the device, or nothing. head_size, dtype: None for any."""
    try:
        known = default_folder().is_dir()
    except RuntimeError:
        known = False
    return missing(Setup.of(device), head_size, dtype) if known else "it has not been checked"


def missing(
    setup: Setup, head_size: int | None = None, dtype: torch.dtype | None = None, folder: Path | None = None
) -> str:
    """What the record of the setup lacks, or nothing."""
    found = _read(file_of(setup, folder))
    if found is None:
        return "it has not been checked"
    then, checked = found
    changed = [field.name for field in fields(Setup) if getattr(then, field.name) != getattr(setup, field.name)]
    if changed:
        name = changed[0]
        return f"it was checked with {name} {getattr(then, name)}, now {getattr(setup, name)}"
    if head_size is not None and str(head_size) not in checked:
        return f"it was checked with heads of {', '.join(checked)}, not {head_size}"
    dtypes = [checked[str(head_size)]] if head_size is not None else checked.values()
    known = sorted({name for names in dtypes for name in names})
    if dtype is not None and _name(dtype) not in known:
        return f"it was checked in {', '.join(known)}, not {_name(dtype)}"
    return ""


def _read(path: Path) -> tuple[Setup, Checked] | None:
    """What a record says; None where there is none, and with a warning where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format must be {FORMAT!r}, got {content['format']!r}")
        setup, checked = Setup(**content["setup"]), content["checked"]
        good = (
            bool(checked)
            and all(isinstance(value, str) for value in asdict(setup).values())
            and all(
                isinstance(dtypes, list) and dtypes and all(isinstance(name, str) for name in dtypes)
                for dtypes in checked.values()
            )
        )
        if not good:
            raise ValueError("a value has the wrong type")
        return setup, checked
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(
            f"{path} is damaged and ignored ({type(error).__name__}: {error}); `stagedspec check` writes it anew",
            stacklevel=2,
        )
        return None


# ---------------------------------------------------------------- writing


def write(setup: Setup, head_sizes: list[int], dtype: torch.dtype, folder: Path | None = None) -> Path:
    """Records that the kernels passed the check with these heads in this dtype. What was recorded before for the same
    setup stays. The file appears whole or not at all.

    Raises OSError where it cannot be written, RuntimeError where there is no home folder.
    """
    path = file_of(setup, folder)
    found = _read(path)
    checked = found[1] if found is not None and found[0] == setup else {}
    for size in head_sizes:
        checked[str(size)] = sorted({*checked.get(str(size), []), _name(dtype)})
    content = {"format": FORMAT, "setup": asdict(setup), "checked": checked}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n", shared=True)
    return path


def forget(setup: Setup, folder: Path | None = None) -> None:
    """Ends the trust in a GPU, if there was any."""
    file_of(setup, folder).unlink(missing_ok=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
