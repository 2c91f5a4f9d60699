"""The n-gram against a slow dictionary version written from the published formulas."""

import math
import struct
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stagedspec.models import ngram
from stagedspec.models.ngram import KatzTable
from stagedspec.models.ngram_fit import KatzModel, NgramCounts, _discounts, fit_from_text, fit_table

K = 5


# The oracle


def oracle_discounts(counts):
    """Count -> discount, with Good-Turing counts up to K, or absolute discounts where those are unusable."""
    n = Counter(counts.values())
    try:
        common = (K + 1) * n[K + 1] / n[1]
        good = {r: ((r + 1) * n[r + 1] / n[r] / r - common) / (1 - common) for r in range(1, K + 1)}
        usable = common < 1 and all(0 < d < 1 for d in good.values())
    except ZeroDivisionError:
        usable = False
    if not usable:
        d = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
        good = {r: (r - d) / r for r in range(1, K + 1)}
    return lambda r: good.get(r, 1.0)


class Oracle:
    """P(c | context) for contexts of zero, one or two tokens, by recursion on dictionaries."""

    def __init__(self, texts, vocab_size):
        self.vocab_size = vocab_size
        self.grams = [Counter(), Counter(), Counter()]
        for text in texts:
            for order, grams in enumerate(self.grams):
                grams.update(tuple(text[i : i + order + 1]) for i in range(len(text) - order))
        self.discounts = [oracle_discounts(grams) for grams in self.grams]

    def distribution(self, context):
        v, order = self.vocab_size, len(context)
        lower = self.distribution(context[1:]) if order else [1 / v] * v
        seen = {gram[-1]: n for gram, n in self.grams[order].items() if gram[:-1] == context}
        if not seen:
            return lower
        total = sum(seen.values())
        if all(self.discounts[order](n) == 1 for n in seen.values()):
            total += 1
        probs = {c: self.discounts[order](n) * n / total for c, n in seen.items()}
        if len(seen) == v:
            return [probs[c] / math.fsum(probs.values()) for c in range(v)]
        alpha = (1 - math.fsum(probs.values())) / math.fsum(p for c, p in enumerate(lower) if c not in seen)
        return [probs.get(c, alpha * lower[c]) for c in range(v)]


@st.composite
def corpora(draw):
    """A vocabulary size and a text; small alphabets repeat enough for every kind of discount."""
    size = draw(st.integers(1, 6))
    text = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=60))
    return size, text * draw(st.integers(1, 3))


def zipf(length, vocab_size, seed=0):
    """A text whose tokens are Zipf-distributed and partly follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    text = torch.multinomial(weights, length, replacement=True, generator=generator)
    follow = torch.rand(length, generator=generator) < 0.5
    return torch.where(follow, (text.roll(1) * 7 + text % 3) % vocab_size, text)


def contexts_of(size):
    return [(a, b) for a in range(-1, size) for b in range(size)]


def check_table(table, model, contexts):
    """Every row is the top r of the model's full distribution."""
    tokens, logprobs = table.lookup(torch.tensor(contexts))
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    for context, row, values in zip(contexts, tokens, logprobs, strict=True):
        expected = model.distribution(*context).sort(descending=True, stable=True)
        assert row.tolist() == expected.indices[: len(row)].tolist(), context
        torch.testing.assert_close(values.double(), expected.values[: len(row)].log(), rtol=1e-3, atol=1e-6)


# The model

DEGENERATE = {
    "constant": (3, [1] * 40),
    "constant-one-token-vocabulary": (1, [0] * 9),
    "all-distinct": (50, list(range(50))),
    "one-token": (3, [2]),
    "two-tokens": (2, [1, 0]),
    "three-tokens": (3, [0, 1, 2]),
    "alternating": (2, [0, 1] * 20),
    "every-pair": (3, [a for i in range(3) for j in range(3) for a in (i, j)] * 9),
}


