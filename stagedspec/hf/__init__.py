"""At home beside transformers: `Decoder.generate` with all of its arguments, and `custom_generate` for its models.

    out = hf_model.generate(**inputs, custom_generate=stagedspec.hf.custom_generate(draft="distilgpt2"))

Arguments mean what they mean to transformers. Through `custom_generate` transformers reads them. `Decoder.generate`
makes numbers Python's own and checks them; where they say no more than how long and how to sample, that is all. Else
transformers makes logits processors and stopping criteria of them, which are translated here.
`stagedspec.hf.settings` has the table of all settings.

Three things are refused or different, always by name: settings of other algorithms (beams, ...); what only the model's
own forward pass could give (attentions, hidden states, the cache); and sampled tokens, which are drawn from the
same distribution as transformers' by other random numbers.
"""

import copy
import difflib
import inspect
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType, NoneType
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import (
    BaseWatermarkingConfig,
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MaxTimeCriteria,
)

from stagedspec.decoder import NEW_TOKENS, Call, Decoder, _unpad, token_ids
from stagedspec.decoding.callbacks import Positions, ended
from stagedspec.decoding.sampling import Sampling
from stagedspec.decoding.stats import Stats
from stagedspec.devices import DTYPES
from stagedspec.hf.settings import REFUSED_ARGUMENTS, refuse_arguments, refuse_passed_on, refuse_settings
from stagedspec.models.gpt2 import GPT2
from stagedspec.models.live import read_model
from stagedspec.models.loading import check_vocabularies, read_checkpoint
from stagedspec.models.ngram import KatzTable
from stagedspec.planning.tree import MODES, TreeConfig
from stagedspec.values import at_least, plain, whole


