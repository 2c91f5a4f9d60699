"""What a backend offers the decoder: operations of a model pass, state of a generation, and what it may leave out.

The decoder (`stagedspec.decoding`, `models`, `planning`) calls nothing else of a backend. Two classes satisfy
`Backend`: `TorchBackend` (torch_backend.py; state on the host, kernels/state/host.py) and `TritonBackend`
(triton_backend.py; state on the device, kernels/state/device.py). `select.resolve` chooses one when a decoder is made.

Letters: B batch, N nodes of a pass, M = B*N rows, d model width, H heads, D head size, V vocabulary, L layers,
S rows of a KV cache, C children of a node. A KV cache [L, B, S, 2, H, D] begins with `tree_rows` rows for tree nodes;
the token at position p lies in row tree_rows + p.

A step calls, in this order (`*` once a draft pass):

    Noise.advance
    Growth.begin, *batch, *record, harvest -> Trees      (or root_trees, or lookup_trees)
    Trees.batch, the target's pass, lm_head_choose
    Trees.verify_commit -> Moves, move_rows (target, draft)
    report (where trees adapt), Sequences.publish, Sequences.finished

A backend may leave out what belongs to a capability that it does not have. Each is a bool of `Backend`:

    capability           without it
    skips_passes         `Growth.pays` is always True and `TreeConfig.pass_floor` has no effect; a step verifies as many
                         nodes as its tree may have, so `TreeConfig.node_floor` saves no time
    adapts_trees         `AdaptiveBackend` is left out; every step uses one tree
    replaces_rows        `ReplaceableSequences` and `ReplaceableNoise` are left out; a row that has ended waits for the
                         others
    keeps_generations    `ReusableSequences` and `ReusableNoise` are left out; every generation makes its own state
    times_phases         of the phases of a step, the statistics have the time of prefill alone
    compiles_kernels     `CompilingBackend` is left out; there is nothing to warm up (`Decoder.warm_up`) or to check
                         (`stagedspec check`)

`compile_model` may return None, for some models or for all. A backend whose `compile_model` never returns anything else
leaves out `ModelCompiler`. `repeated` may return the function itself in place of a `Captured`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import torch

from stagedspec.kernels.common.inputs import ModelConfig, NgramTable, TreeSettings
from stagedspec.kernels.common.timing import Overheads

# An object of a class of the backend's own. Whoever calls the backend only hands it back.
Own: TypeAlias = Any


# ---------------------------------------------------------------- state of a generation


class Row(Protocol):
    """One sequence of the batch, as the host sees it.

    tokens: the prompt and all committed tokens; origins: who first proposed each new token (TARGET, DRAFT or
    NGRAM of common/constants.py); limit: the length at which the row ends; running: whether it has not ended.
    """

    @property
    def tokens(self) -> list[int]: ...

    @property
    def origins(self) -> list[int]: ...

    @property
    def limit(self) -> int: ...

    @property
    def running(self) -> bool: ...


class Batch(Protocol):
    """Inputs of one model pass. tokens, positions: integers [B, N]. How it stores attention masks is up to the backend.

    A backend may reuse the tensors for the next pass of that kind, so they are valid until that pass is requested.
    """

    @property
    def tokens(self) -> torch.Tensor: ...

    @property
    def positions(self) -> torch.Tensor: ...


class Sequences(Protocol):
    """The committed tokens of a batch, and when each row stops."""

    @property
    def capacity(self) -> int:
        """The most tokens that a row may hold."""

    @property
    def rows(self) -> Sequence[Row]:
        """The rows; a snapshot, for which a backend with state on a device waits."""

    @property
    def lengths(self) -> Own:
        """Committed tokens of each row [B]: a list, or a tensor on the device."""

    @property
    def longest(self) -> int:
        """No row has more tokens. A backend with state on a device may return how many they will ever be."""

    def chunks(self, count: int) -> list[tuple[int, int]]:
        """(start, size) of the passes that read the first `count` tokens of every row. The last may reach further."""

    def chunk(self, start: int, size: int, dtype: torch.dtype) -> Batch:
        """The pass over `size` tokens of every row after its first `start`. dtype: of keys and values (`kv_dtype`).
        Rows that are shorter are filled up."""

    def publish(self) -> None:
        """Must be called after every step, outside of what is captured: makes its results known to the host."""

    @property
    def finished(self) -> bool:
        """Whether all rows have stopped, or one cannot go on (`check`). May lag by one step: a step in which no row
        runs changes nothing."""

    def check(self) -> None:
        """Raises InvalidLogitsError if a row ended because no next token can be chosen."""

    def stop(self, index: int, length: int) -> None:
        """Ends row `index`; tokens beyond the first `length` are dropped."""

    @property
    def seconds_to_first_token(self) -> float | None:
        """Seconds from the beginning of the generation to the end of its first step; None before."""

    @property
    def steps(self) -> int:
        """Number of steps in which any row ran."""

    @property
    def accepted(self) -> list[Counter[int]]:
        """For each row, how many of its steps accepted so many tokens from nodes below the root."""


class ReusableSequences(Sequences, Protocol):
    """Sequences whose memory another generation can use. Only where `Backend.keeps_generations`."""

    @property
    def chunk_sizes(self) -> list[int]:
        """All sizes that `chunks` may return."""

    def fits(self, prompts: list[list[int]], new_tokens: int | Sequence[int], eos: Sequence[int]) -> bool:
        """Whether `restart` can take these arguments."""

    def restart(self, prompts: list[list[int]], new_tokens: int | Sequence[int], eos: Sequence[int]) -> None:
        """Begins another generation in the same tensors. Arguments as of `Backend.make_sequences`."""


class ReplaceableSequences(Sequences, Protocol):
    """Sequences in which another prompt can take the place of a row that has ended. Only where
    `Backend.replaces_rows`."""

    def replace(self, index: int, prompt: list[int], new_tokens: int) -> None:
        """Begins row `index` anew, between two steps. `capacity` tokens must be enough for it."""

    def remove(self, index: int) -> None:
        """Leaves row `index` out, between two steps, so that passes have one sequence less. The last row takes its
        place; at least one must be left."""


class NoiseAt(Protocol):
    """The Gumbel noise at the nodes of one pass."""

    def at_nodes(self, nodes: torch.Tensor) -> "NoiseAt":
        """The noise at one node of each row: nodes int64 [B]."""


class Noise(Protocol):
    """The Gumbel noise g(seed, stream, position, token) of a generation. It depends on these four numbers alone."""

    def advance(self, sequences: Own) -> None:
        """Makes the noise that a step after the committed tokens of `sequences` needs, if it is made ahead."""

    def at(self, batch: Own) -> NoiseAt:
        """The noise at the nodes of a pass: a node of depth n chooses the token n after the next one."""


class ReusableNoise(Noise, Protocol):
    """Noise whose memory another generation can use. Only where `Backend.keeps_generations`."""

    def restart(self, seeds: list[int], streams: list[int]) -> None:
        """Begins another generation in the same tensors. Arguments as of `Backend.make_noise`."""


class ReplaceableNoise(Noise, Protocol):
    """Noise of `ReplaceableSequences`. Only where `Backend.replaces_rows`."""

    def replace(self, index: int, seed: int, stream: int, start: int, limit: int) -> None:
        """Begins row `index` anew, whose prompt has `start` tokens. The rest as of `Backend.make_noise`."""

    def remove(self, index: int) -> None:
        """Leaves row `index` out; the last row takes its place."""


class Moves(Protocol):
    """What a step accepted, and the KV rows that must move into the prefix."""

    def target_rows(self, first: int) -> Own:
        """Moves of the target's cache, for `move_rows`. first: the tree row of node 0."""

    def draft_rows(self, first: int) -> Own:
        """Moves of the draft's cache, for `move_rows`. first: the tree row of the step's first slot."""


