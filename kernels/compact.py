"""Moves accepted rows of a KV cache from the tree region into the prefix, all layers in one launch.

    cache[l, b, offset + target[b, k]] = cache[l, b, source[b, k]]      for every layer l and k with target[b, k] >= 0

Every source of a sequence is read before any of its targets is written: a program owns some columns of all K rows of a
sequence in a layer, so rows may overlap in any way, as long as no two targets are the same.

Bytes: 2 * layers * moved rows * 2*H_kv*D elements. 16 bytes a thread at a time.
"""

import torch
import triton
import triton.language as tl

from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    FLOATS,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    register,
)

DEFAULT = {"elements": 4096, "warps": 4}  # elements of a program's tile


@triton.jit(
    do_not_specialize=("B", "S", "K", "OFFSET"),
    do_not_specialize_on_alignment=("p_source", "p_target"),  # parts of one tensor
)
def _compact(
    p_cache,  # [layers, B, S, COLUMNS]
    p_source,  # [B, K]
    p_target,  # [B, K]
    B,
    S,
    K,
    OFFSET,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    i_columns, i_b, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.arange(0, ROWS)
    columns = i_columns * WIDTH + tl.arange(0, WIDTH)
    p_rows = p_cache + (i_layer * B + i_b).to(tl.int64) * S * COLUMNS + columns[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    source = tl.load(p_source + i_b * K + rows, mask=rows < K, other=-1)
    target = tl.load(p_target + i_b * K + rows, mask=rows < K, other=-1)
    moved = ((target >= 0) & (source >= 0))[:, None] & (columns < COLUMNS)[None, :]
    b_rows = tl.load(p_rows + source.to(tl.int64)[:, None] * COLUMNS, mask=moved)  # [ROWS, WIDTH]
    tl.debug_barrier()  # every thread has read before any writes
    tl.store(p_rows + (target + OFFSET).to(tl.int64)[:, None] * COLUMNS, b_rows, mask=moved)


def tiles_of(count: int, elements: int = DEFAULT["elements"]) -> dict[str, int]:
    rows = triton.next_power_of_2(count)
    return {"ROWS": rows, "WIDTH": max(elements // rows, 16)}


def candidates(shape: tuple[int], device: torch.device) -> list[dict[str, int]]:
    """Settings to try at the shape (columns of a row,), the default first."""
    others = [{"elements": elements, "warps": warps} for elements in (1024, 2048, 4096, 8192) for warps in (2, 4, 8)]
    return [DEFAULT, *(other for other in others if other != DEFAULT)]


def _launch(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor, offset: int) -> None:
    check_runs(cache, "compact")
    layers, batch, rows = cache.shape[:3]
    columns, count = cache.shape[3:].numel(), source.shape[1]
    settings = config("compact", (columns,), cache.device, candidates)
    tiles = tiles_of(count, settings["elements"])
    launch_kernel(
        _compact,
        (triton.cdiv(columns, tiles["WIDTH"]), batch, layers),
        cache,
        source,
        target,
        batch,
        rows,
        count,
        offset,
        COLUMNS=columns,
        num_warps=settings["warps"],
        **tiles,
        **launch_options(cache.device),
    )


_op = register("compact(Tensor(a!) cache, Tensor source, Tensor target, int offset) -> ()", _launch)


def compact(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor, offset: int = 0) -> None:
    """Moves rows of a KV cache in place.

    cache: [layers, B, S, 2, H_kv, D] of fp32, fp16 or bf16. source, target: int32 [B, K], K from 1 to 256: rows of the
    cache, targets counted from row `offset`; a pair with a negative number is left out. The targets of a sequence must
    differ from each other; apart from that rows may overlap. Rows of S and more are the
    caller's mistake and are not noticed.

    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    op = "compact"
    check_runs(cache, op)
    check_tensor(op, "cache", cache, (None, None, None, 2, None, None), FLOATS, cache.device)
    check_tensor(op, "source", source, (cache.shape[1], None), torch.int32, cache.device)
    check_tensor(op, "target", target, tuple(source.shape), torch.int32, cache.device)
    if not 1 <= source.shape[1] <= 256:
        raise ValueError(f"{op}: 1 to 256 rows of a sequence can be moved, got {source.shape[1]}")
    _op(cache, source, target, offset)
