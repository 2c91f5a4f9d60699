"""State of a generation on the device: the classes of host.py over tensors that are allocated once.

The Triton backend uses these classes; host.py explains their words. All tensors are allocated by the first step, and
`Sequences.restart` uses them for another generation. A step launches kernels and reads nothing back, so it can be
captured as a CUDA graph. The engine calls, in this order (`*` once for every draft pass):

    Sequences(...), or restart            once, at the beginning of a generation
    Sequences.chunks, chunk               reading the prompts
    Growth.begin                          a step: start its trees
    * Growth.batch                        launches grow_pass: choose slots, add guesses, fill in the pass's inputs
    * Growth.record                       host only: note where the draft's proposals lie
    Growth.harvest -> Trees               launches harvest_tree (plain decoding: Trees.roots)
    Trees.batch                           inputs of the target's pass, which harvest_tree has filled in
    Trees.verify_commit -> Moves          launches verify_commit
    Moves.target_rows, draft_rows         the KV rows of the accepted nodes
    Report.of                             outside of the graph: copy what a tree of several nodes did to the host
    Sequences.publish, finished           outside of the graph: copy the progress to the host, look at it

Steps may have different trees: each `Growth` and `Trees` has tensors of its own, over the same `Sequences`. Before a
step with draft passes that follows steps without, the draft reads what it has missed (`Unread.before_last`).

The host waits for the device in a step only to apply logits processors (`Trees.children`) and for prompt look-up
(`Trees.lookup`). Two things differ from the host's classes. Every draft pass runs: `TreeConfig.pass_floor` has no
effect. Scores are summed in fp32, not fp64: candidates closer than fp32's rounding can change places, which never
changes the output.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch

from stagedspec.kernels import grow_tree
from stagedspec.kernels.common.constants import ROOT_ALONE
from stagedspec.kernels.common.host_copy import to_host
from stagedspec.kernels.common.inputs import NgramTable, TreeSettings
from stagedspec.kernels.common.registry import check_runs
from stagedspec.kernels.common.timing import Stopwatch
from stagedspec.kernels.grow_tree import GrowthState, pass_size, pass_start, words
from stagedspec.kernels.state import host
from stagedspec.kernels.state.invalid_logits import raise_invalid
from stagedspec.kernels.verify_commit import CommitState, verify_commit

# ---------------------------------------------------------------- committed sequences


TOKENS, ENDS = 128, 8  # capacities are multiples of these: of tokens in a row, of ids that end a row
# Sizes of chunks of a prompt, in tokens of all rows: each has its CUDA graph. Another pass costs as much time as
# CHUNK_COST more tokens in one.
CHUNKS, CHUNK_COST = (16, 32, 64, 128, 256, 512, 1024), 80
UNREAD = 32  # tokens of each row in the draft's pass over what it has missed, however many those are


def _whole(count: int, unit: int) -> int:
    """`count` rounded up to a multiple of `unit`, at least one of them."""
    return max(-(-count // unit), 1) * unit


def cheapest(count: int, sizes: Sequence[int], room: int) -> list[int]:
    """The cheapest chunks, largest first, that cover `count` tokens of a prompt and at most `room`. sizes: to choose
    from; they and `room` are multiples of the first."""
    return min(_cheapest(tuple(sizes), room)[-(-count // sizes[0]) :])[1]


@cache
def _cheapest(sizes: tuple[int, ...], room: int) -> list[tuple[int, list[int]]]:
    """Cost and sizes of the cheapest chunks for each multiple of the first size, from 0 to `room`."""
    best: list[tuple[int, list[int]]] = [(0, [])]
    for total in range(sizes[0], room + 1, sizes[0]):
        before = [(size, *best[(total - size) // sizes[0]]) for size in sizes if size <= total]
        best.append(
            min((cost + size + CHUNK_COST, sorted([*taken, size], reverse=True)) for size, cost, taken in before)
        )
    return best


class Row(NamedTuple):
    """A snapshot of one sequence: all its tokens, the origins of the new ones, the length at which it ends, whether it
    still runs."""

    tokens: list[int]
    origins: list[int]
    limit: int
    running: bool


class _Span(NamedTuple):
    """Where a row's new tokens begin, and the length at which it ends."""

    start: int
    limit: int