class Trees(Protocol):
    """The token trees of a batch, ready to be verified. Node 0 is the root: the last committed token."""

    @property
    def sequences(self) -> Sequences: ...

    @property
    def nodes(self) -> int:
        """Nodes of the largest tree: N of `batch`."""

    @property
    def children(self) -> list[dict[tuple[int, int], int]]:
        """For each row, (parent node, token) -> node. A backend with state on a device waits for it."""

    def batch(self, dtype: torch.dtype) -> Batch:
        """The target's pass over all nodes. dtype: of keys and values. Smaller trees are filled up with nodes that no
        node attends to."""

    def verify_commit(self, chosen: torch.Tensor) -> Moves:
        """Accepts the path of each tree along which every node is the token chosen at its parent, and appends the
        chosen tokens to the sequences.

        chosen: integers [B, N], the token chosen at each node; UNCHOSEN at nodes that must not be accepted; INVALID or
        NO_TOKEN where no token could be chosen (common/constants.py). A row stops at an end-of-sequence token and at
        its limit.
        """


class Growth(Protocol):
    """Grows the trees of a generation's steps from what the draft proposes, for one `TreeConfig`."""

    @property
    def start(self) -> int:
        """The first slot (row of the draft's tree region) of the pass under way."""

    def begin(self) -> None:
        """Starts the trees of a step."""

    def pays(self) -> bool:
        """Whether one more draft pass is worth its time (`TreeConfig.pass_floor`)."""

    def batch(self, number: int) -> Batch:
        """Chooses the most probable open nodes for draft pass `number`, from 0, and guesses of draft² (n-grams) below
        them; returns the pass over them."""

    def record(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Notes what the draft proposed: integers and fp32 [B, N of the pass, C], best first. They must stay as they
        are until the next `batch` or `harvest`."""

    def harvest(self) -> Trees:
        """The trees of the most probable proposals, of up to `TreeConfig.nodes` nodes."""


class Unread(Protocol):
    """A draft pass over committed tokens that the draft has not read, of N tokens a row.

    write, first: arguments of the pass (`GPT2.forward`); following: integers [B, N], the token after each; counted:
    bool [B, N], whether a token is one of those asked for, of a row that runs; moves: for `move_rows`, None where the
    pass writes keys and values in place.
    """

    @property
    def batch(self) -> Batch: ...

    @property
    def write(self) -> int: ...

    @property
    def first(self) -> int: ...

    @property
    def following(self) -> torch.Tensor: ...

    @property
    def counted(self) -> torch.Tensor: ...

    @property
    def moves(self) -> Own: ...


class Report(Protocol):
    """What a step did, for the host. From a device it is under way (`AdaptiveBackend.report`)."""

    @property
    def accepted(self) -> list[int]:
        """For each row, tokens accepted from nodes below the root; -1 for a row that had stopped."""

    @property
    def depths(self) -> list[int]:
        """For each row, the depth of its deepest node."""

    @property
    def left(self) -> list[int]:
        """For each row that runs, how many tokens it could still gain before the step."""


# ---------------------------------------------------------------- the backend


class CompiledModel(Protocol):
    """A model that a backend has compiled as a whole (`Backend.compile_model`). `ModelCompiler` runs it."""

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of its keys and values."""

    @property
    def digest(self) -> str:
        """Of the code that runs it: its pass times are kept under it."""


class Captured(Protocol):
    """A function whose calls replay a CUDA graph, made at the first one. Arguments and results must be the same tensors
    at every call."""

    @property
    def prepared(self) -> bool:
        """Whether all is compiled and allocated that `capture` needs (`Backend.prepare`)."""

    def __call__(self, *given: Any) -> Any: ...

    def capture(self, *given: Any) -> None:
        """Makes the graph, unless there is one, without running it."""


class Backend(Protocol):
    """The operations of one kind of device, and the makers of a generation's state.

    `noise` is a `NoiseAt` of the same backend, or None for greedy decoding; `warping` then is None too, else the
    arguments of `warp` by name. Results may lie in buffers that the next call of the same operation overwrites.
    """

    # "torch" or "triton": what `Decoder.backend` says.
    name: str
    # Limits: deepest tree, widest attention head.
    max_depth: int
    max_head_size: int
    # Held during a step: whatever steps of the same backend object share.
    lock: AbstractContextManager[Any]
    # For the cost model: host time of a step beside its passes, and the numbers of rows whose pass times are measured.
    overheads: Overheads
    timed_rows: tuple[int, ...]

    # ------------------------------------------------------------ capabilities

    # Draft passes that are not worth their time are left out.
    skips_passes: bool
    # The tree may change from step to step, by what was accepted so far.
    adapts_trees: bool
    # Between two steps another prompt can take the place of a row that has ended, or the row can be left out.
    replaces_rows: bool
    # State stays in place, so that the next generation can use it, with the CUDA graphs over it.
    keeps_generations: bool
    # The host sees when each phase of a step begins and ends: it is not replayed as a whole.
    times_phases: bool
    # Operations are kernels of this package, which are compiled before they first run.
    compiles_kernels: bool

    # ------------------------------------------------------------ running steps

    def check_tree(self, tree: TreeSettings, table: NgramTable | None = None) -> None:
        """Raises ValueError for a `TreeConfig` that cannot be grown, with this n-gram table, or verified."""

    def repeated(self, part: Callable) -> Callable:
        """A step, or a part of one, for being run many times: `part` itself, or a `Captured`."""

    def prepare(self, calls: Iterable[tuple[Callable, tuple]], device: torch.device) -> int:
        """Compiles, in parallel, the kernels of calls (function, arguments) that are to come, without running them.
        Returns how many kernels were new."""

    def seconds(self, run: Callable[[], object], device: torch.device) -> float:
        """Seconds that the device takes for `run`. Waits until it has ended."""

    def release(self) -> None:
        """Frees buffers that are kept between calls."""

    # ------------------------------------------------------------ state

    def make_sequences(
        self,
        prompts: list[list[int]],
        new_tokens: int | Sequence[int],
        eos: Sequence[int],
        device: torch.device,
        most: int = 1,
    ) -> Sequences:
        """State of a generation. prompts: token ids of each row; new_tokens: at most so many more, one number or one a
        row; eos: ids that end a row; most: tokens that a row may gain in one step."""

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
        """Noise of a generation: a seed and a stream of each row. reach: positions that a step needs; limits: for each
        row, the position from which on no token is chosen; past: positions that are kept behind the committed ones."""

    def make_growth(
        self, sequences: Own, config: TreeSettings, table: NgramTable | None, noise: Own, dtype: torch.dtype
    ) -> Growth:
        """Grows trees of the `TreeConfig` config. table: n-grams (`KatzTable`) or None; noise: of `make_noise`, or None
        when greedy; dtype: of the draft's keys and values."""

    def root_trees(self, sequences: Own) -> Trees:
        """Trees of a root alone: plain decoding."""

    def lookup_trees(self, sequences: Own, depth: int) -> Trees:
        """Chains of up to `depth` nodes, proposed by the context n-gram alone (prompt look-up)."""

    def prefill_batch(self, tokens: torch.Tensor, start: int, kv_dtype: torch.dtype) -> Batch:
        """The pass over a chunk of prompts, tokens int64 [B, N], after `start` committed ones."""

    def timed_batch(self, tokens: torch.Tensor, context: int, kv_dtype: torch.dtype) -> tuple[Batch, int]:
        """A pass over tokens [B, N] after `context` committed ones that takes as long as one over a tree, and the tree
        rows that it needs."""

    # ------------------------------------------------------------ weights

    def kv_dtype(self, dtype: torch.dtype, device: torch.device, invariant: bool) -> torch.dtype:
        """The dtype of keys and values of a model computed in `dtype`. invariant: as of `pack_linear`."""

    def head_dtype(self, dtype: torch.dtype, width: int, device: torch.device, invariant: bool) -> torch.dtype:
        """The dtype in which `pack_head` keeps the weights of a model computed in `dtype`."""

    def pack_linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        invariant: bool,
        norm: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Own:
        """Lays out a linear layer once, when a model is loaded: weight [out, in], bias [out].

        invariant: a row's result must not depend, in any bit, on the other rows of a pass; so it is for a target. norm:
        weight and bias [in] of the LayerNorm before it, if it will be used by `norm_linear`.
        """

    def pack_head(self, weight: torch.Tensor, invariant: bool) -> Own:
        """Lays out the head [V, width] for `head_logits`, `lm_head_choose` and `lm_head_children`, likewise."""

    def fused_activation(self, name: str) -> bool:
        """Whether `norm_linear` takes the activation by name; others are given as functions."""

    def compile_model(
        self, config: ModelConfig, weights: Mapping[str, torch.Tensor], scales: list[float]
    ) -> CompiledModel | None:
        """A model compiled as a whole, for `ModelCompiler`, or None where single operations serve it better.

        A row's result does not depend, in any bit, on the other rows of a pass. config: `GPT2Config`; weights: by their
        names in a `GPT2LMHeadModel`; scales: factors of each layer's attention scores.
        """

    # ------------------------------------------------------------ layers

    def embed(
        self,
        token_table: torch.Tensor,
        position_table: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Token plus position embedding [M, d] of tokens, positions [B, N]. Positions past the table use its last
        row."""

    def norm_linear(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        epsilon: float,
        layer: Own,
        activation: str | Callable = "none",
    ) -> torch.Tensor:
        """activation(LayerNorm(x) @ weight.T + bias) [M, out] of x [M, in]. layer: of `pack_linear`, with this norm."""

    def linear_add(self, x: torch.Tensor, layer: Own, residual: torch.Tensor) -> torch.Tensor:
        """residual + x @ weight.T + bias: x [M, in], residual [M, out] -> [M, out]. May overwrite the residual."""

    def layer_views(self, cache: torch.Tensor, tree_rows: int, batch: Own, write: int, first: int) -> Iterator[Own]:
        """For each layer of a KV cache, its view for a pass. write: the cache row of node 0; first: the first row that
        the pass attends to."""

    def tree_attention(self, qkv: torch.Tensor, view: Own, batch: Own, scale: float, upcast: bool) -> torch.Tensor:
        """Attention [M, H*D] of qkv [M, 3*H*D] over the committed prefix and each node's ancestors; writes the nodes'
        keys and values to the cache. view: of `layer_views`; upcast: compute at least in fp32."""

    # ------------------------------------------------------------ token choice

    def head_logits(
        self, x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, epsilon: float, head: Own
    ) -> torch.Tensor:
        """fp32 logits [..., V] of hidden states x [..., d], after the final LayerNorm. `choose` on them gives the
        tokens of `lm_head_choose`, bit by bit."""

    def choose(self, logits: torch.Tensor, warping: dict | None, noise: Own) -> torch.Tensor:
        """The token [B, N] chosen at every node from logits [B, N, V]: the largest warped logit plus noise, the lowest
        id on ties; INVALID where a logit is NaN, all are -inf or, when sampling, one is +inf."""

    def warp(
        self,
        logits: torch.Tensor,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
    ) -> torch.Tensor:
        """Temperature, then top-k, top-p and min-p as in transformers: fp32 logits [..., V] -> [..., V]."""

    def lm_head_choose(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        epsilon: float,
        head: Own,
        warping: dict | None,
        noise: Own,
    ) -> torch.Tensor:
        """`choose` from hidden states x [B, N, d]: tokens [B, N]."""

    def lm_head_children(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        epsilon: float,
        head: Own,
        count: int,
        warping: dict | None,
        noise: Own,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest children of hidden states x [B, N, d]: tokens and log-probabilities [B, N, C], best first.

        The probability is softmax(warped logits + noise): how likely the draft holds each token to be the one that the
        target chooses under the same noise.
        """

    # ------------------------------------------------------------ KV cache

    def move_rows(self, cache: torch.Tensor, tree_rows: int, moves: Own) -> None:
        """Moves accepted nodes of all layers into the prefix, in place. moves: of `Moves`. Every source is read before
        any target is written."""


class AdaptiveBackend(Backend, Protocol):
    """Only where `adapts_trees`: a draft that was left out for some steps can read what it has missed, and the host
    learns what a step did."""

    def unread_pass(self, sequences: Own, count: int, tree_rows: int, dtype: torch.dtype) -> Unread:
        """The draft's pass over the last `count` tokens but two of each row, and over more where passes have one size.
        tree_rows: of its cache; dtype: of its keys and values. The two last tokens are read by the first draft pass of
        every step."""

    def report(self, trees: Own, moves: Own) -> Report:
        """What the step with these trees and moves did. Must be called right after the step, outside of what is
        captured. From a device it can be read once an event has passed that was recorded after this call."""


class CompilingBackend(Backend, Protocol):
    """Only where `compiles_kernels`: steps are made ready before they run."""

    def capture(self, calls: Iterable[tuple[Callable, tuple]]) -> None:
        """Makes the CUDA graphs of those calls (function, arguments) whose function is a `Captured`, without running
        them."""


class ModelCompiler(Protocol):
    """Only where `compile_model` returns models: runs them. `model` is one."""

    def compiled_forward(
        self, model: Own, batch: Own, rows: torch.Tensor, tree_rows: int, write: int, first: int
    ) -> torch.Tensor:
        """Hidden states [B, N, d] of a pass, before the last norm. rows: the KV cache; tree_rows, write, first: as of
        `layer_views`."""

    def compiled_choose(
        self, model: Own, batch: Own, rows: torch.Tensor, tree_rows: int, write: int, first: int, warping: dict | None,
        noise: Own,
    ) -> torch.Tensor:  # fmt: skip
        """A pass up to the choice of its tokens: as `lm_head_choose`, from the hidden states of `compiled_forward`."""

    def compiled_logits(self, model: Own, hidden: torch.Tensor) -> torch.Tensor:
        """As `head_logits`, from hidden states of `compiled_forward`."""

    def compiled_children(
        self, model: Own, batch: Own, rows: torch.Tensor, tree_rows: int, write: int, first: int, count: int,
        warping: dict | None, noise: Own,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """A pass up to its children: as `lm_head_children`, from the hidden states of `compiled_forward`."""
