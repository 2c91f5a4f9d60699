"""Growth of token trees, compiled: as state/host_growth.py, which says what the words mean, in less time.

A draft that is small beside its host's work would wait for Python half of the time. All rows of a batch grow together;
what they share lies in arrays that are made once in a generation. Scores and ties are those of `host_growth`, so that
the trees are the same.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from stagedspec.kernels.common.constants import (
    CONTEXT_LOGPROB,
    DRAFT,
    HASH_MULTIPLIER,
    HASH_SHIFT,
    NGRAM,
    PROBES,
)
from stagedspec.kernels.common.inputs import NgramTable, TreeSettings
from stagedspec.kernels.compiled.build import compiled, entry, inlined
from stagedspec.kernels.reference.noise import Noise
from stagedspec.kernels.state.host import Batch, Row, Sequences, Tree, Trees

NEVER = float("-inf")
NONE = -1
CATCH_UP, ROOT = np.arange(2)  # the first two slots; as NumPy's, since Numba would compile functions for each literal


_SLOT = np.dtype(
    [(name, np.int64) for name in ("token", "previous", "depth", "parent", "evaluates", "count")]
    + [("score", np.float64), ("chance", np.float64), ("guess", np.int64)]
)
_CANDIDATE = np.dtype([("token", np.int64), ("slot", np.int64), ("node", np.int64), ("score", np.float64)])


class Slots(NamedTuple):
    """The slots of all rows, S each, and their candidates, C a slot, best first. A candidate's number is that of its
    slot times C, plus its rank. Records, because a function compiles longer for every array that it is given.

    each [B, S]: token, previous, depth; parent: the slot above; evaluates: the number of the candidate that a slot
    evaluates, or NONE; count: of its candidates; score; chance: how well the guesses below it begin; guess: 1 for one.
    candidates [B, S, C]: token, score; slot: that evaluates it; node: its number in the finished tree; each or NONE.
    seen: bool [B, S, S], the slots that each attends to; inputs: int64 [2, B, S], tokens and positions for the draft.
    text: int64 [B, most], the committed tokens; lengths, running: int64 [B].
    """

    each: np.ndarray
    candidates: np.ndarray
    seen: np.ndarray
    inputs: np.ndarray
    text: np.ndarray
    lengths: np.ndarray
    running: np.ndarray

    @classmethod
    def of(cls, rows: int, slots: int, children: int, most: int) -> "Slots":
        return cls(
            np.zeros((rows, slots), _SLOT), np.zeros((rows, slots, children), _CANDIDATE),
            np.zeros((rows, slots, slots), np.bool_), np.empty((2, rows, slots), np.int64),
            np.empty((rows, most), np.int64), np.zeros(rows, np.int64), np.zeros(rows, np.int64),
        )  # fmt: skip


class Successors(NamedTuple):
    """An n-gram table, `models.ngram.KatzTable`: its hash table keys [H] and rows [H], and the tokens and
    log-probabilities of its rows [.., r]. size: of its vocabulary, 0 for no table."""

    size: int
    keys: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def of(cls, table: NgramTable | None) -> "Successors":
        if table is None:
            none = np.empty(0, np.int32)
            return cls(0, np.empty(0, np.int64), none, np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))
        parts = (table.slots, table.rows, table.tokens, table.logprobs)
        return cls(table.vocab_size, *(part.cpu().contiguous().numpy() for part in parts))


class Ring(NamedTuple):
    """The noise of the next positions, `reference.Noise`: values fp32 [B, window, V], of which a step needs `reach`,
    and `past` positions are kept behind. Without noise there are no rows."""

    values: np.ndarray
    reach: int
    past: int

    @classmethod
    def of(cls, noise: Noise | None) -> "Ring":
        if noise is None:
            return cls(np.empty((0, 0, 0), np.float32), 0, 0)
        return cls(noise.host, noise.reach, noise.past)


@compiled
def _add(slots: Slots, b: int, index: int, token: int, parent: int, score: float) -> None:
    """Makes a slot below another one."""
    slot, above = slots.each[b, index], slots.each[b, parent]
    slot.token, slot.previous, slot.depth, slot.parent = token, above.token, above.depth + 1, parent
    slot.guess, slot.score, slot.chance = 0, score, score
    slot.evaluates, slot.count = NONE, 0
    for other in range(index):
        slots.seen[b, index, other] = slots.seen[b, parent, other]
    for other in range(index, slots.seen.shape[2]):
        slots.seen[b, index, other] = other == index
    slots.inputs[0, b, index] = max(token, 0)
    slots.inputs[1, b, index] = max(slots.lengths[b] - 1 + slot.depth, 0)


@entry
def _begin(slots: Slots, caught_up: bool) -> None:
    """Makes the first two slots of every row from its text."""
    for b in range(len(slots.lengths)):
        length = slots.lengths[b]
        previous = slots.text[b, length - 2] if length > 1 else -1
        slots.each[b, CATCH_UP].depth = -2
        for slot in range(2):
            token, score = (max(previous, 0), NEVER) if slot == CATCH_UP else (slots.text[b, length - 1], 0.0)
            _add(slots, b, slot, token, CATCH_UP, score)
        slots.each[b, CATCH_UP].previous, slots.each[b, ROOT].previous = -1, previous
        slots.seen[b, ROOT, CATCH_UP] = not caught_up and previous >= 0


@compiled
def _best_open(slots: Slots, b: int, count: int, deepest: int) -> tuple[int, int]:
    """The slot and rank of the best candidate of a row that no slot evaluates yet; NONE if there is none. count: of
    slots; deepest: of the tree."""
    most, slot, rank = NEVER, NONE, NONE
    for s in range(count):
        if slots.each[b, s].depth < deepest - 1:
            for c in range(slots.each[b, s].count):
                if slots.candidates[b, s, c].slot < 0:  # those that follow are no better
                    if slot < 0 or slots.candidates[b, s, c].score > most:
                        most, slot, rank = slots.candidates[b, s, c].score, s, c
                    break
    return slot, rank


@inlined
def _after(slots: Slots, b: int, first: int, last: int) -> int:
    """The token after the latest occurrence of two in the text, or NONE."""
    for at in range(slots.lengths[b] - 1, 1, -1):
        if slots.text[b, at - 1] == last and slots.text[b, at - 2] == first:
            return slots.text[b, at]
    return NONE


@inlined
def _row_of(table: Successors, first: int, last: int) -> int:
    """The table's row after two tokens, as `KatzTable.successors_of`."""
    key = first * table.size + last
    at = (key * HASH_MULTIPLIER >> HASH_SHIFT) & (len(table.keys) - 1)
    for probe in range(PROBES if first >= 0 else 0):
        place = (at + probe) & (len(table.keys) - 1)
        if table.keys[place] == key:
            return table.rows[place]
        if table.keys[place] < 0:
            break
    return last


