"""The calls of soak.py: drawn from a seed and an index, run on a decoder in any mode, compared with plain decoding."""

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch

from stagedspec import MODES, Decoder

PLAIN = "autoregressive"
LOOKUP = "lookup"  # not a mode of the decoder: prompt look-up, for a decoder without a draft
KINDS = {  # and how often each is drawn
    "plain": 8,
    "processor": 2,
    "penalty": 2,
    "raising processor": 2,
    "criterion": 2,
    "stream": 2,
    "closed stream": 2,
    "two streams": 1,
    "too long": 1,
}
STREAMS = ("stream", "closed stream", "two streams")


class PlannedError(Exception):
    """Raised by a processor on purpose."""


@dataclass(frozen=True)
class Call:
    """One call of `generate` or `stream`, as plain values.

    kind: of KINDS. prompts: of tokens. stop_at: the processor's call that raises, or the chunks read before a stream is
    closed. eos: tokens that end a row; none: rows run to their length.
    """

    index: int
    kind: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    sampling: dict
    seed: int | tuple[int, ...]
    eos: tuple[int, ...]
    stop_at: int

    @property
    def kernels(self) -> tuple:
        """Equal for calls that run the same kernels."""
        walks = self.kind in ("processor", "penalty", "raising processor", "criterion")  # on the host
        return len(self.prompts), *self.sampling, walks

    def describe(self) -> str:
        lengths = [len(prompt) for prompt in self.prompts]
        return (
            f"call {self.index}: {self.kind}, prompts of {lengths} tokens, {self.new_tokens} new tokens, "
            f"{self.sampling}, seed {self.seed}, eos {list(self.eos)}, stop_at {self.stop_at}"
        )


