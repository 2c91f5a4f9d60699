"""The kernels of tree attention as an operation: tile sizes, launcher, checks of arguments."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from stagedspec.kernels.common.constants import MAX_HEAD_SIZE
from stagedspec.kernels.common.registry import (
    FLOATS,
    Scratch,
    architecture,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    most_registers,
    register,
)
from stagedspec.kernels.tree_attention.far import _attend_far
from stagedspec.kernels.tree_attention.near import _attend_near
from stagedspec.kernels.tree_attention.prompt import _attend_prompt
from stagedspec.kernels.tree_attention.shared import INTEGERS

# Keys at most this many positions before a node are gathered for each node, so that it does not matter whether they are
# committed: more than the depth of any tree. It fixes the order of sums over keys, so it is the same for all trees.
WINDOW = 32
MAX_NODES = 256
MAX_CHUNK = 1024
WARPS = 4
SPILLING = (80,)  # the near part's, see `most_registers`; heads wider than 64 spill everywhere
LOG2E = 1.4426950408889634


# Alignment decides layouts, and layouts the order of sums. Where heads are no multiple of 16 bytes, a layer's rows can
# start aligned in one batch size and not in another.
KERNELS = {
    True: (_attend_far, _attend_near, _attend_prompt),
    False: tuple(
        triton.jit(
            kernel.fn,
            do_not_specialize=INTEGERS,
            do_not_specialize_on_alignment=("p_qkv", "p_cache", "p_out"),
        )
        for kernel in (_attend_far, _attend_near, _attend_prompt)
    ),
}


# ---------------------------------------------------------------- launcher


def tree_tiles(head_size: int, itemsize: int, window: int) -> dict[str, int]:
    """Tile sizes, by the head, the dtype and the window only: they fix the order of every sum."""
    padded = max(triton.next_power_of_2(head_size), 64)  # the least left side of Hopper's matrix instructions
    split = 128 if padded * itemsize <= 256 and itemsize == 2 else 64
    near = min(max(split // window, 1), 16)
    # fp32 has no matrix instructions: wider products only make longer programs. Products of fewer columns than 64 are
    # swizzled otherwise than their keys, and the ptxas of CUDA 12.8 gives them wrong addresses in shared memory.
    far = 16 if itemsize == 4 else 64
    return {"D_PAD": padded, "SPLIT": split, "FAR_ROWS": far, "NEAR_ROWS": near, "TOGETHER": 8}


def prompt_tiles(head_size: int, itemsize: int) -> dict[str, int]:
    """Of `_attend_prompt`, by the head and the dtype only, for the same reason."""
    padded = max(triton.next_power_of_2(head_size), 16)
    rows, keys = (64, 64) if itemsize == 2 and padded <= 128 else (16, 32)
    return {"D_PAD": padded, "ROWS": rows, "KEYS": keys}


def in_one_launch(head_size: int, itemsize: int, window: int, device: torch.device) -> bool:
    """Whether the kernel for Hopper runs, by what all passes have in common: it has bits of its own."""
    return (head_size, itemsize, window) == (64, 2, WINDOW) and architecture(device) == 90


def far_warps(arch: int, head_size: int) -> int:
    """Wide heads spill in four warps where the matrix instructions take their operands from registers."""
    return 2 * WARPS if head_size > 64 and arch in (80, 120) else WARPS


def near_warps(head_size: int, itemsize: int) -> int:
    """A near tile of heads of 64 is small: with two warps more of them run at once (on an H200 at 64 nodes attention
    takes 4% to 7% less). Wider heads, and those that do not begin where wide loads can, spill then."""
    return 2 if itemsize == 2 and head_size <= 64 and head_size * itemsize % 16 == 0 else WARPS


def near_registers(arch: int, head_size: int, warps: int) -> int | None:
    return most_registers(arch, warps, SPILLING if head_size <= 64 else (arch,))


def _splits(rows: int, tree_rows: int, split: int) -> int:
    return triton.cdiv(max(rows - tree_rows, 1), split)


def scratch_size(
    batch: int, nodes: int, heads: int, kv_heads: int, head_size: int, rows: int, tree_rows: int
) -> tuple[int, int]:
    """(partials, counters) that `tree_attention` needs with a cache of `rows` rows, for any dtype and window."""
    queries = nodes * heads // kv_heads
    return batch * kv_heads * _splits(rows, tree_rows, 64) * queries * (head_size + 2), 0


class PassNodes(NamedTuple):
    """Masks and cache rows of a pass's nodes (`tree_attention` documents each field)."""

    masks: torch.Tensor
    prefix: torch.Tensor
    first_bit: int
    chunk: bool
    tree_rows: int
    window: int
    settled: bool