@given(corpora())
@settings(max_examples=40, deadline=None)
def test_matches_formula_and_sums_to_one(corpus):
    check_model(*corpus)


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_corpora(name):
    check_model(*DEGENERATE[name])


def check_model(size, text):
    model = KatzModel.fit(torch.tensor(text), size)
    oracle = Oracle([text], size)
    contexts = contexts_of(size)[:60]
    for a, b in contexts:
        probs = model.distribution(a, b)
        assert probs.dtype == torch.float64 and probs.shape == (size,)
        assert (probs > 0).all()
        assert probs.sum().item() == pytest.approx(1, abs=1e-9)
        assert probs.tolist() == pytest.approx(oracle.distribution((b,) if a < 0 else (a, b)), rel=1e-6, abs=1e-12)
    check_table(model.compile(successors=4), model, contexts)


def test_good_turing_discounts_are_used_where_they_are_sound():
    counts = torch.tensor(
        [r for r, n in ((1, 1200), (2, 400), (3, 200), (4, 120), (5, 80), (6, 55), (7, 9)) for _ in range(n)]
    )
    discounts = _discounts(counts, K)
    common = 6 * 55 / 1200
    assert discounts[1].item() == pytest.approx((2 * 400 / 1200 - common) / (1 - common))
    assert discounts[5].item() == pytest.approx((6 * 55 / 80 / 5 - common) / (1 - common))
    assert discounts[6] == 1
    # What they free is what Good-Turing gives to the n-grams never seen.
    freed = (counts * (1 - discounts[counts.clamp(max=K + 1)])).sum().item()
    assert freed == pytest.approx(1200)


def test_larger_corpus_matches_formula():
    text = zipf(6000, 40)
    model = KatzModel.fit(text, 40)
    oracle = Oracle([text.tolist()], 40)
    n = [Counter(grams.values()) for grams in oracle.grams]
    assert oracle.discounts[1](1) == 1 - n[1][1] / (n[1][1] + 2 * n[1][2])  # bigrams: absolute
    assert oracle.discounts[2](1) != 1 - n[2][1] / (n[2][1] + 2 * n[2][2])  # trigrams: Good-Turing
    for context in ((0, 0), (39, 38), (int(text[5]), int(text[6])), (-1, 3)):
        probs = model.distribution(*context)
        assert probs.tolist() == pytest.approx(oracle.distribution(tuple(t for t in context if t >= 0)), rel=1e-9)


def test_every_token_is_possible_after_a_context_counted_often():
    model = KatzModel.fit(torch.tensor([0, 1] * 1000), 5)
    probs = model.distribution(0, 1)
    assert probs[0] > 0.99 and (probs > 0).all()


# Counting


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_shards_add_up(texts):
    counts = NgramCounts(5)
    for text in texts:
        counts.add(torch.tensor(text, dtype=torch.int64))
    oracle = Oracle(texts, 5)
    assert counts.num_tokens == sum(map(len, texts))
    assert counts.unigrams.tolist() == [oracle.grams[0][(c,)] for c in range(5)]
    for (keys, seen), grams in ((counts.bigrams(), oracle.grams[1]), (counts.trigrams(), oracle.grams[2])):
        packed = {sum(t * 5**i for i, t in enumerate(reversed(gram))): n for gram, n in grams.items()}
        assert keys.tolist() == sorted(packed)
        assert seen.tolist() == [packed[key] for key in sorted(packed)]


def test_rows_are_separate_texts_and_parts_equal_one_shot():
    rows = zipf(600, 20).reshape(30, 20)
    whole, parts = NgramCounts(20), NgramCounts(20)
    whole.add(rows)
    for row in rows[:17]:
        parts.add(row.int())
    parts.add(rows[17:])
    assert_same(KatzModel.from_counts(whole).compile(), KatzModel.from_counts(parts).compile())
    assert_same(KatzModel.from_counts(whole).compile(), fit_table(rows, 20))


