"""Token and position embeddings of a pass, gathered and added: out[m] = tokens_table[token[m]] + positions_table[p[m]];
and the statistics of each row for the first LayerNorm.

Bytes: 3 * M * d elements. Positions outside their table take its nearest row: only nodes that can never be accepted
have them.
"""

import torch
import triton
import triton.language as tl

from stagedspec.kernels.common.registry import (
    FLOATS,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    register,
)
from stagedspec.kernels.linear.kernel import ROWS, stat_tiles, store_stats


@triton.jit(do_not_specialize_on_alignment=("p_tokens", "p_positions"))  # rows of a batch, wherever they begin
def _embed(
    p_tokens,  # [M]
    p_positions,  # [M]
    p_token_table,  # [V, D]
    p_position_table,  # [P, D]
    p_out,  # [M, D]
    p_stats,  # [M, TILES, 2]
    V: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    WIDE: tl.constexpr = triton.next_power_of_2(TILES)
    i_m = tl.program_id(0)
    columns = tl.arange(0, WIDE)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]  # [WIDE, ROWS]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.minimum(tl.maximum(tl.load(p_tokens + i_m), 0), V - 1).to(tl.int64)
    position = tl.minimum(tl.maximum(tl.load(p_positions + i_m), 0), P - 1).to(tl.int64)
    inside = columns < D
    b_token = tl.load(p_token_table + token * D + columns, mask=inside, other=0.0)
    b_position = tl.load(p_position_table + position * D + columns, mask=inside, other=0.0)
    b_sum = (b_token.to(tl.float32) + b_position.to(tl.float32)).to(p_out.dtype.element_ty)
    tl.store(p_out + i_m.to(tl.int64) * D + columns, b_sum, mask=inside)
    store_stats(b_sum.to(tl.float32), p_stats + i_m * TILES * 2, D, TILES)  # of what the reader will see


def _launch(
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
) -> None:
    check_runs(out, "embed")
    launch_kernel(
        _embed,
        (out.shape[0],),
        tokens,
        positions,
        token_table,
        position_table,
        out,
        stats,
        V=token_table.shape[0],
        P=position_table.shape[0],
        D=out.shape[1],
        TILES=stat_tiles(out.shape[1]),
        ROWS=ROWS,
        num_warps=4,
        **launch_options(out.device),
    )


_op = register(
    "embed(Tensor token_table, Tensor position_table, Tensor tokens, Tensor positions, Tensor(a!) out, "
    "Tensor(b!) stats) -> ()",
    _launch,
)


def embed(
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
) -> None:
    """out [B*N, d] = token_table[tokens] + position_table[positions], added in fp32.

    token_table [V, d], position_table [P, d], out: of one dtype, fp32, fp16 or bf16. tokens, positions: int32 or int64
    [B, N]; ids outside a table take its nearest row. stats: fp32 [B*N, stat_tiles(d), 2], those of out for the
    LayerNorm that comes next (`linear.row_stats`).

    Raises ValueError for a wrong shape, dtype, device or layout.
    """
    op, device = "embed", out.device
    check_runs(out, op)
    check_tensor(op, "token_table", token_table, (None, None), FLOATS, device)
    width, dtype = token_table.shape[1], token_table.dtype
    check_tensor(op, "position_table", position_table, (None, width), dtype, device)
    check_tensor(op, "tokens", tokens, (None, None), (torch.int32, torch.int64), device)
    check_tensor(op, "positions", positions, tuple(tokens.shape), (torch.int32, torch.int64), device)
    check_tensor(op, "out", out, (tokens.numel(), width), dtype, device)
    check_tensor(op, "stats", stats, (tokens.numel(), stat_tiles(width), 2), torch.float32, device)
    _op(token_table, position_table, tokens, positions, out, stats)
