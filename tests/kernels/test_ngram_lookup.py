"""The n-gram look-up against the host's tables."""

import random
from dataclasses import replace

import pytest
import torch

from stagedspec.kernels.common.constants import CONTEXT_LOGPROB
from stagedspec.kernels.ngram_lookup import ngram_lookup
from stagedspec.kernels.state.host import Row
from stagedspec.models.ngram_fit import fit_table

VOCAB = 13


def make_table(successors: int = 3):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (600,), generator=generator)
    return fit_table([tokens], VOCAB, successors=successors, max_contexts=40)


def run(contexts, sequences, table, device):
    """Tokens and log-probabilities of every context, as lists; outputs start as garbage."""
    longest = max(map(len, sequences))
    padded = torch.tensor([row + [5] * (longest + 3 - len(row)) for row in sequences], dtype=torch.int32)
    contexts = torch.tensor(contexts, dtype=torch.int32, device=device)
    lengths = torch.tensor([len(row) for row in sequences], dtype=torch.int32, device=device)
    width = 1 + (0 if table is None else table.successors)
    tokens = torch.full((*contexts.shape[:2], width), 10**6, dtype=torch.int32, device=device)
    logprobs = torch.full(tokens.shape, float("nan"), device=device)
    table = None if table is None else table.to(device)
    ngram_lookup(contexts, padded.to(device), lengths, table, tokens, logprobs)
    return tokens.tolist(), logprobs.tolist()


def expected(sequence, first, last, table):
    """Pairs (token, log-probability) in the order of state/host.py."""
    if last < 0:
        return []
    found = Row(list(sequence), 10**6).follower.get((first, last))
    known = [] if found is None else [(found, CONTEXT_LOGPROB)]
    rest = [] if table is None else table.successors_of(first, last)
    return known + [pair for pair in rest if pair[0] != found]


@pytest.mark.parametrize("lengths", [(1, 2, 3), (300, 7), (600,)], ids=str)
@pytest.mark.parametrize("successors", [0, 1, 3, 8])
def test_against_the_host(lengths, successors, device):
    table = make_table(successors) if successors else None
    generator = random.Random(successors)
    sequences = [[generator.randrange(VOCAB) for _ in range(length)] for length in lengths]
    every = [(first, last) for first in range(-1, VOCAB) for last in range(VOCAB)] + [(-1, -1), (2, -1)]
    contexts = [generator.sample(every, len(every)) for _ in sequences]
    tokens, logprobs = run(contexts, sequences, table, device)
    for row, sequence in enumerate(sequences):
        for at, (first, last) in enumerate(contexts[row]):
            pairs = list(zip(tokens[row][at], logprobs[row][at], strict=True))
            assert [pair for pair in pairs if pair[0] >= 0] == expected(sequence, first, last, table)
            assert {pair for pair in pairs if pair[0] < 0} <= {(-1, float("-inf"))}


def test_the_latest_occurrence_counts(device):
    sequence = [1, 2, 3] + [4] * 400 + [1, 2, 5] + [6] * 300
    tokens, _ = run([[(1, 2), (6, 6), (4, 4), (2, 3), (6, 1)]], [sequence], None, device)
    assert tokens == [[[5], [6], [1], [4], [-1]]]


def test_opcheck(device):
    table = make_table().to(device)
    contexts = torch.tensor([[[1, 2], [-1, 3]]], dtype=torch.int32, device=device)
    sequence = torch.tensor([[1, 2, 3, 1, 2]], dtype=torch.int32, device=device)
    lengths = torch.tensor([5], dtype=torch.int32, device=device)
    out = torch.zeros(1, 2, 4, dtype=torch.int32, device=device), torch.zeros(1, 2, 4, device=device)
    op = torch.ops.stagedspec.ngram_lookup.default
    known = (table.slots, table.rows, table.tokens, table.logprobs, table.vocab_size)
    torch.library.opcheck(op, (contexts, sequence, lengths, *known, *out))
    torch.library.opcheck(
        op, (contexts, sequence, lengths, None, None, None, None, 0, *(x[..., :1].clone() for x in out))
    )


def test_errors(device):
    def zeros(*shape, dtype=torch.int32):
        return torch.zeros(shape, dtype=dtype, device=device)

    def arguments(**changes):
        values = {
            "contexts": zeros(2, 3, 2),
            "sequence": zeros(2, 9),
            "lengths": zeros(2),
            "table": None,
            "out_tokens": zeros(2, 3, 1),
            "out_logprobs": zeros(2, 3, 1, dtype=torch.float32),
        }
        return values | changes

    ngram_lookup(**arguments())
    table = make_table(3).to(device)
    for changes, message in (
        ({"contexts": zeros(2, 3, 3)}, r"contexts must have the shape \[any, any, 2\], got \[2, 3, 3\]"),
        ({"contexts": zeros(2, 3, 2, dtype=torch.int64)}, "contexts must be torch.int32, got torch.int64"),
        ({"sequence": zeros(3, 9)}, r"sequence must have the shape \[2, any\]"),
        ({"sequence": zeros(9, 2).t()}, "sequence must be contiguous"),
        ({"lengths": zeros(3)}, "lengths must have the shape"),
        ({"table": replace(table, slots=table.slots[:-1], rows=table.rows[:-1])}, "must be a power of two long"),
        ({"table": table}, r"out_tokens must have the shape \[2, 3, 4\], got \[2, 3, 1\]"),
        ({"out_logprobs": zeros(2, 3, 1)}, "out_logprobs must be torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            ngram_lookup(**arguments(**changes))
