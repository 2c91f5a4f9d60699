"""Fits the n-gram model that drafts for the draft (draft²): a back-off trigram with Good-Turing discounts.

`KatzModel` keeps every count and gives the probability of any token after any context. `KatzModel.compile` makes of it
the `KatzTable` that decoding reads.

    P(c | a, b) = d(n) n / N(a, b)         if the trigram (a, b, c) was counted n > 0 times
                = alpha(a, b) P(c | b)     otherwise

and likewise P(c | b) over P(c), and P(c) over the uniform distribution, so that no token is impossible. N is the number
of times the context was continued, d(n) the discount of a count, alpha what makes the probabilities sum to one.

Source: Katz, "Estimation of probabilities from sparse data for the language model component of a speech recognizer"
(1987); as draft² in "Accelerating LLM Inference with Staged Speculative Decoding" (arXiv 2308.04623).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stagedspec.kernels.common.constants import MAX_VOCAB
from stagedspec.models.ngram import KatzTable
from stagedspec.values import at_least, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_CHUNK = 1 << 20  # characters of a text file tokenised at once


# ---------------------------------------------------------------- counting


class NgramCounts:
    """Counts of unigrams, bigrams and trigrams, added up shard by shard, on the CPU.

    Only distinct n-grams are kept, as sorted keys with their counts: the key of a trigram (a, b, c) is the int64
    `(a * vocab_size + b) * vocab_size + c`, that of a bigram (b, c) `b * vocab_size + c`. Shards are merged with others
    of about their size, so that counting T tokens costs O(T log T) whatever the size of the shards.

    vocab_size: number of token ids, 1 to 2**21 - 1.
    separator:  id of the token that ends a text, if the texts are joined by one: the context of the token after it is
                then the separator alone, without the last token of the text before.
    """

    def __init__(self, vocab_size: int, separator: int | None = None):
        self.vocab_size = _check_vocab_size(vocab_size)
        self.separator = whole(separator)
        if separator is not None and (self.separator is None or not 0 <= self.separator < self.vocab_size):
            raise ValueError(f"separator must be a token id from 0 to {self.vocab_size - 1}, got {separator!r}")
        self.num_tokens = 0
        self.unigrams = torch.zeros(self.vocab_size, dtype=torch.int64, device="cpu")
        self._bigrams: list[tuple[Tensor, Tensor]] = []
        self._trigrams: list[tuple[Tensor, Tensor]] = []

    def add(self, tokens: Tensor) -> None:
        """Counts one shard.

        tokens: integers [T], or [S, T] for S separate texts; no n-gram spans two texts or two shards. They are counted
                on their own device.
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

    def bigrams(self) -> tuple[Tensor, Tensor]:
        """Distinct bigrams: keys int64 [n], ascending, and their counts int64 [n]."""
        return _collapse(self._bigrams)

    def trigrams(self) -> tuple[Tensor, Tensor]:
        """Distinct trigrams: keys int64 [n], ascending, and their counts int64 [n]."""
        return _collapse(self._trigrams)


def _push(runs: list[tuple[Tensor, Tensor]], keys: Tensor, counts: Tensor) -> None:
    """Appends a run of counted keys; then merges runs from the end until each is over twice as long as the next."""
    runs.append((keys, counts))
    while len(runs) > 1 and len(runs[-2][0]) <= 2 * len(runs[-1][0]):
        runs.append(_merge(runs.pop(), runs.pop()))


