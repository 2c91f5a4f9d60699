"""Many prompts: `Decoder.complete_many` beside `complete` and transformers, and rows that replace others."""

import copy
import itertools
import logging
import random
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import POSITIONS, VOCAB, byte_tokenizer, check_cache, left_pad, oracle_generate, random_prompts
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from stagedspec import Decoder, TreeConfig, row_seed
from stagedspec.decoding import many
from stagedspec.decoding.generation import Generation
from stagedspec.decoding.request import RequestRow, StagedOptions, validate
from stagedspec.decoding.sampling import Sampling
from stagedspec.kernels.state.invalid_logits import InvalidLogitsError

TREE = TreeConfig()
NEW = 20
LENGTHS = [5, 1, 9, 3, 14, 2, 7, 7, 1, 11, 6, 4, 8, 20, 3, 2, 10]
PROMPTS = [torch.tensor(ids) for ids in random_prompts(LENGTHS, seed=21)]
ENDS = [8, 9, 31]  # tokens that come up after some of them, early and late
GREEDY, SAMPLED = {}, {"do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 5}
TOKENS = [*string.ascii_letters, "Ġ", "Ċ", *string.digits][:VOCAB]


@pytest.fixture(scope="module")
def decoder(target, drafts, make_decoder):
    return make_decoder(target, drafts["good"], tokenizer=byte_tokenizer(TOKENS), tree=TREE)


@pytest.fixture(scope="module")
def expected(target):
    """Greedy tokens of every prompt alone, by transformers."""
    found = []
    for ids in PROMPTS:
        row = oracle_generate(target, ids[None], torch.ones_like(ids[None]), NEW, eos_token_id=ENDS, pad_token_id=0)
        found.append(row[0, len(ids) :].tolist())
    lengths = set(map(len, found))
    assert len(lengths) > 3 and NEW in lengths and min(lengths) < 5  # else this test could not see much
    return found


@pytest.fixture
def runs(monkeypatch) -> list[list[int]]:
    """For each generation, how many rows it began with, and at which steps others took their places."""
    seen: list[list[int]] = []
    begin, replace = Generation.steps, Generation.replace

    def steps(self):
        seen.append([len(self.request.rows)])
        yield from begin(self)

    def replaced(self, index, row):
        seen[-1].append(len(self.passes))
        replace(self, index, row)

    monkeypatch.setattr(Generation, "steps", steps)
    monkeypatch.setattr(Generation, "replace", replaced)
    return seen


# ---------------------------------------------------------------- the same tokens as alone


@pytest.mark.parametrize("mode", ["autoregressive", "staged"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_greedy_is_that_of_transformers_alone(decoder, expected, place, runs, batch, mode):
    found = list(decoder.complete_many(PROMPTS, NEW, batch=batch, mode=mode, eos_token_id=ENDS))
    assert [one.tokens for one in found] == expected
    assert [one.index for one in found] == list(range(len(PROMPTS)))
    assert all(one.finish_reason == ("stop" if one.tokens[-1] in ENDS else "length") for one in found)
    refilled = place.backend == "torch" and batch > 1
    assert len(runs) == (1 if refilled else -(-len(PROMPTS) // batch))
    assert sum(len(run) - 1 for run in runs) == (len(PROMPTS) - batch if refilled else 0)


def test_plain_batches_may_be_larger(decoder, expected):
    found = decoder.complete_many(PROMPTS * 2, NEW, batch=30, mode="autoregressive", eos_token_id=ENDS)
    assert [one.tokens for one in found] == expected * 2


def test_the_draft_proposes_for_rows_that_replaced_others(decoder, place):
    """With a good draft they gain several tokens a step, too."""
    found = list(decoder.complete_many(PROMPTS, NEW, batch=3, eos_token_id=[]))
    for one in found:
        stats = one.stats
        assert stats.new_tokens == NEW == sum(stats.origins.values()) and stats.draft_passes >= stats.steps > 0
        assert stats.row_steps == stats.steps == stats.target_passes
        assert stats.tokens_per_step > 1.5 and stats.total_seconds > 0
        assert [one.origins.count(name) for name in stats.origins] == list(stats.origins.values())


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_results_do_not_depend_on_the_batch(decoder, settings):
    """Nor on the order, the window, the mode and which tree a step has."""
    options = {"max_new_tokens": NEW, "eos_token_id": ENDS, **settings}
    own = [options | {"seed": row_seed(5, index)} for index in range(len(PROMPTS))]
    alone = [decoder.complete(ids, **each) for ids, each in zip(PROMPTS, own, strict=True)]
    tokens = [one.tokens for one in alone]
    assert len({len(one) for one in tokens}) > 3
    plain = [
        decoder.generate(ids[None], mode="autoregressive", **each)[0, len(ids) :].tolist()
        for ids, each in zip(PROMPTS, own, strict=True)
    ]
    assert tokens == plain
    cases = itertools.product((1, 3, 16), ("staged", "autoregressive"), (4, 512))
    for batch, mode, window in cases:
        found = list(decoder.complete_many(PROMPTS, batch=batch, mode=mode, window=window, **options))
        assert [one.tokens for one in found] == tokens, (batch, mode, window)
        assert [one.finish_reason for one in found] == [one.finish_reason for one in alone]
    if settings:
        seeds = [row_seed(5, index) for index in range(len(PROMPTS))]
        assert [one.seed for one in found] == seeds
        order = list(range(len(PROMPTS)))
        random.Random(1).shuffle(order)
        own = options | {"seed": [seeds[index] for index in order]}
        found = list(decoder.complete_many((PROMPTS[index] for index in order), batch=3, **own))
        assert [one.tokens for one in found] == [tokens[index] for index in order]
    else:
        assert {one.seed for one in found} == {None}


def test_adaptive_trees_of_a_batch_that_is_filled_again(target, drafts, make_decoder):
    """The draft is left out and comes back while rows replace others, whatever it has read of them."""
    for kind in ("good", "adversarial"):
        decoder = make_decoder(target, drafts[kind])
        for settings in (GREEDY, SAMPLED):
            plain = decoder.complete_many(PROMPTS * 3, NEW, mode="autoregressive", eos_token_id=ENDS, **settings)
            tokens = [one.tokens for one in plain]
            for batch in (2, 5):
                found = decoder.complete_many(PROMPTS * 3, NEW, batch=batch, eos_token_id=ENDS, **settings)
                assert [one.tokens for one in found] == tokens, (kind, settings, batch)


# ---------------------------------------------------------------- rows that replace others


def test_caches_of_rows_that_change_places_are_those_of_a_fresh_prefill(decoder, place, target, drafts):
    """After every step, by the keys and values that transformers computes for the same tokens: of rows that replaced
    others, and of the last ones, which take the places of those that have no successor."""
    if place.backend != "torch":
        return
    ids, mask = left_pad(random_prompts([9, 5, 12, 7], seed=14))
    sampling = Sampling(do_sample=True, temperature=0.7)
    options = StagedOptions("staged", [3, 4, 5, 6], TREE)
    run = decoder._start(validate(decoder.context, options, ids, mask, max_new_tokens=15, sampling=sampling))
    prompts = zip(random_prompts([11, 1, 2], seed=3), (9, 25, 3), strict=True)
    following = [RequestRow(ids, 8, 0, new) for ids, new in prompts]
    checked, left = 0, []
    for _ in run.steps():
        for index, row in reversed(list(enumerate(run.sequences.rows))):
            if not row.running:
                if following:
                    run.replace(index, following.pop(0))
                elif len(run.sequences.rows) > 1:
                    run.remove(index)
                    left.append(len(run.sequences.rows))
        for index, row in enumerate(run.sequences.rows):
            assert run.request.prompts[index] == row.tokens[: len(run.request.prompts[index])]
            if not row.running:
                continue
            unread = 1 if row.caught_up else 2
            for model, cache, missing in zip((target, drafts["good"]), run.engine.caches, (1, unread), strict=True):
                if len(row.tokens) > missing:
                    check_cache(model, row.tokens[:-missing], cache, index)
                    checked += 1
    assert checked > 25 and left == [3, 2, 1] and not following


def test_windows_whose_prompts_do_not_fit_begin_another_batch(decoder, expected, place, runs):
    """The longest prompt, of 20 tokens, comes in the last window: no row of the first batch has room for it."""
    found = list(decoder.complete_many(PROMPTS, NEW, batch=2, window=10, eos_token_id=ENDS))
    assert [one.tokens for one in found] == expected
    assert len(runs) == (2 if place.backend == "torch" else 9)


def test_max_length_is_a_limit_of_its_own_for_every_row(decoder):
    found = list(decoder.complete_many(PROMPTS, max_length=24, batch=4, eos_token_id=[]))
    assert [len(one.tokens) for one in found] == [24 - len(ids) for ids in PROMPTS]
    for one in found[:5]:
        assert one.tokens == decoder.complete(PROMPTS[one.index], max_length=24, eos_token_id=[]).tokens


# ---------------------------------------------------------------- criteria and processors


def test_stop_strings_end_single_rows(decoder, target):
    texts = ["ab", "hello", "Zq9", "x", "many rows", "fgfg"]
    free = [one.text for one in decoder.complete_many(texts, 25)]  # a character a token
    pairs = {text[at : at + 2] for text in free for at in range(len(text) - 1)}
    stops = sorted(pair for pair in pairs if sum(pair in text for text in free) == 1)[:3]
    wanted = []
    for text in free:
        ends = [text.index(stop) + 2 for stop in stops if stop in text]
        wanted.append((text[: min(ends)], "stop") if ends else (text, "length"))
    assert len({reason for _, reason in wanted}) == 2 and len({len(text) for text, _ in wanted}) > 2
    options = {"stop_strings": stops, "max_new_tokens": 25}
    for batch in (1, 2, 6):
        found = decoder.complete_many(texts, batch=batch, **options)
        assert [(one.text, one.finish_reason) for one in found] == wanted
    config = GenerationConfig(max_new_tokens=25, stop_strings=stops)
    found = decoder.complete_many(texts, batch=3, generation_config=config)
    assert [(one.text, one.finish_reason) for one in found] == wanted


class AfterThree(StoppingCriteria):
    """Ends a row after three new tokens that are even."""

    def __init__(self, start: int):
        self.start = start

    def __call__(self, input_ids, scores, **_):
        assert len(input_ids) == 1
        return torch.tensor([int((input_ids[0, self.start :] % 2 == 0).sum()) >= 3])


def test_a_criterion_sees_one_row_at_a_time(decoder):
    prompts = [ids for ids in PROMPTS if len(ids) > 4]
    cut = [ids[:5] for ids in prompts]
    options = {"stopping_criteria": [AfterThree(5)], "max_new_tokens": 15}
    alone = [decoder.complete(ids, **options) for ids in cut]
    found = list(decoder.complete_many(cut, batch=3, **options))
    assert [one.tokens for one in found] == [one.tokens for one in alone]
    assert {one.finish_reason for one in found} >= {"stop"} and len({len(one.tokens) for one in found}) > 2


class NotTheLast(LogitsProcessor):
    """Never the same token twice in a row; counts its calls."""

    calls = 0

    def __call__(self, input_ids, scores):
        NotTheLast.calls += 1
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


def test_logits_processors_take_prompts_one_by_one(decoder, runs):
    options = {"logits_processor": [NotTheLast()], "max_new_tokens": 6, "eos_token_id": []}
    found = [one.tokens for one in decoder.complete_many(PROMPTS[:5], batch=4, **options)]
    assert [run[0] for run in runs] == [1] * 5 and NotTheLast.calls == 30
    assert found == [decoder.complete(ids, **options).tokens for ids in PROMPTS[:5]]


# ---------------------------------------------------------------- seeds and samples


def test_seeds_of_rows_stay_what_they_are():
    """They are in files that people keep."""
    assert [row_seed(0, 0), row_seed(0, 1), row_seed(1, 0, 2), row_seed(-1, 3)] == [
        7711540714544783, 2849867795630718, 3788687097658399, 5817635155236667,
    ]  # fmt: skip
    every = {row_seed(seed, index, sample) for seed in range(3) for index in range(40) for sample in range(20)}
    assert len(every) == 3 * 40 * 20 and max(every) < 2**53


def test_seeds_of_rows_take_numbers_of_any_kind():
    for kind in (np.int64, np.int32, np.uint8, torch.tensor):
        found = row_seed(kind(7), kind(2), kind(1))
        assert type(found) is int and found == row_seed(7, 2, 1)
    assert row_seed(np.int64(-1), 3) == row_seed(2**64 - 1, 3) == row_seed(-1, 3)
    for seed in (True, 7.0, "7", None, [7], 2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed must be an integer of 64 bits, got "):
            row_seed(seed, 0)
    for bad in (-1, True, 1.0, None):
        with pytest.raises(ValueError, match="index must be a whole number of at least 0, got "):
            row_seed(7, bad)
        with pytest.raises(ValueError, match="sample must be a whole number of at least 0, got "):
            row_seed(7, 0, bad)


def test_samples_of_a_prompt(decoder):
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "seed": 11}
    found = list(decoder.complete_many(PROMPTS[:4], num_samples=3, batch=5, **options))
    assert [(one.index, one.sample) for one in found] == [(index, sample) for index in range(4) for sample in range(3)]
    assert len({tuple(one.tokens) for one in found}) > 9
    for one in found:
        assert one.seed == row_seed(11, one.index, one.sample)
        assert decoder.complete(PROMPTS[one.index], **options | {"seed": one.seed}).tokens == one.tokens
    more = decoder.complete_many(PROMPTS[:4], num_samples=5, **options)  # those before stay as they are
    assert [one.tokens for one in more if one.sample < 3] == [one.tokens for one in found]
    skipped = {(0, 0), (2, 1), (3, 2)}
    rest = list(decoder.complete_many(PROMPTS[:4], num_samples=3, skip=skipped, **options))
    assert [one.tokens for one in rest] == [one.tokens for one in found if (one.index, one.sample) not in skipped]


def test_without_a_seed_torch_draws_one(decoder):
    def run() -> list[list[int]]:
        options = {"do_sample": True, "temperature": 2.0}
        return [one.tokens for one in decoder.complete_many(PROMPTS[:3], 8, **options)]

    torch.manual_seed(3)
    first = run()
    assert run() != first
    torch.manual_seed(3)
    assert run() == first


# ---------------------------------------------------------------- order, and prompts that are skipped


@pytest.mark.parametrize("ordered", [True, False])
def test_prompts_that_cannot_be_completed_are_named(decoder, expected, caplog, ordered):
    long, none = torch.zeros(POSITIONS, dtype=torch.long), torch.empty(0, dtype=torch.long)
    prompts = [PROMPTS[0], long, "", PROMPTS[1], none, 3, torch.tensor([VOCAB]), PROMPTS[2], "\udcff", torch.eye(2)]
    with caplog.at_level(logging.WARNING, "stagedspec"):
        found = list(decoder.complete_many(prompts, NEW, batch=2, ordered=ordered, eos_token_id=ENDS))
    if not ordered:
        found.sort(key=lambda one: one.index)
    assert [one.index for one in found] == list(range(10))
    good = {0: 0, 3: 1, 7: 2}
    for one in found:
        if one.index in good:
            assert (one.tokens, one.error) == (expected[good[one.index]], None)
        else:
            assert (one.text, one.tokens, one.finish_reason) == ("", [], "skipped") and one.error
            assert f"prompt {one.index} is skipped: {one.error}" in caplog.text
    errors = {one.index: one.error for one in found}
    assert "n_positions = 48, got 48 + 20" in errors[1] and "is empty" in errors[2] and "is empty" in errors[4]
    assert "got int" in errors[5] and "got 61" in errors[6] and "UTF-8" in errors[8] and "one prompt" in errors[9]
    assert list(decoder.complete_many([none, ""], NEW, ordered=ordered)) and not list(decoder.complete_many([], NEW))


def test_completions_come_as_they_end(decoder, expected, place):
    """A row that goes on does not hold back those that have ended, nor what replaces them."""
    found = [one.index for one in decoder.complete_many(PROMPTS, NEW, batch=3, ordered=False, eos_token_id=ENDS)]
    assert sorted(found) == list(range(len(PROMPTS))) and found != sorted(found)
    first = next(decoder.complete_many(PROMPTS, NEW, batch=16, ordered=False, eos_token_id=ENDS))
    assert place.backend != "torch" or len(first.tokens) == min(map(len, expected[:13] + expected[14:]))


def test_prompts_are_read_window_by_window(decoder):
    taken = []

    def endless():
        for index in itertools.count():
            taken.append(index)
            yield PROMPTS[index % 5]

    found = decoder.complete_many(endless(), 3, batch=2, window=4)
    assert not taken  # nothing happens before the first one is asked for
    assert [next(found).index for _ in range(4)] == [0, 1, 2, 3] and len(taken) <= 8
    found.close()
    assert decoder.complete(PROMPTS[0], 3).tokens  # the decoder goes on


def test_weights_are_those_of_the_call(target, make_decoder):
    model = copy.deepcopy(target)
    decoder = make_decoder(model)
    options = {"mode": "autoregressive", "max_new_tokens": 6, "batch": 2}
    before = [one.tokens for one in decoder.complete_many(PROMPTS[:6], **options)]
    found = decoder.complete_many(PROMPTS[:6], window=2, **options)
    tokens = [next(found).tokens]
    with torch.no_grad():
        model.transformer.wpe.weight.neg_()
    assert decoder.complete(PROMPTS[0], 6, mode="autoregressive").tokens != before[0]
    assert tokens + [one.tokens for one in found] == before


# ---------------------------------------------------------------- errors


REFUSED = [
    ({"prompts": "text"}, "prompts must be several texts"),
    ({"prompts": torch.ones(2, 3, dtype=torch.long)}, "got Tensor"),
    ({"prompts": 5}, "got int"),
    ({"batch": 17}, r"1 to 16 rows \(up to 64 in the mode 'autoregressive'\), got 17"),
    ({"batch": 65, "mode": "autoregressive"}, "a batch must have 1 to 64 rows, got 65"),
    ({"batch": 0}, "batch must be"),
    ({"num_samples": 0}, "num_samples must be"),
    ({"window": "many"}, "window must be"),
    ({"max_time": 3.0}, "complete_many takes no max_time"),
    ({"mode": "fast"}, "mode must be one of"),
    ({"temperature": -1.0, "do_sample": True}, "temperature must be"),
    ({"max_new_tokens": POSITIONS + 1}, "n_positions = 48"),
    ({"num_beams": 3}, "num_beams"),
    ({"streamer": SimpleNamespace(put=print, end=print)}, "take no streamer"),
    ({"stop_strings": [""]}, "stop_strings must be"),
    ({"bathc": 3}, "unknown option 'bathc'"),
    ({"seed": "x", "do_sample": True}, "seed must be an integer"),
    ({"seed": [1, 2**65], "do_sample": True}, "seed must be an integer"),
    ({"seed": [1, 2], "do_sample": True, "num_samples": 2}, "seed must be one integer where num_samples is 2"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_bad_options_are_refused_at_the_call(decoder, monkeypatch, options, message):
    monkeypatch.setattr(many, "decode", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        decoder.complete_many(**{"prompts": PROMPTS, "max_new_tokens": 8, **options})


def test_too_few_seeds(decoder):
    with pytest.raises(ValueError, match="one a prompt, got 2 for more prompts"):
        list(decoder.complete_many(PROMPTS[:3], 4, do_sample=True, seed=[1, 2]))


@pytest.mark.parametrize("more", [{}, {"stopping_criteria": [AfterThree(2)]}], ids=["plain", "criterion"])
@pytest.mark.parametrize("mode", ["autoregressive", "staged"])
def test_prompts_without_a_next_token_are_skipped(target, drafts, make_decoder, caplog, mode, more):
    """By name; the others of their batch are completed as they are alone."""
    bad = 40  # only prompts that have this token lead to NaN
    decoder = make_decoder(target, drafts["good"], tree=TREE)
    options = {"max_new_tokens": 9, "mode": mode, "eos_token_id": ENDS, **more}
    prompts = [ids[:6] for ids in PROMPTS if bad not in ids]
    alone = [decoder.complete(ids, **options).tokens for ids in prompts]
    assert not any(bad in tokens for tokens in alone)
    decoder.target.token_table[bad] = float("inf")
    if decoder.target.compiled is not None:
        decoder.target.compiled.weights.tables[0][bad] = float("inf")
    for index in (0, 4, 5):
        prompts.insert(index, torch.tensor([3, bad, 7]))
        alone.insert(index, [])
    for batch in (1, 3, 16):
        caplog.clear()
        found = list(decoder.complete_many(prompts, batch=batch, **options))
        assert [one.tokens for one in found] == alone
        assert [one.index for one in found if one.finish_reason == "skipped"] == [0, 4, 5]
        for index in (0, 4, 5):
            assert "no token can be chosen at position 3: after" in found[index].error
            assert f"prompt {index} is skipped: {found[index].error}" in caplog.text
    with pytest.raises(InvalidLogitsError, match="position 3 of row 0"):
        decoder.complete(prompts[0], **options)


def test_a_prompt_is_refused_once_for_all_its_samples(decoder, caplog, monkeypatch):
    asked = []
    read = decoder._read_one
    monkeypatch.setattr(decoder, "_read_one", lambda prompt, *rest: asked.append(prompt) or read(prompt, *rest))
    options = {"num_samples": 3, "do_sample": True, "seed": 1, "window": 2}
    found = list(decoder.complete_many(["", PROMPTS[0], 3, ""], 4, **options))
    assert [one.error is None for one in found] == [False] * 3 + [True] * 3 + [False] * 6
    assert [sum(one is given for one in asked) for given in ("", 3)] == [2, 1]
    assert [caplog.text.count(f"prompt {index} is skipped") for index in range(4)] == [1, 0, 1, 1]


def test_a_reason_for_every_completion(decoder):
    first = decoder.complete(PROMPTS[0], 6, eos_token_id=[])
    assert first.finish_reason == "length" and first.error is None
    ended = decoder.complete(PROMPTS[0], 6, eos_token_id=first.tokens[-1])  # at the limit, too
    assert ended.finish_reason == "stop"
    assert decoder.complete("ab", 6, stop_strings=decoder.complete("ab", 6).text[-2:]).finish_reason == "stop"


def test_a_decoder_without_a_draft(target, make_decoder, expected):
    decoder = make_decoder(target)
    found = decoder.complete_many(PROMPTS, NEW, batch=4, eos_token_id=ENDS, prompt_lookup_num_tokens=3)
    assert [one.tokens for one in found] == expected
    with pytest.raises(ValueError, match="needs a draft model"):
        decoder.complete_many(PROMPTS, NEW)
    assert isinstance(decoder, Decoder)
