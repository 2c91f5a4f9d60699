"""The controller on made-up sequences, and generations whose trees adapt: only the speed may change."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import check_cache, left_pad, make_gpt2, random_prompts, slow_but

from stagedspec import Decoder, Sampling, TreeConfig
from stagedspec.decoding.request import StagedOptions, validate
from stagedspec.kernels.state.host import Sequences, Unread
from stagedspec.planning.adapt import (
    ACCIDENT,
    CREDIT,
    LASTING,
    OFF,
    PRIOR,
    READ,
    REFRESH,
    TRIAL,
    WAITS,
    WON,
    Controller,
    Level,
    _Mean,
    _mean_path,
)

SMALL = TreeConfig(nodes=2, depth=1, passes=1, width=1, children=4, prefetch=0)
MEDIUM = TreeConfig(nodes=6, depth=3, passes=2, width=1, children=4, prefetch=1, prefetch_width=1, node_floor=0.01)
FULL = TreeConfig(nodes=12, depth=8, passes=4, width=1, children=4, prefetch=1, prefetch_width=1, node_floor=0.01)


def levels(draft: float = 0.25, expected: tuple[float, ...] = (1.6, 2.5, 4.0)) -> tuple[Level, ...]:
    """A pass of the target takes 1 and a twentieth a node, one of the draft `draft`."""
    verify = tuple(1 + 0.05 * max(0, nodes - 1) for nodes in range(13))
    make_levels = [Level("off", OFF, 1.0, 1.0, verify)]
    for name, tree, tokens in zip(("small", "medium", "full"), (SMALL, MEDIUM, FULL), expected, strict=True):
        make_levels.append(Level(name, tree, tokens, verify[tree.nodes] + tree.passes * draft, verify, draft, draft))
    return tuple(make_levels)


def make_step(controller: Controller, *result, **more) -> None:
    """A step whose results are known at once."""
    controller.step(controller.launch(), *result, **more)


def make_reading(controller: Controller, rows, *more) -> None:
    controller.catch_up()
    controller.read(rows, *more)


def play(controller: Controller, text: list[float], seed: int = 0, late: int = 0) -> float:
    """Writes a text whose token i the draft knows with probability text[i]; returns the seconds, at levels()'s prices.

    The draft is confident: every tree is as deep as it may be. late: steps after which results are known.
    """
    generator, at, seconds = random.Random(seed), 0, 0.0
    results: list[list] = [[] for _ in range(late)]  # of the last steps
    known = [generator.random() < rate for rate in text]
    while at < len(known):
        results.append([])
        if controller.due:
            missed = known[at - controller.missed : at]
            seconds += controller.levels[1].first
            controller.catch_up()
            shown = [[(0, -0.05) if hit else (-1, -9.0) for hit in missed]]
            results[-1].append(partial(controller.read, shown))
            if not late:
                results[-1].pop()()
        level = controller.level
        taken = 0
        while taken < level.reach and at + taken < len(known) and known[at + taken]:
            taken += 1
        seconds += level.cost(level.tree.nodes, level.tree.passes)
        made = controller.launch()
        step = partial(controller.step, made, level.tree.nodes, level.tree.passes, [taken], [level.reach])
        results[-1].append(step)
        at += taken + 1
        for tell in results.pop(0):
            tell()
    return seconds


@pytest.mark.parametrize("draft", [0.25, 0.1, 0.02])
@pytest.mark.parametrize("seed", range(5))
def test_a_hopeless_draft_costs_little(seed, draft):
    for late in (0, 1, 2):
        controller = Controller(levels(draft))
        assert play(controller, [0.0] * 256, seed, late) < 256 / 0.9
    assert controller.made["off"] > 230


def test_a_draft_that_hardly_pays():
    """Its tree costs three quarters of a plain step. Where three quarters of that come back it is left out; where it
    brings a third more than it costs, short stretches of bad luck do not end it."""

    def speed(rate: float) -> float:
        plain, _, medium, _ = levels()
        return 3600 / sum(play(Controller((plain, medium)), [rate] * 600, seed) for seed in range(6))

    assert speed(0.37) > 0.97 and speed(0.55) > 1.08


def test_where_a_small_tree_is_enough():
    """Half of the guesses come true: the largest tree would not pay."""
    assert 3600 / sum(play(Controller(levels()), [0.5] * 600, seed) for seed in range(6)) > 1.08


@pytest.mark.parametrize("seed", range(5))
def test_a_good_draft_gets_the_largest_tree(seed):
    for late in (0, 1, 2):
        controller = Controller(levels(expected=(1.1, 1.2, 1.3)))  # even against the cost model's expectation
        play(controller, [0.97] * 600, seed, late)
        made = controller.made
        assert made["full"] > 0.8 * sum(made.values())


@pytest.mark.parametrize("seed", range(5))
def test_a_middling_draft_gets_no_large_tree(seed):
    controller = Controller(levels(draft=0.2))
    play(controller, [0.45] * 600, seed)
    assert controller.made["full"] < 0.2 * sum(controller.made.values())


def test_drafting_starts_again_when_it_pays():
    controller = Controller(levels())
    play(controller, [0.0] * 200)
    assert controller.level.name == "off"
    before = controller.made["off"]
    play(controller, [1.0] * 300)
    assert controller.level.name == "full" and controller.made["off"] - before <= 2 * max(WAITS)


def test_text_that_changes_is_followed():
    """Faster than plain decoding and than the largest tree throughout."""
    text = ([0.97] * 120 + [0.02] * 120) * 4
    full = replace(levels()[-1])
    adaptive = play(Controller(levels()), text)
    fixed = Controller(levels())
    fixed._choose = lambda: None
    fixed.chosen = 3
    assert adaptive < 0.9 * play(fixed, text) and adaptive < 0.9 * len(text)
    assert play(Controller(levels()), text, late=1) < 0.97 * len(text)
    assert full.reach == 8


def test_stopped_rows_say_nothing():
    one, two = Controller(levels()), Controller(levels())
    for taken in (3, 0, 1, 8, 8):
        make_step(one, 12, 4, [taken], [8])
        make_step(two, 12, 4, [-1, taken, -1], [8, 8, 2])
        assert [known.tokens.value for known in one.known] == [known.tokens.value for known in two.known]
    make_step(one, 12, 4, [-1], [8])
    make_reading(one, [])
    make_reading(one, [[]])
    assert [known.tokens.value for known in one.known] == [known.tokens.value for known in two.known]


# ---------------------------------------------------------------- what drafting may cost


def batch(controller: Controller, rates: list[float], new_tokens: int, slower: float = 1.0, prompt: int = 8) -> float:
    """Writes as many tokens in every row, whose draft is right that often; returns the seconds, at levels()'s prices
    where drafting takes `slower` times as long as the controller expects."""
    generator, left, seconds = random.Random(len(rates)), [new_tokens] * len(rates), 0.0
    first = controller.levels[-1].first
    if controller.begin(prompt, new_tokens):
        seconds += first
    while max(left) > 0:
        if controller.due:
            seconds += first * slower
            missed = [[(0, -0.05) if generator.random() < rate else (-1, -9.0) for _ in range(4)] for rate in rates]
            shown = [row for row, more in zip(missed, left, strict=True) if more > 0]
            make_reading(controller, shown, 4, first * slower)
        tree, taken = controller.level.tree, []
        for rate, more in zip(rates, left, strict=True):
            depth = 0
            while depth < min(controller.level.reach, more - 1) and generator.random() < rate:
                depth += 1
            taken.append(depth if more > 0 else -1)
        took = controller.level.cost(tree.nodes, tree.passes) * (slower if tree.passes else 1.0)
        make_step(controller, tree.nodes, tree.passes, taken, [controller.level.reach] * len(rates), left, took)
        left = [more - count - 1 for more, count in zip(left, taken, strict=True)]
        seconds += took
    return seconds


@pytest.mark.parametrize("slower", [1.0, 2.0, 5.0])
@pytest.mark.parametrize(
    "rates", [[0.0], [0.5], [0.9], [0.0] * 4, [0.9, 0.1], [0.6] * 16, [0.95] * 15 + [0.2]], ids=str
)
def test_never_far_behind_plain_decoding(rates, slower):
    """However wrong the expected times are, and however well some rows of the batch do: from the second generation on
    the worst of ten takes a little more than plain decoding would, and all together hardly any more."""
    last, took = None, []
    for _ in range(11):
        last = Controller(levels(), last)
        took.append(batch(last, rates, 96, slower))
    assert max(took[1:]) < 96 / 0.9 and sum(took[1:]) < 10 * 96 / 0.95


def test_what_pays_is_kept_from_one_generation_to_the_next():
    last = Controller(levels())
    batch(last, [0.95], 96)
    hard = Controller(levels(), last)
    assert hard.level.name == "full"
    batch(hard, [0.0], 12)  # a short one that the draft does not know
    assert Controller(levels(), hard).level.name == "full"


def test_a_prompt_too_long_for_what_is_to_be_written():
    """The draft would read longer than its guesses save."""
    make_levels = tuple(replace(level, read=0.02) for level in levels())
    for prompt, new_tokens, reads in ((10, 96, True), (1000, 96, True), (1000, 8, False), (10, 8, True)):
        last = Controller(make_levels)
        for _ in range(3):
            batch(last, [0.95], 96)
            last = Controller(make_levels, last)
        assert last.begin(prompt, new_tokens) == reads
        assert last.unread == (0 if reads else prompt)
        if not reads:
            assert batch(last, [0.95], new_tokens, prompt=prompt) == new_tokens and last.made["full"] == 0


def test_a_busy_moment_is_forgotten():
    """A plain step that took ten times as long does not make drafting seem to pay for ever."""
    last = Controller(levels())
    batch(last, [0.3] * 8, 96)
    assert last.level.name == "off"
    last.pace.extend([10.0] * 9)
    for _ in range(3):
        last = Controller(levels(), last)
        took = batch(last, [0.3] * 8, 96)
    assert took < 96 / 0.92


@pytest.mark.parametrize(("prompt", "generations"), [(8, 5), (110, 7), (400, 22)])
def test_drafting_that_a_busy_moment_ended_begins_again(prompt, generations):
    """Its times are of that moment, and while nothing is drafted only readings show how long the draft takes now. A
    long prompt is read when enough was saved for that."""
    costly = tuple(replace(level, read=0.04) for level in levels())
    last = Controller(costly)
    batch(last, [0.95], 96)
    last.slower.extend([10.0] * 9)
    last.credit, last.chosen = 0.0, 0
    for _ in range(generations):
        last = Controller(costly, last)
        took = batch(last, [0.95], 96, prompt=prompt)
    assert last.level.name == "full" and took < 96 / 1.5


def plain_steps(controller: Controller, seconds: list[float]) -> None:
    controller.chosen = controller.trial = 0
    for taken in seconds:
        make_step(controller, 1, 0, [0], [0], seconds=taken)
        controller.chosen = 0


def test_a_machine_that_slows_down_while_nothing_is_drafted_says_nothing_about_drafting():
    """Else plain steps of a busy moment would make drafting seem to pay."""
    controller = Controller(levels())
    batch(controller, [0.3] * 8, 96)
    before = [controller.rate(index) / controller.rate(0) for index in range(4)]
    plain_steps(controller, [3.0] * 20)
    assert [controller.rate(index) / controller.rate(0) for index in range(4)] == pytest.approx(before)
    assert controller.rate(0) == pytest.approx(1 / 3)


def test_the_first_plain_step_after_other_work_is_not_counted():
    controller = Controller(levels())
    plain_steps(controller, [9.0, 1.1, 1.1])
    assert 1 / controller.rate(0) == pytest.approx(1.1)
    controller.chosen = 3
    make_step(controller, 12, 4, [8], [8], seconds=controller.levels[3].cost(12, 4))
    plain_steps(controller, [9.0, 1.1])
    assert list(controller.pace) == pytest.approx([1.1] * 3)


def test_what_drafting_has_won_may_be_lost_again():
    """A few steps of a batch in which the last row gets nothing do not end drafting that has long paid; without what
    was won they do, and plain steps earn no more than the little that drafting may fall behind."""
    controller = Controller(levels(), Controller(levels()))
    plain_steps(controller, [1.0] * 2000)
    assert controller.credit == pytest.approx(CREDIT)
    batch(controller, [0.95], 96)
    before = controller.credit
    assert CREDIT < before <= WON and controller.chosen
    controller.trial = 0
    for _ in range(4):
        controller.chosen = 3
        make_step(controller, 12, 4, [0], [8], seconds=1 + CREDIT / 4)
    assert before - CREDIT <= controller.credit < before - CREDIT / 2
    poor = Controller(levels(), Controller(levels()))
    poor.trial, poor.credit = 0, CREDIT
    for _ in range(4):
        poor.chosen = 3
        make_step(poor, 12, 4, [0], [8], seconds=1.5 + CREDIT / 4)
    assert poor.credit < 0 and poor.level.name == "off"


def test_an_accident_is_no_price():
    """A step during which something else ran costs no more than a few steps of its kind."""
    controller = Controller(levels(), Controller(levels()))
    controller.chosen, controller.trial, controller.credit = 3, 0, CREDIT
    make_step(controller, 12, 4, [0], [8], seconds=1000.0)
    assert CREDIT - 3 * ACCIDENT * controller.levels[3].cost(12, 4) < controller.credit < CREDIT


def test_readings_go_on_for_as_long_as_plain_steps_pay_for_them():
    """After a long stretch that the draft does not know, drafting comes back in the same generation."""
    last = Controller(levels())
    batch(last, [0.95], 96)
    controller = Controller(levels(), last)
    controller.begin(20, 900)
    play(controller, [0.0] * 600)
    assert controller.level.name == "off"
    before = controller.made["off"]
    play(controller, [1.0] * 600)
    assert controller.level.name == "full" and controller.made["off"] - before < 150


def test_a_ladder_that_was_chosen_anew_starts_anew():
    last = Controller(levels())
    batch(last, [0.0], 96)
    longer = (*levels()[:2], *levels()[1:])
    for make_levels in (longer, levels(draft=0.02), levels()[:2]):
        fresh = Controller(make_levels, last)
        assert fresh.trial and len(fresh.levels) == len(make_levels)
    assert not Controller(levels(), last).trial


# ---------------------------------------------------------------- single rules


def second() -> Controller:
    """Of a second generation, which makes no trial steps."""
    return Controller(levels(), Controller(levels()))


def test_a_reading_weighs_by_the_tokens_of_a_row():
    """Not by those of the batch: three rows that are alike say what one of them says."""
    one, three = second(), second()
    row = [(0, -0.05), (-1, -9.0), (0, -0.05)]
    make_reading(one, [row])
    make_reading(three, [row] * 3)
    assert [known.tokens.value for known in one.known] == pytest.approx([known.tokens.value for known in three.known])
    assert one.known[3].tokens.weight == pytest.approx(three.known[3].tokens.weight)
    weight = READ * len(row)  # also in what the next generation starts from
    assert one.known[3].lasting.weight == pytest.approx(second().known[3].lasting.weight * LASTING**weight + weight)


def test_a_row_that_misses_a_few_tokens_does_not_end_drafting():
    """Another one in every reading: over the generation all rows are alike."""
    controller = second()
    controller.chosen = 0
    for number in range(6):
        rows = [[(0, -0.05)] * 4 for _ in range(8)]
        rows[number] = [(-1, -9.0)] * 4
        make_reading(controller, rows)
    assert controller.chosen > 0


def test_a_walk_takes_no_more_siblings_than_the_tree_has_nodes_for():
    """Of three nodes two are left for the root's children, and one below the first of them."""
    tree = TreeConfig(nodes=3, depth=2, passes=2, width=1, children=4, prefetch=0)
    assert _mean_path(tree, 2, [[(1, -0.01), (1, -0.01)]], 0.0) == 1.0
    assert _mean_path(tree, 2, [[(1, -0.01), (0, -0.01)]], 0.0) == 1.5
    assert _mean_path(tree, 2, [[(2, -0.01), (0, -0.01)]], 0.0) == 0.5


