"""Look-up of draft²'s guesses for the token after two others: the sequence's own context n-gram, then a Katz table.

    rank 0        what followed the latest earlier occurrence of the pair in this sequence, worth CONTEXT_LOGPROB
    ranks 1 .. r  the table's successors of the pair if it has a row, else of its second token (`KatzTable.lookup`),
                  most probable first, without the token of rank 0

Shapes: contexts int32 [B, K, 2], the first of a pair -1 where there is no earlier token, the second -1 for no context;
sequence int32 [B, S] of which row b holds `lengths[b]` tokens; the table as `KatzTable` keeps it. Out: tokens int32 and
logprobs fp32 [B, K, 1 + r], [B, K, 1] without a table; a rank without a token holds -1 and -inf.

The sequence is compared with all contexts at once, a block of positions after the other. A key of the table lies in one
of PROBES slots: all are read together, with the rows that they name.
Bytes: 4 S of each sequence, and per context PROBES * 12 of the hash table and 8 r of a row. That is little: the time is
that of a chain of loads, the sequence's length, one block, one probe, one row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stagedspec.kernels.common import constants
from stagedspec.kernels.common.inputs import NgramTable
from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    register,
)

CONTEXT_LOGPROB = tl.constexpr(constants.CONTEXT_LOGPROB)
NEVER = tl.constexpr(float("-inf"))
PROBES = tl.constexpr(constants.PROBES)
HASH_MULTIPLIER = tl.constexpr(constants.HASH_MULTIPLIER)
HASH_SHIFT = tl.constexpr(constants.HASH_SHIFT)

TILE = 8  # contexts of one CTA
BLOCK = 256  # positions of the sequence compared at once


@triton.jit
def latest(p_sequence, length, b_first, b_last, BLOCK: tl.constexpr):
    """The token after the latest earlier occurrence of each pair b_first, b_last [K]: [K], -1 where there is none."""
    LANES: tl.constexpr = b_first.shape[0]
    b_found = tl.zeros([LANES, BLOCK], dtype=tl.int32)  # [K, BLOCK]: the latest end that each lane has met, 0 for none
    for i_start in range(2, length, BLOCK):
        i_end = i_start + tl.arange(0, BLOCK)
        b_inside = i_end < length
        b_before = tl.load(p_sequence + i_end - 2, mask=b_inside, other=-2)  # [BLOCK]
        b_at = tl.load(p_sequence + i_end - 1, mask=b_inside, other=-2)
        b_hit = (b_before[None, :] == b_first[:, None]) & (b_at[None, :] == b_last[:, None])
        b_found = tl.where(b_hit, i_end[None, :], b_found)  # ends only grow
    b_end = tl.max(b_found, 1)
    return tl.load(p_sequence + b_end, mask=b_end > 0, other=-1)


@triton.jit
def successors(
    p_sequence,
    length,
    b_first,
    b_last,
    p_keys,
    p_rows,
    p_tokens,
    p_logprobs,
    vocab_size,
    hash_slots,
    SUCCESSORS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens int32 and log-probabilities fp32 [K, RANKS] of the contexts b_first, b_last [K]."""
    i_rank = tl.arange(0, RANKS)
    if SUCCESSORS > 0:
        # Loaded first, so that it is under way while the sequence is searched.
        # A key below 0 (no first token) is not in the table, or is -1 and meets empty slots, which name its right row.
        b_key = b_first.to(tl.int64) * vocab_size + b_last
        i_probe = ((b_key * HASH_MULTIPLIER) >> HASH_SHIFT)[:, None] + tl.arange(0, PROBES)[None, :]  # [K, PROBES]
        i_probe &= (hash_slots - 1).to(tl.int64)
        b_known = (b_last >= 0)[:, None]
        b_held = tl.load(p_keys + i_probe, mask=b_known, other=-1)
        b_rows = tl.load(p_rows + i_probe, mask=b_known, other=-1)
    b_context = latest(p_sequence, length, b_first, b_last, BLOCK)
    b_tokens = tl.where(i_rank[None, :] == 0, b_context[:, None], -1)  # [K, RANKS]
    b_logprobs = tl.where(b_tokens >= 0, CONTEXT_LOGPROB, NEVER)
    if SUCCESSORS > 0:
        b_row = tl.max(tl.where(b_held == b_key[:, None], b_rows, -1), 1)
        b_row = tl.where(b_row < 0, b_last, b_row)
        i_entry = b_row.to(tl.int64)[:, None] * SUCCESSORS + (i_rank - 1)[None, :]
        b_listed = b_known & (i_rank > 0)[None, :] & (i_rank <= SUCCESSORS)[None, :]
        b_names = tl.load(p_tokens + i_entry, mask=b_listed, other=-1)
        b_values = tl.load(p_logprobs + i_entry, mask=b_listed, other=NEVER)
        b_listed &= b_names != b_context[:, None]
        b_tokens = tl.where(b_listed, b_names, b_tokens)
        b_logprobs = tl.where(b_listed, b_values, b_logprobs)
    return b_tokens, b_logprobs


