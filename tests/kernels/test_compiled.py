"""Passes compiled as a whole, against transformers and against the same model run as tensor operations."""

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from helpers import left_pad, make_gpt2, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec import Decoder
from stagedspec.kernels import reference
from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.kernels.compiled import attention, build, choice, growth, product, team
from stagedspec.kernels.compiled import forward as passes
from stagedspec.kernels.compiled import model as compiled_model
from stagedspec.kernels.reference import NoiseAt
from stagedspec.kernels.state.host import Batch, prefill_batch
from stagedspec.models.gpt2 import GPT2, Cache

CPU = torch.device("cpu")
KNOWN = [
    {"activation_function": "relu"},
    {"activation_function": "gelu_new", "n_embd": 36, "n_head": 3, "n_inner": 70},
    {"activation_function": "gelu_pytorch_tanh", "n_layer": 3, "scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    {"n_embd": 6, "n_head": 2, "n_inner": 3, "vocab_size": 700},
    {"n_embd": 336, "n_head": 3, "n_inner": 130, "n_layer": 1},  # heads of 112: a wide strip and three narrow ones
]
WARPINGS = [
    None,
    {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None},
    {"temperature": 0.6, "top_k": 3, "top_p": None, "min_p": None},
    {"temperature": 1.5, "top_k": None, "top_p": None, "min_p": None},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.8, "top_k": None, "top_p": 0.7, "min_p": None},
    {"temperature": 1.2, "top_k": None, "top_p": None, "min_p": 0.2},
]
by_values = pytest.mark.parametrize("changes", KNOWN, ids=lambda changes: "-".join(map(str, changes.values())))


class Operations(TorchBackend):
    """Compiles nothing."""

    def compile_model(self, *_: object) -> None:
        return None


