"""At home beside transformers: the same calls with and without stagedspec, through both entry points."""

import copy
import gc
import json
import queue
import string
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from helpers import POSITIONS, VOCAB, byte_tokenizer, left_pad, make_gpt2, random_prompts
from transformers import (
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

import stagedspec.models.live_model
from stagedspec import Decoder, Sampling, TreeConfig, hf
from stagedspec.decoding import prepared, settings
from stagedspec.hf import custom_generate
from stagedspec.models.ngram_fit import fit_table

TREE = TreeConfig()
TOKENS = [*string.ascii_letters, "Ġ", "Ċ", *string.digits][:VOCAB]


@pytest.fixture(scope="module")
def draft(drafts):
    return drafts["good"]


@pytest.fixture(scope="module")
def decoder(target, draft, make_decoder):
    return make_decoder(target, draft, tokenizer=byte_tokenizer(TOKENS), tree=TREE)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(TOKENS)


@pytest.fixture(scope="module")
def custom(place):
    """`custom_generate` through the place's backend."""
    return partial(custom_generate, backend=place.backend)


@pytest.fixture(params=["decoder", "custom"])
def entrance(request):
    return request.param


@pytest.fixture
def ours(entrance, target, decoder, draft, place, custom):
    """generate(...) through either entrance."""
    if entrance == "decoder":
        return decoder.generate

    def generate(*args, mode="staged", **options):
        return place.generate(target, *args, custom_generate=custom(draft, mode=mode, tree=TREE), **options)

    return generate


@pytest.fixture
def theirs(entrance, target, place):
    """transformers' own generate, where ours gets its tensors: some processors draw from the device's generator."""
    return target.generate if entrance == "decoder" else partial(place.generate, target)


class Records(BaseStreamer):
    """Notes what a streamer is given."""

    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.tolist())

    def end(self):
        self.calls.append("end")


class Notes(LogitsProcessor):
    """Depends on the history and on its own state, and notes every call."""

    def __init__(self):
        self.ids, self.scores = [], []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.tolist())
        self.scores.append(scores.cpu().clone())
        scores = scores.scatter_add(1, input_ids, torch.full_like(scores, -1.5).gather(1, input_ids))
        scores[:, len(self.ids) % VOCAB] += 2.0  # not the same at two calls
        return scores + 0.5 * scores.mean(0)  # of the whole batch


class StopsAt(StoppingCriteria):
    """Stops a row when a token comes up, and notes every call."""

    def __init__(self, tokens):
        self.tokens, self.ids = tokens, []

    def __call__(self, input_ids, scores, **_):
        self.ids.append(input_ids.tolist())
        return torch.tensor([row[-1] in self.tokens for row in input_ids.tolist()], device=input_ids.device)


# ---------------------------------------------------------------- greedy, the same calls