@triton.jit(do_not_specialize=("contexts", "stride"))  # they vary from call to call
def ngram_lookup_kernel(
    p_contexts,  # [B, K, 2]
    p_sequence,  # [B, S]
    p_lengths,  # [B]
    p_keys,  # [C] int64
    p_rows,  # [C]
    p_tokens,  # [rows, r]
    p_logprobs,  # [rows, r]
    p_out_tokens,  # [B, K, 1 + r]
    p_out_logprobs,
    contexts,
    stride,
    vocab_size,
    hash_slots,
    SUCCESSORS: tl.constexpr,
    RANKS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row = tl.program_id(0)
    i_context = tl.program_id(1) * TILE + tl.arange(0, TILE)
    b_inside = i_context < contexts
    p_pair = p_contexts + (i_row * contexts + i_context) * 2
    b_first = tl.load(p_pair, mask=b_inside, other=-1)
    b_last = tl.load(p_pair + 1, mask=b_inside, other=-1)
    length = tl.load(p_lengths + i_row)
    b_tokens, b_logprobs = successors(
        p_sequence + i_row * stride, length, b_first, b_last, p_keys, p_rows, p_tokens, p_logprobs,
        vocab_size, hash_slots, SUCCESSORS, RANKS, BLOCK,
    )  # fmt: skip
    i_rank = tl.arange(0, RANKS)
    i_out = (i_row * contexts + i_context)[:, None] * (SUCCESSORS + 1) + i_rank[None, :]
    b_written = b_inside[:, None] & (i_rank <= SUCCESSORS)[None, :]
    tl.store(p_out_tokens + i_out, b_tokens, mask=b_written)
    tl.store(p_out_logprobs + i_out, b_logprobs, mask=b_written)


def ranks(successors: int) -> int:
    """The width of a tile that holds the context n-gram and all of a table's successors."""
    return max(2, triton.next_power_of_2(1 + successors))


def candidates(shape: tuple[int], device: torch.device) -> list[dict[str, int]]:
    """Settings to try at the shape (successors,), the default first: contexts of a CTA, positions at once, warps."""
    default = {"tile": TILE, "block": BLOCK, "warps": 4}
    others = [
        {"tile": tile, "block": block, "warps": warps}
        for tile in (2, 4, 8, 16)
        for block in (256, 512, 1024)
        for warps in (1, 4, 8)
    ]
    return [default, *(other for other in others if other != default)]


class Table(NamedTuple):
    """The tensors of a KatzTable as kernels take them: hash keys and their rows, tokens, log-probabilities. All None
    without a table."""

    keys: torch.Tensor | None
    rows: torch.Tensor | None
    tokens: torch.Tensor | None
    logprobs: torch.Tensor | None

    @property
    def slots(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def successors(self) -> int:
        return 0 if self.tokens is None else self.tokens.shape[1]


def _launch(
    contexts: torch.Tensor,
    sequence: torch.Tensor,
    lengths: torch.Tensor,
    table: Table,
    vocab_size: int,
    out_tokens: torch.Tensor,
    out_logprobs: torch.Tensor,
) -> None:
    batch, count, _ = contexts.shape
    width = table.successors
    settings = config("ngram_lookup", (width,), contexts.device, candidates)
    launch_kernel(
        ngram_lookup_kernel,
        (batch, triton.cdiv(count, settings["tile"])),
        contexts, sequence, lengths, *table, out_tokens, out_logprobs,
        count, sequence.shape[1], vocab_size, table.slots,
        SUCCESSORS=width, RANKS=ranks(width), TILE=settings["tile"], BLOCK=settings["block"],
        num_warps=settings["warps"], **launch_options(contexts.device),
    )  # fmt: skip


_op = register(
    "ngram_lookup(Tensor contexts, Tensor sequence, Tensor lengths, Tensor? keys, Tensor? rows, Tensor? tokens, "
    "Tensor? logprobs, int vocab_size, Tensor(a!) out_tokens, Tensor(b!) out_logprobs) -> ()",
    _launch,
)


def check_table(op: str, table: NgramTable | None, device: torch.device) -> tuple[Table, int]:
    """The `Table` of a KatzTable or None, and the size of its vocabulary, 0 for None. Raises ValueError for a table on
    another device."""
    if table is None:
        return Table(None, None, None, None), 0
    slots, width = table.slots.shape[0], table.successors
    check_tensor(op, "table.slots", table.slots, (slots,), torch.int64, device)
    check_tensor(op, "table.rows", table.rows, (slots,), torch.int32, device)
    check_tensor(op, "table.tokens", table.tokens, (None, width), torch.int32, device)
    check_tensor(op, "table.logprobs", table.logprobs, table.tokens.shape, torch.float32, device)
    if slots & (slots - 1):
        raise ValueError(f"{op}: table.slots must be a power of two long, got {slots}; make it with KatzTable.build")
    return Table(table.slots, table.rows, table.tokens, table.logprobs), table.vocab_size


def ngram_lookup(
    contexts: torch.Tensor,
    sequence: torch.Tensor,
    lengths: torch.Tensor,
    table: NgramTable | None,
    out_tokens: torch.Tensor,
    out_logprobs: torch.Tensor,
) -> None:
    """Writes draft²'s guesses for the tokens after `contexts` (the module's docstring has shapes and dtypes).

    table: a `KatzTable` on the same device, or None. Raises ValueError for a wrong shape, dtype, device or layout.
    """
    name, device = "ngram_lookup", contexts.device
    check_runs(contexts, name)
    check_tensor(name, "contexts", contexts, (None, None, 2), torch.int32, device)
    batch, count, _ = contexts.shape
    check_tensor(name, "sequence", sequence, (batch, None), torch.int32, device)
    check_tensor(name, "lengths", lengths, (batch,), torch.int32, device)
    tensors, vocab_size = check_table(name, table, device)
    shape = (batch, count, 1 + tensors.successors)
    check_tensor(name, "out_tokens", out_tokens, shape, torch.int32, device)
    check_tensor(name, "out_logprobs", out_logprobs, shape, torch.float32, device)
    _op(contexts, sequence, lengths, *tensors, vocab_size, out_tokens, out_logprobs)