def test_separator_ends_a_text():
    counts = NgramCounts(10, separator=9)
    counts.add(torch.tensor([1, 2, 9, 3, 4]))
    assert counts.trigrams()[0].tolist() == [129, 934]  # not 293
    assert counts.bigrams()[0].tolist() == [12, 29, 34, 93]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([0, 5]), "from 0 to 4, got 0 to 5"),
        (torch.tensor([-1, 2]), "from 0 to 4, got -1 to 2"),
        (torch.tensor([0.5]), "integers"),
        (torch.tensor([True]), "integers"),
        (torch.tensor(3), "shape"),
        ([1, 2], "tensor"),
        (torch.empty(0, dtype=torch.int64), "no tokens"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        KatzModel.fit(tokens, 5)


def test_bad_settings():
    text = torch.tensor([0, 1, 2])
    model = KatzModel.fit(text, 3)
    for call, message in (
        (lambda: NgramCounts(0), "vocab_size"),
        (lambda: NgramCounts(2**21), "vocab_size"),
        (lambda: NgramCounts(4, separator=4), "separator"),
        (lambda: NgramCounts(4, separator=True), "separator"),
        (lambda: NgramCounts(4.0), "vocab_size"),
        (lambda: KatzModel.fit(text, 3, discount_limit=0), "discount_limit"),
        (lambda: model.compile(successors=0), "successors"),
        (lambda: model.compile(max_contexts=-1), "max_contexts"),
        (lambda: model.distribution(0, 3), "context"),
        (lambda: model.distribution(-2, 0), "context"),
        (lambda: model.distribution(0, True), "context"),
        (lambda: fit_table([], 3), "no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_numbers_of_numpy():
    """Keys of this vocabulary do not fit into 32 bits."""
    text, size = torch.tensor([70000, 69999, 70000, 69999, 1]), 70001
    own = KatzModel.fit(text, np.int32(size), np.int64(5), np.int32(1))
    model = KatzModel.fit(text, size, 5, 1)
    assert torch.equal(own.distribution(np.int32(70000), np.int32(69999)), model.distribution(70000, 69999))
    one, other = own.compile(np.int64(3), np.int64(2)), model.compile(3, 2)
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.keys, other.keys)


# The table


def assert_same(one, two):
    assert (one.vocab_size, one.fitted_tokens) == (two.vocab_size, two.fitted_tokens)
    for name in ("keys", "slots", "rows", "tokens", "logprobs"):
        a, b = getattr(one, name), getattr(two, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.fixture(scope="module")
def model():
    return KatzModel.fit(zipf(4000, 30), 30)


@pytest.fixture(scope="module")
def table(model):
    return model.compile(successors=6, max_contexts=100)


@pytest.mark.parametrize("successors", [1, 3, 8, 29, 30, 99])
def test_rows_are_the_top_of_the_distribution(model, successors):
    table = model.compile(successors, max_contexts=10_000)
    assert table.successors == min(successors, 30)
    check_table(table, model, contexts_of(30)[::7])


def test_most_frequent_contexts_are_kept(model, table):
    followed = Counter()
    text = zipf(4000, 30).tolist()
    for a, b in pairwise(text[:-1]):
        followed[a * 30 + b] += 1
    kept = sorted(followed, key=lambda key: (-followed[key], key))[:100]
    assert table.keys.tolist() == [*sorted(kept), ngram.END]
    check_table(table, model, [(key // 30, key % 30) for key in kept])
    tokens, _ = table.lookup(torch.tensor([(a, 4) for a in range(-1, 30) if a * 30 + 4 not in kept]))
    assert (tokens == table.tokens[4]).all()


def test_no_contexts(model):
    table = model.compile(successors=5, max_contexts=0)
    assert len(table.keys) == 1 and (table.slots == -1).all()
    check_table(table, model, [(-1, b) for b in range(30)])
    assert torch.equal(table.lookup(torch.tensor([7, 3]))[0], table.lookup(torch.tensor([-1, 3]))[0])


def test_lookup_equals_dictionary_and_hash(table):
    """For every context: a dictionary, and the hash table walked one slot at a time in Python's own integers."""
    rows = {key: 30 + i for i, key in enumerate(table.keys[:-1].tolist())}
    slots, slot_rows = table.slots.tolist(), table.rows.tolist()
    assert len(slots) & (len(slots) - 1) == 0

    def walk(a, b):
        key = a * 30 + b
        first = ((key * 0x9E3779B97F4A7C15) % 2**64 >> 32) & (len(slots) - 1)
        for probe in range(ngram.PROBES):
            slot = (first + probe) % len(slots)
            if slots[slot] == key:
                return slot_rows[slot]
            if slots[slot] == -1:
                break
        return b

    contexts = contexts_of(30)
    expected = [rows.get(a * 30 + b, b) if a >= 0 else b for a, b in contexts]
    assert [walk(a, b) for a, b in contexts] == expected
    tokens, logprobs = table.lookup(torch.tensor(contexts).reshape(31, 30, 2))
    assert tokens.shape == logprobs.shape == (31, 30, 6)
    assert torch.equal(tokens.reshape(-1, 6), table.tokens[expected].long())
    assert torch.equal(logprobs.reshape(-1, 6), table.logprobs[expected])


def test_hash_of_many_keys():
    keys = torch.randint(0, 50257**2, (50_000,), generator=torch.Generator().manual_seed(0)).unique()
    slots, held = ngram._hash_keys(keys)
    at = (slots >= 0).nonzero().squeeze(1)
    assert torch.equal(slots[at].sort().values, keys) and torch.equal(keys[held[at]], slots[at])
    assert (((at - ngram.hash_slot(slots[at], len(slots))) % len(slots)) < ngram.PROBES).all()


def test_keys_that_hash_alike_are_refused():
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    keys = torch.tensor([(low * inverse + 2**63) % 2**64 - 2**63 for low in range(ngram.PROBES + 1)])
    with pytest.raises(ValueError, match="hash alike"):
        ngram._hash_keys(keys)


def test_large_vocabulary():
    text = zipf(3000, 50257)
    text[:40] = 50256
    model = KatzModel.fit(text, 50257)
    table = model.compile(successors=8, max_contexts=500)
    assert table.tokens.shape == (50257 + 500, 8) and table.logprobs.isfinite().all()
    assert 50257 * 50256 + 50256 in table.keys
    pairs = [divmod(key, 50257) for key in table.keys[:-1:97].tolist()]
    check_table(table, model, [*pairs, (-1, 50256), (50256, 50256), (-1, 0), (-1, 49999)])


# Files


def test_round_trip(table, tmp_path):
    path = tmp_path / "new" / "table.safetensors"
    table.save(path)
    loaded = KatzTable.load(path, vocab_size=30)
    assert_same(loaded, table)
    loaded.save(path)
    assert_same(KatzTable.load(str(path)), table)
    assert [file.name for file in path.parent.iterdir()] == ["table.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644  # for all to read, whatever safetensors makes of it
    assert_same(table.to("cpu"), table)


@pytest.mark.parametrize(("size", "dtype"), [(65_536, torch.uint16), (65_537, torch.int32), (70_000, torch.int32)])
def test_round_trip_of_vocabularies_around_16_bits(tmp_path, size, dtype):
    table = fit_table([torch.tensor([0, size - 1, 0, size - 1])], size, successors=2)
    table.save(tmp_path / "table")
    assert load_file(tmp_path / "table")["tokens"].dtype == dtype
    assert_same(KatzTable.load(tmp_path / "table"), table)


@pytest.mark.parametrize("size", [27, 64])
def test_other_rows_of_padding(tmp_path, size):
    """The same successors of what it knows, of the rest nothing likely; it can be saved."""
    tokens = zipf(4000, 25)
    table = fit_table([tokens], 30, successors=6, max_contexts=40)
    other = table.resized(size)
    contexts = torch.cat([tokens.unfold(0, 2, 1).unique(dim=0), torch.tensor([[-1, 3]])])
    for ours, expected in zip(other.lookup(contexts), table.lookup(contexts), strict=True):
        assert torch.equal(ours, expected)
    if size > 30:
        assert (other.lookup(torch.tensor([40, 50]))[1] < -1e4).all()
    other.save(tmp_path / "table")
    assert_same(KatzTable.load(tmp_path / "table", vocab_size=size), other)


@pytest.mark.parametrize("pair", [(4, 9), (9, 4)])
def test_a_table_of_more_tokens_is_not_cut(pair):
    """Neither the first token of a context nor its second may lie beyond the vocabulary."""
    tokens, logprobs = torch.arange(2).expand(10 + 1, 2), torch.full((11, 2), -1.0).half()
    table = KatzTable.build(10, torch.tensor([pair[0] * 10 + pair[1]]), tokens, logprobs, 1)
    with pytest.raises(ValueError, match="knows contexts beyond a vocabulary of 9 tokens"):
        table.resized(9)
    with pytest.raises(ValueError, match="proposes tokens beyond a vocabulary of 1"):
        KatzTable.build(10, torch.tensor([], dtype=torch.int64), tokens[:10], logprobs[:10], 1).resized(1)


def test_file_is_compact(tmp_path):
    tokens = torch.arange(4).expand(4096 + 32768, 4)
    logprobs = torch.full(tokens.shape, -1.0).half()
    KatzTable.build(4096, torch.arange(32768) * 500, tokens, logprobs, 1).save(tmp_path / "table")
    assert (tmp_path / "table").stat().st_size < 1_000_000


def metadata_with(**changes):
    metadata = {"format": "stagedspec.katz", "version": "1", "order": "3", "vocab_size": "30", "successors": "6"}
    return {**metadata, "fitted_tokens": "4000", **changes}


def edited(name, index, value):
    def edit(tensors):
        tensors[name][index] = value

    return edit


def replaced(name, function):
    def edit(tensors):
        tensors[name] = function(tensors[name]).contiguous()

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("keys"), "'keys' is missing"),
        (lambda tensors: tensors.pop("tokens"), "'tokens' is missing"),
        (lambda tensors: tensors.pop("logprobs"), "'logprobs' is missing"),
        (replaced("keys", lambda t: t.int()), "keys should be torch.int64"),
        (replaced("keys", lambda t: t[None]), "keys should be"),
        (replaced("keys", lambda t: t[:-1]), "tokens should be"),
        (replaced("tokens", lambda t: t.long()), "tokens should be torch.uint16"),
        (replaced("tokens", lambda t: t[:-1]), "tokens should be"),
        (replaced("tokens", lambda t: t[:, :-1]), "tokens should be"),
        (replaced("logprobs", lambda t: t.float()), "logprobs should be torch.float16"),
        (replaced("logprobs", lambda t: t[:-1]), "logprobs should be"),
        (edited("tokens", (3, 2), 30), "ids from 0 to 29"),
        (replaced("tokens", lambda t: t[:, [0, 0, 2, 3, 4, 5]]), "twice"),
        (edited("keys", 0, -1), "keys should be ascending"),
        (edited("keys", -1, 900), "keys should be ascending"),
        (replaced("keys", lambda t: t.flip(0)), "keys should be ascending"),
        (replaced("keys", lambda t: torch.cat([t[:1], t[:-1]])), "without repeats"),
        (edited("logprobs", (1, 1), math.nan), "finite"),
        (edited("logprobs", (1, 5), -math.inf), "finite"),
        (edited("logprobs", (1, 0), 0.5), "at most 0"),
        (edited("logprobs", (1, 5), 0.0), "descend"),
        (edited("logprobs", (1, 1), 0.0), "descend"),
    ],
)
def test_damaged_tensors(table, tmp_path, edit, message):
    table.save(tmp_path / "table")
    tensors = load_file(tmp_path / "table")
    edit(tensors)
    save_file(tensors, tmp_path / "table", metadata=metadata_with())
    with pytest.raises(ValueError, match=message) as caught:
        KatzTable.load(tmp_path / "table")
    assert str(tmp_path / "table") in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not an n-gram table"),
        (metadata_with(format="pt"), "not an n-gram table"),
        (metadata_with(version="2"), "version '2'"),
        (metadata_with(order="4"), "order 4"),
        (metadata_with(vocab_size="many"), "whole number"),
        (metadata_with(vocab_size="0"), "vocabulary 0"),
        (metadata_with(vocab_size=str(10**12)), "vocabulary 1000000000000"),
        (metadata_with(vocab_size="31"), "tokens should be"),
        (metadata_with(successors="31"), "successors 31"),
        (metadata_with(successors="5"), "tokens should be"),
        (metadata_with(fitted_tokens="0"), "tokens 0"),
        ({key: value for key, value in metadata_with().items() if key != "successors"}, "successors"),
    ],
)
def test_foreign_or_damaged_metadata(table, tmp_path, metadata, message):
    table.save(tmp_path / "table")
    save_file(load_file(tmp_path / "table"), tmp_path / "table", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        KatzTable.load(tmp_path / "table")


def test_files_that_are_not_safetensors(table, tmp_path):
    with pytest.raises(ValueError, match="no n-gram table at"):
        KatzTable.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="no n-gram table at"):
        KatzTable.load(tmp_path)
    path = tmp_path / "table"
    table.save(path)
    whole = path.read_bytes()
    broken = [b"", b"text", b"\x80\x04pickle", whole[:6], whole[:100], whole[:-1], whole + b"\0", bytes(500)]
    for content in [*broken, struct.pack("<Q", 2**62) + whole[8:]]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            KatzTable.load(path)


def test_other_vocabulary(table, tmp_path):
    table.save(tmp_path / "table")
    with pytest.raises(ValueError, match="vocabulary of 30 tokens, but the model's has 50257"):
        KatzTable.load(tmp_path / "table", vocab_size=50257)


# Text


class Letters:
    """The least that transformers' tokenizers do: a token a character."""

    def __len__(self):
        return 128

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(c) for c in text]}


