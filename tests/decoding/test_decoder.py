"""Whole generations: greedy against transformers `generate`, sampled against plain decoding, and what they report."""

import gc
import json
import weakref
from contextlib import contextmanager, nullcontext
from itertools import cycle, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CONFIGS,
    POSITIONS,
    VOCAB,
    check_cache,
    left_pad,
    make_draft,
    make_gpt2,
    oracle_gaps,
    oracle_generate,
    random_prompts,
)
from transformers import GPT2LMHeadModel

import stagedspec
from stagedspec import Decoder, TreeConfig
from stagedspec.decoding.request import StagedOptions, validate
from stagedspec.decoding.stats import Clock, Stats
from stagedspec.devices import current_device, resolve_device
from stagedspec.kernels.backends import torch_backend
from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.kernels.compiled import growth as compiled_growth
from stagedspec.kernels.state import host_growth
from stagedspec.models.ngram_fit import fit_table

TREES = {
    "tiny": TreeConfig(nodes=2, depth=1, passes=1, width=1, children=1, prefetch=1, prefetch_width=1),
    "chain-of-one": TreeConfig(nodes=2, depth=1, passes=1, width=1, children=4, prefetch=0),
    "default": TreeConfig(),
    "wide": TreeConfig(nodes=33, depth=4, passes=3, width=6, children=8, prefetch=2, prefetch_width=3),
    "deep": TreeConfig(nodes=9, depth=8, passes=3, width=1, children=3, prefetch=3, prefetch_width=2),
    "more-passes-than-depth": TreeConfig(nodes=5, depth=2, passes=5, width=2, children=3, prefetch=1),
}
SAMPLINGS = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}
DRAFTS = ("good", "random", "adversarial", "target")


@pytest.fixture(scope="module")
def table(target):
    """A Katz table fitted on what the target itself says, so that it is often right."""
    ids, mask = left_pad(random_prompts([2] * 8, seed=3))
    return fit_table([oracle_generate(target, ids, mask, 40)], VOCAB)


@pytest.fixture(scope="module")
def decoders(target, drafts, table, make_decoder):
    known = {(kind, False): make_decoder(target, draft) for kind, draft in drafts.items()}
    return known | {(kind, True): make_decoder(target, draft, table) for kind, draft in drafts.items()}


# ---------------------------------------------------------------- greedy, against transformers


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(name, make_decoder):
    """Every mode on every kind of GPT-2, ragged prompts, one of a single token."""
    target = make_gpt2(7, **CONFIGS[name])
    decoder = make_decoder(target, make_draft("good", target))
    ids, mask = left_pad(random_prompts([1, 9, 4], target.config.vocab_size))
    expected = oracle_generate(target, ids, mask, 14)
    assert len(expected[:, 9:].unique()) > 4  # else this test could not see much
    for mode in stagedspec.MODES:
        ours = decoder.generate(ids, mask, 14, mode=mode, tree=TREES["default"])
        assert torch.equal(ours, expected), mode


@pytest.mark.parametrize("katz", [False, True], ids=["context", "katz"])
@pytest.mark.parametrize("kind", DRAFTS)
def test_greedy_with_any_draft_and_tree(decoders, target, kind, katz):
    ids, mask = left_pad(random_prompts([5, 2], seed=4))
    expected = oracle_generate(target, ids, mask, 16)
    decoder = decoders[kind, katz]
    for name, tree in TREES.items():
        for mode in ("staged",) if katz else ("chain", "tree", "staged"):
            assert torch.equal(decoder.generate(ids, mask, 16, mode=mode, tree=tree), expected), (name, mode)
    if kind == "target":
        assert decoder.last_stats.tokens_per_step > 2  # and it must have come true, not only been harmless


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_greedy_in_batches_up_to_n_positions(decoders, target, batch):
    """prompt + new == n_positions exactly, in the longest row."""
    lengths = [30] + [1 + (7 * row) % 29 for row in range(1, batch)]
    ids, mask = left_pad(random_prompts(lengths, seed=batch))
    expected = oracle_generate(target, ids, mask, POSITIONS - 30)
    for mode in ("autoregressive", "staged"):
        ours = decoders["good", True].generate(ids, mask, POSITIONS - 30, mode=mode, tree=TREES["default"])
        assert torch.equal(ours, expected), mode


