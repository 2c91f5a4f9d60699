"""Where models come from and where they run: checkpoints, tokenizers, devices, dtypes."""

import copy
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

from stagedspec.gpt2 import check_config, finite
from stagedspec.plain import check_plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the GPU if there is one; a GPU without an index is the one that is current now, with its index.

    Raises ValueError for a device that cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu' or a GPU such as 'cuda:0', got {device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch sees no CUDA GPU; use device='cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} was asked for, but there are {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU that has it, else float32. Raises ValueError for an unknown dtype."""
    if dtype == "auto":
        # On a CPU always fp32: half precision there is computed wider, so that the tokens of all modes agree
        # (kernels/reference.py), and gains nothing.
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype must be 'auto', {', '.join(DTYPES)} or the torch dtype of that name, got {dtype!r}")
    return found


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would break into the caller's."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# What wraps a model, by an attribute that tells it, and how to come to the model inside.
_WRAPPERS = {
    "_orig_mod": ": give the model inside the compiled one, ._orig_mod",
    "merge_and_unload": ": merge the adapter and give what model.merge_and_unload() returns",
    "module": ": give the model inside, .module",
}


def read_checkpoint(source: "str | Path | GPT2LMHeadModel", role: str) -> GPT2LMHeadModel:
    """A hub id, a local folder as `save_pretrained` writes it, or a GPT2LMHeadModel, to a GPT2LMHeadModel.

    Only safetensors are read, nothing is unpickled and no remote code runs. role ("target", "draft") is for messages.
    Raises ValueError for a missing, foreign or damaged checkpoint, for a hub id that cannot be reached, and for a model
    object that is no plain GPT-2 (`check_plain`).
    """
    if isinstance(source, GPT2LMHeadModel):
        check_config(source.config)
        check_plain(source, role)
        return source
    if not isinstance(source, (str, Path)):
        inside = next((way for mark, way in _WRAPPERS.items() if hasattr(source, mark)), "")
        raise ValueError(f"{role} must be a hub id, a folder or a GPT2LMHeadModel, got {type(source).__name__}{inside}")
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_folder(folder, role)
    elif folder.exists() or isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        raise ValueError(f"{role}: no checkpoint folder at {source}")
    else:
        _check_hub(str(source), role)
    location = str(folder if folder.is_dir() else source)
    try:
        with no_bars() if folder.is_dir() else nullcontext():  # a download shows how far it is
            model, notes = GPT2LMHeadModel.from_pretrained(
                location, use_safetensors=True, trust_remote_code=False, output_loading_info=True, dtype="auto"
            )
    except ValueError:
        raise
    except Exception as error:  # the hub client, safetensors and transformers each raise their own kinds
        if folder.is_dir():
            raise ValueError(f"{role}: the checkpoint in {source} cannot be loaded: {error}") from error
        raise ValueError(
            f"{role}: {source!r} is no local folder and could not be fetched from the model hub "
            f"({type(error).__name__}). "
            "Check the name and the network, or give a folder written by save_pretrained"
        ) from error
    missing = sorted(notes["missing_keys"])
    if missing or notes.get("mismatched_keys"):
        raise ValueError(
            f"{role}: the checkpoint in {source} does not fit its config: "
            f"missing {missing[:3]}, mismatched {list(notes.get('mismatched_keys', ()))[:3]}"
        )
    for name, parameter in model.named_parameters():
        if not finite(parameter):
            raise ValueError(f"{role}: the checkpoint in {source} is damaged: {name} holds values that are not finite")
    check_config(model.config)
    return model


def _check_hub(name: str, role: str) -> None:
    """Fails at once where the model hub's name does not even resolve, instead of after minutes of retries."""
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError as error:
        raise ValueError(f"{role}: {name!r} is neither a local folder nor a hub id such as 'openai/gpt2'") from error
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    if reason is None and not getproxies():
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError as error:
            reason = str(error)
    if reason is not None:
        raise ValueError(
            f"{role}: {name!r} is no local folder, is not in the local cache, and the model hub cannot be reached "
            f"({reason}). Connect to the network, or give a folder written by save_pretrained"
        )


def _check_folder(folder: Path, role: str) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{role}: {folder} has no config.json; expected a folder written by save_pretrained")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{role}: {path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != "gpt2":
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{role}: {folder} holds a {kind!r} model; expected model_type 'gpt2'")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(
            f"{role}: {folder} has no .safetensors file. Pickled weights are never loaded: "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )
    for shard in shards:
        _check_shard(shard, role)
    try:
        config = GPT2Config(**{name: value for name, value in values.items() if name != "model_type"})
    except Exception as error:  # transformers checks types with an error class of its own
        raise ValueError(f"{role}: {path} is damaged: {' '.join(str(error).split())}") from error
    check_config(config)


