"""Translates what transformers' `generate` prepares for a decoding loop into a `Call`.

It prepares input ids, logits processors, stopping criteria and a generation config. Warpers become a `Sampling`, the
criteria for length and end-of-sequence tokens become part of the request, all others become callbacks per position.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from stagedspec.decoding.callbacks import Callbacks, Streamer
from stagedspec.decoding.request import Call, CallContext, StagedOptions, token_ids, unpad, validate
from stagedspec.decoding.sampling import Sampling
from stagedspec.decoding.settings import refuse_passed_on, refuse_settings


class Prepared(NamedTuple):
    """What transformers' `generate` gives to a custom decoding loop. model_kwargs: all further arguments."""

    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]


def translate(
    context: CallContext, options: StagedOptions, prepared: Prepared, streamer: Streamer | None, began: float
) -> Call:
    """The call that transformers has prepared. Raises ValueError for what is not supported.

    began: when the call came in, by `time.perf_counter`.
    """
    input_ids, processors, criteria, config, model_kwargs = prepared
    refuse_settings(vars(config))
    refuse_passed_on(model_kwargs)
    width, vocab_size = input_ids.shape[1], context.models.target.vocab_size
    mask = model_kwargs.get("attention_mask")
    _check_positions(model_kwargs.get("position_ids"), mask, input_ids, vocab_size)
    rest, sampling = _split_processors(processors, bool(config.do_sample))
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
    new_tokens = max(longest - width, 1)
    request = validate(
        context, options, input_ids, mask, max_new_tokens=new_tokens, sampling=sampling, eos_token_id=eos,
        lookup=config.prompt_lookup_num_tokens,
    )  # fmt: skip
    return_dict = bool(config.return_dict_in_generate)
    keep = [name for name in ("scores", "logits") if return_dict and getattr(config, f"output_{name}")]
    if not rest and not others and streamer is None and not keep:
        return Call(input_ids, request, pad, began, None, return_dict)
    # The first call measures pass times and may lay out weights, which must not count as time of the generation: the
    # clock of a MaxTimeCriteria, which is `time.time`, goes on from where it stood when the call came in.
    now = time.time()
    came_in = now - (time.perf_counter() - began)
    others = [
        MaxTimeCriteria(one.max_time, now - max(0.0, came_in - one.initial_timestamp))
        if type(one) is MaxTimeCriteria
        else one
        for one in others
    ]
    callbacks = Callbacks(
        input_ids,
        new_tokens,
        pad,
        eos,
        LogitsProcessorList(rest) if rest else None,
        StoppingCriteriaList(others) if others else None,
        streamer,
        any(hasattr(one, "eos_token_id") for one in criteria),
        keep,
    )
    return Call(input_ids, request, pad, began, callbacks, return_dict)


# The warpers that are part of the token choice, and the field of `Sampling` for each, in the order of warping.
_WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}


def _split_processors(processors: LogitsProcessorList, do_sample: bool) -> tuple[list[Callable], Sampling]:
    """The processors to call at every position, and the warpers at the end of the list as a `Sampling`.

    Warpers are taken off the end only in the order in which `Sampling` applies them. All others stay processors; the
    noise is added to their scores.
    """
    rest, order, settings = list(processors), list(_WARPERS), {}
    while do_sample and rest and type(rest[-1]) in order and _keeps_one(rest[-1]):
        kind = type(rest[-1])
        settings[_WARPERS[kind]] = getattr(rest.pop(), _WARPERS[kind])
        order = order[: order.index(kind)]
    return rest, Sampling(do_sample, **settings)


def _keeps_one(warper: Callable) -> bool:
    """Whether a warper does as `Sampling`: keeps at least one token, and excludes others by a score of -inf."""
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and getattr(warper, "min_tokens_to_keep", 1) == 1


def _split_criteria(criteria: StoppingCriteriaList, vocab_size: int) -> tuple[list[int], int, list[Callable]]:
    """End-of-sequence ids, the maximum length of a sequence, and the criteria that must be called."""
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
    """Raises ValueError unless the position ids are those that follow from the attention mask."""
    if position_ids is None:
        return
    width = input_ids.shape[1]
    if mask is None:
        good = position_ids.shape[-1] == width and bool((position_ids.cpu() == torch.arange(width, device="cpu")).all())
    else:
        good = position_ids.shape == mask.shape and torch.equal(position_ids * mask, (mask.cumsum(-1) - 1) * mask)
    if not good:
        unpad(input_ids, mask, vocab_size)  # names a wrong mask, of which transformers has made the position ids
        if position_ids.shape[-1] != width:
            raise ValueError(
                "attention_mask and position_ids must have the shape of input_ids, "
                f"{list(input_ids.shape)}, got one of {position_ids.shape[-1]} columns"
            )
        raise ValueError("position_ids other than those of the attention_mask are not supported: leave them out")
