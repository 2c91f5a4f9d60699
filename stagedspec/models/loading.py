"""Reads checkpoints and tokenizers, and checks that those of target and draft fit together."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from stagedspec.models import checkpoints
from stagedspec.models.gpt2 import check_config, finite
from stagedspec.models.plain_gpt2 import check_plain
from stagedspec.values import plain, whole


@contextmanager
def no_bars() -> Iterator[None]:
    """Hides transformers' progress bars, which would disturb the caller's."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# Wrappers of models, by an attribute that only they have: how to get the model inside.
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
    local = checkpoints.local_folder(source, role)
    try:
        _check_config(checkpoints.find(source, role) or _fetch_config(str(source)), source, role)
        with no_bars() if local else nullcontext():  # a download shows how far it is
            loaded: Any = GPT2LMHeadModel.from_pretrained(
                str(local or source),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype="auto",
            )
            model, notes = loaded
    except ValueError:
        raise
    except Exception as error:  # the hub client, safetensors and transformers each raise their own kinds
        raise ValueError(f"{role}: {_why_not_loaded(source, local, error)}") from error
    missing = sorted(notes["missing_keys"])
    if missing or notes.get("mismatched_keys"):
        raise ValueError(
            f"{role}: the checkpoint in {source} does not fit its config.json: "
            f"missing {missing[:3]}, mismatched {list(notes.get('mismatched_keys', ()))[:3]}; save the "
            "model again with save_pretrained"
        )
    folder = local or checkpoints.cached_folder(str(source))
    for path in [] if folder is None else checkpoints.weight_files(folder):
        _check_kinds(path, model, role)
    for name, parameter in model.named_parameters():
        if not finite(parameter):
            raise ValueError(
                f"{role}: the checkpoint in {source} is damaged: {name} holds values that are not finite; "
                "download or save it again"
            )
    check_config(model.config)
    check_plain(model.eval(), role)  # an adapter beside the weights is loaded with them
    return model


def _fetch_config(name: str) -> Path:
    """Fetches config.json alone from the hub, so that a model that is no GPT-2 is not downloaded; its folder."""
    return Path(str(cached_file(name, checkpoints.CONFIG))).parent


def _check_config(folder: Path, source: str | Path, role: str) -> None:
    values = checkpoints.read_config(folder, role, str(source))
    try:
        config = GPT2Config(**{name: value for name, value in values.items() if name != "model_type"})
    except Exception as error:  # transformers checks types with an error class of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"{role}: {folder / checkpoints.CONFIG} is damaged: {reason}") from error
    check_config(config)


def _why_not_loaded(source: str | Path, local: Path | None, error: Exception) -> str:
    """The error message for a checkpoint that transformers could not load."""
    reason = " ".join(str(error).split()) or type(error).__name__
    folder = local or checkpoints.cached_folder(str(source))
    if folder is not None and checkpoints.weight_files(folder):
        return f"the checkpoint in {folder} cannot be loaded: {reason}; {checkpoints.how_to_mend(folder)}"
    if folder is not None and (checkpoints.pickled(folder) or checkpoints.known_to_lack_weights(str(source))):
        return checkpoints.without_weights(folder, str(source))
    return (
        f"{source!r} is no local folder and could not be fetched from the model hub: {reason}. "
        "Check the name and the network, or give a folder written by save_pretrained"
    )


def _check_kinds(path: Path, model: GPT2LMHeadModel, role: str) -> None:
    """Raises ValueError for weights of whole numbers, which transformers converts to floats without a word.

    A file may hold more tensors than the model, such as the causal masks of old checkpoints: those do not matter.
    """
    with safe_open(path, "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    prefix = f"{model.base_model_prefix}."
    loaded = {name.removeprefix(prefix) for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, kind in kinds.items():
        if name.removeprefix(prefix) in loaded and kind not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{role}: {path} is damaged: {name} must be floating-point, it is {kind}; save the model in a "
                "floating-point dtype"
            )


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
            "draft with the target's tokenizer, or, if the rest are rows of padding, Decoder.from_pretrained(..., "
            "tokenizer=...)"
        )


def padding(model: GPT2LMHeadModel) -> int | None:
    """The model's own padding token, or None. As to transformers, `model.config` does not matter."""
    return model.generation_config.pad_token_id


def end_of_sequence(model: GPT2LMHeadModel) -> list[int]:
    """The model's own end-of-sequence ids; ids outside its vocabulary can never come up and are dropped."""
    eos = plain(model.generation_config.eos_token_id)
    ids = [] if eos is None else eos if isinstance(eos, (list, tuple)) else [eos]
    numbers = [number for number in map(whole, ids) if number is not None]
    if len(numbers) < len(ids):
        raise ValueError(
            f"the model's eos_token_id must be a token id or a list of them, got {eos!r}: mend its generation_config"
        )
    return [token for token in numbers if 0 <= token < model.config.vocab_size]


def generation_defaults(model: GPT2LMHeadModel) -> dict[str, Any]:
    """The settings of the model's own generation config, by name.

    Without those that `padding` and `end_of_sequence` read, and those without effect.
    """
    known = vars(GenerationConfig())
    read = ("pad_token_id", "eos_token_id", "use_cache", "transformers_version")
    own = vars(model.generation_config).items()
    return {
        name: copy.deepcopy(value)
        for name, value in own
        if name in known and name[0] != "_" and name not in read and value is not None and value is not False
    }


def load_tokenizer(source: object) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, or None if there is none.

    Raises ValueError for a source that cannot have one, and for a tokenizer that cannot be loaded.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    if isinstance(source, GPT2LMHeadModel):
        return None
    if not isinstance(source, (str, Path)):
        raise ValueError(f"tokenizer must be a hub id, a folder or a tokenizer, got {type(source).__name__}")
    folder = Path(source).expanduser()
    location = str(folder if folder.is_dir() else source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded: {' '.join(str(error).split())}; mend or remove its files, "
            "or give tokenizer=..."
        ) from error
    # Without files transformers makes a tokenizer of the model's kind that knows its special tokens alone.
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return None if tokenizer.get_vocab().keys() <= added else tokenizer


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
    raise ValueError(
        f"target and draft must share the vocabulary: sizes {len(ours)} and {len(theirs)}; use a draft with the "
        "target's tokenizer"
    )