class Sequences:
    """The committed tokens of a batch, and when each row stops, on the device.

    prompts: token ids of each row; new_tokens: at most so many more, one number or one a row; eos: ids that end a row;
    most: tokens that a row may gain in one step. capacity: the most tokens that a row may hold, in this generation or
    another one.

    Raises ValueError for an empty prompt, for no new tokens, and for a device that cannot run kernels.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        new_tokens: int | Sequence[int],
        eos: Sequence[int],
        device: torch.device,
        most: int = 1,
    ):
        if not prompts or not all(prompts):
            raise ValueError(f"every prompt needs at least one token, got {[len(prompt) for prompt in prompts]}")
        limits = host.limits_of(prompts, new_tokens)
        if any(limit <= len(prompt) for prompt, limit in zip(prompts, limits, strict=True)):
            raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
        rows, self.most = len(prompts), most
        self.device, self.capacity = device, _whole(max(limits), TOKENS)
        check_runs(torch.empty(0, device=device), "Sequences")

        # One block of memory: one copy to the device begins a generation, one copy to the host reads its results.
        sizes = {
            "tokens": rows * self.capacity, "eos": _whole(len(set(eos)), ENDS), "limits": rows,
            "lengths": rows, "running": rows, "active": 1,
        }  # fmt: skip
        places, total = {}, 0
        for name, size in sizes.items():
            places[name] = slice(total, total + size)
            total += _whole(size, 4)  # kernels' loads are aligned alike for every number of rows
        self._places, self._block = places, torch.zeros(total, dtype=torch.int32, device=device)
        self._progress = slice(places["lengths"].start, total)
        state = self._fields(self._block)
        self.state = CommitState(origins=torch.zeros(rows, self.capacity, dtype=torch.int8, device=device), **state)
        self._counts: list[torch.Tensor] = []  # of every `Trees` made for this batch
        self._chunks: dict[int, Batch] = {}  # by size
        self._roots: Trees | None = None
        self._chains: Trees | None = None
        self._unread: Batch | None = None
        # Pinned memory: of what goes to the device, and of the progress that comes back after each step.
        pinned = device.type == "cuda"
        self._initial = torch.zeros(total, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._known = [torch.zeros(total, dtype=torch.int32, device="cpu", pin_memory=pinned) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if pinned else []
        self._sent = torch.cuda.Event() if pinned else None
        self._first_token = Stopwatch(device)
        self.restart(prompts, new_tokens, eos)

    def _fields(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of `CommitState` in a block, by name."""
        fields = {name: block[place] for name, place in self._places.items()}
        return fields | {"tokens": fields["tokens"].view(-1, self.capacity)}

    def fits(self, prompts: list[list[int]], new_tokens: int | Sequence[int], eos: Sequence[int]) -> bool:
        """Whether `restart` has room for these arguments."""
        limits = host.limits_of(prompts, new_tokens)
        room = max(limits) <= self.capacity and len(set(eos)) <= len(self.state.eos)
        return room and len(prompts) == len(self)

    @torch.inference_mode()
    def restart(self, prompts: list[list[int]], new_tokens: int | Sequence[int], eos: Sequence[int]) -> None:
        """Begins another generation in the same tensors, so that CUDA graphs over them can be used again."""
        self._first_token.start()
        limits = host.limits_of(prompts, new_tokens)
        self._spans = [_Span(len(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)]
        self._lengths, self._gained = [span.start for span in self._spans], 1  # as the host knows them
        if self._sent is not None:
            self._sent.synchronize()  # wait until the last generation's copy has read what is overwritten here
        initial = self._fields(self._initial.zero_())
        for row, prompt in zip(initial["tokens"], prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, dtype=torch.int32, device="cpu")
        ends = sorted(set(eos))
        initial["eos"].fill_(-1)[: len(ends)] = torch.tensor(ends, dtype=torch.int32, device="cpu")
        initial["limits"].copy_(torch.tensor([span.limit for span in self._spans], device="cpu"))
        initial["lengths"].copy_(torch.tensor(self._lengths, device="cpu"))
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

    @property
    def longest(self) -> int:
        """How many tokens the longest row may ever have: how many it has, the host would wait for."""
        return max(span.limit for span in self._spans)

    @torch.inference_mode()
    def stop(self, index: int, length: int) -> None:
        """Ends a row; tokens beyond the first `length` are dropped."""
        self.state.active.sub_(self.state.running[index].clamp(0, 1))
        self.state.running[index] = 0
        self.state.lengths[index].clamp_(max=length)

    # ------------------------------------------------------------ reading prompts

    @property
    def chunk_sizes(self) -> list[int]:
        """All sizes that `chunks` may return."""
        return [size for size in CHUNKS if size * len(self) <= CHUNKS[-1] and size <= self.capacity]

    def chunks(self, count: int) -> list[tuple[int, int]]:
        """(start, size) of the passes that read the first `count` tokens of every row. The last one may reach further:
        no node attends to what lies there, and later tokens overwrite it in the cache."""
        sizes = cheapest(count, self.chunk_sizes, self.capacity)
        return list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))

    def chunk(self, start: int, size: int, dtype: torch.dtype | None = None) -> "Batch":
        """The pass over `size` tokens of every row after its first `start`. All chunks of one size share their tensors:
        they hold until the next chunk of that size."""
        if size not in self._chunks:
            self._chunks[size] = Batch.chain(len(self), size, self.device)
        batch = self._chunks[size]
        batch.tokens.copy_(self.state.tokens[:, start : start + size])
        batch.begin(start)
        return batch

    # ------------------------------------------------------------ what the host knows

    def _progress_at(self, turn: int) -> dict[str, torch.Tensor]:
        """The host's copy of the progress after step `turn`: all lengths, which rows run and how many."""
        return self._fields(self._known[turn % 2])

    def publish(self) -> None:
        """Starts copying the progress of the rows to the host. Called after every step, not as a part of it."""
        if not self._published:
            self._first_token.stop()
        turn = self._published % 2
        self._known[turn][self._progress].copy_(self._block[self._progress], non_blocking=True)
        if self._copied:
            self._copied[turn].record()
        self._published += 1

    @property
    def finished(self) -> bool:
        """Whether all rows have stopped, or one has no next token (`check`), as far as the host knows.

        The host runs at most one step ahead: it waits for the last step but one. It also waits for the newest step if
        that step may have finished every row, judging by the largest gain so far: a superfluous step changes nothing,
        but costs more time than waiting. Stays False without a `publish` after each step.
        """
        if not self._published:
            return False
        newest = self._published - 1
        if self._copied and not self._copied[newest % 2].query():
            left = [span.limit - length for span, length in zip(self._spans, self._lengths, strict=True)]
            most = self.most
            if newest:
                self._copied[(newest - 1) % 2].synchronize()
                known = self._progress_at(newest - 1)
                lengths, running = known["lengths"].tolist(), known["running"].tolist()
                gains = [now - before for now, before in zip(lengths, self._lengths, strict=True)]
                self._lengths, self._gained = lengths, max(self._gained, *gains)
                rows, most = zip(self._spans, lengths, running, strict=True), self._gained
                left = [span.limit - length for span, length, runs in rows if runs > 0]
            if all(count <= most for count in left):
                self._copied[newest % 2].synchronize()
            elif newest:
                newest -= 1
            else:
                return False
        known = self._progress_at(newest)
        return known["active"].item() == 0 or known["running"].min().item() < 0

    def check(self) -> None:
        """Raises InvalidLogitsError if a row ended because no next token can be chosen; waits for the device."""
        state = self._fields(self._block.cpu())
        ends = zip(state["running"].tolist(), state["lengths"].tolist(), strict=True)
        raise_invalid({index: length for index, (runs, length) in enumerate(ends) if runs < 0})

    @property
    def seconds_to_first_token(self) -> float | None:
        """Seconds from the beginning of the generation to the end of its first step; None before. Waits for the
        device."""
        return self._first_token.seconds if self._published else None

    @property
    def rows(self) -> list[Row]:
        """Snapshots of the rows; waits for the device."""
        state, origins = self._fields(self._block.cpu()), self.state.origins.cpu()
        lengths, running = state["lengths"].tolist(), state["running"].tolist()
        return [
            Row(state["tokens"][row, :length].tolist(), origins[row, start:length].tolist(), limit, runs > 0)
            for row, ((start, limit), length, runs) in enumerate(zip(self._spans, lengths, running, strict=True))
        ]

    @property
    def accepted(self) -> list[Counter[int]]:
        """For each row, how many of its steps accepted so many tokens from nodes below the root; waits for the
        device."""
        result: list[Counter[int]] = [Counter() for _ in self._spans]
        for counts in self._counts:
            for row, known in zip(result, counts.tolist(), strict=True):
                more = [*known, 0]  # steps that accepted at least d tokens
                row.update({depth: more[depth] - more[depth + 1] for depth in range(len(known))})
        return [+row for row in result]

    @property
    def steps(self) -> int:
        """Number of steps in which any row ran; waits for the device."""
        return int(cast(torch.Tensor, sum(counts[:, 0].cpu() for counts in self._counts)).max()) if self._counts else 0


