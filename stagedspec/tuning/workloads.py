"""The operations of a decoding step on random data, at the shape of a model: for benchmarks and the tuner.

Each class holds the inputs of an operation and calls it as a decoder does. Trees are grown from random proposals over
random text that repeats itself often enough for the context n-gram to match.
"""

from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from stagedspec.kernels import choose as rule
from stagedspec.kernels import reference
from stagedspec.kernels.backends.triton_backend import Head, NoiseAt, TritonBackend, warping_settings
from stagedspec.kernels.common.registry import Scratch
from stagedspec.kernels.ngram_lookup import ngram_lookup
from stagedspec.kernels.state import device as device_state
from stagedspec.models.ngram import KatzTable
from stagedspec.models.ngram_fit import fit_table
from stagedspec.models.shapes import ModelShape
from stagedspec.planning.tree import TreeConfig

SAMPLINGS = {
    "greedy": None,
    "sampled": {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None},
    "top-k": {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None},
    "top-p": {"temperature": 1.0, "top_k": None, "top_p": 0.9, "min_p": None},
}
CHILDREN = 8  # proposed by the draft for a node
SPREAD = 5.0  # of random logits: a few tokens hold most of the probability, as in text
WORDS = 200  # distinct tokens of the random text


def tree_config(nodes: int) -> TreeConfig:
    """A tree of that many nodes with settings that suit a GPU."""
    if nodes == 1:
        return TreeConfig().for_mode("autoregressive")
    passes, width, children, prefetch, guesses = (3, 4, 4, 1, 2) if nodes <= 16 else (6, 8, 8, 2, 4)
    return TreeConfig(nodes, min(12, nodes - 1), passes, width, children, prefetch, guesses)