EOS = [3, 17, 40]
CALLS = {
    "new-tokens": lambda: {"max_new_tokens": 17},
    "length": lambda: {"max_length": 23},
    "both-lengths": lambda: {"max_length": 40, "max_new_tokens": 5},
    "eos": lambda: {"max_new_tokens": 25, "eos_token_id": EOS, "pad_token_id": 0},
    "eos-alone": lambda: {"max_new_tokens": 25, "eos_token_id": 17},
    "min-length": lambda: {"max_new_tokens": 25, "eos_token_id": EOS, "pad_token_id": 2, "min_length": 15},
    "min-new": lambda: {"max_new_tokens": 25, "eos_token_id": EOS, "min_new_tokens": 9},
    "repetition": lambda: {"max_new_tokens": 25, "repetition_penalty": 1.6},
    "encoder-repetition": lambda: {"max_new_tokens": 20, "encoder_repetition_penalty": 1.05},
    "no-repeat": lambda: {"max_new_tokens": 25, "no_repeat_ngram_size": 2},
    "encoder-no-repeat": lambda: {"max_new_tokens": 20, "encoder_no_repeat_ngram_size": 1},
    "bad-words": lambda: {"max_new_tokens": 20, "bad_words_ids": [[5], [9, 11], [40]]},
    "bias": lambda: {"max_new_tokens": 20, "sequence_bias": [[[7], 1.0], [[7, 8], 2.0]]},
    "suppress": lambda: {"max_new_tokens": 20, "suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [4, 5]},
    "forced-eos": lambda: {"max_new_tokens": 12, "forced_eos_token_id": 3, "eos_token_id": 3},
    "decay": lambda: {"max_new_tokens": 25, "eos_token_id": EOS, "exponential_decay_length_penalty": (3, 1.5)},
    "normalised": lambda: {"max_new_tokens": 12, "renormalize_logits": True, "remove_invalid_values": True},
    "watermark": lambda: {"max_new_tokens": 20, "watermarking_config": WatermarkingConfig(bias=4.0)},
    "custom-processor": lambda: {"max_new_tokens": 20, "logits_processor": [Notes()]},
    "many-processors": lambda: {
        "max_new_tokens": 25, "eos_token_id": EOS, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3,
        "min_new_tokens": 3, "logits_processor": [Notes()],
    },
    "prefix": lambda: {
        "max_new_tokens": 12,
        "prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 7 + row) % VOCAB, (int(ids[-1]) + 5) % VOCAB],
    },
    "criterion": lambda: {"max_new_tokens": 25, "stopping_criteria": [StopsAt(EOS)]},
    "criterion-and-eos": lambda: {
        "max_new_tokens": 25, "eos_token_id": 8, "pad_token_id": 1, "stopping_criteria": [StopsAt(EOS)],
    },
    "criterion-and-custom-processor": lambda: {
        "max_new_tokens": 25, "stopping_criteria": [StopsAt(EOS)], "logits_processor": [Notes()],
    },
    "criterion-length": lambda: {"max_new_tokens": 25, "stopping_criteria": [MaxLengthCriteria(14)]},
    "criterion-lengths": lambda: {
        "max_new_tokens": 25, "stopping_criteria": [MaxLengthCriteria(length) for length in (17, 14, 21)],
    },
    "criterion-and-processor": lambda: {
        "max_new_tokens": 25, "eos_token_id": 8, "stopping_criteria": [StopsAt(EOS)], "repetition_penalty": 1.4,
    },
    "config": lambda: {
        "generation_config": GenerationConfig(max_new_tokens=15, repetition_penalty=1.3, eos_token_id=EOS),
    },
    "config-length": lambda: {"generation_config": GenerationConfig(max_length=20, no_repeat_ngram_size=2)},
    "config-empty": lambda: {"generation_config": GenerationConfig()},
    "config-overridden": lambda: {
        "generation_config": GenerationConfig(max_new_tokens=15, repetition_penalty=1.9), "repetition_penalty": 1.1,
    },
    "no-cache": lambda: {"max_new_tokens": 10, "use_cache": False},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_same_greedy_tokens_and_stream(ours, target, name, theirs):
    """Ragged prompts padded on the left: the same tokens, stops and padding, and the very same calls of a streamer."""
    ids, mask = left_pad(random_prompts([6, 2, 9, 1], seed=31))
    wanted, streamer = Records(), Records()
    expected = theirs(ids, attention_mask=mask, streamer=wanted, **CALLS[name]())
    assert expected.shape[1] > 9 and len(expected[:, 9:].unique()) > 3
    for mode in ("staged", "autoregressive"):
        found = ours(ids, attention_mask=mask, mode=mode, **CALLS[name]())
        assert torch.equal(found, expected), mode
    assert torch.equal(ours(ids, attention_mask=mask, streamer=streamer, **CALLS[name]()), expected)
    assert streamer.calls == wanted.calls


def test_a_length_that_the_prompt_has_passed(ours, theirs):
    """One token still comes."""
    ids = torch.tensor(random_prompts([5], seed=31))
    expected = theirs(ids, max_new_tokens=9, stopping_criteria=[MaxLengthCriteria(3)])
    assert expected.shape[1] == 6
    assert torch.equal(ours(ids, max_new_tokens=9, stopping_criteria=[MaxLengthCriteria(3)]), expected)


@pytest.mark.parametrize("name", ["repetition", "many-processors", "criterion", "eos"])
@pytest.mark.parametrize("kind", ["target", "random", "adversarial"])
def test_any_draft(target, drafts, kind, name, custom, place):
    ids, mask = left_pad(random_prompts([4, 7], seed=32))
    expected = target.generate(ids, attention_mask=mask, **CALLS[name]())
    for mode in stagedspec.MODES:
        options = CALLS[name]() | {"custom_generate": custom(drafts[kind], mode=mode, tree=TREE)}
        assert torch.equal(place.generate(target, ids, attention_mask=mask, **options), expected), mode


@pytest.mark.parametrize("batch", [1, 3])
def test_processors_and_criteria_get_transformers_own_calls(ours, target, batch, theirs):
    """Call for call: the sequences, padding of stopped rows included, and the logits of rows that are running."""
    ids, mask = left_pad(random_prompts([6, 2, 4][:batch], seed=33))
    free = theirs(ids, attention_mask=mask, max_new_tokens=24, logits_processor=[Notes()])
    stops = [int(free[row, 10 + 3 * row]) for row in range(batch)]
    options = {"max_new_tokens": 24, "eos_token_id": stops[:1], "pad_token_id": 0}
    calls = []
    for generate in (theirs, ours):
        notes, criterion = Notes(), StopsAt(stops)
        tokens = generate(ids, attention_mask=mask, logits_processor=[notes], stopping_criteria=[criterion], **options)
        calls.append((tokens, notes, criterion))
    (expected, their_notes, their_stops), (found, notes, our_stops) = calls
    assert torch.equal(found, expected) and expected.shape[1] > ids.shape[1] + 3
    assert our_stops.ids == their_stops.ids
    count = len(their_notes.ids)
    # A step may process a few positions more before its criteria are asked.
    assert notes.ids[:count] == their_notes.ids and len(notes.ids) <= count + TREE.depth
    running = torch.ones(batch, dtype=torch.bool)
    for call in range(count):
        torch.testing.assert_close(notes.scores[call][running], their_notes.scores[call][running], rtol=1e-4, atol=1e-4)
        for row in range(batch):
            running[row] &= expected[row, ids.shape[1] + call].item() not in stops


@pytest.mark.parametrize("mode", stagedspec.MODES)
def test_processors_along_long_walks(target, mode, custom, place):
    """A perfect draft and a processor that changes nothing: walks are deep, and rows end in the middle of them."""
    ids, mask = left_pad(random_prompts([6, 2, 4], seed=33))
    free = target.generate(ids, attention_mask=mask, max_new_tokens=24)
    eos = [int(free[0, 9]), int(free[1, 14])]
    tree = TreeConfig(nodes=9, depth=8, passes=8, width=1, children=1, prefetch=0)
    seen = []
    for more in ({}, {"custom_generate": custom(target, mode=mode, tree=tree)}):
        calls = []

        def watch(ids, scores, calls=calls):
            calls.append(ids.tolist())
            return scores

        options = {"max_new_tokens": 24, "eos_token_id": eos, "pad_token_id": 1, "logits_processor": [watch]}
        seen.append((place.generate(target, ids, attention_mask=mask, **options, **more).tolist(), calls))
    assert seen[0] == seen[1]
    if mode != "autoregressive":
        assert more["custom_generate"].last_stats.steps < 10


def test_prompts_without_a_mask(ours, target, theirs):
    """Padding is recognised where it is no end-of-sequence token, and taken for text where it is."""
    ids, _ = left_pad(random_prompts([6, 2], seed=34), pad=60)
    for eos in (None, 60):
        options = {"max_new_tokens": 12, "pad_token_id": 60, "eos_token_id": eos}
        assert torch.equal(ours(ids, **options), theirs(ids, **options)), eos


def test_prompts_that_are_left_out(target, draft, custom, make_decoder, place):
    """transformers starts from the begin-of-sequence token."""
    model = make_gpt2(0, bos_token_id=5)
    expected = model.generate(max_new_tokens=8)
    decoder = make_decoder(model, draft, tree=TREE)
    assert torch.equal(decoder.generate(max_new_tokens=8), expected)
    assert torch.equal(decoder.generate(inputs=expected[:, :3], max_length=9), expected)
    assert torch.equal(place.generate(model, max_new_tokens=8, custom_generate=custom(draft, tree=TREE)), expected)


def test_the_models_own_generation_config(draft, make_decoder):
    model = make_gpt2(0)
    model.generation_config.update(repetition_penalty=1.5, max_new_tokens=13, no_repeat_ngram_size=2)
    decoder = make_decoder(model, draft, tree=TREE)
    ids = torch.tensor(random_prompts([4], seed=35))
    assert torch.equal(decoder.generate(ids), model.generate(ids))
    options = {"repetition_penalty": 1.0, "max_new_tokens": 20}
    assert torch.equal(decoder.generate(ids, **options), model.generate(ids, **options))


def test_defaults_of_a_plain_call(target, draft, make_decoder):
    """128 new tokens and no top-k, also where other arguments take the way through transformers."""
    target = make_gpt2(0, n_positions=160)
    decoder = make_decoder(target, draft, tree=TREE)
    ids = torch.tensor(random_prompts([4], seed=36))
    assert decoder.generate(ids).shape == decoder.generate(ids, bad_words_ids=[[5]]).shape == (1, 4 + 128)
    plain = decoder.generate(ids, max_new_tokens=60, do_sample=True, seed=3)
    assert torch.equal(plain, decoder.generate(ids, max_new_tokens=60, do_sample=True, seed=3, min_length=1))
    config = GenerationConfig(max_new_tokens=60, do_sample=True)  # transformers' own defaults: top-k 50
    assert torch.equal(
        decoder.generate(ids, generation_config=config, seed=3),
        decoder.generate(ids, max_new_tokens=60, do_sample=True, seed=3, top_k=50),
    )


# ---------------------------------------------------------------- text


def test_text_streamers(ours, target, tokenizer, capsys, theirs):
    text = "ab cde fgh"
    inputs = tokenizer(text, return_tensors="pt")
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    printed = []
    for generate in (theirs, ours):
        generate(**ids, max_new_tokens=30, streamer=TextStreamer(tokenizer))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].startswith(text)

    chunks = []
    for generate in (theirs, ours):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {**ids, "max_new_tokens": 30, "streamer": streamer}
        thread = threading.Thread(target=generate, kwargs=options)
        thread.start()
        chunks.append(list(streamer))
        thread.join()
    assert chunks[0] == chunks[1] and len(chunks[0]) == 31


def test_a_streamer_bound_beforehand(target, draft, tokenizer, custom, place):
    ids = torch.tensor(random_prompts([5], seed=37))
    theirs, bound = Records(), Records()
    target.generate(ids, max_new_tokens=12, streamer=theirs)
    place.generate(target, ids, max_new_tokens=12, custom_generate=custom(draft, tree=TREE, streamer=bound))
    assert bound.calls == theirs.calls


def test_a_streamer_of_the_call_goes_before_a_bound_one(target, draft, custom, place):
    ids = torch.tensor(random_prompts([5], seed=37))
    theirs, given, bound = Records(), Records(), Records()
    target.generate(ids, max_new_tokens=12, streamer=theirs)
    generator = custom(draft, tree=TREE, streamer=bound)
    place.generate(target, ids, max_new_tokens=12, streamer=given, custom_generate=generator)
    assert given.calls == theirs.calls and bound.calls == []


def test_text_streamers_reject_batches(ours, tokenizer):
    ids, mask = left_pad(random_prompts([5, 3], seed=37))
    with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
        ours(ids, attention_mask=mask, max_new_tokens=4, streamer=TextStreamer(tokenizer))


def test_stop_strings(target, decoder, draft, tokenizer, custom, place):
    ids = torch.tensor(random_prompts([5], seed=38))
    free = tokenizer.decode(target.generate(ids, max_new_tokens=25)[0, 5:])
    stop = free[11:14]
    expected = target.generate(ids, max_new_tokens=25, stop_strings=stop, tokenizer=tokenizer)
    assert 5 < expected.shape[1] < 30
    assert torch.equal(decoder.generate(ids, max_new_tokens=25, stop_strings=stop), expected)
    config = GenerationConfig(max_new_tokens=25, stop_strings=[stop])
    assert torch.equal(decoder.generate(ids, generation_config=config, tokenizer=tokenizer), expected)
    found = place.generate(
        target, ids, max_new_tokens=25, stopping_criteria=[StopStringCriteria(tokenizer, stop)],
        custom_generate=custom(draft, tree=TREE),
    )  # fmt: skip
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        Decoder.from_pretrained(target, device="cpu").generate(ids, stop_strings="a", mode="autoregressive")


def test_max_time(ours):
    """Setting up takes none of it; when it is over one token still comes."""
    ids = torch.tensor(random_prompts([5], seed=39))
    assert ours(ids, max_new_tokens=25, max_time=600.0).shape[1] == 30
    assert ours(ids, max_new_tokens=25, max_time=1e-9).shape[1] == 6


def test_time_that_transformers_takes_does_not_move_the_deadline(ours, monkeypatch):
    """It is over before the criterion's clock starts."""
    prepare = GPT2LMHeadModel._prepare_generation_config

    def slow(*arguments, **options):
        time.sleep(0.2)
        return prepare(*arguments, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "_prepare_generation_config", slow)
    ids = torch.tensor(random_prompts([5], seed=39))
    assert ours(ids, max_new_tokens=25, max_time=1e-9).shape[1] == 6


@pytest.mark.parametrize("options", [{}, {"max_time": 600.0}], ids=["plain", "deadline"])
def test_what_comes_before_custom_generate_decodes_counts_to_the_first_token_alone(
    target, draft, place, custom, options, monkeypatch
):
    """Making the decoder and measuring, here 1000 seconds of a clock turned on by hand: they are in the time to the
    first token, not in the time that a deadline allows."""
    passed, entered, began, custom_module = [0.0], [], [], sys.modules["stagedspec.hf.custom_generate"]
    for clock in ("time", "perf_counter"):
        real = getattr(time, clock)
        monkeypatch.setattr(time, clock, lambda real=real: real() + passed[0])
    make, decode = custom_module.decoder_for, Decoder.decode

    def slow(*given):
        entered.append(time.perf_counter())
        passed[0] += 1000.0
        return make(*given)

    def noted(decoder, call):
        began.append(call.began)
        return decode(decoder, call)

    monkeypatch.setattr(custom_module, "decoder_for", slow)
    monkeypatch.setattr(Decoder, "decode", noted)
    generate, ids = custom(draft, tree=TREE), torch.tensor(random_prompts([5], seed=39))
    assert place.generate(target, ids, max_new_tokens=25, custom_generate=generate, **options).shape[1] == 30
    assert began[0] <= entered[0]
    assert generate.last_stats.seconds_to_first_token >= 1000.0 > generate.last_stats.total_seconds


def test_streams_honour_everything_too(decoder):
    ids = torch.tensor(random_prompts([5], seed=40))
    for options in ({"repetition_penalty": 1.7}, {"stopping_criteria": [StopsAt(EOS)]}, {"do_sample": True, "seed": 4}):
        expected = decoder.generate(ids, max_new_tokens=25, **options)[0, 5:].tolist()
        chunks = list(decoder.stream(ids, 25, **options))
        assert [token for chunk in chunks for token in chunk.tokens] == expected
        assert "".join(map(str, chunks)) == decoder.tokenizer.decode(expected)
        assert decoder.complete(ids, 25, **options).tokens == expected
    config = GenerationConfig(max_new_tokens=9, no_repeat_ngram_size=2)
    assert (
        decoder.complete(ids, generation_config=config).tokens
        == decoder.generate(ids, generation_config=config)[0, 5:].tolist()
    )


# ---------------------------------------------------------------- what is returned


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}], ids=["plain", "processed"])
def test_dictionaries(ours, target, options, theirs):
    ids, mask = left_pad(random_prompts([5, 3], seed=41))
    eos = int(theirs(ids, attention_mask=mask, max_new_tokens=9, **options)[0, -1])
    options = options | {
        "max_new_tokens": 20, "eos_token_id": eos, "attention_mask": mask, "return_dict_in_generate": True,
        "output_scores": True, "output_logits": True,
    }  # fmt: skip
    expected, found = theirs(ids, **options), ours(ids, **options)
    assert isinstance(found, hf.StagedOutput) and isinstance(found, GenerateDecoderOnlyOutput)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found[0], expected.sequences)
    assert found.attentions is None and not {"cache", "past_key_values"} & found.keys()
    assert found.stats.mode == "staged" and found.stats.tokens_per_step > 1
    for name in ("scores", "logits"):
        ours_, others = getattr(found, name), getattr(expected, name)
        assert len(ours_) == len(others) == expected.sequences.shape[1] - 5
        running = torch.tensor([True, True])
        for step, (mine, other) in enumerate(zip(ours_, others, strict=True)):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine[running], other[running], rtol=1e-4, atol=1e-4)
            assert not mine[~running].any()
            running &= expected.sequences[:, 5 + step] != eos
    found.scores[0].add_(1)  # ordinary tensors, not those of inference mode
    for flag in ("output_scores", "output_logits"):
        options[flag] = False
    assert ours(ids, **options).scores is None


