"""The ranges of a step's phases, and the scripts that profile one, on tiny random models."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import make_draft, make_gpt2, random_prompts
from torch.autograd import DeviceType

import nsight_compute
import nsight_systems
import stagedspec
import step
import torch_trace
from stagedspec import TreeConfig
from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.kernels.backends.triton_backend import Head, Linear
from stagedspec.kernels.compiled.product import COLUMNS
from stagedspec.kernels.state.host import prefill_batch
from stagedspec.models.gpt2 import GPT2

TREE = TreeConfig(nodes=4, depth=2, passes=2, width=1, children=3, prefetch=1, prefetch_width=1)
PROMPT = torch.tensor(random_prompts([8]))


class Ranges:
    """What was pushed and popped, as torch.cuda.nvtx would see it."""

    def __init__(self):
        self.pushed: list[str] = []
        self.open: list[str] = []

    def push(self, name: str) -> None:
        self.pushed.append(name)
        self.open.append(name)

    def pop(self) -> None:
        self.open.pop()

    @contextmanager
    def mark(self, name: str):
        self.push(name)
        yield
        self.pop()


@pytest.fixture
def nvtx(monkeypatch) -> Ranges:
    """A torch with CUDA, whose NVTX ranges are written down."""
    ranges = Ranges()
    monkeypatch.delenv("STAGEDSPEC_NVTX", raising=False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", ranges.pop)
    return ranges


@pytest.fixture
def make(target, drafts):
    def make(**changes) -> stagedspec.Decoder:
        return stagedspec.Decoder.from_pretrained(
            target, drafts["good"], tree=TREE, device="cpu", dtype="float32", **changes
        )

    return make


# ---------------------------------------------------------------- ranges


def test_ranges_in_the_order_of_the_phases(make, nvtx, monkeypatch):
    expected = make().generate(PROMPT, max_new_tokens=12)
    assert nvtx.pushed == []  # off unless asked for

    monkeypatch.setenv("STAGEDSPEC_NVTX", "1")
    # Steps that have ranges are not captured.
    monkeypatch.setattr(
        TorchBackend, "repeated", lambda _, step: pytest.fail("a step with ranges was given to `repeated`")
    )
    decoder = make()
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=12), expected)
    one_pass = ["grow", "draft", "grow"]
    one_step = ["grow", *one_pass, *one_pass, "grow", "verify", "target", "verify", "commit"]
    assert nvtx.pushed == ["prefill"] + one_step * decoder.last_stats.steps
    assert nvtx.open == []
    assert decoder.last_stats.seconds.keys() == set(nvtx.pushed)


def test_ranges_end_where_a_step_fails(make, nvtx, monkeypatch):
    monkeypatch.setenv("STAGEDSPEC_NVTX", "1")
    decoder = make()
    monkeypatch.setattr(decoder.target, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.generate(PROMPT, max_new_tokens=4)
    assert nvtx.pushed and nvtx.open == []


def test_phases_that_the_clock_does_not_record_are_marked_all_the_same():
    ranges = Ranges()
    clock = stagedspec.decoding.stats.Clock(("prefill",), ranges.mark)
    for phase in ("prefill", "draft"):
        with clock(phase):
            pass
    assert ranges.pushed == ["prefill", "draft"] and list(clock.seconds) == ["prefill"]


@pytest.mark.parametrize(("value", "message"), [("1", "built without CUDA"), ("yes", "must be 1")])
def test_ranges_that_cannot_be(make, monkeypatch, value, message):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setenv("STAGEDSPEC_NVTX", value)
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- the steps that are profiled


@pytest.fixture(scope="module")
def folders(target, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("profiling")
    target.save_pretrained(folder / "target")
    make_draft("random", target).save_pretrained(folder / "draft")
    models = ["--target", str(folder / "target"), "--draft", str(folder / "draft")]
    return [*models, "--device", "cpu", "--prompt-tokens", "8", "--warm-up", "1"]


@pytest.mark.parametrize("mode", stagedspec.MODES)
def test_step(folders, mode, capsys):
    assert step.main([*folders, "--mode", mode, "--steps", "2", "--batch", "2", "--sample"]) == 0
    assert capsys.readouterr().out == f"2 steps of {mode} on cpu\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "99"], "the generation ended after"),
        (["--tree", "nodes"], "expected fields of TreeConfig"),
        (["--tree", "nodes=0"], "nodes must be"),
        (["--shape", "S"], "leave out --target"),
        (["--prompt-tokens", "49"], "n_positions"),
    ],
)
def test_step_refuses(folders, capsys, arguments, message):
    assert step.main([*folders, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_random_models_have_the_shapes_of_gpt2():
    with torch.device("meta"):
        sizes = {
            name: sum(parameter.numel() for parameter in model.parameters()) / 1e6
            for name, model in ((name, step.random_model(shape, torch.device("meta"), torch.float32))
                                for name, shape in {**step.SHAPES, "draft": step.DRAFT}.items())
        }  # fmt: skip
    assert {name: round(size) for name, size in sizes.items()} == {
        "S": 124,
        "M": 355,
        "L": 774,
        "XL": 1558,
        "draft": 39,
    }


# ---------------------------------------------------------------- the torch profiler's trace and table


def test_trace(folders, tmp_path, capsys):
    out = tmp_path / "trace.json"
    assert torch_trace.main([*folders, "--steps", "2", "--roof", "10", "--out", str(out)]) == 0
    events = json.loads(out.read_text(encoding="utf-8"))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert names.count("step") == 2 and names.count("target") == 2
    assert {"grow", "draft", "verify", "commit", "compiled_choose"} <= set(names)

    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(row) for row in rows} == {8}
    found = {row[0]: row for row in rows}
    # Models are compiled: one operation, in which torch runs none of its own.
    assert {"target, compiled_choose", "draft, compiled_children", "all"} <= set(found)
    assert float(found["draft, compiled_children"][5]) > 0
    assert any("/ 10 GB/s (stated)" in line for line in lines)


def test_bytes_that_must_be_moved(target, monkeypatch):
    """Of one autoregressive step of single operations, counted by hand: weights once, biases, norms, one row in and out
    of everything."""
    monkeypatch.setattr(TorchBackend, "compile_model", lambda *_: None)
    decoder = stagedspec.Decoder.from_pretrained(target, device="cpu", dtype="float32")
    options = ["--prompt-tokens", "8", "--steps", "1", "--warm-up", "1", "--mode", "autoregressive"]
    parser = torch_trace.argparse.ArgumentParser()
    step.add_options(parser)
    options = parser.parse_args(options)
    options.as_decoded = False
    profile, watched = torch_trace.trace(decoder, options)
    width, inner, vocab, layers, length = 24, 96, 61, 2, 9

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs + inputs + outputs

    assert watched.moved == {
        ("target", "embed"): 3 * width * 4 + 2 * 8,
        ("target", "norm_linear 72x24"): layers * 4 * (linear(width, 3 * width) + 2 * width),
        ("target", "linear_add 24x24"): layers * 4 * (linear(width, width) + width),
        ("target", "norm_linear 96x24"): layers * 4 * (linear(width, inner) + 2 * width),
        ("target", "linear_add 24x96"): layers * 4 * (linear(inner, width) + width),
        # On a CPU the target keeps its keys and values in fp64.
        ("target", "tree_attention"): layers * (4 * 4 * width + length * 2 * width * 8),
        ("target", "lm_head_choose 61x24"): 4 * (vocab * width + width + 2 * width) + 8,
        ("commit", "move_rows"): 0,
    }
    rows = torch_trace.read(profile.events(), [], watched, 1)
    assert {row.place: row.moved for row in rows if row.moved} == {k: v for k, v in watched.moved.items() if v}
    assert torch_trace.total(rows).moved == sum(watched.moved.values())
    head = next(row for row in rows if row.place == ("target", "lm_head_choose 61x24"))
    roof = head.moved / (head.microseconds * 1e-6)  # at which this operation is at its floor
    assert f"| {head.moved / 1e6:.2f} | {roof / 1e9:.0f} | 100% |" in torch_trace.table([head], roof)


def test_bytes_of_layers_and_heads():
    """A folded layer's weight counts once."""
    weight, narrow = torch.zeros(5, 8, dtype=torch.bfloat16), torch.zeros(5, 128, dtype=torch.float8_e4m3fn)
    folded = SimpleNamespace(weight=weight, bias=weight[0])
    assert torch_trace.size(Linear(weight, torch.zeros(5), folded)) == 80 + 20
    assert torch_trace.size([Head(weight), Head(narrow, torch.zeros(5))]) == 80 + 640 + 20


