"""The kernels' benchmarks: a case of every operation is right and runs, on a CPU in the interpreter on the smallest of
shapes; and what is measured, in which order, until when."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import slow_but
from torch._dynamo.testing import CompileCounter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "kernels"))
import harness
import models
import run
import tables

from stagedspec.models.shapes import ModelShape

TINY = ModelShape(2, 32, 2, vocab=300)
TIMING = harness.Timing(10.0, 9.0, 11.0)


@pytest.mark.parametrize("op", slow_but(set(run.OPS) - {"choose", "head", "grow", "attention", "linears"}, run.OPS))
def test_cases(op, monkeypatch):
    monkeypatch.setitem(models.MODELS, "L", TINY)
    module = import_module(op)
    for place in (harness, module):  # launches of a replay
        monkeypatch.setattr(place, "SMALL", 2, raising=False)
    torch.manual_seed(1)
    choice = models.Choice(("L",), (1, 5), (40,), (2,))
    cases = list(module.cases(choice))
    assert cases
    for case in cases:
        if case.check is not None:
            assert case.check() <= 2, (case.op, case.shape)
    cases[-1].run()
    for name, peer in cases[-1].peers.items():
        if name not in (*run.COMPILED, "FlashInfer"):
            peer()


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


@pytest.mark.parametrize("arguments", [[], ["--full"], ["--nodes", "64"], ["--op", "head", "--op", "embed"]], ids=str)
def test_every_shape_is_measured_once(arguments):
    """What has a goal comes first, and the parts of an operation make up its choice."""
    options = run.parse(arguments)
    parts = run.parts(options)
    choice = models.ALL if options.full else models.SOME
    names = "model", "nodes", "context", "batch"
    nodes = tuple(options.nodes or choice.nodes)
    wanted = {(op, *shape) for op in options.op or run.OPS for shape in replace(choice, nodes=nodes).all(*names)}
    found = [(op, *shape) for op, part in parts for shape in part.all(*names)]
    assert len(found) == len(wanted) and set(found) == wanted
    if not options.op:
        assert [op for op, _ in parts[:5]] == ["linears", "attention", "head", "ngram", "grow"]
        assert all(part.nodes == (64,) for op, part in parts[1:3])


@pytest.fixture
def report(on_a_cpu, monkeypatch, tmp_path):
    """Cases a clock's tick each, of two operations with four shapes."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    module = SimpleNamespace(
        cases=lambda choice: (harness.Case("op", "L", {"N": n}, 0, 1, lambda: None) for n in choice.nodes)
    )
    monkeypatch.setattr(run, "import_module", lambda name: module)
    return run.Report(tmp_path / "out", {"gpu": "none"})


PARTS = [(op, models.Choice(("L",), (1, 2, 3, 4), (8,), (1,))) for op in ("one", "two")]


@pytest.mark.parametrize(
    ("end", "measured", "left_out"),
    [
        (0, 0, ["one: model=L nodes=1,2,3,4 context=8 batch=1", "two: model=L nodes=1,2,3,4 context=8 batch=1"]),
        (3, 2, ["one: model=L nodes=1,2,3,4 context=8 batch=1, after op {'N': 2}", "two: "]),
        (5, 4, ["two: model=L nodes=1,2,3,4 context=8 batch=1"]),
        (99, 8, []),
    ],
)
def test_no_case_is_started_once_the_time_is_spent(report, end, measured, left_out):
    run.measure_all(PARTS, True, 1.0, end, report)
    assert len(report.results) == measured and len(report.left_out) == len(left_out)
    assert all(got.startswith(wanted) for got, wanted in zip(report.left_out, left_out, strict=True))
    written = json.loads(report.stem.with_suffix(".json").read_text())
    assert len(written["results"]) == measured and written["left_out"] == report.left_out
    text = report.stem.with_suffix(".md").read_text()
    assert text.count("| op | L |") == measured and all(f"- {part}" in text for part in report.left_out)
    assert report.stem.with_name("out-others.svg").exists() == bool(measured)


