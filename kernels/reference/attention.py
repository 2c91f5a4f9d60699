"""Attention over a token tree and its prefix, and the KV cache, in plain torch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from stagedspec.kernels.reference.layers import cast
from stagedspec.kernels.state.host import Batch


def layer_views(
    cache: torch.Tensor, tree_rows: int, batch: Batch, write: int, first: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """For each layer of a KV cache [layers, >= B, S, 2, H, D]: where the pass's rows go, [B, N, 2, H, D], and the keys
    and values visible under its bias, [B, H, R, D], from row `first` on. What lies where is in the bias: tree_rows is
    not needed here."""
    (sequences, nodes), visible = batch.tokens.shape, batch.bias.shape[-1]
    cache = cache[:, :sequences]
    store = cache.narrow(2, write, nodes).unbind(0)
    keys, values = cache.narrow(2, first, visible).permute(3, 0, 1, 4, 2, 5).unbind(0)
    return zip(store, keys.unbind(0), values.unbind(0), strict=True)


def kv_dtype(dtype: torch.dtype, device: torch.device, invariant: bool) -> torch.dtype:
    """The dtype of keys, values and masks of a model computed in dtype.

    The order in which attention sums over keys depends on the other nodes of a pass. On a CPU an invariant model keeps
    its keys and values in fp64: the sums then differ by 1e-16, and once rounded to fp32 they are the same bits but for
    about one in 1e8. In fp32 alone one sampled token in 16,000 came out different.
    """
    if device.type != "cpu":
        return dtype
    return torch.float64 if invariant else torch.float32


def tree_attention(
    qkv: torch.Tensor, view: tuple[torch.Tensor, ...], batch: Batch, scale: float, upcast: bool
) -> torch.Tensor:
    """Attention of N nodes over the committed prefix and their own ancestors; appends the nodes' K and V.

    qkv: [M, 3*H*D]. view: of `layer_views`. batch.bias: [B or 1, 1, N, R] of 0 and -inf, in the cache's dtype, which
    is what attention is computed in (with `upcast` at least in fp32). Returns [M, H*D] in the dtype of qkv.
    Bytes: the keys and values once, 2*B*R*H*D elements.
    """
    store, keys, values = view
    bias = batch.bias
    rows, nodes, _, heads, size = store.shape
    qkv = qkv.view(rows, nodes, 3, heads, size)
    store.copy_(qkv.narrow(2, 1, 2))
    q = cast(qkv.select(2, 0).transpose(1, 2), keys.dtype)
    if upcast and keys.dtype.itemsize < 4:
        q, keys, values, bias = q.float(), keys.float(), values.float(), bias.float()
    out = cast(F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale), qkv.dtype)
    return out.transpose(1, 2).reshape(rows * nodes, heads * size)


def move_rows(cache: torch.Tensor, tree_rows: int, moves: list[list[tuple[int, int]]]) -> None:
    """Moves rows of a KV cache [layers, B, S, ...] in place, all layers at once.

    moves: (tree row, position) pairs of each sequence; position p lives in row tree_rows + p. Every source is read
    before any target is written.
    """
    layers, batch, rows = cache.shape[:3]
    flat = cache.view(layers, batch * rows, -1)
    source = [index * rows + row for index, pairs in enumerate(moves) for row, _ in pairs]
    target = [index * rows + tree_rows + position for index, pairs in enumerate(moves) for _, position in pairs]
    if not source:
        return
    if cache.device.type == "cpu":  # numpy takes a third of torch's time
        held = flat.view(torch.uint8).numpy()
        held[:, target] = held[:, source]
    else:
        indices = torch.tensor((source, target), device=cache.device)
        flat.index_copy_(1, indices[1], flat.index_select(1, indices[0]))
