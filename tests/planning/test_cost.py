"""The cost model, the fit of acceptance profiles, and the files that keep what was measured."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import VOCAB, make_draft, make_gpt2, random_prompts

from stagedspec import Decoder
from stagedspec.planning.cost import CHILDREN, Model, PassTimes, candidates, expected
from stagedspec.planning.profile import Tuning, cache_file, keep, pair_of, recall
from stagedspec.planning.tree import TreeConfig
from stagedspec.tuning.compare import Run
from stagedspec.tuning.trees import FINALISTS, _fastest, _groups, _Side, fit_profile, outcomes, tune


class Times:
    """Pass times by formula instead of measurement."""

    def __init__(self, node: float, draft: float):
        self.node, self.draft = node, draft

    def target_pass(self, batch, nodes, sampled):
        return 1.0 + self.node * nodes

    def draft_pass(self, batch, nodes, sampled):
        return self.draft


def test_times_between_and_beyond_the_measured_sizes():
    """A straight line between two; beyond the last as long a row as there."""
    known = {
        (draft, 1, rows, False): seconds for draft in (False, True) for rows, seconds in ((1, 3.0), (2, 4.0), (6, 6.0))
    }
    model = SimpleNamespace(ops=SimpleNamespace(timed_rows=(1, 2, 6), compiles_kernels=False))
    times = PassTimes(model, model, known)
    for timed in (times.target_pass, times.draft_pass):
        assert [timed(1, rows, False) for rows in (1, 2, 3, 6, 9)] == pytest.approx([3.0, 4.0, 4.5, 6.0, 9.0])


def test_kernels_for_powers_of_two_of_rows_take_as_long_for_fewer():
    known = {
        (draft, batch, rows, False): seconds
        for draft in (False, True)
        for batch in (1, 2)
        for rows, seconds in ((1, 1.0), (16, 4.0), (32, 6.0))
    }
    model = SimpleNamespace(ops=SimpleNamespace(timed_rows=(1, 16, 32), compiles_kernels=True))
    times = PassTimes(model, model, known)
    for timed in (times.target_pass, times.draft_pass):
        assert [timed(1, rows, False) for rows in (1, 5, 8, 9, 16, 17, 32)] == pytest.approx([1, 2.4, 2.4, 4, 4, 6, 6])
        assert [timed(2, rows, False) for rows in (1, 3, 5, 16)] == pytest.approx([1, 1.6, 2.4, 4])


def text(first: float, hit: float = 0.0):
    return ((1.0, (first,) + (0.0,) * (CHILDREN - 1), hit),)


def test_expected_tokens_of_a_chain_are_a_geometric_sum():
    config = TreeConfig(nodes=6, depth=5, passes=5, width=1, children=1, prefetch=0)
    (kind,) = expected(config, text(0.8))
    assert kind.tokens == pytest.approx(sum(0.8**depth for depth in range(6)))
    assert (kind.nodes, kind.passes, kind.share) == (6, 5, 1.0)


def drawn(config, ranks, hit, steps=400):
    """Mean tokens of steps in which every guess is right or wrong by lot; the tree then grows as far as it may."""
    generator, total = random.Random(0), 0.0
    for _ in range(steps):
        values, waiting = [], [(1.0, 0)]
        for number in range(config.passes):
            best = sorted(waiting, reverse=True)[: config.width if number else 1]
            waiting = [node for node in waiting if node not in best]
            for index, (value, level) in enumerate(best):
                guesses = config.prefetch if index < config.prefetch_width else 0
                while True:
                    right = guesses > 0 and level + 1 < config.depth and generator.random() < hit
                    values += [value * rate for rate in ranks]
                    waiting += [(value * rate, level + 1) for rate in ranks[int(right) :]]
                    if not right:
                        break
                    value, level, guesses = value * ranks[0], level + 1, guesses - 1
        total += 1 + sum(sorted(values, reverse=True)[: config.nodes - 1])
    return total / steps


@pytest.mark.parametrize("passes, prefetch, nodes", [(1, 3, 9), (1, 8, 9), (3, 8, 32), (6, 8, 32), (4, 2, 16)])
@pytest.mark.parametrize("first, hit", [(0.97, 0.95), (0.85, 0.8), (0.7, 0.5)])
def test_expected_tokens_with_draft2_against_drawing(passes, prefetch, nodes, first, hit):
    """Every pass goes on where the guesses of the one before ended, wherever that was. The model takes them to end
    where they do on average, which is at most an eighth off here."""
    ranks = (first, 0.4 * (1 - first), 0.2 * (1 - first))
    config = TreeConfig(nodes, passes * (1 + prefetch), passes, 2 if passes > 1 else 1, 8, prefetch, 1)
    kinds = expected(config, ((1.0, ranks, hit),))
    assert sum(kind.share for kind in kinds) == pytest.approx(1)
    assert sum(kind.share * kind.tokens for kind in kinds) == pytest.approx(drawn(config, ranks, hit), rel=0.125)


def test_guesses_that_are_always_right_are_not_evaluated_again():
    """Each of two passes of width 1 takes its node and one guess below it: a chain of four."""
    config = TreeConfig(nodes=9, depth=8, passes=2, width=1, children=8, prefetch=1, prefetch_width=1)
    (kind,) = expected(config, ((1.0, (0.8,), 1.0),))
    assert kind.tokens == pytest.approx(sum(0.8**depth for depth in range(5)))


def test_guesses_below_more_nodes_of_a_pass():
    config = TreeConfig(nodes=25, depth=8, passes=2, width=2, children=8, prefetch=2, prefetch_width=1)
    profile = ((1.0, (0.5, 0.4), 0.6),)
    one, two = (
        sum(kind.share * kind.tokens for kind in expected(replace(config, prefetch_width=width), profile))
        for width in (1, 2)
    )
    assert one < two - 0.01


def test_trees_grow_with_acceptance_and_with_cheap_nodes():
    sizes = [Model(Times(0.05, 0.1), 1, False, text(first)).levels("chain")[-1].nodes for first in (0.3, 0.8, 0.97)]
    assert sizes[0] < sizes[1] < sizes[2]
    dear, cheap = (Model(Times(node, 0.1), 1, False, text(0.8)).levels("chain")[-1].nodes for node in (0.5, 0.001))
    assert dear < cheap


@pytest.mark.parametrize("mode", ["chain", "tree", "staged"])
def test_the_ladder_ends_with_the_best_tree(mode):
    model = Model(Times(0.03, 0.1), 1, False)
    levels = model.levels(mode)
    best = max(model.tokens_per_second(tree) for tree in candidates(mode))
    assert model.tokens_per_second(levels[-1]) == best
    for tree in levels:
        assert tree.for_mode(mode) == tree and tree.nodes <= levels[-1].nodes and tree.depth <= levels[-1].depth


@pytest.mark.parametrize("mode", ["chain", "tree", "staged"])
def test_finalists_are_the_best_of_their_sizes(mode):
    model = Model(Times(0.03, 0.1), 1, True)
    best = {}
    for tree in candidates(mode):
        best[tree.nodes] = max(best.get(tree.nodes, 0.0), model.tokens_per_second(tree))
    finalists = model.finalists(mode, 3)
    assert [model.tokens_per_second(tree) for tree in finalists] == sorted(best.values(), reverse=True)[:3]
    for tree in finalists:
        assert model.levels(mode, tree)[-1] == tree


@pytest.mark.slow
def test_the_finalist_that_decodes_fastest_is_kept(target, drafts, monkeypatch):
    """Though it was predicted to be the last of them."""
    decoder = Decoder.from_pretrained(target, drafts["good"], device="cpu", dtype="float32")
    model = Model(Times(0.03, 0.1), 1, True)
    last = model.finalists("staged", FINALISTS)[-1]

    class Side:
        def __init__(self, *_):
            self.rate = 0.0

        def __call__(self, group):
            self.rate = 2.0 if decoder.tree_for("staged", 1, do_sample=True) == last else 1.0
            return Run([])

        def reset(self):
            pass

    monkeypatch.setattr("stagedspec.tuning.trees._Side", Side)
    finalists = model.finalists("staged", FINALISTS)
    assert _fastest(decoder, Tuning(pair_of(decoder)), model, "staged", finalists, [None], 8)[-1] == last
    monkeypatch.setattr("stagedspec.tuning.trees.measure", None)  # one alone is not timed
    assert _fastest(decoder, Tuning(pair_of(decoder)), model, "staged", finalists[1:2], [None], 8)[-1] == finalists[1]


def test_a_step_of_a_batch_takes_as_long_as_its_longest_row():
    kinds = ((0.5, (0.95,) + (0.0,) * 7, 0.0), (0.5, (0.1,) + (0.0,) * 7, 0.0))
    config = TreeConfig(nodes=9, depth=8, passes=8, width=1, children=1, prefetch=0, pass_floor=0.5)
    seconds = [Model(Times(0.05, 0.2), batch, False, kinds).step(config)[1] for batch in (1, 4, 16)]
    assert seconds[0] < seconds[1] < seconds[2]


def test_the_fit_finds_the_kinds_of_text_again():
    generator = random.Random(1)

    def text(first, second, hit, tokens):
        draws = []
        for _ in range(tokens):
            x = generator.random()
            rank = 0 if x < first else 1 if x < first + second else -1
            draws.append((rank, generator.random() < hit))
        return draws

    texts = [text(0.97, 0.01, 0.9, 160) + text(0.6, 0.2, 0.3, 80) + text(0.2, 0.3, 0.02, 80) for _ in range(20)]
    found = fit_profile(texts)
    assert found == fit_profile(texts)  # reproducible
    for (share, ranks, hit), wanted in zip(
        found, ((0.5, 0.97, 0.01, 0.9), (0.25, 0.6, 0.2, 0.3), (0.25, 0.2, 0.3, 0.02)), strict=True
    ):
        assert (share, ranks[0], ranks[1], hit) == pytest.approx(wanted, abs=0.04)
    with pytest.raises(ValueError, match="at least one token"):
        fit_profile([[]])


# ---------------------------------------------------------------- measuring and keeping


@pytest.fixture(scope="module")
def decoder(target):
    return Decoder.from_pretrained(target, make_draft("good", target), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tuned(decoder):
    told = []
    tuning = tune(decoder, random_prompts([4, 6, 3]), 12, [1, 2], lambda done, total: told.append((done, total)))
    assert told == [(done, told[-1][1]) for done in range(1, told[-1][1] + 1)]  # all of it, one after the other
    return tuning


def test_outcomes_against_transformers(target, drafts, decoder):
    """Greedy: the rank of the target's token in the draft's own order, position by position."""
    prompt = random_prompts([5], seed=2)[0]
    found = outcomes(decoder, prompt, 12, False)
    ids = target.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    order = drafts["good"](ids).logits[0].argsort(-1, descending=True)
    for index, (rank, _) in enumerate(found):
        place = (order[4 + index] == ids[0, 5 + index]).nonzero().item()
        assert rank == (place if place < CHILDREN else -1)
    assert len(found) == 12


def test_a_perfect_draft_is_taken_at_its_first_word(target):
    decoder = Decoder.from_pretrained(target, target, device="cpu", dtype="float32")
    for sampled in (False, True):
        assert {rank for rank, _ in outcomes(decoder, [3, 1], 20, sampled, seed=4)} == {0}


def test_draft2_guesses_from_what_has_been_written(target):
    """By the latest earlier place of the last two tokens, in the prompt or after it."""
    decoder = Decoder.from_pretrained(target, target, device="cpu", dtype="float32")
    ids, new = [3, 1], 30
    row = decoder.generate(torch.tensor([ids]), max_new_tokens=new, mode="autoregressive", eos_token_id=[])[0].tolist()
    expected = []
    for end in range(len(ids), len(row)):
        after = [row[at + 2] for at in range(end - 2) if row[at : at + 2] == row[end - 2 : end]]
        expected.append(after[-1:] == [row[end]])  # the draft's first child is what is written
    assert [named for _, named in outcomes(decoder, ids, new, False)] == expected and any(expected)


def test_a_prompt_that_just_leaves_room_is_measured(decoder):
    class Measured(Exception):
        pass

    def stop(done, total):
        raise Measured

    room = decoder.target.positions - 8
    with pytest.raises(Measured):
        tune(decoder, [[1] * room], 8, progress=stop)
    with pytest.raises(ValueError, match=f"at least one prompt of 1 to {room} tokens, got 1 of {room + 1}"):
        tune(decoder, [[1] * (room + 1)], 8, progress=stop)


def test_rates_are_without_prefill():
    stats = SimpleNamespace(new_tokens=6, total_seconds=3.0, seconds={"prefill": 1.0, "verify": 2.0}, as_dict=dict)
    decoder = SimpleNamespace(generate=lambda *group, **options: torch.arange(8).view(2, 4), last_stats=stats)
    side = _Side(decoder, SimpleNamespace(sampled=False), "tree", 3)
    group = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)
    assert side(group).tokens == [1, 2, 3, 5, 6, 7] and side.rate == 3.0
    side(group)
    assert (side.tokens, side.seconds, side.rate) == (12, 4.0, 3.0)


def test_a_batch_is_filled_up_with_the_first_prompts():
    (ids, mask), *rest = _groups([[1], [2, 3]], 3)
    assert not rest and ids.tolist() == [[0, 1], [2, 3], [0, 1]] and mask.tolist() == [[0, 1], [1, 1], [0, 1]]


def test_tuning(tuned, decoder):
    assert len(tuned.measured) == 16 and all(row["identical"] for row in tuned.measured)
    assert set(tuned.profiles) == {False, True} and len(tuned.trees) == 12
    for row in tuned.measured:
        assert row["predicted_tokens_per_second"] > 0 and row["measured_tokens_per_second"] > 0
        if row["mode"] != "autoregressive":
            assert (
                decoder.tree_for(row["mode"], row["batch"], do_sample=row["sampled"])
                == (tuned.trees[row["mode"], row["batch"], row["sampled"]][-1])
            )


def test_a_saved_tuning_is_used_again(tuned, decoder, target, drafts, tmp_path):
    path = tmp_path / "tree.json"
    tuned.save(path)
    read = Tuning.load(path)
    assert (read.pair, read.seconds, read.profiles, read.trees) == (
        tuned.pair, tuned.seconds, tuned.profiles, tuned.trees,
    )  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["tree.json"]
    for source in (path, str(path)):
        again = Decoder.from_pretrained(target, drafts["good"], device="cpu", dtype="float32", tree=source)
        assert again.tree_for("staged", 2) == tuned.trees["staged", 2, False][-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 53}, f"vocabulary {VOCAB}, here 53"),
        ({"n_layer": 1}, "target parameters"),
    ],
)
def test_a_foreign_tuning_is_refused(tuned, tmp_path, change, message):
    tuned.save(tmp_path / "tree.json")
    other = make_gpt2(0, **change)
    with pytest.raises(ValueError, match=message):
        Decoder.from_pretrained(other, make_draft("good", other), device="cpu", tree=tmp_path / "tree.json")


def test_a_file_of_an_earlier_release_is_read(tuned, tmp_path):
    """It has the profiles under another key."""
    path = tmp_path / "tree.json"
    tuned.save(path)
    content = json.loads(path.read_text())
    content["stretches"] = content.pop("profiles")
    path.write_text(json.dumps(content))
    assert Tuning.load(path).profiles == tuned.profiles


def test_another_device_is_refused(tuned, decoder, tmp_path):
    path = tmp_path / "tree.json"
    tuned.save(path)
    path.write_text(path.read_text().replace(tuned.pair["device"], "another machine"))
    with pytest.raises(ValueError, match="device 'another machine', here"):
        decoder.use(Tuning.load(path))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda c: "{", "no tuning written by"),
        (lambda c: "[1, 2]", "no tuning written by"),
        (lambda c: json.dumps(c | {"format": "other"}), "format must be"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "passes"}), "no 'passes'"),
        (lambda c: json.dumps(c | {"passes": [c["passes"][0] | {"seconds": -1}]}), "a pass's seconds must be"),
        (lambda c: json.dumps(c | {"profiles": {"greedy": [[0.2, [0.5], 0.1]]}}), "sum to 1"),
        (lambda c: json.dumps(c | {"profiles": {"greedy": [[1, [1.5], 0.1]]}}), "an acceptance must be"),
        (lambda c: json.dumps(c | {"trees": [c["trees"][0] | {"trees": []}]}), "expected one to three trees"),
        (lambda c: json.dumps(c | {"trees": [c["trees"][0] | {"trees": [{"nodes": 0}]}]}), "tree nodes must be"),
    ],
)  # fmt: skip
def test_damaged_tunings(tuned, tmp_path, damage, message):
    path = tmp_path / "tree.json"
    tuned.save(path)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        Tuning.load(path)


def test_missing_tunings(target, drafts, tmp_path):
    with pytest.raises(ValueError, match="cannot read the tuning"):
        Decoder.from_pretrained(target, drafts["good"], device="cpu", tree=tmp_path / "none.json")
    with pytest.raises(ValueError, match="tree must be a TreeConfig, 'auto' or a tuning's file"):
        Decoder.from_pretrained(target, drafts["good"], device="cpu", tree=3)


def test_what_a_decoder_measures_is_kept(target, drafts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(draft="good"):
        return Decoder.from_pretrained(target, drafts[draft], device="cpu", dtype="float32")

    first = make()
    tree = first.tree_for("staged")
    assert cache_file(first).is_file() and cache_file(first).is_relative_to(tmp_path)
    assert recall(make()).trees["staged", 1, False][-1] == tree

    def measured(*_):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("stagedspec.planning.cost._least_times", measured)
        assert make().tree_for("staged") == tree
    assert cache_file(make("random")) != cache_file(first) == cache_file(make())
    cache_file(first).write_text("damaged")
    assert recall(make()).trees == {}


def test_what_a_busy_machine_measured_is_forgotten(target, drafts, tmp_path, monkeypatch, caplog):
    """Once a generation's passes take less than half of the time that was measured; once in a decoder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level("INFO", "stagedspec")

    def make():
        return Decoder.from_pretrained(target, drafts["good"], device="cpu", dtype="float32")

    def run(decoder):
        caplog.clear()
        tokens = decoder.generate(torch.tensor([[1, 2]]), max_new_tokens=30, eos_token_id=[])
        return tokens.tolist(), [record.message.split(":")[0] for record in caplog.records]

    first = make()
    expected, _ = run(first)
    slow = recall(first)
    slow.seconds = {key: 1000 * seconds for key, seconds in slow.seconds.items()}
    keep(first, slow)
    second = make()
    assert run(second) == (expected, ["token trees were chosen while this machine was busy"])
    assert second.planner._controllers == {}  # their trees are chosen anew
    assert run(second) == (expected, ["measuring model passes to choose token trees (greedy, batch 1)"])
    assert max(recall(first).seconds.values()) < min(slow.seconds.values())
    second.planner._costs.seconds = slow.seconds
    assert run(second) == (expected, [])


def test_a_cache_that_cannot_be_written(decoder, tuned, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep(decoder, tuned) is None and recall(decoder).trees == {}


def test_tuning_needs_a_pair_and_prompts(target, decoder):
    with pytest.raises(ValueError, match="give a draft"):
        tune(Decoder.from_pretrained(target, device="cpu"), [[1]], 8)
    with pytest.raises(ValueError, match="at least one prompt of 1 to 40 tokens"):
        tune(decoder, [[1] * 41, []], 8)
    with pytest.raises(ValueError, match="new_tokens must be a whole number of at least 1"):
        tune(decoder, [[1]], 0)
    with pytest.raises(ValueError, match="batches must be a whole number of at least 1"):
        tune(decoder, [[1]], 8, [0])
