"""Logits of which no token can be chosen end a generation with an error, in every mode and at every entrance."""

import copy
from functools import cache

import pytest
import torch
from helpers import VOCAB, left_pad, random_prompts
from transformers import LogitsProcessor, LogitsProcessorList
from typer.testing import CliRunner

from stagedspec import Decoder
from stagedspec.cli import app
from stagedspec.hf import custom_generate
from stagedspec.kernels import reference
from stagedspec.kernels.common.constants import INVALID
from stagedspec.kernels.state.host import Sequences, Trees
from stagedspec.kernels.state.invalid_logits import raise_invalid

NAN, INF = float("nan"), float("inf")
MODES = ("autoregressive", "chain", "tree", "staged")
SAMPLINGS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.9},
    "all": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}
BROKEN = {"one NaN": [NAN], "all NaN": [NAN] * VOCAB, "many NaN": [NAN] * 30, "all -inf": [-INF] * VOCAB, "+inf": [INF]}


@pytest.fixture(autouse=True)
def unchecked_weights(monkeypatch):
    """Models of NaN weights are refused when they are read; here they stand for sound ones whose passes overflow."""
    monkeypatch.setattr("stagedspec.models.gpt2.finite", lambda tensor: True)


def broken_logits(kind: str) -> torch.Tensor:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    logits[7 : 7 + len(BROKEN[kind])] = torch.tensor(BROKEN[kind])[: VOCAB - 7]
    return logits if kind.startswith(("one", "many", "+")) else torch.tensor(BROKEN[kind])


class From(LogitsProcessor):
    """Writes `values` over the logits of one row from some length on."""

    def __init__(self, length: int, values: torch.Tensor, row: int = 0):
        self.length, self.values, self.row = length, values, row

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            scores[self.row] = self.values
        return scores


def noise_of(rows: int) -> reference.NoiseAt:
    values = torch.randn(1, rows, VOCAB, generator=torch.Generator().manual_seed(1))
    return reference.NoiseAt(values, torch.arange(rows)[None])


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_rule(sampling, kind):
    """As torch.multinomial where transformers samples; greedy takes +inf, which a processor may have set."""
    options = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None} | SAMPLINGS[sampling]
    warping = options if options.pop("do_sample", False) else None
    sound = torch.randn(VOCAB, generator=torch.Generator().manual_seed(9))
    logits = torch.stack((sound, broken_logits(kind), sound))[None]
    chosen = reference.choose(logits, warping, noise_of(3) if warping else None)[0].tolist()
    alone = reference.choose(logits[:, :1], warping, noise_of(3).at_nodes(torch.tensor([0])) if warping else None)[
        0
    ].tolist()
    assert chosen[0] == alone[0]
    if kind == "+inf" and warping is None:
        assert chosen == [sound.argmax().item(), 7, sound.argmax().item()]
        return
    assert chosen[1] == INVALID and chosen[2] >= 0
    if warping:
        with pytest.raises(RuntimeError):
            torch.multinomial(reference.warp(logits[:, 1], **warping).softmax(-1), 1)


def test_temperatures_that_overflow():
    logits = torch.full((1, 1, VOCAB), 3e38)
    warping = {"temperature": 1e-3, "top_k": None, "top_p": None, "min_p": None}
    assert reference.choose(logits, warping, noise_of(1)).tolist() == [[INVALID]]
    assert reference.choose(-logits, warping, noise_of(1)).tolist() == [[INVALID]]
    assert reference.choose(-logits, None, None).tolist() == [[0]]


@pytest.fixture(scope="module")
def broken(target):
    """Models that give NaN: everywhere, in one token's logit alone, by an overflow."""
    made = {}
    for kind in ("everywhere", "one token", "overflow"):
        model = copy.deepcopy(target)
        with torch.no_grad():
            if kind == "everywhere":
                model.transformer.ln_f.weight[0] = NAN
            elif kind == "one token":
                model.config.tie_word_embeddings = False
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
                model.lm_head.weight[3] = NAN
            else:
                model.transformer.h[1].mlp.c_fc.weight.mul_(1e38)
                model.transformer.h[1].mlp.c_proj.weight.mul_(1e38)
        made[kind] = model
    return made


