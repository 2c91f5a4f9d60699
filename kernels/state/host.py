"""State of a generation on the host: committed sequences, tree growth, n-gram guesses, verification.

The torch backend uses these classes, and tests compare the state on the device (device.py) with them. They are plain
Python: for a few dozen nodes it takes tens of microseconds, where small tensor operations would take milliseconds. Only
inputs of passes (`Batch`) and results of models are tensors.

The engine calls them in this order. `*` marks calls that are made once for every draft pass.

    Sequences(...)                        once, at the beginning of a generation
    Sequences.chunks, chunk               reading the prompts
    Growth.begin                          a step: start its trees
    * Growth.select, prefetch, batch      choose the slots of a draft pass, add guesses, make its inputs
    * Growth.record                       note what the draft proposed
    Growth.harvest -> Trees               keep the best candidates (plain decoding: Trees.roots)
    Trees.batch                           inputs of the target's pass
    Trees.verify_commit -> Moves          accept a path of each tree, append its tokens to the sequences
    Moves.target_rows, draft_rows         the KV rows of the accepted nodes
    Sequences.publish, finished           end of the step

Words. A *slot* is a row that the draft evaluates in this step: the catch-up token (unless the draft has read it), the
root, nodes chosen for their score, and guesses of draft². The *catch-up token* is the last token but one. An evaluated
slot proposes *candidates*, its likeliest children. The best candidates become the tree. A guess is *confirmed* when the
draft, in the same pass, proposes that token too. Other guesses never enter a tree: draft² saves passes and changes
nothing else.
"""

import heapq
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch

from stagedspec.kernels.common.inputs import NgramTable, TreeSettings
from stagedspec.kernels.state.invalid_logits import raise_invalid

NEVER = float("-inf")
CONTEXT_LOGPROB = -0.25  # log-probability of a match of the context n-gram: on code, about 4 of 5 are right
CHUNK = 256  # tokens of each prompt that one pass reads
TARGET, DRAFT, NGRAM = range(3)  # who first proposed a token
# In place of a chosen token: at a node that must not be accepted, and at one whose logits allow no choice.
UNCHOSEN, INVALID = -1, -2
# Factor of the draft's logits in greedy decoding. The target's best token is the draft's more often than the draft's
# probability says: measured on the embedded models, on held-out text, where 1.5 to 2 do equally well. In sampling,
# softmax(log q + g) needs no correction.
GREEDY_SHARPNESS = 1.7


def ngram_guesses(
    follower: dict[tuple[int, int], int], table: NgramTable | None, first: int, last: int
) -> list[tuple[int, float]]:
    """What draft² guesses after the tokens first, last: (token, log-probability), the context n-gram's guess first.

    follower: the latest token after every pair of tokens in the sequence. table: a `KatzTable` or None.
    """
    found = follower.get((first, last))
    guesses = [] if found is None else [(found, CONTEXT_LOGPROB)]
    if table is not None:
        guesses += [pair for pair in table.successors_of(first, last) if pair[0] != found]
    return guesses


# ---------------------------------------------------------------- committed sequences


@dataclass
class Row:
    """One sequence of the batch.

    limit: the length at which it ends; origins: who first proposed each new token; invalid: it ended because no next
    token can be chosen; caught_up: the draft has read all tokens but the last (else all but the last two); follower:
    the context n-gram, (a, b) -> the token after the latest occurrence of a, b.
    """

    tokens: list[int]
    limit: int
    origins: list[int] = field(default_factory=list)
    running: bool = True
    invalid: bool = False
    caught_up: bool = False
    follower: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = self.tokens
        self.follower.update(zip(pairwise(tokens), tokens[2:], strict=False))

    def append(self, token: int, origin: int) -> None:
        if len(self.tokens) > 1:
            self.follower[self.tokens[-2], self.tokens[-1]] = token
        self.tokens.append(token)
        self.origins.append(origin)