def test_the_draft_reads_after_so_many_plain_steps():
    controller = second()
    plain_steps(controller, [1.0] * (WAITS[0] - 1))
    assert not controller.due
    plain_steps(controller, [1.0])
    assert controller.due


def test_a_machine_that_is_slower_at_everything_is_no_slower_at_drafting():
    controller = second()
    plain_steps(controller, [2.0] * 5)
    for _ in range(3):
        controller.chosen = 3
        make_step(controller, 12, 4, [8], [8], seconds=2 * controller.levels[3].cost(12, 4))
    assert len(controller.slower) > 1 and list(controller.slower) == pytest.approx([1.0] * len(controller.slower))


def test_a_larger_tree_is_credited_where_this_one_was_too_small():
    """Where it was used up; not where its floors kept it small."""
    for nodes, passes in ((6, 2), (3, 2), (3, 1)):
        controller, alone = second(), _Mean(levels()[3].tokens, PRIOR)
        controller.chosen = 2
        make_step(controller, nodes, passes, [2], [2])
        alone.add(3.0)  # the tokens of the step
        if (nodes, passes) == (3, 1):
            assert controller.known[3].tokens.value == pytest.approx(alone.value)
        else:
            assert controller.known[3].tokens.value > alone.value + 0.1


def test_plain_steps_are_timed_again_after_so_many_drafted_ones():
    """Sooner where drafting is not far ahead of plain decoding."""
    plain, *_, full = levels()
    for taken, (_, steps) in zip((2, 8), REFRESH, strict=True):
        controller = Controller((plain, full), Controller((plain, full)))
        controller.chosen = 1
        for _ in range(steps - 1):
            make_step(controller, 12, 4, [taken], [8])
        assert not controller.trial and controller.chosen
        make_step(controller, 12, 4, [taken], [8])
        assert controller.trial == TRIAL and controller.level.name == "off"


