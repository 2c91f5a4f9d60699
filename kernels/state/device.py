"""The control half of a decoding step on the device: the classes of control.py over static tensors.

Everything is allocated by the first step, and `Sequences.restart` uses it for another generation. A step only launches
kernels: `Growth.batch` and `Growth.harvest` one each (what `select`, `prefetch` and `record` ask for is done there),
`Trees.verify_commit` one. Nothing is read back, so a step can be captured; only where the host has a part in it,
choosing along the walk (`Trees.children`) or proposing (`Trees.lookup`), it waits for the device. One thing differs
from the host: `TreeConfig.pass_floor` cannot be honoured, every pass runs.
Scores are summed in fp32, where the host sums in fp64: candidates closer than fp32's rounding can change places, which
never changes the output.
"""

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from stagedspec.kernels import grow_tree
from stagedspec.kernels.common.registry import check_runs
from stagedspec.kernels.grow_tree import GrowthState, pass_size, pass_start, words
from stagedspec.kernels.state import host as control
from stagedspec.kernels.state.invalid_logits import raise_invalid
from stagedspec.kernels.verify_commit import CommitState, verify_commit

# ---------------------------------------------------------------- committed sequences


TOKENS, ENDS = 128, 8  # sequences have room for a multiple of so many tokens, and of ids that end them
# Sizes of chunks of a prompt, in tokens of all rows: each has its CUDA graph. A pass costs as much as CHUNK_COST more
# tokens would.
CHUNKS, CHUNK_COST = (16, 32, 64, 128, 256, 512, 1024), 80