def model_of(dtype: torch.dtype | None = None, invariant: bool = False, **changes) -> tuple[GPT2, GPT2, object]:
    """A model with weights of some size, biases too: compiled, as operations, and of transformers. dtype: of numbers to
    which its weights are rounded."""
    model = make_gpt2(3, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
            if dtype is not None:
                parameter.copy_(parameter.to(dtype))
        if dtype == torch.bfloat16:  # what fp16 cannot hold
            model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.tensor(1e-30).to(dtype)
    ours, plain = (GPT2(model, ops, CPU, torch.float32, invariant) for ops in (TorchBackend(), Operations()))
    assert ours.compiled is not None and plain.compiled is None
    return ours, plain, model


# Compiled functions that only others of their kind call.


@numba.njit
def multiply_all(x: np.ndarray, weights: np.ndarray, bias: np.ndarray, y: np.ndarray) -> None:
    for block in range(len(weights)):
        product.multiply(x, len(x), weights, bias, y, block, np.empty((2, len(x), product.COLUMNS), np.float32))


@numba.njit
def exp_of_all(x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    for i in range(len(x)):
        y[i] = attention.exp(x[i])
    return y


@numba.njit
def kth(row: np.ndarray, k: int) -> np.float32:
    return choice.kth(row, k)


@numba.njit
def choose_token(row: np.ndarray, temperature: np.float32, k: int, noise: np.ndarray, sampled: bool) -> int:
    return choice.choose_token(row, temperature, k, noise, sampled)


@pytest.fixture(params=[1, 2, 3], ids="{}-threads".format)
def threads(request):
    """Passes by so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_trees(model: GPT2, batch: int, nodes: int, prefix: int, seed: int) -> Batch:
    """Random trees below prefixes of which each row sees another part; tree rows come first, as in `Cache`."""
    generator = torch.Generator().manual_seed(seed)
    seen = np.zeros((batch, nodes, nodes), np.bool_)
    depths = np.zeros((batch, nodes), np.int64)
    for row in range(batch):
        for node in range(nodes):
            parent = int(torch.randint(-1, node, (), generator=generator)) if node else -1
            if parent >= 0:
                seen[row, node] = seen[row, parent]
                depths[row, node] = depths[row, parent] + 1
            seen[row, node, node] = True
    tokens = torch.randint(model.vocab_size, (batch, nodes), generator=generator)
    positions = prefix + depths
    positions[0, -1] = model.positions + 5  # past the table, as a guess may lie
    prefixes = [prefix - row % (prefix + 1) for row in range(batch)]
    return Batch(np.stack((tokens.numpy(), positions)), depths, seen, prefixes, torch.float32, CPU)


@by_values
@given(batch=st.integers(1, 3), nodes=st.integers(1, 9), prefix=st.integers(0, 20), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_the_same_as_operations(changes, batch, nodes, prefix, seed):
    """Hidden states, what is left in the cache, and every node's children."""
    model, plain, _ = model_of(**changes)
    trees = random_trees(model, batch, nodes, prefix, seed)
    caches = [Cache(one, batch, nodes, prefix + 2) for one in (model, plain)]
    caches[0].rows.normal_(generator=torch.Generator().manual_seed(seed))
    caches[1].rows.copy_(caches[0].rows)
    hidden, expected = model.forward(trees, caches[0], 0), plain.forward(trees, caches[1], 0)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=3e-4)
    torch.testing.assert_close(caches[0].rows, caches[1].rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(hidden), plain.logits(hidden), rtol=1e-4, atol=3e-4)
    window = 7
    values = torch.randn(batch, window, model.vocab_size, generator=torch.Generator().manual_seed(seed + 1))
    noise = NoiseAt(values, torch.randint(window, (batch, nodes)))
    for warping, given_noise in [*((one, None) for one in WARPINGS), *((one, noise) for one in WARPINGS[1:])]:
        tokens, logprobs = model.children(trees, caches[0], 0, 0, 4, warping, given_noise)
        # One more than is compared: what is nearly as likely as the last one may take its place.
        theirs, values_of = reference.choose_children(model.logits(hidden), 5, warping, given_noise)
        apart, count = (values_of.diff(dim=-1).abs() > 1e-3).all(-1), tokens.shape[-1]
        theirs, values_of = theirs[..., :count], values_of[..., :count]
        assert tokens.shape == theirs.shape and tokens.dtype == theirs.dtype == torch.int64
        torch.testing.assert_close(logprobs, values_of, rtol=1e-3, atol=1e-3)
        assert (tokens == theirs)[apart].all()


@by_values
def test_a_text_token_by_token_as_transformers_reads_it(changes):
    model, _, theirs = model_of(**changes)
    ids = torch.randint(model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))
    cache, found = Cache(model, 2, 0, 9), []
    for start, count in ((0, 4), (4, 1), (5, 3), (8, 1)):
        chunk = prefill_batch(ids[:, start : start + count], start, model.kv_dtype)
        found.append(model.logits(model.forward(chunk, cache, start)))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- bits


@by_values
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_whatever_is_beside_it(changes, dtype, threads):
    """Alone, in chunks of any size, in a batch, with any number of threads; in fp64 it is the same within rounding."""
    model, _, theirs = model_of(dtype, invariant=True, **changes)
    kept = {None: np.float32, torch.float16: np.uint16, torch.bfloat16: np.int16}[dtype]
    assert model.compiled.weights.head.dtype == (kept if dtype != torch.float16 or product.HALVES else np.float32)
    length = 23
    ids = torch.randint(model.vocab_size, (3, length), generator=torch.Generator().manual_seed(4))
    expected = None
    for sizes in ([length], [1] * length, [2, 3, 5, 13], [7, 16], [19, 4]):
        for batch in (1, 3):
            cache, parts, start = Cache(model, batch, 4, length), [], 0
            for count in sizes:
                chunk = prefill_batch(ids[:batch, start : start + count], start, model.kv_dtype)
                parts.append(model.logits(model.forward(chunk, cache, 4 + start, 4)))
                start += count
            found = torch.cat(parts, 1)
            expected = found[:1] if expected is None else expected
            assert torch.equal(found[:1], expected), (sizes, batch)
    with torch.no_grad():
        exact = theirs.double()(ids[:1]).logits
    assert (expected - exact).abs().max() < 1e-5 * exact.abs().max()


