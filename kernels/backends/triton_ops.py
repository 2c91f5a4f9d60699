"""The Triton backend: the interface of reference.py on our kernels, with a step's state on the device.

An instance serves the models of one decoder. It owns the buffers that a step's operations write into, one for each
operation and width: after the first step nothing is allocated, nothing is read back, and the step can be captured as a
CUDA graph. Operations run in turn on one stream, so buffers of one width are shared between passes, layers and models.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from threading import Lock, RLock

import torch

from stagedspec.kernels import choose as choice
from stagedspec.kernels import compact, embed, grow_tree, linear, lm_head
from stagedspec.kernels import tree_attention as attention
from stagedspec.kernels.backends import torch_ops as reference
from stagedspec.kernels.backends.torch_ops import GREEDY_SHARPNESS
from stagedspec.kernels.common import compiling, registry
from stagedspec.kernels.common.limits import MAX_HEAD_SIZE
from stagedspec.kernels.common.timing import Overheads
from stagedspec.kernels.state import device

ROWS = linear.MAX_TOKENS  # the most rows that one launch of a linear takes
# Keys nearer than this are gathered node by node, so that it does not matter whether they are committed. A constant:
# it fixes the order of every sum, so it must be the same for every tree that a decoder may use.
WINDOW = 32


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] and bias [out], contiguous. folded: what they are with the LayerNorm before them."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    folded: linear.Folded | None = None


@dataclass(frozen=True)
class NoiseAt:
    """The counters of the noise of every node of a pass: seeds, streams [B], positions [B, N]."""

    seeds: torch.Tensor
    streams: torch.Tensor
    positions: torch.Tensor

    def at_nodes(self, nodes: torch.Tensor) -> "NoiseAt":
        """Of one node [B] of each row."""
        return replace(self, positions=self.positions.gather(1, nodes[:, None]))


class Noise:
    """The Gumbel noise as counters: kernels make each value where they need it. Arguments as in reference.Noise."""

    def __init__(
        self,
        seeds: list[int],
        streams: list[int],
        vocab_size: int,
        reach: int,
        limits: list[int],
        device: torch.device,
        past: int = 0,
    ):
        self.seeds = torch.empty(len(seeds), dtype=torch.int64, device=device)
        self.streams = torch.empty(len(streams), dtype=torch.int32, device=device)
        self.restart(seeds, streams)

    @torch.inference_mode()
    def restart(self, seeds: list[int], streams: list[int]) -> None:
        """Another generation's noise, in place."""
        self.seeds.copy_(torch.tensor(seeds, dtype=torch.int64, device="cpu"))
        self.streams.copy_(torch.tensor(streams, dtype=torch.int32, device="cpu"))

    def advance(self, sequences) -> None:
        """Nothing is made ahead."""

    def at(self, batch: device.Batch) -> NoiseAt:
        return NoiseAt(self.seeds, self.streams, batch.noise_positions)


