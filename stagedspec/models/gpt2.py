"""GPT-2 weights, the KV cache and the forward pass over a batch of token trees.

Every setting of `GPT2Config` that changes the forward pass is followed, or refused by name.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from stagedspec.kernels.backends.interface import Backend, Batch, CompiledModel, ModelCompiler, NoiseAt, Own, Sequences


@dataclass(frozen=True)
class Layer:
    """One transformer block: norms, linear layers of `Backend.pack_linear`, and the factor of the attention scores."""

    norm_1: tuple[torch.Tensor, torch.Tensor]
    qkv: Own
    projection: Own
    norm_2: tuple[torch.Tensor, torch.Tensor]
    up: Own
    down: Own
    scale: float


class Cache:
    """A static KV cache [layers, B, S, 2, H, D]: the tree region, then the prefix. A pass of fewer than B sequences is
    about the first ones.

    Tree nodes are in rows [0, tree_rows); the token at position p is in row tree_rows + p. The two regions are adjacent
    so that one contiguous slice covers both.
    """

    def __init__(self, model: "GPT2", batch: int, tree_rows: int, positions: int):
        self.tree_rows = tree_rows
        shape = (model.config.n_layer, batch, tree_rows + positions, 2, model.heads, model.head_size)
        # Zeros, not garbage: masked rows are multiplied by zero, and zero times NaN is NaN.
        size = math.prod(shape) * model.kv_dtype.itemsize
        if model.device.type == "cpu" and size:  # from NumPy, which asks for large pages: a key may have one of its own
            memory = np.zeros(size, np.uint8)
            self.rows = torch.from_numpy(memory).view(model.kv_dtype).view(shape)
        else:
            self.rows = torch.zeros(shape, dtype=model.kv_dtype, device=model.device)

    def commit(self, model: "GPT2", moves: Own) -> None:
        """Moves accepted nodes into the prefix. moves: of the backend's `Moves` or `Unread`."""
        model.ops.move_rows(self.rows, self.tree_rows, moves)

    def move_row(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` tokens of a sequence to another one."""
        if source != target:
            held = slice(self.tree_rows, self.tree_rows + count)
            self.rows[:, target, held] = self.rows[:, source, held]


class GPT2:
    """Weights of one model, copied and laid out for a backend. Later changes of the model object have no effect.

    ops: the backend, from `stagedspec.kernels.backends.select.resolve`. invariant: whether a node's result must not
    depend on the rest of the batch: True for a target; False for a draft, which cannot change the output, so that the
    fastest arithmetic will do. vocabulary: vocabulary size of the target, for a draft with more or fewer rows of
    padding: token ids below it can be read, and those that the draft has too can be proposed (`vocab_size`).

    Raises ValueError for a config that is not supported, for heads too wide for the backend, and for weights that are
    not finite in `dtype`.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        ops: Backend,
        device: torch.device,
        dtype: torch.dtype,
        invariant: bool = True,
        vocabulary: int | None = None,
    ):
        config = copy.deepcopy(model.config)
        check_config(config)
        self.ops, self.device, self.dtype = ops, device, dtype
        self.config = config
        vocabulary = config.vocab_size if vocabulary is None else vocabulary
        self.vocab_size, self.positions = min(config.vocab_size, vocabulary), config.n_positions
        self.heads, self.head_size = config.n_head, config.n_embd // config.n_head
        if self.head_size > ops.max_head_size:
            raise ValueError(
                f"attention heads of backend {ops.name!r} can be at most {ops.max_head_size} wide, the model's are "
                f"{self.head_size}; use backend='torch'"
            )
        self.epsilon, self.upcast = config.layer_norm_epsilon, bool(config.reorder_and_upcast_attn)
        name = config.activation_function
        self.activation: str | Callable = name if ops.fused_activation(name) else ACT2FN[name]
        weights = _Weights(model, "target" if invariant else "draft", device, dtype)
        table = weights["transformer.wte.weight"]
        head = table if model.lm_head.weight is model.transformer.wte.weight else weights["lm_head.weight"]
        head = head[: self.vocab_size]
        beyond = vocabulary - len(table)  # ids that a draft can only read
        self.token_table = F.pad(table, (0, 0, 0, beyond)) if beyond > 0 else table[:vocabulary]
        self.position_table = weights["transformer.wpe.weight"]
        self.final_norm = weights.pair("transformer.ln_f")
        self.invariant = invariant
        own = {"transformer.wte.weight": self.token_table, "transformer.wpe.weight": self.position_table}
        scales = [self._scale(index) for index in range(config.n_layer)]
        self.compiled: CompiledModel | None
        self.compiled = ops.compile_model(config, _Shared(weights, own | {"lm_head.weight": head}), scales)
        self.kv_dtype = ops.kv_dtype(dtype, device, invariant) if self.compiled is None else self.compiled.kv_dtype
        if self.compiled is None:
            self.head = ops.pack_head(head, invariant)
            self.layers = [self._layer(weights, index) for index in range(config.n_layer)]
        self.parameters = sum(parameter.numel() for parameter in nn.Module.parameters(model))

    def _layer(self, weights: "_Weights", index: int) -> Layer:
        def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return weights.pair(f"transformer.h.{index}.{name}")

        def linear(name: str, norm: str | None = None) -> Own:
            weight, bias = pair(name)
            before = None if norm is None else pair(norm)
            return self.ops.pack_linear(weight.t(), bias, self.invariant, before)  # Conv1D stores [in, out]

        return Layer(
            pair("ln_1"),
            linear("attn.c_attn", "ln_1"),
            linear("attn.c_proj"),
            pair("ln_2"),
            linear("mlp.c_fc", "ln_2"),
            linear("mlp.c_proj"),
            self._scale(index),
        )

    def _scale(self, index: int) -> float:
        """The factor of a layer's attention scores."""
        scale = self.head_size**-0.5 if self.config.scale_attn_weights else 1.0
        return scale / (index + 1) if self.config.scale_attn_by_inverse_layer_idx else scale

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one pass reads: all layers and the head. Of the embeddings it reads only a few rows."""
        config = self.config
        inner = config.n_inner or 4 * config.n_embd
        layers = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * inner)
        of_head = self.ops.head_dtype(self.dtype, config.n_embd, self.device, self.invariant)
        return layers * self.dtype.itemsize + self.vocab_size * config.n_embd * of_head.itemsize

    def forward(self, batch: Batch, cache: Cache, write: int, first: int = 0) -> torch.Tensor:
        """One pass over the B*N tokens of batch; returns the hidden states [B, N, d] before the final LayerNorm.

        Keys and values are written to cache rows write .. write + N; rows before `first` are not attended to.
        """
        ops = self.ops
        if self.compiled is not None:
            run = cast(ModelCompiler, ops).compiled_forward
            return run(self.compiled, batch, cache.rows, cache.tree_rows, write, first)
        x = ops.embed(self.token_table, self.position_table, batch.tokens, batch.positions)
        views = ops.layer_views(cache.rows, cache.tree_rows, batch, write, first)
        for layer, view in zip(self.layers, views, strict=True):
            qkv = ops.norm_linear(x, *layer.norm_1, self.epsilon, layer.qkv)
            mixed = ops.tree_attention(qkv, view, batch, layer.scale, self.upcast)
            x = ops.linear_add(mixed, layer.projection, x)
            inner = ops.norm_linear(x, *layer.norm_2, self.epsilon, layer.up, self.activation)
            x = ops.linear_add(inner, layer.down, x)
        return x.view(*batch.tokens.shape, -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., d] to fp32 logits [..., V]."""
        if self.compiled is not None:
            return cast(ModelCompiler, self.ops).compiled_logits(self.compiled, hidden)
        return self.ops.head_logits(hidden, *self.final_norm, self.epsilon, self.head)

    def choose(
        self, batch: Batch, cache: Cache, write: int, first: int, warping: dict | None, noise: NoiseAt | None
    ) -> torch.Tensor:
        """A pass, arguments of `forward`, up to the token chosen at every node [B, N]."""
        if self.compiled is not None:
            run = cast(ModelCompiler, self.ops).compiled_choose
            return run(self.compiled, batch, cache.rows, cache.tree_rows, write, first, warping, noise)
        hidden = self.forward(batch, cache, write, first)
        return self.ops.lm_head_choose(hidden, *self.final_norm, self.epsilon, self.head, warping, noise)

    def children(
        self, batch: Batch, cache: Cache, write: int, first: int, count: int, warping: dict | None,
        noise: NoiseAt | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """A pass, arguments of `forward`, up to the most likely children of every node: tokens and log-probabilities,
        both [B, N, count]."""
        if self.compiled is not None:
            run = cast(ModelCompiler, self.ops).compiled_children
            return run(self.compiled, batch, cache.rows, cache.tree_rows, write, first, count, warping, noise)
        hidden = self.forward(batch, cache, write, first)
        return self.ops.lm_head_children(hidden, *self.final_norm, self.epsilon, self.head, count, warping, noise)


class _Weights:
    """The weights of a model object by name. Each is copied when it is read, so that there is never a second full copy.

    role ("target", "draft") is for messages.
    """

    def __init__(self, model: GPT2LMHeadModel, role: str, device: torch.device, dtype: torch.dtype):
        self._role, self._device, self._dtype = role, device, dtype
        named = nn.Module.named_parameters(model, remove_duplicate=False)  # even if a subclass overrides it
        self._parameters = {name: one.detach() for name, one in named}

    @property
    def names(self) -> KeysView[str]:
        return self._parameters.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, copy=True)

    def read(self, name: str, copy: bool) -> torch.Tensor:
        """A weight in the device and dtype. copy: even if it is there already. Raises ValueError if not finite."""
        own = self._parameters[name].to(self._device, self._dtype, copy=copy)
        if finite(own):
            return own
        if not finite(self._parameters[name]):
            raise ValueError(f"{self._role}: {name!r} holds values that are not finite: load a sound checkpoint")
        dtype = str(own.dtype).removeprefix("torch.")
        raise ValueError(
            f"{self._role}: {name!r} holds values beyond the range of {dtype}, "
            f"{torch.finfo(own.dtype).max:g}: use dtype='float32' or 'bfloat16'"
        )

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and the bias of a module."""
        return self[f"{name}.weight"], self[f"{name}.bias"]


class _Shared(Mapping[str, torch.Tensor]):
    """A model's own tensors by name, copied only to another device or dtype, one at a time when it is read. given: what
    is in place of some."""

    def __init__(self, weights: _Weights, given: dict[str, torch.Tensor]):
        self._weights, self._given = weights, given

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._given[name] if name in self._given else self._weights.read(name, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.names | self._given.keys())

    def __len__(self) -> int:
        return len(self._weights.names | self._given.keys())


def finite(tensor: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN.

    Either would be in the minimum or the maximum, which torch finds ten times faster than it tests every value.
    """
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax())


class Reader:
    """Fills a model's cache with the prompts, chunk by chunk.

    sequences: the committed tokens. repeated: the backend's `repeated`, which prepares a
    function that runs often (captures it as a CUDA graph), or None; chunks of one size share the prepared pass.
    """

    def __init__(
        self, model: GPT2, cache: Cache, sequences: Sequences, repeated: Callable[[Callable], Callable] | None = None
    ):
        self.model, self.cache, self.sequences = model, cache, sequences
        self._repeated = repeated or (lambda part: part)
        self._passes: dict[int, Callable] = {}  # by the size of a chunk

    def read(self, count: int) -> None:
        """Reads the first `count` tokens of every row, from position 0."""
        for start, size in self.sequences.chunks(count):
            self._pass(size)(self.sequences.chunk(start, size, self.model.kv_dtype), start)

    def read_row(self, index: int, tokens: list[int]) -> None:
        """Reads the tokens alone, and puts their keys and values into row `index`, from position 0."""
        model, cache = self.model, self.cache
        alone = Cache(model, 1, 0, len(tokens))
        for start, size in self.sequences.chunks(len(tokens)):
            part = torch.tensor([tokens[start : start + size]], device=model.device)
            read_chunk(model, alone, model.ops.prefill_batch(part, start, model.kv_dtype), start)
        cache.rows[:, index, cache.tree_rows : cache.tree_rows + len(tokens)] = alone.rows[:, 0]

    def calls(self, sizes: Iterable[int]) -> Iterator[tuple[Callable, tuple]]:
        """The pass over a chunk of each size and its arguments, for the backend's `prepare`; those already prepared are
        left out."""
        for size in sizes:
            if not getattr(self._pass(size), "prepared", False):
                yield self._pass(size), (self.sequences.chunk(0, size, self.model.kv_dtype), 0)

    def _pass(self, size: int) -> Callable:
        if size not in self._passes:
            # No method of this reader: a cycle of references would keep the cache until Python collects garbage.
            self._passes[size] = self._repeated(partial(read_chunk, self.model, self.cache))
        return self._passes[size]


def read_chunk(model: GPT2, cache: Cache, chunk: Batch, start: int) -> None:
    """The pass over one chunk of the prompts (`Sequences.chunk`), which begins at token `start`."""
    model.forward(chunk, cache, cache.tree_rows + start, cache.tree_rows)


def check_config(config: GPT2Config) -> None:
    """Raises ValueError, naming the setting, for a config that is not supported."""
    if getattr(config, "model_type", None) != "gpt2":
        kind = getattr(config, "model_type", None)
        raise ValueError(
            f"expected a GPT-2 checkpoint (model_type 'gpt2'), got {kind!r}: other architectures cannot be decoded here"
        )
    if config.add_cross_attention:
        raise ValueError("add_cross_attention=True is not supported: give a GPT-2 that only decodes")
    if config.activation_function not in ACT2FN:
        raise ValueError(f"unknown activation_function {config.activation_function!r}; expected one transformers knows")
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd must be divisible by n_head, got {config.n_embd} and {config.n_head}: mend the config"
        )
