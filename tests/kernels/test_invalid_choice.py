"""Logits of which no token can be chosen, on the kernels: INVALID where the reference says so, and rows that end."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import make_gpt2, random_prompts
from test_choose import WARPERS, choose, counters, warping
from test_lm_head import LARGE, Case
from transformers import LogitsProcessor, LogitsProcessorList

from stagedspec import Decoder, TreeConfig
from stagedspec.kernels import reference
from stagedspec.kernels.common.constants import INVALID, NO_TOKEN, ROOT_ALONE, UNCHOSEN
from stagedspec.kernels.state import device as device_state
from stagedspec.kernels.state import host as host_state

NAN, INF = float("nan"), float("inf")
RULES = {"greedy": {"greedy": True}} | WARPERS
TREE = TreeConfig(nodes=4, depth=2, passes=2, width=1, children=3, prefetch=0)


@pytest.fixture(autouse=True)
def unchecked_weights(monkeypatch):
    """Models of NaN weights are refused when they are read; here they stand for sound ones whose passes overflow."""
    monkeypatch.setattr("stagedspec.models.gpt2.finite", lambda tensor: True)


def broken(logits: torch.Tensor) -> torch.Tensor:
    """Every second row is made invalid, each in another way."""
    last = logits.shape[1] - 1
    logits[1, 5] = NAN
    logits[3] = NAN
    logits[5] = -INF
    logits[7, last] = NAN
    logits[9, 0], logits[9, last] = INF, NAN
    logits[11, 3], logits[11, last] = INF, INF
    logits[13, 0] = -NAN
    return logits


@pytest.mark.parametrize("vocab_size", [61, 2500])
@pytest.mark.parametrize("rule", RULES)
def test_choose(rule, vocab_size, device):
    generator = torch.Generator().manual_seed(3)
    sound = 3 * torch.randn(15, vocab_size, generator=generator)
    logits = broken(sound.clone())
    noise = -torch.empty(15, vocab_size).exponential_(generator=generator).log()
    options = RULES[rule] if rule == "greedy" else {"noise": noise.to(device)} | RULES[rule]
    chosen = choose(logits.to(device), **options).cpu()
    given = reference.NoiseAt(noise[None], torch.arange(15)[None])
    greedy = rule == "greedy"
    expected = reference.choose(logits[None], None if greedy else warping(RULES[rule]), None if greedy else given)[0]
    assert torch.equal(chosen.long(), expected)
    wrong = [1, 3, 5, 7, 9, 13] if greedy else [1, 3, 5, 7, 9, 11, 13]
    assert (chosen < 0).nonzero()[:, 0].tolist() == wrong
    assert set(chosen[chosen < 0].tolist()) == {INVALID}
    if not greedy:  # made noise, whose rows are the sound ones' with broken ones beside them
        at = counters(1, 15)
        ours = choose(logits.to(device), at=at, **RULES[rule]).cpu()
        assert torch.equal(ours[::2], choose(sound.to(device), at=at, **RULES[rule]).cpu()[::2])
        assert torch.equal(ours < 0, chosen < 0)


@pytest.mark.parametrize("shape", [(3, 257, 40), *LARGE], ids=str)
@pytest.mark.parametrize("rule", ["greedy", "plain", "all"])
def test_lm_head(rule, shape, device, dtype):
    """NaN of the hidden state, and of single rows of the head; +inf and -inf of the head."""
    for values in ([NAN], [INF, -INF], [NAN, INF], [INF, NAN]):
        case = Case(device, dtype, *shape)
        case.head[-len(values) :, 0] = torch.tensor(values)
        case.x[1] = NAN
        noise = None if rule == "greedy" else case.noise
        out, logits = case.choose(noise=noise, **RULES[rule])
        expected = reference.choose(logits[None], warping_of(rule), None if noise is None else given(case))[0]
        assert torch.equal(out.long(), expected) and out[1] == INVALID
        again, _ = case.choose(with_logits=False, noise=noise, **RULES[rule])
        assert torch.equal(again, out)


def warping_of(rule: str) -> dict | None:
    return None if rule == "greedy" else warping(RULES[rule])


def given(case: Case) -> reference.NoiseAt:
    return reference.NoiseAt(case.noise[None], torch.arange(len(case.noise), device=case.device)[None])


def chain(tokens: list[int]) -> host_state.Tree:
    tree = host_state.Tree.root(tokens[0], 1)
    for node, token in enumerate(tokens[1:]):
        tree.add(token, node, node, 1)
    return tree


@pytest.mark.parametrize(
    ("chosen", "eos", "room", "wrote", "running"),
    [
        ([INVALID, 8, 9, 1], [], 9, [], ROOT_ALONE),
        ([7, INVALID, 9, 1], [], 9, [7], ROOT_ALONE),
        ([7, 8, 9, INVALID], [], 9, [7, 8, 9], ROOT_ALONE),
        ([NO_TOKEN, 8, 9, 1], [], 9, [], -1),
        ([7, NO_TOKEN, 9, 1], [], 9, [7], -1),
        ([7, 8, 9, INVALID], [], 3, [7, 8, 9], 0),  # it ends there anyway
        ([7, 8, 9, INVALID], [9], 9, [7, 8, 9], 0),
        ([7, 5, INVALID, INVALID], [], 9, [7, 5], 1),  # not on the path
        ([7, UNCHOSEN, INVALID, 1], [], 9, [7], 1),
    ],
)
def test_walks(chosen, eos, room, wrote, running, device):
    ours = device_state.Sequences([[4, 6], [4, 6, 6]], room, eos, device)
    trees = device_state.Trees(ours, SimpleNamespace(nodes=4, depth=3), None)

    def verify(first, second):
        trees.verify_commit(torch.tensor([first, second], dtype=torch.int32, device=device))
        ours.publish()
        return ours.rows

    trees.load([chain([6, 7, 8, 9])] * 2)
    first, second = verify(chosen, [7, 5, 1, 1])
    assert first.tokens[2:] == wrote and second.tokens[3:] == [7, 5]
    assert len(first.origins) == len(wrote)
    assert ours.state.running.tolist() == [running, 1] and first.running == (running > 0)
    assert ours.state.active.item() == 1 + (running > 0) and ours.finished == (running < 0)
    if running < 0:
        with pytest.raises(RuntimeError, match=f"position {2 + len(wrote)} of row 0"):
            ours.check()
        return
    moved = trees.moves.target_rows()[:, 0]
    assert (moved >= 0).sum(1).tolist() == [len(wrote) * (running > 0)] * 2
    if running == ROOT_ALONE:  # which alone decides
        last = wrote[-1] if wrote else 6
        trees.load([chain([last]), chain([5, 1])])
        (first, _) = verify([3, 1, 1, 1], [3, 1, 1, 1])
        assert first.tokens[2:] == [*wrote, 3] and ours.state.running.tolist() == [1, 1]
        ours.state.running[0] = ROOT_ALONE
        trees.load([chain([3]), chain([3, 1])])
        (first, _) = verify([INVALID, 1, 1, 1], [5, 1, 1, 1])
        assert first.tokens[2:] == [*wrote, 3] and ours.state.running.tolist() == [-1, 1] and ours.finished
        with pytest.raises(RuntimeError, match=f"position {3 + len(wrote)} of row 0"):
            ours.check()
        # Another step changes nothing of it, and a row that was stopped before is no error.
        verify([3, 1, 1, 1], [6, 1, 1, 1])
        assert ours.state.running.tolist() == [-1, 1] and ours.state.active.item() == 1
        ours.stop(0, 2)
        assert ours.state.active.item() == 1
    ours.check()


def test_a_row_whose_root_stands_alone(device):
    """Prompt look-up gives it no chain, and it may be stopped."""
    ours = device_state.Sequences([[4, 6, 4, 6]] * 2, 9, [], device)
    ours.state.running[0] = ROOT_ALONE
    assert device_state.Trees.lookup(ours, 3).depths.tolist() == [0, 3]
    ours.stop(0, 2)
    assert ours.state.active.item() == 1 and ours.state.running.tolist() == [0, 1]


# ---------------------------------------------------------------- whole generations


class From(LogitsProcessor):
    def __init__(self, length: int, value: float):
        self.length, self.value = length, value

    def __call__(self, input_ids, scores):
        return scores if input_ids.shape[1] < self.length else torch.full_like(scores, self.value)


@pytest.fixture(scope="module")
def pair():
    target = make_gpt2(0, n_layer=1)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        draft.transformer.wpe.weight.mul_(0.9)
    return target, draft


@pytest.mark.parametrize(("mode", "options"), [("autoregressive", {"do_sample": True, "top_k": 5}), ("staged", {})])
def test_generations(pair, mode, options, device):
    target, draft = pair
    broken = copy.deepcopy(target)
    with torch.no_grad():
        broken.transformer.ln_f.weight[0] = NAN

    def make(model, other) -> Decoder:
        return Decoder.from_pretrained(model, other, device=device, dtype="float32", backend="triton", tree=TREE)

    prompt, options = random_prompts([5])[0], {"seed": 0} | options
    with pytest.raises(RuntimeError, match="position 5 of row 0"):
        make(broken, draft).generate(torch.tensor([prompt, prompt]), max_new_tokens=4, mode=mode, **options)
    decoder = make(target, broken)
    expected = decoder.complete(torch.tensor(prompt), 4, mode="autoregressive", **options).tokens
    assert decoder.complete(torch.tensor(prompt), 4, mode=mode, **options).tokens == expected
    for value in (NAN, -INF):
        seen = []
        with pytest.raises(RuntimeError, match="position 8 of row 0"):
            for chunk in decoder.stream(
                torch.tensor(prompt), 6, mode=mode, logits_processor=LogitsProcessorList([From(8, value)]), **options
            ):
                seen += chunk.tokens
        assert seen == expected[:3]


@pytest.mark.parametrize("mode", ["staged", "chain"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}], ids=["greedy", "top-k"])
def test_a_node_that_plain_decoding_never_runs(pair, mode, options, device):
    """NaN behind it: 0 times NaN is NaN, and other nodes of the tree have it too. The next tree is a root alone."""
    target, draft = pair
    broken = copy.deepcopy(target)
    with torch.no_grad():
        broken.transformer.wpe.weight[11] = NAN
    prompt, options = torch.tensor([4, 5, 4, 5, 4]), {"seed": 0} | options

    def decode(model, new_tokens, mode, *processors):
        made = Decoder.from_pretrained(model, draft, device=device, dtype="float32", backend="triton", tree=TREE)
        given = {"logits_processor": LogitsProcessorList(processors)}
        return made.complete(prompt, new_tokens, mode=mode, **given, **options).tokens

    for processors in ([], [From(99, NAN)]):
        expected = decode(target, 7, "autoregressive", *processors)
        assert decode(broken, 7, mode, *processors) == expected
        with pytest.raises(RuntimeError, match="position 12 of row 0"):
            decode(broken, 8, mode, *processors)


@pytest.mark.parametrize("mode", ["autoregressive", "staged", "chain"])
def test_a_processor_that_leaves_nothing_at_one_length(pair, mode, device):
    """It is called once a position up to there, as in plain decoding."""
    target, draft = pair
    decoder = Decoder.from_pretrained(target, draft, device=device, dtype="float32", backend="triton", tree=TREE)
    lengths = []

    def nothing_at_8(ids, scores):
        lengths.append(ids.shape[1])
        return torch.full_like(scores, NAN) if ids.shape[1] == 8 else scores

    with pytest.raises(RuntimeError, match="position 8 of row 0"):
        decoder.generate(
            torch.tensor([[4, 5, 4, 5, 4]]), max_new_tokens=9, mode=mode,
            logits_processor=LogitsProcessorList([nothing_at_8]),
        )  # fmt: skip
    assert lengths == [5, 6, 7, 8]
