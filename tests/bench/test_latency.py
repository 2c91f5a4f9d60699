"""The benchmark of latency: its arithmetic on planted times, its cases and budget, and a whole run on tiny models."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

import first_use
import latency
import random_models
from report import README, replace_between
from stagedspec import MODES, TreeConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target and a draft of random weights, without tokenizers."""
    folder = tmp_path_factory.mktemp("latency")
    for seed, (name, width) in enumerate({"target": 32, "draft": 16}.items()):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=61, n_positions=48, n_embd=width, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs first_use.py without a process of its own; gives the environments that the processes would have had."""
    environments = []

    def run(arguments, environment, seconds):
        environments.append(environment)
        with redirect_stdout(StringIO()) as printed:
            assert first_use.main(arguments) == 0
        return json.loads(printed.getvalue())

    monkeypatch.setattr(first_use, "in_a_process", run)
    return environments


def run(folder, *arguments: str) -> int:
    models = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--device", "cpu"]
    return latency.main([*models, "--threads", "1", "--tokens", "2", "5", "--repeats", "2", *arguments])


# ---------------------------------------------------------------- arithmetic


def test_step_and_fixed_on_planted_times():
    few = [(0.030 + 16 * 0.002, 16), (0.034 + 16 * 0.002, 16), (0.032 + 16 * 0.002, 16)]
    many = [(0.030 + 80 * 0.002, 80), (0.034 + 80 * 0.002, 80), (0.032 + 80 * 0.002, 80)]
    step, fixed = latency.step_and_fixed(few, many)
    assert step == pytest.approx({"median": 0.002, "lower": 0.002, "upper": 0.002})
    assert fixed == pytest.approx({"median": 0.032, "lower": 0.031, "upper": 0.033})


def test_a_disturbed_repeat_does_not_move_the_medians():
    few, many = [(0.01 + 4 * 0.001, 4)] * 5, [(0.01 + 20 * 0.001, 20)] * 4 + [(9.0, 20)]
    step, fixed = latency.step_and_fixed(few, many)
    assert step["median"] == pytest.approx(0.001) and fixed["median"] == pytest.approx(0.01)


@pytest.mark.parametrize(("few", "many"), [([], []), ([(1.0, 5)], [(2.0, 5)])], ids=["nothing", "no more steps"])
def test_step_and_fixed_need_two_lengths(few, many):
    with pytest.raises(ValueError, match="few and of more steps"):
        latency.step_and_fixed(few, many)


class Planted:
    """A side whose calls take a planted time, by a clock of its own."""

    def __init__(self, clock, fixed, step, first, token=0):
        self.clock, self.fixed, self.step, self.first, self.token = clock, fixed, step, first, token

    def generate(self, ids, new_tokens):
        self.clock[0] += self.fixed + new_tokens * self.step
        return [self.token] * new_tokens, new_tokens

    def first_token(self, ids, new_tokens):
        self.clock[0] += self.first
        return self.first

    def own_first_token(self):
        return self.first / 2


def test_calls_of_planted_sides(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    sides = {
        "staged": Planted(clock, 0.004, 0.001, 0.005),
        "tree": Planted(clock, 0.006, 0.002, 0.007, token=1),
        "transformers": Planted(clock, 0.1, 0.02, 0.1, token=2),
    }
    loaded = SimpleNamespace(side=lambda name, sampling: sides[name], prompt=lambda length: None,
                             device=torch.device("cpu"))  # fmt: skip
    found = {line["side"]: line for line in latency.measure_calls(loaded, list(sides), "greedy", 16, (4, 20), 3)}
    assert {name: line["fixed_seconds"]["median"] for name, line in found.items()} == pytest.approx(
        {"staged": 0.004, "tree": 0.006, "transformers": 0.1}
    )
    assert found["tree"]["step_seconds"]["median"] == pytest.approx(0.002)
    assert found["tree"]["first_token_seconds"]["median"] == pytest.approx(0.007)
    assert found["tree"]["first_token_seconds_by_stats"]["median"] == pytest.approx(0.0035)
    # A mode whose tokens differ from the first mode's is found; transformers is not compared.
    assert [line["same_output"] for line in found.values()] == [True, False, None]
    assert "6.00 (6.00 to 6.00)" in latency.calls_table(list(found.values()), "greedy")


# ---------------------------------------------------------------- whole runs


def test_a_whole_run(folder, tmp_path, capsys, in_this_process):
    out = tmp_path / "latency.json"
    assert run(folder, "--lengths", "8", "900", "--tree", "5,3,2,1,2,1,1", "--no-compiled", "--out", str(out)) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    calls = {(line["sampling"], line["side"]): line for line in report["calls"]}
    assert set(calls) == {(name, side) for name in first_use.SAMPLINGS for side in (*MODES, "transformers")}
    assert all(line["same_output"] is (None if side == "transformers" else True) for (_, side), line in calls.items())
    assert calls["greedy", "autoregressive"]["calls"]["few"][0][1] == 2  # as many steps as tokens
    assert calls["greedy", "autoregressive"]["tokens_per_step"] == 1
    kinds = [(line["side"], line["sampling"], line["kind"]) for line in report["first_use"]]
    assert kinds[:4] == [("staged", sampling, kind) for sampling in ("greedy", "sampled") for kind in ("cold", "warm")]
    assert len(kinds) == 18 and kinds[-1] == ("transformers", "sampled", "cold")
    assert all(line["same_output"] for line in report["first_use"] if line["side"] in MODES)
    assert report["first_use"][0]["tree"]["nodes"] == 5
    assert report["left_out"] == ["prompts of 900 tokens: the target has room for 43"]
    printed = capsys.readouterr().out
    assert "| staged" in printed and "Left out:\n\n- prompts of 900 tokens" in printed
    assert "| transformers" in replace_between(README.read_text(encoding="utf-8"), "latency", printed)
    # Cold and warm share their folders; another mode or sampling has its own.
    folders = [(env["TRITON_CACHE_DIR"], env["NUMBA_CACHE_DIR"], env["XDG_CACHE_HOME"]) for env in in_this_process]
    assert folders[0] == folders[1] and folders[0] != folders[2] == folders[3]


def test_an_untuned_process_finds_compiled_code_alone(folder, tmp_path, in_this_process):
    options = latency.parse(["--device", "cpu"])
    options.target, options.draft, options.room, options.tokens = (
        str(folder / "target"),
        str(folder / "draft"),
        8,
        (2, 5),
    )
    options.tree = "auto"
    cold, untuned = (
        latency.measure_first_use(options, tmp_path, "autoregressive", "greedy", kind, 60)
        for kind in ("cold", "untuned")
    )
    assert (cold["compiled"], cold["tuning"]) == ("none", "none")
    assert (untuned["compiled"], untuned["tuning"]) == ("warm", "none")
    first, second = in_this_process
    assert first["NUMBA_CACHE_DIR"] == second["NUMBA_CACHE_DIR"]
    assert first["XDG_CACHE_HOME"] != second["XDG_CACHE_HOME"]


def test_nothing_starts_after_the_budget(folder, tmp_path, capsys):
    out = tmp_path / "latency.json"
    assert run(folder, "--limit-seconds", "0", "--lengths", "8", "--out", str(out)) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["first_use"] == report["calls"] == []
    assert "first use, staged, greedy, cold" in report["left_out"]
    assert "calls, staged, autoregressive, tree, chain, transformers, sampled, 8 tokens" in report["left_out"]


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_noted(folder, tmp_path, monkeypatch):
    options = latency.parse(["--device", "cpu"])
    options.target, options.room = str(folder / "target"), 8
    found = latency.measure_first_use(options, tmp_path, "autoregressive", "greedy", "cold", 0.0)
    assert "ended after 0" in latency.first_use_table([found])


@pytest.mark.slow
def test_a_process_that_fails_says_why(folder, tmp_path):
    options = latency.parse(["--device", "cpu"])
    options.target, options.room = str(tmp_path / "nothing"), 8
    with pytest.raises(ValueError, match=r"failed: ValueError: .*nothing"):
        latency.measure_first_use(options, tmp_path, "autoregressive", "greedy", "cold", 300)


@pytest.mark.slow
def test_first_use_in_a_process_of_its_own(folder, tmp_path):
    options = latency.parse(["--device", "cpu", "--threads", "1", "--tree", "5,3,2,1,2,1,1", "--tokens", "3", "6"])
    options.target, options.draft, options.room = str(folder / "target"), str(folder / "draft"), 8
    found = latency.measure_first_use(options, tmp_path, "staged", "greedy", "cold", 300)
    assert len(found["tokens"]) == 3
    assert all(found[f"{name}_seconds"] > 0 for name in ("import", "load", "first", "second"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--tokens", "5", "5"], "--tokens"),
        (["--tree", "big"], "--tree"),
        (["--tree", "1,2"], "--tree must be auto or 7 numbers"),
        (["--tree", "1,2,3,1,4,1,1"], "at least 2 nodes"),
        (["--backend", "jax"], "--backend must be one of"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--device", "tpu"], "--device must be"),
        (["--target", "/nowhere"], "target: no checkpoint folder at '/nowhere'"),
        (["--limit-seconds", "nan"], "--limit-seconds must be at least 0"),
        (["--lengths", "0"], "--lengths"),
        (["--out", "/none/such/file.json"], "--out"),
        (["--random", "L", "--target", "x"], "--random"),
        (["--random", "L", "--draft-shape", "8"], "--draft-shape"),
        (["--random", "L", "--draft-shape", "8x500"], "--draft-shape"),
        (["--draft-shape", "8x512"], "--draft-shape"),
        (["--draft", "x"], "--target"),
    ],
)
def test_options_that_cannot_be(capsys, arguments, part):
    assert latency.main(["--device", "cpu", *arguments]) == 2
    assert part in capsys.readouterr().err


# ---------------------------------------------------------------- models and trees


def test_trees_by_numbers():
    assert first_use.parse_tree("auto") == "auto"
    assert first_use.parse_tree("32,8,4,4,4,1,2") == TreeConfig(32, 8, 4, 4, 4, 1, 2)
    for text in ("1,2,3,4,5,6,7,8", "32", "32,8,4,4,4,1", "", "32,8,4,4,4,1,x"):
        with pytest.raises(ValueError, match="--tree must be auto or 7 numbers"):
            first_use.parse_tree(text)


def test_random_models(tmp_path):
    options = latency.parse(["--random", "embedded", "--draft-shape", "1x64"])
    with random_models.checkpoints(options, torch.device("cpu")) as (target, draft, ngram):
        assert ngram is None
        with safe_open(f"{target}/model.safetensors", "pt") as file:
            assert file.get_slice("transformer.wte.weight").get_dtype() == "BF16"
            assert file.get_slice("transformer.wte.weight").get_shape() == [2048, 384]
        with safe_open(f"{draft}/model.safetensors", "pt") as file:
            assert file.get_slice("transformer.wpe.weight").get_shape() == [512, 64]
    assert not Path(target).exists()
