"""Checks what a call asks for, and turns it into a `Request`: prompts without padding, trees, seeds, stop tokens."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from stagedspec.decoding.callbacks import Callbacks
from stagedspec.decoding.limits import check_batch
from stagedspec.decoding.sampling import Sampling, counters
from stagedspec.models.model_set import Models
from stagedspec.planning.adapt import Level
from stagedspec.planning.planner import TreePlanner
from stagedspec.planning.tree import TreeConfig
from stagedspec.values import at_least, plain, whole


class CallContext(NamedTuple):
    """What a decoder reads a call with, as it is when the call comes in.

    planner: chooses the trees. tokenizer, eos_token_ids, pad_token_id, defaults: of the decoder, which documents them.
    live_target: the caller's model object that the target was made of, if it was and is still there.
    """

    models: Models
    planner: TreePlanner
    tokenizer: PreTrainedTokenizerBase | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    defaults: dict[str, Any]
    live_target: GPT2LMHeadModel | None

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings of the model's own generation config."""
        return self.defaults | {
            "eos_token_id": list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
        }


class StagedOptions(NamedTuple):
    """The arguments of `Decoder.generate` that transformers' `generate` does not have. Documented there.

    batch: how many rows will decode together, where a call is read for one of them; None: those of the call.
    """

    mode: str
    seed: int | Sequence[int] | torch.Tensor | None = None
    tree: TreeConfig | None = None
    batch: int | None = None


class RequestRow(NamedTuple):
    """One sequence of a request. prompt: token ids without padding. seed, stream: of its noise, as of `counters`.
    new_tokens: at most so many."""

    prompt: list[int]
    seed: int
    stream: int
    new_tokens: int

    @property
    def limit(self) -> int:
        """The length at which it ends."""
        return len(self.prompt) + self.new_tokens


@dataclass(frozen=True)
class Request:
    """The checked settings of one generation."""

    rows: list[RequestRow]
    mode: str
    tree: TreeConfig
    sampling: Sampling
    eos: list[int]
    levels: tuple[Level, ...] = ()  # trees to adapt between; `tree` is the largest
    prompt_lookup: bool = False  # the context n-gram proposes, without a draft

    @property
    def trees(self) -> tuple[TreeConfig, ...]:
        """Those that steps may have, the largest last."""
        return tuple(level.tree for level in self.levels) or (self.tree,)

    @property
    def prompts(self) -> list[list[int]]:
        return [row.prompt for row in self.rows]

    @property
    def new_tokens(self) -> list[int]:
        return [row.new_tokens for row in self.rows]

    @property
    def seeds(self) -> list[int]:
        return [row.seed for row in self.rows]

    @property
    def streams(self) -> list[int]:
        return [row.stream for row in self.rows]


@dataclass(frozen=True)
class Call:
    """The arguments of one `generate`, read and checked.

    input_ids: LongTensor [B, prompt], padding included. pad: the token that fills up rows that stop early. callbacks:
    logits processors, criteria and streamer, if there are any. return_dict: whether `generate` returns a
    `StagedOutput`. began: when the call came in, by `time.perf_counter`.
    """

    input_ids: torch.Tensor
    request: Request
    pad: int
    began: float
    callbacks: Callbacks | None = None
    return_dict: bool = False


def validate(
    context: CallContext,
    options: StagedOptions,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    lookup: int | None = None,
) -> Request:
    """Checks a request and chooses its trees. Raises ValueError for what this decoder cannot do.

    A seed of None is drawn here if tokens are sampled. lookup: length of the chains that the context n-gram proposes;
    it has no effect in plain decoding and where a draft proposes, and a warning says so.
    """
    models, (mode, seed, tree, batch) = context.models, options
    target = models.target
    # Other ids can never come up.
    eos = [token for token in token_ids("eos_token_id", eos_token_id) if 0 <= token < target.vocab_size]
    if attention_mask is None and pad_token_id is not None and pad_token_id not in eos:
        attention_mask = _mask_of_padding(input_ids, pad_token_id)
    prompts = unpad(input_ids, attention_mask, target.vocab_size, mode)
    max_new_tokens = at_least("max_new_tokens", max_new_tokens)
    longest = max(map(len, prompts))
    room = target.positions + 1 - longest  # the last token is not read, and needs no position
    if max_new_tokens > room:
        raise ValueError(
            f"prompt + new tokens, not counting the last, must be at most n_positions = {target.positions}, "
            f"got {longest} + {max_new_tokens}; shorten the prompt"
            + (f" or ask for at most {room} new tokens" if room > 0 else "")
        )
    seeds, streams = counters(0 if seed is None else seed, len(prompts))
    if lookup is not None and not 1 <= (whole(lookup) or 0) <= 255:
        raise ValueError(f"prompt_lookup_num_tokens must be a whole number from 1 to 255, got {lookup!r}")
    prompt_lookup = lookup is not None and models.draft is None and mode != "autoregressive"
    levels: tuple[Level, ...] = ()
    if prompt_lookup:
        chain = min(cast(int, whole(lookup)), target.ops.max_depth)
        settings = TreeConfig(chain + 1, chain, chain, width=1, children=1, prefetch=0)
        mode = "lookup"
    else:
        settings, levels = context.planner.plan(mode, batch or len(prompts), tree, sampling.do_sample)
    if lookup is not None and not prompt_lookup:
        why = "mode 'autoregressive' proposes nothing" if mode == "autoregressive" else "the draft proposes"
        warnings.warn(f"prompt_lookup_num_tokens has no effect here: {why}", stacklevel=2)
    device = models.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != target.dtype:
        warnings.warn(f"autocast has no effect here: decoding computes in {target.dtype}", stacklevel=2)
    if seed is None and sampling.do_sample:
        # Last, so that torch's generator is not advanced by a call that is refused or that samples nothing.
        seeds, streams = counters(int(torch.randint(2**63 - 1, (), device="cpu")), len(prompts))
    rows = [RequestRow(*row, max_new_tokens) for row in zip(prompts, seeds, streams, strict=True)]
    return Request(rows, mode, settings, sampling, eos, levels, prompt_lookup)


