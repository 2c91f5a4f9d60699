"""The compiled pass of a small draft, against transformers and against the same model run as tensor operations."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import left_pad, make_gpt2, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec import Decoder
from stagedspec.kernels import compiled_draft
from stagedspec.kernels.backends.torch_backend import TorchBackend
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
]
WARPINGS = [
    None,
    {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None},
    {"temperature": 0.6, "top_k": 3, "top_p": None, "min_p": None},
    {"temperature": 1.5, "top_k": None, "top_p": None, "min_p": None},
]


def draft(**changes) -> tuple[GPT2, object]:
    """A draft with weights of some size, biases too, and the model it was made from."""
    model = make_gpt2(3, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    ours = GPT2(model, TorchBackend(), CPU, torch.float32, invariant=False)
    assert ours.compiled is not None
    return ours, model


def as_operations(model: GPT2, call):
    """call() with the same model, run as tensor operations."""
    known, model.compiled = model.compiled, None
    try:
        return call()
    finally:
        model.compiled = known


def random_trees(model: GPT2, batch: int, nodes: int, prefix: int, seed: int) -> Batch:
    """Random trees below prefixes of which each row sees another part; tree rows come first, as in `Cache`."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.full((batch, 1, nodes, nodes + prefix), float("-inf"))
    depths = [[0] * nodes for _ in range(batch)]
    for row in range(batch):
        bias[row, 0, :, nodes : nodes + prefix - row % (prefix + 1)] = 0.0
        for node in range(nodes):
            parent = int(torch.randint(-1, node, (), generator=generator)) if node else -1
            if parent >= 0:
                bias[row, 0, node, :nodes] = bias[row, 0, parent, :nodes]
                depths[row][node] = depths[row][parent] + 1
            bias[row, 0, node, node] = 0.0
    tokens = torch.randint(model.vocab_size, (batch, nodes), generator=generator)
    positions = prefix + torch.tensor(depths)
    positions[0, -1] = model.positions + 5  # past the table, as a guess may lie
    return Batch(tokens, positions, depths, bias)