def test_longest_prompt(decoders, target):
    ids, mask = left_pad(random_prompts([POSITIONS - 1]))
    expected = oracle_generate(target, ids, mask, 1)
    for mode in stagedspec.MODES:
        assert torch.equal(decoders["good", False].generate(ids, mask, 1, mode=mode, tree=TREES["wide"]), expected)


@pytest.mark.parametrize("mode", stagedspec.MODES)
def test_rows_stop_on_their_own(decoders, target, mode):
    """End-of-sequence ids that really come up: in different rows at different steps, one as the very first token."""
    ids, mask = left_pad(random_prompts([3, 8, 1, 5], seed=6))
    free = oracle_generate(target, ids, mask, 20)[:, 8:]
    cases = ([int(free[0, 0])], [int(free[1, 5]), int(free[2, 9])], int(free[3, 3]), [int(row[4]) for row in free])
    stops = set()
    for eos in cases:
        for pad in (None, 60):
            expected = oracle_generate(target, ids, mask, 20, eos_token_id=eos, pad_token_id=pad)
            ours = decoders["good", True].generate(
                ids, mask, 20, mode=mode, eos_token_id=eos, pad_token_id=pad, tree=TREES["default"]
            )
            assert torch.equal(ours, expected), (eos, pad)
            stops.add(expected.shape[1])
    assert len(stops) > 1  # some generations ended early
    kept = decoders["good", True].generate(ids, mask, 20, mode=mode, eos_token_id=[], tree=TREES["default"])
    assert torch.equal(kept[:, 8:], free)


def test_the_models_own_end_of_sequence(target, make_decoder):
    ids, mask = left_pad(random_prompts([4, 4], seed=8))
    eos = int(oracle_generate(target, ids, mask, 8)[0, -1])
    model = make_gpt2(0, eos_token_id=eos)
    expected = oracle_generate(model, ids, mask, 20, pad_token_id=eos)
    assert torch.equal(make_decoder(model).generate(ids, mask, 20, mode="autoregressive"), expected)


def test_what_a_decoder_shows_of_itself(target, drafts):
    decoder = stagedspec.Decoder.from_pretrained(target, drafts["good"], device="cpu", backend="torch")
    assert repr(decoder) == "Decoder(target 0.0M, draft 0.0M; float32 on cpu, backend torch)"


@pytest.mark.parametrize("beyond", [61, 62, 10**9, -1])
def test_ends_of_sequence_beyond_the_vocabulary_are_dropped(make_decoder, beyond):
    """They can never come up; the kernels' tables of ends have no place for them."""
    model = make_gpt2(0)
    model.generation_config.eos_token_id = [3, beyond]
    decoder = make_decoder(model)
    assert decoder.eos_token_ids == (3,)
    ids = torch.tensor([[3, 5, 7]])
    model.generation_config.eos_token_id = 3
    expected = oracle_generate(model, ids, None, 20, pad_token_id=3)
    assert torch.equal(decoder.generate(ids, max_new_tokens=20, mode="autoregressive"), expected)


def test_drafts_of_fewer_positions(target, make_decoder):
    """A draft may have fewer positions than the target; beyond them it only guesses worse."""
    draft = make_gpt2(0, n_positions=8)
    ids, mask = left_pad(random_prompts([20, 3], seed=8))
    ours = make_decoder(target, draft).generate(ids, mask, 20, tree=TREES["default"])
    assert torch.equal(ours, oracle_generate(target, ids, mask, 20))


