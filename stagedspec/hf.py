"""At home beside transformers: `Decoder.generate` with all of its arguments, and `custom_generate` for its models.

    out = hf_model.generate(**inputs, custom_generate=stagedspec.hf.custom_generate(draft="distilgpt2"))

Either way it is transformers that reads the arguments: which of keyword, generation config and model's default holds,
which logits processors and stopping criteria they come to, what is warned about. What comes out of that is translated
here. `stagedspec.fields` has the table of all settings.

Three things are refused or different, always by name: settings of other algorithms (beams, ...); what only the model's
own forward pass could give (attentions, hidden states, the cache); and sampled tokens, which are drawn from the
same distribution as transformers' by other random numbers.
"""

import difflib
import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    MaxLengthCriteria,
    MaxTimeCriteria,
)

from stagedspec.decoder import NEW_TOKENS, Call, Decoder, _unpad
from stagedspec.fields import REFUSED_ARGUMENTS, refuse_arguments, refuse_passed_on, refuse_settings
from stagedspec.gpt2 import GPT2
from stagedspec.live import read_model
from stagedspec.loading import check_vocabularies, read_checkpoint
from stagedspec.ngram import KatzTable
from stagedspec.positions import Positions
from stagedspec.sampling import Sampling
from stagedspec.stats import Stats
from stagedspec.tree import TreeConfig


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
    seed: int | Sequence[int] | torch.Tensor,
    tree: TreeConfig | None,
    options: dict[str, Any],
) -> Call:
    """Reads arguments of `Decoder.generate` as transformers reads those of its own."""
    options = dict(options)
    if input_ids is None:
        input_ids = options.pop("inputs", None)
    if unknown := options.keys() - _options():
        name = min(unknown)
        alike = difflib.get_close_matches(name, _options(), n=1)
        raise ValueError(f"unknown option {name!r}" + (f"; did you mean {alike[0]!r}?" if alike else ""))
    refuse_arguments(options)
    _check_callables(options)
    given: GenerationConfig | None = options.get("generation_config")
    if given is not None and not isinstance(given, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig or None, got {type(given).__name__}")
    for source in (decoder.defaults, {} if given is None else vars(given), options):
        refuse_settings(source)
    if input_ids is None:
        own_begin = decoder.target.config.bos_token_id
        begin = _first(options.get("bos_token_id"), getattr(given, "bos_token_id", None), own_begin)
        if begin is None:
            raise ValueError("give input_ids: this model has no begin-of-sequence token to start from")
        input_ids = torch.tensor([[begin]])
    _unpad(input_ids, attention_mask, decoder.target.vocab_size)  # for its messages, before transformers' own
    if max_new_tokens is not None:
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}")
        options["max_new_tokens"] = max_new_tokens

    own = decoder.defaults
    if given is None:
        options.setdefault("top_k", own.get("top_k"))
        if not any(source.get(name) for name in ("max_new_tokens", "max_length") for source in (options, own)):
            options["max_new_tokens"] = NEW_TOKENS
    for name in ("eos_token_id", "pad_token_id"):
        value = options.get(name)
        if value is None:
            options.pop(name, None)  # the model's own; transformers would take it for none
        elif name == "eos_token_id" and isinstance(value, (list, tuple)) and not value:
            options[name] = None

    # transformers drops the tokenizer on the way to a custom generate, and then misses it.
    tokenizer = options.pop("tokenizer", None) or decoder.tokenizer
    strings = _first(options.get("stop_strings"), getattr(given, "stop_strings", None), own.get("stop_strings"))
    if strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need a tokenizer: this decoder has none, give tokenizer=...")
        found = StopStringCriteria(tokenizer, strings)
        options |= {"stop_strings": None, "stopping_criteria": [*(options.get("stopping_criteria") or []), found]}

    calls: list[Call] = []
    streamer, began = options.get("streamer"), time.time()

    def capture(model, input_ids, logits_processor, stopping_criteria, generation_config, **passed_on):
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


def _check_callables(options: dict[str, Any]) -> None:
    """Raises ValueError where transformers would fail deep inside."""
    for name in ("logits_processor", "stopping_criteria"):
        value = options.get(name)
        if value is not None and (not isinstance(value, (list, tuple)) or not all(map(callable, value))):
            raise ValueError(f"{name} must be a list of callables, got {value!r}; put a single one into a list")
    streamer = options.get("streamer")
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise ValueError(f"streamer must have the methods put and end, as TextStreamer has, got {streamer!r}")
    limit = options.get("max_time")
    if limit is not None and (not isinstance(limit, (int, float)) or isinstance(limit, bool) or not limit > 0):
        raise ValueError(f"max_time must be a positive number of seconds, got {limit!r}")
    strings = options.get("stop_strings")
    several = [strings] if isinstance(strings, str) else strings
    if several is not None and (
        not isinstance(several, (list, tuple)) or not all(isinstance(text, str) and text for text in several)
    ):
        raise ValueError(f"stop_strings must be text or a list of texts, none of them empty, got {strings!r}")


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


