"""The linears of kernel.py on Hopper: the weights wait in shared memory for the kernel ahead to end.

    out = activation(LayerNorm(x) @ weight.T + bias)   or   residual + x @ weight.T + bias

x [M, K], weight [OUT, K] and what is added to them bf16 or fp16, fp32 sums. Bytes: the weight once, 2*OUT*K; through L2
also x, 2*M*K for every 64 rows of the weight, and where columns are split the parts, 8*OUT*M a split.

Between the end of one such kernel and the end of the next, kernel.py fetches weights. Here they are already loaded: a
program starts to load all of its weights (64 rows of up to HOPPER_SPLIT columns, 160 KB) when it starts, and it starts
as soon as the programs of the kernel ahead have started. After that kernel ends, only x from L2, the products and the
epilogue are left to do. This needs control of what is in flight and when, so it is written in Gluon, a level below
Triton.

- Weights and x come by bulk tensor copies into shared memory, a barrier for each block of columns; the matrix
  instructions read both there. Where x has no room beside the weights, the first blocks of weights are moved to
  registers before the kernel ahead has ended, the matrix instructions read them from there (HELD), and x comes to where
  they were. Where that would be too many registers, the blocks of x take turns in a ring of slots.
- As few splits as shared memory allows: adding up parts costs more than longer programs do.
- A program that finds a multiprocessor only when the kernel ahead leaves it has its weights in L2 by then (`late`).
- Passes over many tokens, such as chunks of a prompt, are limited by L2 instead, from which every program reads both
  operands. There a program takes up to 128 tokens and two groups of 64 weight rows, each for four warps, and the
  weights' blocks take turns in a ring too (`settings`).
- The next kernel may start before this one has waited: it waits before it reads, and no kernel ends before the one
  ahead of it has. So several kernels behind are already fetching while one computes.

Sums run over columns in their order, 16 at a time, for any number of tokens and wherever the weights are read from; a
row is summed in a layout that is the same for any number of tokens. The bits are those of this kernel, not of
kernel.py's.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

from stagedspec.kernels.common.constants import HOPPER_SPLIT
from stagedspec.kernels.common.hopper import (
    MULTIPROCESSORS,
    SHARED,
    SPARE,
    copy,
    described,
    fetch_to_l2,
    reinterpreted,
)
from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import Scratch, launch_kernel, launch_options
from stagedspec.kernels.linear.kernel import ROWS, activate, stat_tiles
from stagedspec.kernels.linear.records import Epilogue, Norm

WHOLE = 1600  # columns that are not split
MANY = 60  # programs of 128 tokens and 128 outputs
MOST_HELD = 768  # columns of 64 rows of the weight: 192 registers a thread
RING = 64  # columns a block where the weight's blocks take turns


@gluon.jit(do_not_specialize=("M", "epsilon"))
def _linear_hopper(
    x,  # [M, K], described in blocks [TOKENS, BLOCK_K]
    weight,  # [OUT, K], described in blocks [ROWS, BLOCK_K]
    p_weight,
    p_stats,  # [M, STAT_TILES, 2]
    p_sums,  # [OUT]
    p_bias,  # [OUT]
    p_residual,  # [M, OUT]
    p_out,  # [M, OUT]
    p_stats_out,  # [M, tiles, 2]
    p_partials,
    p_counters,
    M,
    epsilon,
    OUT: gl.constexpr,
    K: gl.constexpr,
    NORM: gl.constexpr,
    STAT_TILES: gl.constexpr,
    BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STATS: gl.constexpr,
    SPLITS: gl.constexpr,
    SPLIT_K: gl.constexpr,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TOKENS: gl.constexpr,
    WEIGHT_SLOTS: gl.constexpr,
    SLOTS: gl.constexpr,
    HELD: gl.constexpr,
    ASKED: gl.constexpr,
    LATE: gl.constexpr,
    PDL: gl.constexpr,
):
    TILES: gl.constexpr = (OUT + ROWS - 1) // ROWS
    BLOCKS: gl.constexpr = SPLIT_K // BLOCK_K
    WIDE: gl.constexpr = triton.next_power_of_2(STAT_TILES)
    # ROWS of a token's outputs, and its tiles' statistics, each in eight lanes; a group of warps has a tile.
    FLAT: gl.constexpr = gl.BlockedLayout([1, ROWS // 8], [4, 8], [4, GROUPS], [1, 0])
    ROW: gl.constexpr = gl.BlockedLayout([1, 1, ROWS // 8], [4, 1, 8], [4, GROUPS, 1], [2, 1, 0])
    OF_TOKEN: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, ROW))
    OF_ROW: gl.constexpr = gl.SliceLayout(0, ROW)
    TILE: gl.constexpr = gl.BlockedLayout([1, max(1, WIDE // 8)], [4, 8], [4 * GROUPS, 1], [1, 0])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, TOKENS, 16])
    i_split, i_block = gl.program_id(1), gl.program_id(2)
    i_tile, i_token, i_start = gl.program_id(0) * GROUPS, i_block * TOKENS, i_split * SPLIT_K
    i_row = i_tile * ROWS

    # Before the kernel ahead has ended: what does not change.
    s_weight = gl.allocate_shared_memory(weight.dtype, [WEIGHT_SLOTS, GROUPS * ROWS, BLOCK_K], weight.layout)
    s_x = gl.allocate_shared_memory(x.dtype, [SLOTS, TOKENS, BLOCK_K], x.layout)
    weight_there = gl.allocate_shared_memory(gl.int64, [WEIGHT_SLOTS, 1], mbarrier.MBarrierLayout())
    x_there = gl.allocate_shared_memory(gl.int64, [HELD + SLOTS, 1], mbarrier.MBarrierLayout())
    for i in range(WEIGHT_SLOTS):
        mbarrier.init(weight_there.index(i), count=1)
    for i in range(HELD + SLOTS):
        mbarrier.init(x_there.index(i), count=1)
    fence_async_shared()  # the copies' unit sees the barriers as they are now
    if PDL:
        cuda.gdc_launch_dependents()
    for i in range(WEIGHT_SLOTS):
        mbarrier.expect(weight_there.index(i), GROUPS * ROWS * BLOCK_K * 2)
        place = [i_row, i_start + i * BLOCK_K]
        copy(weight, place, weight_there.index(i), s_weight.index(i), pred=i < ASKED)
    if LATE > 0:
        _fetch_late(p_weight, i_split * TILES + i_tile, OUT, K, TILES, SPLITS, SPLIT_K, ROWS, LATE)
    for i in range(HELD + SLOTS):
        mbarrier.expect(x_there.index(i), TOKENS * BLOCK_K * 2)
    # [GROUPS, ROWS]
    tiles = i_tile + gl.arange(0, GROUPS, gl.SliceLayout(1, OF_ROW))
    rows = tiles[:, None] * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, OF_ROW))[None, :]
    real = rows < OUT
    if BIAS:
        b_bias = gl.load(p_bias + rows, mask=real, other=0.0)
    if NORM:
        b_sums = gl.load(p_sums + rows, mask=real, other=0.0)
    held = ()
    if HELD > 0:
        for i in gl.static_range(HELD):
            mbarrier.wait(weight_there.index(i), 0)
            held += (s_weight.index(i).load(gl.DotOperandLayout(0, SUM, 2)),)  # type: ignore[assignment]
            if i + ASKED < BLOCKS:
                i_next = i + ASKED
                place = [i_row, i_start + i_next * BLOCK_K]
                copy(weight, place, weight_there.index(i_next), s_weight.index(i_next))
        tl.debug_barrier()
        fence_async_shared()  # x comes to where these blocks were
        X: gl.constexpr = x.layout
        s_held = reinterpreted(s_weight, [HELD, TOKENS, BLOCK_K], X)

    if PDL:
        cuda.gdc_wait()
    if HELD > 0:
        for i in range(HELD):
            copy(x, [i_token, i_start + i * BLOCK_K], x_there.index(i), s_held.index(i))
    for i in range(SLOTS):
        copy(x, [i_token, i_start + (HELD + i) * BLOCK_K], x_there.index(HELD + i), s_x.index(i))
    tokens = i_token + gl.arange(0, TOKENS, OF_TOKEN)
    ok = tokens < M
    there = ok[:, None, None] & real[None, :, :]  # [TOKENS, GROUPS, ROWS]
    i_out = tokens[:, None, None] * OUT + rows[None, :, :]
    if RESIDUAL:
        b_residual = gl.load(p_residual + i_out, mask=there, other=0.0)
    if NORM:
        b_mean, b_scale = _merged_stats(p_stats, i_token, M, epsilon, K, ROWS, STAT_TILES, TOKENS, TILE)
        b_mean = gl.convert_layout(b_mean, OF_TOKEN)
        b_scale = gl.convert_layout(b_scale, OF_TOKEN)
    b_acc = gl.zeros((GROUPS * ROWS, TOKENS), gl.float32, SUM)
    if HELD > 0:
        for i in gl.static_range(HELD):
            mbarrier.wait(x_there.index(i), 0)
            b_acc = warpgroup_mma(held[i], s_held.index(i).permute((1, 0)), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=(b_acc,) + held)[0]  # noqa: RUF005 (the compiler knows no stars)
    for i in range(HELD, BLOCKS):
        i_slot, i_weight = (i - HELD) % SLOTS, i % WEIGHT_SLOTS
        mbarrier.wait(x_there.index(HELD + i_slot), ((i - HELD) // SLOTS) & 1)
        mbarrier.wait(weight_there.index(i_weight), (i // WEIGHT_SLOTS) & 1)
        b_acc = warpgroup_mma(s_weight.index(i_weight), s_x.index(i_slot).permute((1, 0)), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(1, deps=(b_acc,))
        if HELD + SLOTS < BLOCKS:  # then none is held
            # The block before this one is done with: its slots take the next ones.
            i_next = i - 1 + SLOTS
            wanted = (i > 0) & (i_next < BLOCKS)
            free = x_there.index(i_next % SLOTS)
            tl.debug_barrier()
            mbarrier.expect(free, TOKENS * BLOCK_K * 2, pred=wanted)
            copy(x, [i_token, i_start + i_next * BLOCK_K], free, s_x.index(i_next % SLOTS), pred=wanted)
            if WEIGHT_SLOTS < BLOCKS:
                i_next = i - 1 + WEIGHT_SLOTS
                wanted = (i > 0) & (i_next < BLOCKS)
                free = weight_there.index(i_next % WEIGHT_SLOTS)
                mbarrier.expect(free, GROUPS * ROWS * BLOCK_K * 2, pred=wanted)
                copy(
                    weight,
                    [i_row, i_start + i_next * BLOCK_K],
                    free,
                    s_weight.index(i_next % WEIGHT_SLOTS),
                    pred=wanted,
                )
    b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
    b_sum = gl.convert_layout(gl.permute(b_acc, (1, 0)), FLAT)
    b_sum = gl.convert_layout(gl.reshape(b_sum, (TOKENS, GROUPS, ROWS)), ROW)
    last = True
    if SPLITS > 1:
        p_part = p_partials + i_out  # [SPLITS, M, OUT]
        part = M * OUT
        gl.store(p_part + i_split * part, b_sum, mask=there)
        i_count = i_block * gl.num_programs(0) + gl.program_id(0)
        tl.debug_barrier()
        last = gl.atomic_add(p_counters + i_count, 1, sem="acq_rel") == SPLITS - 1
        tl.debug_barrier()
        if last:
            b_sum = gl.load(p_part, mask=there, other=0.0)
            for i_part in gl.static_range(1, SPLITS):
                b_sum += gl.load(p_part + i_part * part, mask=there, other=0.0)
            gl.store(p_counters + i_count, 0)
    if last:
        if NORM:
            b_sum = (b_sum - b_mean[:, None, None] * b_sums[None, :, :]) * b_scale[:, None, None]
        if BIAS:
            b_sum += b_bias.to(gl.float32)[None, :, :]
        b_sum = activate(b_sum, ACTIVATION)
        if RESIDUAL:
            b_sum += b_residual.to(gl.float32)
        b_out = b_sum.to(p_out.dtype.element_ty)
        gl.store(p_out + i_out, b_out, mask=there)
        if STATS:
            b_value = gl.where(real[None, :, :], b_out.to(gl.float32), 0.0)  # what the reader will see
            b_total = gl.sum(b_value, 2)  # [TOKENS, GROUPS]
            share = 1.0 / gl.minimum(OUT - tiles * ROWS, ROWS).to(gl.float32)
            share = gl.convert_layout(share, gl.SliceLayout(0, gl.SliceLayout(2, ROW)))
            b_apart = gl.where(real[None, :, :], b_value - (b_total * share[None, :])[:, :, None], 0.0)
            i_stat = gl.convert_layout(tiles, gl.SliceLayout(0, gl.SliceLayout(2, ROW)))[None, :]
            p_tile = p_stats_out + (tokens[:, None] * TILES + i_stat) * 2
            known = ok[:, None] & (i_stat < TILES)
            gl.store(p_tile, b_total, mask=known)
            gl.store(p_tile + 1, gl.sum(b_apart * b_apart, 2), mask=known)


@gluon.jit
def _fetch_late(
    p_weight,
    i_program,
    OUT: gl.constexpr,
    K: gl.constexpr,
    TILES: gl.constexpr,
    SPLITS: gl.constexpr,
    SPLIT_K: gl.constexpr,
    ROWS: gl.constexpr,
    LATE: gl.constexpr,
):
    """Brings a share of the last LATE programs' weights to L2: lines of 128 bytes, one a thread at a time."""
    EARLY: gl.constexpr = TILES * SPLITS - LATE
    THREADS: gl.constexpr = 128
    LINE: gl.constexpr = 64  # columns
    WIDTH: gl.constexpr = SPLIT_K // LINE  # lines of a row of a program's weights
    LINES: gl.constexpr = LATE * ROWS * WIDTH
    if i_program < EARLY:
        i_line = i_program * THREADS + gl.arange(0, THREADS, gl.BlockedLayout([1], [32], [THREADS // 32], [0]))
        for start in range(0, LINES, EARLY * THREADS):
            i_row = gl.minimum(start + i_line, LINES - 1) // WIDTH
            i_late = EARLY + i_row // ROWS
            row = i_late % TILES * ROWS + i_row % ROWS
            column = i_late // TILES * SPLIT_K + (start + i_line) % WIDTH * LINE
            place = gl.minimum(row, OUT - 1).to(gl.int64) * K + gl.minimum(column, K - 1)
            fetch_to_l2(p_weight + place)


@gluon.jit
def _merged_stats(
    p_stats,
    i_token,
    M,
    epsilon,
    K: gl.constexpr,
    ROWS: gl.constexpr,
    TILES: gl.constexpr,
    TOKENS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Mean and 1 / standard deviation of whole rows [TOKENS] from those of their tiles."""
    tokens = i_token + gl.arange(0, TOKENS, gl.SliceLayout(1, LAYOUT))
    i_tile = gl.arange(0, triton.next_power_of_2(TILES), gl.SliceLayout(0, LAYOUT))
    there = (tokens < M)[:, None] & (i_tile < TILES)[None, :]
    # A sum and its sum of squares, 64 bits at once.
    p_pair = p_stats.to(gl.pointer_type(gl.int64)) + tokens[:, None] * TILES + i_tile[None, :]
    b_pair = gl.load(p_pair, mask=there, other=0)
    b_sum = b_pair.to(gl.int32).to(gl.float32, bitcast=True)
    b_square = (b_pair >> 32).to(gl.int32).to(gl.float32, bitcast=True)
    b_count = gl.minimum(gl.maximum(K - i_tile * ROWS, 1), ROWS).to(gl.float32)  # columns of each tile
    b_mean = gl.sum(b_sum, 1) * (1.0 / K)
    b_apart = gl.where(there, b_sum * (1.0 / b_count)[None, :] - b_mean[:, None], 0.0)
    b_variance = gl.sum(b_square + b_count[None, :] * b_apart * b_apart, 1) * (1.0 / K)
    return b_mean, 1.0 / gl.sqrt(b_variance + epsilon)


# ---------------------------------------------------------------- launching


def splits_of(inputs: int) -> tuple[int, int]:
    """How many parts the columns are cut into, and how long each is."""
    splits = 1 if inputs <= WHOLE else triton.cdiv(inputs, HOPPER_SPLIT)
    return splits, triton.cdiv(triton.cdiv(inputs, splits), 64) * 64


def padded(count: int) -> int:
    """Rows of x, as settings are kept for them."""
    return max(8, triton.next_power_of_2(count))


def candidates(shape: tuple[int, ...], device: torch.device) -> list[dict[str, int]]:
    """Settings to try at the shape (`padded` rows of x, outputs, inputs), the default first: tokens and groups of 64
    weight rows that a program takes. A token's bits are the same for all of them.

    With fewer tokens there are more programs, each waits for less of x, and L2 gives the weights more often. At 128
    rows and more, programs of two groups read both operands less often than their products take. Counters are there
    for programs of 16 tokens (`op.scratch_size`)."""
    most, outputs, inputs = shape
    found = [(tokens, 1) for tokens in (64, 32, 16) if tokens <= most] or [(most, 1)]
    if most >= 128:
        rings = [(128, 2), (128, 1), (64, 2)]
        # Larger programs pay where they are many.
        many = triton.cdiv(outputs, 2 * ROWS) * splits_of(inputs)[0] * (most // 128) >= MANY
        found = [*rings, *found] if many else [*found, *rings]
    return [{"TOKENS": tokens, "GROUPS": groups} for tokens, groups in found]


def settings(tokens: int, inputs: int, groups: int = 1, norm: bool = False) -> dict[str, int]:
    """Of a program that takes `tokens` tokens, a power of two, and `groups` times 64 rows of the weight: splits,
    columns a block, how many blocks of the weight and of x have slots in shared memory, how many blocks of the weight
    are HELD in registers, and how many are ASKED for before the first has come. norm: whether LayerNorm comes first.

    Up to 64 tokens all blocks of a group's weights have slots, and of x those that are not multiplied by a block in
    registers; or three of x at least, which take turns. Large blocks are faster: they may go a little beyond the last
    column, where zeros are. At 64 tokens what the kernel ahead reads suffers if all weights are asked for at once.
    With more tokens or groups both operands go through rings.
    """
    splits, part = splits_of(inputs)
    chosen = {"SPLITS": splits, "TOKENS": tokens, "GROUPS": groups}
    if tokens > 64 or groups > 1:
        slots = (SHARED - SPARE) // ((tokens + groups * ROWS) * RING * 2)
        slots = min(slots, part // RING)
        shared = {"WEIGHT_SLOTS": slots, "SLOTS": slots, "HELD": 0, "ASKED": slots}
        return chosen | {"SPLIT_K": part, "BLOCK_K": RING} | shared
    most = MOST_HELD if inputs <= 2048 or not norm else 0  # statistics of wider rows take as many registers
    for block in (256, 128, 64):
        blocks = triton.cdiv(part, block)
        length = blocks * block
        slots = min(blocks, (SHARED - SPARE - length * ROWS * 2) // (tokens * block * 2))
        held = blocks - slots if (blocks - slots) * block <= most else 0
        fits = length == part or (splits == 1 and length - part <= part // 16)
        if fits and held + slots >= min(3, blocks):
            break
    asked = min(blocks, max(3, blocks - held)) if tokens == 64 else blocks
    shared = {"WEIGHT_SLOTS": blocks, "SLOTS": slots, "HELD": held, "ASKED": asked}
    return chosen | {"SPLIT_K": length, "BLOCK_K": block} | shared


def late(outputs: int, inputs: int, chosen: dict[str, int]) -> int:
    """How many programs of a launch over one block of tokens find a multiprocessor only when the kernel ahead leaves
    it, which is taken to have one program for each 64 inputs. Those of the down-projection that start earlier bring
    the others' weights to L2 meanwhile; at 16 tokens and fewer that delays what is needed first. Not for more programs
    than those that can fetch."""
    programs = triton.cdiv(outputs, ROWS) * chosen["SPLITS"]
    early = MULTIPROCESSORS - triton.cdiv(inputs, ROWS)
    wanted = 32 <= chosen["TOKENS"] <= 64 and chosen["GROUPS"] == 1 and early < programs <= 2 * early
    return programs - early if wanted else 0


def launch(
    x: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    epilogue: Epilogue,
    out: torch.Tensor,
    stats_out: torch.Tensor | None,
    scratch: Scratch,
) -> None:
    """As `op._launch`."""
    (stats, sums, epsilon), (bias, activation, residual) = norm, epilogue
    if stats is not None and stats.data_ptr() % 8:  # a sum and its squares are read at once
        raise ValueError(f"linear: stats must start at a multiple of 8 bytes, got {stats.data_ptr():#x}; clone it")
    (count, inputs), outputs = x.shape, weight.shape[0]
    if splits_of(inputs)[0] * count * outputs >= 2**31:  # places in them have 32 bits
        got = f"{count} x {outputs} x {splits_of(inputs)[0]}"
        raise ValueError(f"linear: rows x outputs x splits must be under 2**31, got {got}; give fewer rows at a time")
    shape = padded(count), outputs, inputs
    tuned = config("linear_hopper", shape, x.device, candidates)
    if tuned not in candidates(shape, x.device):  # others would count beyond the counters
        raise ValueError(f"linear_hopper at {shape}: no such settings, {tuned}; run `stagedspec tune` again")
    chosen = settings(tuned["TOKENS"], inputs, tuned["GROUPS"], stats is not None)
    tokens, rows, block = chosen["TOKENS"], chosen["GROUPS"] * ROWS, chosen["BLOCK_K"]
    launch_kernel(
        _linear_hopper,
        (triton.cdiv(outputs, rows), chosen["SPLITS"], triton.cdiv(count, tokens)),
        described("linear", "x", x, tokens, block),
        described("linear", "weight", weight, rows, block),
        weight,
        stats,
        sums,
        bias,
        residual,
        out,
        stats_out,
        *scratch,
        count,
        epsilon,
        OUT=outputs,
        K=inputs,
        NORM=stats is not None,
        STAT_TILES=stat_tiles(inputs),
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        ACTIVATION=activation,
        STATS=stats_out is not None,
        ROWS=ROWS,
        **chosen,
        LATE=late(outputs, inputs, chosen) if count <= tokens else 0,
        num_warps=4 * chosen["GROUPS"],
        **launch_options(x.device),
    )
