"""The kernels' benchmarks: a case of every operation but linears and attention is right and runs. On a CPU in the
interpreter, on the smallest of shapes."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench" / "kernels"))
import harness
import models

from stagedspec.workloads import ModelShape

TINY = ModelShape(2, 32, 2, vocab=300)
TIMING = harness.Timing(10.0, 9.0, 11.0)


@pytest.mark.parametrize("op", ["head", "choose", "ngram", "grow", "verify", "compact", "embed"])
def test_cases(op, monkeypatch):
    monkeypatch.setitem(models.MODELS, "L", TINY)
    module = import_module(op)
    torch.manual_seed(1)
    choice = models.Choice(("L",), (1, 5), (40,), (2,))
    cases = list(module.cases(choice))
    assert cases
    for case in cases:
        if case.check is not None:
            assert case.check() <= 2, (case.op, case.shape)
    cases[-1].run()


@pytest.fixture
def on_a_cpu(monkeypatch):
    """What is to be timed runs once, and takes 10 µs."""
    monkeypatch.setattr(harness, "graph_of", lambda run: run())
    monkeypatch.setattr(harness, "time_graphs", lambda graphs, launches: dict.fromkeys(graphs, TIMING))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield
    torch._dynamo.reset()


def test_peers_that_compile_never_run_eager(on_a_cpu):
    """A function of all cases is compiled in each; what needs more graphs than dynamo keeps has failed."""
    sizes = range(2, 2 + 2 * torch._dynamo.config.recompile_limit)
    compiled = CompileCounter()

    def double(x):
        assert torch.compiler.is_compiling(), "ran eager"
        return x * 2

    peer = torch.compile(double, backend=compiled, dynamic=False)

    def result(*sizes):
        case = harness.Case("op", "L", {}, 0, 1, lambda: None, {"peer": lambda: [peer(torch.ones(n)) for n in sizes]})
        return harness.measure(case, 1.0).peers["peer"]

    assert [result(size) for size in sizes] == [TIMING] * len(sizes)
    assert compiled.frame_count == len(sizes)
    assert "FailOnRecompileLimitHit" in result(*sizes)


def test_table_prints_no_ratio_where_results_differ():
    def result(error, beyond=None):
        peers = {"peer": harness.Timing(20.0, 20.0, 20.0)}
        return harness.Result("op", "L", {"N": 1}, TIMING, peers, 0.0, 0.0, error, 5.0, beyond)

    right, wrong = harness.table([result(0.0), result(float("inf"))]).splitlines()[2:]
    assert "20.00 (2.00x)" in right and "5: missed" in right and "exact" in right
    assert "20.00 (differs)" in wrong
    assert "-10.0 beyond peer, met" in harness.table([result(0.0, "peer")])