@dataclass
class StagedOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with return_dict_in_generate=True.

    sequences: LongTensor [B, prompt + new]. scores, logits: where asked for, a tensor fp32 [B, V] for each new
    position, after and before processing; zeros in rows that have stopped (transformers leaves there what the model
    says after padding). stats: what the generation cost.
    """

    stats: Stats | None = None


# ---------------------------------------------------------------- Decoder.generate with transformers' arguments


def read(
    decoder: Decoder,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int | None,
    mode: str,
    seed: int | Sequence[int] | torch.Tensor | None,
    tree: TreeConfig | None,
    options: dict[str, Any],
) -> Call:
    """Reads arguments of `Decoder.generate` as transformers reads those of its own."""
    if unknown := options.keys() - _options():
        name = min(unknown)
        alike = difflib.get_close_matches(name, _options(), n=1)
        raise ValueError(f"unknown option {name!r}" + (f"; did you mean {alike[0]!r}?" if alike else ""))
    refuse_arguments(options)
    _refuse_own_reading(decoder)
    given = _copy_of_config(options.get("generation_config"))
    own = _own_settings(decoder)
    settings = Settings(options, {} if given is None else vars(given), own)
    options = settings.options
    if input_ids is None:
        input_ids = options.pop("inputs", None)
    elif options.pop("inputs", None) is not None:
        raise ValueError("input_ids and inputs were both given, and mean the same: give one of them")
    if max_new_tokens is not None:
        options["max_new_tokens"] = at_least("max_new_tokens", max_new_tokens)
    if input_ids is not None and given is None and options.keys() | decoder.defaults.keys() <= _PLAIN:
        return _plain_call(decoder, input_ids, attention_mask, mode, seed, tree, settings)

    _check_callables(options)
    for source in (own, settings.given, options):
        refuse_settings(source)
    if input_ids is None:
        begin = settings.of("bos_token_id")
        if begin is None:
            raise ValueError("give input_ids: this model has no begin-of-sequence token to start from")
        input_ids = torch.tensor([[begin]], device="cpu")
    _unpad(input_ids, attention_mask, decoder.target.vocab_size)  # for its messages, before transformers' own
    if given is None:
        options.setdefault("top_k", own.get("top_k"))
        if all(settings.of(name) is None for name in ("max_new_tokens", "max_length")):
            options["max_new_tokens"] = NEW_TOKENS
    else:
        options["generation_config"] = given

    # transformers drops the tokenizer on the way to a custom generate, and then misses it.
    tokenizer = options.pop("tokenizer", None)
    if not isinstance(tokenizer, (PreTrainedTokenizerBase, NoneType)):
        raise ValueError(f"tokenizer must be a tokenizer of transformers or None, got {type(tokenizer).__name__}")
    tokenizer = tokenizer or decoder.tokenizer
    strings = settings.of("stop_strings")
    if strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need a tokenizer: this decoder has none, give tokenizer=...")
        found = StopStringCriteria(tokenizer, strings)
        options |= {"stop_strings": None, "stopping_criteria": [*(options.get("stopping_criteria") or []), found]}

    calls: list[Call] = []
    streamer, began = options.get("streamer"), time.time()

    def capture(
        model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **passed_on: Any,
    ) -> torch.Tensor:  # fmt: skip
        calls.append(
            _call(
                decoder, input_ids, logits_processor, stopping_criteria, generation_config, passed_on, mode, seed, tree,
                streamer, began,
            )
        )  # fmt: skip
        return input_ids

    if attention_mask is not None:
        options["attention_mask"] = attention_mask
    try:
        _skeleton(decoder).generate(input_ids, custom_generate=capture, **options)
    except TypeError as error:
        if streamer is not None:  # the only code of the caller's that has run
            raise
        raise ValueError(f"transformers cannot read these arguments: {error}") from error
    return calls[0]


# Methods of a model in which its `generate` reads arguments. `Decoder.generate` goes through those of a plain GPT-2.
_READING = (
    "_get_logits_processor", "_get_stopping_criteria", "_prepare_generation_config", "_prepare_special_tokens",
    "_merge_criteria_processor_list", "_prepare_generated_length", "generate",
)  # fmt: skip


def _refuse_own_reading(decoder: Decoder) -> None:
    model = decoder.live_target
    for name in _READING if model is not None else ():
        used = vars(model).get(name, getattr(type(model), name, None))
        if used is not getattr(GPT2LMHeadModel, name, None):
            raise ValueError(
                f"target: the model has a {name} of its own, which only its own generate calls: use "
                "model.generate(..., custom_generate=stagedspec.hf.custom_generate(...))"
            )


def _check_callables(options: dict[str, Any]) -> None:
    """Raises ValueError where transformers would fail deep inside."""
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


# Settings that say no more than how long and how to sample.
_WARPING = ("temperature", "top_k", "top_p", "min_p")
_PLAIN = {"max_new_tokens", "do_sample", *_WARPING, "eos_token_id", "pad_token_id"}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _is_whole(value: object) -> bool:
    return isinstance(value, int)


def _are_ids(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_whole, value))


def _is_decay(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))


# What transformers computes with without a look at it: its own error names no setting.
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
    """The settings of a call, with numbers made Python's own and checked: options of the call go before the given
    generation config, and that before the model's own settings. An option that is None takes away what those say.

    Raises ValueError for special tokens and sampling settings that cannot be.
    """

    def __init__(self, options: dict[str, Any], given: dict[str, Any], own: dict[str, Any]):
        self.given, self.own = given, own
        self.options = {
            name: plain(value) if name in _settings() else value
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
        self._replace("eos_token_id", self.eos or None)  # of an empty list transformers would take the first
        self._replace("pad_token_id", self.pad)
        if not self.sampling.do_sample:
            self._ignore_warping()

    def of(self, name: str) -> Any:
        """What holds for a setting."""
        if name in self.options:
            return self.options[name]
        value = self.given.get(name)
        return self.own.get(name) if value is None else value

    def _replace(self, name: str, value: Any) -> None:
        """Puts what was read of a setting where it came from."""
        for source in (self.options, self.given):
            if source.get(name) is not None:
                source[name] = value

    def _ignore_warping(self) -> None:
        names = [name for name in _WARPING if self.options.pop(name, None) not in (None, getattr(Sampling, name))]
        if names:
            warnings.warn(f"greedy decoding ignores {', '.join(names)}: add do_sample=True", stacklevel=6)
        self.sampling = Sampling()


def _copy_of_config(config: Any) -> GenerationConfig | None:
    """With NumPy's and torch's numbers made Python's own."""
    if config is None:
        return None
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig or None, got {type(config).__name__}")
    config = copy.copy(config)
    vars(config).update({name: plain(value) for name, value in vars(config).items() if name in _settings()})
    return config