def test_an_interrupted_run_has_written_what_it_measured(report, monkeypatch):
    measure, path = run.measure, report.stem.with_suffix(".json")

    def interrupted(case, roof):
        if case.shape["N"] == 3:
            assert len(json.loads(path.read_text())["results"]) == 2, "written only at the end"
            raise KeyboardInterrupt
        return measure(case, roof)

    monkeypatch.setattr(run, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.measure_all(PARTS, True, 1.0, 99, report)
    assert len(json.loads(path.read_text())["left_out"]) == 2 and report.stem.with_name("out-others.svg").exists()


def test_everything_is_done_once_ahead(monkeypatch, capsys):
    """Checks, runs and peers of every case; what fails there is left to the measurement."""
    done = []

    def failing():
        done.append("failing")
        raise ImportError("not installed")

    def cases(choice):
        if choice.nodes == (3,):
            raise torch.OutOfMemoryError("a small GPU")
        for count in choice.nodes:
            check, ours, peer = (partial(done.append, (name, count)) for name in ("check", "run", "peer"))
            peers = {"absent": failing, "peer": peer, "torch.compile": peer}
            yield harness.Case("op", "L", {"N": count}, 0, 1, ours, peers, check)

    monkeypatch.setattr(run, "import_module", lambda name: SimpleNamespace(cases=cases))
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(1))
    run.compile_apart(PARTS[:1], False, time.monotonic() + 1000)
    assert done == [part for n in (1, 2, 4) for part in (("check", n), ("run", n), "failing", ("peer", n))]
    assert "not compiled ahead: one model=L nodes=3" in capsys.readouterr().err
    done.clear()
    run.compile_apart(PARTS[:1], True, time.monotonic())
    assert not done


def made(op: str, nodes: int, **shape) -> harness.Result:
    peers = {"peer": harness.Timing(20.0, 19.0, 21.0), "absent": "ImportError: not installed"}
    return harness.Result(op, "L", {"N": nodes} | shape, TIMING, peers, 100.0, 0.5, 0.9, None, None)


def test_results_are_read_as_they_were_written(tmp_path, capsys, monkeypatch):
    results = [made("linears", 64), made("qkv", 64), made("linears", 1), made("embed", 4), made("qkv", 1)]
    written = tables.Report(tmp_path / "out", {"gpu": "some", "command": "c"}, results, ["one"], {"in all": 3.0})
    written.write()
    found = tables.Report.read(tmp_path / "out.json")
    assert found == written
    order = [(result.op, result.shape["N"]) for result in found.groups()["linears"]]
    assert order == [("linears", 1), ("linears", 64), ("qkv", 1), ("qkv", 64)]
    assert list(found.groups()) == ["linears", "others"] and [path.name for path in found.plots()] == [
        "out-linears.svg"
    ]

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- kernels: begin -->\nold\n<!-- kernels: end -->\nafter\n")
    monkeypatch.setattr(tables.report, "README", readme)
    assert tables.main([str(tmp_path / "out.json"), "--update-readme"]) == 0
    text = readme.read_text()
    assert "old" not in text and text.count("| linears | L |") == 2 and "figures/out-linears.svg" in text
    assert (tmp_path / "figures" / "out-linears.svg").exists()
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(SystemExit):
        tables.main([str(tmp_path / "bad.json")])
    assert "no result of run.py" in capsys.readouterr().err


def test_table_prints_no_ratio_where_results_differ():
    def result(error, beyond=None):
        peers = {"peer": harness.Timing(20.0, 20.0, 20.0)}
        return harness.Result("op", "L", {"N": 1}, TIMING, peers, 0.0, 0.0, error, 5.0, beyond)

    right, wrong = harness.table([result(0.0), result(float("inf"))]).splitlines()[2:]
    assert "20.00 (2.00x)" in right and "5: missed" in right and "exact" in right
    assert "20.00 (differs)" in wrong
    assert "-10.0 beyond peer, met" in harness.table([result(0.0, "peer")])
