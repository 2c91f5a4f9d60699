"""Four rules for drafting m children of a node and accepting one of them. All are lossless: the resulting token has the
target's distribution for every draft.

Each takes the distributions p and q of the target and the draft, [R, V], whose rows sum to 1 and may hold zeros, the
number of children m and a generator, and gives an Outcome for every row. Children are nested: the first j of m are
those of a tree with j children a node, so one call tells the acceptance for every number up to m.
"""

from dataclasses import dataclass

import torch

from stagedspec.kernels.reference import NoiseAt, choose, choose_children

_AS_IT_IS = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}


@dataclass(frozen=True)
class Outcome:
    """Result of a rule for R rows.

    accepted: [R, m], the probability that one of the first 1, 2, ... m children is accepted, given the random numbers.
    token: [R], the resulting token, an accepted child or another.
    """

    accepted: torch.Tensor
    token: torch.Tensor


def coupled(p: torch.Tensor, q: torch.Tensor, m: int, generator: torch.Generator) -> Outcome:
    """Our rule: the target's token is the best of log p + g, the children the best m of log q + g, with one noise g.

    Gumbel coupling (Daliri, Musco, Suresh, arXiv 2408.07978). By the decoder's own operations.
    """
    noise = -torch.empty_like(p).exponential_(generator=generator).log()
    at = NoiseAt(noise[None], torch.arange(len(p))[None])
    token = choose(p.log()[None], _AS_IT_IS, at)[0]
    children, logprobs = choose_children(q.log()[None], m, _AS_IT_IS, at)
    hit = (children[0] == token[:, None]) & (logprobs[0] > -torch.inf)
    accepted = hit.to(p.dtype).cummax(-1).values
    return Outcome(torch.nn.functional.pad(accepted, (0, m - accepted.shape[1]), mode="replicate"), token)


def top_m(p: torch.Tensor, q: torch.Tensor, m: int, generator: torch.Generator) -> Outcome:
    """The draft's m likeliest tokens, without noise; the target draws its own token, and it may be among them."""
    best, children = q.topk(min(m, q.shape[-1]), -1)
    accepted = (p.gather(-1, children) * (best > 0)).cumsum(-1).clamp(max=1.0)
    accepted = torch.nn.functional.pad(accepted, (0, m - accepted.shape[1]), mode="replicate")
    return Outcome(accepted, _draw(p, generator))


def recursive(p: torch.Tensor, q: torch.Tensor, m: int, generator: torch.Generator) -> Outcome:
    """Recursive rejection sampling without replacement (Jeon et al., arXiv 2402.14160; Sequoia, arXiv 2402.12374).

    The children are drawn from q one after the other, each from what is left of q. Child x is accepted with probability
    min(1, p(x) / q(x)); else p becomes what p exceeds q by, q loses x, and the next child is tried; after the last one
    a token is drawn from p.
    """
    return _rejection(p, q, m, generator, replacement=False)


def multi_round(p: torch.Tensor, q: torch.Tensor, m: int, generator: torch.Generator) -> Outcome:
    """SpecInfer's multi-round rejection (Miao et al., arXiv 2305.09781, Algorithm 2): as above, but children are
    drawn independently from q, so that some are useless duplicates."""
    return _rejection(p, q, m, generator, replacement=True)


def _rejection(p: torch.Tensor, q: torch.Tensor, m: int, generator: torch.Generator, replacement: bool) -> Outcome:
    rows = torch.arange(len(p))
    token = torch.full((len(p),), -1)
    rejected, accepted = torch.ones_like(p[:, 0]), []
    q = q.clone()
    for _ in range(m):
        some = q.sum(-1) > 0  # else the draft has no token left, and this row no more children
        child = _draw(torch.where(some[:, None], q, 1.0), generator)
        odds = torch.where(some, p[rows, child] / q[rows, child], 0.0).clamp(max=1.0)
        take = (torch.rand(len(p), dtype=p.dtype, generator=generator) < odds) & (token < 0)
        token = torch.where(take, child, token)
        rejected = rejected * (1 - odds)
        accepted.append(1 - rejected)
        # Where p exceeds q nowhere, the child was accepted, and what p becomes does not matter.
        p = _normalised(torch.where(some[:, None], (p - q).clamp(min=0), p), p)
        if not replacement:
            q[rows, child] = 0
            q = _normalised(q, torch.zeros_like(q))
    return Outcome(torch.stack(accepted, -1), torch.where(token < 0, _draw(p, generator), token))


def _draw(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def _normalised(weights: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Rows that sum to 1; rows of zeros become those of `otherwise`."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, otherwise)


RULES = {"coupled": coupled, "recursive": recursive, "multi-round": multi_round, "top-m": top_m}
