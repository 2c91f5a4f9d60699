"""Model objects that change after a decoder was made of them; what a decoder keeps of models and drafts."""

import copy
import gc
import pickle
import threading
import weakref
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from helpers import POSITIONS, VOCAB, byte_tokenizer, make_gpt2, random_prompts, slow_but
from tokenizers import pre_tokenizers

import stagedspec
from stagedspec import Decoder, TreeConfig, hf
from stagedspec.decoding.decoder_cache import KEPT_DRAFTS
from stagedspec.hf import custom_generate
from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.models.live_model import LiveModel
from stagedspec.models.loading import check_same_tokens, same_but_padding
from stagedspec.models.ngram_fit import fit_table

on_cpu = partial(Decoder.from_pretrained, device="cpu")
IDS = torch.tensor(random_prompts([5], seed=4))
NEW, TREE = 25, TreeConfig()
LAYOUT = {"ops": TorchBackend(), "device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture
def model():
    return make_gpt2(50)


@pytest.fixture(scope="module")
def draft():
    return make_gpt2(51)


def entrances(model, draft):
    """generate(ids) through both, each by what was made for the model as it is now."""
    decoder, through = on_cpu(model, draft), custom_generate(draft, tree=TREE)
    model.generate(IDS, max_new_tokens=2, custom_generate=through)
    return {
        "decoder": lambda: decoder.generate(IDS, max_new_tokens=NEW, tree=TREE),
        "plain": lambda: decoder.generate(IDS, max_new_tokens=NEW, mode="autoregressive"),
        "processed": lambda: decoder.generate(IDS, max_new_tokens=NEW, tree=TREE, repetition_penalty=1.0),
        "complete": lambda: torch.cat([IDS, torch.tensor([decoder.complete(IDS, NEW, tree=TREE).tokens])], 1),
        "custom": lambda: model.generate(IDS, max_new_tokens=NEW, custom_generate=through),
    }


def optimizer_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.zero_grad()


def all_through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.7)


def set_under_no_grad(model):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[1, 1] += 30


def replaced(model):
    model.transformer.h[1].attn.c_proj.weight = torch.nn.Parameter(torch.randn(24, 24))


def resized_positions(model):
    """More positions, as the config then says."""
    model.transformer.wpe = torch.nn.Embedding(POSITIONS + 7, 24)
    model.config.n_positions = POSITIONS + 7


NOTICED = {
    "optimizer": optimizer_step,
    "load_state_dict": lambda model: model.load_state_dict(make_gpt2(77).state_dict()),
    "no-grad": set_under_no_grad,
    "data": all_through_data,
    "data-of-embeddings": lambda model: model.transformer.wte.weight.data.mul_(-1),
    "data-of-a-norm": lambda model: model.transformer.ln_f.bias.data[2:3].add_(9),
    "data-of-a-column": lambda model: model.transformer.h[1].mlp.c_proj.weight.data[:, 3].mul_(-20),
    "replaced": replaced,
    "layer-replaced": lambda model: setattr(model.transformer, "ln_f", torch.nn.LayerNorm(24, bias=True)),
    "positions": resized_positions,
}


@pytest.mark.parametrize("way", slow_but(["no-grad", "data", "data-of-a-norm", "replaced", "positions"], NOTICED))
def test_a_call_decodes_the_weights_of_its_time(model, draft, way):
    before = model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    calls = entrances(model, draft)
    assert all(torch.equal(call(), before) for call in calls.values())
    NOTICED[way](model)
    after = model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    for name, call in calls.items():
        assert torch.equal(call(), after), name


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.transformer.wte.weight.data[3:9, 12:20].mul_(-3),
        lambda model: numpy.negative(*2 * [model.transformer.wte.weight.detach().numpy()[30:, 2:]]),
        lambda model: model.transformer.h[0].mlp.c_fc.weight.data[1:9, 30:].mul_(-2),
    ],
    ids=["embeddings", "numpy", "layer"],
)
def test_what_goes_unnoticed_changes_nothing(model, draft, change):
    """All weights are the old ones then."""
    before = model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    calls = entrances(model, draft)
    change(model)
    assert all(torch.equal(call(), before) for call in calls.values())
    hf.forget(model)
    assert torch.equal(entrances(model, draft)["custom"](), model.generate(IDS, max_new_tokens=NEW, do_sample=False))