def _whole(count: int, unit: int) -> int:
    """The least multiple of `unit`, one at least, that is not below `count`."""
    return max(-(-count // unit), 1) * unit


def cheapest(count: int, sizes: Sequence[int], room: int) -> list[int]:
    """The cheapest chunks that cover `count` tokens of a prompt and at most `room`, largest first. sizes: to choose
    from; they and the room are multiples of the first."""
    return min(_cheapest(tuple(sizes), room)[-(-count // sizes[0]) :])[1]


@cache
def _cheapest(sizes: tuple[int, ...], room: int) -> list[tuple[int, list[int]]]:
    """For each multiple of the first size, the room the last: the cost and the sizes of its cheapest chunks."""
    best: list[tuple[int, list[int]]] = [(0, [])]
    for total in range(sizes[0], room + 1, sizes[0]):
        before = [(size, *best[(total - size) // sizes[0]]) for size in sizes if size <= total]
        best.append(
            min((cost + size + CHUNK_COST, sorted([*taken, size], reverse=True)) for size, cost, taken in before)
        )
    return best


class Row(NamedTuple):
    """A snapshot of one sequence: all its tokens, the origins of the new ones, the length at which it ends."""

    tokens: list[int]
    origins: list[int]
    limit: int
    running: bool


class Sequences:
    """The committed tokens of a batch, and when each row stops; lives on the device.

    prompts: one list of ids a row; new_tokens: at most so many more; eos: ids that end a row. capacity: the most tokens
    that a row may hold, in this generation or another one. most: tokens that a row may gain in one step.

    Raises ValueError for an empty prompt or no new tokens, and where no kernel can run on the device.
    """

    def __init__(
        self, prompts: list[list[int]], new_tokens: int, eos: Sequence[int], device: torch.device, most: int = 1
    ):
        if not prompts or not all(prompts):
            raise ValueError(f"every prompt needs at least one token, got {[len(prompt) for prompt in prompts]}")
        if new_tokens < 1:
            raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
        rows, self.most = len(prompts), most
        self.device, self.capacity = device, _whole(max(map(len, prompts)) + new_tokens, TOKENS)
        check_runs(torch.empty(0, device=device), "Sequences")

        # One block of memory: a generation begins with one copy to the device, and is read with one.
        sizes = {
            "tokens": rows * self.capacity, "eos": _whole(len(set(eos)), ENDS), "limits": rows,
            "lengths": rows, "running": rows, "active": 1,
        }  # fmt: skip
        places, total = {}, 0
        for name, size in sizes.items():
            places[name] = slice(total, total + size)
            total += _whole(size, 4)  # where kernels' loads begin is the same for every number of rows
        self._places, self._block = places, torch.zeros(total, dtype=torch.int32, device=device)
        self._progress = slice(places["lengths"].start, total)
        state = self._fields(self._block)
        self.state = CommitState(origins=torch.zeros(rows, self.capacity, dtype=torch.int8, device=device), **state)
        self._counts: list[torch.Tensor] = []  # of every `Trees` made for this batch
        self._chunks: dict[int, Batch] = {}  # by size
        self._roots: Trees | None = None
        self._chains: Trees | None = None
        # What goes to the device, and the progress that comes back after each step, lie in pinned memory.
        pinned = device.type == "cuda"
        self._initial = torch.zeros(total, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._known = [torch.zeros(total, dtype=torch.int32, device="cpu", pin_memory=pinned) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if pinned else []
        self._sent = torch.cuda.Event() if pinned else None
        self._first_token = Stopwatch(device)
        self.restart(prompts, new_tokens, eos)

    def _fields(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of `CommitState` that lie in a block, by name."""
        fields = {name: block[place] for name, place in self._places.items()}
        return fields | {"tokens": fields["tokens"].view(-1, self.capacity)}

    def fits(self, prompts: list[list[int]], new_tokens: int, eos: Sequence[int]) -> bool:
        """Whether there is room for another generation of these arguments."""
        room = max(map(len, prompts)) + new_tokens <= self.capacity and len(set(eos)) <= len(self.state.eos)
        return room and len(prompts) == len(self)

    @torch.inference_mode()
    def restart(self, prompts: list[list[int]], new_tokens: int, eos: Sequence[int]) -> None:
        """Begins a generation, in place: what was captured over the last one's tensors serves this one."""
        self._first_token.start()
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.limits = [length + new_tokens for length in self.prompt_lengths]
        self._lengths, self._gained = self.prompt_lengths, 1
        if self._sent is not None:
            self._sent.synchronize()  # the last generation's copy has read what is overwritten here
        initial = self._fields(self._initial.zero_())
        for row, prompt in zip(initial["tokens"], prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, dtype=torch.int32, device="cpu")
        ends = sorted(set(eos))
        initial["eos"].fill_(-1)[: len(ends)] = torch.tensor(ends, dtype=torch.int32, device="cpu")
        initial["limits"].copy_(torch.tensor(self.limits, device="cpu"))
        initial["lengths"].copy_(torch.tensor(self.prompt_lengths, device="cpu"))
        initial["running"].fill_(1)
        initial["active"].fill_(len(prompts))
        self._block.copy_(self._initial, non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self.device))
        for counts in self._counts:
            counts.zero_()
        self._published = 0

    def __len__(self) -> int:
        return len(self.state.lengths)

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [B], on the device."""
        return self.state.lengths

    @torch.inference_mode()
    def stop(self, index: int, length: int) -> None:
        """Ends a row; what was decoded beyond `length` tokens is dropped."""
        self.state.active.sub_(self.state.running[index].clamp(min=0))
        self.state.running[index] = 0
        self.state.lengths[index].clamp_(max=length)

    # ------------------------------------------------------------ reading prompts

    @property
    def chunk_sizes(self) -> list[int]:
        """All sizes that chunks of these rows may have."""
        return [size for size in CHUNKS if size * len(self) <= CHUNKS[-1] and size <= self.capacity]

    def chunks(self, count: int) -> list[tuple[int, int]]:
        """(start, size) of the passes that read the first `count` tokens of every row. The last one may reach beyond
        them: what it reads there is never seen, and overwritten in time."""
        sizes = cheapest(count, self.chunk_sizes, self.capacity)
        return list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))

    def chunk(self, start: int, size: int, dtype: torch.dtype | None = None) -> "Batch":
        """The pass over `size` tokens of every row after its first `start`; its tensors are those of all chunks of that
        size, and hold until the next one."""
        if size not in self._chunks:
            self._chunks[size] = Batch.chain(len(self), size, self.device)
        batch = self._chunks[size]
        batch.tokens.copy_(self.state.tokens[:, start : start + size])
        batch.begin(start)
        return batch

    # ------------------------------------------------------------ what the host sees

    def _told(self, turn: int) -> dict[str, torch.Tensor]:
        """What the host was told after a step: all lengths, which rows run and how many."""
        return self._fields(self._known[turn % 2])

    def publish(self) -> None:
        """Starts copying the rows' progress to the host; outside a captured step, after it was launched."""
        if not self._published:
            self._first_token.stop()
        turn = self._published % 2
        self._known[turn][self._progress].copy_(self._block[self._progress], non_blocking=True)
        if self._copied:
            self._copied[turn].record()
        self._published += 1

    @property
    def finished(self) -> bool:
        """Whether all rows have stopped, or one cannot go on (`check`), as far as the host knows.

        The host is at most one step ahead: it waits for the step before the last one. For the last one it waits where
        every row would end in it by writing as many tokens as the best step did so far; a step in vain costs more than
        a wait, and changes nothing. Without a `publish` after each step this stays False.
        """
        if not self._published:
            return False
        newest = self._published - 1
        if self._copied and not self._copied[newest % 2].query():
            left, most = [limit - length for limit, length in zip(self.limits, self._lengths, strict=True)], self.most
            if newest:
                self._copied[(newest - 1) % 2].synchronize()
                told = self._told(newest - 1)
                lengths, running = told["lengths"].tolist(), told["running"].tolist()
                gains = [now - before for now, before in zip(lengths, self._lengths, strict=True)]
                self._lengths, self._gained = lengths, max(self._gained, *gains)
                rows, most = zip(self.limits, lengths, running, strict=True), self._gained
                left = [limit - length for limit, length, runs in rows if runs > 0]
            if all(count <= most for count in left):
                self._copied[newest % 2].synchronize()
            elif newest:
                newest -= 1
            else:
                return False
        told = self._told(newest)
        return told["active"].item() == 0 or told["running"].min().item() < 0

    def check(self) -> None:
        """Raises InvalidLogitsError if a row ended because no next token can be chosen; waits for the device."""
        state = self._fields(self._block.cpu())
        ends = zip(state["running"].tolist(), state["lengths"].tolist(), strict=True)
        raise_invalid([(index, length) for index, (runs, length) in enumerate(ends) if runs < 0])

    @property
    def seconds_to_first_token(self) -> float | None:
        """From the beginning of the generation to the end of its first step, None before; waits for the device."""
        return self._first_token.seconds if self._published else None

    @property
    def rows(self) -> list[Row]:
        """Snapshots of the rows; waits for the device."""
        state, origins = self._fields(self._block.cpu()), self.state.origins.cpu()
        lengths, running = state["lengths"].tolist(), state["running"].tolist()
        return [
            Row(state["tokens"][row, :length].tolist(), origins[row, start:length].tolist(), limit, runs > 0)
            for row, (start, length, limit, runs) in enumerate(
                zip(self.prompt_lengths, lengths, self.limits, running, strict=True)
            )
        ]

    @property
    def accepted(self) -> Counter[int]:
        """How many row-steps took so many tokens from nodes below the root; waits for the device."""
        result: Counter[int] = Counter()
        for counts in self._counts:
            more = [*counts.cpu().sum(0).tolist(), 0]  # row-steps that accepted at least d tokens
            result.update({depth: more[depth] - more[depth + 1] for depth in range(len(more) - 1)})
        return +result

    @property
    def steps(self) -> int:
        """In how many steps any row ran; waits for the device. A row runs from the first step until it stops."""
        return int(sum(counts[:, 0].cpu() for counts in self._counts).max()) if self._counts else 0


# ---------------------------------------------------------------- one pass's inputs


@dataclass(frozen=True)
class Batch:
    """Inputs of one model pass, static tensors that a kernel fills.

    tokens, positions, noise_positions int32 [B, N]; masks int32 [B, N, W]: the tree rows that each node sees, itself
    included; prefix int32 [B]: committed rows that each sequence sees, at least 0. first_bit: the tree row of node 0.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    noise_positions: torch.Tensor
    masks: torch.Tensor
    prefix: torch.Tensor
    first_bit: int = 0
    packed: torch.Tensor | None = None
    steps: torch.Tensor | None = None  # of a chunk: 0, 1, ... in every row

    @classmethod
    def of(cls, rows: int, nodes: int, region: int, device: torch.device) -> "Batch":
        """Of `nodes` nodes in a tree region of `region` rows."""
        packed = torch.zeros(3, rows, nodes, dtype=torch.int32, device=device)
        masks = torch.zeros(rows, nodes, words(region), dtype=torch.int32, device=device)
        return cls(*packed.unbind(), masks, torch.zeros(rows, dtype=torch.int32, device=device), packed=packed)

    @classmethod
    def chain(cls, rows: int, nodes: int, device: torch.device) -> "Batch":
        """Of a chunk of prompts: every token sees those before it, without masks. `begin` says where."""
        batch = cls.of(rows, nodes, nodes, device)
        steps = torch.arange(nodes, dtype=torch.int32, device=device).expand(rows, -1)
        return replace(batch, steps=steps.contiguous())

    def begin(self, start: int) -> None:
        """Places the nodes of a chunk after `start` committed tokens."""
        torch.add(self.steps, start, out=self.positions)
        torch.add(self.positions, 1, out=self.noise_positions)
        self.prefix.fill_(start)

    @property
    def nodes(self) -> int:
        return self.tokens.shape[1]


class Stopwatch:
    """Seconds between two moments, on the device's own clock where it has one."""

    def __init__(self, device: torch.device):
        self.device = device
        on_gpu = device.type == "cuda"
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, index: int) -> None:
        if self.device.type == "cuda":
            self._marks[index].record(torch.cuda.current_stream(self.device))
        else:
            self._marks[index] = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Waits for the second moment."""
        begin, end = self._marks
        if self.device.type != "cuda":
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


# ---------------------------------------------------------------- growing trees


class Growth:
    """The trees of a generation's steps, grown over draft passes, one step after the other.

    table: a `KatzTable` on the device, or None; noise: an object with `seeds` int64 [B] and `streams` [B] on the
    device, or None when greedy. dtype is of no account: masks are words of bits.
    """

    def __init__(self, sequences: Sequences, config, table, noise, dtype: torch.dtype | None = None):
        self.sequences, self.config, self.table = sequences, config, table
        self.noise = None if noise is None else (noise.seeds, noise.streams)
        rows, device = len(sequences), sequences.device
        self.state = GrowthState.of(rows, config.slots, config.children, device)
        self.trees = Trees(sequences, config, self.state)
        shapes = {
            number: Batch.of(rows, pass_size(config, number), config.slots, device)
            for number in range(min(config.passes, 2))
        }
        self.batches = [
            replace(shapes[min(number, 1)], first_bit=pass_start(config, number)) for number in range(config.passes)
        ]
        self.begin()

    def begin(self) -> None:
        """Starts a step's trees."""
        self.number, self.proposed = 0, None

    @property
    def start(self) -> int:
        """The first slot of the pass under way."""
        return pass_start(self.config, self.number)

    def pays(self) -> bool:
        """Every pass runs: whether it pays is not known on the host."""
        return True

    def select(self, number: int) -> None:
        """Asks for the slots of a pass that score best. Raises ValueError for a pass that the settings lack."""
        if not 0 <= number < self.config.passes:
            raise ValueError(f"a step has the passes 0 to {self.config.passes - 1}, got {number}")
        self.number = number

    def prefetch(self, parents: None) -> None:
        """Asks for draft²'s guesses below them, which `batch` always makes where the settings have any."""

    def batch(self) -> Batch:
        """The draft's pass over the slots asked for; the tensors hold until the next call."""
        batch, state = self.batches[self.number], self.sequences.state
        grow_tree.grow_pass(
            state.tokens, state.lengths, self.state, self.config, self.number, self.proposed, self.table, self.noise,
            batch.packed, batch.masks, batch.prefix,
        )  # fmt: skip
        return batch

    def record(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """What the draft proposed in this pass: tokens int32 or int64, logprobs fp32 [B, rows of the pass, C].

        They are read by the next `batch` or `harvest` and must stay as they are until then.
        """
        self.proposed = tokens, logprobs

    def harvest(self) -> "Trees":
        """The best candidates. Scores only fall along a path, so the best always form a tree."""
        self.trees.grow(self.proposed)
        return self.trees


# ---------------------------------------------------------------- finished trees


class _Alone:
    """The settings of a root alone, as of TreeConfig's mode "autoregressive"."""

    nodes, depth, passes, width, children, slots = 1, 0, 0, 1, 1, 0
    prefetch, prefetch_width, guesses, node_floor = 0, 1, 0, 0.0


class Trees:
    """The trees of a batch, ready for the target, and the walk that accepts them. nodes: of each."""

    def __init__(self, sequences: Sequences, config, growth: GrowthState):
        self.sequences, self.config, self.growth = sequences, config, growth
        self.nodes, rows, device = config.nodes, len(sequences), sequences.device
        deepest = min(config.depth, config.nodes - 1)
        self.tree = torch.zeros(5, rows, self.nodes, dtype=torch.int32, device=device)
        self.inputs = Batch.of(rows, self.nodes, self.nodes, device)
        self.counts = torch.zeros(rows, deepest + 1, dtype=torch.int32, device=device)
        sequences._counts.append(self.counts)
        self.moves = Moves.of(rows, deepest, device)

    @classmethod
    def roots(cls, sequences: Sequences) -> "Trees":
        """The trees of plain decoding: a root each."""
        if sequences._roots is None:
            growth = GrowthState.of(len(sequences), _Alone.slots, _Alone.children, sequences.device)
            sequences._roots = cls(sequences, _Alone, growth)
        sequences._roots.grow(None)
        return sequences._roots

    @classmethod
    def lookup(cls, sequences: Sequences, depth: int) -> "Trees":
        """Chains by the context n-gram alone, made on the host (`control.Trees.lookup`); waits for the device."""
        if sequences._chains is None:
            sequences._chains = cls(sequences, SimpleNamespace(nodes=depth + 1, depth=depth), None)
        rows = [control.Row(row.tokens, row.limit) for row in sequences.rows]
        sequences._chains.load(control.Trees.lookup(SimpleNamespace(rows=rows, doubted=False), depth).trees)
        return sequences._chains

    def load(self, trees: list) -> None:
        """Fills in trees that were made on the host, one a row, of at most as many nodes."""
        rows, words = len(trees), self.inputs.masks.shape[2]
        tree = np.zeros((5, rows, self.nodes), np.int32)
        tree[grow_tree.TREE_PARENT.value] = -1
        masks = np.zeros((rows, self.nodes, words), np.int32)
        masks[..., 0] = 1
        for row, one in enumerate(trees):
            count = len(one.tokens)
            tree[:, row, :count] = one.tokens, one.parents, one.depths, one.slots, one.origins
            masks[row, :count] = [np.frombuffer(mask.to_bytes(4 * words, "little"), np.int32) for mask in one.masks]
        self.tree.copy_(torch.from_numpy(tree))
        self.inputs.masks.copy_(torch.from_numpy(masks))
        self.inputs.prefix.copy_(self.sequences.lengths).sub_(1)
        tokens, positions, noise_positions = self.inputs.packed.unbind()
        tokens.copy_(self.tree[0])
        torch.add(self.inputs.prefix[:, None], self.tree[grow_tree.TREE_DEPTH.value], out=positions)
        torch.add(positions, 1, out=noise_positions)

    @property
    def children(self) -> list[dict[tuple[int, int], int]]:
        """Of each row: (parent, token) -> node; waits for the device."""
        tokens, parents = self.tree[:2].tolist()
        return [
            {key: node for node, key in enumerate(zip(above, names, strict=True)) if node and key[0] >= 0}
            for above, names in zip(parents, tokens, strict=True)
        ]

    def grow(self, proposed: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Fills in the trees, from the candidates on record and what the draft proposed last."""
        state, inputs = self.sequences.state, self.inputs
        grow_tree.harvest_tree(
            state.tokens, state.lengths, self.growth, self.config, proposed,
            self.tree, inputs.packed, inputs.masks, inputs.prefix,
        )  # fmt: skip

    def batch(self, dtype: torch.dtype | None = None) -> Batch:
        """The target's pass over all nodes. Nodes that a row's tree lacks see its root and are seen by nobody."""
        return self.inputs

    def verify_commit(self, chosen: torch.Tensor) -> "Moves":
        """Walks each tree while the chosen token is among the node's children, and appends what was chosen.

        chosen int32 or int64 [B, N]: `choose` at every node. The token chosen at the last node of the walk is the bonus
        token. A row ends with an end-of-sequence token or at its limit.
        """
        moves = self.moves
        verify_commit(
            chosen, self.tree, self.inputs.masks, self.sequences.state,
            moves.accepted, self.counts, moves.target, moves.draft,
        )  # fmt: skip
        return moves


@dataclass(frozen=True)
class Moves:
    """What a step accepted, and the KV rows to move; static tensors that `verify_commit` fills.

    accepted int32 [B]: tokens taken from nodes below the root, -1 for a row that had stopped. Moves are int32
    [2, B, M]: tree rows, and the positions they move to; -1 in both where nothing moves.
    """

    accepted: torch.Tensor
    target: torch.Tensor
    draft: torch.Tensor

    @classmethod
    def of(cls, rows: int, deepest: int, device: torch.device) -> "Moves":
        def none(*shape: int) -> torch.Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        return cls(none(rows), none(2, rows, deepest + 1), none(2, rows, deepest + 2))

    def target_rows(self, first: int = 0) -> torch.Tensor:
        """[2, B, deepest path + 1]: the whole accepted path. Node 0 lies in tree row 0."""
        if first:
            raise ValueError(f"on a GPU node 0 always lies in tree row 0 of the target's cache, got {first}")
        return self.target

    def draft_rows(self, first: int = 0) -> torch.Tensor:
        """[2, B, deepest path + 2]: the same for the draft, after its catch-up token."""
        return self.draft