def test_what_is_recorded_stays_as_it_was(ours):
    """Logits are those before a processor that works in place; scores, what one returned that uses its tensor again."""
    ids, held, said = torch.tensor(random_prompts([5], seed=41)), [], []

    def doubled(ids, scores):
        held[:] = held or [torch.empty_like(scores)]
        held[0].copy_(scores.mul_(2))
        said.append(held[0].cpu().clone())
        return held[0]

    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = ours(ids, logits_processor=[doubled], **options)
    assert len(out.scores) == len(out.logits) == 4
    for scores, logits, returned in zip(out.scores, out.logits, said, strict=False):
        assert torch.equal(scores, returned) and torch.equal(2 * logits, returned)
    plain = ours(ids, **options)
    plain.scores[0].zero_()
    assert plain.logits[0].any()


def test_rows_that_a_criterion_ends_within_a_step(ours, theirs):
    """Tokens beyond it are dropped, and their scores."""
    ids, options = torch.tensor(random_prompts([5], seed=41)), {"max_new_tokens": 12}
    for stop in theirs(ids, **options)[0, 5:].unique().tolist():
        more = {"return_dict_in_generate": True, "output_scores": True}
        out = ours(ids, stopping_criteria=[StopsAt([stop])], **options, **more)
        assert torch.equal(out.sequences, theirs(ids, stopping_criteria=[StopsAt([stop])], **options))
        assert len(out.scores) == out.sequences.shape[1] - 5