CHANGED_TO_REFUSED = {
    "hook": (lambda model: model.lm_head.register_forward_hook(lambda *_: None), "forward hook"),
    "training": (lambda model: model.train(), r"model.eval\(\)"),
    "forward": (lambda model: setattr(model.transformer, "forward", lambda *_: None), "forward of its own"),
    "activation": (lambda model: setattr(model.transformer.h[0].mlp, "act", torch.nn.ReLU()), "ReLU in place of"),
    "epsilon": (lambda model: setattr(model.transformer.ln_f, "eps", 0.1), "eps=0.1"),
    "meta": (lambda model: model.to("meta"), "meta device"),
    "not-finite": (lambda model: model.transformer.ln_f.weight.data.fill_(torch.inf), "not finite"),
}


@pytest.mark.parametrize("way", CHANGED_TO_REFUSED)
def test_a_model_that_can_no_longer_be_decoded(model, draft, way):
    change, message = CHANGED_TO_REFUSED[way]
    calls = entrances(model, draft)
    change(model)
    for name, call in calls.items():
        with pytest.raises(ValueError, match=message):
            if way == "meta" and name == "custom":  # transformers itself would not get so far
                raise ValueError("meta device")
            call()


PARTS = {
    "column": lambda weight: weight.data[40:, :1].mul_(-5),  # neither in the first row nor on the diagonal
    "diagonal": lambda weight: weight.data[5:9, 3:12].mul_(-5),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_parts_of_a_matrix_that_are_compared(model, part):
    """They show writes that leave the version as it is."""
    decoder = on_cpu(model)
    PARTS[part](model.transformer.wte.weight)
    expected = model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(decoder.generate(IDS, max_new_tokens=NEW, mode="autoregressive"), expected)


def test_a_change_of_any_single_weight_is_followed(model):
    """Through its version, wherever it lies."""
    decoder = on_cpu(model)
    before = model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[2, 1] += 90
    after = model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(before, after)
    assert torch.equal(decoder.generate(IDS, max_new_tokens=NEW, mode="autoregressive"), after)


def test_a_change_is_read_once(model):
    decoder = on_cpu(model)
    model.load_state_dict(make_gpt2(77).state_dict())
    decoder.follow()
    read = decoder.target
    decoder.follow()
    assert decoder.target is read


def test_two_decoders_of_a_model_read_a_change_once(model, monkeypatch):
    """Calls of both, at the same time: the second one waits for the weights that the first one reads."""
    live, readers = LiveModel(model, "target", **LAYOUT), []
    second = threading.Thread(target=lambda: live.now())
    real = stagedspec.models.live_model.GPT2

    def slow(*given, **layout):
        readers.append(threading.current_thread())
        if len(readers) == 1:
            second.start()
            second.join(0.2)  # time enough to come here too, if it does not wait
        return real(*given, **layout)

    monkeypatch.setattr(stagedspec.models.live_model, "GPT2", slow)
    model.load_state_dict(make_gpt2(77).state_dict())
    live.now()
    second.join()
    assert len(readers) == 1


def test_a_running_generation_keeps_its_weights(model, draft):
    decoder = on_cpu(model, draft)
    before = decoder.complete(IDS, NEW, tree=TREE).tokens
    stream = decoder.stream(IDS, NEW, tree=TREE)
    tokens = list(next(stream).tokens)
    model.load_state_dict(make_gpt2(77).state_dict())
    after = decoder.complete(IDS, NEW, tree=TREE).tokens
    assert tokens + [token for chunk in stream for token in chunk.tokens] == before != after


def test_a_draft_that_changes(model):
    """Changes no token, and is followed."""
    draft = make_gpt2(51)
    decoder = on_cpu(model, draft)
    before, read = decoder.generate(IDS, max_new_tokens=NEW, tree=TREE), decoder.draft
    draft.load_state_dict(model.state_dict())
    assert torch.equal(decoder.generate(IDS, max_new_tokens=NEW, tree=TREE), before)
    assert decoder.draft is not read and decoder.last_stats.tokens_per_step > 2


def test_a_model_that_is_gone(draft):
    model = make_gpt2(50)
    before, decoder = model.generate(IDS, max_new_tokens=NEW, do_sample=False), on_cpu(model, draft)
    table, gone = model.transformer.wte.weight, weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with torch.no_grad():
        table.zero_()
    assert torch.equal(decoder.generate(IDS, max_new_tokens=NEW), before)


def test_lists_of_the_models_own_settings_are_followed(model):
    """Also where one is changed in place."""
    model.generation_config.suppress_tokens = [1]
    decoder = on_cpu(model)
    first = decoder.generate(IDS, max_new_tokens=NEW, mode="autoregressive")
    model.generation_config.suppress_tokens.append(int(first[0, 5]))
    expected = model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(first, expected)
    assert torch.equal(decoder.generate(IDS, max_new_tokens=NEW, mode="autoregressive"), expected)


def test_a_vocabulary_that_grows(model):
    decoder = on_cpu(model)
    model.generate(IDS, max_new_tokens=2, custom_generate=custom_generate(mode="autoregressive"))
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    with pytest.raises(
        ValueError, match=f"vocabulary has changed from {VOCAB} to {VOCAB + 3} tokens: make a new decoder"
    ):
        decoder.generate(IDS, mode="autoregressive")
    ours = model.generate(IDS, max_new_tokens=NEW, custom_generate=custom_generate(mode="autoregressive"))
    assert torch.equal(ours, model.generate(IDS, max_new_tokens=NEW, do_sample=False))


# ---------------------------------------------------------------- what is kept


def test_drafts_that_are_thrown_away_keep_nothing(model):
    model.generate(IDS, max_new_tokens=2, custom_generate=custom_generate(mode="autoregressive"))
    gone = []
    for seed in range(6):
        draft = make_gpt2(60 + seed, n_layer=1)
        model.generate(IDS, max_new_tokens=2, custom_generate=custom_generate(draft, tree=TREE))
        gone += [weakref.ref(draft), weakref.ref(hf.decoder_for(model, draft))]
        del draft
    gc.collect()
    assert [one() for one in gone] == [None] * 12


def test_few_decoders_are_kept_of_many_drafts(model):
    drafts = [make_gpt2(60 + seed, n_layer=1) for seed in range(KEPT_DRAFTS + 2)]
    decoders = [weakref.ref(hf.decoder_for(model, draft)) for draft in drafts]
    gc.collect()
    kept = [one() for one in decoders if one() is not None]
    assert len(kept) == KEPT_DRAFTS
    assert len({id(decoder.target) for decoder in kept}) == 1  # whose weights they share
    assert hf.decoder_for(model, drafts[-1]) is kept[-1]


def test_the_decoder_used_last_is_kept_longest(model):
    drafts = [make_gpt2(60 + seed, n_layer=1) for seed in range(KEPT_DRAFTS + 1)]
    decoders = [hf.decoder_for(model, draft) for draft in drafts[:KEPT_DRAFTS]]
    assert hf.decoder_for(model, drafts[0]) is decoders[0]
    hf.decoder_for(model, drafts[-1])  # takes the place of the second
    assert hf.decoder_for(model, drafts[0]) is decoders[0]
    assert hf.decoder_for(model, drafts[1]) is not decoders[1]


def test_a_table_lives_as_long_as_its_decoder(model, draft):
    """Even one that the decoder has resized for itself: another table in its place in memory is another table."""
    table = fit_table([torch.randint(VOCAB - 1, (300,))], VOCAB - 1)
    decoder, held = hf.decoder_for(model, draft, table), weakref.ref(table)
    assert decoder.ngram is not table
    del table
    gc.collect()
    assert held() is not None and hf.decoder_for(model, draft, held()) is decoder


def test_no_weight_is_shared_with_the_model(model, draft):
    """So that no change of the model can reach a decoder before it is read again."""
    decoder = on_cpu(model, draft)
    lent = {one.untyped_storage().data_ptr() for source in (model, draft) for one in source.parameters()}

    def tensors(part):
        if isinstance(part, torch.Tensor):
            return [part]
        if isinstance(part, numpy.ndarray):
            return [torch.from_numpy(part)]
        if isinstance(part, dict):
            return tensors([*part.values()])
        if isinstance(part, (list, tuple)):
            return [found for one in part for found in tensors(one)]
        return tensors(vars(part)) if type(part).__module__.startswith("stagedspec") else []

    found = [one for weights in (decoder.target, decoder.draft) for one in tensors(vars(weights)) if one.numel() > 1]
    assert len(found) > 30
    assert all(one.layout != torch.strided or one.untyped_storage().data_ptr() not in lent for one in found)


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy])
def test_copies_of_a_decoder(model, draft, way):
    decoder = on_cpu(model, draft, tree=TREE)
    other = way(decoder)
    options = {"max_new_tokens": NEW, "do_sample": True, "seed": 5}
    assert torch.equal(other.generate(IDS, **options), decoder.generate(IDS, **options))
    assert other.target is decoder.target and other.pool is not decoder.pool
    model.load_state_dict(make_gpt2(77).state_dict())
    assert torch.equal(
        other.generate(IDS, max_new_tokens=NEW), model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    )


