"""Tuned launch settings: files of them, the search, the command."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import slow_but
from triton.runtime.errors import OutOfResources
from typer.testing import CliRunner

from stagedspec.cli import app
from stagedspec.kernels.common import launch_configs as configs
from stagedspec.kernels.common import registry
from stagedspec.models.shapes import SIZES, ModelShape
from stagedspec.tuning import kernels as tune_kernels
from stagedspec.tuning import workloads
from stagedspec.tuning.kernels import Launch, Problem, tune

GPU = "NVIDIA Some GPU"
DEFAULT = {"tile": 64, "warps": 4}
PACKAGED = configs.PACKAGED  # before the fixture below replaces it


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A package and a user without settings."""
    monkeypatch.setattr(configs, "PACKAGED", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = configs.device_name
    monkeypatch.setattr(configs, "device_name", lambda device: device if isinstance(device, str) else real(device))
    for known in (configs._table.cache_clear, configs._asked.clear):
        known()
    yield tmp_path
    for known in (configs._table.cache_clear, configs._asked.clear):
        known()


def asked(op: str = "op", shape: tuple[int, ...] = (8, 4), device: str = GPU) -> dict[str, int]:
    return configs.config(op, shape, device, lambda *_: [DEFAULT])


# ---------------------------------------------------------------- files


def test_the_user_goes_before_the_package_and_the_package_before_the_default(folders):
    assert asked() == DEFAULT
    configs.write(configs.PACKAGED / "nvidia-some-gpu.json", GPU, {"op": {"8x4": {"tile": 128}, "9": {"warps": 8}}})
    assert asked() == {"tile": 128, "warps": 4}
    configs.write(configs.user_file(GPU), GPU, {"op": {"8x4": {"tile": 32, "warps": 2, "of another version": 3}}})
    assert asked() == {"tile": 32, "warps": 2}
    assert asked(shape=(9,)) == {"tile": 64, "warps": 8}  # what only the package knows
    assert asked("other") == asked(device="NVIDIA Other") == DEFAULT


def test_writing_keeps_what_is_not_tuned_anew():
    path = configs.user_file(GPU)
    configs.write(path, GPU, {"op": {"8x4": {"tile": 32}, "1": {"tile": 1}}, "other": {"2": {"warps": 1}}})
    configs.write(path, GPU, {"op": {"8x4": {"tile": 16}}})
    assert configs.read(path, GPU) == {"op": {"8x4": {"tile": 16}, "1": {"tile": 1}}, "other": {"2": {"warps": 1}}}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_without_a_home_folder_the_package_serves(monkeypatch):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    configs.write(configs.PACKAGED / "nvidia-some-gpu.json", GPU, {"op": {"8x4": {"tile": 128}}})
    monkeypatch.setattr(type(configs.PACKAGED), "expanduser", no_home)
    assert asked()["tile"] == 128


GOOD = {"format": configs.FORMAT, "device": GPU, "settings": {"op": {"8x4": {"tile": 32}}}}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("{", "damaged"),
        ("\xff", "damaged"),
        ("[]", "the content"),
        ({}, "format"),
        (GOOD | {"format": "stagedspec tuning 1"}, "format"),
        (GOOD | {"device": "NVIDIA some-gpu"}, "device"),
        (GOOD | {"settings": []}, "settings"),
        (GOOD | {"settings": {"op": 3}}, "settings.op"),
        (GOOD | {"settings": {"op": {"8x4": []}}}, "settings.op.8x4"),
        (GOOD | {"settings": {"op": {"8x4": {"tile": "32"}}}}, "settings.op.8x4.tile"),
        (GOOD | {"settings": {"op": {"8x4": {"tile": -1}}}}, "settings.op.8x4.tile"),
        (GOOD | {"settings": {"op": {"8x4": {"tile": 65536}}}}, "settings.op.8x4.tile"),
        (GOOD | {"settings": {"op": {"8x4": {"tile": True}}}}, "settings.op.8x4.tile"),
        (GOOD | {"settings": {"op": {"8x4": {"tile": 32.0}}}}, "settings.op.8x4.tile"),
    ],
)
def test_damaged_and_foreign_files_are_named_with_the_key(content, key):
    path = configs.user_file(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
    with pytest.raises(ValueError) as error:
        asked()
    assert str(path) in str(error.value) and key in str(error.value)
    assert "stagedspec tune" in str(error.value)
    with pytest.raises(ValueError, match=r"nvidia-some-gpu\.json"):  # nor is it overwritten
        configs.write(path, GPU, {})


def test_trying_holds_inside_alone():
    with configs.trying("op", (8, 4), {"tile": 1}):
        assert asked() == {"tile": 1, "warps": 4}
        assert asked("other") == DEFAULT
        with configs.trying("op", (8, 4), {"tile": 2}), configs.trying("other", (8, 4), {"tile": 3}):
            assert (asked()["tile"], asked("other")["tile"]) == (2, 3)
        assert asked() == {"tile": 1, "warps": 4} and asked("other") == DEFAULT
    assert asked() == DEFAULT


# ---------------------------------------------------------------- the search


def tuned(problem: Problem, *how) -> tune_kernels.Tuned:
    return tune(problem, problem.launches(), *how)


def problem_of(times: dict[int, float]) -> tuple[Problem, list[float]]:
    """An operation whose time depends on its tile. Tile 7 gives other bits, tile 9 does not run."""
    clock: list[float] = []

    def run() -> torch.Tensor:
        tile = asked()["tile"]
        if tile == 9:
            raise OutOfResources(300_000, 232_448, "shared memory")
        clock.append(times[tile])
        return torch.tensor([torch.nan, -0.0 if tile == 7 else 0.0])

    candidates = [DEFAULT | {"tile": tile} for tile in times]
    return Problem("op", (8, 4), candidates, lambda: [Launch(run, lambda: [run()])]), clock


def timed_by(clock: list[float]):
    def timer(run) -> float:
        run()
        return clock[-1]

    return timer


def test_the_fastest_that_is_right_wins():
    problem, clock = problem_of({64: 10.0, 32: 8.0, 7: 1.0, 9: 1.0, 16: 9.0})
    reports = []
    found = tuned(problem, timed_by(clock), lambda: reports.append(1))
    assert found.settings == {"tile": 32, "warps": 4} and found.default == DEFAULT
    assert found.times == ([10.0], [8.0]) and found.speedup == pytest.approx(1.25)
    assert [one["tile"] for one in found.refused] == [7] and [one["tile"] for one in found.failed] == [9]
    assert found.tried == len(reports) == 5
    assert asked() == DEFAULT
    assert tune_kernels.table([found]) == {"op": {"8x4": {"tile": 32, "warps": 4}}}


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_an_error_of_the_gpu_is_not_the_candidate_s(kind):
    problem, clock = problem_of({64: 10.0, 32: 8.0})

    def run() -> torch.Tensor:
        if asked()["tile"] == 32:
            raise kind("of the GPU")
        clock.append(10.0)
        return torch.zeros(1)

    with pytest.raises(kind, match="of the GPU"):
        tuned(replace(problem, launches=lambda: [Launch(run, lambda: [run()])]), timed_by(clock))
    assert asked() == DEFAULT


def test_progress_counts_the_candidates_of_all_problems(monkeypatch):
    problem, clock = problem_of({64: 10.0, 32: 8.0, 9: 1.0})
    monkeypatch.setitem(tune_kernels.PROBLEMS, "compact", lambda *_: iter([problem, replace(problem, op="other")]))
    reports = []
    shapes = [SIZES["S"]] * 2  # the same problems again: they are tuned once
    found = tune_kernels.tune_all(["compact"], shapes, None, lambda *report: reports.append(report), timed_by(clock))
    assert reports == [("op 8x4" if done <= 3 else "other 8x4", done, 6) for done in range(1, 7)]
    assert [one.op for one in found] == ["op", "other"]


def test_a_default_that_was_slow_once_stays():
    problem, clock = problem_of({64: 10.0, 32: 9.9})
    timed, timer = [], timed_by(clock)

    def waking(run) -> float:
        timed.append(timer(run))
        return 20.0 if len(timed) == 1 else timed[-1]

    found = tuned(problem, waking)
    assert found.settings == DEFAULT and found.times == ([10.0], [10.0]) and timed == [10.0, 9.9, 10.0, 9.9]


def test_candidates_are_compiled_before_any_is_timed(monkeypatch):
    """All of an operation's at once; one that does not compile is tried, and fails, in its turn."""
    order = []

    def run() -> torch.Tensor:
        tile = asked()["tile"]
        order.append(tile)
        if tile == 9:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return torch.zeros(1)

    def compiled(parts, device):
        for part in parts:
            part()
        order.append("compiled")
        raise RuntimeError("one does not compile")

    candidates = [DEFAULT | {"tile": tile} for tile in (64, 9, 32)]
    problem = Problem("op", (8, 4), candidates, lambda: [Launch(run, lambda: [run()])])
    monkeypatch.setattr(tune_kernels, "compile_ahead", compiled)
    monkeypatch.setitem(tune_kernels.PROBLEMS, "compact", lambda *_: iter([problem, replace(problem, shape=(9,))]))
    found = tune_kernels.tune_all(["compact"], [SIZES["S"]], None, timer=lambda run: 1.0)
    # The second problem's settings are kept under another shape than the one that its launch asks for.
    assert order[: order.index("compiled")] == [64, 9, 32, 64, 64, 64] and order.count("compiled") == 1
    assert found[0].failed == [DEFAULT | {"tile": 9}] and found[0].settings == DEFAULT


def test_noise_does_not_displace_the_default():
    problem, clock = problem_of({64: 10.0, 32: 9.9})
    assert tuned(problem, timed_by(clock)).settings == DEFAULT


@pytest.mark.parametrize("op", slow_but(["linear", "verify_commit", "ngram_lookup", "compact"], tune_kernels.PROBLEMS))
def test_every_operation(op, monkeypatch, device):
    """Runs, asks for its settings at every launch, and gives the same bits with some that would be tried."""
    monkeypatch.setattr(tune_kernels, "NODES", (1, 5))
    monkeypatch.setattr(tune_kernels, "LINEAR_NODES", (5,))
    monkeypatch.setattr(tune_kernels, "CONTEXT", 20)
    known, every = set(), []

    def config(op, shape, device, candidates):
        settings = real(op, shape, device, candidates)
        known.add((op, configs.shape_name(shape), *sorted(settings.items())))
        return settings

    real = configs.config
    ops = *(f"{name}.op" for name in ("choose", "grow_tree", "linear", "lm_head")), "linear.hopper"
    for name in (*ops, "compact", "ngram_lookup", "verify_commit"):
        monkeypatch.setattr(f"stagedspec.kernels.{name}.config", config)
    shape = ModelShape(1, 32, 2, vocab=150)
    for problem in tune_kernels.PROBLEMS[op](shape, device):
        default, *others = problem.candidates
        assert all(set(one) == set(default) for one in others) and default not in others
        some = [default, *others[-2:]]  # the interpreter is slow
        found = tuned(replace(problem, candidates=some), lambda run: float(run() is None) + 1)
        assert not found.refused and not found.failed
        every += [(problem.op, configs.shape_name(problem.shape), *sorted(one.items())) for one in some]
    assert set(every) <= known


# ---------------------------------------------------------------- the command


def run(*arguments: str):
    return CliRunner().invoke(app, ["tune", *arguments])


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ([], ["--device", "cpu"]):
        result = run(*options)
        assert result.exit_code == 2 and "GPU" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--op", "softmax"], "lm_head"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "XXL"], "or S, M, L, XL or embedded"),
        (["--out", "."], "--out"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_options(options, part):
    result = run(*options)
    assert result.exit_code == 2 and part in result.stderr and len(result.stderr.splitlines()) == 1


def test_sizes_and_models(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)).save_pretrained(tmp_path)
    found = tune_kernels.shapes(["embedded", "XL", str(tmp_path)])
    assert [(shape.layers, shape.width, shape.vocab) for shape in found] == [
        (4, 384, 2048),
        (2, 96, 2048),
        (48, 1600, 50257),
        (1, 8, 11),
    ]


def test_nothing_to_tune(tmp_path, monkeypatch):
    monkeypatch.setattr("stagedspec.cli.early_checks.no_gpu", lambda: False)
    monkeypatch.setattr("stagedspec.devices.resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(configs, "device_name", lambda device: GPU)
    monkeypatch.setitem(tune_kernels.PROBLEMS, "linear", lambda shape, device: iter(()))
    shown = run("--op", "linear", "--out", str(tmp_path / "settings.json"))
    assert shown.exit_code == 2 and "nothing to tune" in shown.output and not list(tmp_path.iterdir())


def test_what_was_found_before_an_interruption_is_kept(tmp_path, monkeypatch):
    problem, clock = problem_of({64: 10.0, 32: 8.0})

    def problems(shape, device):
        yield problem
        yield replace(problem, shape=(9,), launches=lambda: [Launch(lambda: None, interrupted)])

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("stagedspec.cli.early_checks.no_gpu", lambda: False)
    monkeypatch.setattr("stagedspec.devices.resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(configs, "device_name", lambda device: GPU)
    monkeypatch.setitem(tune_kernels.PROBLEMS, "compact", problems)
    monkeypatch.setattr(tune_kernels.tune_all, "__defaults__", (lambda *_: None, timed_by(clock), lambda _: None))
    path = tmp_path / "settings.json"
    assert run("--op", "compact", "--out", str(path)).exit_code != 0
    assert configs.read(path, GPU) == {"op": {"8x4": {"tile": 32, "warps": 4}}}


@pytest.mark.parametrize("to_file", [False, True])
def test_the_command(tmp_path, monkeypatch, to_file):
    """What was found is shown and lies where the kernels look for it, or in the file that was named."""
    problem, clock = problem_of({64: 10.0, 32: 8.0})
    monkeypatch.setattr("stagedspec.cli.early_checks.no_gpu", lambda: False)
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    made_current = []
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setattr(configs, "device_name", lambda device: GPU)
    monkeypatch.setitem(tune_kernels.PROBLEMS, "compact", lambda shape, device: iter([problem]))
    monkeypatch.setattr(tune_kernels.tune_all, "__defaults__", (lambda *_: None, timed_by(clock), lambda _: None))
    path = tmp_path / "settings.json" if to_file else configs.user_file(GPU)
    options = ["--op", "compact", *(["--out", str(path)] if to_file else [])]
    shown = run(*options)
    assert shown.exit_code == 0, shown.output
    assert "tile=32" in shown.stdout and "1.25x" in shown.stdout and "Saved in" in shown.stdout
    report = json.loads(run(*options, "--json").stdout)
    assert report["saved"] == str(path) and report["tuned"][0]["speedup"] == pytest.approx(1.25)
    assert configs.read(path, GPU) == {"op": {"8x4": {"tile": 32, "warps": 4}}}
    assert asked()["tile"] == (64 if to_file else 32)
    assert set(made_current) == {torch.device("cuda", 1)}  # torch refuses a device without an index


def test_the_package_s_settings_are_those_that_tuning_tries(monkeypatch):
    """And differ from the default, which may change: others would go stale unseen, or be refused at a launch."""
    monkeypatch.setattr(registry, "architecture", lambda device: 90)
    monkeypatch.setattr(workloads, "dtype_of", lambda device: torch.bfloat16)
    tried = {
        (problem.op, configs.shape_name(problem.shape)): problem.candidates[1:]
        for shape in SIZES.values()
        for problems in tune_kernels.PROBLEMS.values()
        for problem in problems(shape, torch.device("cpu"))
    }
    files = sorted(PACKAGED.glob("*.json"))
    assert files
    for file in files:
        device = json.loads(file.read_text(encoding="utf-8"))["device"]
        assert file.name == f"{configs.slug(device)}.json"
        for op, shapes in configs.read(file, device).items():
            for shape, settings in shapes.items():
                assert settings in tried[op, shape], (file.name, op, shape)