@inlined
def _better(scores: np.ndarray, parents: np.ndarray, tokens: np.ndarray, one: int, other: int) -> bool:
    """The order of guesses: by score, then slot, then token."""
    if scores[one] != scores[other]:
        return scores[one] > scores[other]
    if parents[one] != parents[other]:
        return parents[one] > parents[other]
    return tokens[one] > tokens[other]


@entry
def _extend(
    slots: Slots, table: Successors, ring: Ring, first: int, count: int, selected: int, levels: int, width: int,
    deepest: int, context: bool,
) -> None:  # fmt: skip
    """Makes the slots of a pass of every row after its `count` slots: `selected` of the best open candidates, unused
    ones if there are too few; then `levels` times `width` guesses, first below slots `first` and later, then below the
    guesses."""
    each = 1 + table.tokens.shape[1]
    most = max(count + selected - first, width) * each
    scores, parents, tokens = np.empty(most, np.float64), np.empty(most, np.int64), np.empty(most, np.int64)
    for b in range(len(slots.lengths)):
        for index in range(count, count + selected):
            s, c = _best_open(slots, b, count, deepest)
            token, parent, score, evaluates = 0, CATCH_UP, NEVER, NONE
            if s >= 0:
                candidate = slots.candidates[b, s, c]
                candidate.slot = index
                token, parent, score = candidate.token, s, candidate.score
                evaluates = s * slots.candidates.shape[2] + c
            _add(slots, b, index, token, parent, score)
            slots.each[b, index].evaluates = evaluates
        index = count + selected
        begin, end = first, index
        for _ in range(levels):
            found = 0
            for s in range(begin, end):
                slot = slots.each[b, s]
                if slot.depth >= deepest - 1 or slot.token < 0:
                    continue  # its children would be leaves, which need no evaluation
                before = found
                follower = _after(slots, b, slot.previous, slot.token) if context else -1
                if follower >= 0:
                    scores[found], tokens[found] = slot.chance + CONTEXT_LOGPROB, follower
                    found += 1
                if table.size:
                    row = _row_of(table, slot.previous, slot.token)
                    for r in range(each - 1):
                        if table.tokens[row, r] != follower:
                            scores[found] = slot.chance + np.float64(table.logprobs[row, r])
                            tokens[found] = table.tokens[row, r]
                            found += 1
                parents[before:found] = s
                if len(ring.values):
                    past = min(max(slot.depth, -ring.past), ring.reach - 1)
                    place = (slots.lengths[b] + past) % ring.values.shape[1]
                    for option in range(before, found):
                        scores[option] += np.float64(ring.values[b, place, tokens[option]])
            begin = end = index
            for _ in range(width):
                token, parent, score = -1, CATCH_UP, NEVER  # unused: no candidate is -1
                if found:
                    best = 0
                    for option in range(1, found):
                        if _better(scores, parents, tokens, option, best):
                            best = option
                    token, parent, score = tokens[best], parents[best], scores[best]
                    found, end = found - 1, end + 1
                    scores[best], parents[best], tokens[best] = scores[found], parents[found], tokens[found]
                _add(slots, b, index, token, parent, NEVER)
                slots.each[b, index].guess, slots.each[b, index].chance = 1, score
                index += 1