def test_scores_are_warped_as_transformers_warps_them(ours, target, theirs):
    """The scores of the first position depend on the prompt alone, whatever is sampled."""
    ids = torch.tensor(random_prompts([5], seed=42))
    options = {
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.2,
        "max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    mine, other = ours(ids, **options).scores[0], theirs(ids, **options).scores[0]
    assert 1 < int(other.isfinite().sum()) < 20
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- sampled

SAMPLED = {
    "penalty": {"repetition_penalty": 1.4, "top_k": 20},
    "all-warpers": {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
    "typical": {"typical_p": 0.9, "temperature": 0.8},
    "cutoffs": {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_k": 0},
    "entropy": {"top_h": 0.6},
    "renormalised": {"renormalize_logits": True, "top_p": 0.9},
    "watermark": {"watermarking_config": {"bias": 2.0}, "no_repeat_ngram_size": 2},
    "nothing-left-to-choose": {"generation_config": GenerationConfig(top_p=0.0)},
    "another-order": {"logits_processor": [TopPLogitsWarper(0.6)], "temperature": 0.4, "top_k": 30},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_tokens_are_those_of_every_mode(decoder, name):
    ids, mask = left_pad(random_prompts([5, 2, 8], seed=43))
    options = {"do_sample": True, "max_new_tokens": 20, **SAMPLED[name]}
    for seed in (0, 9):
        expected = decoder.generate(ids, mask, mode="autoregressive", seed=seed, **options)
        for mode in ("chain", "tree", "staged"):
            assert torch.equal(decoder.generate(ids, mask, mode=mode, seed=seed, **options), expected), mode


@pytest.mark.parametrize("name", ["all-warpers", "penalty", "another-order"])
def test_built_in_warping_chooses_as_transformers_warpers_do(decoder, monkeypatch, name):
    """The same noise, once on logits warped by our operation, once on logits warped by transformers' processors."""
    ids, mask = left_pad(random_prompts([5, 2], seed=44))
    options = {"do_sample": True, "max_new_tokens": 30, "seed": 5, "repetition_penalty": 1.0, **SAMPLED[name]}
    built_in = decoder.generate(ids, mask, **options)
    monkeypatch.setattr(prepared, "_WARPERS", {})
    assert torch.equal(decoder.generate(ids, mask, **options), built_in)


def test_warpers_that_are_not_the_plain_ones_stay_processors():
    """Only the last of a kind is taken off, and none that does what `Sampling` cannot."""
    split = prepared._split_processors
    for odd in (TopPLogitsWarper(0.6, min_tokens_to_keep=3), TopPLogitsWarper(0.6, filter_value=-99.0)):
        assert split(LogitsProcessorList([odd]), True) == ([odd], Sampling(True))
    first, last = TopPLogitsWarper(0.3), TopPLogitsWarper(0.7)
    assert split(LogitsProcessorList([first, last]), True) == ([first], Sampling(True, top_p=0.7))
    assert split(LogitsProcessorList([first, last]), False) == ([first, last], Sampling(False))
    below = [TemperatureLogitsWarper(0.5), TopKLogitsWarper(9)]
    assert split(LogitsProcessorList([first, *below, last]), True) == (
        [first],
        Sampling(True, temperature=0.5, top_k=9, top_p=0.7),
    )


@pytest.mark.parametrize("keep", [1, 3])
def test_tokens_that_top_p_must_keep(decoder, keep):
    """As transformers' warper chooses, on the same noise: of a flat distribution three tokens differ from one."""
    ids = torch.tensor(random_prompts([6], seed=46))
    warper = TopPLogitsWarper(1e-6, min_tokens_to_keep=keep)
    options = {"do_sample": True, "max_new_tokens": 30, "seed": 5}
    found = decoder.generate(ids, logits_processor=[warper], **options)
    greedy = decoder.generate(ids, max_new_tokens=30)
    assert torch.equal(found, greedy) == (keep == 1)


def test_seeds(target, draft, decoder, custom, place):
    """torch's generator decides, unless a seed is given, beforehand or in the call."""
    ids = torch.tensor(random_prompts([5], seed=45))

    def sample(torch_seed, call=None, **options):
        torch.manual_seed(torch_seed)
        generator = custom(draft, tree=TREE, **options)
        more = {} if call is None else {"seed": call}
        return place.generate(
            target, ids, do_sample=True, max_new_tokens=30, custom_generate=generator, **more
        ).tolist()

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, seed=7) == sample(2, seed=7) == sample(3, call=7) == sample(3, call=7, seed=8)
    config = GenerationConfig(do_sample=True, max_new_tokens=30)
    assert sample(1, seed=7) == decoder.generate(ids, generation_config=config, seed=7).tolist()
    torch.manual_seed(1)
    generator = custom(draft, tree=TREE)
    options = {"do_sample": True, "max_new_tokens": 30, "custom_generate": generator}
    assert place.generate(target, ids, **options).tolist() != place.generate(target, ids, **options).tolist()


def test_arguments_of_one_call_go_first(target, draft, custom, place):
    """Mode, tree and seed, also a seed of 0; the next call has the object's own again."""
    ids = torch.tensor(random_prompts([5], seed=45))
    small = TreeConfig(nodes=2, depth=1, passes=1, width=1, children=1, prefetch=0)
    generator = custom(draft, tree=TREE, seed=7)

    def sample(own, **call):
        options = {"do_sample": True, "max_new_tokens": 20, "custom_generate": own}
        return place.generate(target, ids, **options, **call).tolist()

    first = sample(generator)
    assert sample(generator, seed=0) == sample(custom(draft, tree=TREE, seed=0)) != first
    assert sample(generator, mode="chain", tree=small) == first
    assert (generator.last_stats.mode, generator.last_stats.tree["nodes"]) == ("chain", 2)
    assert sample(generator) == first
    assert (generator.last_stats.mode, generator.last_stats.tree["nodes"]) == ("staged", TREE.nodes)


def test_seeds_of_a_decoder(decoder):
    ids = torch.tensor(random_prompts([5], seed=45))
    options = {"do_sample": True, "max_new_tokens": 30}
    torch.manual_seed(3)
    first, second = (decoder.generate(ids, **options).tolist() for _ in range(2))
    torch.manual_seed(3)
    assert first == decoder.generate(ids, seed=None, **options).tolist() != second


# ---------------------------------------------------------------- other proposals


def test_assistant_models(target, draft, custom, make_decoder, place):
    ids = torch.tensor(random_prompts([5], seed=46))
    expected = target.generate(ids, max_new_tokens=20)
    plain = make_decoder(target, tree=TREE)
    assert torch.equal(plain.generate(ids, max_new_tokens=20, assistant_model=draft), expected)
    assert plain.last_stats.draft_passes > 0 and plain.last_stats.tokens_per_step > 1.5
    assert plain.draft is None
    generator = custom(tree=TREE)
    found = place.generate(target, ids, max_new_tokens=20, assistant_model=draft, custom_generate=generator)
    assert torch.equal(found, expected) and generator.last_stats.draft_passes > 0
    with pytest.raises(ValueError, match=f"share the vocabulary: the target has {VOCAB} tokens, the draft 50"):
        plain.generate(ids, assistant_model=make_gpt2(0, vocab_size=50, n_layer=1))
    with pytest.raises(ValueError, match="assistant_model must be a hub id, a folder or a GPT2LMHeadModel, got int"):
        plain.generate(ids, assistant_model=7)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}, {"repetition_penalty": 1.02}])