# ---------------------------------------------------------------- one pass's inputs


@dataclass(frozen=True)
class Batch:
    """Inputs of one model pass, in tensors that stay where they are.

    tokens, positions, noise_positions: int32 [B, N], the last for the noise of the token chosen at each node. masks:
    int32 [B, N, W], one bit for each tree row that a node attends to, its own included. prefix: int32 [B], committed
    rows that all nodes of a sequence attend to. first_bit: the tree row of node 0. packed: the first three in one.
    steps: of a chunk, int32 [B, N], 0, 1, ... in every row.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    noise_positions: torch.Tensor
    masks: torch.Tensor
    prefix: torch.Tensor
    first_bit: int = 0
    packed: torch.Tensor | None = None
    steps: torch.Tensor | None = None

    @classmethod
    def of(cls, rows: int, nodes: int, region: int, device: torch.device) -> "Batch":
        """For `nodes` nodes in a tree region of `region` rows."""
        packed = torch.zeros(3, rows, nodes, dtype=torch.int32, device=device)
        masks = torch.zeros(rows, nodes, words(region), dtype=torch.int32, device=device)
        tokens, positions, noise_positions = packed.unbind()
        prefix = torch.zeros(rows, dtype=torch.int32, device=device)
        return cls(tokens, positions, noise_positions, masks, prefix, packed=packed)

    @classmethod
    def chain(cls, rows: int, nodes: int, device: torch.device) -> "Batch":
        """For a chunk of prompts: every token attends to those before it, without masks. `begin` places it."""
        batch = cls.of(rows, nodes, nodes, device)
        steps = torch.arange(nodes, dtype=torch.int32, device=device).expand(rows, -1)
        return replace(batch, steps=steps.contiguous())

    @property
    def written(self) -> grow_tree.Inputs:
        """What the kernels that grow trees write of it."""
        return grow_tree.Inputs(cast(torch.Tensor, self.packed), self.masks, self.prefix)

    def begin(self, start: int) -> None:
        """Places a chunk after `start` committed tokens."""
        torch.add(cast(torch.Tensor, self.steps), start, out=self.positions)
        torch.add(self.positions, 1, out=self.noise_positions)
        self.prefix.fill_(start)

    @property
    def nodes(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Unread:
    """The draft's pass over the last UNREAD tokens of each row, without the two that every step's first draft pass
    reads. A shorter row is filled up: no node attends to the rest, and later tokens overwrite it.

    write, first: the pass writes in place, as a chunk of a prompt. following: int32 [B, UNREAD], the token after each;
    counted: bool [B, UNREAD], whether it is one of those that were asked for, of a row that runs.
    """

    batch: Batch
    following: torch.Tensor
    counted: torch.Tensor
    write: int
    moves = None

    @property
    def first(self) -> int:
        return self.write

    @classmethod
    def before_last(cls, sequences: Sequences, count: int, tree_rows: int) -> "Unread":
        """Asks for the last `count` tokens but two, at most UNREAD. All passes share the tensors of `batch`: they hold
        until the next one. Raises ValueError for a larger count."""
        if count > UNREAD:
            raise ValueError(
                f"a pass reads at most {UNREAD} tokens of each row, got {count}; read those before them first"
            )
        if sequences._unread is None:
            sequences._unread = Batch.chain(len(sequences), UNREAD, sequences.device)
        batch, state = sequences._unread, sequences.state
        ends = state.lengths[:, None] - 2
        torch.sub(state.lengths, 2 + UNREAD, out=batch.prefix).clamp_(min=0)
        torch.add(cast(torch.Tensor, batch.steps), batch.prefix[:, None], out=batch.positions)
        torch.add(batch.positions, 1, out=batch.noise_positions)
        places = batch.positions.long()
        batch.tokens.copy_(state.tokens.gather(1, places))
        counted = (places >= ends - count) & (places < ends) & (state.running[:, None] > 0)
        return cls(batch, state.tokens.gather(1, places + 1), counted, tree_rows)


# ---------------------------------------------------------------- growing trees


class Counters(Protocol):
    """Counters of a generation's noise: seeds int64 [B] and streams int32 [B] on the device."""

    @property
    def seeds(self) -> torch.Tensor: ...

    @property
    def streams(self) -> torch.Tensor: ...