def _own_settings(decoder: Decoder) -> dict[str, Any]:
    """What the model's own generation config sets."""
    return decoder.defaults | {
        "eos_token_id": list(decoder.eos_token_ids) or None,
        "pad_token_id": decoder.pad_token_id,
        "bos_token_id": decoder.target.config.bos_token_id,
    }


def _plain_call(
    decoder: Decoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mode: str,
    seed: int | Sequence[int] | torch.Tensor | None,
    tree: TreeConfig | None,
    settings: Settings,
) -> Call:
    """The call of plain settings, of which transformers has nothing to make."""
    new_tokens, eos, pad = settings.of("max_new_tokens"), settings.eos, settings.pad
    request = decoder._validate(
        input_ids, attention_mask, NEW_TOKENS if new_tokens is None else new_tokens, mode, tree, eos, seed,
        settings.sampling, pad,
    )  # fmt: skip
    return Call(input_ids, request, (eos or [0])[0] if pad is None else pad)


@lru_cache(maxsize=1)
def _settings() -> frozenset[str]:
    return frozenset(name for name in vars(GenerationConfig()) if name[0] != "_")


@lru_cache(maxsize=1)
def _options() -> frozenset[str]:
    """What `generate` of a GPT-2 can be given by name."""
    functions = (GPT2LMHeadModel.generate, GPT2LMHeadModel.forward)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names | _settings() | REFUSED_ARGUMENTS.keys() | {"tokenizer"})


_skeletons: "weakref.WeakKeyDictionary[GPT2, GPT2LMHeadModel]" = weakref.WeakKeyDictionary()  # by the target


def _skeleton(decoder: Decoder) -> GPT2LMHeadModel:
    """A model of the target's config without weights, whose `generate` reads arguments."""
    if decoder.target not in _skeletons:
        with torch.device("meta"):
            _skeletons[decoder.target] = GPT2LMHeadModel(decoder.target.config)
    model = _skeletons[decoder.target]
    model.generation_config = GenerationConfig(**_own_settings(decoder))
    return model


def assisted(
    decoder: Decoder, assistant: GPT2LMHeadModel | str, table: KatzTable | None = None, role: str = "assistant_model"
) -> Decoder:
    """The decoder with another draft, made once for every pair and kept for as long as both live.

    assistant: a model object or the place of a checkpoint; table: in place of the decoder's own, if given.
    """

    def make() -> Decoder:
        draft = read_checkpoint(assistant, role)
        target, held = decoder.target, draft is assistant
        check_vocabularies(target.vocab_size, draft.config.vocab_size, decoder.tokenizer)
        weights, live = read_model(
            draft, role, held, ops=target.ops, device=target.device, dtype=target.dtype, invariant=False,
            vocabulary=target.vocab_size,
        )  # fmt: skip
        return Decoder(
            target, weights, decoder.ngram if table is None else table, decoder.tokenizer, decoder.planner.fixed,
            decoder.eos_token_ids, decoder.pad_token_id, decoder.defaults, (decoder._live[0], live),
        )  # fmt: skip

    if not isinstance(assistant, (str, GPT2LMHeadModel)):
        read_checkpoint(assistant, role)  # for its message
    with _making:
        known = _made_for.setdefault(decoder, _Kept())
    name = assistant if isinstance(assistant, str) else _name(assistant, known)
    return _made(decoder, (name, None if table is None else id(table)), None, make, table)


# ---------------------------------------------------------------- what transformers prepared, to a call