@entry
def _record(
    slots: Slots, start: int, stop: int, tokens: np.ndarray, logprobs: np.ndarray, deepest: int, floor: float
) -> float:
    """Notes the candidates of slots start .. stop, tokens and log-probabilities [B, stop - start, C], and confirms
    guesses. In slot order: a guess comes after the slot above it. Returns the best open candidate's score of all rows
    that run."""
    best = NEVER
    for b in range(len(slots.lengths)):
        for index in range(start, stop):
            slot = slots.each[b, index]
            if slot.guess and slot.token >= 0:
                above = slot.parent
                for c in range(slots.each[b, above].count):
                    candidate = slots.candidates[b, above, c]
                    if candidate.token == slot.token and candidate.score > NEVER:
                        candidate.slot = index
                        slot.evaluates = above * slots.candidates.shape[2] + c
                        slot.score = candidate.score
            slot.count = 0
            if slot.score > NEVER and slot.depth < deepest:
                for c in range(tokens.shape[2]):
                    score = slot.score + np.float64(logprobs[b, index - start, c])
                    if score <= floor:  # so are all that follow, and everything below them
                        break
                    candidate = slots.candidates[b, index, c]
                    candidate.token, candidate.score, candidate.slot = tokens[b, index - start, c], score, NONE
                    slot.count += 1
        s, c = _best_open(slots, b, stop, deepest)
        if s >= 0 and slots.running[b]:
            best = max(best, slots.candidates[b, s, c].score)
    return best