def test_the_cost_model_chooses_a_tree(target, drafts, make_decoder):
    ids, mask = left_pad(random_prompts([6]))
    decoder = make_decoder(target, drafts["good"])
    expected = oracle_generate(target, ids, mask, 10)
    for mode in stagedspec.MODES:
        assert torch.equal(decoder.generate(ids, max_new_tokens=10, mode=mode), expected)
    assert decoder.last_stats.tree["nodes"] > 1


# ---------------------------------------------------------------- the embedded models


@pytest.mark.slow
def test_embedded_target_on_held_out_prompts(place):
    """At least 100 held-out prompts, 24 new tokens each, identical to transformers. On a GPU, whose sums have another
    order, 32 of them, where no choice is closer than 2e-4 of the largest logit (fp32 rounds by up to 8e-5 there), and
    identical to plain decoding everywhere.

    Batches of 16 and of 4; every mode; trees as given and as chosen.
    """
    root = Path(__file__).resolve().parents[2]
    target = root / "stagedspec" / "assets" / "target"
    prompts_file = root / "bench" / "prompts.jsonl"
    if not (target / "config.json").is_file():
        pytest.fail(
            f"the embedded target is missing: no {target.relative_to(root)}/config.json; run `stagedspec train`"
        )
    if not prompts_file.is_file():
        pytest.fail("the held-out prompts are missing: no bench/prompts.jsonl; run bench/make_prompts.py")
    decoder = Decoder.default(device=place.device, backend=place.backend, dtype="float32")
    model = GPT2LMHeadModel.from_pretrained(target, dtype=torch.float32).eval()
    texts = [json.loads(line)["prompt"] for line in prompts_file.read_text().splitlines() if line.strip()]
    new, most = 24, model.config.n_positions - 24
    prompts = [decoder.tokenizer(text, add_special_tokens=False).input_ids[-min(most, 200) :] for text in texts[:128]]
    assert len(prompts) >= 100
    prompts = prompts if place.device == "cpu" else prompts[::4]
    prompts.sort(key=len)
    eos = model.generation_config.eos_token_id or model.config.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos or 0
    tree = TreeConfig(nodes=8, depth=6, passes=2, width=1, children=4, prefetch=2, prefetch_width=2)
    fours = cycle([("autoregressive", None), ("chain", tree), ("tree", tree), ("staged", tree), ("staged", None)])
    accepted = 0.0
    for start in range(0, len(prompts), 16):
        ids, mask = left_pad(prompts[start : start + 16])
        expected, gaps = oracle_gaps(model, ids, mask, new, pad_token_id=pad)
        ours = decoder.generate(ids, mask, new, pad_token_id=pad, tree=tree)
        accepted += decoder.last_stats.tokens_per_step * 16 / len(prompts)
        certain = gaps > (2e-4 if place.backend == "triton" else -1)
        assert torch.equal(ours[certain], expected[certain]), f"prompts {start} to {start + 16} by length"
        if not certain.all():
            assert certain.sum() >= 8
            assert torch.equal(ours, decoder.generate(ids, mask, new, pad_token_id=pad, mode="autoregressive"))
        for rows, (mode, shape) in zip(torch.arange(len(ids)).split(4), fours, strict=False):
            four = decoder.generate(ids[rows], mask[rows], new, pad_token_id=pad, mode=mode, tree=shape)
            assert torch.equal(four, ours[rows]), f"prompts {start + int(rows[0])} and on by length, {mode}"
    assert accepted > 1.3
    assert (decoder.draft.compiled is not None) == (place.device == "cpu")