def _check_shard(path: Path, role: str) -> None:
    """transformers would convert whole numbers to floats without a word."""
    try:
        with safe_open(path, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{role}: the checkpoint in {path.parent} cannot be loaded: {error}") from error
    for name, kind in kinds.items():
        mask = name.endswith((".attn.bias", ".attn.masked_bias"))  # causal masks that old checkpoints carry
        if not mask and kind not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{role}: {path} is damaged: {name} must be floating-point, it is {kind}")


def same_but_padding(first: int, second: int, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether two sizes of a vocabulary may differ by rows that pad it, or by a few added tokens.

    They may where the tokenizer, if known, has no id beyond the smaller one. Else where the larger one is the smaller
    one rounded up, to a multiple of at most 128, or larger by no more than a sixteenth.
    """
    small, large = sorted((first, second))
    if tokenizer is not None and max(tokenizer.get_vocab().values(), default=small) < small:
        return True
    return large - small <= small // 16 or large in [-(-small // unit) * unit for unit in (8, 16, 32, 64, 128)]


def check_vocabularies(target: int, draft: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises ValueError unless the sizes of two vocabularies differ by padding alone."""
    if not same_but_padding(target, draft, tokenizer):
        raise ValueError(
            f"target and draft must share the vocabulary: the target has {target} tokens, the draft {draft}; use a "
            "draft with the target's tokenizer, or give from_pretrained tokenizer=... if the rest are rows of padding"
        )


def padding(model: GPT2LMHeadModel) -> int | None:
    """The model's own padding token, or None."""
    pad = model.generation_config.pad_token_id
    return model.config.pad_token_id if pad is None else pad


def end_of_sequence(model: GPT2LMHeadModel) -> list[int]:
    """The model's own end-of-sequence ids; ids outside its vocabulary can never come up and are dropped."""
    eos = model.generation_config.eos_token_id
    eos = model.config.eos_token_id if eos is None else eos
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return [token for token in ids if 0 <= token < model.config.vocab_size]


def generation_defaults(model: GPT2LMHeadModel) -> dict[str, Any]:
    """What the model's own generation config sets, by name.

    Without special tokens, which `padding` and `end_of_sequence` read, and without what changes nothing.
    """
    known = vars(GenerationConfig())
    read = ("pad_token_id", "eos_token_id", "bos_token_id", "use_cache", "transformers_version")
    own = vars(model.generation_config).items()
    return {
        name: copy.deepcopy(value)
        for name, value in own
        if name in known and name[0] != "_" and name not in read and value is not None and value is not False
    }


def load_tokenizer(source: object) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, or None if there is none."""
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    if isinstance(source, GPT2LMHeadModel):
        return None
    if not isinstance(source, (str, Path)):
        raise ValueError(f"tokenizer must be a hub id, a folder or a tokenizer, got {type(source).__name__}")
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder if folder.is_dir() else source), trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise ValueError(f"the tokenizer of {source} cannot be loaded: {error}") from error


def check_same_tokens(
    target: PreTrainedTokenizerBase | None, draft: PreTrainedTokenizerBase | None, size: int | None = None
) -> None:
    """Raises ValueError, naming the first token that differs, unless two tokenizers are the same for ids below size."""
    if target is None or draft is None:
        return
    theirs, ours = (
        {token: index for token, index in one.get_vocab().items() if size is None or index < size}
        for one in (draft, target)
    )
    if theirs == ours:
        return
    by_id = sorted((index, token) for token, index in ours.items())
    for index, token in by_id:
        if theirs.get(token) != index:
            raise ValueError(
                f"target and draft must share the vocabulary: token {index} is {token!r} for the target, "
                f"and the draft has it as {theirs.get(token)} (sizes {len(ours)} and {len(theirs)})"
            )
    raise ValueError(f"target and draft must share the vocabulary: sizes {len(ours)} and {len(theirs)}")