def test_prompt_lookup(target, options, make_decoder):
    """Chains from the sequence's own repeats, without a draft: the tokens of plain decoding."""
    decoder = make_decoder(target)
    ids, mask = left_pad([*random_prompts([4], seed=47), [7, 8, 9, 10] * 4, [3]])
    expected = decoder.generate(ids, mask, 30, mode="autoregressive", **options)
    for count in (1, 5, 20):
        assert torch.equal(decoder.generate(ids, mask, 30, prompt_lookup_num_tokens=count, **options), expected), count
    stats = decoder.last_stats
    assert stats.mode == "lookup" and stats.draft_passes == 0 and stats.origins["draft"] == 0
    if not options.get("do_sample"):
        assert torch.equal(expected, target.generate(ids, attention_mask=mask, max_new_tokens=30, **options))
        assert stats.origins["ngram"] > 0


def test_prompt_lookup_accepts_what_repeats(target, custom, place):
    """Greedy decoding of a small model soon repeats itself: then whole chains come true."""
    ids = torch.tensor(random_prompts([2], seed=48))
    expected = target.generate(ids, max_new_tokens=46)
    generator = custom()
    found = place.generate(target, ids, max_new_tokens=46, prompt_lookup_num_tokens=8, custom_generate=generator)
    assert torch.equal(found, expected)
    assert generator.last_stats.steps < 46 and generator.last_stats.origins["ngram"] > 4
    for count in (0, 256, 2.5):
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens must be a whole number from 1 to 255"):
            place.generate(target, ids, prompt_lookup_num_tokens=count, custom_generate=generator)


# ---------------------------------------------------------------- the model behind custom_generate


@pytest.fixture
def made(monkeypatch):
    """The models whose weights are laid out."""
    known = []
    real = stagedspec.models.live_model.GPT2

    def record(model, *args, **options):
        known.append(model)
        return real(model, *args, **options)

    monkeypatch.setattr(stagedspec.models.live_model, "GPT2", record)
    return known


def test_the_module_is_at_hand():
    assert stagedspec.__getattr__("hf") is hf


def test_weights_are_read_once(made, custom, place):
    model, draft = make_gpt2(50).to(place.device), make_gpt2(51)
    ids = torch.tensor(random_prompts([5], seed=49), device=place.device)
    for _ in range(3):
        model.generate(ids, max_new_tokens=4, custom_generate=custom(draft, tree=TREE))
    assert made == [model, draft]
    other = make_gpt2(52)
    model.generate(ids, max_new_tokens=4, custom_generate=custom(mode="autoregressive"))
    model.generate(ids, max_new_tokens=4, custom_generate=custom(other, tree=TREE))
    assert made == [model, draft, other]  # the target is read once for all drafts


def _changes(model):
    """Ways in which weights change."""
    other = make_gpt2(77).state_dict()

    def step():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        ids = torch.tensor([[1, 2, 3]], device=model.device)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.zero_grad()

    def through_data():
        for parameter in model.parameters():
            parameter.data.mul_(0.7)

    def a_token_through_data():
        model.transformer.wte.weight.data[4].mul_(-4.0)

    def a_neuron_through_data():
        model.transformer.h[1].mlp.c_proj.weight.data[:, 3].mul_(-20.0)

    def one_value_through_data():
        model.transformer.h[0].mlp.c_fc.weight.data[1, 2] += 90.0
        hf.forget(model)

    def replaced():
        model.transformer.h[1].attn.c_proj.weight = torch.nn.Parameter(torch.randn(24, 24, device=model.device))

    return {
        "optimizer": step,
        "load_state_dict": lambda: model.load_state_dict(other),
        "data": through_data,
        "data-row": a_token_through_data,
        "data-column": a_neuron_through_data,
        "forgotten": one_value_through_data,
        "replaced": replaced,
    }


@pytest.mark.parametrize(
    "way", ["optimizer", "load_state_dict", "data", "data-row", "data-column", "forgotten", "replaced"]
)
def test_changed_weights_are_never_missed(way, custom, place):
    model, draft = make_gpt2(50).to(place.device), make_gpt2(51)
    ids = torch.tensor(random_prompts([5], seed=51), device=place.device)
    options = {"max_new_tokens": 30}
    before = model.generate(ids, **options, custom_generate=custom(draft, tree=TREE))
    assert torch.equal(before, model.generate(ids, **options))
    _changes(model)[way]()
    after = model.generate(ids, **options, custom_generate=custom(draft, tree=TREE))
    assert torch.equal(after, model.generate(ids, **options))
    assert not torch.equal(after, before)


def test_models_are_let_go(custom, place):
    model, draft = make_gpt2(50).to(place.device), make_gpt2(51)
    ids = torch.tensor(random_prompts([5], seed=50), device=place.device)
    model.generate(ids, max_new_tokens=4, custom_generate=custom(draft, tree=TREE))
    gone = [weakref.ref(model), weakref.ref(draft), weakref.ref(hf.decoder_for(model, draft, backend=place.backend))]
    del model, draft
    gc.collect()
    assert [one() for one in gone] == [None, None, None]


def test_the_models_dtype(target, draft, custom, place):
    model = make_gpt2(0).to(place.device, torch.bfloat16)
    assert hf.decoder_for(model, draft, backend=place.backend).target.dtype == torch.bfloat16
    ids = torch.tensor(random_prompts([5], seed=52), device=place.device)
    found = model.generate(ids, max_new_tokens=20, custom_generate=custom(draft, tree=TREE))
    assert torch.equal(found, model.generate(ids, max_new_tokens=20, custom_generate=custom(mode="autoregressive")))


def test_a_model_whose_dtype_changes(custom, place):
    """The decoder that was made for it before is made anew, not read again in the old dtype."""
    model = make_gpt2(0).to(place.device)
    ids = torch.tensor(random_prompts([5], seed=52), device=place.device)
    options = {"max_new_tokens": 20, "custom_generate": custom(mode="autoregressive")}
    model.generate(ids, **options)
    model.to(torch.bfloat16)
    assert hf.decoder_for(model, backend=place.backend).target.dtype == torch.bfloat16
    fresh = make_gpt2(0).to(place.device, torch.bfloat16)
    assert torch.equal(model.generate(ids, **options), fresh.generate(ids, **options))


def test_each_backend_has_its_decoder(device):
    model = make_gpt2(50, n_layer=1).to(device)
    made = {name: hf.decoder_for(model, backend=name) for name in ("torch", "triton")}
    assert all(decoder.backend == name for name, decoder in made.items())
    assert all(hf.decoder_for(model, backend=name) is decoder for name, decoder in made.items())