def test_a_debt_is_not_carried_on():
    last = second()
    last.credit = -3.0
    assert Controller(levels(), last).credit == 0.0


def test_drafting_that_did_not_last_is_no_reason_to_try_again_soon():
    for lasted, wait in ((1, len(WAITS) - 1), (WAITS[-1], len(WAITS) - 1), (WAITS[-1] + 1, 0)):
        controller = second()
        controller.chosen, controller._wait, controller._since = 0, len(WAITS) - 1, 100
        controller.known[3].tokens.add(9.0, 50)
        controller._choose()
        assert controller.chosen == 3 and controller._wait == len(WAITS) - 1
        for _ in range(lasted):
            make_step(controller, 12, 4, [8], [8])
        for known in controller.known[1:]:
            known.tokens.add(1.0, 200)
        controller._choose()
        assert controller.chosen == 0 and controller._wait == wait


# ---------------------------------------------------------------- whole generations


class Fickle(Controller):
    """Any level at any time, and readings after however many plain steps."""

    seed = 0

    def __init__(self, make_levels, last=None):
        self.random, self.reads = random.Random(Fickle.seed), 0
        super().__init__(make_levels)
        self.trial = 0

    def begin(self, prompt, new_tokens) -> bool:
        self.unread = 0 if self.random.random() < 0.5 else prompt
        return not self.unread

    @property
    def due(self) -> bool:
        return (self.missed > 0 or self.unread > 0) and self.chosen > 0

    def read(self, rows, *_) -> None:
        self.reads += 1

    def step(self, made, nodes, passes, accepted, depths, left, seconds) -> None:
        self.chosen = 0 if 0 < self.missed < self.random.choice((1, 3, 9)) else self.random.randrange(len(self.levels))
        if self.missed == max(WAITS):
            self.chosen = len(self.levels) - 1

    def _choose(self) -> None:
        self.chosen = self.random.randrange(len(self.levels))


