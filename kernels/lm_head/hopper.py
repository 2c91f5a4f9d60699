"""The head of kernel.py on Hopper: a ring of weight blocks that is never empty, the tokens kept in shared memory.

    logits = h @ head.T    h [M, d] after the final norm, head [V, d], both bf16 or fp16, fp32 sums

A draft's head may have 8 bits (eight_bits.py); h is fp16 then, as which the matrix instructions read the weights from
registers, and the sums are multiplied by the scales of the rows.

Bytes: the head once, 2*V*d or V*d; through L2 h too, 2*M*d a program or, where it does not stay, a tile of the
vocabulary.

What must be moved is the weight. Each multiprocessor runs one program (up to three of 8 bits: one widens its weights
while others wait for theirs), which reads its share of the weight: tile after
tile of ROWS tokens of the vocabulary, in blocks of columns that bulk tensor copies bring into a ring of slots. The ring
is filled before the kernel ahead has ended (see linear/hopper.py), and refilled while a finished tile is processed. The
blocks of the normalised x are copied with those of the first tile and kept. If there is no room for them beside a ring
of some length, they are copied with those of every tile. For more than TOKENS rows the multiprocessors are shared:
programs beside each other read the same tiles, which come from memory once.

The greedy choice keeps the best of every position of a tile in registers, and compares across the tile once, at the
end.

Sums run over columns in their order, 16 at a time, in the same instructions for any number of tokens.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

from stagedspec.kernels.choose.op import Outputs, Sampling, Scoring, groups_of
from stagedspec.kernels.choose.scores import COUNTERS, GROUP, GROUP_UNIT, NOISES, decided, scale_logits
from stagedspec.kernels.common.hopper import SHARED, SPARE, copy, described
from stagedspec.kernels.common.registry import launch_kernel, launch_options
from stagedspec.kernels.philox import gumbel, key_words, philox

ROWS = GROUP  # of the weight, a tile: the least that the matrix instructions take, and one group of tokens
TOKENS = 64  # most rows of x, a program
BLOCK_BYTES = 256  # of a row of a block; 128 would synchronise too often at 64 tokens
MOST_PROGRAMS = {1: 3, 2: 1}  # of a multiprocessor, by the bytes of a weight: with 16 bits more gain nothing
RESERVED = 1024  # bytes of shared memory of each program that are not its own
SHORT_RING = 3  # slots where another program is multiplied meanwhile
RING = 6  # slots; a shorter ring runs empty while a tile is looked at, and costs more than x from L2 does
_BROKEN = gl.constexpr(-(2**20))  # below the first token of any tile: where the best is NaN


@gluon.jit(do_not_specialize=("M", "N"), do_not_specialize_on_alignment=COUNTERS)
def _head_hopper(
    x,  # [M, K], described in blocks [TOKENS, BLOCK_K]
    head,  # [V, K], described in blocks [ROWS, BLOCK_K]
    p_scales,  # [V], of the rows of an fp8 head
    p_noise,  # [M, V]
    p_seeds,  # [B]
    p_streams,  # [B]
    p_positions,  # [B, N]
    p_logits,  # [M, V], rows STRIDE apart
    p_maxima,  # [M, G]
    p_masses,  # [M, G]
    p_best,  # [programs, M]
    p_ids,  # [programs, M]
    p_counters,
    p_out,  # [M]
    M,
    N,
    scale,
    V: gl.constexpr,
    STRIDE: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TOKENS: gl.constexpr,
    SLOTS: gl.constexpr,
    STAYS: gl.constexpr,
    SCALING: gl.constexpr,
    NOISE: gl.constexpr,
    CHOOSE: gl.constexpr,
    STORE: gl.constexpr,
    MASSES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program (p, c): tiles p, p + programs, ... for rows c * TOKENS .. + TOKENS of x. CHOOSE, STORE and MASSES as of
    `kernel.head_kernel`; STAYS: whether all of x has room."""
    TILES: gl.constexpr = (V + ROWS - 1) // ROWS
    BLOCKS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    X_SLOTS: gl.constexpr = BLOCKS if STAYS else SLOTS
    # The scale is above 0: the largest of scaled scores is the largest, scaled.
    SCALED: gl.constexpr = CHOOSE or STORE == 2 or MASSES
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    BYTES: gl.constexpr = head.dtype.primitive_bitwidth // 8
    i_program, programs = gl.program_id(0), gl.num_programs(0)
    i_token = gl.program_id(1) * TOKENS

    # Before the kernel ahead has ended: the ring is filled.
    s_head = gl.allocate_shared_memory(head.dtype, [SLOTS, ROWS, BLOCK_K], head.layout)
    s_x = gl.allocate_shared_memory(x.dtype, [X_SLOTS, TOKENS, BLOCK_K], x.layout)
    there = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in range(SLOTS):
        mbarrier.init(there.index(i), count=1)
    fence_async_shared()  # the copies' unit sees the barriers as they are now
    if PDL:
        cuda.gdc_launch_dependents()
    for i in range(SLOTS):
        _load_head(head, s_head, there, i, i_program, programs, True, V, BLOCKS, STAYS, TOKENS)
    if PDL:
        cuda.gdc_wait()
    for i in range(SLOTS):
        _load_x(x, s_x, there, i, i_token, i_program, programs, True, V, BLOCKS, STAYS, SLOTS, ROWS)

    rows = gl.arange(0, ROWS, gl.SliceLayout(1, SUM))
    tokens = i_token + gl.arange(0, TOKENS, gl.SliceLayout(0, SUM))
    kept = tokens < M
    if NOISE == 1:
        QUADS: gl.constexpr = _quads(TOKENS)
        nodes = gl.minimum(i_token + gl.arange(0, TOKENS, gl.SliceLayout(0, QUADS)), M - 1)
        b_seed, b_stream = gl.load(p_seeds + nodes // N), gl.load(p_streams + nodes // N)
        b_position = gl.load(p_positions + nodes)
    b_top = gl.full((ROWS, TOKENS), float("-inf"), gl.float32, SUM)
    b_from = gl.full((ROWS, TOKENS), i_program * ROWS, gl.int32, SUM)
    if BYTES == 1:  # what a product still reads
        b_read = gl.zeros((ROWS, BLOCK_K), x.dtype, gl.DotOperandLayout(0, SUM, 2))
    i = 0
    for i_tile in range(i_program, TILES, programs):
        b_acc = gl.zeros((ROWS, TOKENS), gl.float32, SUM)
        if BYTES == 1:
            b_acc = warpgroup_mma_init(b_acc)
        for i_block in range(BLOCKS):
            i_slot = i % SLOTS
            mbarrier.wait(there.index(i_slot), (i // SLOTS) & 1)
            s_right = s_x.index(i_block if STAYS else i_slot).permute((1, 0))
            if BYTES == 1:
                b_left = _widened(s_head.index(i_slot), x.dtype, SUM)  # while the block before this one is multiplied
                b_acc = warpgroup_mma_wait(0, deps=(b_acc, b_read))[0]
                b_acc = warpgroup_mma(b_left, s_right, b_acc, is_async=True)
                b_read = b_left
            else:
                b_acc = warpgroup_mma(s_head.index(i_slot), s_right, b_acc, is_async=True)
                b_acc = warpgroup_mma_wait(1, deps=(b_acc,))
            # The block before this one is done with: its slot takes the next.
            tl.debug_barrier()
            i_next = i - 1 + SLOTS
            _load_head(head, s_head, there, i_next, i_program, programs, i > 0, V, BLOCKS, STAYS, TOKENS)
            _load_x(x, s_x, there, i_next, i_token, i_program, programs, i > 0, V, BLOCKS, STAYS, SLOTS, ROWS)
            i += 1
        if BYTES == 1:
            b_score = warpgroup_mma_wait(0, deps=(b_acc, b_read))[0]
        else:
            b_score = warpgroup_mma_wait(0, deps=(b_acc,))
        i_first = i_tile * ROWS
        real = i_first + rows < V
        if BYTES == 1:
            b_score *= gl.load(p_scales + i_first + rows, mask=real, other=0.0)[:, None]
        i_at = tokens.to(gl.int64)[None, :] * STRIDE + (i_first + rows)[:, None]
        there_too = real[:, None] & kept[None, :]
        if STORE == 1:
            gl.store(p_logits + i_at, b_score, mask=there_too)
        if SCALED:
            b_score = scale_logits(b_score, scale, SCALING)
        if NOISE == 1:
            b_score += _noise(i_first, b_seed, b_stream, b_position, ROWS, TOKENS, QUADS, SUM)
        elif NOISE == 2:
            i_noise = tokens.to(gl.int64)[None, :] * V + (i_first + rows)[:, None]
            b_score += gl.load(p_noise + i_noise, mask=there_too, other=0.0)
        if STORE == 2:
            gl.store(p_logits + i_at, b_score, mask=there_too)
        b_score = gl.where(real[:, None], b_score, float("-inf"))
        broken = b_score != b_score
        b_score = gl.where(broken, float("inf"), b_score)
        if CHOOSE:
            better = (b_score > b_top) | broken
            b_top = gl.where(better, b_score, b_top)
            b_from = gl.where(better, gl.where(broken, _BROKEN, i_first), b_from)
        else:
            b_most = gl.max(b_score, 0)
            if not SCALED:
                b_most = scale_logits(b_most, scale, SCALING)
            i_group = tokens * G + i_tile
            gl.store(p_maxima + i_group, b_most, mask=kept)
            if MASSES:
                b_base = gl.where(b_most == float("-inf"), 0.0, b_most)
                b_part = (gl.exp(b_score - b_base[None, :]) * GROUP_UNIT + 0.5).to(gl.int32)
                gl.store(p_masses + i_group, gl.sum(b_part, 0), mask=kept)
    if CHOOSE:
        b_best = gl.max(b_top, 0)
        b_id = gl.min(gl.where(b_top == b_best[None, :], b_from + rows[:, None], V), 0)
        gl.store(p_best + i_program * M + tokens, b_best, mask=kept)
        gl.store(p_ids + i_program * M + tokens, b_id, mask=kept)
        tl.debug_barrier()
        if gl.atomic_add(p_counters + gl.program_id(1), 1, sem="acq_rel") == programs - 1:
            tl.debug_barrier()
            _choose_of_all(p_best, p_ids, p_out, i_token, M, programs, V, TOKENS, NOISE)
            gl.store(p_counters + gl.program_id(1), 0)


@gluon.jit
def _load_head(
    head,
    s_head,
    there,
    i,
    i_program,
    programs,
    wanted,
    V: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAYS: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Starts the copy of the program's i-th block of the weight. The slot's barrier also counts the block of x, if one
    comes with it."""
    SLOTS: gl.constexpr = s_head.shape[0]
    ROWS: gl.constexpr = s_head.shape[1]
    BLOCK_K: gl.constexpr = s_head.shape[2]
    BYTES: gl.constexpr = ROWS * BLOCK_K * (head.dtype.primitive_bitwidth // 8)
    i_row, i_slot = (i_program + (i // BLOCKS) * programs) * ROWS, i % SLOTS
    wanted = wanted & (i_row < V)
    if STAYS:
        mbarrier.expect(there.index(i_slot), BYTES, pred=wanted & (i >= BLOCKS))
        with_x = wanted & (i < BLOCKS)
    else:
        with_x = wanted
    mbarrier.expect(there.index(i_slot), BYTES + TOKENS * BLOCK_K * 2, pred=with_x)
    copy(head, [i_row, (i % BLOCKS) * BLOCK_K], there.index(i_slot), s_head.index(i_slot), pred=wanted)


@gluon.jit
def _load_x(
    x,
    s_x,
    there,
    i,
    i_token,
    i_program,
    programs,
    wanted,
    V: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAYS: gl.constexpr,
    SLOTS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Starts the copy of the block of x that belongs to the program's i-th block of the weight. Where x stays in shared
    memory, only the first tile copies it."""
    BLOCK_K: gl.constexpr = s_x.shape[2]
    wanted = wanted & ((i_program + (i // BLOCKS) * programs) * ROWS < V)
    if STAYS:
        wanted = wanted & (i < BLOCKS)
    i_to = i % BLOCKS if STAYS else i % SLOTS
    copy(x, [i_token, (i % BLOCKS) * BLOCK_K], there.index(i % SLOTS), s_x.index(i_to), pred=wanted)


@gluon.jit
def _widened(s_block, dtype: gl.constexpr, SUM: gl.constexpr):
    """A block of an fp8 head [ROWS, BLOCK_K] as the left operand of a product, its columns in the order of x's."""
    ROWS: gl.constexpr = s_block.shape[0]
    BLOCK_K: gl.constexpr = s_block.shape[1]
    STORED: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [8, 0], [0, 128]],
        [[0, 32], [0, 64], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [ROWS, BLOCK_K],
    )
    b_wide = gl.reshape(s_block.load(STORED).to(dtype), (ROWS, 2, 4, 8, 2, 2))  # see eight_bits.py
    b_wide = gl.reshape(gl.permute(b_wide, (0, 1, 3, 4, 2, 5)), (ROWS, BLOCK_K))
    return gl.convert_layout(b_wide, gl.DotOperandLayout(0, SUM, 2), assert_trivial=True)


@triton.constexpr_function
def _quads(tokens: int) -> gl.DistributedLinearLayout:
    """Layout of [ROWS / 4, tokens] that gives each warp the quads of the rows that it has in the product, so that noise
    made for four rows at once stays within the warp."""
    rest = [*([0, 1 << bit] for bit in range(3, tokens.bit_length() - 1)), [2, 0], [0, 1]]
    lanes = [[0, 2], [0, 4], *rest[:2], [1, 0]]
    return gl.DistributedLinearLayout(rest[2:], lanes, [[4, 0], [8, 0]], [], [ROWS // 4, tokens])


@gluon.jit
def _noise(
    i_first,
    b_seed,
    b_stream,
    b_position,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    QUADS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """`philox.gumbel_tile` in the layout of the product."""
    k0, k1 = key_words(b_seed)
    quads = (i_first // 4 + gl.arange(0, ROWS // 4, gl.SliceLayout(1, QUADS))).to(gl.uint32)
    zero = gl.full((ROWS // 4, TOKENS), 0, gl.uint32, QUADS)
    c0, c1, c2 = (
        zero + quads[:, None],
        zero + b_position.to(gl.uint32)[None, :],
        zero + b_stream.to(gl.uint32)[None, :],
    )
    w0, w1, w2, w3 = philox(c0, c1, c2, zero, k0[None, :], k1[None, :])
    words = gl.join(gl.join(w0, w2), gl.join(w1, w3))  # [ROWS / 4, TOKENS, 2, 2]
    words = gl.reshape(gl.permute(words, (0, 2, 3, 1)), (ROWS, TOKENS))
    return gl.convert_layout(gumbel(words), LAYOUT)


@gluon.jit
def _choose_of_all(
    p_best, p_ids, p_out, i_token, M, programs, V: gl.constexpr, TOKENS: gl.constexpr, NOISE: gl.constexpr
):  # fmt: skip
    """The best of all programs: the lowest id of the largest score."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [32 // min(TOKENS, 32), min(TOKENS, 32)], [4, 1], [1, 0])
    tokens = i_token + gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))
    kept = tokens < M
    b_top = gl.full((TOKENS,), float("-inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    b_id = gl.full((TOKENS,), V - 1, gl.int32, gl.SliceLayout(0, LAYOUT))
    for start in range(0, programs, 64):
        others = start + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        inside = (others < programs)[:, None] & kept[None, :]
        at = others[:, None] * M + tokens[None, :]
        b_part = gl.load(p_best + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        b_name = gl.load(p_ids + at, mask=inside, other=V, cache_modifier=".cg")
        b_best = gl.max(b_part, 0)
        b_name = gl.min(gl.where(b_part == b_best[None, :], b_name, V), 0)
        b_id = gl.where(b_best > b_top, b_name, gl.where(b_best == b_top, gl.minimum(b_name, b_id), b_id))
        b_top = gl.maximum(b_best, b_top)
    gl.store(p_out + tokens, decided(b_id, b_top, NOISE), mask=kept)


# ---------------------------------------------------------------- launching


def settings(count: int, width: int, noisy: bool, stored: bool = False, itemsize: int = 2) -> dict[str, int]:
    """Programs a multiprocessor, columns a block, rows of x a program takes, slots of the ring, and whether all of x
    has room beside it. noisy: whether noise is made, half of which passes through shared memory at a time; stored:
    whether logits without it are stored too, for which 64 rows leave too few registers. itemsize: bytes of a weight.
    A program of 8 bits multiplies for longer than it loads, so several of them share a multiprocessor."""
    block = BLOCK_BYTES // itemsize
    tokens = min(TOKENS // 2 if itemsize == 1 or (noisy and stored) else TOKENS, max(8, triton.next_power_of_2(count)))
    columns = triton.cdiv(width, block) * block
    for programs in range(MOST_PROGRAMS[itemsize], 0, -1):
        room = (SHARED + RESERVED) // programs - RESERVED - SPARE - (ROWS * tokens * 2 if noisy else 0)
        slots = (room - columns * tokens * 2) // (ROWS * BLOCK_BYTES)
        stays = slots >= (RING if programs == 1 else SHORT_RING)
        if stays:
            break
    if not stays:
        slots = room // (ROWS * BLOCK_BYTES + tokens * block * 2)
    return {"PROGRAMS": programs, "BLOCK_K": block, "TOKENS": tokens, "SLOTS": slots, "STAYS": stays}


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    x: torch.Tensor,
    head: torch.Tensor,
    scales: torch.Tensor | None,
    sampling: Sampling,
    scoring: Scoring,
    logits: torch.Tensor,
    store: int,
    outputs: Outputs,
) -> None:
    """As `op._head`, of x after its LayerNorm."""
    (rows, width), vocab_size = x.shape, head.shape[0]
    chosen = settings(rows, width, scoring.noise_kind == NOISES["made"], store == 1, head.itemsize)
    tokens = chosen["TOKENS"]
    chunks = triton.cdiv(rows, tokens)
    programs = min(triton.cdiv(vocab_size, ROWS), max(1, chosen.pop("PROGRAMS") * _multiprocessors(x.device) // chunks))
    launch_kernel(
        _head_hopper,
        (programs, chunks),
        described("lm_head", "x", x, tokens, chosen["BLOCK_K"]),
        described("lm_head", "head", head, ROWS, chosen["BLOCK_K"]),
        outputs.maxima.scores if scales is None else scales,
        x if scoring.noise is None else scoring.noise,
        sampling.seeds,
        sampling.streams,
        sampling.positions,
        logits,
        *outputs.maxima,
        *outputs.maxima,
        outputs.counters,
        outputs.out,
        rows,
        sampling.positions.shape[1],
        scoring.scale,
        V=vocab_size,
        STRIDE=logits.stride(0),
        K=width,
        G=groups_of(vocab_size),
        ROWS=ROWS,
        SCALING=scoring.scaling,
        NOISE=scoring.noise_kind,
        CHOOSE=outputs.choose,
        STORE=store,
        MASSES=outputs.masses,
        **chosen,
        num_warps=4,
        **launch_options(x.device),
    )