def test_a_decoder_is_not_pickled(model):
    with pytest.raises(ValueError, match=r"cannot be pickled: make one in every process, by Decoder.from_pretrained"):
        pickle.dumps(on_cpu(model))


# ---------------------------------------------------------------- vocabularies that differ by padding


def resized(seed, size, **changes):
    model = make_gpt2(seed, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval()


@pytest.mark.parametrize(
    "sizes",
    slow_but([(64, VOCAB)], [(64, VOCAB), (128, VOCAB), (VOCAB, 64), (VOCAB + 1, VOCAB), (64, 62)]),
    ids=str,
)
@pytest.mark.parametrize("katz", [False, True], ids=["context", "katz"])
def test_padded_vocabularies(sizes, katz, draft):
    """Either side may be padded, and tokens of the padding may even come up, which nobody proposes."""
    model, draft = resized(52, sizes[0], initializer_range=0.25), resized(51, sizes[1])
    with torch.no_grad():
        model.lm_head.weight[50:] *= 3  # likelier than they would be
    table = fit_table([torch.randint(VOCAB, (2000,))], VOCAB) if katz else None
    ids = torch.tensor(random_prompts([6, 6], VOCAB, seed=3))
    ids[0, 2] = sizes[0] - 1
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert sizes[0] <= sizes[1] or (expected >= sizes[1]).any()
    decoder = on_cpu(model, draft, table)
    for mode in stagedspec.MODES:
        assert torch.equal(decoder.generate(ids, max_new_tokens=NEW, mode=mode, tree=TREE), expected), mode
        through = custom_generate(draft, table, mode=mode, tree=TREE)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, custom_generate=through), expected), mode
    options = [{}, {"top_k": 7}, {"top_p": 0.9}]
    for sampling in options:
        sampling |= {"max_new_tokens": NEW, "do_sample": True, "seed": 3, "tree": TREE}
        plain = decoder.generate(ids, mode="autoregressive", **sampling)
        assert torch.equal(decoder.generate(ids, **sampling), plain), sampling