@pytest.fixture(scope="module")
def decoders(target, drafts):
    made = {}
    for kind, draft in drafts.items():
        made[kind] = Decoder.from_pretrained(target, draft, device="cpu", dtype="float32")
        for mode in ("chain", "tree", "staged"):
            trees = [tree.for_mode(mode) for tree in (SMALL, MEDIUM, FULL)]
            for batch in (1, 3):
                for sampled in (False, True):
                    make_levels = [replace(level, tree=tree) for level, tree in zip(levels()[1:], trees, strict=True)]
                    made[kind].planner._chosen[mode, batch, sampled] = (levels()[0], *make_levels)
    return made


@pytest.mark.parametrize("controller", [Controller, Fickle])
@pytest.mark.parametrize("lengths", [[5], [1], [7, 1, 12]], ids=["one", "short", "ragged"])
@pytest.mark.parametrize("kind", slow_but(["good", "adversarial"], ["good", "random", "adversarial", "target"]))
def test_same_tokens_as_plain_decoding(decoders, kind, lengths, controller, monkeypatch):
    monkeypatch.setattr("stagedspec.planning.planner.Controller", controller)
    ids, mask = left_pad(random_prompts(lengths, seed=21))
    eos = [int(token) for token in random_prompts([2], seed=5)[0]]
    for seed, options in enumerate(
        ({}, {"do_sample": True, "seed": 8}, {"do_sample": True, "top_k": 9, "seed": [3] * len(lengths)})
    ):
        Fickle.seed = seed
        plain = decoders[kind].generate(ids, mask, 36, mode="autoregressive", eos_token_id=eos, **options)
        for mode in ("chain", "tree", "staged"):
            ours = decoders[kind].generate(ids, mask, 36, mode=mode, eos_token_id=eos, **options)
            assert torch.equal(ours, plain), (mode, options)
            stats = decoders[kind].last_stats
            assert sum(stats.adapted.values()) == stats.steps == stats.target_passes