def draw(seed: int, index: int, text: list[int], vocab: int, positions: int) -> Call:
    """The call with this index. It depends only on the seed, the models and the text (tokens to cut prompts from)."""
    rng = random.Random(f"{seed} {index}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    batch = 1 if kind in STREAMS else rng.choice((1, 1, 1, 1, 2, 3, 4, 7, 16))
    most = max(2, positions // (8 if batch > 4 else 4))
    new_tokens = rng.choice((1, 2, rng.randint(3, min(16, most)), rng.randint(3, most)))
    room = positions - new_tokens
    longest = min(room, rng.choice((2, 16, 64, 64, most, room)))
    prompts = []
    for _ in range(batch):
        length = rng.randint(1, longest)
        start = rng.randrange(len(text))
        prompts.append(tuple((text[start:] + text)[:length]))
    if kind == "too long":
        new_tokens = positions
    sampling = rng.choice(
        (
            {"do_sample": False},
            {"do_sample": False},
            {"do_sample": True, "temperature": rng.choice((0.3, 0.8, 1.0, 1.7))},
            {"do_sample": True, "top_k": rng.choice((1, 5, 50))},
            {"do_sample": True, "top_p": rng.choice((0.3, 0.9, 0.99))},
            {"do_sample": True, "min_p": rng.choice((0.02, 0.2))},
            {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
        )
    )
    one = rng.getrandbits(63)
    own = rng.choice((one, tuple(rng.getrandbits(63) for _ in prompts)))
    # Enough tokens that rows end at different lengths; none in a third of the calls.
    eos = tuple(sorted(rng.sample(range(vocab), max(1, vocab // 60)))) if rng.random() < 2 / 3 else ()
    if kind == "raising processor":
        eos = ()  # so that the call that raises is always reached
    stop_at = rng.randint(1, max(1, new_tokens // 2))
    return Call(index, kind, tuple(prompts), new_tokens, sampling, own, eos, stop_at)


# ---------------------------------------------------------------- what calls bring along


def favour_other_tokens(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor without state: its change depends only on the last token."""
    columns = (ids[:, -1:] * 7 + torch.arange(1, 9, device=ids.device)) % scores.shape[1]
    return scores.scatter_add(1, columns, scores.new_full(columns.shape, 1.5))


class Raises:
    """A processor that changes nothing and raises PlannedError at its call number `at`."""

    def __init__(self, at: int):
        self.left = at

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise PlannedError
        return scores


def ends_line(ids: torch.Tensor, scores) -> torch.Tensor:
    """A criterion without state: a row stops at one token in seven."""
    return ids[:, -1] % 7 == 3


# ---------------------------------------------------------------- running and comparing


def run(decoder: Decoder, call: Call, mode: str) -> list[list[int]]:
    """The new tokens of every row, or of every stream. Raises PlannedError or ValueError if the call is planned to."""
    settings = {"seed": call.seed if isinstance(call.seed, int) else list(call.seed), "eos_token_id": list(call.eos)}
    settings |= call.sampling
    settings |= {"mode": mode} if mode != LOOKUP else {"prompt_lookup_num_tokens": 1 + call.index % 8}
    if call.kind in STREAMS:
        return _streams(decoder, call, settings)
    if call.kind == "processor":
        settings["logits_processor"] = [favour_other_tokens]
    elif call.kind == "penalty":
        settings |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 4}
    elif call.kind == "raising processor":
        settings["logits_processor"] = [favour_other_tokens, Raises(call.stop_at)]
    elif call.kind == "criterion":
        settings["stopping_criteria"] = [ends_line]
    width = max(map(len, call.prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in call.prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in call.prompts])
    output = decoder.generate(ids, mask, call.new_tokens, pad_token_id=0, **settings)
    return output[:, width:].tolist()


def _streams(decoder: Decoder, call: Call, settings: dict) -> list[list[int]]:
    """One stream, read to its end or closed early; or two that are read in turn."""
    ids = torch.tensor(call.prompts)

    def chunks() -> Iterator[list[int]]:
        with closing(decoder.stream(ids, call.new_tokens, **settings)) as stream:
            for number, chunk in enumerate(stream, 1):
                yield chunk.tokens
                if call.kind == "closed stream" and number == call.stop_at:
                    return

    count = 2 if call.kind == "two streams" else 1
    found: list[list[int]] = [[] for _ in range(count)]
    for parts in zip_longest(*(chunks() for _ in range(count)), fillvalue=()):
        for tokens, part in zip(found, parts, strict=True):
            tokens += part
    return found


def outcome(decoder: Decoder, call: Call, mode: str) -> "list[list[int]] | str":
    """Result of the call: tokens, or the name of the error that it is planned to raise. Other errors are raised."""
    try:
        return run(decoder, call, mode)
    except PlannedError:
        if call.kind != "raising processor":
            raise
    except ValueError:
        if call.kind != "too long":
            raise
        return "ValueError"
    return "PlannedError"


def reference(decoder: Decoder, call: Call) -> "list[list[int]] | str":
    """Result of the call by plain decoding. A stream is read to its end."""
    return outcome(decoder, replace(call, kind="stream") if call.kind == "closed stream" else call, PLAIN)


def difference(call: Call, expected: "list[list[int]] | str", found: "list[list[int]] | str") -> str | None:
    """Describes where the tokens differ, or None. A stream closed early is compared with the beginning of expected."""
    if isinstance(expected, str) or isinstance(found, str):
        return None if expected == found else f"expected {_short(expected)}, got {_short(found)}"
    if len(expected) != len(found):
        return f"expected {len(expected)} rows, got {len(found)}"
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if call.kind == "closed stream":
            theirs = theirs[: max(len(ours), min(call.stop_at, len(theirs)))]
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            at = min(len(ours), len(theirs)) if at is None else at
            return f"row {row}, new token {at}: expected {theirs[at : at + 8]}, got {ours[at : at + 8]}"
    return None


def _short(value: "list[list[int]] | str") -> str:
    return value if isinstance(value, str) else f"tokens {str(value)[:80]}"


def modes_of(decoder: Decoder) -> list[str]:
    """The modes that a decoder is given: all of them with a draft, else plain decoding and prompt look-up."""
    return [PLAIN, LOOKUP] if decoder.draft is None else list(MODES)