def test_fit_from_text(tmp_path):
    (tmp_path / "a.py").write_text("import os\nimport re\n" * 5, encoding="utf-8")
    (tmp_path / "b.py").write_text("", encoding="utf-8")
    done = []
    paths = [tmp_path / "a.py", str(tmp_path / "b.py")]
    table = fit_from_text(paths, Letters(), progress=lambda *at: done.append(at))
    assert done == [(1, 2), (2, 2)]
    assert (table.vocab_size, table.fitted_tokens) == (128, 100)
    assert chr(table.lookup(torch.tensor([ord("m"), ord("p")]))[0][0]) == "o"
    assert fit_from_text(paths, Letters(), vocab_size=200, successors=3).tokens.shape[1] == 3


def test_fit_from_text_with_a_transformers_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    text = "for i in range(10):\n    print(i)\n" * 50
    backend.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    table = fit_from_text([tmp_path / "a.py"], tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert table.vocab_size == len(tokenizer) and table.fitted_tokens == len(ids)
    assert table.lookup(torch.tensor(ids[10:12]))[0][0] == ids[12]


def test_bad_text_files(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "other.py").write_text("é", encoding="utf-8")
    for paths, message in (
        ([tmp_path / "latin.py"], "latin.py is not UTF-8"),
        ([tmp_path / "absent.py", tmp_path / "latin.py"], "absent.py"),
        ([tmp_path], "no such text file"),
        ([], "no text files"),
        ([tmp_path / "empty.py"], "no tokens"),
        ([tmp_path / "other.py"], "from 0 to 127"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_from_text(paths, Letters())
