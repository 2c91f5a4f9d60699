"""Tree attention: 64 and other numbers of nodes over a committed prefix, a KV cache of its own for every layer."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, absent, error_ratio
from models import DEVICE, MODELS, Choice, randn

from stagedspec.kernels.common.registry import Scratch
from stagedspec.kernels.tree_attention import mask_words, scratch_size, tree_attention


def random_tree(nodes: int, deepest: int = 16) -> torch.Tensor:
    """bool [N, N]: the ancestors that each node attends to. No path is longer than `deepest`."""
    generator = torch.Generator().manual_seed(nodes)
    seen = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        parent = int(torch.randint(max(0, node - 8), node, (), generator=generator))
        while seen[parent].sum() >= deepest:
            parent = int(seen[parent].nonzero()[-2])
        seen[node] |= seen[parent]
    return seen


def cases(choice: Choice) -> Iterator[Case]:
    for model, batch, context, count in choice.all("model", "batch", "context", "nodes"):
        yield _case(model, batch, count, context)


def _case(model: str, batch: int, count: int, context: int) -> Case:
    shape = MODELS[model]
    heads, size = shape.heads, shape.head_size
    rows = count + context
    cache = randn(shape.layers, batch, rows, 2, heads, size)
    qkv = randn(batch * count, 3 * heads * size)
    seen = random_tree(count)
    masks = mask_words(seen).to(DEVICE).expand(batch, -1, -1).contiguous()
    prefix = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    out = qkv.new_full((batch * count, heads * size), float("nan"))
    scratch = Scratch.of([scratch_size(batch, count, heads, heads, size, rows, count)], out.device)
    scale = size**-0.5

    def ours() -> None:
        for layer in cache:
            tree_attention(qkv, layer, masks, prefix, 0, False, count, scale, out, scratch, settled=True)

    # Peers get their keys and values laid out as they like best, tree rows already in place: they append nothing.
    visible = torch.cat((seen, torch.ones(count, context, dtype=torch.bool)), 1).to(DEVICE)
    q = qkv.view(batch, count, 3, heads, size)[:, :, 0].transpose(1, 2)
    keys, values = (cache[:, :, :, i].transpose(2, 3).contiguous() for i in (0, 1))

    def sdpa() -> None:
        for k, v in zip(keys, values, strict=True):
            F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)

    def check() -> float:
        tree_attention(qkv, cache[0], masks, prefix, 0, False, count, scale, out, scratch)
        k, v = (cache[0][:, :, i].transpose(1, 2) for i in (0, 1))
        plain, exact = (
            F.scaled_dot_product_attention(*(t.to(dtype) for t in (q, k, v)), attn_mask=visible, scale=scale)
            for dtype in (q.dtype, torch.float64)
        )
        flat = (batch * count, heads * size)
        return error_ratio(out, *(t.transpose(1, 2).reshape(flat) for t in (plain, exact)))

    committed, appended = (2 * batch * tokens * heads * size * qkv.element_size() for tokens in (context, count))
    return Case(
        "tree_attention",
        model,
        {"B": batch, "N": count, "L": context},
        committed + appended + qkv.nbytes + out.nbytes,
        shape.layers,
        ours,
        {"SDPA, mask": sdpa} | _flex(q, keys, values, visible, scale) | _flashinfer(q, keys, values, visible, scale),
        check,
    )


def _flex(q, keys, values, visible, scale) -> dict:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    count, total = visible.shape
    mask = create_block_mask(lambda b, h, i, j: visible[i, j], None, None, count, total, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> None:
        for k, v in zip(keys, values, strict=True):
            compiled(q, k, v, block_mask=mask, scale=scale)

    return {"FlexAttention": run}


def _flashinfer(q, keys, values, visible, scale) -> dict:
    try:
        import flashinfer
    except ImportError:
        return {"FlashInfer": absent}
    if q.shape[0] > 1:
        return {}
    laid = [(k[0], v[0]) for k, v in zip(keys, values, strict=True)]
    queries = q[0].transpose(0, 1).contiguous()

    def one(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        flashinfer.single_prefill_with_kv_cache(queries, *pair, custom_mask=visible, kv_layout="HND", sm_scale=scale)

    return {"FlashInfer": partial(lambda pairs: [one(pair) for pair in pairs], laid)}