SIZES = {
    (50257, 50304): True, (50304, 50257): True,  # rounded up to a multiple of 64 and of 128
    (61, 61): True, (61, 64): True, (61, 128): True, (61, 127): False, (61, 256): False,
    (160, 170): True, (170, 160): True, (160, 171): False,  # a sixteenth more, and one more than that
}  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_that_differ_by_padding(sizes):
    assert same_but_padding(*sizes, None) is SIZES[sizes]


def test_ids_of_a_tokenizer_lie_below_both_sizes():
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    assert same_but_padding(VOCAB, 700, byte_tokenizer(tokens))
    assert not same_but_padding(VOCAB - 1, 700, byte_tokenizer(tokens))


def test_tokens_beyond_the_smaller_vocabulary_may_differ():
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    target, draft = byte_tokenizer(tokens), byte_tokenizer([*tokens[:-1], "added"])
    check_same_tokens(target, draft, VOCAB - 1)
    with pytest.raises(
        ValueError, match=f"token {VOCAB - 1} is {tokens[-1]!r} for the target, .* draft has it as None"
    ):
        check_same_tokens(target, draft, VOCAB)


def test_the_draft_of_a_padded_target_is_as_good(draft):
    """Where the padding never comes up, nothing is lost by it."""
    model, good = make_gpt2(0), make_gpt2(0)
    padded = resized(0, 128)
    with torch.no_grad():
        padded.lm_head.weight[VOCAB:] = 0
    options = {"max_new_tokens": NEW, "tree": TREE}
    steps = []
    for target in (model, padded):
        decoder = on_cpu(target, good)
        decoder.generate(IDS, **options)
        steps.append(decoder.last_stats.steps)
    assert steps[0] == steps[1]