def _collapse(runs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merges all runs into one, in place, and returns it: keys and counts."""
    while len(runs) > 1:
        runs.append(_merge(runs.pop(), runs.pop()))
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    return runs[0] if runs else (nothing, nothing)


def _merge(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    keys, order = torch.cat([one[0], two[0]]).sort()
    counts = torch.cat([one[1], two[1]])[order]
    keys, where = torch.unique_consecutive(keys, return_inverse=True)
    return keys, torch.zeros_like(keys).index_add_(0, where, counts)


# ---------------------------------------------------------------- the model


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
    """A fitted back-off trigram. Made by `fit` or `from_counts`; `compile` turns it into the table for decoding.

    Every conditional distribution sums to one and gives every token a probability above zero. Where all successors of a
    context occur more than `discount_limit` times, none is discounted and nothing would be left for other tokens: then
    one more occurrence of the context, with an unknown successor, is assumed.
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

        discount_limit: larger counts count as reliable and are not discounted (k in the source, which recommends 5).
        Raises ValueError if nothing was counted.
        """
        discount_limit = at_least("discount_limit", discount_limit)
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
        """P(· | a, b) as float64 [V], for any context, counted or not. a = -1 means no first token: P(· | b)."""
        size, first, last = self.vocab_size, whole(a), whole(b)
        if first is None or last is None or not (-1 <= first < size and 0 <= last < size):
            raise ValueError(f"a context is two token ids below {size} (the first may be -1: none), got ({a}, {b})")
        probs = _distribution(self.bigram, last, self.unigram)
        row = int(torch.searchsorted(self.trigram.contexts, first * size + last))
        if row < len(self.trigram.contexts) and self.trigram.contexts[row] == first * size + last:
            probs = _distribution(self.trigram, row, probs)
        return probs

    def compile(self, successors: int = 8, max_contexts: int = 65536) -> "KatzTable":
        """The table for decoding: the most probable successors of every token and of the most frequent pairs.

        successors:   the number r of successors in a row; all V where the vocabulary is smaller.
        max_contexts: the most pairs of tokens to keep: the most frequent ones, on ties those with the lower key.

        Exact: a row is the top r of `distribution`. A token not counted after a context ranks as in the lower order,
        so no more than the first r + (number of counted successors) of the lower order's ranking can matter.
        """
        successors, max_contexts = at_least("successors", successors), at_least("max_contexts", max_contexts, 0)
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


def _distribution(level: _Level, row: int, lower: Tensor) -> Tensor:
    """The distribution float64 [V] after one context of a level. lower: the lower order's, [V]."""
    entries = slice(int(level.starts[row]), int(level.starts[row] + level.lengths[row]))
    probs = level.backoff[row] * lower
    probs[level.keys[entries] % len(lower)] = level.probs[entries]
    return probs


# ---------------------------------------------------------------- ranking
# Each context owns a range of one long ranked list; all contexts are ranked at once.


def _rank(level: _Level) -> Tensor:
    """Indices [n] that sort a level's entries by context, then descending probability, then token."""
    order = level.probs.argsort(descending=True, stable=True)
    return order[torch.searchsorted(level.starts + level.lengths, order, right=True).argsort(stable=True)]


def _ranges(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For m ranges of a list: the range and the position of every element, both int64 [sum of lengths]."""
    rows = torch.repeat_interleave(torch.arange(len(starts), device="cpu"), lengths)
    return rows, torch.arange(len(rows), device="cpu") + (starts - (lengths.cumsum(0) - lengths))[rows]


def _leading(
    starts: Tensor, lengths: Tensor, width: int, drop: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """The first `width` positions of each of m ranges, int64 [m, width], filled up with -1.

    drop: called with (rows, positions); returns a mask of the elements to leave out.
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


def _best(candidates: list[Tensor], values: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """The `width` most probable of disjoint candidates [m, ...], and their probabilities: the most probable first, on
    ties the lower token first."""
    tokens, order = torch.cat(candidates, dim=1).sort(dim=1)
    probs, order = torch.cat(values, dim=1).gather(1, order).sort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order)[:, :width], probs[:, :width]


# ---------------------------------------------------------------- corpora


def fit_table(
    shards: Iterable[Tensor],
    vocab_size: int,
    successors: int = 8,
    max_contexts: int = 65536,
    discount_limit: int = 5,
    separator: int | None = None,
) -> KatzTable:
    """Fits a table on shards of token ids, integers [T] or [S, T] each, which are read once and one at a time.

    Arguments and errors as of `NgramCounts`, `KatzModel.from_counts` and `KatzModel.compile`.
    """
    counts = NgramCounts(vocab_size, separator)
    for shard in shards:
        counts.add(shard)
    return KatzModel.from_counts(counts, discount_limit).compile(successors, max_contexts)


def fit_from_text(
    paths: Iterable[str | os.PathLike],
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int | None = None,
    successors: int = 8,
    max_contexts: int = 65536,
    progress: Callable[[int, int], None] | None = None,
) -> KatzTable:
    """Fits a table on text files, each a text of its own.

    paths:      UTF-8 files.
    tokenizer:  a tokenizer of transformers: called with a text it returns `input_ids`.
    vocab_size: the model's; by default `len(tokenizer)`.
    progress:   called with (files done, number of files) after every file.
    Raises ValueError for a missing file, before any work, and for a file that is not UTF-8, naming it.
    """
    files = [Path(path) for path in paths]
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        raise ValueError(f"no such text file: {', '.join(missing)}" if missing else "no text files given to fit on")

    def shards() -> Iterator[Tensor]:
        for done, path in enumerate(files, start=1):
            try:
                with path.open(encoding="utf-8") as file:
                    while lines := file.readlines(TEXT_CHUNK):
                        ids = tokenizer("".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
                        yield torch.tensor(ids, dtype=torch.int64, device="cpu")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text ({error}): convert it or leave it out") from None
            if progress is not None:
                progress(done, len(files))

    return fit_table(shards(), len(tokenizer) if vocab_size is None else vocab_size, successors, max_contexts)


def _check_vocab_size(vocab_size: int) -> int:
    number = whole(vocab_size)
    if number is None or not 1 <= number <= MAX_VOCAB:
        raise ValueError(f"vocab_size must be a whole number from 1 to {MAX_VOCAB}, got {vocab_size!r}")
    return number


def _check_tokens(tokens: Tensor, vocab_size: int) -> Tensor:
    """The tokens as int64 [T] or [S, T]. Raises ValueError for anything but token ids."""
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
