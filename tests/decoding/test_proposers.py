"""What the draft cascade shows and tells the controller that chooses its trees."""

import pytest
import torch
from helpers import left_pad, make_gpt2, random_prompts

from stagedspec import Decoder, Sampling, TreeConfig
from stagedspec.decoding.request import StagedOptions, validate
from stagedspec.planning.adapt import OFF, Controller, Level

TREE = TreeConfig(nodes=4, depth=3, passes=2, width=1, children=4, prefetch=0)
VERIFY = (1.0,) * 5
LEVELS = (Level("off", OFF, 1.0, 1.0, VERIFY), Level("full", TREE, 2.0, 1.5, VERIFY))
PLAIN, NEW = 5, 16  # plain steps before the draft reads what it has missed; new tokens


class Scripted(Controller):
    """Decodes plainly, then lets the draft read and grow trees; notes what it is shown and told."""

    def __init__(self, levels, last=None):
        super().__init__(levels)
        self.last, self.shown, self.told, self.trial, self.chosen = last, [], [], 0, 0

    def begin(self, prompt, new_tokens) -> bool:
        return True

    @property
    def due(self) -> bool:
        return self.missed == PLAIN

    def read(self, rows, *_) -> None:
        self.shown.append(rows)
        self.chosen = 1

    def step(self, made, nodes, passes, accepted, depths, left, seconds) -> None:
        self.told.append((passes, left))


@pytest.fixture
def begin(monkeypatch):
    """begin(draft, sampling) -> a generation of two rows, one of whose prompts is a single token. draft: by default the
    target itself."""
    monkeypatch.setattr("stagedspec.planning.planner.Controller", Scripted)
    target = make_gpt2(1)
    made = {}

    def run(draft=target, sampling=Sampling(do_sample=True)):  # noqa: B008 (it cannot be changed)
        if draft not in made:
            made[draft] = Decoder.from_pretrained(target, draft, device="cpu", dtype="float32")
            made[draft].planner._chosen |= {("staged", 2, sampled): LEVELS for sampled in (False, True)}
        ids, mask = left_pad(random_prompts([7, 1], seed=21))
        return made[draft]._start(
            validate(made[draft].context, StagedOptions("staged", 3), ids, mask, max_new_tokens=NEW, sampling=sampling)
        )

    return run


def test_how_the_draft_ranks_tokens_that_it_has_missed(begin):
    """As transformers ranks them, among as many children as the largest tree keeps."""
    draft = make_gpt2(1)
    with torch.no_grad():
        draft.transformer.wte.weight += 0.2 * torch.randn_like(draft.transformer.wte.weight)
    run = begin(draft, Sampling())
    for _ in run.steps():
        pass
    found, expected = [], []
    for row, prompt, shown in zip(
        run.sequences.rows, run.request.prompts, run.engine.proposer.controller.shown[0], strict=True
    ):
        length = len(prompt) + PLAIN
        for at in range(max(0, length - 2 - PLAIN), length - 2):
            best = draft(torch.tensor([row.tokens[: at + 1]])).logits[0, -1].topk(TREE.children).indices.tolist()
            expected.append(best.index(row.tokens[at + 1]) if row.tokens[at + 1] in best else -1)
        found += [rank for rank, _ in shown]
    assert found == expected and len(set(found)) > 2, found


def test_what_the_draft_made_of_tokens_that_it_has_missed(begin):
    """Such a draft would have chosen each of them first, under the noise of its position. It reads all but the last two
    tokens of a row: the first that it tells of the longer row is of the prompt, and the shorter row has one less."""
    run = begin()
    for _ in run.steps():
        pass
    ((first, second),) = run.engine.proposer.controller.shown
    assert [rank for rank, _ in first[1:]] == [rank for rank, _ in second] == [0] * (PLAIN - 1)
    assert len(first) == PLAIN


def test_what_a_step_took(begin):
    """Passes of growing its tree alone, also where the draft read before it; and what each row had left to write."""
    run = begin()
    written = [0, 0]
    controller = run.engine.proposer.controller
    for number, _ in enumerate(run.steps()):
        assert controller.told[number] == (0 if number < PLAIN else TREE.passes, [NEW - count for count in written])
        written = [
            len(row.tokens) - len(prompt) for row, prompt in zip(run.sequences.rows, run.request.prompts, strict=True)
        ]
    assert len(controller.told) > PLAIN + 1
    assert run.stats().draft_passes == 1 + TREE.passes * (len(controller.told) - PLAIN)


def test_a_generation_goes_on_from_what_the_last_one_learned(begin):
    first, second = (begin().engine.proposer.controller for _ in range(2))
    assert first.last is None and second.last is first