def test_a_decoder_is_where_its_model_is(monkeypatch):
    """Not on the GPU that "auto" would take."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert hf.decoder_for(make_gpt2(50, n_layer=1), backend="torch").device == torch.device("cpu")


def test_tables_of_a_draft(target, draft, tmp_path):
    """With another table the same draft is another decoder's; a file is read once; what is no table is refused."""
    table = fit_table([torch.randint(VOCAB, (300,))], VOCAB)
    table.save(tmp_path / "table.safetensors")
    plain, with_table = hf.decoder_for(target, draft), hf.decoder_for(target, draft, table)
    assert plain.ngram is None and with_table.ngram is table
    assert hf.decoder_for(target, draft) is plain and hf.decoder_for(target, draft, table) is with_table
    read = hf.decoder_for(target, draft, tmp_path / "table.safetensors")
    assert hf.decoder_for(target, draft, str(tmp_path / "table.safetensors")) is read
    with pytest.raises(ValueError, match="ngram must be a path or a KatzTable, got int"):
        hf.decoder_for(target, draft, 7)


def test_the_table_of_the_object_is_used(made, custom, place):
    """The decoder that a call makes is the one of its table."""
    model, draft = make_gpt2(50).to(place.device), make_gpt2(51)
    table = fit_table([torch.randint(VOCAB, (300,))], VOCAB)
    ids = torch.tensor([[1, 2, 3]], device=place.device)
    model.generate(ids, max_new_tokens=2, custom_generate=custom(draft, table, tree=TREE))
    assert hf.decoder_for(model, draft, table, place.backend).ngram is not None and made == [model, draft]


def test_settings_are_refused_before_weights_are_read(made, draft):
    ids, generator = torch.tensor([[1, 2, 3]]), custom_generate(draft, tree=TREE)
    with pytest.raises(ValueError, match=r"guidance_scale=1\.5 is not supported"):
        make_gpt2(50).generate(ids, guidance_scale=1.5, custom_generate=generator)
    assert made == []


def test_models_that_would_be_decoded_wrongly(draft):
    ids = torch.tensor([[1, 2, 3]])
    call = {"max_new_tokens": 4, "custom_generate": custom_generate(draft, tree=TREE)}
    model = make_gpt2(0).train()
    with pytest.raises(ValueError, match=r"training mode, where dropout .*model.eval\(\)"):
        model.generate(ids, **call)
    calm = make_gpt2(0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0).train()
    assert torch.equal(calm.generate(ids, **call), calm.eval().generate(ids, max_new_tokens=4))
    adapted = make_gpt2(0)
    adapted.transformer.h[0].mlp.c_fc.lora_A = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"has a parameter 'transformer.h.0.mlp.c_fc.lora_A'.*merge adapters"):
        adapted.generate(ids, **call)
    with pytest.raises(ValueError, match="no checkpoint folder at '/none/such'"):
        make_gpt2(0).generate(ids, custom_generate=custom_generate("/none/such"))
    with pytest.raises(ValueError, match=r"mode 'staged' needs a draft model: .*prompt_lookup_num_tokens"):
        make_gpt2(0).generate(ids, custom_generate=custom_generate())


# ---------------------------------------------------------------- what is not supported


def test_every_setting_is_in_one_table():
    tables = [names for group in (settings.HONOURED, settings.IRRELEVANT) for names in group.values()]
    listed = [name for names in tables for name in names] + list(settings.REFUSED)
    assert len(listed) == len(set(listed))
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - set(listed) == set()


def test_settings_of_a_later_transformers_are_refused(monkeypatch):
    monkeypatch.setattr(settings, "_KNOWN", settings._KNOWN - {"top_h"})
    with pytest.raises(ValueError, match=r"top_h=0\.5 is not supported: this release does not know the setting"):
        settings.refuse_settings({"top_h": 0.5})
    settings.refuse_settings({"top_h": None, "colour": "blue"})