@by_values
def test_a_path_of_a_tree_has_the_bits_of_the_text(changes, threads):
    """Nodes in the tree's rows of the cache, above which the prefix lies: as if they were committed."""
    model, _, _ = model_of(invariant=True, **changes)
    prefix, depth = 11, 4
    text = torch.randint(model.vocab_size, (1, prefix + depth), generator=torch.Generator().manual_seed(5))
    plain = Cache(model, 1, 0, prefix + depth)
    expected = model.forward(prefill_batch(text, 0, model.kv_dtype), plain, 0)[0, prefix:]
    nodes = 2 * depth  # the path lies in the odd nodes, between others
    path = list(range(1, nodes, 2))
    seen = np.eye(nodes, dtype=np.bool_)[None]
    for index, node in enumerate(path):
        seen[0, node, path[: index + 1]] = True
    tokens = torch.randint(model.vocab_size, (1, nodes), generator=torch.Generator().manual_seed(6))
    tokens[0, path] = text[0, prefix:]
    positions = torch.arange(prefix, prefix + depth).repeat_interleave(2)[None]
    cache = Cache(model, 1, nodes, prefix)
    model.forward(prefill_batch(text[:, :prefix], 0, model.kv_dtype), cache, nodes, nodes)
    inputs = np.stack((tokens.numpy(), positions.numpy()))
    batch = Batch(inputs, inputs[1], seen, [prefix], model.kv_dtype, CPU)
    found = model.forward(batch, cache, 0)[0, path]
    assert torch.equal(found, expected)