def dtype_of(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, else fp32: the interpreter cannot compute in bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def randn(*shape: int, device: torch.device, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype or dtype_of(device))


def random_text(batch: int, length: int, vocab: int) -> torch.Tensor:
    """Token ids [B, length] in which pairs of tokens recur."""
    return torch.randint(min(WORDS, vocab), (batch, length))


@cache
def katz_table(vocab: int, device: torch.device) -> KatzTable:
    return fit_table([random_text(1, 200_000, vocab)[0]], vocab).to(device)


# ---------------------------------------------------------------- token choice


@dataclass
class Counters:
    """Counters of the noise of B x N nodes: seeds, streams, positions."""

    batch: int
    nodes: int
    device: torch.device

    def __post_init__(self) -> None:
        self.seeds = torch.arange(5, 5 + self.batch, device=self.device)
        self.streams = torch.zeros(self.batch, dtype=torch.int32, device=self.device)
        depths = torch.arange(self.nodes, dtype=torch.int32, device=self.device) % 12
        self.positions = (100 + depths).expand(self.batch, -1).contiguous()

    @property
    def noise(self) -> NoiseAt:
        return NoiseAt(self.seeds, self.streams, self.positions)

    def made(self, vocab: int) -> reference.NoiseAt:
        """The same noise, computed by the reference."""
        values = reference.gumbel_noise(self.seeds, self.streams.long(), self.positions.long(), vocab)
        return reference.NoiseAt(values, torch.arange(self.nodes, device=self.device).expand(self.batch, -1))


@dataclass
class HeadWorkload:
    """The head of a model over N nodes of each of B sequences: `choose` as a target's, `children` as a draft's.

    copies: of its weights, so that they exceed the cache.
    """

    shape: ModelShape
    batch: int
    nodes: int
    device: torch.device
    copies: int = 1

    def __post_init__(self) -> None:
        vocab, width = self.shape.vocab, self.shape.width
        self.x = randn(self.batch, self.nodes, width, device=self.device)
        self.norm = randn(width, device=self.device, scale=0.1) + 1, randn(width, device=self.device, scale=0.1)
        self.heads = [
            Head(randn(vocab, width, device=self.device, scale=SPREAD * width**-0.5)) for _ in range(self.copies)
        ]
        self.counters = Counters(self.batch, self.nodes, self.device)
        self.ops = TritonBackend()
        self.of_draft = [self.ops.pack_head(head.weight, invariant=False) for head in self.heads]

    def choose(self, sampling: str) -> torch.Tensor:
        """Chosen tokens, int32 [B, N], of the last copy."""
        warping = SAMPLINGS[sampling]
        noise = None if warping is None else self.counters.noise
        for head in self.heads:
            chosen = self.ops.lm_head_choose(self.x, *self.norm, 1e-5, head, warping, noise)
        return chosen

    def children(self, sampling: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and log-probabilities of children, int32 and fp32 [B, N, CHILDREN], of the last copy."""
        warping = SAMPLINGS[sampling]
        noise = None if warping is None else self.counters.noise
        for head in self.of_draft:
            found = self.ops.lm_head_children(self.x, *self.norm, 1e-5, head, CHILDREN, warping, noise)
        return found


@dataclass
class ChooseWorkload:
    """Token choice alone, from logits in memory."""

    vocab: int
    batch: int
    nodes: int
    device: torch.device

    def __post_init__(self) -> None:
        self.logits = torch.randn(self.batch * self.nodes, self.vocab, device=self.device) * SPREAD
        self.counters = Counters(self.batch, self.nodes, self.device)
        scratch = Scratch.of([rule.scratch_size(len(self.logits), self.vocab)], self.device)
        at = self.counters
        self.inputs = self.logits, at.seeds, at.streams, at.positions
        self.shared: dict[str, Any] = {"scratch": scratch}
        self.out = torch.empty(len(self.logits), dtype=torch.int32, device=self.device)

    def choose(self, sampling: str, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Chosen tokens, int32 [M]. noise: [M, V] instead of the counters'."""
        settings = warping_settings(SAMPLINGS[sampling])
        rule.choose(*self.inputs, **settings, **self.shared, noise=noise, out=self.out)  # type: ignore[misc]
        return self.out


# ---------------------------------------------------------------- trees


@dataclass
class LookupWorkload:
    """The n-gram look-up of N contexts in each of B sequences of `context` tokens, which contain a third of them."""

    nodes: int
    context: int
    batch: int
    table: KatzTable
    device: torch.device

    def __post_init__(self) -> None:
        text = random_text(self.batch, self.context, self.table.vocab_size).int()
        pairs = random_text(self.batch, 2 * self.nodes, self.table.vocab_size).int().view(self.batch, self.nodes, 2)
        known = text[:, 2:].unfold(1, 2, 1)[:, : self.nodes : 3]
        pairs[:, : 3 * known.shape[1] : 3] = known
        self.sequence, self.contexts = text.to(self.device), pairs.to(self.device)
        self.lengths = torch.full((self.batch,), self.context, dtype=torch.int32, device=self.device)
        shape = self.batch, self.nodes, 1 + self.table.successors
        self.tokens = torch.empty(shape, dtype=torch.int32, device=self.device)
        self.logprobs = torch.empty(shape, device=self.device)

    def lookup(self) -> tuple[torch.Tensor, torch.Tensor]:
        ngram_lookup(self.contexts, self.sequence, self.lengths, self.table, self.tokens, self.logprobs)
        return self.tokens, self.logprobs


@dataclass
class TreeWorkload:
    """B trees of `nodes` nodes over sequences of `context` tokens, with room for `room` more tokens."""

    nodes: int
    context: int
    batch: int
    table: KatzTable
    device: torch.device
    sampled: bool = True
    room: int = 64
    config: TreeConfig = field(init=False)

    def __post_init__(self) -> None:
        vocab = self.table.vocab_size
        self.config = tree_config(self.nodes)
        self.prompts = random_text(self.batch, self.context, vocab).tolist()
        self.sequences = device_state.Sequences(self.prompts, self.room, [], self.device)
        counters = Counters(self.batch, 1, self.device)
        noise = SimpleNamespace(seeds=counters.seeds, streams=counters.streams) if self.sampled else None
        if not self.config.passes:
            self.growth: Any = None
            self.proposed: list[tuple[torch.Tensor, torch.Tensor]] = []
            return
        self.growth = device_state.Growth(self.sequences, self.config, self.table, noise)
        self.proposed = [self._proposals(batch.nodes, vocab) for batch in self.growth.batches]

    def _proposals(self, rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random children: distinct tokens of the text, with falling log-probabilities."""
        count = self.config.children
        shape = self.batch, rows, min(WORDS, vocab)
        names = torch.rand(shape).argsort(-1)[..., :count].int()
        values = -torch.rand(self.batch, rows, count).cumsum(-1) - 0.1
        return names.to(self.device), values.to(self.device)

    def passes(self, harvest: bool = True) -> Any:
        """Runs the draft's passes of a step. Returns the finished trees, or None without harvest."""
        if self.growth is None:
            return device_state.Trees.roots(self.sequences)
        self.growth.begin()
        for number, proposed in enumerate(self.proposed):
            self.growth.batch(number)
            self.growth.record(*proposed)
        return self.growth.harvest() if harvest else None

    def likely(self, trees: Any) -> torch.Tensor:
        """int32 [B, N]: the choices of a target that follows one path of each tree of `passes` to its end."""
        tokens, parents = trees.tree[0].cpu(), trees.tree[1].cpu()
        chosen = torch.zeros_like(tokens)
        for row in range(self.batch):
            for node in range(1, self.nodes):
                if parents[row, node] >= 0:
                    chosen[row, parents[row, node]] = tokens[row, node]
        return chosen.to(self.device)


@dataclass
class CompactWorkload:
    """KV compaction: an accepted path of `count` tree rows in each sequence is moved in the cache of a model."""

    shape: ModelShape
    batch: int
    nodes: int
    context: int
    count: int
    device: torch.device

    def __post_init__(self) -> None:
        shape = self.shape
        rows = self.nodes + self.context + self.count
        self.cache = randn(shape.layers, self.batch, rows, 2, shape.heads, shape.head_size, device=self.device)
        self.ops = TritonBackend()
        sources = torch.arange(self.count, dtype=torch.int32) * max(1, (self.nodes - 1) // self.count)
        moves = torch.stack((sources, torch.arange(self.count, dtype=torch.int32) + self.context))
        self.moves = moves[:, None].expand(-1, self.batch, -1).contiguous().to(self.device)

    def compact(self) -> None:
        self.ops.move_rows(self.cache, self.nodes, self.moves)
