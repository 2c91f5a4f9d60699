"""The benchmark of decoding, end to end on tiny random models, and how it sums up."""

import gzip
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

import stagedspec
from stagedspec.models.shapes import ModelShape
from stagedspec.training.corpus import Corpus, encode, train_tokenizer
from stagedspec.tuning.compare import Run, compare

BENCH = Path(__file__).resolve().parents[2] / "bench"
DOCUMENT = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n\n\n" * 6


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(BENCH))  # a script's own folder is where it looks first
decode, make_prompts, entrance = script("decode"), script("make_prompts"), script("entrance")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target, a draft and a prompts file of three prompts, one of them too long."""
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = train_tokenizer([DOCUMENT], 300)
    for seed, (name, width) in enumerate({"target": 32, "draft": 16}.items()):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = ["import os\n", DOCUMENT, "def read(path):\n"]
    with gzip.open(folder / "prompts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    return folder


def run(folder: Path, *arguments: str) -> int:
    models = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--device", "cpu"]
    return decode.main([*models, "--max-new-tokens", "12", "--threads", "1", *arguments])


@pytest.mark.slow
def test_results_of_a_run(folder, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert run(folder, "--prompts", str(folder / "prompts.jsonl.gz"), "--out", str(out)) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["identical"] is True
    assert report["prompts"] == {"file": "prompts.jsonl.gz", "used": 2, "skipped": 1}
    assert report["versions"]["stagedspec"] == stagedspec.__version__
    assert report["machine"]["threads"] == 1
    for name, result in report["results"].items():
        sides = {side["name"]: side for side in result["sides"]}
        assert list(sides) == [*stagedspec.MODES, "transformers"]
        assert all(sides[mode]["identical"] and sides[mode]["new_tokens"] == 24 for mode in stagedspec.MODES)
        assert sides["transformers"]["new_tokens"] == 24
        # Greedy, transformers is an oracle; sampled, it draws other random numbers and gets no ratio.
        assert sides["transformers"]["identical"] is (True if name == "greedy" else None)
        assert (sides["transformers"]["speedup"] is None) == (name == "sample")
    assert "1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "no prompts"),
        (b"{}\n", "line 1"),
        (b'{"prompt": 3}\n', "line 1"),
        (b"text\n", "line 1"),
        (b"\xff\xfe", "UTF-8"),
    ],
    ids=["empty", "no field", "no text", "no JSON", "binary"],
)
def test_prompts_that_cannot_be_used(folder, tmp_path, capsys, content, part):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert run(folder, "--prompts", str(path)) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing.jsonl", "damaged.jsonl.gz"])
def test_prompts_that_cannot_be_read(folder, tmp_path, capsys, name):
    (tmp_path / "damaged.jsonl.gz").write_bytes(b"not gzip")
    assert run(folder, "--prompts", str(tmp_path / name)) == 2
    assert name in capsys.readouterr().err


def test_prompts_all_too_long(folder, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": DOCUMENT}) + "\n", encoding="utf-8")
    assert run(folder, "--prompts", str(path)) == 2
    assert "none of the 1 prompts" in capsys.readouterr().err


def test_make_prompts_is_deterministic_and_keeps_the_bounds(tmp_path):
    tokenizer = train_tokenizer([DOCUMENT], 300)
    ids = encode([DOCUMENT, "x = 1\n", DOCUMENT.replace("read", "load")], tokenizer)
    Corpus(ids, ids, 1).save(tmp_path / "corpus.safetensors")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prompts = make_prompts.make_prompts(tmp_path, 5)
    assert prompts == make_prompts.make_prompts(tmp_path, 5)
    assert len(set(prompts)) == 5
    for prompt in prompts:
        assert prompt.endswith("\n")
        assert 32 <= len(tokenizer.encode(prompt)) <= 128
        assert prompt in DOCUMENT or prompt in DOCUMENT.replace("read", "load")


def test_make_prompts_refuses_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"no corpus\.safetensors"):
        make_prompts.make_prompts(tmp_path, 5)
    save_file({"x": torch.zeros(1)}, tmp_path / "corpus.safetensors")
    with pytest.raises(ValueError, match="no tokenizer"):
        make_prompts.make_prompts(tmp_path, 5)


def test_compare_gives_no_ratio_where_outputs_differ():
    order = []

    def side(name: str, wrong: bool, seconds: float):
        def run(prompt: int) -> Run:
            order.append(name)
            time.sleep(seconds)
            return Run([prompt, int(wrong and prompt == 1)], {"steps": 1, "overhead": 0.5})

        return run

    sides = {"base": side("base", False, 0.02), "fast": side("fast", False, 0.002), "wrong": side("wrong", True, 0)}
    base, fast, wrong = compare(sides, [0, 1, 2])
    assert order == ["base", "fast", "wrong", "fast", "wrong", "base", "wrong", "base", "fast"]
    assert base.speedup == 1.0
    assert fast.identical and fast.speedup > 2
    assert (fast.tokens_per_step, fast.overhead, fast.target_passes) == (2.0, 0.5, None)
    assert (wrong.identical, wrong.differing, wrong.speedup) == (False, 1, None)
    (_, _, unchecked) = compare(sides, [0, 1, 2], incomparable=frozenset({"wrong"}))
    assert (unchecked.identical, unchecked.speedup) == (None, None)


@pytest.mark.parametrize("arguments", [({}, [1]), ({"a": None}, []), ({"a": None}, [1], 0)])
def test_compare_refuses_nothing_to_do(arguments):
    with pytest.raises(ValueError, match="at least one side"):
        compare(*arguments)


# ---------------------------------------------------------------- entrance.py


def test_costs_are_paired(monkeypatch):
    """Ratios within a turn, so that a machine that slows down does not count; every side goes first in turn."""
    clock, order = [0.0], []
    monkeypatch.setattr(entrance.time, "perf_counter", lambda: clock[0])

    def side(name, share):
        def run(ids):
            order.append(name)
            clock[0] += share * (1 + len(order) // 3)  # ever slower
            return ids

        return run

    sides = {"plain": side("a", 1.0), "config": side("b", 1.02), "custom": side("c", 1.1)}
    seconds = entrance.measure(sides, [torch.tensor([[1]]), torch.tensor([[2]])], repeats=3)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(sides, 6)
    assert order[3:9] == ["a", "b", "c", "b", "c", "a"]
    assert entrance.costs({"a": [1.0, 2.0, 4.0], "b": [1.1, 2.2, 4.4]})["b"] == pytest.approx((0.1, 0.1, 0.1))


def test_entrances_must_agree():
    sides = {"plain": lambda ids: ids, "other": lambda ids: ids + 1}
    with pytest.raises(ValueError, match="other gave other tokens than plain on prompt 0"):
        entrance.measure(sides, [torch.tensor([[1]])], repeats=1)


def test_cost_of_noticing(capsys):
    assert script("live").main(["--layers", "1", "--width", "16", "--vocabulary", "50", "--repeats", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["target", "draft", "check", "all values"]


def test_entrance_on_the_embedded_models(capsys):
    assert entrance.main(["--limit", "2", "--max-new-tokens", "4", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 pairs of 4 new tokens" in printed and "custom_generate" in printed and "the bound is 3%" in printed
    assert entrance.main(["--prompts", "/none/such"]) == 2


@pytest.mark.slow
def test_batches(folder, tmp_path, capsys):
    out, prompts = tmp_path / "results.json", tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc", "x", "import os", "de", "fgh")))
    options = "--prompts", str(prompts), "--batch", "1", "2", "4", "--modes", "staged"
    assert run(folder, *options, "--out", str(out)) == 0
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert list(results) == [
        f"{name}{size}" for name in ("greedy", "sample") for size in ("", ", batch 2", ", batch 4")
    ]
    for result in results.values():
        for side in result["sides"]:
            assert side["new_tokens"] == 12 * result["batch"] * (5 // result["batch"])
            assert side["steps"] == side["new_tokens"] or side["name"] == "staged"
    assert results["greedy, batch 4"]["sides"][-1]["identical"]  # transformers, with the same padding
    assert run(folder, "--prompts", str(prompts), "--batch", "8") == 2
    assert "raise --limit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(folder, "--batch", "1", "0")
    with pytest.raises(SystemExit):
        run(folder, "--batch", "17")


@pytest.mark.parametrize("kind", ["named", "random"])
def test_many_prompts(folder, tmp_path, capsys, monkeypatch, kind):
    """All sides have the same tokens, and each is compared with those before it."""
    many = script("many")
    shape = ModelShape(1, 32, 2, vocab=300)
    monkeypatch.setattr(many, "shape_of", lambda name: shape)
    models = ["--target", str(folder / "target"), "--prompts", str(folder / "prompts.jsonl.gz"), "--stop", " "]
    arguments = models if kind == "named" else ["--random", "S", "--mean", "5"]
    small = ["--limit", "5", "--max-new-tokens", "12", "--modes", "autoregressive", "--batch", "1", "2"]
    assert many.main([*arguments, *small, "--repeats", "1", "--out", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    sides = [(side["batch"], side["rows"], list(side["over"])) for side in report["sides"]]
    assert sides == [
        (1, "whole", []), (2, "whole", []), (2, "trimmed", ["whole"]), (2, "replaced", ["whole", "trimmed"])
    ]  # fmt: skip
    assert len(report["lengths"]) == (2 if kind == "named" else 5) and report["lengths"][-1] <= 12
    assert many.main([*models[:-1], "import os", "--limit", "2"]) == 2
    assert "--stop must be the text of one token" in capsys.readouterr().err
