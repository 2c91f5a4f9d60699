"""The n-gram table that drafts for the draft (draft²): look-up, loading, saving.

`KatzTable` holds the few most probable successors of every token and of the most frequent pairs of tokens. Backing off
from trigrams to bigrams is resolved when the table is built (`stagedspec.models.ngram_fit`), so a look-up finds one row
and reads it.
"""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stagedspec.kernels.common.constants import HASH_MULTIPLIER, HASH_SHIFT, MAX_VOCAB, PROBES
from stagedspec.kernels.common.files import replacing

EMPTY = -1
END = 2**63 - 1  # closes the list of keys: above every key

FORMAT = "stagedspec.katz"
VERSION = "1"
ORDER = 3


@dataclass(frozen=True)
class KatzTable:
    """The most probable successors of tokens and of pairs of tokens. Made by `KatzModel.compile` or `KatzTable.load`.

    V is the vocabulary size, R the number of pairs with a row, r the number of successors in a row, C the number of
    slots of the hash table, a power of two.

    keys:     int64 [R + 1], ascending: the pairs a * V + b that have a row of their own; then END.
    slots:    int64 [C]: the keys again as a hash table, for kernels; -1 where empty. A key is in one of the PROBES
              slots from `hash_slot(key, C)` on, wrapping around at the end, and no slot before it is empty.
    rows:     int32 [C]: the row of each slot's key, V + its index in `keys`. Empty slots hold V - 1, because a context
              of no first token (a = -1) and b = V - 1 has the key -1, which a look-up finds in an empty slot: its row
              is b.
    tokens:   int32 [V + R, r]: row b is the bigram context b, row V + i the pair keys[i]. Most probable first; of
              equally probable ones the lower id.
    logprobs: float32 [V + R, r]: natural logarithms under the full back-off distribution, rounded to float16 so that
              saving loses nothing.
    fitted_tokens: number of tokens the model was fitted on.
    """

    vocab_size: int
    keys: Tensor
    slots: Tensor
    rows: Tensor
    tokens: Tensor
    logprobs: Tensor
    fitted_tokens: int

    @property
    def successors(self) -> int:
        return self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @classmethod
    def build(cls, vocab_size: int, keys: Tensor, tokens: Tensor, logprobs: Tensor, fitted_tokens: int) -> "KatzTable":
        """From checked keys int64 [R], tokens [V + R, r] and log-probabilities float16 [V + R, r]: adds the hash."""
        slots, held = _hash_keys(keys)
        rows = torch.where(slots == EMPTY, vocab_size - 1, held + vocab_size).int()
        keys = torch.cat([keys, keys.new_full((1,), END)])
        return cls(vocab_size, keys, slots, rows, tokens.int().contiguous(), logprobs.float(), fitted_tokens)

    def to(self, device: torch.device | str) -> "KatzTable":
        """The same table on a device; itself where it is there already."""
        if self.device == torch.device(device):
            return self
        names = ("keys", "slots", "rows", "tokens", "logprobs")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def resized(self, vocab_size: int) -> "KatzTable":
        """The same table for a vocabulary with more or fewer rows of padding, for which it proposes nothing likely.

        Raises ValueError if it has contexts or successors beyond vocab_size.
        """
        old = self.vocab_size
        if vocab_size == old:
            return self
        keys = self.keys[:-1]
        first, last = keys // old, keys % old
        if len(keys) and max(int(first.max()), int(last.max())) >= vocab_size:
            raise ValueError(f"the n-gram table knows contexts beyond a vocabulary of {vocab_size} tokens: fit another")
        kept = [
            torch.arange(min(old, vocab_size), device="cpu"),
            torch.arange(old, len(self.tokens), device="cpu"),
        ]
        tokens, logprobs = self.tokens.cpu(), self.logprobs.cpu()
        if int(tokens[torch.cat(kept)].max()) >= vocab_size:
            raise ValueError(f"the n-gram table proposes tokens beyond a vocabulary of {vocab_size}: fit another")
        # A row of padding gets the tokens of any row, with the least log-probability that float16 holds.
        nothing = max(0, vocab_size - old)
        tokens = torch.cat([tokens[kept[0]], tokens[:1].expand(nothing, -1), tokens[kept[1]]])
        least = torch.finfo(torch.float16).min
        unlikely = torch.full((nothing, self.successors), least, dtype=torch.float32, device="cpu")
        logprobs = torch.cat([logprobs[kept[0]], unlikely, logprobs[kept[1]]])
        keys = (first * vocab_size + last).cpu()
        return KatzTable.build(vocab_size, keys, tokens, logprobs, self.fitted_tokens).to(self.device)

    def lookup(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable successors of contexts.

        contexts: int64 [..., 2], on the table's device: the last two tokens; the first is -1 where there is none.
                  Not checked: reading values back would synchronise with the device.
        Returns tokens int64 [..., r] and natural log-probabilities float32 [..., r], most probable first: of the pair
        if it has a row, else of its second token.
        """
        first, last = contexts.unbind(-1)
        key = torch.add(last, first, alpha=self.vocab_size)  # below 0, so never found, where there is no first token
        at = torch.searchsorted(self.keys, key)
        row = torch.where(self.keys[at] == key, at + self.vocab_size, last)
        return self.tokens[row].long(), self.logprobs[row]

    @cached_property
    def _host(self) -> tuple:
        rows = {key: row for row, key in enumerate(self.keys[:-1].tolist(), self.vocab_size)}
        return rows, self.tokens.cpu().numpy(), self.logprobs.cpu().numpy()

    def successors_of(self, first: int, last: int) -> list[tuple[int, float]]:
        """`lookup` of one context on the host: (token, log-probability) pairs; first is -1 where there is none."""
        rows, tokens, logprobs = self._host
        row = rows.get(first * self.vocab_size + last, last) if first >= 0 else last
        return list(zip(tokens[row].tolist(), logprobs[row].tolist(), strict=True))

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file: keys, tokens (uint16 where the vocabulary allows), float16 logprobs, metadata.

        An interrupted save leaves no file, or the earlier one.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "keys": self.keys[:-1].cpu(),
            "tokens": self.tokens.cpu().to(_token_dtype(self.vocab_size)),
            "logprobs": self.logprobs.cpu().half(),
        }
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "order": str(ORDER),
            "vocab_size": str(self.vocab_size),
            "successors": str(self.successors),
            "fitted_tokens": str(self.fitted_tokens),
        }
        with replacing(path) as part:
            save_file(tensors, part, metadata=metadata)
            part.chmod(0o644)  # safetensors are written for the owner alone

    @classmethod
    def load(cls, path: str | os.PathLike, vocab_size: int | None = None) -> "KatzTable":
        """Reads a file written by `save`, onto the CPU, and checks all of it.

        vocab_size: the size of the vocabulary that it will be used with, if known.
        Raises ValueError, naming the file and what is wrong with it: missing, not safetensors, truncated, another
        format, damaged, or made for another vocabulary.
        """
        metadata, tensors = _read(Path(path))

        def fail(what: str) -> ValueError:
            return ValueError(f"{path} is damaged: {what}. Fit the n-gram table again")

        try:
            numbers = [int(metadata[name]) for name in ("order", "vocab_size", "successors", "fitted_tokens")]
        except (KeyError, ValueError) as error:
            raise fail(f"its metadata lacks a whole number ({error})") from None
        order, size, width, fitted_tokens = numbers
        if order != ORDER or not 1 <= size <= MAX_VOCAB or not 1 <= width <= size or fitted_tokens < 1:
            raise fail(f"order {order}, vocabulary {size}, successors {width}, tokens {fitted_tokens} cannot be")
        if vocab_size is not None and vocab_size != size:
            raise ValueError(
                f"{path} was fitted for a vocabulary of {size} tokens, but the model's has {vocab_size}: "
                "fit a table with this model's tokenizer"
            )
        for name in ("keys", "tokens", "logprobs"):
            if name not in tensors:
                raise fail(f"tensor {name!r} is missing")
        keys, tokens, logprobs = tensors["keys"], tensors["tokens"], tensors["logprobs"]

        shape = (size + keys.numel(), width)
        for name, tensor, dtype, expected in (
            ("keys", keys, torch.int64, (keys.numel(),)),
            ("tokens", tokens, _token_dtype(size), shape),
            ("logprobs", logprobs, torch.float16, shape),
        ):
            if tensor.dtype != dtype or tensor.shape != expected:
                raise fail(
                    f"{name} should be {dtype} of shape {list(expected)}, but is {tensor.dtype} of {list(tensor.shape)}"
                )
        if len(keys) and (keys[0] < 0 or keys[-1] >= size**2 or (keys[1:] <= keys[:-1]).any()):
            raise fail(f"keys should be ascending, without repeats, from 0 to {size**2 - 1}")
        tokens = tokens.int()
        if tokens.min() < 0 or tokens.max() >= size:
            raise fail(f"tokens should be ids from 0 to {size - 1}, but go from {tokens.min()} to {tokens.max()}")
        if (tokens.sort(dim=1).values.diff(dim=1) == 0).any():
            raise fail("a row of tokens names one token twice")
        if not logprobs.isfinite().all() or (logprobs > 0).any():
            raise fail("log-probabilities should be finite and at most 0")
        if (logprobs[:, 1:] > logprobs[:, :-1]).any():
            raise fail("the log-probabilities of a row should descend")
        return cls.build(size, keys, tokens, logprobs, fitted_tokens)


def hash_slot(key: Tensor, slots: int) -> Tensor:
    """The first slot to probe for keys int64 [...]: `((key * HASH_MULTIPLIER) >> HASH_SHIFT) & (slots - 1)`.

    In 64-bit two's complement: the product wraps, the shift is arithmetic. slots is a power of two of at most 2**31, so
    the mask drops the sign bits that the shift brings in.
    """
    return ((key * HASH_MULTIPLIER) >> HASH_SHIFT) & (slots - 1)


def _hash_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """A hash table of distinct keys int64 [R]: its slots int64 [C], and the index of each slot's key int64 [C].

    Linear probing with all keys at once: in round p every key without a slot asks for the p-th slot after its first,
    and the lowest index gets it if it is free. If keys are left after PROBES rounds, the number of slots is doubled.
    """
    slots = 1 << max(4, (2 * len(keys)).bit_length())
    while slots <= 1 << 31 and slots <= 1024 * max(len(keys), 16):
        held = torch.full((slots,), len(keys), device="cpu")  # len(keys): empty
        waiting = torch.arange(len(keys), device="cpu")
        for probe in range(PROBES):
            asked = (hash_slot(keys[waiting], slots) + probe) & (slots - 1)
            free = held[asked] == len(keys)
            held.scatter_reduce_(0, asked[free], waiting[free], "amin")
            waiting = waiting[held[asked] != waiting]
        if not len(waiting):
            return torch.cat([keys, keys.new_full((1,), EMPTY)])[held], held
        slots *= 2
    raise ValueError(f"the {len(keys)} keys of the n-gram table all hash alike: keep fewer contexts")


def _token_dtype(vocab_size: int) -> torch.dtype:
    """The dtype of token ids in a file."""
    return torch.uint16 if vocab_size <= 65536 else torch.int32


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of an n-gram file. Raises ValueError for another format or version, and a damaged file."""
    if not path.is_file():
        raise ValueError(f"no n-gram table at {path}: give the path of a file written by fit-ngram")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if _is_ours(metadata) else []
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}; run `stagedspec fit-ngram` again") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not an n-gram table: expected format {FORMAT!r} in its metadata, got {metadata.get('format')!r}"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {metadata.get('version')!r}, this release reads {VERSION!r}: fit it again"
        )
    return metadata, tensors


def _is_ours(metadata: dict[str, str]) -> bool:
    return metadata.get("format") == FORMAT and metadata.get("version") == VERSION