def _launch(
    qkv: torch.Tensor, cache: torch.Tensor, placed: PassNodes, scale: float, out: torch.Tensor, partials: torch.Tensor
) -> None:
    check_runs(qkv, "tree_attention")
    masks, prefix, first_bit, chunk, tree_rows, window, settled = placed
    batch, nodes, words = masks.shape
    _, rows, _, kv_heads, size = cache.shape
    group = out.shape[1] // size // kv_heads
    whole = size * qkv.element_size() % 16 == 0  # heads begin where wide loads can
    if whole and (qkv.data_ptr() | cache.data_ptr()) % 16:
        raise ValueError("tree_attention: qkv and cache must start at a multiple of 16 bytes, got views: copy them")
    far, near, prompt = KERNELS[whole]
    shared = {"KV_HEADS": kv_heads, "GROUP": group, "D": size, **launch_options(qkv.device)}
    scale *= LOG2E
    queries = nodes * group
    if chunk:
        tiles = prompt_tiles(size, qkv.element_size())
        grid = triton.cdiv(queries, tiles["ROWS"]), batch * kv_heads
        launch_kernel(
            prompt, grid, qkv, cache, prefix, out, scale, nodes, rows, tree_rows,
            num_warps=far_warps(architecture(qkv.device), size), **tiles, **shared,
        )  # fmt: skip
        return
    shared |= {"WORDS": words, "WINDOW": window}
    if in_one_launch(size, qkv.element_size(), window, qkv.device):
        from stagedspec.kernels.tree_attention import hopper  # Gluon takes a while to import

        given = qkv, cache, masks, prefix, out, scale, nodes, rows, first_bit, tree_rows
        return hopper.launch(queries, batch * kv_heads, *given, SETTLED=settled, **shared)
    tiles = tree_tiles(size, qkv.element_size(), window)
    splits = _splits(rows, tree_rows, tiles["SPLIT"])
    count = batch * kv_heads * splits * queries
    acc, top, total = partials[: count * size], partials[count * size :], partials[count * (size + 1) :]
    shared |= {name: tiles[name] for name in ("D_PAD", "SPLIT")}
    inputs, parts, sizes = (qkv, cache, masks, prefix), (acc, top, total), (nodes, rows, first_bit, tree_rows, splits)
    launch_kernel(
        far,
        (splits, triton.cdiv(queries, tiles["FAR_ROWS"]), batch * kv_heads),
        *inputs,
        *parts,
        scale,
        *sizes,
        ROWS=tiles["FAR_ROWS"],
        num_warps=far_warps(architecture(qkv.device), size),
        **shared,
    )
    warps = near_warps(size, qkv.element_size())
    launch_kernel(
        near,
        (triton.cdiv(queries, tiles["NEAR_ROWS"]), batch * kv_heads),
        *inputs, *parts, out, scale, *sizes,
        ROWS=tiles["NEAR_ROWS"], FILLED=16, TOGETHER=tiles["TOGETHER"], num_warps=warps,
        maxnreg=near_registers(architecture(qkv.device), size, warps), **shared,
    )  # fmt: skip


_op = register(
    "tree_attention(Tensor qkv, Tensor(a!) cache, Tensor masks, Tensor prefix, int first_bit, bool chunk, "
    "int tree_rows, int window, bool settled, float scale, Tensor(b!) out, Tensor(c!) partials) -> ()",
    _launch,
)


# ---------------------------------------------------------------- public functions