@pytest.mark.parametrize("lengths", [[6], [1, 9, 3]], ids=["one", "ragged"])
def test_the_drafts_cache_after_it_was_left_out(decoders, drafts, lengths, monkeypatch):
    """Whenever the draft is in step again its cache is what transformers computes for the same tokens."""
    monkeypatch.setattr("stagedspec.planning.planner.Controller", Fickle)
    Fickle.seed = 4
    ids, mask = left_pad(random_prompts(lengths, seed=14))
    decoder, draft = decoders["good"], drafts["good"]
    run = decoder._start(
        validate(
            decoder.context, StagedOptions("staged", 3), ids, mask, max_new_tokens=34, sampling=Sampling(do_sample=True)
        )
    )
    checked = 0
    for _ in run.steps():
        cascade = run.engine.proposer
        if cascade.controller.missed:
            continue
        for index, row in enumerate(run.sequences.rows):
            known = len(row.tokens) - 2
            if not row.running or known < 1:
                continue
            check_cache(draft, row.tokens[:known], cascade.cache, index)
            checked += 1
    assert checked > 3 and cascade.controller.reads > 1


def test_the_drafts_cache_has_room_for_the_longest_reading(decoders):
    ids, mask = left_pad(random_prompts([6], seed=14))
    decoder = decoders["good"]
    run = decoder._start(
        validate(decoder.context, StagedOptions("staged", 3), ids, mask, max_new_tokens=34, sampling=Sampling())
    )
    assert run.engine.proposer.cache.tree_rows >= max(WAITS) > FULL.slots


