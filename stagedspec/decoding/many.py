"""Decodes many prompts in batches, longest first. Where the backend can, the next prompt takes the place of a row that
has ended; elsewhere a batch ends as a whole.

Every prompt is read as a call of its own, and its row has that call's seed, limit and criteria. So a row's tokens are
those that it has alone.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch

from stagedspec.decoding.callbacks import Callbacks
from stagedspec.decoding.generation import Generation
from stagedspec.decoding.request import Call, Request, RequestRow
from stagedspec.decoding.sampling import counters, row_seed
from stagedspec.decoding.stats import Stats
from stagedspec.kernels.backends.interface import Row, Sequences
from stagedspec.values import plain


@dataclass(frozen=True)
class Prompt:
    """One sample of a prompt. given: text or token ids; index: of the prompt; seed: of its noise, None when greedy."""

    given: str | torch.Tensor
    index: int = 0
    sample: int = 0
    seed: int | None = None

    @property
    def names(self) -> tuple[int, int, int | None]:
        """What a completion tells of it."""
        return self.index, self.sample, self.seed


class Waiting(NamedTuple):
    """A prompt that was read, as a call of one row. number: by which the caller tells it from others."""

    prompt: Prompt
    call: Call
    number: int = 0

    @property
    def row(self) -> RequestRow:
        return self.call.request.rows[0]

    @property
    def chooses(self) -> bool:
        """Whether logits processors choose its tokens, which cannot share a step with others."""
        return self.call.callbacks is not None and self.call.callbacks.chooses


class Ended(NamedTuple):
    """A completed prompt. tokens, origins: the new ones; stopped: by a token or a criterion, not by its limit."""

    number: int
    prompt: Prompt
    tokens: list[int]
    origins: list[int]
    stopped: bool
    stats: Stats

    @classmethod
    def of(cls, one: Waiting, row: Row, stats: Stats) -> "Ended":
        callbacks = one.call.callbacks
        stopped = row.tokens[-1] in one.call.request.eos or (callbacks is not None and not callbacks.unfinished[0])
        return cls(one.number, one.prompt, row.tokens[len(one.row.prompt) :], row.origins, stopped, stats)


def seeds(
    seed: int | Sequence[int] | torch.Tensor | None, num_samples: int, do_sample: bool
) -> Callable[[int, int], int | None]:
    """The function that gives a sample of a prompt its seed, from their indices. seed: of `Decoder.complete_many`.

    Raises ValueError for a seed that is not one integer of 64 bits, or a list of them, one a prompt.
    """
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if do_sample else 0
    given = plain(seed)
    several = isinstance(given, Sequence) and not isinstance(given, str)
    known, _ = counters(given, len(given) if several else 1)
    if several and num_samples > 1:
        raise ValueError(f"seed must be one integer where num_samples is {num_samples}, got one a prompt")

    def of(index: int, sample: int) -> int:
        if several and index >= len(known):
            raise ValueError(f"seed must be one integer or one a prompt, got {len(known)} for more prompts")
        return known[index] if several else row_seed(known[0], index, sample)

    return of if do_sample else lambda index, sample: None


class _Queue:
    """Prompts in the order in which they are decoded: window by window, the longest of each first.

    Prompts of one batch then have similar lengths, and whatever follows fits into the place of what went before.
    """

    def __init__(self, windows: Iterator[list[Waiting]]):
        self._windows, self._waiting = windows, deque[Waiting]()

    @property
    def head(self) -> Waiting | None:
        """The next prompt; None if there is none."""
        while not self._waiting:
            window = next(self._windows, None)
            if window is None:
                return None
            self._waiting.extend(sorted(window, key=lambda one: (-one.row.limit, -len(one.row.prompt))))
        return self._waiting[0]

    def take(self, room: int | None = None) -> Waiting | None:
        """Removes and returns the next prompt; None if there is none, or if it needs more than `room` tokens."""
        head = self.head
        if head is None or (room is not None and head.row.limit > room):
            return None
        return self._waiting.popleft()


class _OneRow:
    """One row of a batch as a batch of its own, for `Callbacks.notify`."""

    def __init__(self, sequences: Sequences, index: int, row: Row):
        self._sequences, self._index, self.rows = sequences, index, [row]

    def stop(self, _: int, length: int) -> None:
        self._sequences.stop(self._index, length)
        self.rows = [self._sequences.rows[self._index]]


def decode(
    windows: Iterator[list[Waiting]],
    batch: int,
    replaces: bool,
    start: Callable[[Request, Callbacks | None], Generation],
    keep: Callable[[Generation], None],
) -> Iterator[Ended]:
    """Completes prompts, `batch` at a time, and yields them as they end.

    windows: prompts to sort together, whose requests differ in their rows alone. replaces: the backend's
    `replaces_rows`. start: makes a generation; keep: takes one that has ended.

    Raises InvalidLogitsError where no next token of a row can be chosen.
    """
    queue = _Queue(windows)
    while (first := queue.take()) is not None:
        rows: list[Waiting | None] = [first]
        while len(rows) < batch and not first.chooses and (one := queue.take()) is not None:
            rows.append(one)
        request = replace(first.call.request, rows=[one.row for one in rows if one is not None])
        run = start(request, first.call.callbacks if first.chooses else None)
        refills = replaces and len(rows) > 1
        # A look at the rows waits for a device: not after every step, unless something depends on it.
        looks = refills or first.call.callbacks is not None
        for _ in run.steps():
            if looks:
                ended = _ended(run, rows)
                for index in (found[0] for found in ended) if refills else ():
                    if (one := queue.take(run.sequences.capacity)) is not None:
                        run.replace(index, one.row)
                        rows[index] = one
                yield from (one for _, one in ended)
        yield from (one for _, one in _ended(run, rows))
        keep(run)


def _ended(run: Generation, rows: list[Waiting | None]) -> Sequence[tuple[int, Ended]]:
    """Rows that have ended, with their places in the batch, which become free."""
    found: list[tuple[int, Ended]] = []
    sequences = run.sequences
    for index, (one, row) in enumerate(zip(rows, sequences.rows, strict=True)):
        if one is None:
            continue
        if one.call.callbacks is not None:
            view = _OneRow(sequences, index, row)
            one.call.callbacks.notify(cast(Sequences, view), [len(one.row.prompt)])
            row = view.rows[0]
        if not row.running:
            if not found:
                sequences.check()
            found.append((index, Ended.of(one, row, run.stats(index))))
            rows[index] = None
    return found
