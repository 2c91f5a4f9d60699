"""Bad input gets a ValueError that says what was expected and what came, before any work; streams can be left."""

import math
import re
import warnings

import pytest
import torch
from helpers import PLACES, POSITIONS, VOCAB, byte_tokenizer, make_gpt2, random_prompts
from tokenizers import pre_tokenizers

from stagedspec import Decoder, TreeConfig
from stagedspec.models.ngram_fit import fit_table

TREE = TreeConfig()


@pytest.fixture(scope="module")
def alphabet():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def decoder(target, drafts):
    return Decoder.from_pretrained(target, draft=drafts["good"], device="cpu", dtype="float32", tree=TREE)


@pytest.fixture
def no_work(decoder, monkeypatch):
    """Errors come before any pass of a model."""

    def refuse(*_):
        pytest.fail("a model ran before the input was checked")

    for name in ("forward", "choose"):
        monkeypatch.setattr(decoder.target, name, refuse)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
ONES = torch.ones_like(IDS)

BAD_CALLS = {
    "a-list": ({"input_ids": [[1, 2]]}, r"input_ids must be a LongTensor \[batch, prompt\], got list"),
    "one-dimension": ({"input_ids": IDS[0]}, r"LongTensor \[batch, prompt\], got torch.int64 \[3\]"),
    "floats": ({"input_ids": IDS.float()}, r"LongTensor.*got torch.float32 \[2, 3\]"),
    "bools": ({"input_ids": IDS > 2}, r"LongTensor.*got torch.bool"),
    "no-data": ({"input_ids": IDS.to("meta")}, "must hold tokens, got a tensor on the meta device"),
    "empty-prompt": ({"input_ids": IDS[:, :0]}, "prompt is empty: give at least one token"),
    "empty-batch": ({"input_ids": IDS[:0]}, "1 to 16 rows, got 0; give at least one"),
    "large-batch": (
        {"input_ids": IDS[:1].expand(17, -1)},
        r"1 to 16 rows \(up to 64 in the mode 'autoregressive'\), got 17; give fewer at a time",
    ),
    "larger-batch": ({"input_ids": IDS[:1].expand(65, -1)}, "1 to 16 rows, got 65; give fewer at a time"),
    "id-too-large": ({"input_ids": torch.tensor([[1, VOCAB]])}, rf"\[0, {VOCAB}\).*got {VOCAB}"),
    "id-negative": ({"input_ids": torch.tensor([[-1, 2]])}, rf"\[0, {VOCAB}\).*got -1"),
    "mask-shape": ({"attention_mask": ONES[:, :2]}, r"shape of input_ids, \[2, 3\], got \[2, 2\]"),
    "mask-type": ({"attention_mask": [[1, 1, 1]] * 2}, r"shape of input_ids, \[2, 3\], got list"),
    "mask-values": ({"attention_mask": ONES * 2}, "only 0 and 1, got 2"),
    "mask-right": ({"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}, "padded on the left"),
    "mask-nothing": (
        {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        "prompt 1 is empty.*leave the row out",
    ),
    "no-new-tokens": ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
    "half-a-token": ({"max_new_tokens": 2.5}, "max_new_tokens.*got 2.5"),
    "true-tokens": ({"max_new_tokens": True}, "max_new_tokens.*got True"),
    "too-long": (
        {"max_new_tokens": POSITIONS - 1},
        rf"n_positions = {POSITIONS}, got 3 \+ {POSITIONS - 1}.*at most {POSITIONS - 2} new",
    ),
    "mode": ({"mode": "fast"}, "mode must be one of autoregressive, chain, tree, staged, got 'fast'"),
    "mode-none": ({"mode": None}, "mode must be one of .*, got None"),
    "tree-type": ({"tree": 5}, "tree must be a TreeConfig or None, got int"),
    "tree-dict": ({"tree": {"nodes": 5}}, "tree must be a TreeConfig or None, got dict"),
    "tree-plain-mode": ({"tree": 5, "mode": "autoregressive"}, "tree must be a TreeConfig or None, got int"),
    "temperature-nan": ({"do_sample": True, "temperature": math.nan}, "temperature must be .* above 0 .*, got nan"),
    "temperature-underflow": ({"do_sample": True, "temperature": 1e-46}, "temperature must be .*, got 1e-46"),
    "temperature-overflow": ({"do_sample": True, "temperature": 10**400}, "temperature must be .*, got 1000"),
    "temperature-zero": ({"do_sample": True, "temperature": 0.0}, "temperature must be .* above 0 .*, got 0.0"),
    "temperature-text": ({"temperature": "hot"}, "temperature must be .* above 0 .*, got 'hot'"),
    "top_k": ({"do_sample": True, "top_k": -5}, "top_k must be a whole number .*, got -5"),
    "top_p": ({"do_sample": True, "top_p": -0.1}, "top_p must be a number of at least 0 .*, got -0.1"),
    "do_sample": ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
    "min_p": ({"do_sample": True, "min_p": math.nan}, r"min_p must be in \[0, 1\] or None, got nan"),
    "seed-bool": ({"seed": True}, "seed must be an integer of 64 bits, got True"),
    "seed-length": ({"seed": [1, 2, 3]}, "one a row: expected 2, got 3"),
    "seed-float": ({"seed": 0.5}, "seed must be an integer of 64 bits, got 0.5"),
    "eos-range": ({"eos_token_id": 2**63}, f"eos_token_id must be a token id, .*, got {2**63}"),
    "eos-list": ({"eos_token_id": [1, None]}, "eos_token_id must be a token id, .*, got None"),
    "eos-bool": ({"eos_token_id": True}, "eos_token_id must be a token id, .*, got True"),
    "eos-text": ({"eos_token_id": "x"}, "eos_token_id must be a token id, .*, got 'x'"),
    "eos-float": ({"eos_token_id": 1.5}, "eos_token_id.*got 1.5"),
    "pad-text": ({"pad_token_id": "x"}, "pad_token_id.*got 'x'"),
    "pad-float": ({"pad_token_id": 1.5}, "pad_token_id.*got 1.5"),
    "pad-list": ({"pad_token_id": [3]}, r"pad_token_id must be a token id or None, got \[3\]"),
    "pad-beyond-64-bits": ({"pad_token_id": 2**63}, f"pad_token_id must be a token id or None, got {2**63}"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(decoder, case):
    options, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        decoder.generate(**({"input_ids": IDS, "max_new_tokens": 4} | options))


def test_sampling_settings_without_sampling_are_told(decoder):
    with pytest.warns(UserWarning, match="greedy decoding ignores temperature, top_k: add do_sample=True") as told:
        decoder.generate(IDS, max_new_tokens=4, temperature=0.9, top_k=3, top_p=None)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.generate(IDS, max_new_tokens=4, temperature=1.0, do_sample=False)
        decoder.generate(IDS, max_new_tokens=4, temperature=0.9, do_sample=True)


BAD_TREES = {
    "no-nodes": ({"nodes": 0}, "tree nodes must be a whole number of at least 1, got 0"),
    "many-nodes": ({"nodes": 257, "children": 400}, "at most 256, got 257"),
    "half-a-node": ({"nodes": 2.5}, "nodes.*got 2.5"),
    "true-nodes": ({"nodes": True}, "nodes.*got True"),
    "depth": ({"depth": -1}, "tree depth must be a whole number of at least 0, got -1"),
    "passes": ({"passes": -1}, "tree passes .* at least 0, got -1"),
    "width": ({"width": 0}, "tree width .* at least 1, got 0"),
    "children": ({"children": 0}, "tree children .* at least 1, got 0"),
    "prefetch": ({"prefetch": -1}, "tree prefetch .* at least 0, got -1"),
    "prefetch_width": ({"prefetch_width": 0}, "tree prefetch_width .* at least 1, got 0"),
    "context": ({"context": "no"}, "tree context must be True or False, got 'no'"),
    "no-passes": ({"passes": 0}, "a tree of 12 nodes needs at least one draft pass and a depth of 1"),
    "no-depth": ({"depth": 0}, "needs at least one draft pass and a depth of 1"),
    "too-few-proposals": ({"nodes": 40}, "propose at most 20 nodes, fewer than nodes - 1 = 39"),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_impossible_trees(case):
    options, message = BAD_TREES[case]
    with pytest.raises(ValueError, match=message):
        TreeConfig(**options)


def test_a_tree_holds_numbers_and_truths_of_python():
    tree = TreeConfig(nodes=torch.tensor(5), context=torch.tensor(False))
    assert tree == TreeConfig(nodes=5, context=False) and (type(tree.nodes), type(tree.context)) == (int, bool)


BAD_MAKING = {
    "device": ({"device": "abacus"}, "device must be .*, got 'abacus'"),
    "device-meta": ({"device": "meta"}, "a CPU or a CUDA GPU, got meta"),
    "dtype": ({"dtype": "int8"}, "dtype must be .*, got 'int8'"),
    "dtype-torch": ({"dtype": torch.float64}, "dtype must be .*, got torch.float64"),
    "backend": ({"backend": "jax"}, "backend must be one of auto, torch, triton, got 'jax'"),
    "tree": ({"tree": "big"}, "cannot read the tuning big: No such file"),
    "ngram": ({"ngram": 7}, "ngram must be a path or a KatzTable, got int"),
    "ngram-missing": ({"ngram": "/none/such.safetensors"}, "no n-gram table at /none/such.safetensors"),
    "draft": ({"draft": 7}, "draft must be a hub id, a folder or a GPT2LMHeadModel, got int"),
    "tokenizer-missing": ({"tokenizer": "/none/such"}, "tokenizer of /none/such"),
}


@pytest.mark.parametrize("case", BAD_MAKING)
def test_making_a_decoder(target, case):
    options, message = BAD_MAKING[case]
    with pytest.raises(ValueError, match=message):
        Decoder.from_pretrained(target, **({"device": "cpu"} | options))


def test_no_gpu(target, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda was asked for, but torch sees no CUDA GPU; use device='cpu'"):
        Decoder.from_pretrained(target, device="cuda")


def test_modes_that_need_a_draft(target):
    plain = Decoder.from_pretrained(target, device="cpu")
    for mode in ("chain", "tree", "staged"):
        with pytest.raises(ValueError, match=f"mode '{mode}' needs a draft model: give draft=... .*, or use"):
            plain.generate(IDS, max_new_tokens=2, mode=mode)


def test_vocabularies_of_different_sizes(target):
    with pytest.raises(ValueError, match=f"share the vocabulary: the target has {VOCAB} tokens, the draft 50"):
        Decoder.from_pretrained(target, draft=make_gpt2(0, vocab_size=50, n_layer=1), device="cpu")
    table = fit_table([torch.randint(50, (300,))], 50)
    with pytest.raises(ValueError, match=f"fitted for 50 tokens, the target has {VOCAB}"):
        Decoder.from_pretrained(target, ngram=table, device="cpu")


def test_vocabularies_of_the_same_size(tmp_path, alphabet):
    """The first token that differs is named; a damaged tokenizer is refused."""
    model = make_gpt2(0, n_layer=1, vocab_size=len(alphabet))
    swapped = list(alphabet)
    swapped[20], swapped[30] = swapped[30], swapped[20]
    for name, tokens in (("target", alphabet), ("draft", swapped)):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer(tokens).save_pretrained(tmp_path / name)
    Decoder.from_pretrained(tmp_path / "target", draft=tmp_path / "target", device="cpu")
    message = rf"share the vocabulary: token 20 is '{re.escape(alphabet[20])}' for the target, .* draft has it as 30"
    with pytest.raises(ValueError, match=message):
        Decoder.from_pretrained(tmp_path / "target", draft=tmp_path / "draft", device="cpu")
    (tmp_path / "draft" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be loaded"):
        Decoder.from_pretrained(tmp_path / "target", draft=tmp_path / "draft", device="cpu")


def test_no_embedded_models(monkeypatch, tmp_path):
    monkeypatch.setattr("stagedspec.models.embedded.TARGET", tmp_path)
    with pytest.raises(ValueError, match="no embedded models; train some with `stagedspec train`"):
        Decoder.default()


BAD_PROMPTS = {
    "number": (5, {}, "prompt must be text or a LongTensor of token ids, got int"),
    "no-tokenizer": ("def", {}, "has no tokenizer: give tokenizer=..., or a prompt of token ids"),
    "empty-tensor": (torch.zeros(0, dtype=torch.long), {}, "prompt is empty"),
    "floats": (torch.zeros(3), {}, "LongTensor"),
    "option": (torch.tensor([1]), {"top_q": 1}, "unknown option 'top_q'"),
    "lone-surrogate": ("\ud800", {}, "UTF-8"),
    "two-prompts": (IDS, {}, "one prompt|batch"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts(decoder, case):
    prompt, options, message = BAD_PROMPTS[case]
    for call in (decoder.stream, decoder.complete):
        with pytest.raises(ValueError, match=message):
            call(prompt, 4, **options)  # stream too complains at once, not at the first chunk


# ---------------------------------------------------------------- streams


def writing(place, alphabet):
    """A decoder of bytes, so that random output is full of broken and unbroken UTF-8."""
    model = make_gpt2(4, vocab_size=len(alphabet), n_positions=96)
    draft = make_gpt2(4, vocab_size=len(alphabet), n_positions=96, initializer_range=0.24)
    return place.decoder(model, draft, tokenizer=byte_tokenizer(alphabet), tree=TREE)


@pytest.fixture(scope="module")
def writer(place, alphabet):
    return writing(place, alphabet)


@pytest.fixture(scope="module")
def host_writer(alphabet):
    """Whose every step runs code of the host, for tests that step in."""
    return writing(PLACES["torch-cpu"], alphabet)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4}, {"mode": "autoregressive"}, {"mode": "chain"}])
def test_stream_and_complete_are_generate(writer, options):
    prompt = "né ½"
    ids = writer.tokenizer(prompt, return_tensors="pt").input_ids
    assert ids.shape[1] == len(prompt.encode())
    expected = writer.generate(ids, max_new_tokens=40, **options)[0, ids.shape[1] :].tolist()
    text = writer.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    chunks = list(writer.stream(prompt, 40, **options))
    assert [token for chunk in chunks for token in chunk.tokens] == expected
    assert "".join(map(str, chunks)) == text
    assert all(len(chunk.tokens) == len(chunk.origins) >= 1 for chunk in chunks)
    assert {origin for chunk in chunks for origin in chunk.origins} <= {"target", "draft", "ngram"}
    assert len(chunks) == writer.last_stats.steps
    completion = writer.complete(prompt, 40, **options)
    assert (completion.text, completion.tokens) == (text, expected) and completion.stats is writer.last_stats
    assert completion.stats.origins["target"] == completion.origins.count("target")
    as_ids = writer.complete(ids, 40, **options)
    assert as_ids.tokens == expected == writer.complete(ids[0], 40, **options).tokens


def test_split_characters_wait_for_their_rest(host_writer, monkeypatch):
    """A character's bytes come in different steps: the stream shows it once it is whole."""
    text = "añ½→𝄞 z"
    script = host_writer.tokenizer(text).input_ids

    def scripted(batch, *_):  # the model "says" the script, whatever it is asked
        at = min(scripted.step, len(script) - 1)
        scripted.step += 1
        return torch.full(batch.tokens.shape, script[at])

    scripted.step = 0
    monkeypatch.setattr(host_writer.target, "choose", scripted)
    shown = [chunk.text for chunk in host_writer.stream("x", len(script), mode="autoregressive")]
    assert len(shown) == len(script) and "".join(shown) == text
    assert shown[:3] == ["a", "", "ñ"] and not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("way", ["close", "ctrl-c", "throw", "forgotten"])
def test_leaving_a_stream_early(writer, way):
    """The decoder stays usable, and the same request gives the same output."""
    options = {"do_sample": True, "seed": 11}
    before = writer.complete("abc", 40, **options).tokens
    stream = writer.stream("abc", 40, **options)
    taken = [token for _ in range(3) for token in next(stream).tokens]
    assert before[: len(taken)] == taken
    if way == "close":
        stream.close()
    elif way == "throw":
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt)
    elif way == "ctrl-c":
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                raise KeyboardInterrupt
        del stream
    if way in ("close", "throw"):
        assert writer.last_stats.steps == 3 and writer.last_stats.new_tokens == len(taken)
    assert not torch.is_inference_mode_enabled()
    assert writer.complete("abc", 40, **options).tokens == before
    ids = torch.tensor([random_prompts([5], writer.target.vocab_size)[0]])
    assert torch.equal(writer.generate(ids, max_new_tokens=8), writer.generate(ids, max_new_tokens=8, mode="chain"))


def test_ctrl_c_inside_a_pass(host_writer, monkeypatch):
    before = host_writer.complete("abc", 20).tokens
    choose, calls = host_writer.target.choose, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return choose(*arguments)

    monkeypatch.setattr(host_writer.target, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host_writer.complete("abc", 20, mode="autoregressive")
    assert not torch.is_inference_mode_enabled()
    assert host_writer.complete("abc", 20).tokens == before


def test_two_streams_at_once(writer):
    """A decoder keeps no state between calls, so streams can take turns."""
    one, two = writer.complete("abc", 20).tokens, writer.complete("xyz!", 20).tokens
    streams = (writer.stream("abc", 20), writer.stream("xyz!", 20))
    taken = ([], [])
    running = [0, 1]
    while running:
        for which in list(running):
            chunk = next(streams[which], None)
            if chunk is None:
                running.remove(which)
            else:
                taken[which].extend(chunk.tokens)
    assert taken == (one, two)


@pytest.mark.parametrize("settings", [{"depth": 10**9}, {"passes": 10**6, "width": 10**3}], ids=["depth", "slots"])
def test_trees_beyond_reason(settings):
    with pytest.raises(ValueError, match=r"at most 256 deep .* at most 1024 draft evaluations"):
        TreeConfig(**settings)