def test_bytes_of_a_compiled_pass():
    """Counted by hand: 2 rows of 3 nodes beside 10 committed tokens of all sequences; weights lie in whole blocks."""
    width, inner, vocab, layers, nodes = 24, 96, 61, 2, 6
    whole = lambda outputs: -(-outputs // COLUMNS) * COLUMNS  # noqa: E731
    ours = GPT2(make_gpt2(0), TorchBackend(), torch.device("cpu"), torch.float32, invariant=False)
    products = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
    weights = sum((inputs + 1) * whole(outputs) for inputs, outputs in products) + 4 * width
    cache = torch.zeros(layers, 2, 20, 2, 4, width // 4)
    hidden, batch = torch.zeros(2, 3, width), prefill_batch(torch.zeros(2, 3, dtype=torch.long), 10, torch.float32)
    passed = 4 * (layers * (weights + 10 * 2 * width) + 3 * nodes * width)
    head = 4 * (whole(vocab) * width + 2 * width)
    assert torch_trace.FLOORS["compiled_forward"]((ours.compiled, batch, cache), hidden, 10) == passed
    logits = torch.zeros(2, 3, vocab)
    assert torch_trace.FLOORS["compiled_logits"]((ours.compiled, hidden), logits, 10) == (
        head + 4 * nodes * (width + vocab)
    )
    children = (torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(2, 3, 4))
    assert torch_trace.FLOORS["compiled_children"]((ours.compiled, batch, cache), children, 10) == (
        passed + head + nodes * 4 * (8 + 4)
    )


def test_trace_as_decoded(folders, tmp_path, capsys):
    out = tmp_path / "trace.json"
    assert torch_trace.main([*folders, "--steps", "1", "--roof", "10", "--as-decoded", "--out", str(out)]) == 0
    names = {event.get("name") for event in json.loads(out.read_text(encoding="utf-8"))["traceEvents"]}
    assert "step" in names and "target" not in names
    assert "tree_attention" not in capsys.readouterr().out


def test_own_times():
    """Kernels that started early do not count the time in which they waited."""
    runs = [(1, "a", 0, 10), (2, "b", 4, 15), (3, "c", 5, 12), (2, "d", 20, 21)]
    assert torch_trace.own_times([torch_trace.Launch(*run) for run in runs]) == {
        1: [("a", 10)],
        2: [("b", 3), ("d", 1)],
        3: [("c", 2)],
    }


def test_kernels_of_a_gpu():
    """Launched ones go where they were launched, if that was in a step; those of a CUDA graph together."""

    def event(number: int, name: str, parent=None, gpu: bool = False):
        kind = DeviceType.CUDA if gpu else DeviceType.CPU
        return SimpleNamespace(id=number, name=name, cpu_parent=parent, device_type=kind, kernels=[...])

    watched = torch_trace.Watched(TorchBackend())
    watched.names.add("target")
    phase = event(2, "target", parent=event(1, "step"))
    events = [event(3, "aten::copy_"), event(4, "stagedspec::linear", phase), event(4, "_linear", gpu=True)]
    runs = [(4, "_linear", 0, 6), (3, "Memcpy DtoH", 8, 17), (0, "a", 20, 30), (9, "b", 21, 40), (0, "b", 31, 45)]
    rows = torch_trace.read(events, [torch_trace.Launch(*run) for run in runs], watched, 2)
    assert [(row.place, row.kernels) for row in rows] == [
        ((torch_trace.REPLAYED,), {"a": (0.5, 5.0), "b": (1, 7.5)}),
        (("target",), {"_linear": (0.5, 3.0)}),
    ]


def test_trace_refuses(folders, tmp_path, nvtx, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "trace.json")]
    assert torch_trace.main([*folders, "--roof", "nan", *out]) == 2
    assert torch_trace.main([*folders, "--out", str(tmp_path / "none" / "trace.json")]) == 2
    monkeypatch.setenv("STAGEDSPEC_NVTX", "1")
    assert torch_trace.main([*folders, *out]) == 2
    errors = capsys.readouterr().err.splitlines()
    for error, message in zip(errors, ("--roof must be positive", "does not exist", "unset it"), strict=True):
        assert message in error


# ---------------------------------------------------------------- Nsight


def test_nsight_compute_command(capsys):
    arguments = ["--kernel", "_linear", "--phase", "target", "--skip", "4", "--count", "2", "--clock-control", "none"]
    assert nsight_compute.main([*arguments, "--shape", "L", "--steps", "1", "--dry-run"]) == 0
    command, after = capsys.readouterr().out.splitlines()
    assert command.startswith("STAGEDSPEC_NVTX=1 ncu --profile-from-start off --kernel-name 'regex:^_linear$' ")
    for part in (
        "--nvtx --nvtx-include target/ --launch-skip 4 --launch-count 2",
        "--section SpeedOfLight",
        "--import-source yes --clock-control none",
        "--export step.ncu-rep",
    ):
        assert part in command
    assert command.endswith("step.py --shape L --steps 1 --backend triton")
    assert nsight_compute.main(["--kernel", "gemm", "--backend=torch", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("step.py --backend=torch")
    assert after == "ncu --import step.ncu-rep --page details"


@pytest.mark.parametrize("phases", [False, True])
def test_nsight_systems_command(capsys, phases):
    assert nsight_systems.main(["--dry-run", "--steps", "1", *["--phases"] * phases]) == 0
    command, after = capsys.readouterr().out.splitlines()
    assert command.startswith(f"STAGEDSPEC_NVTX={int(phases)} nsys profile ")
    for part in ("--capture-range cudaProfilerApi --capture-range-end stop", "--cuda-graph-trace node"):
        assert part in command
    assert command.endswith("step.py --steps 1 --backend triton")
    assert ("nvtx_gpu_proj_sum" in after) == phases


@pytest.mark.parametrize(
    ("main", "tool"),
    [(lambda: nsight_compute.main(["--kernel", "x"]), "ncu"), (lambda: nsight_systems.main([]), "nsys")],
)
def test_nsight_says_what_is_missing(main, tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"error: {tool} is not on the PATH" in capsys.readouterr().err

    Path(tmp_path / tool).write_text("#!/bin/sh\nexit 1\n")
    os.chmod(tmp_path / tool, 0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "torch sees no CUDA GPU" in capsys.readouterr().err
