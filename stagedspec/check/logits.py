"""Whether two decoders give the same logits, bit by bit, however many tokens a pass takes.

Speculative decoding verifies k+1 tokens in one pass where plain decoding takes one token a pass. It is lossless only if
both give a position the same bits. `compare_logits` checks that for any engine: ours, transformers, or a function.
"""

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GPT2LMHeadModel

from stagedspec.decoder import Decoder
from stagedspec.devices import current_device
from stagedspec.kernels.state.host import CHUNK
from stagedspec.models.gpt2 import Cache
from stagedspec.values import at_least, whole

LogitsFunction = Callable[[list[int], list[int]], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """Result of `compare_logits`. Position p of a prompt is that of its token p, whose logits choose token p + 1.

    positions: the number of positions compared. differing: the number where any bit differs. changed: the number where
    the likeliest token differs. first_differing, first_changed: (prompt, position) of the first of these, or None.
    largest: the largest absolute difference of two logits; inf if one of them is NaN or infinite.
    """

    positions: int
    differing: int = 0
    changed: int = 0
    first_differing: tuple[int, int] | None = None
    first_changed: tuple[int, int] | None = None
    largest: float = 0.0

    @property
    def identical(self) -> bool:
        return not self.differing

    def __str__(self) -> str:
        if self.first_differing is None:
            return f"the same bits at {self.positions} positions"
        prompt, position = self.first_differing
        text = (
            f"bits differ at {self.differing} of {self.positions} positions, first at position {position} of prompt "
            f"{prompt}, by at most {self.largest:.2g}"
        )
        if self.first_changed is None:
            return f"{text}; the likeliest token is the same"
        prompt, position = self.first_changed
        return f"{text}; the likeliest token differs at {self.changed}, first at position {position} of prompt {prompt}"


def compare_logits(
    first: "Decoder | GPT2LMHeadModel | LogitsFunction",
    second: "Decoder | GPT2LMHeadModel | LogitsFunction",
    prompts: Sequence[Sequence[int]],
    tokens_per_pass: tuple[int, int] = (1, 5),
    positions: int = 16,
) -> Comparison:
    """Feeds both sides the last tokens of each prompt, in passes of different sizes, and compares their logits.

    first, second: a `Decoder` (its target model is used), a transformers GPT2LMHeadModel, or a function

        logits(prefix_tokens: list[int], new_tokens: list[int]) -> tensor [len(new_tokens), V]

    that returns, at every new token, the logits of the token after it. It must read all new tokens in one pass. The
    prefix is for its KV cache: it is empty of earlier prompts, and successive calls extend it by the previous new
    tokens. Pass the same engine twice to test whether its logits depend on the number of tokens in a pass, or two
    engines and equal sizes to compare them.
    prompts: token ids, at least 2 each. tokens_per_pass: tokens in a pass of the first and of the second side.
    (1, k + 1) compares plain decoding with the verification of k proposed tokens. positions: how many of the last
    tokens of each prompt are compared, at most all but one; the tokens before them are the first prefix.

    Logits of the same dtype are compared by their bits, others by their values. Raises ValueError for bad input and for
    logits of a wrong shape.
    """
    try:
        rows = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError:
        raise ValueError(f"prompts must be lists of token ids, one a prompt, got {prompts!r}"[:300]) from None
    if not rows or any(len(row) < 2 for row in rows):
        raise ValueError(f"prompts must be of at least 2 tokens each, got the lengths {[len(row) for row in rows]}")
    for side in (first, second):
        if isinstance(side, (Decoder, GPT2LMHeadModel)):
            config = side.target.config if isinstance(side, Decoder) else side.config
            check_tokens(rows, config.vocab_size)
            if max(map(len, rows)) > config.n_positions:
                raise ValueError(f"a prompt may have at most {config.n_positions} tokens, got {max(map(len, rows))}")
    if (
        not isinstance(tokens_per_pass, (tuple, list))
        or len(tokens_per_pass) != 2
        or any((whole(size) or 0) < 1 for size in tokens_per_pass)
    ):
        raise ValueError(f"tokens_per_pass must be two whole numbers of at least 1, got {tokens_per_pass!r}")
    sizes, positions = list(map(operator.index, tokens_per_pass)), at_least("positions", positions)
    sides = [logits_function(side) for side in (first, second)]
    found = []
    for index, row in enumerate(rows):
        start = max(1, len(row) - positions)
        ours, theirs = (_read(side, row, start, size) for side, size in zip(sides, sizes, strict=True))
        if ours.shape != theirs.shape:
            raise ValueError(f"both sides must have one vocabulary, got {ours.shape[1]} and {theirs.shape[1]} logits")
        found += [((index, start + at), *_differences(*pair)) for at, pair in enumerate(zip(ours, theirs, strict=True))]
    differing = [where for where, largest, _ in found if largest is not None]
    changed = [where for where, _, other in found if other]
    return Comparison(
        len(found),
        len(differing),
        len(changed),
        next(iter(differing), None),
        next(iter(changed), None),
        max((largest for _, largest, _ in found if largest is not None), default=0.0),
    )


def check_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises ValueError for token ids that are not in the vocabulary."""
    bad = [token for prompt in prompts for token in prompt if not 0 <= token < vocab_size]
    if bad:
        raise ValueError(f"token ids must be in [0, {vocab_size}), the vocabulary, got {bad[0]}")


def logits_function(model: "Decoder | GPT2LMHeadModel | LogitsFunction") -> LogitsFunction:
    """The model as a function of `compare_logits`, with a KV cache of its own. Raises ValueError for anything else."""
    if isinstance(model, Decoder):
        return _DecoderLogits(model)
    if isinstance(model, GPT2LMHeadModel):
        return _TransformersLogits(model)
    if not callable(model):
        raise ValueError(
            "expected a Decoder, a GPT2LMHeadModel or a function logits(prefix_tokens, new_tokens), got "
            f"{type(model).__name__}"
        )
    return model


def _read(logits: LogitsFunction, row: list[int], start: int, size: int) -> torch.Tensor:
    """Logits [len(row) - start, V] on the CPU, from passes of `size` tokens; the last pass may be shorter."""
    parts: list[torch.Tensor] = []
    for at in range(start, len(row), size):
        new = row[at : at + size]
        part = logits(row[:at], new)
        wanted = (len(new), parts[0].shape[1] if parts else None)
        if (
            not isinstance(part, torch.Tensor)
            or part.dim() != 2
            or not part.numel()
            or part.is_meta
            or any(want not in (None, size) for want, size in zip(wanted, part.shape, strict=True))
        ):
            got = f"{list(part.shape)} on {part.device}" if isinstance(part, torch.Tensor) else type(part).__name__
            width = wanted[1] or "V"
            raise ValueError(f"logits of {len(new)} new tokens must be a tensor [{len(new)}, {width}], got {got}")
        parts.append(part.detach().cpu())
    return torch.cat(parts)


def _differences(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float | None, bool]:
    """Largest difference of two logits [V], None if all bits are the same, and whether the argmax differs."""
    if ours.dtype == theirs.dtype:
        same = torch.equal(*(x.contiguous().view(torch.uint8) for x in (ours, theirs)))
    else:
        same = torch.equal(ours.double(), theirs.double())
    if same:
        return None, False
    ours, theirs = ours.double(), theirs.double()
    apart = torch.where(ours == theirs, 0.0, (ours - theirs).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return apart.max().item(), bool(ours.argmax() != theirs.argmax())


class _DecoderLogits:
    """The target of a decoder, one sequence at a time. read: the tokens in its KV cache."""

    def __init__(self, decoder: Decoder):
        self.model = decoder.target
        self.read: list[int] = []
        self.cache = Cache(self.model, 1, 1, self.model.positions)

    @torch.inference_mode()
    def __call__(self, prefix: list[int], new: list[int]) -> torch.Tensor:
        both = min(len(self.read), len(prefix))
        known = both if self.read[:both] == prefix[:both] else 0
        with self.model.ops.lock, current_device(self.model.device):
            for start in range(known, len(prefix), CHUNK):
                self._forward(prefix[start : start + CHUNK], start)
            logits = self.model.logits(self._forward(new, len(prefix)))[0]
        self.read = prefix + new
        return logits

    def _forward(self, tokens: list[int], start: int) -> torch.Tensor:
        """One pass over tokens that follow `start` others: hidden states [1, N, d]."""
        model, first = self.model, self.cache.tree_rows
        if start + len(tokens) > model.positions:
            raise ValueError(f"a prompt can have at most {model.positions} tokens, got {start + len(tokens)}")
        batch = model.ops.prefill_batch(torch.tensor([tokens], device=model.device), start, model.kv_dtype)
        return model.forward(batch, self.cache, first + start, first)


class _TransformersLogits:
    """A transformers model, one sequence at a time."""

    def __init__(self, model: GPT2LMHeadModel):
        self.model, self.cache = model, DynamicCache()
        self.read: list[int] = []
        known = inspect.signature(model.forward).parameters
        self.name = "cache" if "cache" in known else "past_key_values"  # from transformers 5.24 on, and before

    @torch.inference_mode()
    def __call__(self, prefix: list[int], new: list[int]) -> torch.Tensor:
        if self.read != prefix:
            self.cache = DynamicCache()
            if prefix:
                self._forward(prefix)
        self.read = prefix + new
        return self._forward(new)

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.model.device)
        return self.model(ids, use_cache=True, **{self.name: self.cache}).logits[0]