# ---------------------------------------------------------------- sampled, seed for seed


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_models_as_tensor_operations_decode_alike(target, drafts, monkeypatch, sampling):
    """Where passes cannot be compiled."""
    monkeypatch.setattr(TorchBackend, "compile_model", lambda *_: None)
    decoder = stagedspec.Decoder.from_pretrained(target, drafts["good"], device="cpu", dtype="float32")
    assert decoder.target.compiled is None and decoder.target.kv_dtype == torch.float64
    ids, mask = left_pad(random_prompts([4, 1, 7], seed=9))
    options = {"do_sample": True, "seed": 3, **SAMPLINGS[sampling]}
    for more in ({}, options):
        expected = decoder.generate(ids, mask, 12, mode="autoregressive", **more)
        for mode in ("chain", "tree", "staged"):
            for tree in (TREES["default"], TREES["wide"], None):
                assert torch.equal(decoder.generate(ids, mask, 12, mode=mode, tree=tree, **more), expected)


@pytest.mark.parametrize("kind", DRAFTS)
def test_every_draft_samples_alike(decoders, kind):
    ids, mask = left_pad(random_prompts([4, 1], seed=9))
    for index, (name, sampling) in enumerate(SAMPLINGS.items()):
        options = {"do_sample": True, "seed": 17 * index, **sampling}
        expected = decoders["target", False].generate(ids, mask, 12, mode="autoregressive", **options)
        for katz, mode, tree in (
            (False, "chain", "default"),
            (False, "tree", "wide"),
            (False, "staged", "deep"),
            (True, "staged", "default"),
        ):
            ours = decoders[kind, katz].generate(ids, mask, 12, mode=mode, tree=TREES[tree], **options)
            assert torch.equal(ours, expected), (name, mode, tree)


@pytest.mark.parametrize("tree", TREES)
def test_every_tree_samples_alike(decoders, tree):
    ids, mask = left_pad(random_prompts([3, 6, 2], seed=10))
    options = {"do_sample": True, "seed": -3, "top_k": 30, "temperature": 1.2}
    decoder = decoders["good", True]
    expected = decoder.generate(ids, mask, 30, mode="autoregressive", **options)
    for mode in ("chain", "tree", "staged"):
        assert torch.equal(decoder.generate(ids, mask, 30, mode=mode, tree=TREES[tree], **options), expected), mode


@pytest.mark.parametrize("mode", ["autoregressive", "staged"])
def test_rows_and_streams(decoders, mode):
    """A row's tokens depend on its seed and stream, not on the batch."""
    prompts = random_prompts([4, 9, 1], seed=11)
    ids, mask = left_pad(prompts)
    decoder, options = decoders["good", False], {"mode": mode, "do_sample": True, "tree": TREES["default"]}

    def new(prompt_ids, prompt_mask, seed):
        return decoder.generate(prompt_ids, prompt_mask, 10, seed=seed, **options)[:, prompt_ids.shape[1] :]

    one_seed = new(ids, mask, 5)
    seed_a_row = new(ids, mask, [5, 6, 5])
    assert torch.equal(one_seed[0], new(*left_pad(prompts[:1]), 5)[0])  # row 0 is stream 0
    for row, seed in enumerate([5, 6, 5]):
        assert torch.equal(seed_a_row[row], new(*left_pad(prompts[row : row + 1]), seed)[0])
    same, same_mask = left_pad([prompts[0]] * 3)
    streams = new(same, same_mask, 5)
    assert len({tuple(row.tolist()) for row in streams}) == 3  # streams differ
    again, again_mask = left_pad([prompts[2], prompts[0], prompts[1], prompts[0]])
    assert torch.equal(new(again, again_mask, 5)[1], streams[1])  # row 1 is stream 1 whatever is beside it
    repeated = new(same, same_mask, torch.tensor([5, 5, 5]))
    assert torch.equal(repeated, streams[:1].expand(3, -1))