def mask_words(seen: torch.Tensor) -> torch.Tensor:
    """What nodes see, bool [..., N, K] by tree row, as the int32 words [..., N, (K + 31) // 32] of their masks."""
    bits = F.pad(seen, (0, -seen.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    words = (bits << torch.arange(32, device=seen.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _check_nodes(op: str, placed: PassNodes, rows: int) -> None:
    """Whether the nodes' rows lie where the pass may write, in a cache of `rows` rows, and masks reach them."""
    masks, _, first_bit, chunk, tree_rows, window, _ = placed
    _, nodes, words = masks.shape
    if not (8 <= window <= 256 and window & (window - 1) == 0):
        raise ValueError(f"{op}: window must be a power of two from 8 to 256, got {window}")
    if not 0 <= tree_rows <= rows:
        raise ValueError(f"{op}: tree_rows must be 0 to the cache's {rows} rows, got {tree_rows}")
    if not chunk and not 0 <= first_bit <= tree_rows - nodes:
        raise ValueError(
            f"{op}: a pass of a tree must lie inside the {tree_rows} tree rows, got {nodes} nodes from row {first_bit} "
            "on"
        )
    if chunk and (first_bit != 0 or tree_rows + nodes > rows):
        raise ValueError(
            f"{op}: a chunk of a prompt must have first_bit 0 and fit into the cache's {rows - tree_rows} rows after "
            f"the tree, got first_bit {first_bit} and {nodes} nodes"
        )
    if 32 * words < first_bit + nodes:
        raise ValueError(f"{op}: masks must have {triton.cdiv(first_bit + nodes, 32)} words a node, got {words}")


def tree_attention(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    masks: torch.Tensor,
    prefix: torch.Tensor,
    first_bit: int,
    chunk: bool,
    tree_rows: int,
    scale: float,
    out: torch.Tensor,
    scratch: Scratch,
    window: int = WINDOW,
    settled: bool = False,
) -> None:
    """Attention of a pass of N nodes a sequence; writes out and appends the nodes' K and V to the cache.

    qkv: [B*N, (H + 2*H_kv)*D] of fp32, fp16 or bf16: queries, keys, values; H_kv divides H. cache: [B, S, 2, H_kv, D]
    of the same dtype, rows [0, tree_rows) the tree region, position t in row tree_rows + t. masks: int32 [B, N, W], the
    tree rows that a node sees and its own; a node with no bit set gets zeros. prefix: int32 [B], committed rows that
    are seen; below 0 counts as 0. first_bit: tree row of the pass's node 0; rows before it are read from the cache.
    out: [B*N, H*D].

    chunk: False for a pass of a tree: its K and V go to the tree rows from first_bit on, and no node may have more than
    `window` bits set. True for a chunk of a prompt: every node sees those before it, masks and scratch are not read,
    and the K and V follow the prefix. scale: factor of the scores, as a rule D**-0.5. scratch: of `scratch_size`, or
    more. window: a power of two, the same for everything that must agree bitwise. Scores and sums are in fp32.

    settled: whether masks, prefix and the rows that it counts were complete before the kernel ahead of this one began.
    So it is in a pass that begins with `embed`: nothing that follows starts before `embed` has waited for all before
    it. The kernel for Hopper then reads them before the kernel ahead has ended; the others, prompts' too, always wait.

    What lies in masks and prefix is on the device and not checked: bits below first_bit + N only, prefix at most
    S - tree_rows, of a chunk at most S - tree_rows - N.

    Raises ValueError for a wrong shape, dtype, device or layout, N over 256 (of a chunk 1024), and rows out of range.
    """
    op = "tree_attention"
    check_runs(qkv, op)
    device = qkv.device
    check_tensor(op, "qkv", qkv, (None, None), FLOATS, device)
    check_tensor(op, "cache", cache, (None, None, 2, None, None), qkv.dtype, device)
    batch, rows, _, kv_heads, size = cache.shape
    check_tensor(op, "masks", masks, (batch, None, None), torch.int32, device)
    nodes = masks.shape[1]
    check_tensor(op, "prefix", prefix, (batch,), torch.int32, device)
    check_tensor(op, "out", out, (batch * nodes, None), qkv.dtype, device)
    check_tensor(op, "scratch.partials", scratch.partials, (None,), torch.float32, device)
    most = MAX_CHUNK if chunk else MAX_NODES
    if not 1 <= nodes <= most:
        raise ValueError(f"{op}: a pass must have 1 to {most} nodes, got masks for {nodes}")
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise ValueError(f"{op}: the head size must be 1 to {MAX_HEAD_SIZE}, got a cache of {size}")
    heads = out.shape[1] // size
    if out.shape[1] % size or heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: out must have H*{size} columns with H a multiple of the cache's {kv_heads}, got {out.shape[1]}"
        )
    check_tensor(op, "qkv", qkv, (batch * nodes, (heads + 2 * kv_heads) * size), FLOATS, device)
    placed = PassNodes(masks, prefix, first_bit, chunk, tree_rows, window, settled)
    _check_nodes(op, placed, rows)
    need = (0, 0) if chunk else scratch_size(batch, nodes, heads, kv_heads, size, rows, tree_rows)
    if scratch.partials.numel() < need[0]:
        have = scratch.partials.numel()
        raise ValueError(f"{op}: scratch must hold {need[0]} partials, got {have}; see scratch_size")
    _op(qkv, cache, *placed, scale, out, scratch.partials)
