"""The Triton backend: every operation as a Triton kernel, with a generation's state on the device (state/device.py).

One object serves the models of one decoder. It owns the buffers that a step's operations write into, one for each
operation and width. After the first step nothing is allocated and nothing is read back, so a step can be captured as a
CUDA graph. Operations run one after the other on one stream: passes, layers and models share the buffers of one width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from threading import RLock
from typing import Any, cast

import torch

from stagedspec.kernels import choose as choice
from stagedspec.kernels import compact, embed, grow_tree, linear, lm_head, reference
from stagedspec.kernels import tree_attention as attention
from stagedspec.kernels.backends.cuda_graph import Captured
from stagedspec.kernels.backends.memory import Memory
from stagedspec.kernels.common import compiling
from stagedspec.kernels.common.constants import MAX_HEAD_SIZE
from stagedspec.kernels.common.inputs import ModelConfig, NgramTable, TreeSettings
from stagedspec.kernels.common.timing import Overheads, Stopwatch
from stagedspec.kernels.state import device as state
from stagedspec.kernels.state.host import GREEDY_SHARPNESS
from stagedspec.kernels.tree_attention.op import WINDOW

ROWS = linear.MAX_TOKENS  # of one launch of a linear layer


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] and bias [out], contiguous. folded: the `linear.Folded` of both and the LayerNorm before them,
    if there is one."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    folded: linear.Folded | None = None


@dataclass(frozen=True)
class Head:
    """A weight [V, width], or what `lm_head.to_eight_bits` made of it."""

    weight: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class NoiseAt:
    """Counters of the noise at every node of a pass: seeds int64, streams int32 [B], positions int32 [B, N]."""

    seeds: torch.Tensor
    streams: torch.Tensor
    positions: torch.Tensor

    def at_nodes(self, nodes: torch.Tensor) -> "NoiseAt":
        """The counters at one node of each row: nodes int64 [B]."""
        return replace(self, positions=self.positions.gather(1, nodes[:, None]))


class Noise:
    """The Gumbel noise as counters, a seed and a stream for each row: kernels compute each value where they need it."""

    def __init__(self, seeds: list[int], streams: list[int], device: torch.device):
        self.seeds = torch.empty(len(seeds), dtype=torch.int64, device=device)
        self.streams = torch.empty(len(streams), dtype=torch.int32, device=device)
        self.restart(seeds, streams)

    @torch.inference_mode()
    def restart(self, seeds: list[int], streams: list[int]) -> None:
        """Begins another generation in the same tensors."""
        self.seeds.copy_(torch.tensor(seeds, dtype=torch.int64, device="cpu"))
        self.streams.copy_(torch.tensor(streams, dtype=torch.int32, device="cpu"))

    def advance(self, sequences: state.Sequences) -> None:
        """Nothing is made ahead."""

    def at(self, batch: state.Batch) -> NoiseAt:
        return NoiseAt(self.seeds, self.streams, batch.noise_positions)


class TritonBackend:
    """Satisfies `interface.Backend`, which documents every member, and `AdaptiveBackend` and `CompilingBackend`."""

    name = "triton"
    max_head_size = MAX_HEAD_SIZE
    max_depth = WINDOW - 2  # the draft's pass begins one token above the root
    timed_rows: tuple[int, ...] = (1, 16, 32, 64)  # few: each number of rows has kernels of its own to compile
    # On an H200 (bench/README.md): the kernels of tree growth, verification and commit, and the launch of a graph.
    overheads = Overheads(step=2.5e-5, node=0.0, drafting=0.0, draft_pass=1e-5, row=0.0)

    # A step is a CUDA graph, one for each tree: its passes and its tensors never change.
    skips_passes = False
    adapts_trees = True
    # It could: a graph reads the state of a row from memory that stays. Nothing resets that of a single row yet.
    replaces_rows = False
    keeps_generations = True
    times_phases = False
    compiles_kernels = True

    def __init__(self) -> None:
        self.memory = Memory()
        self.lock: AbstractContextManager[Any] = RLock()  # whatever uses this object shares its buffers

    def check_tree(self, tree: TreeSettings, table: NgramTable | None = None) -> None:
        if tree.depth > self.max_depth:
            raise ValueError(
                f"a tree of this backend can be at most {self.max_depth} deep, got depth {tree.depth}; lower it, or "
                "use backend='torch'"
            )
        rows = max(2, tree.width) + tree.guesses
        if rows > attention.MAX_NODES:
            raise ValueError(
                f"a draft pass of this backend takes at most {attention.MAX_NODES} nodes, got {rows}: the width "
                f"{tree.width} and {tree.guesses} guesses; lower them, or use backend='torch'"
            )
        grow_tree.check_candidates("tree", tree)
        grow_tree.check_options("tree", tree, table)

    def release(self) -> None:
        """Drops buffers and scratch. Graphs over them keep theirs; the next operation makes new ones."""
        with self.lock:
            self.memory = Memory()

    # ---------------------------------------------------------------- steps

    def repeated(self, part: Callable) -> Callable:
        """A CUDA graph, made when it first runs."""
        return Captured(part, self)

    def prepare(self, calls: Iterable[tuple[Callable, tuple]], device: torch.device) -> int:
        """Makes the buffers of the calls, too."""
        fresh = [(part, given) for part, given in calls if not (isinstance(part, Captured) and part.prepared)]
        if not fresh:
            return 0
        plain = ((part.part if isinstance(part, Captured) else part, given) for part, given in fresh)
        made = compiling.compile_ahead((partial(part, *given) for part, given in plain), device)
        for part, _ in fresh:
            if isinstance(part, Captured):
                part.memory = self.memory
        return made

    def capture(self, calls: Iterable[tuple[Callable, tuple]]) -> None:
        for part, given in calls:
            if isinstance(part, Captured):
                part.capture(*given)

    def seconds(self, run: Callable[[], object], device: torch.device) -> float:
        watch = Stopwatch(device)
        watch.start()
        run()
        watch.stop()
        return watch.seconds

    # ---------------------------------------------------------------- state

    def make_sequences(
        self,
        prompts: list[list[int]],
        new_tokens: int | Sequence[int],
        eos: Sequence[int],
        device: torch.device,
        most: int = 1,
    ) -> state.Sequences:
        return state.Sequences(prompts, new_tokens, eos, device, most)

    def make_noise(
        self,
        seeds: list[int],
        streams: list[int],
        vocab_size: int,
        reach: int,
        limits: list[int],
        device: torch.device,
        past: int = 0,
    ) -> Noise:
        return Noise(seeds, streams, device)

    def make_growth(
        self,
        sequences: state.Sequences,
        config: TreeSettings,
        table: NgramTable | None,
        noise: Noise | None,
        dtype: torch.dtype,
    ) -> state.Growth:
        return state.Growth(sequences, config, table, noise)

    def unread_pass(self, sequences: state.Sequences, count: int, tree_rows: int, dtype: torch.dtype) -> state.Unread:
        return state.Unread.before_last(sequences, count, tree_rows)

    def report(self, trees: state.Trees, moves: state.Moves) -> state.Report:
        return state.Report.of(trees, moves)

    def root_trees(self, sequences: state.Sequences) -> state.Trees:
        return state.Trees.roots(sequences)

    def lookup_trees(self, sequences: state.Sequences, depth: int) -> state.Trees:
        return state.Trees.lookup(sequences, depth)

    # ---------------------------------------------------------------- weights

    def kv_dtype(self, dtype: torch.dtype, device: torch.device, invariant: bool) -> torch.dtype:
        """As computed: the kernels sum over keys in one order, whatever else is in the pass."""
        return dtype

    def pack_linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        invariant: bool,
        norm: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Linear:
        """Folds the norm into weight and bias; makes the rows contiguous, as the kernels read them."""
        if norm is not None:
            folded = linear.Folded.of(*norm, weight, bias)
            return Linear(folded.weight, folded.bias, folded)
        return Linear(weight.contiguous(), None if bias is None else bias.contiguous())

    def head_dtype(self, dtype: torch.dtype, width: int, device: torch.device, invariant: bool) -> torch.dtype:
        """8 bits for a draft, whose precision cannot change the output, where they halve what its head must read."""
        narrow = not invariant and lm_head.eight_bits_run(dtype, width, device)
        return lm_head.EIGHT_BITS if narrow else dtype

    def pack_head(self, weight: torch.Tensor, invariant: bool) -> Head:
        if self.head_dtype(weight.dtype, weight.shape[1], weight.device, invariant) == lm_head.EIGHT_BITS:
            return Head(*lm_head.to_eight_bits(weight))
        return Head(weight.contiguous())

    def fused_activation(self, name: str) -> bool:
        return linear.activation_known(name)

    def compile_model(self, config: ModelConfig, weights: Mapping[str, torch.Tensor], scales: list[float]) -> None:
        """None: a draft is run as any model is, since its kernels are captured and cost no host time."""

    # ---------------------------------------------------------------- layers

    def norm_linear(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        epsilon: float,
        layer: Linear,
        activation: str | Callable = "none",
    ) -> torch.Tensor:
        outputs, inputs = layer.weight.shape
        name = activation if isinstance(activation, str) else "none"
        folded = cast(linear.Folded, layer.folded)  # `pack_linear` was given the norm
        out = self.memory.buffer("norm_linear", (x.shape[0], outputs), x.dtype, x.device)
        stats = self._stats(x)
        for rows, known, result in zip(x.split(ROWS), stats.split(ROWS), out.split(ROWS), strict=True):
            scratch = self.memory.scratch_of(linear.scratch_size(rows.shape[0], outputs, inputs), x.device)
            linear.norm_linear(rows, known, epsilon, folded, name, result, scratch)
        return out if isinstance(activation, str) else activation(out)

    def linear_add(self, x: torch.Tensor, layer: Linear, residual: torch.Tensor) -> torch.Tensor:
        """Adds in place: the residual stream of a pass is one buffer, the LayerNorm statistics of its rows another."""
        outputs, inputs = layer.weight.shape
        stats = self._stats(residual)
        for rows, known, result in zip(x.split(ROWS), stats.split(ROWS), residual.split(ROWS), strict=True):
            scratch = self.memory.scratch_of(linear.scratch_size(rows.shape[0], outputs, inputs), x.device)
            linear.linear_add(rows, layer.weight, layer.bias, result, result, known, scratch)
        return residual

    def _stats(self, x: torch.Tensor) -> torch.Tensor:
        """LayerNorm statistics of the residual stream: `embed` and `linear_add` write, `norm_linear` reads them."""
        return self.memory.buffer("stats", (x.shape[0], linear.stat_tiles(x.shape[1]), 2), torch.float32, x.device)

    def embed(
        self,
        token_table: torch.Tensor,
        position_table: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        shape = (tokens.numel(), token_table.shape[1])
        out = self.memory.buffer("embed", shape, token_table.dtype, token_table.device)
        embed.embed(token_table, position_table, tokens, positions, out, self._stats(out))
        return out

    # ---------------------------------------------------------------- attention

    def prefill_batch(self, tokens: torch.Tensor, start: int, kv_dtype: torch.dtype) -> state.Batch:
        rows, nodes = tokens.shape
        batch = state.Batch.chain(rows, nodes, tokens.device)
        batch.tokens.copy_(tokens)
        batch.begin(start)
        return batch

    def timed_batch(self, tokens: torch.Tensor, context: int, kv_dtype: torch.dtype) -> tuple[state.Batch, int]:
        """A root and its children."""
        rows, nodes = tokens.shape
        batch = state.Batch.chain(rows, nodes, tokens.device)
        star = torch.eye(nodes, dtype=torch.bool, device=tokens.device)
        star[:, 0] = True
        batch.masks.copy_(attention.mask_words(star))
        batch.tokens.copy_(tokens)
        batch.begin(context)
        batch.positions.clamp_(max=context + 1)
        return batch, nodes

    def layer_views(
        self, cache: torch.Tensor, tree_rows: int, batch: state.Batch, write: int, first: int
    ) -> Iterator[tuple[torch.Tensor, int, bool]]:
        """For each layer: its part of the cache, tree_rows, and whether the pass is a chunk of a prompt."""
        return ((layer, tree_rows, write >= tree_rows) for layer in cache.unbind(0))

    def tree_attention(
        self,
        qkv: torch.Tensor,
        view: tuple[torch.Tensor, int, bool],
        batch: state.Batch,
        scale: float,
        upcast: bool,
    ) -> torch.Tensor:
        cache, tree_rows, chunk = view
        rows, _, kv_heads, size = cache.shape[1:]
        heads = qkv.shape[1] // size - 2 * kv_heads
        out = self.memory.buffer("tree_attention", (qkv.shape[0], heads * size), qkv.dtype, qkv.device)
        need = (
            (0, 0)
            if chunk
            else attention.scratch_size(cache.shape[0], batch.nodes, heads, kv_heads, size, rows, tree_rows)
        )
        scratch = self.memory.scratch_of(need, qkv.device)
        attention.tree_attention(
            qkv, cache, batch.masks, batch.prefix, batch.first_bit, chunk, tree_rows, scale, out, scratch, WINDOW,
            settled=True,  # since `embed`
        )  # fmt: skip
        return out

    # ---------------------------------------------------------------- token choice

    def head_logits(
        self, x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, epsilon: float, head: Head
    ) -> torch.Tensor:
        """Logits in a new tensor."""
        rows, vocab_size = x.flatten(0, -2), head.weight.shape[0]
        count, width = rows.shape
        out = torch.empty(count, vocab_size, dtype=torch.float32, device=x.device)
        need = lm_head.scratch_size(count, vocab_size, width, through_memory=False)
        best = self.memory.buffer("best", (count,), torch.int32, x.device)
        lm_head.lm_head_choose(
            rows, norm_weight, norm_bias, epsilon, head.weight, *self._counters((1, count), None, x.device),
            scales=head.scales, greedy=True, logits=out, out=best, scratch=self.memory.scratch_of(need, x.device),
        )  # fmt: skip
        return out.unflatten(0, x.shape[:-1])

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, warping: dict | None, noise: NoiseAt | None) -> torch.Tensor:
        shape, device = logits.shape[:2], logits.device
        out = self.memory.buffer("choose", shape, torch.int32, device)
        choice.choose(
            logits.flatten(0, 1).float().contiguous(), *self._counters(shape, noise, device),
            **warping_settings(warping), out=out.view(-1),
            scratch=self.memory.scratch_of(choice.scratch_size(out.numel(), logits.shape[-1]), device),
        )  # fmt: skip
        return out

    warp = staticmethod(reference.warp)

    def lm_head_choose(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        epsilon: float,
        head: Head,
        warping: dict | None,
        noise: NoiseAt | None,
    ) -> torch.Tensor:
        shape, device = x.shape[:2], x.device
        out = self.memory.buffer("choose", shape, torch.int32, device)
        settings, vocab_size, width = warping_settings(warping), head.weight.shape[0], x.shape[-1]
        through_memory = warping is not None and choice.warped(
            False, settings["top_k"], settings["top_p"], settings["min_p"], vocab_size
        )
        need = lm_head.scratch_size(out.numel(), vocab_size, width, through_memory)
        lm_head.lm_head_choose(
            x.view(-1, x.shape[-1]), norm_weight, norm_bias, epsilon, head.weight,
            *self._counters(shape, noise, device), scales=head.scales, **settings, out=out.view(-1),
            scratch=self.memory.scratch_of(need, device),
        )  # fmt: skip
        return out

    def lm_head_children(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        epsilon: float,
        head: Head,
        count: int,
        warping: dict | None,
        noise: NoiseAt | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape, device = (*x.shape[:2], count), x.device
        tokens = self.memory.buffer("children", shape, torch.int32, device)
        logprobs = self.memory.buffer("logprobs", shape, torch.float32, device)
        # Without noise, as in a prompt, the likeliest children are those of greedy decoding.
        settings = warping_settings(None if noise is None else warping)
        need = lm_head.scratch_size(x.shape[:2].numel(), head.weight.shape[0], x.shape[-1])
        lm_head.lm_head_topm(
            x.view(-1, x.shape[-1]), norm_weight, norm_bias, epsilon, head.weight,
            *self._counters(shape[:2], noise, device), scales=head.scales, **settings, sharpness=GREEDY_SHARPNESS,
            out_tokens=tokens.view(-1, count), out_logprobs=logprobs.view(-1, count),
            scratch=self.memory.scratch_of(need, device),
        )  # fmt: skip
        return tokens, logprobs

    def _counters(
        self, shape: tuple[int, ...], noise: NoiseAt | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Seeds, streams and positions of the noise; unused placeholders in greedy mode."""
        if noise is not None:
            return noise.seeds, noise.streams, noise.positions
        return (
            self.memory.buffer("no seeds", (shape[0],), torch.int64, device),
            self.memory.buffer("no streams", (shape[0],), torch.int32, device),
            self.memory.buffer("no positions", tuple(shape), torch.int32, device),
        )

    # ---------------------------------------------------------------- KV cache

    def move_rows(self, cache: torch.Tensor, tree_rows: int, moves: torch.Tensor) -> None:
        """moves: int32 [2, B, K], tree rows and the positions that they move to."""
        sources, positions = moves.unbind(0)
        compact.compact(cache, sources, positions, tree_rows)


def warping_settings(warping: dict | None) -> dict:
    """`Sampling.warping` as arguments of the kernels."""
    if warping is None:
        return {"greedy": True}
    top_p = warping["top_p"]
    return {
        "temperature": warping["temperature"],
        "top_k": min(warping["top_k"] or 0, 1 << 31),  # beyond any vocabulary; an operation's integers have 64 bits
        "top_p": 1.0 if top_p is None else top_p,
        "min_p": warping["min_p"] or 0.0,
    }
