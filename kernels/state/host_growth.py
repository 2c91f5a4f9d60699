"""Growth of token trees on the host, for the torch backend and as the reference of grow_tree/ (words as in host.py)."""

import heapq
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from stagedspec.kernels.common.constants import DRAFT, NGRAM
from stagedspec.kernels.common.inputs import NgramTable, TreeSettings
from stagedspec.kernels.state.host import (
    NEVER,
    Batch,
    Row,
    Sequences,
    Tree,
    Trees,
    ngram_guesses,
    tree_batch,
)


@dataclass
class _Slot:
    """A row that the draft evaluates. score: the draft's log-probability of its path, -inf for a guess that is not
    confirmed; mask: one bit for each slot that it attends to; parent: the slot above a guess; candidates: what it
    proposed."""

    token: int
    previous: int
    depth: int
    mask: int
    score: float
    guess: bool = False
    parent: int = -1
    candidate: "_Candidate | None" = None
    candidates: "list[_Candidate]" = field(default_factory=list)


@dataclass(slots=True)
class _Candidate:
    """A possible node of the tree. parent: the slot that proposed it; slot: the slot that evaluates it, -1 for none;
    node: its number in the finished tree, -1 if it is not in it."""

    token: int
    score: float
    parent: int
    slot: int = -1
    node: int = -1


def _log(floor: float) -> float:
    return math.log(floor) if floor else NEVER


class _RowGrowth:
    """Growth of one row's tree. `open`: a heap of candidates that may still be evaluated, best first."""

    def __init__(self, row: Row, config: TreeSettings, table: NgramTable | None, caught_up: bool):
        tokens = row.tokens
        self.config, self.table, self.follower = config, table, row.follower
        self.floor = _log(config.node_floor)
        previous = tokens[-2] if len(tokens) > 1 else -1
        self.slots = [
            _Slot(max(previous, 0), -1, -1, 1, NEVER),
            _Slot(tokens[-1], previous, 0, 0b10 if caught_up or previous < 0 else 0b11, 0.0),
        ]
        self.open: list[tuple[float, int, int, _Candidate]] = []

    def _add(self, token: int, parent: int, score: float, **more: Any) -> int:
        above, index = self.slots[parent], len(self.slots)
        mask = above.mask | 1 << index
        self.slots.append(_Slot(token, above.token, above.depth + 1, mask, score, parent=parent, **more))
        return index

    @property
    def best(self) -> float:
        """Score of the best candidate that no slot evaluates yet; -inf if there is none."""
        while self.open and self.open[0][-1].slot >= 0:
            heapq.heappop(self.open)
        return -self.open[0][0] if self.open else NEVER

    def select(self, width: int) -> list[int]:
        """Makes slots of the best `width` candidates that have none; unused slots if there are too few."""
        chosen: list[int] = []
        while self.open and len(chosen) < width:
            candidate = heapq.heappop(self.open)[-1]
            if candidate.slot < 0:
                candidate.slot = self._add(candidate.token, candidate.parent, candidate.score, candidate=candidate)
                chosen.append(candidate.slot)
        while len(chosen) < width:
            chosen.append(self._add(0, 0, NEVER))
        return chosen

    def successors(self, slot: int) -> list[tuple[int, float]]:
        """Guesses of draft² for the token after a slot: (token, log-probability)."""
        above = self.slots[slot]
        if above.depth >= self.config.depth - 1 or above.token < 0:
            return []  # its children would be leaves, which need no evaluation
        follower = self.follower if self.config.context else {}
        return ngram_guesses(follower, self.table, above.previous, above.token)

    def guess(self, options: list[tuple[float, int, int]]) -> list[tuple[float, int]]:
        """Makes slots of the best `prefetch_width` of options (score, parent slot, token); returns (score, slot)."""
        best = heapq.nlargest(self.config.prefetch_width, options)
        placed = [(score, self._add(token, parent, NEVER, guess=True)) for score, parent, token in best]
        for _ in range(self.config.prefetch_width - len(best)):
            self._add(-1, 0, NEVER, guess=True)  # unused: no candidate is -1, so it is never confirmed
        return placed

    def record(self, start: int, tokens: list[list[int]], logprobs: list[list[float]]) -> None:
        """Notes the candidates of the slots from `start` on, and confirms guesses. In slot order: a guess comes after
        the slot above it."""
        for index, (names, values) in enumerate(zip(tokens, logprobs, strict=True), start):
            slot = self.slots[index]
            if slot.guess and slot.token >= 0:
                for candidate in self.slots[slot.parent].candidates:
                    if candidate.token == slot.token and candidate.score > NEVER:
                        candidate.slot, slot.candidate, slot.score = index, candidate, candidate.score
            alive = slot.score > NEVER and slot.depth < self.config.depth
            if alive:
                for name, value in zip(names, values, strict=True):
                    score = slot.score + value
                    if score <= self.floor:  # so are all that follow, and everything below them
                        break
                    slot.candidates.append(_Candidate(name, score, index))
                if slot.depth < self.config.depth - 1:
                    for rank, candidate in enumerate(slot.candidates):
                        heapq.heappush(self.open, (-candidate.score, index, rank, candidate))