REFUSALS = {
    "beams": ({"num_beams": 3}, "num_beams=3 is not supported: sample"),
    "several": ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 .*: repeat the prompt"),
    "attentions": ({"output_attentions": True}, "output_attentions=True .*run the model on the finished sequences"),
    "hidden": ({"output_hidden_states": True}, "output_hidden_states=True .*run the model"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale=1.5 is not supported: use transformers' own generate"),
    "ensemble": ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight=0.5 .*lossless"),
    "quantised-cache": (
        {"past_key_values": "cache"},
        "(cache|past_key_values) is not supported: give the whole sequence",
    ),
    "types": ({"token_type_ids": torch.ones(1, 3, dtype=torch.long)}, "token_type_ids is not supported"),
    "positions": ({"position_ids": torch.tensor([[3, 4, 5]])}, "position_ids other than .* are not supported"),
    "too-long": ({"max_new_tokens": POSITIONS}, f"must be at most n_positions = {POSITIONS}"),
    "mode": ({"max_new_tokens": 3, "mode": "sideways"}, "mode must be one of .*, got 'sideways'"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(ours, name):
    options, message = REFUSALS[name]
    if name == "quantised-cache":
        from transformers import DynamicCache

        options = {"past_key_values": DynamicCache()}
    with pytest.raises(ValueError, match=message):
        ours(torch.tensor([[1, 2, 3]]), **options)


BAD_OPTIONS = {
    "typo": ({"top_q": 1}, "unknown option 'top_q'; did you mean 'top_[kp]'"),
    "healing": ({"token_healing": True}, "token_healing=True is not supported: .*heal_tokens"),
    "paged": ({"cache_implementation": "paged"}, "cache_implementation='paged' is not supported"),
    "constraints": ({"force_words_ids": [[1]]}, r"force_words_ids=\[\[1\]\] is not supported: use sequence_bias"),
    "contrastive": ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is not supported"),
    "dola": ({"dola_layers": "low"}, "dola_layers='low' is not supported"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 3, 24)}, "inputs_embeds is not supported: give input_ids"),
    "custom": ({"custom_generate": print}, "custom_generate is not supported: leave it out"),
    "config": ({"generation_config": {"max_new_tokens": 3}}, "generation_config must be a GenerationConfig.*got dict"),
    "config-beams": ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams=2 is not supported"),
    "new-tokens": ({"max_new_tokens": 0, "repetition_penalty": 1.1}, "max_new_tokens must be .* at least 1, got 0"),
    "prompt": ({"input_ids": [[1, 2]], "repetition_penalty": 1.1}, "input_ids must be a LongTensor .*, got list"),
    "penalty": ({"repetition_penalty": -1.0}, "penalty.* strictly positive float"),
    "twice": ({"inputs": torch.tensor([[1]])}, "input_ids and inputs were both given"),
    "length-text": ({"max_length": "9"}, "max_length must be a whole number or None, got '9'"),
    "length-half": ({"max_length": 9.5}, r"max_length must be a whole number or None, got 9\.5"),
    "least-text": ({"min_length": "x"}, "min_length must be a whole number"),
    "penalty-text": ({"repetition_penalty": "1.2"}, "repetition_penalty must be a number or None, got '1.2'"),
    "begin-text": ({"bos_token_id": "x"}, "bos_token_id must be a whole number"),
    "beams-true": ({"num_beams": True}, "num_beams=True is not supported"),
    "beams-text": ({"num_beams": "x"}, "num_beams must be a whole number"),
    "decay": ({"exponential_decay_length_penalty": 3}, r"must be a pair \(first position, factor\) or None, got 3"),
    "suppress": ({"begin_suppress_tokens": "x"}, "begin_suppress_tokens must be a list of token ids"),
    "mark": ({"watermarking_config": 3}, "watermarking_config must be a WatermarkingConfig or a dict, got 3"),
    "allowed": ({"prefix_allowed_tokens_fn": 3}, "prefix_allowed_tokens_fn must be a function .*, got 3"),
    "tokenizer": ({"tokenizer": 3}, "tokenizer must be a tokenizer of transformers or None, got int"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_of_a_decoder(decoder, name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        decoder.generate(**({"input_ids": torch.tensor([[1, 2, 3]])} | options))


def test_streams_refuse_what_they_cannot_do(decoder):
    for options in ({"streamer": Records()}, {"return_dict_in_generate": True}, {"assistant_model": 1}):
        with pytest.raises(ValueError, match=f"stream and complete take no {next(iter(options))}"):
            decoder.stream("ab", 4, **options)


# ---------------------------------------------------------------- the embedded models


def test_embedded_models_through_transformers(custom, place):
    """An unmodified GPT2LMHeadModel with folders for draft and table, streamed."""
    root = Path(__file__).resolve().parents[2]
    assets = root / "stagedspec" / "assets"
    if not (assets / "target" / "config.json").is_file():
        pytest.fail("the embedded target is missing: run `stagedspec train`")
    model = GPT2LMHeadModel.from_pretrained(assets / "target", dtype=torch.float32)
    tokenizer = Decoder.default(device="cpu").tokenizer
    generator = custom(assets / "draft", assets / "ngram.safetensors", tree=TREE)
    prompts = (json.loads(line)["prompt"] for line in (root / "bench" / "prompts.jsonl").read_text().splitlines())
    for text, options in zip(prompts, ({}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 3}), strict=False):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, -64:]
        theirs, ours = Records(), Records()
        options = options | {"max_new_tokens": 40, "pad_token_id": 0}
        expected = model.generate(ids, streamer=theirs, **options)
        found = place.generate(model, ids, streamer=ours, custom_generate=generator, **options)
        assert torch.equal(found, expected), options
        assert ours.calls == theirs.calls
    assert generator.last_stats.tokens_per_step > 1


@pytest.mark.parametrize("name", ["synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask"])
def test_what_transformers_drops_is_refused(target, draft, name):
    ids = torch.tensor([[1, 2, 3]])
    value = True if name == "synced_gpus" else ids
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        target.generate(ids, max_new_tokens=4, custom_generate=custom_generate(draft, tree=TREE), **{name: value})


def test_what_is_refused_may_be_switched_off(target, decoder, draft, custom, place):
    """As a caller does that passes on all of its options."""
    ids, options = torch.tensor([[1, 2, 3]]), {"max_new_tokens": 4, "synced_gpus": False, "negative_prompt_ids": None}
    expected = target.generate(ids, **options)
    assert torch.equal(decoder.generate(ids, **options), expected)
    assert torch.equal(place.generate(target, ids, custom_generate=custom(draft, tree=TREE), **options), expected)


def test_two_different_drafts_are_refused(target, draft):
    ids, generator = torch.tensor([[1, 2, 3]]), custom_generate(draft, tree=TREE)
    with pytest.raises(ValueError, match="draft= and generate has another assistant_model="):
        target.generate(ids, max_new_tokens=4, assistant_model=make_gpt2(7), custom_generate=generator)
    found = target.generate(ids, max_new_tokens=4, assistant_model=draft, custom_generate=generator)
    assert torch.equal(found, target.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    ("mode", "why"), [("staged", "the draft proposes"), ("autoregressive", "mode 'autoregressive' proposes nothing")]
)
def test_prompt_lookup_without_effect(decoder, mode, why):
    ids = torch.tensor([[1, 2, 3]])
    with pytest.warns(UserWarning, match=f"prompt_lookup_num_tokens has no effect here: {why}") as told:
        found = decoder.generate(ids, max_new_tokens=4, mode=mode, prompt_lookup_num_tokens=3)
    assert len(told) == 1 and torch.equal(found, decoder.generate(ids, max_new_tokens=4, mode=mode))


@pytest.mark.parametrize("count", [0, 256, 2.0, "x"])
def test_prompt_lookup_is_checked_with_a_draft_too(decoder, count):
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens must be a whole number from 1 to 255"):
        decoder.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, prompt_lookup_num_tokens=count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streamer": 5}, "streamer must have the methods put and end, .* got 5"),
        ({"logits_processor": 5}, "logits_processor must be a list of callables, got 5"),
        ({"logits_processor": lambda ids, scores: scores}, "put a single one into a list"),
        ({"stopping_criteria": [5]}, r"stopping_criteria must be a list of callables, got \[5\]"),
        ({"max_time": "x"}, "max_time must be a positive number of seconds, got 'x'"),
        ({"max_time": 0}, "max_time must be a positive number of seconds, got 0"),
        ({"no_repeat_ngram_size": "x"}, "no_repeat_ngram_size must be a whole number or None, got 'x'"),
        ({"bad_words_ids": 5}, "bad_words_ids|transformers cannot read these arguments"),
        ({"stop_strings": 5}, "stop_strings must be text or a list of texts, none of them empty, got 5"),
        ({"stop_strings": ["a", ""]}, "none of them empty"),
    ],
)
def test_arguments_of_the_wrong_kind(options, message):
    decoder = Decoder.from_pretrained(make_gpt2(), device="cpu")
    with pytest.raises(ValueError, match=message):
        decoder.generate(torch.tensor([[1, 2]]), max_new_tokens=2, mode="autoregressive", **options)


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
@pytest.mark.parametrize("token", [VOCAB, 10**9])
def test_forced_tokens_beyond_the_vocabulary_are_refused(target, draft, name, token):
    """transformers' processors would find out at the position where they force it, with an IndexError."""
    ids, message = torch.tensor([[1, 2, 3]]), f"{name} must be below {VOCAB}, the target's vocabulary, got {token}"
    decoder = Decoder.from_pretrained(target, draft, device="cpu", tree=TREE)
    with pytest.raises(ValueError, match=message):
        decoder.generate(ids, max_new_tokens=4, **{name: token})
    with pytest.raises(ValueError, match=message):
        target.generate(ids, max_new_tokens=4, custom_generate=custom_generate(draft, tree=TREE), **{name: token})


@pytest.mark.parametrize(
    ("name", "token"),
    [("forced_bos_token_id", VOCAB - 1), ("forced_eos_token_id", VOCAB - 1), ("forced_bos_token_id", -1)],
)
def test_the_last_token_of_the_vocabulary_can_be_forced(target, draft, name, token):
    """Also counted from the end, where transformers allows that."""
    ids = torch.tensor([[1]])
    options = {"max_new_tokens": 4, "do_sample": False, name: token, "pad_token_id": 0}
    found = target.generate(ids, custom_generate=custom_generate(draft, tree=TREE), **options)
    assert torch.equal(found, target.generate(ids, **options)) and VOCAB - 1 in found


def test_a_model_in_float64_says_what_to_do(draft):
    model = make_gpt2(3).double()
    with pytest.raises(ValueError, match=r"computes in float64, expected float32, bfloat16, float16: call model.float"):
        model.generate(torch.tensor([[1]]), max_new_tokens=2, custom_generate=custom_generate(draft, tree=TREE))