def test_a_tokenizer_that_fits_both_allows_more_padding():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    model, draft = resized(52, 700), make_gpt2(51)
    table = fit_table([torch.randint(VOCAB, (2000,))], VOCAB)
    with pytest.raises(ValueError, match=r"target has 700 tokens, the draft 61; use a draft .*tokenizer="):
        on_cpu(model, draft)
    with pytest.raises(ValueError, match=r"fitted for 61 tokens, the target has 700; .*tokenizer="):
        on_cpu(model, ngram=table)
    decoder = on_cpu(model, draft, table, tokenizer=byte_tokenizer(alphabet))
    expected = model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(decoder.generate(IDS, max_new_tokens=NEW, tree=TREE), expected)


@pytest.mark.parametrize("size", [64, 70, 200])
def test_tables_of_more_padding(size):
    """A table keeps what it says, whatever is padded, and after padding nothing is likely."""
    text = torch.randint(40, (3000,), generator=torch.Generator().manual_seed(1))
    table = fit_table([text], 40)
    longer = table.resized(size)
    with torch.device("meta"):  # whatever the caller's default device
        assert torch.equal(table.resized(size).tokens, longer.tokens)
    contexts = torch.tensor([[a, b] for a in (-1, 0, 3, 39) for b in range(40)])
    for ours, theirs in zip(longer.lookup(contexts), table.lookup(contexts), strict=True):
        assert torch.equal(ours, theirs)
    for first, last in contexts.tolist():
        assert longer.successors_of(first, last) == table.successors_of(first, last)
    tokens, logprobs = longer.lookup(torch.tensor([[3, size - 1], [size - 1, 40]]))
    assert (logprobs < -6e4).all() and (tokens < 40).all()
    again = longer.resized(40)
    assert torch.equal(again.tokens, table.tokens) and torch.equal(again.keys, table.keys)
    with pytest.raises(ValueError, match=r"beyond a vocabulary of 30.*fit another"):
        table.resized(30)