class TokenNoise(Protocol):
    """The part of `reference.Noise` that growth uses."""

    def of(self, row: int, depths: list[int], tokens: list[int]) -> list[float]:
        """The noise of single tokens below nodes of one row."""


class Growth:
    """Grows the trees of a batch over draft passes, for one step after the other.

    config: `TreeConfig`; table: n-grams, an object with `successors_of(a, b)`, or None; noise: `reference.Noise`, or
    None when greedy; dtype: of the draft's keys and values. start: the first slot of the pass under way.
    """

    def __init__(
        self,
        sequences: Sequences,
        config: TreeSettings,
        table: NgramTable | None,
        noise: TokenNoise | None,
        dtype: torch.dtype,
    ):
        self.sequences, self.config, self.table = sequences, config, table
        self.noise, self.dtype = noise, dtype
        self.begin()

    def begin(self) -> None:
        """Starts the trees of a step: slots of the catch-up token, unless no running row needs it, and the root."""
        running = [row.caught_up for row in self.sequences.rows if row.running]
        self.caught_up = bool(running) and all(running)
        self.rows = [_RowGrowth(row, self.config, self.table, self.caught_up) for row in self.sequences.rows]
        self.start = int(self.caught_up)

    def pays(self) -> bool:
        """Whether one more pass is worth its time: the best open candidate of a running row exceeds `pass_floor`."""
        floor = _log(self.config.pass_floor)
        return any(row.best > floor for row, known in zip(self.rows, self.sequences.rows, strict=True) if known.running)

    def _select(self, number: int) -> list[list[tuple[float, int]]]:
        """Makes the slots of draft pass `number` from the best candidates; returns their (score, slot), a list a
        row."""
        if number == 0:
            return [[(0.0, 1)] for _ in self.rows]
        chosen = [row.select(self.config.width) for row in self.rows]
        return [[(row.slots[slot].score, slot) for slot in slots] for row, slots in zip(self.rows, chosen, strict=True)]

    def _guess(self, parents: list[list[tuple[float, int]]]) -> None:
        """Adds the guesses of draft² below the slots `parents` (of `_select`), level by level."""
        for _ in range(self.config.prefetch):
            options = [
                [(score + gain, slot, token) for score, slot in known for token, gain in row.successors(slot)]
                for row, known in zip(self.rows, parents, strict=True)
            ]
            if self.noise is not None:
                for index, (row, found) in enumerate(zip(self.rows, options, strict=True)):
                    if found:
                        depths = [row.slots[slot].depth for _, slot, _ in found]
                        gains = self.noise.of(index, depths, [token for _, _, token in found])
                        options[index] = [
                            (s + g, slot, token) for (s, slot, token), g in zip(found, gains, strict=True)
                        ]
            parents = [row.guess(found) for row, found in zip(self.rows, options, strict=True)]

    def batch(self, number: int) -> Batch:
        """Makes the slots of draft pass `number`; returns its inputs."""
        self._guess(self._select(number))
        start, stop = self.start, len(self.rows[0].slots)
        lengths = self.sequences.lengths
        return tree_batch(
            [row.slots[start:stop] for row in self.rows],
            self.config.slots,
            [length - 1 for length in lengths],
            [length - 2 + self.caught_up for length in lengths],
            self.dtype,
            self.sequences.device,
        )

    def record(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Notes what the draft proposed: tokens, logprobs [B, slots of the pass, C], best first."""
        for row, names, values in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.record(self.start, names, values)
        self.start = len(self.rows[0].slots)

    def harvest(self) -> "Trees":
        """The trees of the best candidates. Scores only fall along a path, so the best always form a tree."""
        nodes = 1 if self.sequences.roots_only else self.config.nodes
        trees = []
        for row in self.rows:
            found = [candidate for slot in row.slots for candidate in slot.candidates]
            best = heapq.nlargest(nodes - 1, found, key=lambda candidate: candidate.score)
            tree = Tree.root(row.slots[1].token, 1)
            for candidate in best:
                parent = row.slots[candidate.parent]
                above = 0 if parent.candidate is None else parent.candidate.node
                guessed = candidate.slot >= 0 and row.slots[candidate.slot].guess
                candidate.node = tree.add(candidate.token, above, candidate.slot, NGRAM if guessed else DRAFT)
            trees.append(tree)
        return Trees(self.sequences, trees, max(len(tree.nodes) for tree in trees), self.caught_up)