class Sequences:
    """The committed tokens of a batch, and when each row stops.

    prompts: token ids of each row; new_tokens: at most so many more; eos: ids that end a row; device: of the inputs of
    passes.
    """

    def __init__(self, prompts: list[list[int]], new_tokens: int, eos: Sequence[int], device: torch.device):
        self.rows = [Row(list(prompt), len(prompt) + new_tokens) for prompt in prompts]
        self.eos, self.device = frozenset(eos), device
        self.seconds_to_first_token: float | None = None  # from here to the end of the first step
        self._begin = time.perf_counter()
        self.accepted: Counter[int] = Counter()  # how many row-steps accepted so many tokens from nodes below the root
        self.steps = 0  # in which any row ran
        self.roots_only = False  # whether the next step must verify roots alone (`Trees.verify_commit`)
        self.capacity = max(row.limit for row in self.rows)  # the most tokens that a row may hold

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    @property
    def finished(self) -> bool:
        """Whether all rows have stopped, or one has no next token (`check`)."""
        return any(row.invalid for row in self.rows) or not any(row.running for row in self.rows)

    def check(self) -> None:
        """Raises InvalidLogitsError if a row ended because no next token can be chosen."""
        raise_invalid([(index, len(row.tokens)) for index, row in enumerate(self.rows) if row.invalid])

    def chunks(self, count: int) -> list[tuple[int, int]]:
        """(start, size) of the passes that read the first `count` tokens of every row."""
        return [(start, min(CHUNK, count - start)) for start in range(0, count, CHUNK)]

    def chunk(self, start: int, size: int, dtype: torch.dtype) -> "Batch":
        """The pass over `size` tokens of every row after its first `start`. Shorter rows are padded: no node attends to
        the padding, and later tokens overwrite it in the cache."""
        parts = [row.tokens[start : start + size] for row in self.rows]
        tokens = torch.tensor([part + [0] * (size - len(part)) for part in parts], device=self.device)
        return prefill_batch(tokens, start, dtype)

    def publish(self) -> None:
        """Called after every step. Only notes the time of the first: `finished` is always up to date here."""
        if self.seconds_to_first_token is None:
            self.seconds_to_first_token = time.perf_counter() - self._begin

    def stop(self, index: int, length: int) -> None:
        """Ends a row; what was decoded beyond `length` tokens is dropped."""
        row = self.rows[index]
        if (beyond := len(row.tokens) - length) > 0:
            del row.tokens[-beyond:], row.origins[-beyond:]
        row.running = row.invalid = False  # the token that could not be chosen lies beyond the end


# ---------------------------------------------------------------- one pass's inputs


@dataclass(frozen=True)
class Batch:
    """Inputs of one model pass: tokens, positions int64 [B, N]; depths [B][N]; bias, the mask of 0 and -inf,
    [B or 1, 1, N, R + L]: R tree rows, then L committed ones."""

    tokens: torch.Tensor
    positions: torch.Tensor
    depths: list[list[int]]
    bias: torch.Tensor


def prefill_batch(tokens: torch.Tensor, start: int, kv_dtype: torch.dtype) -> Batch:
    """The pass over a chunk of prompts, tokens [B, N], after `start` committed ones."""
    count, device = tokens.shape[1], tokens.device
    positions = torch.arange(start, start + count, device=device).expand(tokens.shape)
    return Batch(tokens, positions, [list(range(count))] * len(tokens), causal_bias(start, count, device, kv_dtype))


