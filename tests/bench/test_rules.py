"""The rules of bench/rules.py: each gives the target's distribution, and accepts as often as enumeration says."""

import pytest
import torch
from helpers import g_test

from rules import RULES, coupled, top_m

DRAWS = 100_000
PAIRS = {
    "near": ([0.4, 0.3, 0.15, 0.1, 0.05], [0.3, 0.35, 0.15, 0.05, 0.15]),
    "far": ([0.02, 0.08, 0.1, 0.2, 0.6], [0.6, 0.25, 0.1, 0.03, 0.02]),
    "equal": ([0.4, 0.3, 0.15, 0.1, 0.05], [0.4, 0.3, 0.15, 0.1, 0.05]),
    "zeros": ([0.5, 0.0, 0.3, 0.2, 0.0], [0.0, 0.2, 0.5, 0.3, 0.0]),
    "disjoint": ([0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.2, 0.3, 0.5]),
    "one draft token": ([0.3, 0.3, 0.2, 0.1, 0.1], [0.0, 0.0, 1.0, 0.0, 0.0]),
}


def rows(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor([values], dtype=torch.float64).expand(DRAWS, -1).contiguous() for values in PAIRS[name])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def enumerated(p: list[float], q: list[float], m: int, replacement: bool) -> list[float]:
    """The acceptance with 1 to m children of rejection sampling, over every sequence of children."""
    found = [0.0] * m

    def go(p: list[float], q: list[float], depth: int, weight: float) -> None:
        if depth == m:
            return
        for child, drawn in enumerate(q):
            if drawn == 0:
                continue
            odds = min(1.0, p[child] / drawn)
            for number in range(depth, m):
                found[number] += weight * drawn * odds
            left = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
            if odds == 1.0 or sum(left) == 0:
                continue
            rest = [0.0 if not replacement and other == child else value for other, value in enumerate(q)]
            if sum(rest):
                rest = [value / sum(rest) for value in rest]
            go([value / sum(left) for value in left], rest, depth + 1, weight * drawn * (1 - odds))

    go(p, q, 0, 1.0)
    return found


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_the_target_distribution(rule, pair, m):
    p, q = rows(pair)
    outcome = RULES[rule](p, q, m, generator(m))
    counts = torch.bincount(outcome.token, minlength=p.shape[1]).double()
    assert g_test(counts, p[0]) > 1e-4
    assert outcome.accepted.shape == (DRAWS, m)
    assert (outcome.accepted >= 0).all() and (outcome.accepted <= 1 + 1e-9).all()
    assert (outcome.accepted.diff(dim=-1) >= -1e-9).all()  # one more child never hurts


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rule", ["recursive", "multi-round"])
def test_rejection_accepts_as_enumerated(rule, pair):
    p, q = rows(pair)
    accepted = RULES[rule](p, q, 4, generator()).accepted
    expected = torch.tensor(enumerated(*PAIRS[pair], 4, rule == "multi-round"), dtype=torch.float64)
    margin = 5 * accepted.std(0) / DRAWS**0.5 + 1e-9
    assert ((accepted.mean(0) - expected).abs() <= margin).all(), (accepted.mean(0), expected)
    assert expected[0] == pytest.approx(float(torch.minimum(p[0], q[0]).sum()))  # one minus total variation


@pytest.mark.parametrize("pair", PAIRS)
def test_coupled_accepts_one_child_as_the_closed_form_says(pair):
    """Daliri, Musco, Suresh, arXiv 2408.07978: both argmaxes are i with probability 1 / sum_j max(p_j/p_i, q_j/q_i)."""
    p, q = PAIRS[pair]
    both = [i for i in range(len(p)) if p[i] and q[i]]
    expected = sum(1 / sum(max(p[j] / p[i], q[j] / q[i]) for j in range(len(p))) for i in both)
    accepted = coupled(*rows(pair), 1, generator()).accepted.mean()
    assert float(accepted) == pytest.approx(expected, abs=5 * (expected * (1 - expected) / DRAWS) ** 0.5 + 1e-9)


def test_coupled_children_are_the_best_under_the_shared_noise():
    p, q = rows("near")
    outcome = coupled(p, q, 5, generator())
    noise = -torch.empty_like(p).exponential_(generator=generator()).log()
    order = (q.log() + noise).argsort(-1, descending=True)
    token = (p.log() + noise).argmax(-1)
    assert torch.equal(outcome.token, token)
    rank = (order == token[:, None]).long().argmax(-1)
    assert torch.equal(outcome.accepted, (rank[:, None] <= torch.arange(5)).double())
    assert outcome.accepted[:, -1].all()  # with all tokens as children, always


def test_more_children_than_the_draft_has_tokens():
    for pair in ("one draft token", "disjoint", "near"):
        p, q = rows(pair)
        reach = p[0][q[0] > 0].sum()
        for name, rule in RULES.items():
            accepted = rule(p, q, 8, generator()).accepted
            assert accepted.shape == (DRAWS, 8)
            if name in ("coupled", "top-m"):
                assert float(accepted[:, -1].mean()) == pytest.approx(float(reach), abs=0.01)


def test_top_m_is_the_target_probability_of_the_drafts_best():
    accepted = top_m(*rows("far"), 3, generator()).accepted
    assert torch.allclose(accepted[0], torch.tensor([0.02, 0.10, 0.20], dtype=torch.float64))