def test_what_is_unread():
    sequences = Sequences([[1, 2, 3, 4, 5, 6], [7]], 9, [], torch.device("cpu"))
    unread = Unread.before_last(sequences, 3, 4, torch.float32)
    assert unread.batch.tokens.tolist() == [[2, 3, 4], [0, 0, 0]]
    assert unread.following[0].tolist() == [3, 4, 5] and unread.moves == [[(0, 1), (1, 2), (2, 3)], []]
    assert unread.batch.positions[0].tolist() == [1, 2, 3]
    seen = (unread.batch.bias[0, 0] == 0).tolist()
    assert [row[:4] for row in seen] == [[True] + [False] * 3, [True, True, False, False], [True] * 3 + [False]]
    assert all(row[4:] == [True] for row in seen)  # the prefix


class Untimed(Controller):
    """At the prices of levels(), whatever steps of these small models take."""

    def step(self, made, nodes, passes, accepted, depths, left, seconds) -> None:
        super().step(made, nodes, passes, accepted, depths, left)


def test_a_hopeless_draft_reads_now_and_then(decoders, monkeypatch):
    monkeypatch.setattr("stagedspec.planning.planner.Controller", Untimed)
    monkeypatch.setattr(decoders["adversarial"].planner, "_controllers", {})
    ids, _ = left_pad(random_prompts([12], seed=3))
    decoders["adversarial"].generate(ids, max_new_tokens=36, eos_token_id=[])
    stats = decoders["adversarial"].last_stats
    drafting = sum(level.tree.passes * stats.adapted[level.name] for level in levels())
    assert stats.adapted["off"] >= 30 and 1 <= stats.draft_passes - drafting <= 4


def test_a_tree_that_is_given_is_kept_to(target, drafts):
    decoder = Decoder.from_pretrained(target, drafts["adversarial"], device="cpu", dtype="float32", tree=SMALL)
    ids = torch.tensor(random_prompts([4]))
    decoder.generate(ids, max_new_tokens=12, eos_token_id=[])
    assert decoder.last_stats.adapted == {} and decoder.last_stats.draft_passes == decoder.last_stats.steps


def test_drafts_of_fewer_positions_may_be_left_out_too(target, monkeypatch):
    monkeypatch.setattr("stagedspec.planning.planner.Controller", Fickle)
    decoder = Decoder.from_pretrained(target, make_gpt2(0, n_positions=8), device="cpu", dtype="float32")
    decoder.planner._chosen["staged", 1, False] = levels()
    ids = torch.tensor(random_prompts([10]))
    plain = decoder.generate(ids, max_new_tokens=30, mode="autoregressive")
    assert torch.equal(decoder.generate(ids, max_new_tokens=30), plain)
