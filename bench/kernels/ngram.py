"""The n-gram look-up: a Katz table and the context n-gram of the sequence."""

from collections.abc import Iterator
from functools import partial

import torch
from harness import SMALL, Case, again, exact
from models import DEVICE, MODELS, Choice

from stagedspec.kernels.common.constants import CONTEXT_LOGPROB
from stagedspec.tuning.workloads import LookupWorkload, katz_table


def cases(choice: Choice) -> Iterator[Case]:
    for batch, context, nodes in choice.all("batch", "context", "nodes"):
        lookup = LookupWorkload(nodes, context, batch, katz_table(MODELS["L"].vocab, DEVICE), DEVICE)
        ours, peers = again(lookup.lookup), {"torch eager": again(partial(plain, lookup))}
        where = {"B": batch, "L": context, "N": nodes}
        yield Case("ngram_lookup", "L", where, 0, SMALL, ours, peers, partial(check, lookup), 10.0)


def context_lookup(sequence: torch.Tensor, lengths: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """The context n-gram: what followed the latest earlier occurrence of two tokens in this very sequence.

    sequence [B, S], lengths [B], contexts [B, K, 2] -> token [B, K], -1 where the pair has not occurred.
    """
    first, second = sequence[:, None, :-2], sequence[:, None, 1:-1]
    ends = torch.arange(2, sequence.shape[1], device=sequence.device)
    found = (first == contexts[..., :1]) & (second == contexts[..., 1:]) & (ends < lengths[:, None])[:, None]
    where = (found * ends).amax(-1)
    return torch.where(where > 0, sequence.gather(1, where), -1)


def plain(lookup: LookupWorkload) -> tuple[torch.Tensor, torch.Tensor]:
    found = context_lookup(lookup.sequence.long(), lookup.lengths, lookup.contexts)[..., None]
    names, values = lookup.table.lookup(lookup.contexts.long())
    other = names != found
    first = torch.where(found >= 0, CONTEXT_LOGPROB, -torch.inf)
    values = torch.cat((first, torch.where(other, values, -torch.inf)), -1)
    return torch.cat((found, torch.where(other, names, -1)), -1), values


def check(lookup: LookupWorkload) -> float:
    lookup.tokens.fill_(-2)
    lookup.logprobs.fill_(torch.nan)
    (tokens, logprobs), (names, values) = lookup.lookup(), plain(lookup)
    return exact((torch.equal(tokens.long(), names), True), (torch.equal(logprobs, values.float()), True))
