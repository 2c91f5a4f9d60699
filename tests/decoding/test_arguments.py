"""An argument means the same to both ways of reading it, alone or beside others, and what it means to transformers."""

import warnings

import numpy as np
import pytest
import torch
from helpers import VOCAB, byte_tokenizer, left_pad, make_gpt2, random_prompts
from tokenizers import pre_tokenizers
from transformers import GenerationConfig

from stagedspec import Decoder, TreeConfig
from stagedspec.decoding import arguments
from stagedspec.hf import custom_generate

TREE = TreeConfig()
IDS, MASK = left_pad(random_prompts([5, 3], seed=61))


@pytest.fixture(scope="module")
def decoder(target, drafts):
    return Decoder.from_pretrained(target, draft=drafts["good"], device="cpu", dtype="float32", tree=TREE)


@pytest.fixture(scope="module")
def stop(target):
    """A token that ends the first row early."""
    return int(target.generate(IDS, attention_mask=MASK, max_new_tokens=12)[0, 5 + 6])


def outcome(call):
    """The tokens, or that the call was refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call().tolist()
    except ValueError:
        return "refused"


# Settings of greedy and of sampled calls; STOP stands for the token that ends a row.
STOP = object()
GREEDY = {
    "nothing": {},
    "temperature-0": {"temperature": 0.0},
    "temperature-none": {"temperature": None},
    "temperature-negative": {"temperature": -1.0},
    "top-p": {"top_p": 1.5},
    "do-sample-none": {"do_sample": None},
    "do-sample-0": {"do_sample": 0},
    "do-sample-numpy": {"do_sample": np.False_},
    "eos": {"eos_token_id": STOP},
    "eos-list": {"eos_token_id": [STOP, 60]},
    "eos-tuple": {"eos_token_id": (STOP,)},
    "eos-tensor": {"eos_token_id": torch.tensor([3])},
    "eos-none": {"eos_token_id": None},
    "eos-beyond": {"eos_token_id": VOCAB},
    "eos-far-beyond": {"eos_token_id": 50256},
    "eos-negative": {"eos_token_id": -1},
    "eos-mixed": {"eos_token_id": [50256, STOP]},
    "eos-text": {"eos_token_id": "x"},
    "pad": {"eos_token_id": STOP, "pad_token_id": 7},
    "pad-none": {"eos_token_id": STOP, "pad_token_id": None},
    "pad-negative": {"pad_token_id": -1},
    "pad-negative-used": {"eos_token_id": STOP, "pad_token_id": -1},
    "pad-beyond": {"eos_token_id": STOP, "pad_token_id": 50256},
    "no-tokens": {"max_new_tokens": 0},
    "streamer-none": {"streamer": None, "logits_processor": None, "stopping_criteria": None},
    "numpy-new-tokens": {"max_new_tokens": np.int64(7)},
    "numpy-length": {"max_length": np.int32(15), "max_new_tokens": None},
    "numpy-eos": {"eos_token_id": np.int64(3)},
    "numpy-pad": {"eos_token_id": STOP, "pad_token_id": np.int64(9)},
    "numpy-penalty": {"repetition_penalty": np.float64(1.3)},
}


def filled(settings, stop):
    def put(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(put, value))
        return stop if value is STOP else value

    return {name: put(value) for name, value in settings.items()}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_settings_mean_what_they_mean_to_transformers(target, drafts, decoder, stop, name):
    """Both entrances, alone and beside a processor that changes nothing."""
    options = {"attention_mask": MASK, "max_new_tokens": 12} | filled(GREEDY[name], stop)
    try:
        expected = outcome(lambda: target.generate(IDS, **options))
    except TypeError:
        expected = "refused"
    except IndexError:  # transformers reads the padding of the rows that have stopped, which is no token
        expected = outcome(lambda: decoder.generate(IDS, **options))
        assert expected[0][-1] in (-1, 50256)
    assert outcome(lambda: decoder.generate(IDS, **options)) == expected
    beside = options | {"logits_processor": [lambda ids, scores: scores]}
    assert outcome(lambda: decoder.generate(IDS, **beside)) == expected
    if name != "eos-text":
        generator = custom_generate(drafts["good"], tree=TREE)
        assert outcome(lambda: target.generate(IDS, custom_generate=generator, **options)) == expected


@pytest.mark.parametrize(
    "name", ["eos", "eos-none", "pad", "pad-none", "temperature-0", "numpy-eos", "numpy-new-tokens"]
)
def test_settings_in_a_generation_config(target, decoder, stop, name):
    settings = {"max_new_tokens": 12} | filled(GREEDY[name], stop)
    config = GenerationConfig(**settings)
    expected = outcome(lambda: target.generate(IDS, attention_mask=MASK, generation_config=config))
    assert outcome(lambda: decoder.generate(IDS, MASK, generation_config=config)) == expected != "refused"
    assert vars(config) == vars(GenerationConfig(**settings))  # nothing of the caller's is changed


@pytest.mark.parametrize("settings", [{"eos_token_id": None}, {"pad_token_id": None}, {"repetition_penalty": None}, {}])
def test_none_takes_away_what_the_models_own_settings_say(drafts, stop, settings):
    model = make_gpt2(0)
    model.generation_config.update(eos_token_id=stop, pad_token_id=8)
    if "repetition_penalty" in settings:
        model.generation_config.update(repetition_penalty=1.4)
    decoder = Decoder.from_pretrained(model, draft=drafts["good"], device="cpu", tree=TREE)
    expected = model.generate(IDS, attention_mask=MASK, max_new_tokens=12, **settings)
    assert torch.equal(decoder.generate(IDS, MASK, 12, **settings), expected)
    assert torch.equal(decoder.generate(IDS, MASK, 12, min_length=1, **settings), expected)


@pytest.mark.parametrize("own", [False, True], ids=["of-the-call", "of-the-model"])
def test_token_0_ends_a_row(drafts, stop, own):
    """As any other token does: here 0 and the token that ends the first row have changed places."""
    model, swapped = make_gpt2(0), torch.arange(VOCAB)
    swapped[[0, stop]] = swapped[[stop, 0]]
    with torch.no_grad():
        model.transformer.wte.weight.copy_(model.transformer.wte.weight[swapped])
    ids, options = swapped[IDS], {"max_new_tokens": 12, "pad_token_id": 1}
    if own:
        model.generation_config.eos_token_id = 0
    else:
        options["eos_token_id"] = 0
    expected = model.generate(ids, attention_mask=MASK, **options)
    assert expected[0, -1] == 1 and 0 in expected[0]
    decoder = Decoder.from_pretrained(model, draft=drafts["random"], device="cpu", tree=TREE)
    assert torch.equal(decoder.generate(ids, MASK, **options), expected)
    assert torch.equal(decoder.generate(ids, MASK, min_length=1, **options), expected)
    generator = custom_generate(drafts["random"], tree=TREE)
    assert torch.equal(model.generate(ids, attention_mask=MASK, custom_generate=generator, **options), expected)


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_special_tokens_are_those_of_the_generation_config(stop, name):
    """transformers does not look into the model's config for what it does not say."""
    model = make_gpt2(0)
    settings = {"eos_token_id": stop, "pad_token_id": 7}
    setattr(model.config, name, settings.pop(name))
    model.generation_config.update(**settings)
    decoder = Decoder.from_pretrained(model, device="cpu")
    expected = model.generate(IDS, attention_mask=MASK, max_new_tokens=12)
    assert torch.equal(decoder.generate(IDS, MASK, 12, mode="autoregressive"), expected)


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_the_token_to_start_from_is_that_of_the_generation_config(place):
    """The model's config does not matter here either."""
    model = make_gpt2(0)
    getattr(model, place).bos_token_id = 5
    decoder = Decoder.from_pretrained(model, device="cpu")
    expected = outcome(lambda: model.generate(max_new_tokens=8))
    assert outcome(lambda: decoder.generate(max_new_tokens=8, mode="autoregressive")) == expected
    assert (expected == "refused") == (place == "config")


