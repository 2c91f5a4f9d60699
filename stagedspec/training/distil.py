"""Distillation: the draft learns the target's whole next-token distribution, partly on the target's own text.

Word-level distillation at temperature 1 (Hinton, Vinyals, Dean, arXiv 1503.02531, section 2) on a mix of corpus and
sampled text: acceptance in speculative decoding depends on the target's distribution on text that the target writes
(DistillSpec, arXiv 2310.08461, section 4).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from stagedspec.training.fit import FitConfig, autocast, sample_blocks
from stagedspec.training.sample import cut


def mixed_blocks(
    corpus: torch.Tensor, samples: torch.Tensor, share: float, config: FitConfig, step: int
) -> torch.Tensor:
    """The batch of a step: LongTensor [batch, block + 1], the first round(share * batch) rows from samples.

    corpus [T], samples [S]: token streams; offsets are drawn from (seed, step).
    """
    count = round(share * config.batch)
    return torch.cat([sample_blocks(samples, config, step)[:count], sample_blocks(corpus, config, step)[count:]])


def distillation_loss(
    teacher: GPT2LMHeadModel,
    overlap_weight: float = 0.0,
    top_k: int | None = None,
    choice_weight: float = 0.0,
    compiled: bool = False,
) -> Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]:
    """KL(teacher || model) + overlap_weight * TV(teacher, model) + choice_weight * NLL(choice | noise), means over all
    positions of blocks [B, T + 1] but the last.

    KL in nats. The total variation TV is the fraction of single guesses that speculative sampling rejects: with it, a
    draft too small to follow the teacher everywhere ignores tokens that would seldom be accepted anyway. Its gradient
    alone is weak where the two distributions hardly overlap. The last term is the task of the draft in a decoding step:
    Gumbel noise g is drawn, the teacher chooses the token of the largest log p + g, and the loss is the negative log of
    that token's share in softmax(log q + g), the children's scores (`reference.choose_children`). Whole vocabulary,
    fp32, temperature 1. top_k: the teacher's distribution is cut to that many tokens, as when it decodes (in bf16,
    where more of them tie). The teacher runs without gradients, under the caller's autocast. compiled: what follows the
    logits is one compiled function, without the two dozen tensors of their size.
    """
    teacher.requires_grad_(False).eval()
    of_logits = torch.compile(_divergence, dynamic=False) if compiled else _divergence

    def loss(model: torch.nn.Module, blocks: torch.Tensor) -> torch.Tensor:
        inputs = blocks[:, :-1]
        with torch.no_grad():
            wanted = teacher(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        given = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        return of_logits(wanted, given, overlap_weight, top_k, choice_weight)

    return loss


def _divergence(
    logits: torch.Tensor, given: torch.Tensor, overlap_weight: float, top_k: int | None, choice_weight: float
) -> torch.Tensor:
    """The loss of the teacher's logits [R, V] and the model's."""
    logits = cut(logits, top_k)  # before the conversion: to search bf16 takes half the time
    wanted = F.softmax(logits.float(), dim=-1)
    given = F.log_softmax(given.float(), dim=-1)
    divergence = F.kl_div(given, wanted, reduction="batchmean")
    if overlap_weight:
        variation = 0.5 * (given.exp() - wanted).abs().sum(-1).mean()
        divergence = divergence + overlap_weight * variation
    if choice_weight:
        noise = gumbel_like(given)
        choice = (logits.float() + noise).argmax(-1)
        divergence = divergence + choice_weight * F.cross_entropy(given + noise, choice)
    return divergence


def gumbel_like(x: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise in the shape of x, fp32, from the device's generator."""
    # Clamped, so that the noise is finite: two infinities in a row would give NaN.
    uniform = torch.rand_like(x, dtype=torch.float32).clamp_(1e-30, 1 - 2**-24)
    return -(-uniform.log()).log()


@torch.no_grad()
def acceptance(
    target: GPT2LMHeadModel, draft: GPT2LMHeadModel, blocks: torch.Tensor, top_k: int | None = None
) -> dict[str, float]:
    """How well the draft guesses the target, over all positions of blocks [N, T + 1] but the last of each.

    top_k: both distributions are cut to that many tokens, each to its own, as in decoding. Returns means of:

    agreement: the argmax is the same: greedy acceptance of a single guess.
    overlap:   mean of sum_x min(p, q) at temperature 1, that is 1 - total variation: what speculative sampling
               accepts of a single guess (Leviathan, Kalman, Matias, arXiv 2211.17192, corollary 3.6).
    top4:      the target's argmax is among the draft's first four: greedy acceptance of four children.
    kl:        KL(target || draft) in nats, the draft's distribution whole.
    """
    target_mode, draft_mode = target.training, draft.training
    target.eval(), draft.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for part in blocks[:, :-1].split(4):
        with autocast(target.device):
            p = target(input_ids=part.to(target.device), use_cache=False).logits.flatten(0, 1).float()
            q = draft(input_ids=part.to(draft.device), use_cache=False).logits.flatten(0, 1).float()
        p, given = F.softmax(cut(p, top_k), dim=-1), F.log_softmax(q, dim=-1).to(p.device)
        guesses = given.topk(min(4, given.shape[-1]), dim=-1).indices
        q = F.softmax(cut(q, top_k), dim=-1).to(p.device)
        best = p.argmax(-1, keepdim=True)
        values = [
            (q.argmax(-1, keepdim=True) == best).sum(),
            torch.minimum(p, q).sum(),
            (guesses == best).any(-1).sum(),
            F.kl_div(given, p, reduction="sum"),
        ]
        sums += torch.stack([value.double() for value in values]).cpu()
        count += len(p)
    target.train(target_mode), draft.train(draft_mode)
    return dict(zip(("agreement", "overlap", "top4", "kl"), (sums / count).tolist(), strict=True))