@pytest.fixture(scope="module")
def decoder_of(target, broken, drafts, make_decoder):
    """Decoders of the broken models and of the "sound" one, made when a test first asks: its weights are unchecked."""
    return cache(lambda kind: make_decoder(target if kind == "sound" else broken[kind], drafts["good"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["everywhere", "one token", "overflow"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_models_that_give_nan(decoder_of, kind, sampling, mode):
    decoder = decoder_of(kind)
    ids, mask = left_pad(random_prompts([5, 3]))
    with pytest.raises(RuntimeError, match="position 5 of row 0"):
        decoder.generate(ids, mask, 8, mode=mode, **SAMPLINGS[sampling])
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        decoder.complete(ids[0], 8, mode=mode, **SAMPLINGS[sampling])


@pytest.mark.parametrize("sampling", ["greedy", "top-k"])
def test_through_transformers(broken, place, sampling):
    ids = torch.tensor(random_prompts([5]))
    options, ours = {"do_sample": False} | SAMPLINGS[sampling], custom_generate(mode="autoregressive")
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        place.generate(broken["everywhere"], ids, max_new_tokens=4, custom_generate=ours, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("sampling", ["greedy", "top-k"])
def test_processors(decoder_of, sampling, kind, mode):
    """What was chosen before is streamed first."""
    decoder = decoder_of("sound")
    prompt = random_prompts([6])[0]
    options = {"mode": mode, "seed": 3, "eos_token_id": []} | SAMPLINGS[sampling]
    expected = decoder.generate(torch.tensor([prompt]), max_new_tokens=5, **options)[0, 6:].tolist()
    processors = LogitsProcessorList([From(11, broken_logits(kind))])
    seen = []
    stream = decoder.stream(torch.tensor(prompt), 12, logits_processor=processors, **options)
    if kind == "+inf" and sampling == "greedy":
        assert [token for chunk in stream for token in chunk.tokens] == [*expected, *[7] * 7]
        return
    with pytest.raises(RuntimeError, match="position 11 of row 0"):
        for chunk in stream:
            seen += chunk.tokens
    assert seen == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_processor_that_leaves_nothing_at_one_length(decoder_of, mode):
    """It is called once a position up to there, as in plain decoding."""
    lengths = []

    def nothing_at_9(ids, scores):
        lengths.append(ids.shape[1])
        return torch.full_like(scores, NAN) if ids.shape[1] == 9 else scores

    ids, mask = left_pad(random_prompts([6, 4]))
    with pytest.raises(RuntimeError, match="position 9 of row 0"):
        decoder_of("sound").generate(
            ids, mask, 12, mode=mode, eos_token_id=[], logits_processor=LogitsProcessorList([nothing_at_9])
        )
    assert lengths == [6, 7, 8, 9]


@pytest.mark.parametrize("mode", MODES)
def test_one_row_of_a_batch(decoder_of, mode):
    decoder = decoder_of("sound")
    ids, mask = left_pad(random_prompts([4, 6, 2]))
    processors = LogitsProcessorList([From(9, torch.full((VOCAB,), -INF), row=2)])
    with pytest.raises(RuntimeError, match="position 5 of row 2"):
        decoder.generate(ids, mask, 12, mode=mode, logits_processor=processors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["eos", "length", "criterion"])
def test_rows_that_end_before_are_not_looked_at(decoder_of, how, mode):
    """Nobody chooses of their logits any more, in transformers neither: whole batches end as they would."""
    decoder = decoder_of("sound")
    ids, mask = left_pad(random_prompts([6, 6]))
    plain = decoder.generate(ids, mask, 8, eos_token_id=[])
    options = {"eos_token_id": [], "max_new_tokens": 8}
    if how == "length":
        row, options["max_new_tokens"] = 0, 3
    elif how == "eos":
        row, options["eos_token_id"] = 0, [plain[0, 8].item()]
    else:
        row = 0
        options["stopping_criteria"] = [lambda seen, scores: torch.tensor([seen.shape[1] >= 9] * 2)]
    processors = LogitsProcessorList([From(9, torch.full((VOCAB,), NAN), row)])
    output = decoder.generate(ids, mask, mode=mode, logits_processor=processors, **options)
    assert torch.equal(output[0, :9], plain[0, :9])


@pytest.mark.parametrize("mode", MODES)
def test_a_node_that_would_not_be_seen(target, drafts, mode):
    """NaN behind a node that plain decoding never runs: 0 times NaN is NaN, and the tree's other nodes have it too."""
    model = copy.deepcopy(target)
    with torch.no_grad():
        model.transformer.wpe.weight[13] = NAN
    decoder = Decoder.from_pretrained(model, drafts["good"], device="cpu", dtype="float32")
    prompt = torch.tensor(random_prompts([6]))
    plain = Decoder.from_pretrained(target, device="cpu", dtype="float32")
    for options in SAMPLINGS.values():
        expected = plain.generate(prompt, max_new_tokens=8, mode="autoregressive", **{"seed": 0} | options)
        assert torch.equal(decoder.generate(prompt, max_new_tokens=8, mode=mode, **{"seed": 0} | options), expected)
        with pytest.raises(RuntimeError, match="position 14 of row 0"):
            decoder.generate(prompt, max_new_tokens=9, mode=mode, **{"seed": 0} | options)


def test_a_draft_that_gives_nan(target, drafts, make_decoder):
    """It proposes nothing of use, and the output is the target's."""
    draft = copy.deepcopy(drafts["good"])
    with torch.no_grad():
        draft.transformer.ln_f.weight[0] = NAN
    decoder = make_decoder(target, draft)
    ids, mask = left_pad(random_prompts([5, 9]))
    for options in SAMPLINGS.values():
        expected = decoder.generate(ids, mask, 16, mode="autoregressive", **{"seed": 0} | options)
        for mode in MODES:
            assert torch.equal(decoder.generate(ids, mask, 16, mode=mode, **{"seed": 0} | options), expected)


def test_a_decoder_goes_on_after_an_error(target, drafts, make_decoder):
    decoder = make_decoder(target, drafts["good"])
    ids = torch.tensor(random_prompts([5]))
    expected = decoder.generate(ids, max_new_tokens=8)
    with pytest.raises(RuntimeError):
        decoder.generate(
            ids, max_new_tokens=8, logits_processor=LogitsProcessorList([From(7, torch.full((VOCAB,), NAN))])
        )
    assert torch.equal(decoder.generate(ids, max_new_tokens=8), expected)


def test_a_row_that_is_stopped_before_the_error():
    sequences = Sequences([[1, 2], [3, 4]], 5, [], torch.device("cpu"))
    Trees.roots(sequences).verify_commit(torch.tensor([[INVALID], [9]]))
    assert sequences.finished
    with pytest.raises(RuntimeError, match="position 2 of row 0"):
        sequences.check()
    sequences.stop(0, 2)
    sequences.check()
    assert not sequences.finished


def test_the_command_says_it_in_a_line(monkeypatch):
    def fail(*arguments, **options):
        raise_invalid({0: 4})

    monkeypatch.setattr("stagedspec.Decoder.default", fail)
    result = CliRunner().invoke(app, ["generate", "import os"])
    assert result.exit_code == 2 and "no token can be chosen" in result.stderr and "Traceback" not in result.stderr