def encode(prompt: str | torch.Tensor, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """The token ids [1, T] of a prompt: text, or ids [T] or [1, T]. Raises ValueError for anything else."""
    if isinstance(prompt, torch.Tensor):
        return prompt[None] if prompt.dim() == 1 else prompt
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be text or a LongTensor of token ids, got {type(prompt).__name__}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt must be text that UTF-8 can hold: {error}") from error
    if tokenizer is None:
        raise ValueError("this decoder has no tokenizer: give tokenizer=..., or a prompt of token ids")
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([ids], dtype=torch.long, device="cpu")


def _mask_of_padding(input_ids: torch.Tensor, pad: int) -> torch.Tensor | None:
    """The attention mask that transformers assumes where none is given: pad tokens are padding. None if there are none.

    pad: a token that does not end a sequence.
    """
    if not isinstance(input_ids, torch.Tensor) or not bool((input_ids == pad).any()):
        return None
    return (input_ids != pad).long()


def unpad(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int, mode: str = "autoregressive"
) -> list[list[int]]:
    """Checks prompts [B, width] and returns their tokens without the padding. Raises ValueError.

    Positions count real tokens only, as transformers' position ids do, so dropping the padding changes nothing.
    """
    integers = (torch.int64, torch.int32)
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.dtype not in integers:
        got = type(input_ids).__name__
        if isinstance(input_ids, torch.Tensor):
            got = f"{input_ids.dtype} {list(input_ids.shape)}"
        raise ValueError(f"input_ids must be a LongTensor [batch, prompt], got {got}")
    batch, width = input_ids.shape
    if input_ids.is_meta:
        raise ValueError("input_ids must hold tokens, got a tensor on the meta device, which has none: make it on cpu")
    check_batch(batch, mode)
    if width == 0:
        raise ValueError("the prompt is empty: give at least one token (the end-of-text token starts from nothing)")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape:
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must have the shape of input_ids, {[batch, width]}, got {shape}")
    prompts = []
    for row, (ids, kept) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
        if any(value not in (0, 1) for value in kept):
            raise ValueError(f"attention_mask must hold only 0 and 1, got {next(v for v in kept if v not in (0, 1))}")
        if not any(kept):
            raise ValueError(
                f"prompt {row} is empty: its attention_mask is all 0; leave the row out, or keep a token of it"
            )
        if not kept[-1]:
            raise ValueError(
                f"prompts must be padded on the left (padding_side='left'), but attention_mask ends prompt {row} with 0"
            )
        prompt = [token for token, keep in zip(ids, kept, strict=True) if keep]
        bad = [token for token in prompt if not 0 <= token < vocab_size]
        if bad:
            raise ValueError(
                f"token ids must be in [0, {vocab_size}), the target's vocabulary, got {bad[0]}: use its tokenizer"
            )
        prompts.append(prompt)
    return prompts


def token_ids(name: str, value: object) -> list[int]:
    """One token id or several as a list, for None an empty one. Raises ValueError for anything else."""
    given = plain(value)
    numbers = []
    for token in [] if given is None else list(given) if isinstance(given, Sequence) else [given]:
        number = whole(token)
        if number is None or not -(2**63) <= number < 2**63:
            raise ValueError(f"{name} must be a token id, a list of them, or None, got {token!r}")
        numbers.append(number)
    return numbers