class TritonOps:
    """See reference.py for what each operation computes."""

    Batch, Sequences, Growth, Trees, Moves = (
        device.Batch,
        device.Sequences,
        device.Growth,
        device.Trees,
        device.Moves,
    )
    Noise, NoiseAt = Noise, NoiseAt
    name = "triton"
    max_head_size = MAX_HEAD_SIZE
    max_depth = WINDOW - 2  # the draft's pass begins one token above the root
    fixed_shapes = True
    timed_rows = (1, 16, 64)  # of the passes that the cost model measures: each has kernels of its own to compile
    # The kernels of tree growth, verification and commit on an H200 (bench/README.md), and a graph's launch.
    overheads = Overheads(step=2.5e-5, node=0.0, drafting=0.0, draft_pass=1e-5, row=0.0)

    def check_tree(self, tree, table=None) -> None:
        """Raises ValueError for a `TreeConfig` that the kernels cannot grow, with the n-gram table, or verify."""
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

    def __init__(self) -> None:
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._scratch: registry.Scratch | None = None
        self.lock = RLock()  # of a step: all decoders of an instance share its buffers

    # ---------------------------------------------------------------- memory

    def _buffer(self, op: str, shape: tuple[int, ...], dtype: torch.dtype, place: torch.device) -> torch.Tensor:
        """The first rows of a buffer that is as long as the longest that was asked for."""
        key = (op, shape[1:], dtype, place)
        held = self._buffers.get(key)
        if held is None or held.shape[0] < shape[0]:
            held = self._buffers[key] = torch.empty(shape, dtype=dtype, device=place)
        return held[: shape[0]]

    def _need(self, size: tuple[int, int], place: torch.device) -> registry.Scratch:
        """Scratch of at least `size`; grows in the first step alone."""
        held = self._scratch
        if held is None or held.partials.numel() < size[0] or held.counters.numel() < size[1]:
            sizes = [size] if held is None else [size, (held.partials.numel(), held.counters.numel())]
            self._scratch = registry.Scratch.of(sizes, place)
        return self._scratch

    def release(self) -> None:
        """Lets go of all of it. Graphs that use it hold on to it; what comes next makes its own."""
        with self.lock:
            self._buffers, self._scratch = {}, None

    # ---------------------------------------------------------------- steps

    def repeated(self, part: Callable) -> Callable:
        """On a GPU it becomes a CUDA graph when it first runs."""
        return _Captured(part, self)

    def prepare(self, calls: Iterable[tuple[Callable, tuple]], place: torch.device) -> int:
        """Makes the buffers and compiles the kernels, in parallel, of calls (part, arguments) that are to come; returns
        how many kernels were new."""
        fresh = [(part, given) for part, given in calls if not getattr(part, "prepared", False)]
        if not fresh:
            return 0
        made = compiling.compile_ahead((partial(getattr(part, "part", part), *given) for part, given in fresh), place)
        for part, _ in fresh:
            if hasattr(part, "part"):
                part.buffers = self._buffers
        return made

    def seconds(self, run: Callable[[], object], place: torch.device) -> float:
        """What the device takes for what `run` launches."""
        watch = device.Stopwatch(place)
        watch.start()
        run()
        watch.stop()
        return watch.seconds

    # ---------------------------------------------------------------- weights

    def kv_dtype(self, dtype: torch.dtype, place: torch.device, invariant: bool) -> torch.dtype:
        """Keys and values are kept as computed: every sum over them has one order."""
        return dtype

    def pack_linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        invariant: bool,
        norm: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Linear:
        """Rows of the weight [out, in] contiguous, as the kernels stream them, with the norm folded in."""
        if norm is not None:
            folded = linear.Folded.of(*norm, weight, bias)
            return Linear(folded.weight, folded.bias, folded)
        return Linear(weight.contiguous(), None if bias is None else bias.contiguous())

    def fused_activation(self, name: str) -> bool:
        return linear.activation_known(name)

    def small_model(self, config, weights: dict[str, torch.Tensor], scales: list[float]) -> None:
        """A draft is run as any model is: its kernels are captured, and cost no host time."""

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
        """Of a layer that was packed with this norm."""
        outputs, inputs = layer.weight.shape
        name = activation if isinstance(activation, str) else "none"
        out = self._buffer("norm_linear", (x.shape[0], outputs), x.dtype, x.device)
        stats = self._stats(x)
        for rows, known, result in zip(x.split(ROWS), stats.split(ROWS), out.split(ROWS), strict=True):
            scratch = self._need(linear.scratch_size(rows.shape[0], outputs, inputs), x.device)
            linear.norm_linear(rows, known, epsilon, layer.folded, name, result, scratch)
        return out if isinstance(activation, str) else activation(out)

    def linear_add(self, x: torch.Tensor, layer: Linear, residual: torch.Tensor) -> torch.Tensor:
        """Adds in place: the residual stream of a pass is one buffer, and the statistics of its rows another."""
        outputs, inputs = layer.weight.shape
        stats = self._stats(residual)
        for rows, known, result in zip(x.split(ROWS), stats.split(ROWS), residual.split(ROWS), strict=True):
            scratch = self._need(linear.scratch_size(rows.shape[0], outputs, inputs), x.device)
            linear.linear_add(rows, layer.weight, layer.bias, result, result, known, scratch)
        return residual

    def _stats(self, x: torch.Tensor) -> torch.Tensor:
        """The statistics of a residual stream's rows: written by `embed` and `linear_add`, read by `norm_linear`."""
        return self._buffer("stats", (x.shape[0], linear.stat_tiles(x.shape[1]), 2), torch.float32, x.device)

    def embed(
        self,
        token_table: torch.Tensor,
        position_table: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        shape = (tokens.numel(), token_table.shape[1])
        out = self._buffer("embed", shape, token_table.dtype, token_table.device)
        embed.embed(token_table, position_table, tokens, positions, out)
        linear.row_stats(out, self._stats(out))
        return out

    # ---------------------------------------------------------------- attention

    def prefill_batch(self, tokens: torch.Tensor, start: int, kv_dtype: torch.dtype) -> device.Batch:
        """The pass over a chunk of prompts: a chain after `start` committed tokens."""
        batch = device.Batch.chain(*tokens.shape, tokens.device)
        batch.tokens.copy_(tokens)
        batch.begin(start)
        return batch

    def timed_batch(self, tokens: torch.Tensor, context: int, kv_dtype: torch.dtype) -> tuple[device.Batch, int]:
        """A pass over a root and its children [B, N] after `context` tokens, and the tree rows that it needs."""
        rows, nodes = tokens.shape
        batch = device.Batch.chain(rows, nodes, tokens.device)
        star = torch.eye(nodes, dtype=torch.bool, device=tokens.device)
        star[:, 0] = True
        batch.masks.copy_(attention.mask_words(star))
        batch.tokens.copy_(tokens)
        batch.begin(context)
        batch.positions.clamp_(max=context + 1)
        return batch, nodes

    def layer_views(
        self, cache: torch.Tensor, tree_rows: int, batch: device.Batch, write: int, first: int
    ) -> Iterator[tuple[torch.Tensor, int, bool]]:
        """For each layer: its part of the cache, rows of the tree region, and whether this is a chunk of a prompt."""
        return ((layer, tree_rows, write >= tree_rows) for layer in cache.unbind(0))

    def tree_attention(
        self,
        qkv: torch.Tensor,
        view: tuple[torch.Tensor, int, bool],
        batch: device.Batch,
        scale: float,
        upcast: bool,
    ) -> torch.Tensor:
        cache, tree_rows, chunk = view
        rows, _, kv_heads, size = cache.shape[1:]
        heads = qkv.shape[1] // size - 2 * kv_heads
        out = self._buffer("tree_attention", (qkv.shape[0], heads * size), qkv.dtype, qkv.device)
        need = (
            (0, 0)
            if chunk
            else attention.scratch_size(cache.shape[0], batch.nodes, heads, kv_heads, size, rows, tree_rows)
        )
        scratch = self._need(need, qkv.device)
        attention.tree_attention(
            qkv, cache, batch.masks, batch.prefix, batch.first_bit, chunk, tree_rows, scale, out, scratch, WINDOW
        )
        return out

    # ---------------------------------------------------------------- token choice

    def head_logits(
        self, x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, epsilon: float, head: Linear
    ) -> torch.Tensor:
        """fp32 logits [..., V] in a tensor of their own: of the bits that `lm_head_choose` chooses by."""
        rows = x.flatten(0, -2)
        out = torch.empty(rows.shape[0], head.weight.shape[0], dtype=torch.float32, device=x.device)
        best = self._buffer("best", rows.shape[:1], torch.int32, x.device)
        lm_head.lm_head_choose(
            rows, norm_weight, norm_bias, epsilon, head.weight, *self._counters((1, rows.shape[0]), None, x.device),
            greedy=True, logits=out, out=best,
            scratch=self._need(lm_head.scratch_size(*rows.shape[:1], *head.weight.shape, False), x.device),
        )  # fmt: skip
        return out.unflatten(0, x.shape[:-1])

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, warping: dict | None, noise: NoiseAt | None) -> torch.Tensor:
        """Of logits [B, N, V] at hand, as `lm_head_choose` of its own: tokens [B, N]."""
        shape, place = logits.shape[:2], logits.device
        out = self._buffer("choose", shape, torch.int32, place)
        choice.choose(
            logits.flatten(0, 1).float().contiguous(), *self._counters(shape, noise, place),
            **warping_settings(warping), out=out.view(-1),
            scratch=self._need(choice.scratch_size(out.numel(), logits.shape[-1]), place),
        )  # fmt: skip
        return out

    warp = staticmethod(reference.warp)

    def lm_head_choose(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        epsilon: float,
        head: Linear,
        warping: dict | None,
        noise: NoiseAt | None,
    ) -> torch.Tensor:
        shape, place = x.shape[:2], x.device
        out = self._buffer("choose", shape, torch.int32, place)
        settings = warping_settings(warping)
        through_memory = warping is not None and choice.warped(
            False, settings["top_k"], settings["top_p"], settings["min_p"], head.weight.shape[0]
        )
        need = lm_head.scratch_size(out.numel(), *head.weight.shape, through_memory)
        lm_head.lm_head_choose(
            x.view(-1, x.shape[-1]), norm_weight, norm_bias, epsilon, head.weight, *self._counters(shape, noise, place),
            **settings, out=out.view(-1), scratch=self._need(need, place),
        )  # fmt: skip
        return out

    def lm_head_children(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        epsilon: float,
        head: Linear,
        count: int,
        warping: dict | None,
        noise: NoiseAt | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape, place = (*x.shape[:2], count), x.device
        tokens = self._buffer("children", shape, torch.int32, place)
        logprobs = self._buffer("logprobs", shape, torch.float32, place)
        need = lm_head.scratch_size(x.shape[:2].numel(), *head.weight.shape)
        lm_head.lm_head_topm(
            x.view(-1, x.shape[-1]), norm_weight, norm_bias, epsilon, head.weight,
            *self._counters(shape[:2], noise, place), **warping_settings(warping), sharpness=GREEDY_SHARPNESS,
            out_tokens=tokens.view(-1, count), out_logprobs=logprobs.view(-1, count),
            scratch=self._need(need, place),
        )  # fmt: skip
        return tokens, logprobs

    def _counters(
        self, shape: tuple[int, int], noise: NoiseAt | None, place: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Seeds, streams and positions; of no account, but there, when greedy."""
        if noise is not None:
            return noise.seeds, noise.streams, noise.positions
        return (
            self._buffer("no seeds", (shape[0],), torch.int64, place),
            self._buffer("no streams", (shape[0],), torch.int32, place),
            self._buffer("no positions", tuple(shape), torch.int32, place),
        )

    # ---------------------------------------------------------------- KV cache

    def move_rows(self, cache: torch.Tensor, tree_rows: int, moves: torch.Tensor) -> None:
        """moves int32 [2, B, K]: tree rows, and the positions they move to."""
        compact.compact(cache, *moves.unbind(0), tree_rows)


def warping_settings(warping: dict | None) -> dict:
    """`Sampling.warping` as the kernels take it."""
    if warping is None:
        return {"greedy": True}
    top_p = warping["top_p"]
    return {
        "temperature": warping["temperature"],
        "top_k": min(warping["top_k"] or 0, 1 << 31),  # beyond any vocabulary; an operation's integers have 64 bits
        "top_p": 1.0 if top_p is None else top_p,
        "min_p": warping["min_p"] or 0.0,
    }


_CAPTURING = Lock()  # torch allows one capture at a time in a process


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """The stream of a GPU that steps are captured on. torch hands out streams in turn, and a launch by whoever else has
    the same one would end up in the graph: this one is of those with priority, which are seldom asked for."""
    return torch.cuda.Stream(index, priority=-1)


@contextmanager
def _alone() -> Iterator[None]:
    """Keeps Python from collecting garbage meanwhile: a CUDA graph that is destroyed would spoil the capture."""
    with _CAPTURING:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


class _Captured:
    """A step, or a part of one, as a CUDA graph. The first call captures it, and before that compiles its kernels and
    makes its buffers if `TritonOps.prepare` has not. What it is given and what it returns are the same tensors at every
    call, and numbers that it is given change nothing that it launches. In the interpreter it just runs."""

    def __init__(self, part: Callable, ops: TritonOps):
        self.part, self.ops = part, ops
        self.graph: torch.cuda.CUDAGraph | None = None
        self.buffers: dict | None = None  # the backend's, when it was prepared
        self.value = None

    @property
    def prepared(self) -> bool:
        """Whether its kernels are compiled and its buffers are there: none may be made while it is captured."""
        return self.graph is not None or self.buffers is self.ops._buffers

    def __call__(self, *given):
        if registry.interpreted():
            return self.part(*given)
        self.capture(*given)
        self.graph.replay()
        return self.value

    def capture(self, *given) -> None:
        """Makes the graph, if there is none; nothing that it launches runs."""
        if self.graph is not None or registry.interpreted():
            return
        self.ops.prepare([(self, given)], torch.device("cuda", torch.cuda.current_device()))
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls could spoil it: others may go on decoding, or whatever they do on the GPU. What torch
        # itself makes for its first graph is shared by all: it must not be bound to inference mode.
        stream = _capture_stream(torch.cuda.current_device())
        captured = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with _alone(), torch.inference_mode(False), captured, torch.inference_mode():
            self.value = self.part(*given)
        # The graph reads and writes through addresses: what lies there must outlive it.
        self.graph, self.held = graph, (self.ops._scratch, dict(self.ops._buffers))