@lru_cache(maxsize=1)
def _options() -> frozenset[str]:
    """What `generate` of a GPT-2 can be given by name."""
    functions = (GPT2LMHeadModel.generate, GPT2LMHeadModel.forward)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names | vars(GenerationConfig()).keys() | REFUSED_ARGUMENTS.keys() | {"tokenizer"})


_skeletons: "weakref.WeakKeyDictionary[GPT2, GPT2LMHeadModel]" = weakref.WeakKeyDictionary()  # by the target


def _skeleton(decoder: Decoder) -> GPT2LMHeadModel:
    """A model of the target's config without weights, whose `generate` reads arguments."""
    if decoder.target not in _skeletons:
        with torch.device("meta"):
            model = GPT2LMHeadModel(decoder.target.config)
        model.generation_config = GenerationConfig(
            **decoder.defaults,
            eos_token_id=list(decoder.eos_token_ids) or None,
            pad_token_id=decoder.pad_token_id,
        )
        _skeletons[decoder.target] = model
    return _skeletons[decoder.target]


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
            target, weights, decoder.ngram if table is None else table, decoder.tokenizer, decoder._tree,
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
    seed: int | Sequence[int] | torch.Tensor,
    tree: TreeConfig | None,
    streamer,
    began: float,
) -> Call:
    """Translates what transformers hands to a decoding loop. began: when the call came in (`time.time()`)."""
    refuse_settings(vars(config))
    refuse_passed_on(passed_on)
    mask = passed_on.get("attention_mask")
    _check_positions(passed_on.get("position_ids"), mask, input_ids)
    rest, sampling = _split_processors(processors, bool(config.do_sample))
    width, vocab_size = input_ids.shape[1], decoder.target.vocab_size
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
    kept = {} if positions is None else {name: tuple(values[:count]) for name, values in positions.kept.items()}
    return StagedOutput(sequences=sequences, **kept, stats=stats)


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
    while do_sample and rest and type(rest[-1]) in order and _is_built_in(rest[-1]):
        kind = type(rest[-1])
        settings[_WARPERS[kind]] = getattr(rest.pop(), _WARPERS[kind])
        order = order[: order.index(kind)]
    return rest, Sampling(do_sample, **settings)


def _is_built_in(warper: Callable) -> bool:
    name = _WARPERS[type(warper)]
    try:
        Sampling(True, **{name: getattr(warper, name)})
    except ValueError:  # transformers allows a little more, such as top_p=0
        return False
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


def _check_positions(position_ids: torch.Tensor | None, mask: torch.Tensor | None, input_ids: torch.Tensor) -> None:
    if position_ids is None:
        return
    width = input_ids.shape[1]
    if mask is None:
        good = position_ids.shape[-1] == width and bool((position_ids.cpu() == torch.arange(width)).all())
    else:
        good = position_ids.shape == mask.shape and torch.equal(position_ids * mask, (mask.cumsum(-1) - 1) * mask)
    if not good:
        raise ValueError("position_ids other than those of the attention_mask are not supported: leave them out")


# ---------------------------------------------------------------- a custom generate for transformers' models


class custom_generate:
    """For `GPT2LMHeadModel.generate(..., custom_generate=stagedspec.hf.custom_generate(draft=...))`.

    draft: a GPT2LMHeadModel, folder or hub id of the same vocabulary; left out, generate's `assistant_model`, and with
    neither `mode="autoregressive"` or `prompt_lookup_num_tokens` must be given. ngram: a KatzTable or its path.
    mode, tree: as in `Decoder.generate`. seed: None draws it from torch's global generator, so that
    `torch.manual_seed` and `transformers.set_seed` decide. A single `generate` takes mode, tree and seed too.
    streamer: an alternative to generate's own.

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
        streamer=None,
    ):
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
        refuse_settings(vars(generation_config))
        dropped = _dropped_arguments()
        streamer = dropped.get("streamer")
        if streamer is None and self.streamer is not None:
            streamer = self.streamer
            streamer.put(input_ids.cpu())
        refuse_arguments(dropped)
        draft, assistant = self.draft, dropped.get("assistant_model")
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
            int(torch.randint(2**63 - 1, ())) if seed is None else seed,
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


def _dropped_arguments() -> dict[str, Any]:
    """What transformers' `generate` was given and does not hand on: the streamer, the assistant model, what is refused.

    Without a look at its frame a streamer given to `generate` would see the prompt and then nothing, and whoever reads
    from it would wait forever.
    """
    frame = sys._getframe(2)
    if frame.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        return {}
    return {name: frame.f_locals.get(name) for name in _DROPPED}


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
        for key in list(kept() or ()):
            if key[0] is name:
                kept().pop(key, None)

    return weakref.ref(draft, gone)


def forget(model: GPT2LMHeadModel) -> None:
    """Drops what is kept for a model. For single weights that were written through `.data`: nothing else hides."""
    with _making:
        _made_for.pop(model, None)


@lru_cache(maxsize=8)
def _load_table(location: str) -> KatzTable:
    return KatzTable.load(location)
