"""The n-gram that drafts for the draft (draft²): a trigram with Good-Turing discounts that backs off to shorter ones.

Two forms of one model:

- `KatzModel` is the fitted model, every count kept: it can name the probability of any token after any context.
- `KatzTable` is what decoding reads: the few most probable successors of every token and of the most frequent pairs of
  tokens. Backing off is resolved when the table is built, so a look-up finds one row and reads it.

    P(c | a, b) = d(n) n / N(a, b)         if the trigram (a, b, c) was counted n > 0 times
                = alpha(a, b) P(c | b)     otherwise

and likewise P(c | b) over P(c), and P(c) over the uniform distribution, so that no token is impossible. N is the number
of times the context was continued, d(n) the discount of a count, alpha what makes the probabilities sum to one.

Source: Katz, "Estimation of probabilities from sparse data for the language model component of a speech recognizer"
(1987); as draft² in "Accelerating LLM Inference with Staged Speculative Decoding" (arXiv 2308.04623).
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stagedspec.kernels.common.files import replacing

PROBES = 8  # a key lies at most PROBES - 1 slots after the one it hashes to
HASH_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # 2**64 over the golden ratio, as a signed 64-bit integer
HASH_SHIFT = 32
EMPTY = -1
END = 2**63 - 1  # closes the list of keys: above every key

FORMAT = "stagedspec.katz"
VERSION = "1"
ORDER = 3
MAX_VOCAB = 2**21 - 1  # a trigram is packed into one int64: vocab_size**3 must stay below 2**63
TEXT_CHUNK = 1 << 20  # characters of a text file tokenised at once


# Counting


class NgramCounts:
    """Counts of unigrams, bigrams and trigrams, added up shard by shard.

    Only distinct n-grams are kept, as sorted keys with their counts: a trigram (a, b, c) is the int64
    `(a * vocab_size + b) * vocab_size + c`, a bigram `b * vocab_size + c`. Shards are merged with others of about their
    size, so that counting T tokens costs O(T log T) however finely they are cut. Counts live on the CPU.

    vocab_size: number of token ids, 1 to 2**21 - 1.
    separator:  id of the token that ends a text, if texts are joined by one: the token after it is then counted with
                the separator alone as context, not with the last token of the text before.
    """

    def __init__(self, vocab_size: int, separator: int | None = None):
        self.vocab_size = _check_vocab_size(vocab_size)
        if separator is not None and not 0 <= separator < vocab_size:
            raise ValueError(f"separator must be a token id from 0 to {vocab_size - 1}, got {separator}")
        self.separator = separator
        self.num_tokens = 0
        self.unigrams = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
        self._bigrams: list[tuple[Tensor, Tensor]] = []
        self._trigrams: list[tuple[Tensor, Tensor]] = []

    def add(self, tokens: Tensor) -> None:
        """Counts one shard.

        tokens: integers [T], or [S, T] for S separate texts; no n-gram spans two texts or two shards. Counted on the
                device they are on.
        Raises ValueError if they are not token ids of this vocabulary.
        """
        size = self.vocab_size
        tokens = _check_tokens(tokens, size)
        if tokens.numel() == 0:
            return
        tokens = tokens.reshape(-1, tokens.shape[-1])
        pairs = tokens[:, :-1] * size + tokens[:, 1:]
        triples = pairs[:, :-1] * size + tokens[:, 2:]
        if self.separator is not None:
            triples = triples[tokens[:, 1:-1] != self.separator]
        self.num_tokens += tokens.numel()
        self.unigrams += torch.bincount(tokens.reshape(-1), minlength=size).cpu()
        for runs, keys in ((self._bigrams, pairs), (self._trigrams, triples)):
            keys, counts = torch.unique(keys.reshape(-1), return_counts=True)
            _push(runs, keys.cpu(), counts.cpu())

    def merge(self, other: "NgramCounts") -> None:
        """Adds the counts of another part of the same corpus. Raises ValueError if its vocabulary is another one."""
        if other.vocab_size != self.vocab_size:
            raise ValueError(
                f"cannot merge counts over {other.vocab_size} tokens into counts over {self.vocab_size}: "
                "count both with one vocabulary"
            )
        self.num_tokens += other.num_tokens
        self.unigrams += other.unigrams
        _push(self._bigrams, *other.bigrams())
        _push(self._trigrams, *other.trigrams())

    def bigrams(self) -> tuple[Tensor, Tensor]:
        """Distinct bigrams: keys int64 [n], ascending, and their counts int64 [n]."""
        return _collapse(self._bigrams)

    def trigrams(self) -> tuple[Tensor, Tensor]:
        """Distinct trigrams: keys int64 [n], ascending, and their counts int64 [n]."""
        return _collapse(self._trigrams)


def _push(runs: list[tuple[Tensor, Tensor]], keys: Tensor, counts: Tensor) -> None:
    """Appends a run of counted keys, and merges from the end until each run is over twice as long as the next."""
    runs.append((keys, counts))
    while len(runs) > 1 and len(runs[-2][0]) <= 2 * len(runs[-1][0]):
        runs.append(_merge(runs.pop(), runs.pop()))


def _collapse(runs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merges all runs into one, in place, and returns it."""
    while len(runs) > 1:
        runs.append(_merge(runs.pop(), runs.pop()))
    return (
        runs[0]
        if runs
        else (torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu"))
    )


def _merge(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    keys, order = torch.cat([one[0], two[0]]).sort()
    counts = torch.cat([one[1], two[1]])[order]
    keys, where = torch.unique_consecutive(keys, return_inverse=True)
    return keys, torch.zeros_like(keys).index_add_(0, where, counts)


# The model


class _Level(NamedTuple):
    """The counted n-grams of one order. Entry i is the successor `keys[i] % V` of the context `keys[i] // V`."""

    contexts: Tensor  # int64 [m], ascending: the context's key
    counts: Tensor  # int64 [m]: how often the context was continued
    starts: Tensor  # int64 [m]: its first entry
    lengths: Tensor  # int64 [m]: its number of entries
    backoff: Tensor  # float64 [m]: alpha, the factor on the lower order's probabilities of all other tokens
    keys: Tensor  # int64 [n], ascending
    probs: Tensor  # float64 [n]


@dataclass(frozen=True)
class KatzModel:
    """A fitted back-off trigram. Made by `fit` or `from_counts`; `compile` turns it into the table that decoding uses.

    Every conditional distribution sums to one and gives every token a probability above zero. Where no successor of a
    context has a discounted count (all occur more than `discount_limit` times), one more occurrence of the context,
    with an unknown successor, is assumed: without it nothing would be left for the other tokens.
    """

    vocab_size: int
    fitted_tokens: int
    unigram: Tensor  # float64 [V]
    bigram: _Level  # contexts: every token, 0 to V - 1
    trigram: _Level  # contexts: the counted pairs a * V + b

    @classmethod
    def fit(cls, tokens: Tensor, vocab_size: int, discount_limit: int = 5, separator: int | None = None) -> "KatzModel":
        """Fits on one corpus. Arguments as of `NgramCounts`, `NgramCounts.add` and `from_counts`."""
        counts = NgramCounts(vocab_size, separator)
        counts.add(tokens)
        return cls.from_counts(counts, discount_limit)

    @classmethod
    def from_counts(cls, counts: NgramCounts, discount_limit: int = 5) -> "KatzModel":
        """Fits on counts.

        discount_limit: larger counts are reliable and are not discounted (k in the source, which recommends 5).
        Raises ValueError if nothing was counted.
        """
        if discount_limit < 1:
            raise ValueError(f"discount_limit must be at least 1, got {discount_limit}")
        if counts.num_tokens == 0:
            raise ValueError("no tokens to fit on: give at least one token")
        size = counts.vocab_size

        seen = counts.unigrams.nonzero().squeeze(1)
        uniform = torch.full((len(seen),), 1 / size, dtype=torch.float64, device="cpu")
        level = _fit_level(
            seen, counts.unigrams[seen], torch.zeros(1, dtype=torch.int64, device="cpu"), uniform, size, discount_limit
        )
        unigram = (level.backoff / size).repeat(size)
        unigram[seen] = level.probs

        keys, seen_counts = counts.bigrams()
        bigram = _fit_level(
            keys, seen_counts, torch.arange(size, device="cpu"), unigram[keys % size], size, discount_limit
        )

        keys, seen_counts = counts.trigrams()
        contexts = torch.unique_consecutive(keys // size)
        lower = _bigram_probs(unigram, bigram, keys % size**2, size)
        trigram = _fit_level(keys, seen_counts, contexts, lower, size, discount_limit)
        return cls(size, counts.num_tokens, unigram, bigram, trigram)

    def distribution(self, a: int, b: int) -> Tensor:
        """P(· | a, b) as float64 [V], for a context counted or not. a = -1: no earlier token, so P(· | b)."""
        size = self.vocab_size
        if not (-1 <= a < size and 0 <= b < size):
            raise ValueError(f"a context is two token ids below {size} (the first may be -1: none), got ({a}, {b})")
        probs = _over(self.bigram, b, self.unigram)
        row = int(torch.searchsorted(self.trigram.contexts, a * size + b))
        if row < len(self.trigram.contexts) and self.trigram.contexts[row] == a * size + b:
            probs = _over(self.trigram, row, probs)
        return probs

    def compile(self, successors: int = 8, max_contexts: int = 65536) -> "KatzTable":
        """The table for decoding: the most probable successors of every token and of the most frequent pairs.

        successors:   how many a row holds, r; all V where the vocabulary is smaller.
        max_contexts: pairs of tokens to keep at most: the most frequent ones, on ties those with the lower key.

        Exact: a row is the top r of `distribution`. A token that was not counted after a context ranks as in the lower
        order, so of the lower order's ranking no more than the first r + (number of counted successors) can matter.
        """
        if successors < 1 or max_contexts < 0:
            raise ValueError(
                f"successors must be at least 1 and max_contexts at least 0, got {successors} and {max_contexts}"
            )
        size, low, high = self.vocab_size, self.bigram, self.trigram
        width = min(successors, size)

        # Successors of one token: those counted, then those that rank first among all tokens.
        common = self.unigram.argsort(descending=True, stable=True)
        ranked = _rank(low)
        low_tokens, low_probs = (low.keys % size)[ranked], low.probs[ranked]
        seen = _leading(low.starts, low.lengths.clamp(max=width), width)
        rest = _leading(
            torch.zeros_like(low.starts),
            (low.lengths + width).clamp(max=size),
            width,
            drop=lambda rows, at: _contains(low.keys, rows * size + common[at]),
        )
        rest_tokens = _pick(common, rest, size)
        rest_probs = low.backoff[:, None] * _pick(self.unigram[common], rest, -1.0)
        bigram_rows = _best(
            [_pick(low_tokens, seen, size), rest_tokens], [_pick(low_probs, seen, -1.0), rest_probs], width
        )

        # Successors of a pair: those counted, then those counted after its second token, then the rest as above.
        kept = high.counts.argsort(descending=True, stable=True)[:max_contexts].sort().values
        pairs, last = high.contexts[kept], high.contexts[kept] % size
        _, entries = _ranges(high.starts[kept], high.lengths[kept])
        lengths = high.lengths[kept]
        own = _Level(
            pairs,
            high.counts[kept],
            lengths.cumsum(0) - lengths,
            lengths,
            high.backoff[kept],
            high.keys[entries],
            high.probs[entries],
        )
        ranked = _rank(own)
        seen = _leading(own.starts, lengths.clamp(max=width), width)
        lower = _leading(
            low.starts[last],
            torch.minimum(low.lengths[last], lengths + width),
            width,
            drop=lambda rows, at: _contains(own.keys, pairs[rows] * size + low_tokens[at]),
        )
        trigram_rows = _best(
            [_pick((own.keys % size)[ranked], seen, size), _pick(low_tokens, lower, size), rest_tokens[last]],
            [
                _pick(own.probs[ranked], seen, -1.0),
                own.backoff[:, None] * _pick(low_probs, lower, -1.0),
                own.backoff[:, None] * rest_probs[last],
            ],
            width,
        )
        tokens, probs = (torch.cat(both) for both in zip(bigram_rows, trigram_rows, strict=True))
        logprobs = probs.log().clamp(max=0.0).half()
        return KatzTable.build(size, pairs, tokens, logprobs, self.fitted_tokens)


def _fit_level(keys: Tensor, counts: Tensor, contexts: Tensor, lower: Tensor, size: int, limit: int) -> _Level:
    """Discounted probabilities and back-off weights of one order.

    keys, counts: int64 [n], the counted n-grams.   contexts: int64 [m], ascending, at least all those of `keys`.
    lower: float64 [n], the lower order's probability of each entry.
    """
    where = torch.searchsorted(contexts, keys // size)

    def total(values: Tensor) -> Tensor:  # per context, in the order of the entries
        return torch.bincount(where, weights=values, minlength=len(contexts)).double()  # without entries it is int64

    lengths = torch.bincount(where, minlength=len(contexts))
    seen = counts.double()
    discounts = _discounts(counts, limit)[counts.clamp(max=limit + 1)]
    occurrences, freed = total(seen), total(seen * (1 - discounts))
    extra = (freed == 0).double()  # one more occurrence, of a token not counted here
    probs = seen * discounts / (occurrences + extra)[where]
    backoff = (freed + extra) / (occurrences + extra) / (1 - total(lower)).clamp(min=1e-12)

    full = lengths == size  # every token was counted: nothing to back off to, so the counted ones share it all
    if full.any():
        probs = torch.where(full[where], probs / total(probs)[where], probs)
        backoff[full] = 0.0
    return _Level(contexts, occurrences.long(), lengths.cumsum(0) - lengths, lengths, backoff, keys, probs)


def _discounts(counts: Tensor, limit: int) -> Tensor:
    """The factor on a count r, as float64 [limit + 2] indexed by min(r, limit + 1).

    With n_r the number of n-grams counted r times, and k the limit, Good-Turing replaces r by (r + 1) n_{r+1} / n_r,
    and the discounts up to k are rescaled so that together they free n_1, the share of the n-grams never seen:

        d_r = ((r + 1) n_{r+1} / (r n_r) - (k + 1) n_{k+1} / n_1) / (1 - (k + 1) n_{k+1} / n_1)

    A small or odd corpus has counts of counts for which this is no discount. Then an absolute one is used instead,
    (r - D) / r, with D = n_1 / (n_1 + 2 n_2), or a half where n_1 or n_2 is zero.
    """
    of = torch.bincount(counts.clamp(max=limit + 2), minlength=limit + 3).double()
    r = torch.arange(1, limit + 1, dtype=torch.float64, device="cpu")
    shift = (limit + 1) * of[limit + 1] / of[1]
    factors = ((r + 1) * of[2 : limit + 2] / (r * of[1 : limit + 1]) - shift) / (1 - shift)
    if not (shift < 1 and ((factors > 0) & (factors < 1)).all()):  # also where a division by zero made it NaN
        absolute = of[1] / (of[1] + 2 * of[2]) if of[1] > 0 and of[2] > 0 else 0.5
        factors = (r - absolute) / r
    edge = torch.ones(1, dtype=torch.float64, device="cpu")
    return torch.cat([edge, factors, edge])


def _bigram_probs(unigram: Tensor, bigram: _Level, keys: Tensor, size: int) -> Tensor:
    """P(c | b) of bigram keys int64 [n], as float64 [n]."""
    probs = bigram.backoff[keys // size] * unigram[keys % size]
    at = torch.searchsorted(bigram.keys, keys).clamp(max=len(bigram.keys) - 1)
    return torch.where(bigram.keys[at] == keys, bigram.probs[at], probs) if len(bigram.keys) else probs


def _over(level: _Level, row: int, lower: Tensor) -> Tensor:
    """The full distribution [V] of one context of a level, given the lower order's."""
    entries = slice(int(level.starts[row]), int(level.starts[row] + level.lengths[row]))
    probs = level.backoff[row] * lower
    probs[level.keys[entries] % len(lower)] = level.probs[entries]
    return probs


# Ragged rankings: context i owns a range of a long ranked list. All of it without a loop over contexts.


def _rank(level: _Level) -> Tensor:
    """The order [n] of a level's entries by context, then descending probability, then token."""
    order = level.probs.argsort(descending=True, stable=True)
    return order[torch.searchsorted(level.starts + level.lengths, order, right=True).argsort(stable=True)]


def _ranges(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For ranges [m] of a list: the row and the position in the list of every element, both int64 [sum of lengths]."""
    rows = torch.repeat_interleave(torch.arange(len(starts), device="cpu"), lengths)
    return rows, torch.arange(len(rows), device="cpu") + (starts - (lengths.cumsum(0) - lengths))[rows]


def _leading(
    starts: Tensor, lengths: Tensor, width: int, drop: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """The first `width` positions of each range that are not dropped, int64 [m, width], filled up with -1.

    drop: of (rows, positions), a mask of the elements to pass over.
    """
    rows, at = _ranges(starts, lengths)
    if drop is not None:
        keep = ~drop(rows, at)
        rows, at = rows[keep], at[keep]
    held = torch.bincount(rows, minlength=len(starts))
    place = torch.arange(len(rows), device="cpu") - (held.cumsum(0) - held)[rows]
    keep = place < width
    leading = torch.full((len(starts), width), -1, device="cpu")
    leading[rows[keep], place[keep]] = at[keep]
    return leading


def _pick(values: Tensor, at: Tensor, missing: float) -> Tensor:
    """values[at], and `missing` where at is -1."""
    return torch.cat([values, values.new_full((1,), missing)])[at]


def _contains(keys: Tensor, wanted: Tensor) -> Tensor:
    """Which of `wanted` are among the ascending `keys`."""
    if not len(keys):
        return torch.zeros_like(wanted, dtype=torch.bool)
    return keys[torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)] == wanted


def _best(tokens: list[Tensor], probs: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Of disjoint candidates [m, ...], the `width` most probable, descending, on ties the lower token first."""
    tokens, order = torch.cat(tokens, dim=1).sort(dim=1)
    probs, order = torch.cat(probs, dim=1).gather(1, order).sort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order)[:, :width], probs[:, :width]


# The table


@dataclass(frozen=True)
class KatzTable:
    """The n-gram as decoding reads it. Made by `KatzModel.compile` or `KatzTable.load`.

    With V the vocabulary, R the number of pairs kept, r the successors of a row and C the slots, a power of two:

    keys:     int64 [R + 1], ascending: the pairs a * V + b that have a row of their own; then END.
    slots:    int64 [C]: the keys again as a hash table, for kernels; -1 where empty. A key is in one of the PROBES
              slots that begin at `hash_slot(key, C)`, going round at the end, and none before it is empty.
    rows:     int32 [C]: the row of that slot's key, V + its index in `keys`. Empty slots hold V - 1: so the "key" -1 of
              a context without first token (a = -1) and b = V - 1 finds its right row, b, and a look-up needs no
              special case for it.
    tokens:   int32 [V + R, r]: row b is the bigram context b, row V + i the pair keys[i]. Most probable first; of
              equally probable ones the lower id.
    logprobs: float32 [V + R, r]: natural logarithms, under the full back-off distribution, of float16 precision so that
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
    def num_contexts(self) -> int:
        """Pairs of tokens that have a row of their own, R."""
        return len(self.keys) - 1

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
        """The same table for a vocabulary with more or fewer rows of padding, about which it says nothing.

        Raises ValueError if it speaks of tokens beyond vocab_size.
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
        # After padding nothing is likely: the tokens of some row, with the least log-probability that float16 holds.
        nothing = max(0, vocab_size - old)
        tokens = torch.cat([tokens[kept[0]], tokens[:1].expand(nothing, -1), tokens[kept[1]]])
        least = torch.finfo(torch.float16).min
        unlikely = torch.full((nothing, self.successors), least, dtype=torch.float32, device="cpu")
        logprobs = torch.cat([logprobs[kept[0]], unlikely, logprobs[kept[1]]])
        keys = (first * vocab_size + last).cpu()
        return KatzTable.build(vocab_size, keys, tokens, logprobs, self.fitted_tokens).to(self.device)

    def lookup(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable successors of contexts.

        contexts: int64 [..., 2], on the table's device: the last two tokens, the first of them -1 where there is none.
                  Not checked: this is the hot path, and reading values back would synchronise with the device.
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
        """Writes safetensors: keys, tokens (uint16 where the vocabulary allows) and float16 logprobs, with metadata.

        The file appears whole or not at all.
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
        """Reads what `save` wrote, onto the CPU, and checks all of it.

        vocab_size: the size of the vocabulary it is going to be used with, if known.
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

    In 64-bit two's complement: the product wraps, the shift is arithmetic. slots is a power of two, at most 2**31, so
    that the mask keeps none of the bits that the shift brought in.
    """
    return ((key * HASH_MULTIPLIER) >> HASH_SHIFT) & (slots - 1)


def _hash_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Slots int64 [C] for distinct keys [R], and the index of the key that each slot holds, int64 [C].

    Linear probing with all keys at once: in round p every key without a slot asks for the p-th after its first, and the
    lowest index gets it if it is free. Where PROBES rounds do not do, twice the slots are tried.
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
    """How token ids are stored in a file."""
    return torch.uint16 if vocab_size <= 65536 else torch.int32


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of an n-gram file of this format and version."""
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


# Fitting


def fit_table(
    shards: Iterable[Tensor],
    vocab_size: int,
    successors: int = 8,
    max_contexts: int = 65536,
    discount_limit: int = 5,
    separator: int | None = None,
) -> KatzTable:
    """Fits a table on shards of token ids, each integers [T] or [S, T], read once and one at a time.

    Arguments and errors as of `NgramCounts`, `KatzModel.from_counts` and `KatzModel.compile`.
    """
    counts = NgramCounts(vocab_size, separator)
    for shard in shards:
        counts.add(shard)
    return KatzModel.from_counts(counts, discount_limit).compile(successors, max_contexts)


def fit_from_text(
    paths: Iterable[str | os.PathLike],
    tokenizer: Callable,
    vocab_size: int | None = None,
    successors: int = 8,
    max_contexts: int = 65536,
    progress: Callable[[int, int], None] | None = None,
) -> KatzTable:
    """Fits a table on text files, each a text of its own.

    paths:      UTF-8 files.
    tokenizer:  as transformers makes them: called with a text it returns `input_ids`.
    vocab_size: the model's; by default `len(tokenizer)`.
    progress:   called with (files done, files) after every file.
    Raises ValueError, before any work if a file is missing, and naming the file if one is not UTF-8.
    """
    paths = [Path(path) for path in paths]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(f"no such text file: {', '.join(missing)}" if missing else "no text files given to fit on")

    def shards() -> Iterable[Tensor]:
        for done, path in enumerate(paths, start=1):
            try:
                with path.open(encoding="utf-8") as file:
                    for lines in iter(lambda file=file: file.readlines(TEXT_CHUNK), []):
                        ids = tokenizer("".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
                        yield torch.tensor(ids, dtype=torch.int64, device="cpu")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text ({error}): convert it or leave it out") from None
            if progress is not None:
                progress(done, len(paths))

    return fit_table(shards(), len(tokenizer) if vocab_size is None else vocab_size, successors, max_contexts)


def _check_vocab_size(vocab_size: int) -> int:
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocab_size must be from 1 to {MAX_VOCAB}, got {vocab_size}")
    return vocab_size


def _check_tokens(tokens: Tensor, vocab_size: int) -> Tensor:
    """The tokens as int64 [T] or [S, T], or a ValueError."""
    if not isinstance(tokens, Tensor) or tokens.ndim not in (1, 2):
        got = f"shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be a tensor of shape [T] or [S, T], got {got}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    tokens = tokens.long()
    if tokens.numel():
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, got {low} to {high}")
    return tokens