def _call(
    decoder: Decoder,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    passed_on: dict[str, Any],
    mode: str,
    seed: int | Sequence[int] | torch.Tensor | None,
    tree: TreeConfig | None,
    streamer: Any,
    began: float,
) -> Call:
    """Translates what transformers hands to a decoding loop. began: when the call came in (`time.time()`)."""
    refuse_settings(vars(config))
    refuse_passed_on(passed_on)
    mask = passed_on.get("attention_mask")
    _check_positions(passed_on.get("position_ids"), mask, input_ids, decoder.target.vocab_size)
    rest, sampling = _split_processors(processors, bool(config.do_sample))
    width, vocab_size = input_ids.shape[1], decoder.target.vocab_size
    names = ["forced_bos_token_id", "forced_eos_token_id"]
    if config.exponential_decay_length_penalty is not None:
        names.append("eos_token_id")
    for name in names:  # transformers' processors index the logits with them
        for token in token_ids(name, getattr(config, name, None)):
            if not -vocab_size <= token < vocab_size:
                raise ValueError(
                    f"{name} must be below {vocab_size}, the target's vocabulary, got {token}: use its tokenizer"
                )
    eos, longest, others = _split_criteria(criteria, vocab_size)
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    request = decoder._validate(
        input_ids, mask, max(longest - width, 1), mode, tree, eos, seed, sampling,
        lookup=config.prompt_lookup_num_tokens,
    )  # fmt: skip
    return_dict = bool(config.return_dict_in_generate)
    keep = [name for name in ("scores", "logits") if return_dict and getattr(config, f"output_{name}")]
    if not rest and not others and streamer is None and not keep:
        return Call(input_ids, request, pad, None, return_dict)
    # A first call measures pass times and may lay out weights: none of the time that a generation may take. What
    # the criterion's clock had counted when the call came in, it keeps.
    now = time.time()
    others = [
        MaxTimeCriteria(one.max_time, now - max(0.0, began - one.initial_timestamp))
        if type(one) is MaxTimeCriteria
        else one
        for one in others
    ]
    positions = Positions(
        input_ids,
        request.new_tokens,
        pad,
        eos,
        LogitsProcessorList(rest) if rest else None,
        StoppingCriteriaList(others) if others else None,
        streamer,
        any(hasattr(one, "eos_token_id") for one in criteria),
        keep,
    )
    return Call(input_ids, request, pad, positions, return_dict)


def finish(call: Call, sequences: torch.Tensor, stats: Stats) -> torch.Tensor | StagedOutput:
    """Ends the stream, and makes what `generate` returns."""
    positions = call.positions
    if positions is not None and positions.streamer is not None:
        positions.streamer.end()
    if not call.return_dict:
        return sequences
    count = sequences.shape[1] - call.input_ids.shape[1]
    kept: dict[str, Any] = {"sequences": sequences}
    if positions is not None:
        kept |= {name: tuple(values[:count]) for name, values in positions.kept.items()}
    return StagedOutput(**kept, stats=stats)


# The warpers that the token choice has built in, and what it calls them.
_WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}


def _split_processors(processors: LogitsProcessorList, do_sample: bool) -> tuple[list[Callable], Sampling]:
    """The processors to apply along the walk, and the warpers at their end as a `Sampling`.

    Only a tail in the order in which `Sampling` warps is taken off; anything else stays a processor, to which the
    noise is then added as it is.
    """
    rest, order, settings = list(processors), list(_WARPERS), {}
    while do_sample and rest and type(rest[-1]) in order and _keeps_one(rest[-1]):
        kind = type(rest[-1])
        settings[_WARPERS[kind]] = getattr(rest.pop(), _WARPERS[kind])
        order = order[: order.index(kind)]
    return rest, Sampling(do_sample, **settings)


def _keeps_one(warper: Callable) -> bool:
    """Whether at least one token is kept, and the others are excluded: what `Sampling` does."""
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


def _split_criteria(criteria: StoppingCriteriaList, vocab_size: int) -> tuple[list[int], int, list[Callable]]:
    """End-of-sequence ids, the longest sequence, and the criteria that remain to be called."""
    eos: list[int] = []
    lengths: list[int] = []
    others = []
    for one in criteria:
        if type(one) is EosTokenCriteria:
            eos += [token for token in one.eos_token_id.tolist() if 0 <= token < vocab_size]
        elif type(one) is MaxLengthCriteria:
            lengths.append(one.max_length)
        else:
            others.append(one)
    return eos, min(lengths), others


def _check_positions(
    position_ids: torch.Tensor | None, mask: torch.Tensor | None, input_ids: torch.Tensor, vocab_size: int
) -> None:
    if position_ids is None:
        return
    width = input_ids.shape[1]
    if mask is None:
        good = position_ids.shape[-1] == width and bool((position_ids.cpu() == torch.arange(width, device="cpu")).all())
    else:
        good = position_ids.shape == mask.shape and torch.equal(position_ids * mask, (mask.cumsum(-1) - 1) * mask)
    if not good:
        _unpad(input_ids, mask, vocab_size)  # for its messages: transformers makes position_ids of a wrong mask too
        if position_ids.shape[-1] != width:
            raise ValueError(
                "attention_mask and position_ids must have the shape of input_ids, "
                f"{list(input_ids.shape)}, got one of {position_ids.shape[-1]} columns"
            )
        raise ValueError("position_ids other than those of the attention_mask are not supported: leave them out")


