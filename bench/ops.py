"""The reference backend's operations on a CPU, at the shapes of the embedded models: `make bench`, by pytest-benchmark.

    python -m pytest bench/ops.py [-k attention] [--benchmark-autosave --benchmark-compare]

M=1 is plain decoding, M=12 a tree of the default size. Nothing is asserted of time; results are checked by the tests.
"""

import random

import pytest
import torch

from stagedspec.kernels import reference
from stagedspec.kernels.common.constants import DRAFT
from stagedspec.kernels.state import host as host_state
from stagedspec.models import embedded
from stagedspec.models.ngram import KatzTable
from stagedspec.models.shapes import SIZES
from stagedspec.planning.tree import TreeConfig
from stagedspec.tuning.workloads import SAMPLINGS, SPREAD, randn

CPU = torch.device("cpu")
CONTEXT = 256
TREE = TreeConfig()
ROWS = (1, TREE.nodes)
MODELS = ("target", "draft")


@pytest.fixture(autouse=True)
def repeatable():
    torch.manual_seed(0)
    random.seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def table() -> KatzTable:
    return KatzTable.load(embedded.NGRAM)


def linear(outputs: int, inputs: int, bias: bool = True) -> reference.Linear:
    weight = randn(outputs, inputs, device=CPU, scale=SPREAD * inputs**-0.5, dtype=torch.float32)
    return reference.pack_linear(weight, torch.randn(outputs) if bias else None, True)


def norm(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(width), torch.zeros(width)


def noise_at(batch: int, nodes: int, vocab: int) -> reference.NoiseAt:
    values = reference.gumbel_noise(torch.arange(batch), torch.zeros(batch).long(), torch.arange(nodes)[None], vocab)
    return reference.NoiseAt(values, torch.arange(nodes)[None])


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["qkv", "up"])
def test_norm_linear(benchmark, name, model, rows):
    shape = SIZES[model]
    outputs, activation = {"qkv": (3 * shape.width, "none"), "up": (shape.mlp, "gelu_new")}[name]
    x, layer = torch.randn(rows, shape.width), linear(outputs, shape.width)
    benchmark(reference.norm_linear, x, *norm(shape.width), 1e-5, layer, activation)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["projection", "down"])
def test_linear_add(benchmark, name, model, rows):
    shape = SIZES[model]
    inputs = {"projection": shape.width, "down": shape.mlp}[name]
    layer, residual = linear(shape.width, inputs), torch.randn(rows, shape.width)
    benchmark(reference.linear_add, torch.randn(rows, inputs), layer, residual)


@pytest.mark.parametrize("nodes", ROWS)
@pytest.mark.parametrize("model", MODELS)
def test_tree_attention(benchmark, model, nodes):
    shape = SIZES[model]
    dtype = reference.kv_dtype(torch.float32, CPU, model == "target")
    cache = torch.randn(1, 1, nodes + CONTEXT, 2, shape.heads, shape.head_size, dtype=dtype)
    star = host_state.Tree.root(0)
    for token in range(1, nodes):
        star.add(token, 0, -1, DRAFT)
    batch = host_state.tree_batch([star.nodes], nodes, [CONTEXT], [CONTEXT], dtype, CPU)
    (view,) = reference.layer_views(cache, nodes, batch, 0, 0)
    qkv = torch.randn(nodes, 3 * shape.width)
    benchmark(reference.tree_attention, qkv, view, batch, shape.head_size**-0.5, False)


# ---------------------------------------------------------------- token choice


@pytest.mark.parametrize("nodes", ROWS)
@pytest.mark.parametrize("sampling", ["greedy", "top-k", "top-p"])
def test_choose(benchmark, sampling, nodes):
    vocab = SIZES["target"].vocab
    noise = None if sampling == "greedy" else noise_at(1, nodes, vocab)
    benchmark(reference.choose, torch.randn(1, nodes, vocab) * SPREAD, SAMPLINGS[sampling], noise)


@pytest.mark.parametrize("nodes", ROWS)
def test_lm_head_choose(benchmark, nodes):
    shape = SIZES["target"]
    x, head = torch.randn(1, nodes, shape.width), linear(shape.vocab, shape.width, bias=False)
    benchmark(reference.lm_head_choose, x, *norm(shape.width), 1e-5, head, None, None)


@pytest.mark.parametrize("sampling", ["greedy", "top-k"])
def test_lm_head_children(benchmark, sampling):
    shape, nodes = SIZES["draft"], TREE.width + TREE.guesses
    x, head = torch.randn(1, nodes, shape.width), linear(shape.vocab, shape.width, bias=False)
    noise = None if sampling == "greedy" else noise_at(1, nodes, shape.vocab)
    arguments = x, *norm(shape.width), 1e-5, head, TREE.children, SAMPLINGS[sampling], noise
    benchmark(reference.lm_head_children, *arguments)


def test_noise(benchmark):
    """For 64 positions, which are computed ahead together."""
    seeds, streams = torch.tensor([1]), torch.tensor([0])
    benchmark(reference.gumbel_noise, seeds, streams, torch.arange(64)[None], SIZES["target"].vocab)


# ---------------------------------------------------------------- trees


def test_katz_lookup(benchmark, table):
    benchmark(table.lookup, torch.randint(table.vocab_size, (1, TREE.nodes, 2)))


def test_katz_lookup_of_one_context(benchmark, table):
    benchmark(table.successors_of, 5, 7)
