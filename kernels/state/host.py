"""State of a generation on the host: committed sequences, tree growth, n-gram guesses, verification.

The torch backend uses these classes, and tests compare the state on the device (device.py) with them. They are plain
Python: for a few dozen nodes it takes tens of microseconds, where small tensor operations would take milliseconds. On a
CPU with Numba trees grow in compiled code (compiled/growth.py), which tests compare with host_growth.py. Only
inputs of passes (`Batch`) and results of models are tensors.

The engine calls them in this order. `*` marks calls that are made once for every draft pass.

    Sequences(...)                        once, at the beginning of a generation
    Sequences.chunks, chunk               reading the prompts
    Growth.begin                          a step: start its trees
    * Growth.batch                        choose the slots of a draft pass, add guesses, make its inputs
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

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch

from stagedspec.kernels.common.constants import CONTEXT_LOGPROB, INVALID, NGRAM, NO_TOKEN, TARGET
from stagedspec.kernels.common.inputs import NgramTable
from stagedspec.kernels.state.invalid_logits import raise_invalid

NEVER = float("-inf")
CHUNK = 256  # tokens of each prompt that one pass reads
# Factor of the draft's logits in greedy decoding. The target's best token is the draft's more often than the draft's
# probability says: measured on the embedded models, on held-out text, where 1.5 to 2 do equally well. In sampling,
# softmax(log q + g) needs no correction.
GREEDY_SHARPNESS = 1.7


def ngram_guesses(
    follower: dict[tuple[int, int], int], table: NgramTable | None, first: int, last: int
) -> list[tuple[int, float]]:
    """draft²'s guesses after the tokens first, last: (token, log-probability), the context n-gram's guess first.

    follower: the latest token after every pair of tokens in the sequence. table: a `KatzTable` or None.
    """
    found = follower.get((first, last))
    guesses = [] if found is None else [(found, CONTEXT_LOGPROB)]
    if table is not None:
        guesses += [pair for pair in table.successors_of(first, last) if pair[0] != found]
    return guesses


# ---------------------------------------------------------------- committed sequences


def limits_of(prompts: list[list[int]], new_tokens: int | Sequence[int]) -> list[int]:
    """The length at which each row ends. new_tokens: at most so many more than its prompt, one number or one a row."""
    counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    return [len(prompt) + count for prompt, count in zip(prompts, counts, strict=True)]


@dataclass
class Row:
    """One sequence of the batch.

    limit: the length at which it ends; origins: who first proposed each new token; invalid: it ended because no next
    token can be chosen; caught_up: the draft has read all tokens but the last (else all but the last two); follower:
    the context n-gram, (a, b) -> the token after the latest occurrence of a, b; accepted: how many steps accepted so
    many tokens from nodes below the root.
    """

    tokens: list[int]
    limit: int
    origins: list[int] = field(default_factory=list)
    running: bool = True
    invalid: bool = False
    caught_up: bool = False
    follower: dict[tuple[int, int], int] = field(default_factory=dict)
    accepted: Counter[int] = field(default_factory=Counter)

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

    prompts: token ids of each row; new_tokens: at most so many more, one number or one a row; eos: ids that end a row;
    device: of the inputs of passes.
    """

    def __init__(
        self, prompts: list[list[int]], new_tokens: int | Sequence[int], eos: Sequence[int], device: torch.device
    ):
        limits = limits_of(prompts, new_tokens)
        self.rows = [Row(list(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)]
        self.eos, self.device = frozenset(eos), device
        self.seconds_to_first_token: float | None = None  # from here to the end of the first step
        self._begin = time.perf_counter()
        self.steps = 0  # in which any row ran
        self.roots_only = False  # whether the next step must verify roots alone (`Trees.verify_commit`)
        self.capacity = max(row.limit for row in self.rows)  # the most tokens that a row may hold

    def replace(self, index: int, prompt: list[int], new_tokens: int) -> None:
        """Begins row `index` anew with another prompt, of which `capacity` tokens must be enough."""
        self.rows[index] = Row(list(prompt), len(prompt) + new_tokens)

    def remove(self, index: int) -> None:
        """Leaves row `index` out, between two steps. The last row takes its place; at least one must be left."""
        self.rows[index] = self.rows[-1]
        del self.rows[-1]

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    @property
    def accepted(self) -> list[Counter[int]]:
        """For each row, how many of its steps accepted so many tokens from nodes below the root."""
        return [row.accepted for row in self.rows]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def finished(self) -> bool:
        """Whether all rows have stopped, or one has no next token (`check`)."""
        return any(row.invalid for row in self.rows) or not any(row.running for row in self.rows)

    def check(self) -> None:
        """Raises InvalidLogitsError if a row ended because no next token can be chosen."""
        raise_invalid({index: len(row.tokens) for index, row in enumerate(self.rows) if row.invalid})

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


@dataclass
class Batch:
    """Inputs of one model pass over N nodes of each of B sequences.

    inputs: int64 [2, B, N], tokens and positions; depths: [B, N]. seen: bool [B or 1, N, R]: which of R rows of the
    cache each node attends to, beside all committed ones of its sequence, prefixes [B]. The R rows are those of a tree,
    which come before the committed ones in the cache, or, in a chunk of a prompt, its own, which come after them.
    dtype: of the keys and values; device: of tensors.
    """

    inputs: np.ndarray
    depths: np.ndarray
    seen: np.ndarray
    prefixes: list[int]
    dtype: torch.dtype
    device: torch.device
    chunk: bool = False

    @cached_property
    def tokens(self) -> torch.Tensor:
        """int64 [B, N]."""
        return torch.from_numpy(self.inputs[0]).to(self.device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [B, N]."""
        return torch.from_numpy(self.inputs[1]).to(self.device)

    @cached_property
    def bias(self) -> torch.Tensor:
        """The mask of 0 and -inf, [B or 1, 1, N, R + L] in the order of the cache, L the longest prefix."""
        span, sequences = max(max(self.prefixes), 0), len(self.seen)
        committed = np.arange(span) < np.array(self.prefixes[:sequences])[:, None]
        committed = np.broadcast_to(committed[:, None], (sequences, self.seen.shape[1], span))
        parts = [committed, self.seen] if self.chunk else [self.seen, committed]
        bias = np.where(np.concatenate(parts, -1), np.float32(0), np.float32(NEVER))
        return torch.from_numpy(bias[:, None]).to(self.device, self.dtype)


def prefill_batch(tokens: torch.Tensor, start: int, kv_dtype: torch.dtype) -> Batch:
    """The pass over a chunk of prompts, tokens [B, N], after `start` committed ones."""
    rows, count = tokens.shape
    depths = np.broadcast_to(np.arange(count), (rows, count))
    inputs, seen = np.stack((tokens.cpu().numpy(), depths + start)), np.tri(count, dtype=np.bool_)[None]
    return Batch(inputs, depths, seen, [start] * rows, kv_dtype, tokens.device, chunk=True)


class Placed(Protocol):
    """A node or slot of a pass. mask: one bit for each tree row that it attends to."""

    @property
    def token(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def mask(self) -> int: ...


def tree_batch(
    rows: Sequence[Sequence["Placed"]],
    region: int,
    roots: list[int],
    prefixes: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """Makes a `Batch` of slots or nodes. region: the tree rows that masks have bits for; roots: for each row, the
    position of depth 0; prefixes: for each row, committed tokens that its nodes attend to."""
    tokens = [[max(node.token, 0) for node in row] for row in rows]
    depths = [[node.depth for node in row] for row in rows]
    positions = [[max(root + depth, 0) for depth in row] for root, row in zip(roots, depths, strict=True)]
    inputs = np.array((tokens, positions, depths))
    size = -(-region // 8)
    masks = b"".join((node.mask & (1 << region) - 1).to_bytes(size, "little") for row in rows for node in row)
    bits = np.unpackbits(np.frombuffer(masks, np.uint8), bitorder="little").view(np.bool_)
    seen = bits.reshape(len(rows), -1, 8 * size)[..., :region]
    return Batch(inputs[:2], inputs[2], seen, prefixes, dtype, device)


@dataclass(frozen=True)
class Unread:
    """A draft pass over committed tokens that the draft has not read, in the first rows of its tree region.

    following: the token after each, int64 [B, n]; moves: (tree row, position) pairs of each row, none of one that has
    stopped.
    """

    batch: Batch
    following: torch.Tensor
    moves: list[list[tuple[int, int]]]
    write = first = 0  # tree rows

    @property
    def counted(self) -> torch.Tensor:
        """Which tokens are the row's own, bool [B, n]: rows with fewer begin with slots that stand for none."""
        first = [self.following.shape[1] - len(moves) for moves in self.moves]
        device = self.following.device
        slots = torch.arange(self.following.shape[1], device=device)
        return slots >= torch.tensor(first, device=device)[:, None]

    @classmethod
    def before_last(cls, sequences: Sequences, count: int, region: int, dtype: torch.dtype) -> "Unread":
        """Reads the last `count` tokens but two of each sequence. Every step's first draft pass reads those two."""
        slots, following, moves = [], [], []
        for row in sequences.rows:
            start = len(row.tokens) - 2 - count  # below 0 for a short row, whose first slots are then unused
            dead, known = max(-start, 0), row.tokens[max(start, 0) :]
            tokens = [0] * dead + known
            masks = [1 << slot if slot < dead else (2 << slot) - (1 << dead) for slot in range(count)]
            slots.append([Node(tokens[slot], 0, slot - 1 - count, slot, TARGET, masks[slot]) for slot in range(count)])
            following.append(([0] * dead + known[1:])[:count])
            moves.append([(slot, start + slot) for slot in range(dead, count)] if row.running else [])
        lengths = sequences.lengths
        batch = tree_batch(
            slots,
            region,
            [length - 1 for length in lengths],
            [length - 2 - count for length in lengths],
            dtype,
            sequences.device,
        )
        return cls(batch, torch.tensor(following, device=sequences.device), moves)


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
class Tree:
    """The finished tree of one row, parents before children. children: (parent, token) -> node."""

    nodes: list[Node]
    children: dict[tuple[int, int], int]

    @classmethod
    def root(cls, token: int, slot: int = -1) -> "Tree":
        return cls([Node(token, 0, 0, slot, TARGET, 1)], {})

    def add(self, token: int, parent: int, slot: int, origin: int) -> int:
        node, above = len(self.nodes), self.nodes[parent]
        self.nodes.append(Node(token, parent, above.depth + 1, slot, origin, above.mask | 1 << node))
        self.children[parent, token] = node
        return node

    @property
    def device_fields(self) -> list[list[int]]:
        """Tokens, parents, depths, slots and origins of the nodes, as the device keeps a tree."""
        rows = [(node.token, node.parent, node.depth, node.slot, node.origin) for node in self.nodes]
        return [list(values) for values in zip(*rows, strict=True)]


def lookup_chain(row: Row, depth: int) -> Tree:
    """A chain of up to `depth` nodes below the root by prompt look-up: the token after the latest earlier occurrence of
    the last two tokens, then the same for the last token and that one, and so on."""
    tree, node = Tree.root(row.tokens[-1]), 0
    pair = cast("tuple[int, int]", tuple(row.tokens[-2:]))  # a single token finds nothing
    while len(tree.nodes) <= depth and (token := row.follower.get(pair)) is not None:
        node = tree.add(token, node, -1, NGRAM)
        pair = pair[1], token
    return tree


class Trees:
    """The trees of a batch, ready to be verified. nodes: of the largest; caught_up: they were grown without the
    catch-up token."""

    def __init__(self, sequences: Sequences, trees: list[Tree], nodes: int, caught_up: bool = False):
        self.sequences, self.trees, self.nodes, self.caught_up = sequences, trees, nodes, caught_up

    @classmethod
    def roots(cls, sequences: Sequences) -> "Trees":
        """Trees of a root alone: plain decoding."""
        return cls(sequences, [Tree.root(row.tokens[-1]) for row in sequences.rows], 1)

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
        return tree_batch(
            [tree.nodes + [PADDING] * (self.nodes - len(tree.nodes)) for tree in self.trees],
            self.nodes,
            prefixes,
            prefixes,
            dtype,
            self.sequences.device,
        )

    @classmethod
    def lookup(cls, sequences: Sequences, depth: int) -> "Trees":
        """Chains of up to `depth` nodes by prompt look-up (`lookup_chain`)."""
        trees = [lookup_chain(row, 0 if sequences.roots_only else depth) for row in sequences.rows]
        return cls(sequences, trees, max(len(tree.nodes) for tree in trees))

    def verify_commit(self, chosen: torch.Tensor) -> "Moves":
        """Accepts a path of each tree and appends the chosen tokens along it to the sequences.

        chosen: integers [B, N], the token chosen at each node, or UNCHOSEN, INVALID or NO_TOKEN. The path starts at
        the root and goes on to the child that is the chosen token, while there is one; the token chosen at its last
        node is the bonus token. A row stops at an end-of-sequence token and at its limit.

        The path ends before an INVALID node. In a tree of several nodes the cause may be another node that this one
        does not attend to, because 0 * NaN is NaN. So the next step verifies roots alone, and there the row ends; at
        once where the path ends before a NO_TOKEN.
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
            if row.running and last >= 0 and picks[last] in (INVALID, NO_TOKEN):
                again = picks[last] == INVALID and self.nodes > 1
                self.sequences.roots_only |= again
                row.invalid, row.running = not again, again
            accepted = max(min(len(row.tokens) - length, len(path) - 1), 0) if ran else -1
            if ran:
                row.accepted[accepted] += 1
            # A stopped row needs no more keys and values, and its path may reach past the end of the cache.
            steps = [PathStep(node, tree.nodes[node].slot) for node in path] if row.running else []
            moves.rows.append(RowMoves(accepted, length, steps))
            if path:
                row.caught_up = row.running and tree.nodes[path[-1]].slot >= 0
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


class Report(NamedTuple):
    """What a step did in each row (`interface.Report`)."""

    accepted: list[int]
    depths: list[int]
    left: list[int]

    @classmethod
    def of(cls, trees: Trees, moves: "Moves") -> "Report":
        rows = zip(trees.sequences.rows, moves.lengths, strict=True)
        return cls(moves.accepted, trees.depths, [row.limit - length for row, length in rows])


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