def test_seeds_of_64_bits(decoders):
    ids, _ = left_pad(random_prompts([3], seed=12))
    seen = set()
    for seed in (0, 1, -1, 2**32, -(2**63), 2**63 - 1):
        for_seed = [
            decoders["good", False].generate(
                ids, max_new_tokens=10, do_sample=True, seed=seed, mode=mode, tree=TREES["default"]
            )
            for mode in ("autoregressive", "tree")
        ]
        assert torch.equal(*for_seed)
        seen.add(tuple(for_seed[0][0].tolist()))
    assert len(seen) == 6
    unsigned = decoders["good", False].generate(
        ids, max_new_tokens=10, do_sample=True, seed=2**64 - 1, mode="autoregressive"
    )
    signed = decoders["good", False].generate(ids, max_new_tokens=10, do_sample=True, seed=-1, mode="autoregressive")
    assert torch.equal(unsigned, signed)


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_equals_its_own_plain_decoding(target, drafts, dtype, make_decoder):
    decoder = make_decoder(target, drafts["good"], dtype=dtype)
    assert decoder.target.dtype == getattr(torch, dtype)
    ids, mask = left_pad(random_prompts([6, 3, 1, 10], seed=13))
    for options in ({}, {"do_sample": True, "seed": 2, "top_k": 40}):
        expected = decoder.generate(ids, mask, 38, mode="autoregressive", **options)
        for mode, tree in (("chain", "default"), ("tree", "wide"), ("staged", "default"), ("staged", "wide")):
            assert torch.equal(decoder.generate(ids, mask, 38, mode=mode, tree=TREES[tree], **options), expected), mode


def test_heads_of_64_alone_and_in_a_batch(make_decoder):
    """Which have attention of their own on Hopper: there the passes of each mode, alone and in a batch, have other
    tiles. Prompts shorter than its window, longer, and of several blocks of keys."""
    target = make_gpt2(4, n_embd=256, n_head=4, n_layer=1, n_positions=640, initializer_range=0.1)
    decoder = make_decoder(target, make_draft("good", target), dtype="bfloat16")
    prompts = random_prompts([1, 20, 33, 70, 289, 600] * 2 + [31, 32, 300, 5], seed=3)
    tree = TreeConfig(nodes=40, depth=5, passes=2, width=4, children=8, prefetch=1)
    options = {"max_new_tokens": 12, "seed": list(range(16)), "do_sample": True, "top_k": 20, "eos_token_id": []}
    ids, mask = left_pad(prompts)
    plain = decoder.generate(ids, mask, mode="autoregressive", **options)
    for mode in ("chain", "staged"):
        assert torch.equal(decoder.generate(ids, mask, mode=mode, tree=tree, **options), plain), mode
    assert decoder.last_stats.tokens_per_step > 1.2
    for row in (0, 5, 13):
        alone = options | {"seed": [row]}
        found = decoder.generate(torch.tensor([prompts[row]]), mode="autoregressive", **alone)
        assert torch.equal(found[0, -12:], plain[row, -12:]), row


# ---------------------------------------------------------------- the caches


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("katz", [False, True])
@pytest.mark.parametrize("kind", ["good", "adversarial"])
def test_committed_cache_is_that_of_a_fresh_prefill(decoders, place, target, drafts, kind, katz, batch):
    """After every step, by the keys and values that transformers computes for the same tokens. A good draft's walks end
    at leaves that it has not read, an adversarial one's at the root, which it has."""
    ids, mask = left_pad(random_prompts([5, 1, 8][:batch], seed=14))
    decoder = decoders[kind, katz]
    sampling = stagedspec.Sampling(do_sample=True, temperature=0.7)
    options = StagedOptions("staged", 3, TREES["default"])
    run = decoder._start(validate(decoder.context, options, ids, mask, max_new_tokens=20, sampling=sampling))
    jumps, missed = 0, set()
    for _ in run.steps():
        jumps = max(count for row in run.sequences.accepted for count in row) > 1
        for index, row in enumerate(run.sequences.rows):
            if not row.running:
                continue
            unread = 1 if place.backend == "torch" and row.caught_up else 2
            missed.add(unread)
            caches = zip((target, drafts[kind]), run.engine.caches, (1, unread), strict=True)
            for model, cache, missing in caches:
                known = len(row.tokens) - missing
                if known < 1:
                    continue
                check_cache(model, row.tokens[:known], cache, index)
    assert jumps > 0 if kind == "good" else place.backend == "triton" or 1 in missed