SAMPLED = {
    "temperature-0": ({"temperature": 0.0}, "refused"),
    "temperature-negative": ({"temperature": -0.5}, "refused"),
    "temperature-none": ({"temperature": None}, {}),
    "temperature-whole": ({"temperature": 2}, {"temperature": 2.0}),
    "temperature-numpy": ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
    "temperature-tensor": ({"temperature": torch.tensor(0.5)}, {"temperature": 0.5}),
    "top-k-0": ({"top_k": 0}, {}),
    "top-k-none": ({"top_k": None}, {}),
    "top-k-numpy": ({"top_k": np.int64(4)}, {"top_k": 4}),
    "top-k-tensor": ({"top_k": torch.tensor(4)}, {"top_k": 4}),
    "top-k-large": ({"top_k": 10**6}, {}),
    "top-k-half": ({"top_k": 2.5}, "refused"),
    "top-k-negative": ({"top_k": -1}, "refused"),
    "top-p-1": ({"top_p": 1.0}, {}),
    "top-p-above": ({"top_p": 1.5}, {}),
    "top-p-0": ({"top_p": 0.0}, {"top_k": 1}),
    "top-p-whole": ({"top_p": 1}, {}),
    "top-p-negative": ({"top_p": -0.1}, "refused"),
    "top-p-numpy": ({"top_p": np.float64(0.7)}, {"top_p": 0.7}),
    "min-p-0": ({"min_p": 0.0}, {}),
    "min-p-above": ({"min_p": 1.1}, "refused"),
    "min-p-numpy": ({"min_p": np.float32(0.25)}, {"min_p": 0.25}),
    "sample-numpy": ({"do_sample": np.True_}, {}),
    "sample-1": ({"do_sample": 1}, {}),
    "seed-numpy": ({"seed": np.int64(3)}, {"seed": 3}),
    "seed-unsigned": ({"seed": np.uint64(2**64 - 1)}, {"seed": -1}),
    "seed-tensor": ({"seed": torch.tensor(3)}, {"seed": 3}),
    "seeds-array": ({"seed": np.array([3, 4])}, {"seed": [3, 4]}),
    "seeds-mixed": ({"seed": [np.int64(3), torch.tensor(4)]}, {"seed": [3, 4]}),
    "seed-half": ({"seed": 0.5}, "refused"),
    "sample-text": ({"do_sample": "yes"}, "refused"),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_settings(decoder, name):
    """Each is the same as another, plainer one, or is refused, whatever stands beside it."""
    settings, same = SAMPLED[name]
    common = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": True, "seed": 5}
    expected = same if same == "refused" else outcome(lambda: decoder.generate(IDS, **common | same))
    for beside in ({}, {"logits_processor": [lambda ids, scores: scores]}):
        assert outcome(lambda beside=beside: decoder.generate(IDS, **common | settings | beside)) == expected
    if "seed" not in settings:
        config = GenerationConfig(max_new_tokens=12, **({"do_sample": True, "top_k": 0} | settings))
        if name == "top-k-none":  # here transformers' default
            expected = outcome(lambda: decoder.generate(IDS, **common, top_k=50))
        assert outcome(lambda: decoder.generate(IDS, MASK, generation_config=config, seed=5)) == expected


def test_both_entrances_sample_alike(target, drafts, decoder):
    generator = custom_generate(drafts["good"], tree=TREE)
    for settings in ({"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.5, "top_k": 0}, {"seed": np.int64(7)}):
        options = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": True, "seed": 5, "top_k": 50} | settings
        found = target.generate(IDS, custom_generate=generator, **options)
        assert torch.equal(found, decoder.generate(IDS, **options))


def test_the_warning_of_greedy_decoding_is_the_same_on_both_ways(decoder):
    for beside in ({}, {"min_length": 1}):
        with pytest.warns(UserWarning, match="greedy decoding ignores temperature: add do_sample=True") as told:
            decoder.generate(IDS, MASK, 4, temperature=0.0, **beside)
        assert [one.filename for one in told] == [__file__]


def test_plain_settings_need_no_transformers(decoder, monkeypatch):
    """Reading them costs some ten microseconds, through transformers a millisecond."""
    monkeypatch.setattr(arguments, "_weightless_model", lambda *_: pytest.fail("transformers was asked"))
    decoder.generate(IDS, MASK, 4, do_sample=True, temperature=0.5, top_k=3, eos_token_id=[5], streamer=None)


def test_calls_at_the_same_time_have_models_of_their_own(decoder):
    """The model without weights, whose `generate` reads the arguments, says where the call's prompt is."""
    first, second = (arguments._weightless_model(decoder.context, ids) for ids in (IDS, IDS.to("meta")))
    assert (first.device.type, second.device.type) == ("cpu", "meta")
    assert first.generation_config is not second.generation_config


# ---------------------------------------------------------------- sampling does not repeat itself


@pytest.fixture(scope="module")
def ways(target, drafts):
    """sample(**options) -> tokens, by every entrance."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    decoder = Decoder.from_pretrained(
        target, draft=drafts["good"], device="cpu", dtype="float32", tree=TREE, tokenizer=byte_tokenizer(alphabet)
    )
    one, generator = IDS[:1], custom_generate(drafts["good"], tree=TREE)
    common = {"max_new_tokens": 20, "do_sample": True}

    def streamed(**options):
        return [token for chunk in decoder.stream(one, **common, **options) for token in chunk.tokens]

    return {
        "generate": lambda **options: decoder.generate(one, **common, **options).tolist(),
        "long-way": lambda **options: decoder.generate(one, **common, min_length=1, **options).tolist(),
        "complete": lambda **options: decoder.complete(one, **common, **options).tokens,
        "stream": streamed,
        "custom_generate": lambda **options: target.generate(
            one, custom_generate=generator, **common, **options
        ).tolist(),
    }


@pytest.mark.parametrize("way", ["generate", "long-way", "complete", "stream", "custom_generate"])
def test_two_calls_differ_and_seeds_repeat(ways, way):
    sample = ways[way]
    torch.manual_seed(1)
    first, second = sample(), sample()
    assert first != second
    torch.manual_seed(1)
    assert [sample(), sample()] == [first, second]
    assert sample(seed=0) == sample(seed=0) != first
    assert sample(seed=None) not in (first, second)


def test_all_entrances_draw_the_same_seed(ways):
    found = []
    for way in ("generate", "long-way", "complete", "stream"):
        torch.manual_seed(2)
        found.append(np.ravel(ways[way]())[-20:].tolist())
    assert all(tokens == found[0] for tokens in found)


def test_rows_of_a_batch_differ(decoder):
    ids = IDS[:1].expand(4, -1)
    assert len(decoder.generate(ids, max_new_tokens=20, do_sample=True)[:, 5:].unique(dim=0)) == 4


def test_who_does_not_sample_leaves_the_generator_alone(decoder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    decoder.generate(IDS, MASK, 4)
    decoder.generate(IDS, MASK, 4, do_sample=True, seed=5)
    with pytest.raises(ValueError, match="n_positions"):
        decoder.generate(IDS, MASK, 10**6, do_sample=True)
    assert torch.equal(torch.get_rng_state(), before)