class Growth:
    """Grows the trees of a batch over draft passes, for one step after the other.

    table: of n-grams, on the device, or None; noise: None when greedy.
    """

    def __init__(
        self,
        sequences: Sequences,
        config: TreeSettings,
        table: NgramTable | None,
        noise: Counters | None,
    ):
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
        """Starts the trees of a step."""
        self.number = 0
        self.proposed: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def start(self) -> int:
        """The first slot of the pass under way."""
        return pass_start(self.config, self.number)

    def pays(self) -> bool:
        """True: the host does not know whether a pass pays, so every one runs."""
        return True

    def batch(self, number: int) -> Batch:
        """Chooses the slots of draft pass `number`, adds the guesses below them, and returns the draft's inputs. The
        tensors hold until the next call. Raises ValueError if a step has no such pass."""
        if not 0 <= number < self.config.passes:
            raise ValueError(f"a step has the passes 0 to {self.config.passes - 1}, got {number}")
        self.number = number
        batch, state = self.batches[self.number], self.sequences.state
        grow_tree.grow_pass(
            state.tokens, state.lengths, self.state, self.config, self.number, self.proposed, self.table, self.noise,
            batch.written,
        )  # fmt: skip
        return batch

    def record(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Notes what the draft proposed: tokens int32 or int64, logprobs fp32 [B, slots of the pass, C], best first.

        The next `batch` or `harvest` reads the tensors, which must not change until then.
        """
        self.proposed = tokens, logprobs

    def harvest(self) -> "Trees":
        """The trees of the best candidates. Scores only fall along a path, so the best always form a tree."""
        self.trees.grow(self.proposed)
        return self.trees


# ---------------------------------------------------------------- finished trees


class _Undrafted(NamedTuple):
    """Tree settings without draft passes, as `TreeConfig.for_mode("autoregressive")` gives them: of a root alone, or of
    the chains of prompt look-up."""

    nodes: int = 1
    depth: int = 0
    passes: int = 0
    width: int = 1
    children: int = 1
    slots: int = 0
    prefetch: int = 0
    prefetch_width: int = 1
    guesses: int = 0
    node_floor: float = 0.0
    pass_floor: float = 0.0
    context: bool = True


class Trees:
    """The trees of a batch, ready to be verified.

    nodes: of each; tree: int32 [5, B, N], the rows of `grow_tree.TREE_*`: token, parent, depth, slot and origin of each
    node; growth: the candidates that `grow` chooses from, None where it is not called; counts: int32 [B, deepest + 1],
    how often so many tokens and more were accepted.
    """

    def __init__(self, sequences: Sequences, config: TreeSettings, growth: GrowthState | None):
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
        """Trees of a root alone: plain decoding."""
        if sequences._roots is None:
            root = _Undrafted()
            growth = GrowthState.of(len(sequences), root.slots, root.children, sequences.device)
            sequences._roots = cls(sequences, root, growth)
        sequences._roots.grow(None)
        return sequences._roots

    @classmethod
    def lookup(cls, sequences: Sequences, depth: int) -> "Trees":
        """Chains of up to `depth` nodes by prompt look-up, made on the host (`host.lookup_chain`). Waits for the
        device."""
        if sequences._chains is None:
            sequences._chains = cls(sequences, _Undrafted(depth + 1, depth), None)
        depths = [0 if runs == ROOT_ALONE else depth for runs in sequences.state.running.tolist()]
        rows = [host.Row(row.tokens, row.limit) for row in sequences.rows]
        sequences._chains.load([host.lookup_chain(row, most) for row, most in zip(rows, depths, strict=True)])
        return sequences._chains

    def load(self, trees: list[host.Tree]) -> None:
        """Copies trees from the host, one a row, of at most `nodes` nodes."""
        rows, words = len(trees), self.inputs.masks.shape[2]
        tree = np.zeros((5, rows, self.nodes), np.int32)
        tree[grow_tree.TREE_PARENT.value] = -1
        masks = np.zeros((rows, self.nodes, words), np.int32)
        masks[..., 0] = 1
        for row, one in enumerate(trees):
            count = len(one.nodes)
            tree[:, row, :count] = one.device_fields
            masks[row, :count] = [
                np.frombuffer(node.mask.to_bytes(4 * words, "little"), np.int32) for node in one.nodes
            ]
        self.tree.copy_(torch.from_numpy(tree))
        self.inputs.masks.copy_(torch.from_numpy(masks))
        self.inputs.prefix.copy_(self.sequences.lengths).sub_(1)
        tokens, positions, noise_positions = cast(torch.Tensor, self.inputs.packed).unbind()
        tokens.copy_(self.tree[0])
        torch.add(self.inputs.prefix[:, None], self.tree[grow_tree.TREE_DEPTH.value], out=positions)
        torch.add(positions, 1, out=noise_positions)

    @property
    def depths(self) -> torch.Tensor:
        """The depth of each row's deepest node, int32 [B]."""
        return self.tree[grow_tree.TREE_DEPTH.value].amax(1)

    @property
    def children(self) -> list[dict[tuple[int, int], int]]:
        """For each row, (parent node, token) -> node; waits for the device."""
        tokens, parents = self.tree[:2].tolist()
        return [
            {key: node for node, key in enumerate(zip(above, names, strict=True)) if node and key[0] >= 0}
            for above, names in zip(parents, tokens, strict=True)
        ]

    def grow(self, proposed: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Makes the trees of the best candidates: those on record, and what the draft proposed last."""
        state = self.sequences.state
        grow_tree.harvest_tree(
            state.tokens, state.lengths, state.running, cast(GrowthState, self.growth), self.config, proposed,
            self.tree, self.inputs.written,
        )  # fmt: skip

    def batch(self, dtype: torch.dtype | None = None) -> Batch:
        """Inputs of the target's pass over all nodes. Smaller trees are padded with nodes that attend to the root, and
        that no node attends to."""
        return self.inputs

    def verify_commit(self, chosen: torch.Tensor) -> "Moves":
        """Accepts a path of each tree and appends the chosen tokens along it to the sequences, as
        `host.Trees.verify_commit`. chosen: int32 or int64 [B, N]."""
        moves = self.moves
        verify_commit(
            chosen, self.tree, self.inputs.masks, self.sequences.state,
            moves.accepted, self.counts, moves.target, moves.draft,
        )  # fmt: skip
        return moves


@dataclass(frozen=True)
class Moves:
    """What a step accepted, and the KV rows to move, in tensors that `Trees.verify_commit` fills.

    accepted: int32 [B], tokens accepted from nodes below the root, -1 for a row that had stopped. target, draft: int32
    [2, B, K], tree rows and the positions that they move to; -1 in both where nothing moves. K is the longest path for
    the target, and one more for the draft.
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
        """Moves of the accepted path in the target's cache, int32 [2, B, K]. first: of no account, as node 0 always
        lies in tree row 0 here."""
        return self.target

    def draft_rows(self, first: int = 0) -> torch.Tensor:
        """Moves of the catch-up token and the accepted path in the draft's cache, int32 [2, B, K + 1]. first: of no
        account, as slot 0 always lies in tree row 0 here."""
        return self.draft


@dataclass(frozen=True)
class Report:
    """What a step did in each row, on its way to the host (`interface.Report`, `to_host`).

    values: int32 [3, B], accepted tokens, depths, and committed tokens after the step; limits: of the rows.
    """

    values: torch.Tensor
    limits: list[int]

    @classmethod
    def of(cls, trees: Trees, moves: Moves) -> "Report":
        """Copies nothing where trees are roots: such a step accepts no node, and how far its rows are is not told."""
        sequences = trees.sequences
        limits = [span.limit for span in sequences._spans]
        if trees.nodes == 1:
            return cls(torch.zeros(3, len(limits), dtype=torch.int32, device="cpu"), limits)
        return cls(to_host(torch.stack((moves.accepted, trees.depths, sequences.lengths))), limits)

    @property
    def accepted(self) -> list[int]:
        return self.values[0].tolist()

    @property
    def depths(self) -> list[int]:
        return self.values[1].tolist()

    @property
    def left(self) -> list[int]:
        """Exact for rows that go on. One that ends may have gained a token less, as one whose next tree is a root alone
        has."""
        accepted, _, lengths = self.values.tolist()
        return [limit - length + taken + 1 for limit, length, taken in zip(self.limits, lengths, accepted, strict=True)]
