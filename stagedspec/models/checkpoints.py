"""Checks the files of a checkpoint before torch and transformers are imported.

Which files of a folder hold the weights is transformers' rule: model.safetensors, or else the shards that
model.safetensors.index.json names. Other files beside them do not matter.
"""

import json
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def find(source: str | Path, role: str) -> Path | None:
    """The folder of a checkpoint's files: a local one, or the hub cache's; None for a hub id that is to be fetched.

    role ("target", "draft") is for messages. Raises ValueError for a source that cannot be loaded: neither a folder nor
    a hub id, no GPT-2, without safetensors weights, or a hub id that is not cached while the hub cannot be reached.
    """
    folder = local_folder(source, role)
    if folder is None:
        return _find_in_cache(str(source), role)
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{role}: {folder} holds an adapter without its model; merge it (merge_and_unload) and save the model"
            )
        raise ValueError(f"{role}: {folder} has no {CONFIG}; expected a folder written by save_pretrained")
    read_config(folder, role)
    if not weight_files(folder):
        raise ValueError(f"{role}: {without_weights(folder)}")
    return folder


def local_folder(source: str | Path, role: str) -> Path | None:
    """The local folder that source names, or None if it can only be a hub id."""
    if not str(source):
        raise ValueError(f"{role}: the name is empty; expected a hub id or a folder written by save_pretrained")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{role}: {source} is a file; expected a folder written by save_pretrained, or a hub id")
    if isinstance(source, Path) or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{role}: no checkpoint folder at {str(source)!r}; expected one written by save_pretrained, or a hub id"
        )
    return None


def read_config(folder: Path, role: str, name: str | None = None) -> dict:
    """The values of config.json, which must be a GPT-2's. name: the checkpoint's on the hub, for messages."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{role}: {path} is not valid JSON: {error}; download or save it again") from error
    if not isinstance(values, dict) or values.get("model_type") != "gpt2":
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{role}: {name or folder} holds a {kind!r} model; expected model_type 'gpt2'")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads; empty where there are none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
        names, _ = set(values["weight_map"].values()), values["metadata"]  # both are asked for by transformers
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} cannot be loaded: expected JSON with metadata and a weight_map from tensors to files ({error!r})"
        ) from error


def pickled(folder: Path) -> bool:
    """Whether there are pickled weights, which are never loaded."""
    return any(path.suffix in (".bin", ".pt", ".pth", ".pkl") for path in folder.iterdir())


def without_weights(folder: Path, name: str | None = None) -> str:
    """The message for a checkpoint that has no weights to load."""
    if (folder / WEIGHTS).is_symlink():
        return (
            f"{name or folder} has a {WEIGHTS} that is a link to a file that is not there: fetch the checkpoint again"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f", but {', '.join(others[:3])}: rename or save it again" if others else ""
    if pickled(folder):
        found += ". Pickled weights are never loaded: convert them with transformers' save_pretrained"
    return f"{name or folder} has no .safetensors weights ({WEIGHTS} or {INDEX}){found}"


# ---------------------------------------------------------------- the hub's cache


def cached_folder(name: str) -> Path | None:
    """Where the hub's cache has the files of a hub id; None if it does not have its config.json."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, CONFIG)
    return Path(config).parent if isinstance(config, str) else None


def known_to_lack_weights(name: str) -> bool:
    """Whether the hub has said that it has no safetensors for this id."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return all(try_to_load_from_cache(name, file) is _CACHED_NO_EXIST for file in (WEIGHTS, INDEX))


def _find_in_cache(name: str, role: str) -> Path | None:
    from huggingface_hub.errors import HFValidationError

    try:
        folder = cached_folder(name)
    except HFValidationError as error:
        raise ValueError(
            f"{role}: {name!r} is neither a local folder nor a hub id such as 'openai/gpt2': give one of the two"
        ) from error
    if folder is not None:
        read_config(folder, role, name)
        if weight_files(folder):
            return folder
    reason = _unreachable()
    if reason is None:
        return folder
    if folder is not None and pickled(folder):
        raise ValueError(f"{role}: {without_weights(folder, name)}")
    missing = "is not in the local cache" if folder is None else "has no weights in the local cache"
    raise ValueError(
        f"{role}: {name!r} is no local folder, {missing}, and the model hub cannot be reached ({reason}). "
        "Connect to the network, or give a folder written by save_pretrained"
    )


def _unreachable() -> str | None:
    """Why the model hub cannot be reached, if not even its name resolves: transformers would retry for minutes."""
    import socket

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if not getproxies():
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError as error:
            return str(error)
    return None


def how_to_mend(folder: Path) -> str:
    """The advice of error messages for weights that cannot be read."""
    for path in weight_files(folder):
        with suppress(OSError), path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                return f"{path.name} only points to the weights: fetch them with `git lfs pull`"
    return "download or save it again"
