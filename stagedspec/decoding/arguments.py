"""Reads the arguments of `Decoder.generate`, which mean what they mean to transformers' `generate`.

Numbers of NumPy and torch become Python's own. A call that sets only its length, its sampling and its special tokens is
read here. For any other call transformers makes logits processors and stopping criteria of the arguments
(`prepared.py` translates them). `settings.py` lists all settings.
"""

import copy
import difflib
import inspect
import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache
from types import NoneType
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import BaseWatermarkingConfig

from stagedspec.decoding.limits import NEW_TOKENS
from stagedspec.decoding.prepared import Prepared, translate
from stagedspec.decoding.request import Call, CallContext, StagedOptions, token_ids, unpad, validate
from stagedspec.decoding.sampling import Sampling
from stagedspec.decoding.settings import REFUSED_ARGUMENTS, refuse_arguments, refuse_settings
from stagedspec.models.gpt2 import GPT2
from stagedspec.values import at_least, plain, whole


def read(
    context: CallContext,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int | None,
    staged: StagedOptions,
    options: dict[str, Any],
    began: float,
) -> Call:
    """Reads the arguments of `Decoder.generate` as transformers' `generate` reads its own.

    options: all further arguments of transformers' `generate`, by name. began: when the call came in, by
    `time.perf_counter`. Raises ValueError for what is unknown, not
    supported or wrong.
    """
    if unknown := options.keys() - _option_names():
        name = min(unknown)
        alike = difflib.get_close_matches(name, _option_names(), n=1)
        raise ValueError(f"unknown option {name!r}" + (f"; did you mean {alike[0]!r}?" if alike else ""))
    refuse_arguments(options)
    _refuse_own_readers(context.live_target)
    given = _copy_of_config(options.get("generation_config"))
    own = context.own_settings
    settings = Settings(options, {} if given is None else vars(given), own)
    options = settings.options
    if input_ids is None:
        input_ids = options.pop("inputs", None)
    elif options.pop("inputs", None) is not None:
        raise ValueError("input_ids and inputs were both given, and mean the same: give one of them")
    if max_new_tokens is not None:
        options["max_new_tokens"] = at_least("max_new_tokens", max_new_tokens)
    if input_ids is not None and given is None and options.keys() | context.defaults.keys() <= _SIMPLE:
        return _simple_call(context, staged, input_ids, attention_mask, settings, began)

    _check_callables(options)
    for source in (own, settings.given, options):
        refuse_settings(source)
    if input_ids is None:
        begin = settings.of("bos_token_id")
        if begin is None:
            raise ValueError("give input_ids: this model has no begin-of-sequence token to start from")
        input_ids = torch.tensor([[begin]], device="cpu")
    # Its messages are clearer than transformers'.
    unpad(input_ids, attention_mask, context.models.target.vocab_size, staged.mode)
    if given is None:
        options.setdefault("top_k", own.get("top_k"))
        if all(settings.of(name) is None for name in ("max_new_tokens", "max_length")):
            options["max_new_tokens"] = NEW_TOKENS
    else:
        options["generation_config"] = given

    if attention_mask is not None:
        options["attention_mask"] = attention_mask
    _replace_stop_strings(options, settings.of("stop_strings"), context.tokenizer)
    calls: list[Call] = []
    streamer = options.get("streamer")

    def capture(
        model: GPT2LMHeadModel, input_ids: torch.Tensor, logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, **model_kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        given = Prepared(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        calls.append(translate(context, staged, given, streamer, began))
        return input_ids

    try:
        _weightless_model(context, input_ids).generate(input_ids, custom_generate=capture, **options)
    except TypeError as error:
        if streamer is not None:  # it may have raised the error: no other code of the caller's has run
            raise
        raise ValueError(f"transformers cannot read these arguments: {error}") from error
    return calls[0]


def with_shared_criteria(context: CallContext, options: dict[str, Any]) -> dict[str, Any]:
    """Options of many calls, whose stop strings are made a criterion once: that reads the whole vocabulary."""
    options = dict(options)
    _check_callables(options)
    _replace_stop_strings(options, options.get("stop_strings", context.defaults.get("stop_strings")), context.tokenizer)
    return options


# Methods with which a model's `generate` reads its arguments. `Decoder.generate` uses those of a plain GPT-2.
_READERS = (
    "_get_logits_processor", "_get_stopping_criteria", "_prepare_generation_config", "_prepare_special_tokens",
    "_merge_criteria_processor_list", "_prepare_generated_length", "generate",
)  # fmt: skip


def _refuse_own_readers(model: GPT2LMHeadModel | None) -> None:
    """Raises ValueError for a model object that overrides one of them."""
    for name in _READERS if model is not None else ():
        used = vars(model).get(name, getattr(type(model), name, None))
        if used is not getattr(GPT2LMHeadModel, name, None):
            raise ValueError(
                f"target: the model has a {name} of its own, which only its own generate calls: use "
                "model.generate(..., custom_generate=stagedspec.hf.custom_generate(...))"
            )


def _replace_stop_strings(options: dict[str, Any], strings: Any, own_tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Makes a stopping criterion of the stop strings, in place.

    transformers cannot, because it does not pass the tokenizer on to a custom generate.
    """
    tokenizer = options.pop("tokenizer", None)
    if not isinstance(tokenizer, (PreTrainedTokenizerBase, NoneType)):
        raise ValueError(f"tokenizer must be a tokenizer of transformers or None, got {type(tokenizer).__name__}")
    tokenizer = tokenizer or own_tokenizer
    if strings is None:
        return
    if tokenizer is None:
        raise ValueError("stop_strings need a tokenizer: this decoder has none, give tokenizer=...")
    found = StopStringCriteria(tokenizer, strings)
    options |= {"stop_strings": None, "stopping_criteria": [*(options.get("stopping_criteria") or []), found]}


def _check_callables(options: dict[str, Any]) -> None:
    """Raises ValueError for options on which transformers would fail with an error that does not name them."""
    for name in ("logits_processor", "stopping_criteria"):
        value = options.get(name)
        if value is not None and (not isinstance(value, (list, tuple)) or not all(map(callable, value))):
            raise ValueError(f"{name} must be a list of callables, got {value!r}; put a single one into a list")
    streamer = options.get("streamer")
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise ValueError(f"streamer must have the methods put and end, as TextStreamer has, got {streamer!r}")
    allowed = options.get("prefix_allowed_tokens_fn")
    if allowed is not None and not callable(allowed):
        raise ValueError(f"prefix_allowed_tokens_fn must be a function of a row and its tokens, got {allowed!r}")
    mark = options.get("watermarking_config")
    if mark is not None and not isinstance(mark, (dict, BaseWatermarkingConfig)):
        raise ValueError(f"watermarking_config must be a WatermarkingConfig or a dict, got {mark!r}")
    limit = options.get("max_time")
    if limit is not None and (not isinstance(limit, (int, float)) or isinstance(limit, bool) or not limit > 0):
        raise ValueError(f"max_time must be a positive number of seconds, got {limit!r}")
    strings = options.get("stop_strings")
    several = [strings] if isinstance(strings, str) else strings
    if several is not None and (
        not isinstance(several, (list, tuple)) or not all(isinstance(text, str) and text for text in several)
    ):
        raise ValueError(f"stop_strings must be text or a list of texts, none of them empty, got {strings!r}")


_WARPING = ("temperature", "top_k", "top_p", "min_p")
# A call with a prompt that sets nothing else is read without transformers.
_SIMPLE = {"max_new_tokens", "do_sample", *_WARPING, "eos_token_id", "pad_token_id", "bos_token_id"}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _is_whole(value: object) -> bool:
    return isinstance(value, int)


def _are_ids(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_whole, value))


def _is_decay(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))


# Settings that transformers does not check: its own error would not name the setting.
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(
        ("max_length", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "no_repeat_ngram_size",
         "encoder_no_repeat_ngram_size", "bos_token_id"),
        (_is_whole, "a whole number"),
    ),
    **dict.fromkeys(
        ("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p", "epsilon_cutoff",
         "eta_cutoff", "guidance_scale"),
        (_is_number, "a number"),
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), (_are_ids, "a list of token ids")),
    "exponential_decay_length_penalty": (_is_decay, "a pair (first position, factor)"),
}  # fmt: skip


class Settings:
    """The settings of a call, checked, with numbers as Python's own.

    A setting is taken from the call's options, else from the given generation config, else from the model's own
    settings. An option that is None cancels what the other two set.

    Raises ValueError for special tokens and sampling settings that are not valid.
    """

    def __init__(self, options: dict[str, Any], given: dict[str, Any], own: dict[str, Any]):
        self.given, self.own = given, own
        self.options = {
            name: plain(value) if name in _setting_names() else value
            for name, value in options.items()
            if value is not None or given.get(name) is not None or own.get(name) is not None
        }
        for name, (right, kind) in _KINDS.items():
            if (value := self.of(name)) is not None and not right(value):
                raise ValueError(f"{name} must be {kind} or None, got {value!r}")
        self.sampling = Sampling(self.of("do_sample"), *map(self.of, _WARPING))
        self.eos, self.pad = token_ids("eos_token_id", self.of("eos_token_id")), self.of("pad_token_id")
        if self.pad is not None:
            number = whole(self.pad)
            if number is None or not -(2**63) <= number < 2**63:
                raise ValueError(f"pad_token_id must be a token id or None, got {self.pad!r}")
            self.pad = number
        self._replace("do_sample", self.sampling.do_sample)
        for name in _WARPING:
            self._replace(name, getattr(self.sampling, name))
        self._replace("eos_token_id", self.eos or None)  # transformers would index an empty list
        self._replace("pad_token_id", self.pad)
        if not self.sampling.do_sample:
            self._ignore_warping()

    def of(self, name: str) -> Any:
        """The value of a setting."""
        if name in self.options:
            return self.options[name]
        value = self.given.get(name)
        return self.own.get(name) if value is None else value

    def _replace(self, name: str, value: Any) -> None:
        """Writes the checked value of a setting back to where it came from."""
        for source in (self.options, self.given):
            if source.get(name) is not None:
                source[name] = value

    def _ignore_warping(self) -> None:
        """Drops temperature, top-k, ... of a greedy call, with a warning."""
        names = [name for name in _WARPING if self.options.pop(name, None) not in (None, getattr(Sampling, name))]
        if names:
            warnings.warn(f"greedy decoding ignores {', '.join(names)}: add do_sample=True", stacklevel=6)
        self.sampling = Sampling()


def _copy_of_config(config: object) -> GenerationConfig | None:
    """A copy of a generation config, with NumPy's and torch's numbers as Python's own."""
    if config is None:
        return None
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig or None, got {type(config).__name__}")
    config = copy.copy(config)
    vars(config).update({name: plain(value) for name, value in vars(config).items() if name in _setting_names()})
    return config


def _simple_call(
    context: CallContext,
    staged: StagedOptions,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
    began: float,
) -> Call:
    """A call whose settings are all in `_SIMPLE`."""
    new_tokens, eos, pad = settings.of("max_new_tokens"), settings.eos, settings.pad
    request = validate(
        context, staged, input_ids, attention_mask, max_new_tokens=NEW_TOKENS if new_tokens is None else new_tokens,
        sampling=settings.sampling, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    return Call(input_ids, request, (eos or [0])[0] if pad is None else pad, began)


@lru_cache(maxsize=1)
def _setting_names() -> frozenset[str]:
    return frozenset(name for name in vars(GenerationConfig()) if name[0] != "_")


@lru_cache(maxsize=1)
def _option_names() -> frozenset[str]:
    """All arguments of the `generate` of a transformers GPT-2."""
    functions = (GPT2LMHeadModel.generate, GPT2LMHeadModel.forward)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names | _setting_names() | REFUSED_ARGUMENTS.keys() | {"tokenizer"})


class _Weightless(GPT2LMHeadModel):
    """A model without weights, for its `generate` to read arguments."""

    device = torch.device("meta")  # an attribute, so that it can be where the prompt is


_weightless: "weakref.WeakKeyDictionary[GPT2, _Weightless]" = weakref.WeakKeyDictionary()  # by the target


def _weightless_model(context: CallContext, input_ids: torch.Tensor) -> GPT2LMHeadModel:
    """A `_Weightless` of the target's config, with the decoder's settings. Its `device` is the prompt's: transformers
    warns of a prompt on another device than the model's, although the decoder moves prompts itself."""
    target = context.models.target
    if target not in _weightless:
        with torch.device("meta"):
            _weightless[target] = _Weightless(target.config)
    model = copy.copy(_weightless[target])  # calls in other threads have their own
    model.generation_config, model.device = GenerationConfig(**context.own_settings), input_ids.device
    return model
