"""Verification on the device: the accepted path of each tree, the tokens it commits, and the KV rows that move.

`Trees.verify_commit` of state/host.py without a loop over nodes. Node n agrees if it is the root or if its token is
what was chosen at its parent; siblings have different tokens, so the nodes all of whose ancestors agree are one path
from the root, the accepted one, and a node's depth is its place in it:

    agrees[n]   = (n == 0 or chosen[parent[n]] == token[n]) and chosen[n] != UNCHOSEN
    accepted[n] = agrees[n] and not (mask[n] & ~agrees)           words of bits
    steps       = sum(accepted)                                   the bonus token included
    count       = min(steps, first end of sequence + 1, limit - length, depth of an accepted INVALID or NO_TOKEN)

UNCHOSEN (-1) marks a node that must not be accepted. INVALID (-2) marks a node at which no token can be chosen: the
path ends before it. In a tree of several nodes the cause may be another node, because 0 * NaN is NaN. So the row's next
tree must be a root alone (running ROOT_ALONE), and there the row ends, with running -1. NO_TOKEN (-3) is an INVALID of
which it is known that no other node is the cause: the row ends at once. For an accepted node of depth d < count,
chosen[n] becomes the token at position length + d. Its origin is that of the accepted node of depth d + 1, or the
target if there is none.

Shapes, for N nodes and W = ceil(N / 32) words: chosen int32 or int64 [B, N]; tree int32 [5, B, N] and masks int32
[B, N, W] as `grow_tree` leaves them. `CommitState`, all written in place:

    tokens int32 [B, S]    committed tokens          lengths, limits, running int32 [B]
    origins int8 [B, S]    who proposed each         active int32 [1]: rows that still run
    eos int32 [E]          ids that end a row, E >= 1, filled up with -1

running is 1 or ROOT_ALONE (2) while a row runs, 0 once it has stopped, -1 if it stopped because no token could be
chosen.

Out, for D = the deepest path:

    accepted int32 [B]             tokens taken from nodes below the root, -1 for a row that had stopped
    counts int32 [B, D + 1]        added to: row-steps that accepted at least d tokens; d = 0 counts all
    target_moves int32 [2, B, D + 1]   tree rows and the positions they move to: the accepted path
    draft_moves int32 [2, B, D + 2]    the catch-up token, then the slots of the accepted path
                                       -1 in both where nothing moves, and everywhere for a row that has stopped

A row that had stopped before the step is left as it is. Bytes: 24 N + 4 N W a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stagedspec.kernels.common.constants import INVALID, NO_TOKEN, ROOT_ALONE, UNCHOSEN
from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    register,
)
from stagedspec.kernels.grow_tree.state import TOKEN, TREE_DEPTH, TREE_ORIGIN, TREE_PARENT, TREE_SLOT, words

NEVER_ENDS = tl.constexpr(2**30)
_UNCHOSEN, _INVALID = tl.constexpr(UNCHOSEN), tl.constexpr(INVALID)
_NO_TOKEN, _ALONE = tl.constexpr(NO_TOKEN), tl.constexpr(ROOT_ALONE)


@triton.jit(do_not_specialize=("stride", "ends", "nodes", "deepest", "words"))
def verify_commit_kernel(
    p_chosen,  # [B, N]
    p_tree,  # [5, B, N]
    p_masks,  # [B, N, W]
    p_tokens,  # [B, S]
    p_origins,  # [B, S]
    p_lengths,  # [B]
    p_limits,  # [B]
    p_running,  # [B]
    p_active,  # [1]
    p_eos,  # [E]
    p_accepted,  # [B]
    p_counts,  # [B, D + 1]
    p_target_moves,  # [2, B, D + 1]
    p_draft_moves,  # [2, B, D + 2]
    stride,
    ends,
    nodes,
    deepest,
    words,
    NODES_BLOCK: tl.constexpr,
    WORDS_BLOCK: tl.constexpr,
    DEPTHS_BLOCK: tl.constexpr,
    ENDS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row, rows = tl.program_id(0), tl.num_programs(0)
    length = tl.load(p_lengths + i_row)
    limit = tl.load(p_limits + i_row)
    running = tl.load(p_running + i_row)
    runs = running > 0
    i_node = tl.arange(0, NODES_BLOCK)
    b_inside = i_node < tl.where(runs, nodes, 0)  # a row that has stopped has no nodes
    field = rows * nodes
    p_node = p_tree + i_row * nodes + i_node
    b_token = tl.load(p_node + TOKEN * field, mask=b_inside, other=-1)
    b_parent = tl.load(p_node + TREE_PARENT * field, mask=b_inside, other=-1)
    b_depth = tl.load(p_node + TREE_DEPTH * field, mask=b_inside, other=0)
    b_slot = tl.load(p_node + TREE_SLOT * field, mask=b_inside, other=-1)
    b_origin = tl.load(p_node + TREE_ORIGIN * field, mask=b_inside, other=0)
    b_chosen = tl.load(p_chosen + i_row * nodes + i_node, mask=b_inside, other=-1).to(tl.int32)
    i_end = tl.arange(0, ENDS_BLOCK)
    b_ends = tl.load(p_eos + i_end, mask=i_end < ends, other=-1)

    # The accepted path.
    b_wanted = tl.load(p_chosen + i_row * nodes + b_parent, mask=b_parent >= 0, other=-1).to(tl.int32)
    b_agrees = ((i_node == 0) | ((b_parent >= 0) & (b_wanted == b_token))) & (b_chosen != _UNCHOSEN)
    b_bits = tl.where(b_agrees, 1 << (i_node & 31), 0)
    b_agreeing = tl.sum(tl.reshape(b_bits, [WORDS_BLOCK, 32]), 1)  # distinct bits: the sum is their union
    i_word = tl.arange(0, WORDS_BLOCK)[None, :]
    b_visible = b_inside[:, None] & (i_word < words)
    b_mask = tl.load(p_masks + (i_row * nodes + i_node)[:, None] * words + i_word, mask=b_visible, other=0)
    b_broken = tl.max(((b_mask & ~b_agreeing[None, :]) != 0).to(tl.int32), 1)
    b_accepted = b_inside & b_agrees & (b_broken == 0)
    steps = tl.sum(b_accepted.to(tl.int32), 0)

    # How much of it, and whether the row goes on.
    b_stops = tl.max((b_chosen[:, None] == b_ends[None, :]).to(tl.int32), 1)
    for i_first in range(ENDS_BLOCK, ends, ENDS_BLOCK):  # hardly ever
        b_ends = tl.load(p_eos + i_first + i_end, mask=i_first + i_end < ends, other=-1)
        b_stops = tl.maximum(b_stops, tl.max((b_chosen[:, None] == b_ends[None, :]).to(tl.int32), 1))
    until = tl.min(tl.where(b_accepted & (b_stops != 0) & (b_chosen >= 0), b_depth + 1, NEVER_ENDS), 0)
    b_wrong = b_accepted & ((b_chosen == _INVALID) | (b_chosen == _NO_TOKEN))  # the last of the path, if any
    wrong = tl.min(tl.where(b_wrong, b_depth, NEVER_ENDS), 0)
    sure = tl.max((b_wrong & (b_chosen == _NO_TOKEN)).to(tl.int32), 0) > 0
    count = tl.minimum(tl.minimum(tl.minimum(steps, until), wrong), tl.maximum(limit - length, 0))
    ended = (until <= count) | (length + count >= limit)
    invalid = runs & ~ended & (wrong <= count)
    again = invalid & ~sure & (nodes > 1) & (running != _ALONE)
    fails = invalid & ~again
    goes_on = runs & ~ended & ~fails

    i_at = i_row * stride + length + b_depth
    tl.store(p_tokens + i_at, b_chosen, mask=b_accepted & (b_depth < count))
    tl.store(p_origins + i_at - 1, b_origin.to(tl.int8), mask=b_accepted & (i_node > 0) & (b_depth <= count))
    b_last = b_accepted & (b_depth == steps - 1) & (b_depth < count)
    tl.store(p_origins + i_at, tl.zeros([NODES_BLOCK], tl.int8), mask=b_last)  # the bonus token is the target's

    # Statistics.
    taken = tl.where(runs, tl.minimum(count, steps - 1), -1)
    tl.store(p_accepted + i_row, taken)
    i_depth = tl.arange(0, DEPTHS_BLOCK)
    p_count = p_counts + i_row * (deepest + 1) + i_depth
    b_count = tl.load(p_count, mask=i_depth <= deepest, other=0)
    tl.store(p_count, b_count + (taken >= i_depth).to(tl.int32), mask=i_depth <= deepest)

    # Moves: none at first, then those of the path.
    b_none = tl.full([DEPTHS_BLOCK], -1, tl.int32)
    target_field, draft_field = rows * (deepest + 1), rows * (deepest + 2)
    p_target = p_target_moves + i_row * (deepest + 1)
    p_draft = p_draft_moves + i_row * (deepest + 2)
    tl.store(p_target + i_depth, b_none, mask=i_depth <= deepest)
    tl.store(p_target + target_field + i_depth, b_none, mask=i_depth <= deepest)
    tl.store(p_draft + i_depth, b_none, mask=i_depth <= deepest + 1)
    tl.store(p_draft + draft_field + i_depth, b_none, mask=i_depth <= deepest + 1)
    tl.debug_barrier()
    b_moves = b_accepted & (b_depth < tl.where(goes_on, count, 0))
    tl.store(p_target + b_depth, i_node, mask=b_moves)
    tl.store(p_target + target_field + b_depth, length - 1 + b_depth, mask=b_moves)
    b_moves &= b_slot >= 0
    tl.store(p_draft + 1 + b_depth, b_slot, mask=b_moves)
    tl.store(p_draft + draft_field + 1 + b_depth, length - 1 + b_depth, mask=b_moves)
    catches_up = goes_on & (length > 1)
    tl.store(p_draft, 0, mask=catches_up)
    tl.store(p_draft + draft_field, length - 2, mask=catches_up)

    # Every thread has read these before the barrier.
    tl.store(p_lengths + i_row, length + count)
    runs_on = tl.where(again, _ALONE, goes_on.to(tl.int32) - fails.to(tl.int32))
    tl.store(p_running + i_row, tl.where(runs, runs_on, running))
    tl.atomic_add(p_active, -1, mask=runs & ~goes_on)


# ---------------------------------------------------------------- the operation


class CommitState(NamedTuple):
    """What is committed, and which rows run (the module's docstring has shapes)."""

    tokens: torch.Tensor
    origins: torch.Tensor
    lengths: torch.Tensor
    limits: torch.Tensor
    running: torch.Tensor
    active: torch.Tensor
    eos: torch.Tensor


def _launch(
    chosen: torch.Tensor,
    tree: torch.Tensor,
    masks: torch.Tensor,
    state: CommitState,
    accepted: torch.Tensor,
    counts: torch.Tensor,
    target_moves: torch.Tensor,
    draft_moves: torch.Tensor,
) -> None:
    batch, nodes = chosen.shape
    deepest = counts.shape[1] - 1
    launch_kernel(
        verify_commit_kernel,
        (batch,),
        chosen, tree, masks, *state, accepted, counts, target_moves, draft_moves,
        state.tokens.shape[1], state.eos.shape[0], nodes, deepest, words(nodes),
        **blocks_of(nodes, deepest),
        num_warps=_settings(nodes, chosen.device)["warps"], **launch_options(chosen.device),
    )  # fmt: skip


def blocks_of(nodes: int, deepest: int) -> dict[str, int]:
    """Tile sizes: powers of two, large enough that most trees share a compiled kernel."""
    up = triton.next_power_of_2
    block = max(32, up(nodes))
    return {
        "NODES_BLOCK": block,
        "WORDS_BLOCK": block // 32,
        "DEPTHS_BLOCK": max(32, up(deepest + 2)),
        "ENDS_BLOCK": 8,
    }


def default_warps(nodes: int) -> int:
    return 1 if nodes <= 32 else 4


def candidates(shape: tuple[int], device: torch.device) -> list[dict[str, int]]:
    """Settings to try at the shape (nodes,), the default first."""
    default = {"warps": default_warps(*shape)}
    return [default, *({"warps": warps} for warps in (1, 2, 4, 8) if warps != default["warps"])]


def _settings(nodes: int, device: torch.device) -> dict[str, int]:
    return config("verify_commit", (nodes,), device, candidates)


_op = register(
    "verify_commit(Tensor chosen, Tensor tree, Tensor masks, Tensor(a!) tokens, Tensor(b!) origins, "
    "Tensor(c!) lengths, Tensor limits, Tensor(d!) running, Tensor(e!) active, Tensor eos, "
    "Tensor(f!) accepted, Tensor(g!) counts, "
    "Tensor(h!) target_moves, Tensor(i!) draft_moves) -> ()",
    _launch,
)


def verify_commit(
    chosen: torch.Tensor,
    tree: torch.Tensor,
    masks: torch.Tensor,
    state: CommitState,
    accepted: torch.Tensor,
    counts: torch.Tensor,
    target_moves: torch.Tensor,
    draft_moves: torch.Tensor,
) -> None:
    """Finds the accepted paths and commits their tokens (the module's docstring has shapes and dtypes).

    chosen: `choose` at every node, UNCHOSEN at nodes not to be stepped to. The tree's paths may be at most
    counts.shape[1] - 1 deep, which is not read back to be checked. Raises ValueError for a wrong shape, dtype, device
    or layout.
    """
    name, device = "verify_commit", chosen.device
    check_runs(chosen, name)
    check_tensor(name, "chosen", chosen, (None, None), (torch.int32, torch.int64), device)
    rows, nodes = chosen.shape
    check_tensor(name, "tree", tree, (5, rows, nodes), torch.int32, device)
    check_tensor(name, "masks", masks, (rows, nodes, words(nodes)), torch.int32, device)
    check_tensor(name, "tokens", state.tokens, (rows, None), torch.int32, device)
    check_tensor(name, "origins", state.origins, tuple(state.tokens.shape), torch.int8, device)
    for field in ("lengths", "limits", "running"):
        check_tensor(name, field, getattr(state, field), (rows,), torch.int32, device)
    check_tensor(name, "active", state.active, (1,), torch.int32, device)
    check_tensor(name, "eos", state.eos, (None,), torch.int32, device)
    if not len(state.eos):
        raise ValueError(f"{name}: eos must hold at least one id, got none; use -1 where no token ends a row")
    check_tensor(name, "accepted", accepted, (rows,), torch.int32, device)
    check_tensor(name, "counts", counts, (rows, None), torch.int32, device)
    deepest = counts.shape[1] - 1
    if deepest < 0:
        raise ValueError(f"{name}: counts must have the shape [{rows}, deepest path + 1], got {list(counts.shape)}")
    check_tensor(name, "target_moves", target_moves, (2, rows, deepest + 1), torch.int32, device)
    check_tensor(name, "draft_moves", draft_moves, (2, rows, deepest + 2), torch.int32, device)
    _op(chosen, tree, masks, *state, accepted, counts, target_moves, draft_moves)