def test_padded_models_with_the_embedded_draft_and_table():
    assets = Path(stagedspec.__file__).parent / "assets"
    target = stagedspec.models.loading.read_checkpoint(assets / "target", "target").float()
    target.resize_token_embeddings(2048, pad_to_multiple_of=100, mean_resizing=False)
    known = assets / "draft", assets / "ngram.safetensors"
    decoder = on_cpu(target, *known, tokenizer=assets / "target")
    ids = torch.tensor([decoder.tokenizer("import os\n").input_ids])
    expected = target.generate(ids, max_new_tokens=24, do_sample=False)
    assert torch.equal(decoder.generate(ids, max_new_tokens=24, tree=TREE), expected)
    through = custom_generate(*known, tree=TREE)
    assert torch.equal(target.generate(ids, max_new_tokens=24, custom_generate=through), expected)


# ---------------------------------------------------------------- the last position


@pytest.mark.parametrize("new", [1, 2, 9])
@pytest.mark.parametrize("positions", [POSITIONS, 16], ids=["draft-as-long", "short-draft"])
def test_the_last_token_needs_no_position(model, new, positions):
    draft = make_gpt2(51, n_positions=positions)
    ids = torch.tensor(random_prompts([POSITIONS + 1 - new] * 2, seed=6))
    expected = model.generate(ids, max_new_tokens=new, do_sample=False)
    decoder = on_cpu(model, draft)
    for mode in stagedspec.MODES:
        assert torch.equal(decoder.generate(ids, max_new_tokens=new, mode=mode, tree=TREE), expected), mode
        through = custom_generate(draft, mode=mode, tree=TREE)
        assert torch.equal(model.generate(ids, max_new_tokens=new, custom_generate=through), expected), mode
    sampled = {"max_new_tokens": new, "do_sample": True, "seed": 2}
    plain = decoder.generate(ids, mode="autoregressive", **sampled)
    assert torch.equal(decoder.generate(ids, tree=TREE, **sampled), plain)
    for call in (
        lambda: decoder.generate(ids, max_new_tokens=new + 1),
        lambda: model.generate(ids, max_new_tokens=new + 1, custom_generate=custom_generate(draft)),
    ):
        with pytest.raises(ValueError, match=f"n_positions = {POSITIONS}, got .*at most {new} new tokens"):
            call()


def test_token_types_name_the_way_out(model, draft):
    """A tokenizer may return them unasked."""
    inputs = {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS), "max_new_tokens": 4}
    for call in (
        lambda: on_cpu(model, draft).generate(**inputs),
        lambda: model.generate(**inputs, custom_generate=custom_generate(draft)),
    ):
        with pytest.raises(
            ValueError, match=r"token_type_ids is not supported: leave it out .*return_token_type_ids=False"
        ):
            call()


# ---------------------------------------------------------------- through the kernels


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 9, "seed": 1}], ids=["greedy", "top-k"])
@pytest.mark.parametrize("case", ["padded-target", "padded-draft", "last-position", "changed"])
def test_the_same_through_triton(device, case, sampling):
    sizes = {"n_positions": 12, "n_embd": 16, "n_head": 1, "n_layer": 1}
    model, draft = make_gpt2(52, **sizes), make_gpt2(51, **sizes)
    if case.startswith("padded"):
        (model if case == "padded-target" else draft).resize_token_embeddings(64, mean_resizing=False)
    table = fit_table([torch.randint(VOCAB, (2000,))], VOCAB)
    tree = TreeConfig(5, 2, 2, width=2, children=3, prefetch=1)
    torch_side, triton_side = (
        Decoder.from_pretrained(model, draft, table, device=device, dtype="float32", backend=name, tree=tree)
        for name in ("torch", "triton")
    )
    if case == "changed":
        model.load_state_dict(make_gpt2(77, **sizes).state_dict())
    ids = torch.tensor(random_prompts([13 - 4], seed=6), device=device)
    ids[0, 1] = model.config.vocab_size - 1
    options = {"max_new_tokens": 4, "eos_token_id": []} | sampling
    expected = torch_side.generate(ids, mode="autoregressive", **options)
    assert torch.equal(triton_side.generate(ids, **options), expected)
