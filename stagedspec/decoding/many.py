"""Decodes many prompts in batches, longest first. Where the backend can, the next prompt takes the place of a row that
has ended, and at the end, when there is none, the row is left out; elsewhere a batch ends as a whole.

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
from stagedspec.kernels.state.invalid_logits import InvalidLogitsError
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
    """A completed prompt. tokens, origins: the new ones; stopped: by a token or a criterion, not by its limit. error:
    why it could not be completed, else None."""

    number: int
    prompt: Prompt
    tokens: list[int]
    origins: list[int]
    stopped: bool
    stats: Stats
    error: str | None = None

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

    def put_back(self, prompts: Sequence[Waiting]) -> None:
        """Makes prompts that were taken the next ones."""
        self._waiting.extendleft(reversed(prompts))


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
    again: Callable[[Waiting], Waiting],
) -> Iterator[Ended]:
    """Completes prompts, `batch` at a time, and yields them as they end.

    windows: prompts to sort together, whose requests differ in their rows alone. replaces: the backend's
    `replaces_rows`. start: makes a generation; keep: takes one that has ended. again: reads a prompt once more.

    A row for which no next token can be chosen ends the generation: it is yielded with its error, and the rows that it
    took with it begin anew.
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
        try:
            for _ in run.steps():
                if looks:
                    ended = _ended(run, rows)
                    if refills:
                        _refill(run, rows, [index for index, _ in ended], queue)
                    yield from (one for _, one in ended)
            yield from (one for _, one in _ended(run, rows))
            keep(run)
        except InvalidLogitsError as error:
            yield from _failed(run, rows, error)
            yield from (one for _, one in _ended(run, rows))
            queue.put_back([again(one) for one in rows if one is not None])


def _ended(run: Generation, rows: list[Waiting | None]) -> Sequence[tuple[int, Ended]]:
    """Rows that have ended, with their places in the batch, which become free. Raises InvalidLogitsError, and then
    leaves all as they are, if one has no next token."""
    sequences = run.sequences
    known = list(sequences.rows)
    for index, one in enumerate(rows):
        if one is not None and one.call.callbacks is not None:
            view = _OneRow(sequences, index, known[index])
            one.call.callbacks.notify(cast(Sequences, view), [len(one.row.prompt)])
            known[index] = view.rows[0]
    places = [index for index, one in enumerate(rows) if one is not None and not known[index].running]
    if places:
        sequences.check()
    found: list[tuple[int, Ended]] = []
    for index in places:
        found.append((index, Ended.of(cast(Waiting, rows[index]), known[index], run.stats(index))))
        rows[index] = None
    return found


def _refill(run: Generation, rows: list[Waiting | None], places: list[int], queue: _Queue) -> None:
    """Gives the places of rows that have ended to the next prompts. A place for which there is none is left out, so
    that no pass computes it any more: the last row then takes it."""
    for index in reversed(places):
        if (one := queue.take(run.sequences.capacity)) is not None:
            run.replace(index, one.row)
            rows[index] = one
        elif len(rows) > 1:
            run.remove(index)
            rows[index] = rows[-1]
            del rows[-1]


def _failed(run: Generation, rows: list[Waiting | None], error: InvalidLogitsError) -> Iterator[Ended]:
    """The rows that have no next token. They end, and their places become free."""
    for index, position in error.positions.items():
        run.sequences.stop(index, position)
        one = rows[index]
        if one is not None:
            rows[index] = None
            yield Ended(one.number, one.prompt, [], [], False, Stats(""), error.reason(position))