@pytest.mark.parametrize("changes", KNOWN, ids=lambda changes: "-".join(map(str, changes.values())))
@given(batch=st.integers(1, 3), nodes=st.integers(1, 5), prefix=st.integers(0, 6), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_the_same_as_operations(changes, batch, nodes, prefix, seed):
    """Hidden states, what is left in the cache, and every node's children."""
    model, _ = draft(**changes)
    trees = random_trees(model, batch, nodes, prefix, seed)
    caches = [Cache(model, batch, nodes, prefix + 2) for _ in range(2)]
    caches[0].rows.normal_(generator=torch.Generator().manual_seed(seed))
    caches[1].rows.copy_(caches[0].rows)
    hidden = model.forward(trees, caches[0], 0)
    expected = as_operations(model, lambda: model.forward(trees, caches[1], 0))
    torch.testing.assert_close(hidden, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(caches[0].rows, caches[1].rows, rtol=2e-3, atol=2e-3)
    window = 7
    values = torch.randn(batch, window, model.vocab_size, generator=torch.Generator().manual_seed(seed + 1))
    noise = NoiseAt(values, torch.randint(window, (batch, nodes)))
    for warping in WARPINGS:
        given_noise = None if warping is None else noise
        tokens, logprobs = model.children(hidden, 4, warping, given_noise)
        theirs, values_of = as_operations(model, lambda w=warping, g=given_noise: model.children(hidden, 4, w, g))
        assert tokens.shape == theirs.shape and tokens.dtype == theirs.dtype == torch.int64
        torch.testing.assert_close(logprobs, values_of, rtol=1e-3, atol=1e-3)
        assert (tokens == theirs)[(logprobs[..., :-1].diff(dim=-1).abs() > 1e-3).all(-1)].all()


@pytest.mark.parametrize("changes", KNOWN, ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_text_token_by_token_as_transformers_reads_it(changes):
    model, theirs = draft(**changes)
    ids = torch.randint(model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))
    cache, found = Cache(model, 2, 0, 9), []
    for start, count in ((0, 4), (4, 1), (5, 3), (8, 1)):
        chunk = prefill_batch(ids[:, start : start + count], start, model.kv_dtype)
        found.append(model.logits(model.forward(chunk, cache, start)))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=2e-3, atol=2e-3)


def test_ties_and_few_tokens():
    """As many children as the draft may take tokens, each once, whatever ties."""
    model, _ = draft(vocab_size=300)
    model.compiled.head[0][:] = 0.0
    hidden = torch.randn(1, 2, model.config.n_embd)
    warping = {"temperature": 1.0, "top_k": 3, "top_p": None, "min_p": None}
    noise = NoiseAt(torch.zeros(1, 1, 300), torch.zeros(1, 2, dtype=torch.long))
    tokens, logprobs = model.children(hidden, 8, warping, noise)
    assert tokens.shape == (1, 2, 3) and all(len(set(row)) == 3 for row in tokens[0].tolist())
    assert logprobs.isfinite().all() and (logprobs <= -1e-4).all()


@pytest.mark.parametrize("k", [1, 2, 7, 64, 299])
def test_the_kth_largest(k):
    row = torch.randn(300, generator=torch.Generator().manual_seed(k))
    row[::3] = row[0]
    assert compiled_draft._kth(row.numpy(), k) == row.sort(descending=True).values[k - 1].item()


def test_who_is_served():
    """Targets, other activations and dtypes, large models, long passes and other warping run as tensor operations."""

    def make(model, dtype=torch.float32, invariant=False):
        return GPT2(model, TorchBackend(), CPU, dtype, invariant).compiled

    assert make(make_gpt2(3)) is not None
    assert make(make_gpt2(3), invariant=True) is None
    assert make(make_gpt2(3), torch.float16) is None
    assert make(make_gpt2(3, activation_function="silu")) is None
    assert make(make_gpt2(3, n_embd=256, n_head=4, n_layer=3)) is None
    served = make(make_gpt2(3))
    assert served.knows(16) and not served.knows(17)
    assert not served.knows(1, {"temperature": 1.0, "top_k": None, "top_p": 0.9, "min_p": None})


def test_a_draft_of_no_numbers_still_proposes_tokens():
    """What a broken draft says is worthless, and must not lead outside of any array."""
    model, _ = draft(vocab_size=300)
    for part in model.compiled.layers:
        part[:] = float("nan")
    for warping in WARPINGS[:2]:
        noise = None if warping is None else NoiseAt(torch.zeros(1, 1, 300), torch.zeros(1, 3, dtype=torch.long))
        trees = random_trees(model, 1, 3, 2, 0)
        tokens, _ = model.children(model.forward(trees, Cache(model, 1, 3, 4), 0), 4, warping, noise)
        assert ((tokens >= 0) & (tokens < 300)).all()


def test_an_install_that_cannot_be_written(monkeypatch):
    """Without a folder for what was compiled it is compiled again in every process, and works."""

    def refuse(*_, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr("numba.njit", refuse)
    assert compiled_draft.compiled(len) is len


def test_numbers_that_overflow_and_divisions_by_zero():
    """Finite weights of a broken draft: scores of minus infinity, a norm without epsilon of a constant row."""
    silent, _ = draft(layer_norm_epsilon=0.0)
    for table in silent.compiled.tables:
        table[:] = 0.0
    loud, _ = draft()
    query = loud.compiled.layers[3]  # the bias of queries, keys and values
    query[:, :24], query[:, 24:48] = 1e20, -1e20
    infinite, _ = draft()
    infinite.compiled.head[0][:, ::3] = float("inf")
    for model in (silent, loud, infinite):
        for warping in WARPINGS[:2]:
            noise = None if warping is None else NoiseAt(torch.zeros(1, 1, 61), torch.zeros(1, 3, dtype=torch.long))
            trees = random_trees(model, 1, 3, 2, 0)
            tokens, logprobs = model.children(model.forward(trees, Cache(model, 1, 3, 4), 0), 4, warping, noise)
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


@pytest.mark.slow
def test_a_damaged_cache_is_left_alone(tmp_path):
    """Another one takes its place."""
    first, second = tmp_path / "first", tmp_path / "second"
    folders = {"NUMBA_CACHE_DIR": str(first), "before": f"os.environ['XDG_CACHE_HOME'] = {str(second)!r}"}
    assert in_a_process(**folders)[0] == ["True", "True"] and not second.exists()
    indices = list(first.rglob("*.nbi"))
    for index in indices:
        index.write_bytes(index.read_bytes()[:20])
    printed, warned = in_a_process(**folders)
    assert indices and printed == ["True", "True"] and "compiled" not in warned
    assert len(list(second.rglob("*.nbi"))) == len(indices)


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """Nothing can be kept anywhere: the draft runs as tensor operations."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    printed, warned = in_a_process(before=limit, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == ["True", "False"] and "cannot be compiled, so it is slower" in warned


@pytest.mark.slow
def test_an_interrupt_while_it_compiles(tmp_path):
    """It is acted on when that is done, and what was compiled works."""
    interrupted = """
from contextlib import contextmanager
from stagedspec.kernels import compiled_draft
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not
announced = compiled_draft._announced

@contextmanager
def begun():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with announced():
        yield

compiled_draft._announced = begun
try:
    decoder = load()
except KeyboardInterrupt:
    print("interrupted")
compiled_draft._announced = announced
decoder = load()
"""
    printed, _ = in_a_process(load=interrupted, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == ["interrupted", "True", "True"]


@pytest.mark.slow
def test_without_numba():
    printed, warned = in_a_process(before="sys.modules['numba'] = None")
    assert printed == ["True", "False"] and "compiled" not in warned


def test_generations_compile_nothing(target, drafts):
    """All was compiled when the model was loaded."""
    decoder = Decoder.from_pretrained(target, drafts["good"], device="cpu", dtype="float32")
    compiled = lambda: [len(function.signatures) for function in (compiled_draft._forward, compiled_draft._children)]  # noqa: E731
    assert compiled() == [1, 1]
    ids, mask = left_pad(random_prompts([5, 2]))
    for options in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 5, "temperature": 0.7}):
        for mode in ("chain", "staged"):
            decoder.generate(ids, mask, 12, mode=mode, **options)
    assert compiled() == [1, 1]


@pytest.mark.parametrize("long", [True, False])
def test_slow_compilation_is_logged(monkeypatch, long):
    """Once, while it goes on; not where compiled code is loaded at once."""
    logged, said = threading.Event(), []
    monkeypatch.setattr(compiled_draft, "PATIENCE", 0.0 if long else 3600.0)
    monkeypatch.setattr(compiled_draft.log, "warning", lambda message: (said.append(message), logged.set()))
    with compiled_draft._announced():
        assert not long or logged.wait(60)
    assert said == ["making the draft's pass ready: Numba compiles it once on this machine"] * long