ANSWERS = {
    "none": (
        lambda ids, scores: None,
        r"scores must be returned as a floating-point tensor of shape \[2, 61\], got NoneType",
    ),
    "numpy": (lambda ids, scores: scores.numpy(), "got ndarray"),
    "one-row": (lambda ids, scores: scores[:1], r"got \[1, 61\] of float32"),
    "flat": (lambda ids, scores: scores[0], r"got \[61\] of float32"),
    "truths": (lambda ids, scores: scores > 0, r"got \[2, 61\] of bool"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_processors_return_is_checked(decoder, name):
    processor, message = ANSWERS[name]
    ids = torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=message):
        decoder.generate(ids, max_new_tokens=4, logits_processor=[processor])


def writing(ids, scores, **more):
    """A processor or a criterion that changes what was decoded, at its second call."""
    if ids.shape[1] > 2:
        ids[0, -1] = 0
    return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "who"), [("logits_processor", "a logits processor"), ("stopping_criteria", "a stopping criterion")]
)
@pytest.mark.parametrize("mode", ["autoregressive", "staged"])
def test_what_was_decoded_cannot_be_written_to(decoder, name, who, mode):
    ids = torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=f"{who} wrote into input_ids, .*: work on a copy"):
        decoder.generate(ids, max_new_tokens=4, mode=mode, eos_token_id=[], **{name: [writing]})
    assert torch.equal(ids, torch.tensor([[1, 2], [3, 4]]))


@pytest.mark.parametrize("rows", [1, 3])
def test_what_criteria_return_is_checked(decoder, rows):
    class Column(StoppingCriteria):
        def __call__(self, ids, scores, **more):
            return torch.zeros(len(ids), 1, dtype=torch.bool)

    ids = torch.tensor([[1, 2]] * rows)
    with pytest.raises(
        ValueError, match=rf"stopping criteria must be .* shape \[{rows}\], got \[{rows}, {rows}\] of bool"
    ):
        decoder.generate(ids, max_new_tokens=4, stopping_criteria=[Column()])


def test_numbers_of_numpy_that_ask_for_nothing(target, draft):
    ids = torch.tensor([[1, 2, 3]])
    options = {"num_beams": numpy.int64(1), "guidance_scale": numpy.float64(1.0), "max_new_tokens": 4}
    found = target.generate(ids, custom_generate=custom_generate(draft, tree=TREE), do_sample=False, **options)
    assert torch.equal(found, target.generate(ids, max_new_tokens=4, do_sample=False))


def test_a_mask_that_is_none_is_named_as_such(target, draft):
    ids = torch.tensor([[1, 2, 3]])
    for mask in (torch.full((1, 3), torch.nan), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="attention_mask"):
            target.generate(
                ids, attention_mask=mask, max_new_tokens=4, custom_generate=custom_generate(draft, tree=TREE)
            )


def test_a_streamer_must_be_one(draft):
    with pytest.raises(ValueError, match=r"streamer must have put and end.*got int"):
        custom_generate(draft, streamer=5)
    with pytest.raises(ValueError, match=r"streamer must have put and end.*got Queue"):  # it can only put
        custom_generate(draft, streamer=queue.Queue())


def test_custom_generate_is_called_first(target, draft):
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=r"give generate an object, custom_generate=custom_generate\(\.\.\.\)"):
        target.generate(ids, max_new_tokens=2, custom_generate=custom_generate)
    with pytest.raises(ValueError, match="mode must be one of autoregressive, chain, tree, staged, got 'trees'"):
        custom_generate(draft, mode="trees")


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("name", ["eos_token_id", "repetition_penalty"])
def test_a_decoder_follows_the_generation_config_of_its_model(draft, name, called):
    """At both entry points, and not only the weights; whether it has been called before or not."""
    model = make_gpt2(3)
    decoder = Decoder.from_pretrained(model, draft=draft, tree=TREE, device="cpu", backend="torch")
    ids = torch.tensor([[1, 2, 3]])
    first = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert not called or torch.equal(decoder.generate(ids, max_new_tokens=8), first)
    value = int(first[0, 4]) if name == "eos_token_id" else 5.0
    setattr(model.generation_config, name, value)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert not torch.equal(first, expected)
    assert torch.equal(decoder.generate(ids, max_new_tokens=8), expected)


class Picky(Records):
    """A streamer that takes one sequence alone, as TextStreamer does."""

    def put(self, value):
        if value.dim() > 1 and len(value) > 1:
            raise ValueError("one sequence alone")
        super().put(value)


def test_a_stream_that_refuses_the_prompt_ends(target, draft):
    streamer = Picky()
    with pytest.raises(ValueError, match="one sequence alone"):
        target.generate(
            torch.tensor([[1, 2], [3, 4]]), max_new_tokens=3, custom_generate=custom_generate(draft, streamer=streamer)
        )
    assert streamer.calls[-1] == "end"


def test_a_function_with_the_parameters_of_generate_is_none(target, draft):
    """The streamer is that of transformers' generate, whatever lies in between and however it names its parameters."""

    def own(model, input_ids, *rest, streamer=None, assistant_model=None, custom_generate=None, **more):
        return custom(model, input_ids, *rest, **more)

    custom, streamer, ids = custom_generate(draft, tree=TREE), Records(), torch.tensor([[1, 2, 3]])

    def between(*given, **more):
        return own(*given, custom_generate=custom, **more)

    out = target.generate(ids, max_new_tokens=4, do_sample=False, streamer=streamer, custom_generate=between)
    assert torch.equal(out, target.generate(ids, max_new_tokens=4, do_sample=False)) and streamer.calls[-1] == "end"


def test_a_copied_config_in_another_thread(target, draft):
    """It is the prompt that says which generate has called."""
    custom, streamer, ids = custom_generate(draft, tree=TREE), Records(), torch.tensor([[1, 2, 3]])

    def elsewhere(model, prompt, generation_config, **more):
        config = copy.deepcopy(generation_config)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(custom, model, prompt, generation_config=config, **more).result()

    out = target.generate(ids, max_new_tokens=4, do_sample=False, streamer=streamer, custom_generate=elsewhere)
    assert torch.equal(out, target.generate(ids, max_new_tokens=4, do_sample=False)) and streamer.calls[-1] == "end"


def test_a_mask_of_another_length_is_named(target, draft):
    mask = torch.tensor([[1, 1]])
    with pytest.raises(ValueError, match=r"attention_mask.* must have the shape of input_ids, \[1, 3\]"):
        target.generate(
            torch.tensor([[1, 2, 3]]), attention_mask=mask, max_new_tokens=4, custom_generate=custom_generate(draft)
        )


def test_a_subclass_that_hides_weights(draft):
    """Parameters are those of the modules, whatever a subclass makes of named_parameters."""

    class Hides(GPT2LMHeadModel):
        def named_parameters(self, *args, **kwargs):
            return iter([(name, one) for name, one in super().named_parameters(*args, **kwargs) if "h.0" not in name])

    plain = make_gpt2(3)
    model = Hides(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    found = Decoder.from_pretrained(model, draft=draft, tree=TREE, device="cpu", backend="torch")
    assert torch.equal(
        found.generate(ids, max_new_tokens=6), plain.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    )
