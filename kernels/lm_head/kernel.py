"""The language model's head: final LayerNorm, logits, and the choice of a token a node, in one operation.

    h      = LayerNorm(x)                           x [M, d], rounded to the head's dtype
    logits = h @ head.T                             head [V, d], fp32 accumulation, never rounded below fp32
    lm_head_choose: out [M] = choose(logits)                        (`reference.choose`)
    lm_head_topm:   the draft's m children and log-probabilities    (`reference.choose_children`)

Bytes: the head once, V*d elements; for greedy and plain temperature sampling nothing else of size. With top-k, top-p
or min-p, and for children, the fp32 logits go through memory, 8*M*V bytes that stay in L2 at M = 64.

Kernels. `norm_kernel`, one program a row: every program of the matrix multiply would otherwise compute the same
statistics again. `head_kernel`: some programs a multiprocessor, each takes vocabulary tiles in turn. The weight tile is
the left operand of `tl.dot`, the tokens the narrow right one, so that every M meets the same instructions in the same
order of K. While a tile is in registers its scores get their noise, and its best token is kept, or the groups' maxima
for `choose`'s last kernels are written. The last program to finish reduces the programs' best: maxima and lowest ids
have no order, so neither the number of programs nor M can change a bit.

For 16-bit types on Hopper, hopper.py takes `head_kernel`'s place. Device and head shape decide which of the two runs,
the same for every M.
"""

import triton
import triton.language as tl

from stagedspec.kernels.choose.scores import COUNTERS, add_noise, best_of, decided, scale_logits, store_groups


@triton.jit
def norm_kernel(p_x, p_weight, p_bias, p_out, epsilon, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """LayerNorm of one row, in fp32, written in the dtype of p_out."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.arange(0, BLOCK)
    inside = at < K
    weight = tl.load(p_weight + at, inside, 0.0).to(tl.float32)
    bias = tl.load(p_bias + at, inside, 0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * K
    x = tl.load(p_x + row + at, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / K, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / K + epsilon)
    tl.store(p_out + row + at, (centred * scale * weight + bias).to(p_out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=("M", "N"), do_not_specialize_on_alignment=COUNTERS)
def head_kernel(
    p_x, p_head, p_noise, p_seeds, p_streams, p_positions, p_logits, p_maxima, p_masses, p_best, p_ids, p_counters,
    p_out,
    M, N, scale, V: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, SCALING: tl.constexpr, NOISE: tl.constexpr, CHOOSE: tl.constexpr,
    STORE: tl.constexpr, MASSES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (p, c): vocabulary tiles p, p + programs, ... for rows c * R .. + R.

    CHOOSE: keep the best token, reduced by the last program. Else the groups' maxima and masses of the scores.
    STORE 0: no logits in memory; 1: the logits; 2: the scores, noise included. Their rows are STRIDE apart.
    """
    i_program, i_chunk = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    rows = i_chunk * R + tl.arange(0, R)  # [R]
    kept = rows < M
    safe = tl.minimum(rows, M - 1)
    depth = tl.arange(0, BLOCK_K)
    top = tl.full((R,), float("-inf"), tl.float32)
    chosen = tl.full((R,), V, tl.int32)
    p_right = p_x + safe[None, :].to(tl.int64) * K + depth[:, None]  # [BLOCK_K, R]
    for tile in range(i_program, (V + T - 1) // T, programs):
        first = tile * T
        tokens = first + tl.arange(0, T)  # [T]
        p_left = p_head + tl.minimum(tokens, V - 1)[:, None].to(tl.int64) * K + depth[None, :]  # [T, BLOCK_K]
        scores = tl.full((T, R), 0.0, tl.float32)
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                left, right = tl.load(p_left + start), tl.load(p_right + start)
            else:
                left = tl.load(p_left + start, (start + depth < K)[None, :], 0.0)
                right = tl.load(p_right + start, (start + depth < K)[:, None], 0.0)
            scores = tl.dot(left, right, scores, input_precision="ieee")  # [T, R]
        real = (tokens < V)[:, None] & kept[None, :]
        at = safe[None, :].to(tl.int64) * STRIDE + tokens[:, None]
        if STORE == 1:
            tl.store(p_logits + at, scores, real)
        scores = scale_logits(scores, scale, SCALING)
        scores = add_noise(
            scores, first, tokens, safe, real, p_noise, p_seeds, p_streams, p_positions, V, N, NOISE, T, R
        )
        if STORE == 2:
            tl.store(p_logits + at, scores, real)
        scores = tl.where((tokens < V)[:, None], scores, float("-inf"))
        if CHOOSE:
            best, ids = best_of(scores, tokens, V)
            chosen = tl.where(best > top, ids, tl.where(best == top, tl.minimum(ids, chosen), chosen))
            top = tl.maximum(best, top)
        else:
            store_groups(scores, first, rows, kept, p_maxima, p_masses, G, MASSES, T, R)
    if CHOOSE:
        tl.store(p_best + i_program * M + rows, top, kept)
        tl.store(p_ids + i_program * M + rows, chosen, kept)
        tl.debug_barrier()
        if tl.atomic_add(p_counters + i_chunk, 1, sem="acq_rel") == programs - 1:
            for start in range(0, programs, 64):
                others = start + tl.arange(0, 64)
                at = others[:, None] * M + rows[None, :]
                inside = (others < programs)[:, None] & kept[None, :]  # [64, R]
                parts = tl.load(p_best + at, inside, float("-inf"), cache_modifier=".cg")
                numbers = tl.load(p_ids + at, inside, V, cache_modifier=".cg")
                best = tl.max(parts, 0)
                ids = tl.min(tl.where(parts == best[None, :], numbers, V), 0)
                chosen = tl.where(best > top, ids, tl.where(best == top, tl.minimum(ids, chosen), chosen))
                top = tl.maximum(best, top)
            tl.store(p_out + rows, decided(tl.minimum(chosen, V - 1), top, NOISE), kept)
            tl.store(p_counters + i_chunk, 0)