def causal_bias(start: int, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The mask of a chunk of `count` tokens after `start` committed ones: [1, 1, count, start + count]."""
    bias = torch.full((count, start + count), NEVER, device=device, dtype=dtype)
    return bias.triu_(start + 1)[None, None]


def _batch(
    rows: Sequence[Sequence["_Slot | Node"]],
    region: int,
    roots: list[int],
    prefixes: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """Makes a `Batch` of slots or nodes. region: the tree rows that masks have bits for; roots: for each row, the
    position of depth 0; prefixes: for each row, committed tokens that its nodes attend to."""
    # numpy takes a third of torch's time.
    tokens = [[max(node.token, 0) for node in row] for row in rows]
    depths = [[node.depth for node in row] for row in rows]
    masks = [[node.mask for node in row] for row in rows]
    positions = [[max(root + depth, 0) for depth in row] for root, row in zip(roots, depths, strict=True)]
    inputs = torch.from_numpy(np.array((tokens, positions))).to(device)
    span = max(max(prefixes), 0)
    bias = np.zeros((len(rows), 1, len(rows[0]), region + span), np.float64 if dtype == torch.float64 else np.float32)
    bias[:, 0, :, :region] = [
        [[0.0 if mask >> bit & 1 else NEVER for bit in range(region)] for mask in row] for row in masks
    ]
    if min(prefixes) < span:
        hidden = np.arange(span) >= np.array(prefixes)[:, None]
        np.copyto(bias[..., region:], NEVER, where=hidden[:, None, None])
    names, places = inputs.unbind(0)
    return Batch(names, places, depths, torch.from_numpy(bias).to(device, dtype))


@dataclass(frozen=True)
class Unread:
    """A draft pass over committed tokens that the draft has not read, in the first rows of its tree region.

    following: the token after each, int64 [B, n]; moves: (tree row, position) pairs of each row, none of one that has
    stopped.
    """

    batch: Batch
    following: torch.Tensor
    moves: list[list[tuple[int, int]]]

    @classmethod
    def before_last(cls, sequences: Sequences, count: int, region: int, dtype: torch.dtype) -> "Unread":
        """Reads the last `count` tokens but two of each sequence. Every step's first draft pass reads those two."""
        slots, following, moves = [], [], []
        for row in sequences.rows:
            start = len(row.tokens) - 2 - count  # below 0 for a short row, whose first slots are then unused
            dead, known = max(-start, 0), row.tokens[max(start, 0) :]
            tokens = [0] * dead + known
            masks = [1 << slot if slot < dead else (2 << slot) - (1 << dead) for slot in range(count)]
            slots.append([_Slot(tokens[slot], -1, slot - 1 - count, masks[slot], NEVER) for slot in range(count)])
            following.append(([0] * dead + known[1:])[:count])
            moves.append([(slot, start + slot) for slot in range(dead, count)] if row.running else [])
        lengths = sequences.lengths
        batch = _batch(
            slots,
            region,
            [length - 1 for length in lengths],
            [length - 2 - count for length in lengths],
            dtype,
            sequences.device,
        )
        return cls(batch, torch.tensor(following, device=sequences.device), moves)


# ---------------------------------------------------------------- growing trees


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
        return ngram_guesses(self.follower, self.table, above.previous, above.token)

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
    """What growth asks of the noise (`reference.Noise`)."""

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

    def select(self, number: int) -> list[list[tuple[float, int]]]:
        """Makes the slots of draft pass `number` from the best candidates; returns their (score, slot), a list a
        row."""
        if number == 0:
            return [[(0.0, 1)] for _ in self.rows]
        chosen = [row.select(self.config.width) for row in self.rows]
        return [[(row.slots[slot].score, slot) for slot in slots] for row, slots in zip(self.rows, chosen, strict=True)]

    def prefetch(self, parents: list[list[tuple[float, int]]]) -> None:
        """Adds the guesses of draft² below the slots `parents` (of `select`), level by level."""
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

    def batch(self) -> Batch:
        """Inputs of the draft pass over the slots added since the last one."""
        start, stop = self.start, len(self.rows[0].slots)
        lengths = self.sequences.lengths
        return _batch(
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
            tree = _Tree.root(row.slots[1].token, 1)
            for candidate in best:
                parent = row.slots[candidate.parent]
                above = 0 if parent.candidate is None else parent.candidate.node
                guessed = candidate.slot >= 0 and row.slots[candidate.slot].guess
                candidate.node = tree.add(candidate.token, above, candidate.slot, NGRAM if guessed else DRAFT)
            trees.append(tree)
        return Trees(self.sequences, trees, max(len(tree.nodes) for tree in trees), self.caught_up)


# ---------------------------------------------------------------- finished trees


class Node(NamedTuple):
    """A node of a finished tree. slot: where the draft evaluated it, -1 if it did not; origin: who proposed it; mask:
    one bit for each node on the path, its own included."""

    token: int
    parent: int
    depth: int
    slot: int
    origin: int
    mask: int


PADDING = Node(0, 0, 0, -1, TARGET, 1)


@dataclass
class _Tree:
    """The finished tree of one row, parents before children. children: (parent, token) -> node."""

    nodes: list[Node]
    children: dict[tuple[int, int], int]

    @classmethod
    def root(cls, token: int, slot: int = -1) -> "_Tree":
        return cls([Node(token, 0, 0, slot, TARGET, 1)], {})

    def add(self, token: int, parent: int, slot: int, origin: int) -> int:
        node, above = len(self.nodes), self.nodes[parent]
        self.nodes.append(Node(token, parent, above.depth + 1, slot, origin, above.mask | 1 << node))
        self.children[parent, token] = node
        return node

    @property
    def fields(self) -> list[list[int]]:
        """Tokens, parents, depths, slots and origins of the nodes, as the device keeps a tree."""
        return [list(values) for values in zip(*self.nodes, strict=True)][:5]


class Trees:
    """The trees of a batch, ready to be verified. nodes: of the largest; caught_up: they were grown without the
    catch-up token."""

    def __init__(self, sequences: Sequences, trees: list[_Tree], nodes: int, caught_up: bool = False):
        self.sequences, self.trees, self.nodes, self.caught_up = sequences, trees, nodes, caught_up

    @classmethod
    def roots(cls, sequences: Sequences) -> "Trees":
        """Trees of a root alone: plain decoding."""
        return cls(sequences, [_Tree.root(row.tokens[-1]) for row in sequences.rows], 1)

    @property
    def children(self) -> list[dict[tuple[int, int], int]]:
        """For each row, (parent node, token) -> node."""
        return [tree.children for tree in self.trees]

    @property
    def depths(self) -> list[int]:
        """For each row, the depth of its deepest node."""
        return [max(node.depth for node in tree.nodes) for tree in self.trees]

    def batch(self, dtype: torch.dtype) -> Batch:
        """Inputs of the target's pass over all nodes. Smaller trees are padded with nodes that no node attends to."""

        prefixes = [length - 1 for length in self.sequences.lengths]
        return _batch(
            [tree.nodes + [PADDING] * (self.nodes - len(tree.nodes)) for tree in self.trees],
            self.nodes,
            prefixes,
            prefixes,
            dtype,
            self.sequences.device,
        )

    @classmethod
    def lookup(cls, sequences: Sequences, depth: int) -> "Trees":
        """Chains of up to `depth` nodes by prompt look-up: the token after the latest earlier occurrence of the last
        two tokens, then the same for the last token and that one, and so on."""
        trees = []
        for row in sequences.rows:
            tree, node = _Tree.root(row.tokens[-1]), 0
            pair = cast("tuple[int, int]", tuple(row.tokens[-2:]))  # a single token finds nothing
            while (
                not sequences.roots_only and len(tree.nodes) <= depth and (token := row.follower.get(pair)) is not None
            ):
                node = tree.add(token, node, -1, NGRAM)
                pair = pair[1], token
            trees.append(tree)
        return cls(sequences, trees, max(len(tree.nodes) for tree in trees))

    def verify_commit(self, chosen: torch.Tensor) -> "Moves":
        """Accepts a path of each tree and appends the chosen tokens along it to the sequences.

        chosen: integers [B, N], the token chosen at each node, or UNCHOSEN or INVALID. The path starts at the root and
        goes on to the child that is the chosen token, while there is one; the token chosen at its last node is the
        bonus token. A row stops at an end-of-sequence token and at its limit.

        The path ends before an INVALID node. In a tree of several nodes the cause may be another node that this one
        does not attend to, because 0 * NaN is NaN. So the next step verifies roots alone, and there the row ends.
        """
        moves = Moves([], self.caught_up)
        self.sequences.steps += not self.sequences.finished
        self.sequences.roots_only = False
        for row, tree, picks in zip(self.sequences.rows, self.trees, chosen.tolist(), strict=True):
            length, ran, path, node = len(row.tokens), row.running, [], 0
            while node >= 0 and picks[node] >= 0:
                path.append(node)
                node = tree.children.get((node, picks[node]), -1)
            last = node  # not on the path; -1 if the tree has no such child
            origins = [tree.nodes[node].origin for node in path[1:]] + [TARGET]
            if not ran:
                path = []
            for node, origin in zip(path, origins, strict=False):
                row.append(picks[node], origin)
                if picks[node] in self.sequences.eos or len(row.tokens) == row.limit:
                    row.running = False
                    break
            if row.running and last >= 0 and picks[last] == INVALID:
                self.sequences.roots_only = self.nodes > 1
                row.invalid = not self.sequences.roots_only
                row.running = not row.invalid
            accepted = max(min(len(row.tokens) - length, len(path) - 1), 0) if ran else -1
            # A stopped row needs no more keys and values, and its path may reach past the end of the cache.
            steps = [PathStep(node, tree.nodes[node].slot) for node in path] if row.running else []
            moves.rows.append(RowMoves(accepted, length, steps))
            if path:
                row.caught_up = row.running and tree.nodes[path[-1]].slot >= 0
        self.sequences.accepted.update(count for count in moves.accepted if count >= 0)
        return moves


class PathStep(NamedTuple):
    """A node of an accepted path, and the draft's slot of it, -1 if it has none."""

    node: int
    slot: int


class RowMoves(NamedTuple):
    """What a step accepted in one row. accepted: tokens from nodes below the root, -1 for a row that had stopped;
    length: committed tokens before the step; path: root first, empty for a row that has stopped."""

    accepted: int
    length: int
    path: list[PathStep]


@dataclass
class Moves:
    """What a step accepted, and the KV rows to move. rows: of the batch; caught_up: as of `Trees`."""

    rows: list[RowMoves]
    caught_up: bool = False

    @property
    def accepted(self) -> list[int]:
        return [row.accepted for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.rows]

    def target_rows(self, first: int) -> list[list[tuple[int, int]]]:
        """(tree row, position) pairs of the accepted path in the target's cache. first: the tree row of node 0."""
        return [
            [(first + node, length - 1 + depth) for depth, (node, _) in enumerate(path)]
            for _, length, path in self.rows
        ]

    def draft_rows(self, first: int = 0) -> list[list[tuple[int, int]]]:
        """(tree row, position) pairs of the accepted nodes that the draft has evaluated, in its cache: all but perhaps
        the last of the path, which then is the next step's catch-up token. first: the tree row of slot 0."""
        return [
            [(first, length - 2)] * (length > 1 and bool(path) and not self.caught_up)
            + [(first + slot, length - 1 + depth) for depth, (_, slot) in enumerate(path) if slot >= 0]
            for _, length, path in self.rows
        ]
