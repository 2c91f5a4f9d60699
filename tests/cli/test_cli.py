"""The command line through its runner, on tiny random models."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.style import Style
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import stagedspec
from stagedspec.cli import app, options, origins, output
from stagedspec.cli.demo import DEMO_PROMPTS
from stagedspec.kernels.common import progress
from stagedspec.planning.tree import MODES
from stagedspec.training.corpus import train_tokenizer

SOURCE = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()  # ü\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on several threads, many times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """The options that name a tiny random target and draft, saved in folders."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([SOURCE] * 4, 300)
    for seed, (name, width) in enumerate({"target": 32, "draft": 16}.items()):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=160,
            n_embd=width,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--device", "cpu"]


def run(*arguments: str, **options):
    return CliRunner().invoke(app, list(arguments), **options)


def run_json(*arguments: str, **options) -> dict:
    result = run(*arguments, "--json", **options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_error(result, *parts: str) -> None:
    """One line on stderr that holds every part, exit status 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("command", [[], ["demo"], ["generate"], ["fit-ngram"], ["train"]], ids=lambda c: "".join(c))
def test_help(command):
    result = run(*command, "--help", env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_imports_no_torch():
    code = "import sys, stagedspec.cli; print(sorted({'torch', 'triton', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_version():
    assert run("--version").stdout.strip() == f"stagedspec {stagedspec.__version__}"


def test_modes_are_the_library_s():
    assert tuple(options.Mode.__members__) == tuple(stagedspec.MODES)
    assert set(output.ORIGIN_STYLES) == {"target", "draft", "ngram"}


# ---- generate


def test_generate_prints_prompt_and_text(models):
    expected = run_json("generate", "def read(", "-n", "20", *models)
    result = run("generate", "def read(", "-n", "20", *models)
    assert result.exit_code == 0
    assert result.stdout == f"def read({expected['text']}\n"


def test_generate_json_holds_text_origins_and_stats(models):
    out = run_json("generate", "def read(", "-n", "20", *models)
    assert 1 <= len(out["tokens"]) == len(out["origins"]) <= 20
    assert set(out["origins"]) <= {"target", "draft", "ngram"}
    assert out["stats"]["new_tokens"] == len(out["tokens"])


@pytest.mark.parametrize("sampling", [[], ["--sample", "--top-k", "50", "--seed", "3"]], ids=["greedy", "sampled"])
def test_generate_gives_the_same_tokens_in_every_mode(models, sampling):
    outs = [run_json("generate", "import", "-n", "24", "--mode", mode, *sampling, *models) for mode in MODES]
    assert all(out["tokens"] == outs[0]["tokens"] for out in outs)


def test_generate_reads_stdin_and_files(models, tmp_path):
    path = tmp_path / "prompt.py"
    path.write_text("import os\n", encoding="utf-8")
    by_argument = run_json("generate", "import os\n", "-n", "8", *models)
    for arguments in (["-"], ["--file", "-"], ["--file", str(path)]):
        assert run_json("generate", *arguments, "-n", "8", *models, input="import os\n")["text"] == by_argument["text"]


def test_generate_takes_tree_settings_and_prints_statistics(models):
    tree = ["--nodes", "5", "--depth", "3", "--width", "1", "--passes", "2"]
    result = run("generate", "import", "-n", "8", "--stats", *tree, *models)
    assert result.exit_code == 0, result.output
    for name in ("tokens per step", "seconds of prefill and steps", "seconds from call to first token"):
        assert name in result.stderr


def test_generate_saves_html_and_svg(models, tmp_path):
    """The same tokens as printed, with their origins, from text and JSON output alike."""
    out = run_json("generate", "import <os>\n", "-n", "20", "--save-html", str(tmp_path / "a.html"), *models)
    assert run("generate", "import <os>\n", "-n", "20", "--save-html", str(tmp_path / "b.html"), *models).exit_code == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "b.html").read_text(encoding="utf-8")
    assert "import &lt;os&gt;" in page and "staged, greedy" in page
    for origin in set(out["origins"]):
        assert f'<span class="{origin}' in page.partition("<pre>")[2]
    assert run("generate", "x", "-n", "4", "--sample", "--save-html", str(tmp_path / "c.svg"), *models).exit_code == 0
    assert (tmp_path / "c.svg").read_text(encoding="utf-8").startswith("<svg")
    assert_error(run("generate", "x", "--save-html", str(tmp_path / "none" / "x.html"), *models), "does not exist")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no prompt", "--file"]),
        ([""], ["prompt is empty"]),
        (["x", "--file", "y"], ["leave one of them out"]),
        (["--file", "/"], ["is a folder"]),
        (["--file", "no-such-file"], ["no such file", "no-such-file"]),
        (["x", "--top-k", "5"], ["--top-k", "--sample"]),
        (["x", "--sample", "--temperature", "0"], ["temperature", "0"]),
        (["x", "--sample", "--top-p", "nan"], ["--top-p", "nan"]),
        (["x", "-n", "0"], ["--max-new-tokens must be at least 1, got 0"]),
        (["x", "-n", "5000"], ["n_positions", "160"]),
        (["x", "--nodes", "-1"], ["nodes"]),
        (["x", "--dtype", "int7"], ["dtype", "int7"]),
        (["x", "--backend", "none"], ["backend", "none"]),
        (["x", "--ngram", "no-such-table"], ["no-such-table"]),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) else None,
)
def test_generate_errors_are_one_line(models, arguments, parts):
    assert_error(run("generate", *arguments, *models), *parts)


def test_generate_errors_of_model_options(models, tmp_path):
    assert_error(run("generate", "x", "--draft", "somewhere"), "--target")
    assert_error(run("generate", "x", "--target", str(tmp_path / "missing")), "missing")
    assert run("generate", "x", "--mode", "nonsense", *models).exit_code == 2


def test_generate_refuses_a_prompt_that_is_not_text(models, tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00")
    assert_error(run("generate", "--file", str(path), *models), "UTF-8")


def test_interrupt_ends_cleanly(models, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stagedspec.Decoder, "stream", interrupted)
    result = run("generate", "x", *models)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_a_reader_that_leaves_is_no_error(models, monkeypatch):
    def broken(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(output, "paint", broken)
    result = run("generate", "import", *models)
    assert (result.exit_code, result.stderr) == (1, "")


def test_colours_have_a_second_cue(models):
    result = run("generate", "import", "-n", "12", *models, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert result.exit_code == 0
    assert "\x1b[" in result.stdout
    cues = {(style.bold, style.italic, style.underline) for style in output.ORIGIN_STYLES.values()}
    assert len(cues) == 3


def test_a_model_s_control_characters_do_not_reach_the_terminal(capsys):
    console = Console(force_terminal=True)
    output.paint(console, "a\x1b]0;title\x07\tb\n", Style())
    assert capsys.readouterr().out == "a\u241b]0;title\u2407\tb\n"


def test_pieces_keep_characters_whole():
    tokenizer = train_tokenizer([SOURCE], 257)  # bytes only
    tokens = tokenizer.encode("aü漢b", add_special_tokens=False)
    parts = origins.pieces(tokenizer, tokens, ["draft"] * (len(tokens) - 1) + ["target"])
    assert parts == [("a", "draft"), ("ü", "draft"), ("漢", "draft"), ("b", "target")]


# ---- demo

DEMO = ["demo", "--max-new-tokens", "8", "--repeats", "1"]


def test_demo_json(models):
    out = run_json(*DEMO, *models)
    assert out["identical"] is True
    assert [part["sampling"] for part in out["samplings"]] == ["greedy", "sampled, top-k 50, T=1"]
    for part in out["samplings"]:
        assert [row["name"] for row in part["modes"]] == list(MODES)
        assert all(row["identical"] and row["tokens_per_second"] > 0 for row in part["modes"])
        assert [c["prompt"] for c in part["completions"]] == list(DEMO_PROMPTS)


def test_demo_prints_text_and_tables(models):
    result = run(*DEMO, *models, env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    for part in (*DEMO_PROMPTS, *MODES, "same", "exactly the tokens"):
        assert part in result.stdout
    assert "proposed by" not in result.stdout  # there are no styles to explain


def test_demo_in_a_narrow_terminal_with_styles(models):
    result = run(*DEMO, *models, env={"COLUMNS": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert "proposed by the" in result.stdout and "…" not in result.stdout
    assert all(mode in result.stdout for mode in MODES)


def test_demo_of_a_model_with_few_positions(models, tmp_path):
    """Prompts are cut to half of them, and there are as many new tokens as there is room for."""
    for index in (1, 3):
        folder = tmp_path / str(index)
        model = GPT2LMHeadModel.from_pretrained(models[index])
        model.config.n_positions = 80
        model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:80].clone()
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((Path(models[index]) / name).read_bytes())
    short = ["--target", str(tmp_path / "1"), "--draft", str(tmp_path / "3"), "--device", "cpu"]
    result = run_json("demo", "--repeats", "1", *short)
    completions = result["samplings"][0]["completions"]
    assert [len(c["origins"]) for c in completions] == [40] * len(DEMO_PROMPTS)
    assert all(whole.startswith(c["prompt"]) for whole, c in zip(DEMO_PROMPTS, completions, strict=True))
    refused = run("demo", *short, "--max-new-tokens", "41")
    assert_error(refused, "room for 40 new tokens, got 41")


def test_demo_fails_where_outputs_differ(models, monkeypatch):
    complete = stagedspec.Decoder.complete

    def wrong_in_tree_mode(self, prompt, **options):
        completion = complete(self, prompt, **options)
        if options["mode"] == "tree":
            completion.tokens[-1] += 1
        return completion

    monkeypatch.setattr(stagedspec.Decoder, "complete", wrong_in_tree_mode)
    result = run(*DEMO, *models, env={"COLUMNS": "140"})
    assert result.exit_code == 1
    assert "DIFFER" in result.stdout
    rows = json.loads(run(*DEMO, "--json", *models).stdout)["samplings"][0]["modes"]
    assert [row["speedup"] is None for row in rows] == [False, False, True, False]


# ---- fit-ngram


def test_fit_ngram_from_text_and_use_it(models, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "more.txt").write_text(SOURCE * 3, encoding="utf-8")
    out = tmp_path / "ngram.safetensors"
    texts = ["--text", str(tmp_path / "source"), "--text", str(tmp_path / "more.txt")]
    result = run("fit-ngram", "--draft", models[3], *texts, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "fitted on" in result.stdout
    plain = run_json("generate", "import", "-n", "12", *models)
    assert run_json("generate", "import", "-n", "12", "--ngram", str(out), *models)["tokens"] == plain["tokens"]


def test_fit_ngram_from_samples_goes_on_where_it_was(models, tmp_path):
    out, work = tmp_path / "ngram.safetensors", tmp_path / "work"
    arguments = ["fit-ngram", "--draft", models[3], "--tokens", "1500", "--batch", "4", "--out", str(out)]
    arguments += ["--work-dir", str(work), "--device", "cpu"]
    assert run(*arguments).exit_code == 0
    shards = sorted(work.glob("shard-*.safetensors"))
    first, times = load_file(out), [path.stat().st_mtime_ns for path in shards[:-1]]
    shards[-1].unlink()
    assert run(*arguments).exit_code == 0
    again = load_file(out)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert [path.stat().st_mtime_ns for path in shards[:-1]] == times


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--text", "no-such-file"], "no-such-file"),
        (["--tokens", "0"], "tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--device", "abacus"], "abacus"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else None,
)
def test_fit_ngram_errors_are_one_line(models, tmp_path, arguments, part):
    out = tmp_path / "ngram.safetensors"
    assert_error(run("fit-ngram", "--draft", models[3], *arguments, "--out", str(out)), part)
    assert not out.exists()


# ---- train

TRAIN = ["--preset", "tiny", "--target-tokens", "2048", "--pretraining-tokens", "1024", "--draft-tokens", "1024"]
TRAIN += ["--target-samples", "2048", "--draft-samples", "2048", "--device", "cpu"]


def test_train_then_decode_then_train_again(tmp_path):
    out = tmp_path / "run"
    result = run("train", "--out", str(out), *TRAIN)
    assert result.exit_code == 0, result.output
    assert "bits/byte" in result.stdout
    parts = [f"--{name}={out / 'assets' / file}" for name, file in (("target", "target"), ("draft", "draft"))]
    parts += [f"--ngram={out / 'assets' / 'ngram.safetensors'}", "--device=cpu"]
    assert run_json("generate", "def ", "-n", "8", *parts)["text"]
    again = run("train", "--out", str(out), *TRAIN, "--json")
    stages = [json.loads(line) for line in again.stdout.splitlines()]
    assert all(stage["skipped"] for stage in stages) and "pretraining" in [stage["stage"] for stage in stages]
    other = [*TRAIN, "--pretraining-tokens", "0"]  # without that stage: another run
    assert_error(run("train", "--out", str(out), *other), "pretraining_fit")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--preset", "huge"], "huge"),
        (["--source", "no such folder"], "no such folder"),
        (["--target-tokens", "0"], "--target-tokens"),
        (["--target-seconds", "0"], "--target-seconds"),
        (["--pretraining-seconds", "-1"], "--pretraining-seconds"),
        (["--draft-seconds", "5", "--draft-tokens", "9000"], "not both"),
        (["--vocab-size", "5"], "257"),
        (["--device", "abacus"], "abacus"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else None,
)
def test_train_errors_are_one_line(tmp_path, arguments, part):
    assert_error(run("train", "--out", str(tmp_path / "run"), "--preset", "tiny", *arguments), part)


@pytest.mark.slow
def test_tune_tree(tmp_path, monkeypatch):
    """The embedded pair, briefly: the table, the JSON, and a file that can be used."""
    from stagedspec.planning.profile import Tuning

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "tree.json"
    prompts.write_text('{"prompt": "import os\\n"}\n\n{"prompt": "def f(x):\\n"}\n')
    options = ["tune-tree", "--device", "cpu", "--prompts", str(prompts), "-n", "8", "--out", str(out)]
    result = CliRunner().invoke(app, [*options, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["identical"] and report["saved"] == str(out) and len(report["measured"]) == 8
    assert Tuning.load(out).trees["staged", 1, False][-1].nodes == next(
        entry["tree"]["nodes"] for entry in report["trees"] if entry["mode"] == "staged" and not entry["sampled"]
    )
    table = CliRunner().invoke(app, options)
    assert table.exit_code == 0 and "staged, sampled" in table.stdout and "Saved in" in table.stdout


@pytest.mark.parametrize("content", ["", "{}", '{"prompt": 3}', "text"])
def test_tune_tree_with_bad_prompts(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    result = CliRunner().invoke(app, ["tune-tree", "--prompts", str(path)])
    assert result.exit_code == 2 and "prompt" in result.stderr


def test_trees_from_a_file(models, tmp_path):
    """What tune-tree wrote for these models; together with single settings it is refused."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "trees.json"
    prompts.write_text('{"prompt": "import os\\n"}\n')
    assert run("tune-tree", *models, "--prompts", str(prompts), "-n", "8", "--out", str(out)).exit_code == 0
    found = run_json("generate", "import", *models, "--tree", str(out), "-n", "8")
    assert found["stats"]["mode"] == "staged"
    assert_error(run("generate", "import", *models, "--tree", str(out), "--nodes", "4"), "leave out --nodes, or --tree")
    assert_error(run("demo", *models, "--tree", str(tmp_path / "none.json")), "none.json")


def test_lists_take_a_line():
    value = {"a": [1, 2], "text": "[\n  1,  2]", "parts": ["x,\n  y", "]["], "of": [[1], {"b": []}, [2.5, None]]}
    text = output.as_lines(value)
    assert json.loads(text) == value
    assert '"a": [1, 2],' in text and "[2.5, null]" in text


def test_compiling_shows_on_a_terminal(monkeypatch):
    shown = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(output, "Console", lambda **_: shown)
    with output.preparing():
        progress.current.get()(3, 40)
        time.sleep(0.3)
    assert progress.current.get() is None
    assert "compiling GPU kernels: 3 of 40 are ready" in shown.file.getvalue()
