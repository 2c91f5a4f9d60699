"""draft²'s look-up: a Katz table and the context n-gram of the sequence itself."""

from collections.abc import Iterator

import torch
from harness import SMALL, Case, again, exact
from models import DEVICE, MODELS, Choice, katz

from stagedspec.kernels import reference
from stagedspec.kernels.control import CONTEXT_LOGPROB
from stagedspec.kernels.ngram_lookup import ngram_lookup
from stagedspec.workloads import random_text


def cases(choice: Choice) -> Iterator[Case]:
    for batch, context, nodes in choice.all("batch", "context", "nodes"):
        yield _case(batch, context, nodes)


def _case(batch: int, context: int, nodes: int) -> Case:
    vocab = MODELS["L"].vocab
    table = katz(vocab)
    sequence = random_text(batch, context, vocab).int().to(DEVICE)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    contexts = random_text(batch, 2 * nodes, vocab).view(batch, nodes, 2).int()
    contexts[:, ::3] = random_text(batch, context, vocab)[:, :2][:, None].int()
    contexts = contexts.to(DEVICE)
    tokens = torch.full((batch, nodes, 1 + table.successors), -2, dtype=torch.int32, device=DEVICE)
    logprobs = torch.full(tokens.shape, torch.nan, device=DEVICE)

    def ours() -> None:
        ngram_lookup(contexts, sequence, lengths, table, tokens, logprobs)

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        found = reference.context_lookup(sequence.long(), lengths, contexts)[..., None]
        names, values = table.lookup(contexts.long())
        other = names != found
        values = torch.where(other, values, -torch.inf)
        first = torch.where(found >= 0, CONTEXT_LOGPROB, -torch.inf)
        return torch.cat((found, torch.where(other, names, -1)), -1), torch.cat((first, values), -1)

    def check() -> float:
        ours()
        names, values = plain()
        return exact((torch.equal(tokens.long(), names), True), (torch.equal(logprobs, values.float()), True))

    where = {"B": batch, "L": context, "N": nodes}
    return Case("ngram_lookup", "L", where, 0, SMALL, again(ours), {"torch eager": again(plain)}, check, 10.0)