@entry
def _harvest(slots: Slots, count: int, nodes: int, found: np.ndarray, sizes: np.ndarray) -> None:
    """The best candidates of the first `count` slots of every row, at most `nodes`: found [4, B, >= nodes], token,
    parent, slot and origin of each node below the root, and how many there are, sizes [B]."""
    children = slots.candidates.shape[2]
    for b in range(len(sizes)):
        for s in range(count):
            for c in range(slots.each[b, s].count):
                slots.candidates[b, s, c].node = NONE
        sizes[b] = 0
        for node in range(nodes):
            most, slot, rank = NEVER, NONE, NONE
            for s in range(count):
                for c in range(slots.each[b, s].count):
                    candidate = slots.candidates[b, s, c]
                    if candidate.node < 0:  # those that follow are no better
                        if slot < 0 or candidate.score > most:
                            most, slot, rank = candidate.score, s, c
                        break
            if slot < 0:
                break
            best, above = slots.candidates[b, slot, rank], slots.each[b, slot].evaluates
            best.node = node + 1
            found[0, b, node] = best.token
            found[1, b, node] = 0 if above < 0 else slots.candidates[b, above // children, above % children].node
            found[2, b, node] = best.slot
            found[3, b, node] = NGRAM if best.slot >= 0 and slots.each[b, best.slot].guess else DRAFT
            sizes[b] += 1


class Growth:
    """Grows the trees of a batch over draft passes, for one step after the other; arguments of `host_growth.Growth`."""

    def __init__(
        self,
        sequences: Sequences,
        config: TreeSettings,
        table: NgramTable | None,
        noise: Noise | None,
        dtype: torch.dtype,
    ):
        self.sequences, self.config, self.dtype = sequences, config, dtype
        self.floor, self._pass_floor = (math.log(f) if f else NEVER for f in (config.node_floor, config.pass_floor))
        rows = len(sequences.rows)
        self.slots = Slots.of(rows, config.slots, config.children, sequences.capacity)
        self._rows: list[Row | None] = [None] * rows  # whose text is in the arrays
        self.table, self.ring = Successors.of(table), Ring.of(noise)
        self._found, self._sizes = np.empty((4, rows, config.nodes - 1), np.int64), np.empty(rows, np.int64)
        self.begin()

    def begin(self) -> None:
        """Starts the trees of a step: slots of the catch-up token, unless no running row needs it, and the root."""
        slots = self.slots
        for b, row in enumerate(self.sequences.rows):
            known, length = int(slots.lengths[b]) if row is self._rows[b] else 0, len(row.tokens)
            if known < length:
                slots.text[b, known:length] = row.tokens[known:]
            slots.lengths[b], slots.running[b], self._rows[b] = length, row.running, row
        running = [row.caught_up for row in self.sequences.rows if row.running]
        self.caught_up = bool(running) and all(running)
        _begin(slots, self.caught_up)
        self.start, self._stop, self._open = int(self.caught_up), 2, NEVER

    def pays(self) -> bool:
        """Whether one more pass is worth its time: the best open candidate of a running row exceeds `pass_floor`."""
        return self._open > self._pass_floor

    def batch(self, number: int) -> Batch:
        """Makes the slots of draft pass `number`; returns its inputs."""
        config, known = self.config, self._stop
        first, selected = (known, config.width) if number else (ROOT, 0)
        levels, width = config.prefetch, config.prefetch_width
        _extend(self.slots, self.table, self.ring, first, known, selected, levels, width, config.depth, config.context)
        self._stop = known + selected + config.guesses
        slots, now = self.slots, slice(self.start, self._stop)
        prefixes = [length - 2 + self.caught_up for length in self.sequences.lengths]
        inputs, device = slots.inputs[:, :, now], self.sequences.device
        return Batch(inputs, slots.each["depth"][:, now], slots.seen[:, now], prefixes, self.dtype, device)

    def record(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Notes what the draft proposed: tokens, logprobs [B, slots of the pass, C], best first."""
        given = np.ascontiguousarray(tokens.numpy(), np.int64), np.ascontiguousarray(logprobs.numpy(), np.float32)
        self._open = _record(self.slots, self.start, self._stop, *given, self.config.depth, self.floor)
        self.start = self._stop

    def harvest(self) -> Trees:
        """The trees of the best candidates. Scores only fall along a path, so the best always form a tree."""
        sequences, found = self.sequences, self._found
        nodes = 0 if sequences.roots_only else self.config.nodes - 1
        _harvest(self.slots, self._stop, nodes, found, self._sizes)
        trees = []
        for b, row in enumerate(sequences.rows):
            tree = Tree.root(row.tokens[-1], int(ROOT))
            for token, parent, slot, origin in zip(*found[:, b, : self._sizes[b]].tolist(), strict=True):
                tree.add(token, parent, slot, origin)
            trees.append(tree)
        return Trees(sequences, trees, max(len(tree.nodes) for tree in trees), self.caught_up)


def try_out() -> None:
    """Grows a tree, which compiles the functions for the types of all growths."""
    smallest = SimpleNamespace(
        nodes=2, depth=2, passes=2, width=1, children=1, prefetch=1, prefetch_width=1, node_floor=0.0, pass_floor=0.0,
        context=True, guesses=1, slots=5,
    )  # fmt: skip
    growth = Growth(Sequences([[0]], 1, (), torch.device("cpu")), smallest, None, None, torch.float32)
    growth.batch(0)
    tokens, logprobs = np.zeros((1, 3, 1), np.int64), np.zeros((1, 3, 1), np.float32)
    growth.record(torch.from_numpy(tokens), torch.from_numpy(logprobs))
    growth.harvest()