@given(
    rows=st.integers(1, 70), inputs=st.integers(1, 300), outputs=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.bfloat16] + [torch.float16] * product.HALVES), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_product(rows, inputs, outputs, dtype, seed):
    """Against fp64; the bits of a row are those of the row alone; columns beyond the last are not touched."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    weight = weight.to(dtype).float()
    packed = product.pack(weight, dtype)
    padded = np.pad(bias.numpy(), (0, packed.shape[0] * product.COLUMNS - outputs))

    def multiply(x: torch.Tensor) -> torch.Tensor:
        y = np.full((len(x) + 1, outputs), 7.0, np.float32)
        multiply_all(x.numpy(), packed, padded, y)
        assert (y[-1] == 7.0).all()
        return torch.from_numpy(y[:-1])

    y = multiply(x)
    exact = x.double() @ weight.double().T + bias.double()
    assert (y - exact).abs().max() <= 2e-6 * (x.abs().double() @ weight.abs().double().T + bias.abs()).max()
    for n in {0, rows // 2, rows - 1}:
        assert torch.equal(multiply(x[n : n + 1].contiguous()), y[n : n + 1])


def test_weights_are_kept_narrow_only_without_a_change():
    halves = torch.tensor([[1.0, 0.333984375, 65504.0, 2**-24]])
    shorts = torch.tensor([[1.0, 3.0e38, 2.0**-100]]).bfloat16().float()
    assert product.exact_dtype([halves]) == (torch.float16 if product.HALVES else torch.float32)
    assert product.exact_dtype([shorts]) == torch.bfloat16
    assert product.exact_dtype([halves, shorts]) == product.exact_dtype([torch.tensor([[0.1]])]) == torch.float32


def test_exp():
    """Within two units in the last place, and finite at both ends."""
    x = np.linspace(-87, 88, 20001).astype(np.float32)
    found = exp_of_all(x)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(found - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()
    low, least, high = exp_of_all(np.array([-1e30, -87, 1e30], np.float32))
    assert low == least and high < np.inf and np.isnan(exp_of_all(np.array([np.nan] * 40, np.float32))).all()


# ---------------------------------------------------------------- threads


def test_passes_of_several_threads_at_once(threads):
    """Of one model and of two: each gets the result that it gets alone. One pass has the team, the others do without
    it."""
    models = [model_of(invariant=True, **changes)[0] for changes in KNOWN[:2]]
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(7))

    def read(model: GPT2) -> torch.Tensor:
        cache = Cache(model, 2, 0, 16)
        return model.logits(model.forward(prefill_batch(ids, 0, model.kv_dtype), cache, 0))

    expected, wrong = [read(model) for model in models], []

    def many(index: int) -> None:
        for _ in range(100):
            if not torch.equal(read(models[index % 2]), expected[index % 2]):
                wrong.append(index)

    workers = [threading.Thread(target=many, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_helpers_keep_no_model_alive(threads):
    model, _, _ = model_of()
    model.forward(prefill_batch(torch.zeros(1, 4, dtype=torch.long), 0, model.kv_dtype), Cache(model, 1, 0, 4), 0)
    head = weakref.ref(model.compiled.weights.head)
    del model
    for _ in range(200):  # until the helpers sleep
        gc.collect()
        if head() is None:
            break
        threading.Event().wait(0.01)
    assert head() is None


@pytest.mark.slow
def test_a_fork_has_a_team_of_its_own():
    script = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from helpers import make_gpt2
from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.kernels.compiled import model
from stagedspec.kernels.state.host import prefill_batch
from stagedspec.models.gpt2 import GPT2, Cache
torch.set_num_threads(2)
ours = GPT2(make_gpt2(3), TorchBackend(), torch.device("cpu"), torch.float32)
chunk = prefill_batch(torch.arange(20)[None], 0, ours.kv_dtype)  # torch's own threads do not outlive a fork
def read():
    return ours.logits(ours.forward(chunk, Cache(ours, 1, 0, 20), 0))
expected = read()
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(read(), expected) for _ in range(20)) else 1)
print(os.waitpid(child, 0)[1], torch.equal(read(), expected))
"""
    command = [sys.executable, "-c", script.format(tests=str(Path(__file__).parents[1]))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == ["0", "True"]


def test_what_a_pass_must_fit():
    """Compiled code checks no bounds: what a pass is given is looked at before."""
    model, _, _ = model_of()
    trees, cache = random_trees(model, 2, 3, 4, 0), Cache(model, 2, 3, 5)
    noise = NoiseAt(torch.zeros(2, 5, 61), torch.zeros(2, 3, dtype=torch.long))
    for wrong in (cache.rows[1:], cache.rows[:, :1], cache.rows[..., :1, :], cache.rows[..., :1], cache.rows.double()):
        with pytest.raises(ValueError, match="expected a whole KV cache"):
            model.compiled.forward(trees, wrong.contiguous(), 3, 0, 0)
    with pytest.raises(ValueError, match="do not fit into a KV cache of 6"):
        model.compiled.forward(trees, Cache(model, 2, 3, 3).rows, 3, 0, 0)
    for changes in ({"seen": trees.seen[:, :2]}, {"prefixes": [4]}, {"seen": np.concatenate([trees.seen] * 2)}):
        with pytest.raises(ValueError, match="a pass of 3 nodes of 2 sequences has masks"):
            model.compiled.forward(dataclasses.replace(trees, **changes), cache.rows, 3, 0, 0)
    with pytest.raises(ValueError, match="begins at the rows -1 and 0"):
        model.compiled.forward(trees, cache.rows, 3, -1, 0)
    for wrong in (NoiseAt(noise.values[..., :60], noise.index), NoiseAt(noise.values, noise.index[:, :2])):
        with pytest.raises(ValueError, match="expected noise of 2 x 3 nodes and 61 tokens"):
            model.choose(trees, cache, 0, 0, WARPINGS[1], wrong)


# ---------------------------------------------------------------- whom they serve


def test_ties_and_few_tokens():
    """As many children as the draft may take tokens, each once, whatever ties."""
    model, _, _ = model_of(vocab_size=300)
    model.compiled.weights.head[:] = 0
    trees = random_trees(model, 1, 2, 3, 0)
    warping = {"temperature": 1.0, "top_k": 3, "top_p": None, "min_p": None}
    noise = NoiseAt(torch.zeros(1, 1, 300), torch.zeros(1, 2, dtype=torch.long))
    tokens, logprobs = model.children(trees, Cache(model, 1, 2, 5), 0, 0, 8, warping, noise)
    assert tokens.shape == (1, 2, 3) and all(len(set(row)) == 3 for row in tokens[0].tolist())
    assert logprobs.isfinite().all() and (logprobs <= -1e-4).all()


@given(
    rows=st.integers(1, 4), size=st.integers(1, 70), k=st.integers(1, 80), seed=st.integers(0, 10**6),
    temperature=st.sampled_from([1.0, 0.7, 3.0]), greedy=st.booleans(), broken=st.sampled_from([0.0, 0.05, 1.0]),
    top_p=st.sampled_from([None, 1.0, 0.9713, 0.6181, 0.2137, 1e-9]),
    min_p=st.sampled_from([None, 0.0371, 0.5113, 1.0]),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_the_token_of_the_reference(rows, size, k, seed, temperature, greedy, broken, top_p, min_p):
    """With ties, and with logits that are infinite or no numbers. No sum of a few equal probabilities is a top-p."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-4, 4, (1, rows, size), generator=generator) / 4
    wrong = torch.rand(logits.shape, generator=generator) < broken
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), float("-inf")])
    logits[wrong] = odd[torch.randint(4, (int(wrong.sum()),), generator=generator)]
    warping = None if greedy else {"temperature": temperature, "top_k": k, "top_p": top_p, "min_p": min_p}
    values = torch.randint(-8, 8, (1, 5, size), generator=generator) / 8
    noise = None if greedy else NoiseAt(values, torch.randint(5, (1, rows), generator=generator))
    expected = reference.choose(logits.clone(), warping, noise)
    found = []
    for row in range(rows):
        of_row = values[0, 0] if noise is None else values[0, noise.index[0, row]]
        chosen_by = np.array([temperature, 1.0 if top_p is None else top_p, min_p or 0.0], np.float32)
        arguments = logits[0, row].numpy().copy(), chosen_by, min(k, size), of_row.numpy()
        found.append(choose_token(*arguments, not greedy))
    assert found == expected[0].tolist()


@pytest.mark.parametrize("k", [1, 2, 7, 64, 299])
def test_the_kth_largest(k):
    row = torch.randn(300, generator=torch.Generator().manual_seed(k))
    row[::3] = row[0]
    assert kth(row.numpy(), k) == row.sort(descending=True).values[k - 1].item()


def test_who_is_served():
    """Targets and drafts of any size in fp32. Other activations and dtypes run as tensor operations."""

    def make(model, dtype=torch.float32, invariant=False):
        return GPT2(model, TorchBackend(), CPU, dtype, invariant).compiled

    assert make(make_gpt2(3)) is not None and make(make_gpt2(3), invariant=True) is not None
    assert make(make_gpt2(3), torch.float16) is None
    assert make(make_gpt2(3, activation_function="silu")) is None


def test_a_long_batch_is_cut_by_its_sequences(monkeypatch):
    model, _, _ = model_of(invariant=True)
    ids = torch.randint(61, (5, 8), generator=torch.Generator().manual_seed(8))

    def read() -> torch.Tensor:
        cache = Cache(model, 5, 0, 8)
        return model.logits(model.forward(prefill_batch(ids, 0, model.kv_dtype), cache, 0))

    noise = NoiseAt(torch.randn(5, 9, 61), torch.randint(9, (5, 8)))

    def chosen() -> list[torch.Tensor]:
        found, batch = [], prefill_batch(ids, 0, model.kv_dtype)
        for warping in WARPINGS:
            arguments = warping, None if warping is None else noise
            found.append(model.choose(batch, Cache(model, 5, 0, 8), 0, 0, *arguments))
            found += model.children(batch, Cache(model, 5, 0, 8), 0, 0, 3, *arguments)
        return found

    expected, tokens = read(), chosen()
    for most in (1, 8, 17):
        monkeypatch.setattr(compiled_model, "MAX_ROWS", most)
        assert torch.equal(read(), expected)
        assert all(map(torch.equal, chosen(), tokens))


def test_a_draft_of_no_numbers_still_proposes_tokens():
    """What a broken draft says is worthless, and must not lead outside of any array."""
    model, _, _ = model_of(vocab_size=300)
    for part in (*model.compiled.weights.norms, *model.compiled.weights.biases):
        part[:] = float("nan")
    for warping in WARPINGS[:2]:
        noise = None if warping is None else NoiseAt(torch.zeros(1, 1, 300), torch.zeros(1, 3, dtype=torch.long))
        trees = random_trees(model, 1, 3, 2, 0)
        tokens, _ = model.children(trees, Cache(model, 1, 3, 4), 0, 0, 4, warping, noise)
        assert ((tokens >= 0) & (tokens < 300)).all()


def test_an_install_that_cannot_be_written(monkeypatch):
    """Without a folder for what was compiled it is compiled again in every process, and works."""

    def refuse(*_):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(build, "_keep", refuse)
    monkeypatch.setattr(build, "COMPILED", [])
    assert build.entry(lambda x: x + 1)(2) == 3


def test_what_is_kept_is_of_this_code(monkeypatch, tmp_path):
    """Numba looks at the file of a function alone; what is kept is told apart by all files of the folder."""
    assert build._digest() == build.DIGEST and build.DIGEST in str(passes.run_passes._cache.cache_path)
    for path in Path(build.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    assert build._digest() == build.DIGEST
    (tmp_path / "product.py").write_text("DEPTH = 64")
    assert build._digest() != build.DIGEST


def test_numbers_that_overflow_and_divisions_by_zero():
    """Finite weights of a broken draft: scores of minus infinity, a norm without epsilon of a constant row."""
    silent, _, _ = model_of(layer_norm_epsilon=0.0)
    for table in silent.compiled.weights.tables:
        table[:] = 0.0
    loud, _, _ = model_of()
    query = loud.compiled.weights.biases[0]  # of queries, keys and values
    query[:, :24], query[:, 24:48] = 1e20, -1e20
    infinite, _, _ = model_of()
    infinite.compiled.weights.final[0][:] = float("inf")
    for model in (silent, loud, infinite):
        for warping in WARPINGS[:2]:
            noise = None if warping is None else NoiseAt(torch.zeros(1, 1, 61), torch.zeros(1, 3, dtype=torch.long))
            trees = random_trees(model, 1, 3, 2, 0)
            tokens, logprobs = model.children(trees, Cache(model, 1, 3, 4), 0, 0, 4, warping, noise)
            assert ((tokens >= 0) & (tokens < 61)).all() and not logprobs.isnan().any()


# ---------------------------------------------------------------- compiling

SCRIPT = """
import os, signal, sys, threading, torch, warnings
sys.path.insert(0, {tests!r})
from helpers import make_gpt2
from stagedspec import Decoder, TreeConfig
model, tree = make_gpt2(3), TreeConfig(nodes=4, depth=3, passes=2, width=1, children=3, prefetch=0)
{before}
def load():
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter("always")
        decoder = Decoder.from_pretrained(model, model, device="cpu", dtype="float32")
    print(*(str(warning.message) for warning in printed if "compiled" in str(warning.message)), file=sys.stderr)
    return decoder
{load}
ids = torch.tensor([[1, 2, 3]])
plain, ours = (decoder.generate(ids, max_new_tokens=12, mode=mode, tree=tree) for mode in ("autoregressive", "chain"))
print(torch.equal(plain, ours), decoder.draft.compiled is not None)
"""


def in_a_process(before: str = "", load: str = "decoder = load()", **environment: str) -> tuple[list[str], str]:
    """What SCRIPT printed to both outputs."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), before=before, load=load)
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return run.stdout.split(), run.stderr


def copy_compiled(folder: Path, without: str = "") -> list[Path]:
    """Copies what Numba has compiled for passes, but for the code of one function. Returns the copied indices."""
    assert compiled_model.ready(torch.float32)
    kept = Path(passes.run_passes._cache.cache_path).parent
    # Another process of the tests may be writing a file.
    shutil.copytree(kept, folder, ignore=shutil.ignore_patterns("*.tmp.*", f"*.{without}-*"))
    return list(folder.rglob("*.nbi"))


@pytest.mark.slow
def test_a_damaged_cache_is_left_alone(tmp_path):
    """Another one takes its place, and keeps what it lacks."""
    first, second = tmp_path / "first", tmp_path / "second"
    folders = {"NUMBA_CACHE_DIR": str(first), "before": f"os.environ['XDG_CACHE_HOME'] = {str(second)!r}"}
    indices = copy_compiled(first / build.DIGEST)
    assert in_a_process(**folders)[0] == ["True", "True"] and not second.exists()
    for index in indices:
        index.write_bytes(index.read_bytes()[:20])
    copy_compiled(second / "stagedspec" / "numba" / f"{build.DIGEST}-2", without="find_sleeping")
    printed, warned = in_a_process(**folders)
    assert printed == ["True", "True"] and "compiled" not in warned
    assert {index.name for index in second.rglob("*.nbi")} == {index.name for index in indices}
    assert all(len(index.read_bytes()) == 20 for index in indices)


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """Nothing can be kept anywhere: the draft runs as tensor operations."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    printed, warned = in_a_process(before=limit, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == ["True", "False"] and "cannot be compiled, so they are slower" in warned


@pytest.mark.slow
def test_an_interrupt_while_it_compiles(tmp_path):
    """It is acted on when that is done, and what was compiled works."""
    copy_compiled(tmp_path / build.DIGEST, without="run_passes")
    interrupted = """
from contextlib import contextmanager
from stagedspec.kernels.compiled import build
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not
announced = build.announced

@contextmanager
def begun():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with announced():
        yield
    print("compiled")

build.announced = begun
try:
    decoder = load()
except KeyboardInterrupt:
    print("interrupted")
build.announced = announced
decoder = load()
"""
    printed, _ = in_a_process(load=interrupted, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == ["compiled", "interrupted", "True", "True"]


@pytest.mark.slow
def test_without_numba():
    printed, warned = in_a_process(before="sys.modules['numba'] = None")
    assert printed == ["True", "False"] and "compiled" not in warned


def test_generations_compile_nothing(target, drafts):
    """All was compiled when the model was loaded, or trees first grew, once for all arguments."""
    decoder = Decoder.from_pretrained(target, drafts["good"], device="cpu", dtype="float32")
    functions = [passes.run_passes, team.find_sleeping]
    functions += [growth._begin, growth._extend, growth._record, growth._harvest]
    growth.try_out()
    before = [len(function.signatures) for function in functions]
    ids, mask = left_pad(random_prompts([5, 2]))
    for options in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 5, "temperature": 0.7}):
        for mode in ("chain", "staged"):
            decoder.generate(ids, mask, 12, mode=mode, **options)
    assert [len(function.signatures) for function in functions] == before


@pytest.mark.parametrize(
    "state", ["dtype(torch.float64)", "dtype(torch.bfloat16)", "dtype(torch.float16)", "device('meta')"]
)
def test_compiled_under_any_default_of_torch(state):
    """A process whose first model is loaded under another default compiles all the same."""
    script = f"""
import warnings, torch
warnings.simplefilter("error")
from stagedspec.kernels.backends import torch_backend
from stagedspec.kernels.compiled import model
torch.set_default_{state}
print(model.ready(torch.float32), bool(torch_backend._compiled_growth()), bool(torch_backend._compiled_noise()))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["True"] * 3, run.stderr


@pytest.mark.parametrize("long", [True, False])
def test_slow_compilation_is_logged(monkeypatch, long):
    """Once, while it goes on; not where compiled code is loaded at once."""
    logged, said = threading.Event(), []
    monkeypatch.setattr(build, "PATIENCE", 0.0 if long else 3600.0)
    monkeypatch.setattr(build.log, "warning", lambda message: (said.append(message), logged.set()))
    with build.announced():
        assert not long or logged.wait(60)
    assert said == ["making passes on this CPU ready: Numba compiles them once on this machine"] * long