# ---------------------------------------------------------------- a custom generate for transformers' models


class custom_generate:
    """For `GPT2LMHeadModel.generate(..., custom_generate=stagedspec.hf.custom_generate(draft=...))`.

    draft: a GPT2LMHeadModel, folder or hub id of the same vocabulary; left out, generate's `assistant_model`, and with
    neither `mode="autoregressive"` or `prompt_lookup_num_tokens` must be given. ngram: a KatzTable or its path.
    mode, tree, seed: as in `Decoder.generate`. A single `generate` takes mode, tree and seed too.
    streamer: an alternative to generate's own. Functions of your own may lie between generate and this object, and may
    call it from another thread.

    Everything is made at the first call and kept for as long as the model lives, whether this object is kept or made
    anew for every call. Decoding runs on the model's device in its dtype, with a copy of its weights. As with
    `Decoder.from_pretrained`, a model that has changed since (weights, in place or not; hooks, modules, modes) is
    checked and read again, so that every call decodes with all weights as they are then. Only single values that are
    written through `.data` or outside of torch can go unnoticed: then call `forget(model)`; until then all weights stay
    those read before.

    Not honoured by transformers itself on this way: `stop_strings`, because `generate` does not hand on its
    `tokenizer`; give `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.

    `last_stats` tells what the last call cost. Raises ValueError at the call for what is not supported.
    """

    def __init__(
        self,
        draft: str | Path | GPT2LMHeadModel | None = None,
        ngram: str | Path | KatzTable | None = None,
        mode: str = "staged",
        tree: TreeConfig | None = None,
        seed: int | Sequence[int] | None = None,
        backend: str = "auto",
        streamer: Any = None,
        **called: Any,
    ):
        if called:
            raise ValueError(
                f"custom_generate takes no {min(called)}: give generate an object, custom_generate=custom_generate(...)"
            )
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(
                f"streamer must have put and end, as transformers' streamers do, got {type(streamer).__name__}"
            )
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.draft, self.ngram, self.mode, self.tree = draft, ngram, mode, tree
        self.seed, self.backend, self.streamer = seed, backend, streamer
        self.last_stats: Stats | None = None

    def __call__(
        self,
        model: GPT2LMHeadModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        mode: str | None = None,
        tree: TreeConfig | None = None,
        seed: int | Sequence[int] | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor | StagedOutput:
        began = time.time()
        dropped = _dropped_arguments(generation_config, input_ids)
        streamer = dropped["streamer"]
        own = streamer is None and self.streamer is not None
        streamer = self.streamer if own else streamer
        with ended(streamer):
            if own:
                streamer.put(input_ids.cpu())
            refuse_settings(vars(generation_config))
            refuse_arguments(dropped)
            draft, assistant = self.draft, dropped["assistant_model"]
            if draft is None:
                draft = assistant
            elif assistant is not None and assistant is not draft:
                raise ValueError(
                    "custom_generate has draft= and generate has another assistant_model=: give one of the two"
                )
            decoder = decoder_for(model, draft, self.ngram, self.backend)
            seed = self.seed if seed is None else seed
            call = _call(
                decoder, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs,
                self.mode if mode is None else mode,
                seed,
                self.tree if tree is None else tree,
                streamer, began,
            )  # fmt: skip
            output = decoder.decode(call)
        self.last_stats = decoder.last_stats
        return output


_DROPPED = (
    "streamer",
    "assistant_model",
    "assistant_tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "synced_gpus",
)


def _dropped_arguments(config: GenerationConfig, input_ids: torch.Tensor) -> dict[str, Any]:
    """What transformers' `generate` was given and does not hand on: the streamer, the assistant model, what is refused.

    Without a look at its frame a streamer given to `generate` would see the prompt and then nothing, and whoever reads
    from it would wait forever. Any functions may lie between the two, and a function may call from another thread: then
    it is the `generate` that made this config or this prompt.

    Raises ValueError where no `generate` is found.
    """
    known = next(_calls_of_generate(sys._getframe(2)), None)
    if known is None:
        others = [call for frame in sys._current_frames().values() for call in _calls_of_generate(frame)]
        same = [call for call in others if call.get("generation_config") is config]
        same += [call for call in others if call.get("input_ids") is input_ids]
        known = next(iter(same), None)
    if known is None:
        raise ValueError(
            "custom_generate was called, but not by the generate of a transformers model, so that a streamer or an "
            "assistant_model given there would be lost: give it to generate(..., custom_generate=...), or call "
            "Decoder.generate"
        )
    return {name: known.get(name) for name in _DROPPED}


_GENERATE = inspect.unwrap(GPT2LMHeadModel.generate).__code__


def _calls_of_generate(frame: FrameType | None) -> Iterator[dict[str, Any]]:
    """The variables of the calls of transformers' `generate` in a stack that were given a custom_generate, the
    innermost first."""
    while frame is not None:
        if frame.f_code is _GENERATE:
            known = frame.f_locals
            if known["custom_generate"] is not None:
                yield known
        frame = frame.f_back


def decoder_for(
    model: GPT2LMHeadModel,
    draft: str | Path | GPT2LMHeadModel | None = None,
    ngram: str | Path | KatzTable | None = None,
    backend: str = "auto",
) -> Decoder:
    """The decoder of a model as it is now: made at the first call, its weights read again when they have changed.

    Decoders with different drafts share the target's weights; those of the last KEPT_DRAFTS drafts are kept, each for
    as long as its draft lives.

    Raises ValueError for a model that this package would decode differently from transformers.
    """
    table = _load_table(str(ngram)) if isinstance(ngram, (str, Path)) else ngram
    if table is not None and not isinstance(table, KatzTable):
        raise ValueError(f"ngram must be a path or a KatzTable, got {type(table).__name__}")

    def make() -> Decoder:
        read_checkpoint(model, "target")  # for its messages, before those about the device
        if model.dtype not in DTYPES.values():
            raise ValueError(
                f"target: the model computes in {str(model.dtype).removeprefix('torch.')}, expected "
                f"{', '.join(DTYPES)}: call model.float()"
            )
        return Decoder.from_pretrained(model, device=model.device, dtype=model.dtype, backend=backend)

    setup = getattr(model, "device", None), getattr(model, "dtype", None), model.config.vocab_size
    decoder = _made(model, backend, setup, make)
    if draft is not None:
        decoder = assisted(decoder, str(draft) if isinstance(draft, Path) else draft, table, "draft")
    decoder.follow()
    return decoder


class _Kept(dict):
    """What is kept for one owner, the latest last: (setup, decoder, what must outlive the key) by key."""


KEPT_DRAFTS = 4
_made_for: "weakref.WeakKeyDictionary[Any, _Kept]" = weakref.WeakKeyDictionary()
_making = threading.RLock()


def _made(owner: Any, key: Any, setup: Any, make: Callable[[], Decoder], keep: Any = None) -> Decoder:
    """The decoder kept for owner under key, made anew where setup differs."""
    with _making:
        known = _made_for.setdefault(owner, _Kept())
        found = known.pop(key, None)
        if found is None or found[0] != setup:
            if found is not None:
                found[1].release()
            found = setup, make(), keep
        known[key] = found
        while len(known) > KEPT_DRAFTS:
            del known[next(iter(known))]
        return found[1]


def _name(draft: GPT2LMHeadModel, known: _Kept) -> weakref.ref:
    """A key that drops what is kept under it when the draft goes."""
    kept = weakref.ref(known)

    def gone(name: weakref.ref) -> None:
        entries = kept()
        for key in list(entries or ()):
            if entries is not None and key[0] is name:
                entries.pop(key, None)

    return weakref.ref(draft, gone)


def forget(model: GPT2LMHeadModel) -> None:
    """Drops what is kept for a model. For single weights that were written through `.data`: nothing else hides."""
    with _making:
        _made_for.pop(model, None)


@lru_cache(maxsize=8)
def _load_table(location: str) -> KatzTable:
    return KatzTable.load(location)