@pytest.mark.parametrize("kind", ["good", "adversarial"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
def test_a_draft_that_has_caught_up_grows_the_same_trees(target, drafts, table, monkeypatch, compiled, kind):
    """Without the catch-up token, where the draft has read it, as with it: on the host, where a pass has any shape."""
    if not compiled:
        monkeypatch.setattr(torch_backend, "_compiled_growth", lambda: None)
    growth = compiled_growth.Growth if compiled else host_growth.Growth
    ids, mask = left_pad(random_prompts([5, 1, 8], seed=14))
    decoder = Decoder.from_pretrained(target, draft=drafts[kind], ngram=table, device="cpu", dtype="float32")
    left_out = []
    begin = growth.begin

    def told(self):
        begin(self)
        left_out.append(self.start)

    def always(self):
        for row in self.sequences.rows:
            row.caught_up = False
        begin(self)

    found = []
    for patched in (told, always):
        monkeypatch.setattr(growth, "begin", patched)
        decoder.generate(ids, mask, 25, tree=TREES["default"], do_sample=True, seed=4, eos_token_id=[])
        stats = decoder.last_stats
        found.append((stats.steps, stats.draft_passes, stats.accepted_per_depth, stats.origins))
    assert found[0] == found[1]
    assert set(left_out) == ({0, 1} if kind == "adversarial" else {0})


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("mode", stagedspec.MODES)
@pytest.mark.parametrize("batch", [1, 4])
def test_statistics_add_up(decoders, place, mode, batch):
    ids, mask = left_pad(random_prompts([5, 2, 7, 1][:batch], seed=15))
    decoder, tree = decoders["good", True], TREES["default"].for_mode(mode)
    new = decoder.generate(ids, mask, 24, mode=mode, tree=TREES["default"])[:, ids.shape[1] :]
    stats = decoder.last_stats
    assert stats.mode == mode and stats.new_tokens == new.numel() == sum(stats.origins.values())
    assert stats.target_passes == stats.steps and stats.draft_passes == stats.steps * tree.passes
    assert stats.tokens_per_step == pytest.approx(stats.new_tokens / stats.row_steps)
    assert stats.steps <= stats.row_steps <= stats.steps * batch
    depths = stats.accepted_per_depth
    assert len(depths) == tree.depth and depths == sorted(depths, reverse=True)
    # A row's step gives what it accepted and a bonus token, unless the row ended on an accepted token.
    assert 0 <= stats.row_steps + sum(depths) - stats.new_tokens <= batch
    accepted = stats.origins["draft"] + stats.origins["ngram"]
    assert accepted == sum(depths) and stats.origins["target"] == stats.new_tokens - accepted
    assert (accepted == 0) == (mode == "autoregressive")
    if mode != "staged":
        assert stats.origins["ngram"] == 0
    if mode == "autoregressive":
        assert stats.weight_bytes_per_token == 1.0 and stats.tokens_per_step == 1.0 and stats.steps == 24
    elif batch == 1:
        passes = stats.target_passes + stats.draft_passes * stats.draft_bytes / stats.target_bytes
        assert stats.weight_bytes_per_token == pytest.approx(passes / stats.new_tokens)
    assert stats.overhead is None if place.backend == "triton" else 0 <= stats.overhead <= 1
    assert stats.tokens_per_second > 0
    assert sum(stats.seconds.values()) <= stats.total_seconds * 1.01
    read = json.loads(json.dumps(stats.as_dict()))
    assert read["new_tokens"] == stats.new_tokens and read["weight_bytes_per_token"] == stats.weight_bytes_per_token


def test_figures_of_a_generation():
    """Of four steps of three rows, by hand: a step reads 120 bytes of weights for 2.5 tokens of a row, where plain
    decoding reads 100 for each; of five seconds after the prefill four are the models'."""
    stats = Stats(
        "staged", steps=4, row_steps=10, new_tokens=25, target_passes=4, draft_passes=8, target_bytes=100,
        draft_bytes=10, seconds={"prefill": 1.0, "target": 3.0, "draft": 1.0, "grow": 0.5}, total_seconds=6.0,
    )  # fmt: skip
    assert stats.tokens_per_step == 2.5 and stats.tokens_per_second == pytest.approx(25 / 6)
    assert stats.weight_bytes_per_token == pytest.approx(1.2 / 2.5)
    assert stats.overhead == pytest.approx(1 / 5)


def test_a_clock_adds_up(monkeypatch):
    """All times of a phase, and only of those asked for."""
    now, clock = [0.0], Clock(("draft",))
    monkeypatch.setattr("stagedspec.decoding.stats.time", SimpleNamespace(perf_counter=lambda: now[0]))
    for phase, seconds in (("draft", 1.0), ("target", 3.0), ("draft", 4.0)):
        with clock(phase):
            now[0] += seconds
    assert clock.seconds == {"draft": 1.0 + 4.0}


def test_the_first_token_is_timed_from_the_beginning_of_the_call(decoders):
    """Also what came before the generation, such as measuring."""
    decoder = decoders["good", False]
    call = decoder._read(torch.tensor([[5, 6, 7]]), None, 2, StagedOptions("autoregressive", 0), {})
    run = decoder._start(call.request, began=call.began - 1000.0)
    for _ in run.steps():
        pass
    assert run.stats().seconds_to_first_token > 1000.0 > run.stats().total_seconds


def test_steps_in_vain_do_not_count(decoders):
    """A host that learns late that all rows have stopped has launched a step more than was used."""
    decoder = decoders["good", False]
    call = decoder._read(torch.tensor([[5, 6, 7]]), None, 6, StagedOptions("staged", 0, TREES["default"]), {})
    run = decoder._start(call.request)
    for _ in run.steps():
        pass
    stats = run.stats()
    run.passes.append(3)
    assert run.stats().draft_passes == stats.draft_passes == stats.steps * TREES["default"].passes


@pytest.mark.parametrize("inner", [None, 37])
def test_weight_bytes_against_the_model(inner, make_decoder):
    """What a pass multiplies by: every Linear of the blocks and the head."""
    target = make_gpt2(0, n_inner=inner)
    weights = [p for name, p in target.transformer.h.named_parameters() if p.dim() == 2 and name.endswith("weight")]
    expected = 4 * (sum(p.numel() for p in weights) + target.lm_head.weight.numel())
    assert make_decoder(target).target.weight_bytes == expected


def test_a_perfect_draft_is_always_accepted(decoders, target):
    ids, mask = left_pad(random_prompts([4], seed=16))
    tree = TreeConfig(nodes=5, depth=4, passes=4, width=1, children=1, prefetch=0)
    decoders["target", False].generate(ids, mask, 25, mode="chain", tree=tree)
    stats = decoders["target", False].last_stats
    assert stats.steps == 5 and stats.accepted_per_depth == [5, 5, 5, 5]
    assert stats.origins == {"target": 5, "draft": 20, "ngram": 0}


def test_rows_are_filled_with_the_models_own_padding(target, make_decoder):
    """Without pad_token_id, as transformers: the generation config's, not the end-of-sequence token."""
    ids, mask = left_pad(random_prompts([3, 5, 4], seed=23))
    free = oracle_generate(target, ids, mask, 12, pad_token_id=1)
    eos = int(free[0, ids.shape[1] + 3])
    saved = target.generation_config.pad_token_id
    target.generation_config.pad_token_id = 2
    try:
        expected = oracle_generate(target, ids, mask, 12, eos_token_id=eos)
        ours = make_decoder(target, target).generate(ids, mask, 12, eos_token_id=eos)
    finally:
        target.generation_config.pad_token_id = saved
    assert torch.equal(ours, expected)
    assert 2 in ours[0, ids.shape[1] :].tolist()


def test_sampling_with_trees_drafted_deeper_than_their_nodes_allow(target, make_decoder):
    """The draft may look deeper than nodes - 1; the noise block is only as long as a path can be."""
    decoder = make_decoder(target, make_draft("good", target))
    tree = TreeConfig(nodes=2, depth=8, passes=3, width=1, children=4, prefetch=3, prefetch_width=1)
    ids = torch.tensor([random_prompts([2], seed=29)[0]])
    options = {"do_sample": True, "seed": 0, "eos_token_id": [], "max_new_tokens": POSITIONS - 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "stagedspec.kernels.reference.Noise.MEMORY", 1
        )  # the shortest block there can be: every step at its end
        staged = decoder.generate(ids, tree=tree, **options)
    assert torch.equal(staged, decoder.generate(ids, mode="autoregressive", **options))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_trees_of_more_children_than_the_draft_has_tokens(device, backend):
    """A draft proposes all of its tokens then; the kernels refuse to look for more."""
    model = make_gpt2(52, n_positions=12, n_embd=16, n_head=1, n_layer=1)
    tree = TreeConfig(nodes=2, depth=1, passes=1, width=1, children=VOCAB + 5, prefetch=0)
    decoder = Decoder.from_pretrained(model, model, device=device, dtype="float32", backend=backend, tree=tree)
    ids = torch.tensor([[1, 2]], device=device)
    expected = oracle_generate(model, ids.cpu(), None, 1)
    assert torch.equal(decoder.generate(ids, max_new_tokens=1).cpu(), expected)


# ---------------------------------------------------------------- GPUs


def test_a_gpu_without_an_index_is_the_current_one(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("auto", "cuda", torch.device("cuda")):
        assert resolve_device(name) == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)


def test_a_decoders_device_is_current_while_it_works(target, drafts, monkeypatch, tmp_path):
    """Where kernels are launched: in every pass, measured ones included, and not in the code of a stream's reader."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where pass times would be remembered from other tests
    devices = []

    @contextmanager
    def recorded(device):
        devices.append(device)
        yield
        devices.pop()

    decoder = Decoder.from_pretrained(target, draft=drafts["good"], device="cpu", dtype="float32")
    for module in ("planning.planner", "decoding.generation"):
        monkeypatch.setattr(f"stagedspec.{module}.current_device", recorded)
    passes = []
    for model, name in product((decoder.target, decoder.draft), ("forward", "choose", "children")):
        run = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *a, run=run: (passes.append(list(devices)), run(*a))[1])
    stream = decoder.stream(torch.tensor([1, 2, 3]), 6, logits_processor=[lambda ids, scores: scores])
    measured = len(passes)
    assert measured and all(devices == [] for _ in stream)
    assert len(passes) > measured and all(seen == [torch.device("cpu")] for seen in passes)


def test_a_gpu_is_made_current(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    with current_device(torch.device("cuda", 1)), current_device(torch.device("cpu")):
        assert asked == [torch.device("cuda", 1)]


@pytest.mark.parametrize("mode", ["autoregressive", "staged"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=str)
def test_memory_is_freed_without_collecting_garbage(make_decoder, target, drafts, mode, options):
    """Keys and values go with the last reference to a generation: in a cycle they would wait for Python's collector."""
    decoder = make_decoder(target, drafts["good"])
    call = decoder._read(torch.tensor([[5, 6, 7]]), None, 4, StagedOptions(mode, 0), dict(options))
    gc.collect()
    gc.disable()
    try:
        run = decoder._start(call.request, call.callbacks)
        for _ in run.steps():
            pass
        held = [weakref.ref(cache) for cache in run.engine.caches]
        del run
        assert [cache() for cache in held] == [None] * len(held)
    finally:
        gc.enable()
