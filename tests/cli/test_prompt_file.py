"""`stagedspec generate --prompts`: files of prompts and of completions, and runs that go on with earlier ones."""

import codecs
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from test_cli import assert_error, models, one_thread, run  # noqa: F401 (fixtures)

from stagedspec import Decoder, row_seed
from stagedspec.cli import generate, many, prompt_file

TEXTS = ["def read(", "import os", "x", "with open(path) as file:\n", "return", "", "os.", "x" * 400, "file"]
OPTIONS = ["-n", "12", "--batch", "3", "--mode", "autoregressive"]
SAMPLED = [*OPTIONS, "--sample", "--top-k", "20", "--seed", "4", "--num-samples", "2"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text, "name": f"task/{index}"}) + "\n" for index, text in enumerate(TEXTS)]
    path.write_text("\n".join(lines))  # with empty lines between them
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def complete(prompts, out, *options: str, **more):
    return run("generate", "--prompts", str(prompts), "--out", str(out), *options, **more)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_every_sample_in_the_order_of_the_prompts(models, prompts, out, caplog):  # noqa: F811
    result = complete(prompts, out, *SAMPLED, "--id-field", "name", "--token-ids", *models)
    assert result.exit_code == 0, result.output
    assert "18 completions, 2 prompts skipped" in result.stdout
    for name in ("'task/5' in line 11", "'task/7' in line 15"):
        assert caplog.text.count(f"prompt {name} is skipped: ") == 1  # not once a sample
    found = lines(out)
    assert [(one["index"], one["sample"]) for one in found] == [(i, s) for i in range(len(TEXTS)) for s in range(2)]
    decoder = Decoder.from_pretrained(models[1], draft=models[3], device="cpu")
    for one in found:
        assert one["name"] == f"task/{one['index']}" and one["seed"] == row_seed(4, one["index"], one["sample"])
        if one["index"] in (5, 7):
            assert one["finish_reason"] == "skipped" and one["text"] == "" and one["error"]
            continue
        sampling = {"do_sample": True, "top_k": 20, "seed": one["seed"], "mode": "autoregressive"}
        alone = decoder.complete(TEXTS[one["index"]], 12, **sampling)
        assert (one["text"], one["tokens"], one["finish_reason"]) == (alone.text, alone.tokens, alone.finish_reason)
        assert one["stats"]["new_tokens"] == len(one["tokens"]) and set(one["stats"]) == set(many.STATS)
    again = complete(prompts, out, *SAMPLED, "--id-field", "name", "--token-ids", *models)
    assert again.exit_code == 0 and "all 18 completions are there" in again.stdout and lines(out) == found


def test_gzip_and_other_fields(models, tmp_path, out):  # noqa: F811
    path = tmp_path / "prompts.jsonl.gz"
    lines_of = b'{"code": "import os", "id": 7}\r\n{"code": "x", "id": 8}'  # as editors on Windows write it
    path.write_bytes(gzip.compress(codecs.BOM_UTF8 + lines_of))
    more = ["--field", "code", "--id-field", "id", "--text-field", "completion"]
    assert complete(path, out, *OPTIONS, *more, *models).exit_code == 0
    assert [(one["id"], len(one["completion"]) > 0) for one in lines(out)] == [(7, True), (8, True)]
    assert "seed" not in lines(out)[0] and "text" not in lines(out)[0]


def test_text_ends_before_the_stop_string(models, prompts, out, tmp_path):  # noqa: F811
    assert complete(prompts, out, *OPTIONS, *models).exit_code == 0
    free = {one["index"]: one["text"] for one in lines(out)}
    stop = free[0][4:6]
    assert complete(prompts, tmp_path / "b", *OPTIONS, "--stop", stop.replace("\n", "\\n"), *models).exit_code == 0
    found = {one["index"]: one for one in lines(tmp_path / "b")}
    assert found[0]["text"] == free[0][: free[0].index(stop)] and found[0]["finish_reason"] == "stop"
    assert any(one["finish_reason"] == "length" and one["text"] == free[index] for index, one in found.items())


def test_before_stop():
    assert many.before_stop("a\n", "def b", ["\ndef"]) == ""  # it began in the prompt
    assert many.before_stop("\ndef a", " b\ndef c\nclass", ["\nclass", "\ndef"]) == " b"
    assert many.before_stop("\ndef", "x", ["\ndef"]) == "x" and many.before_stop("", "abc", []) == "abc"


# ---------------------------------------------------------------- runs that go on


@pytest.fixture
def whole(models, prompts, tmp_path):  # noqa: F811
    """What an uninterrupted run writes, without its times."""
    path = tmp_path / "whole.jsonl"
    assert complete(prompts, path, *SAMPLED, *models).exit_code == 0
    return without_times(path)


def without_times(path) -> list[dict]:
    found = lines(path)
    for one in found:
        one.get("stats", {}).pop("total_seconds", None)
    return found


def test_a_run_that_was_killed_goes_on(models, prompts, out, whole, monkeypatch):  # noqa: F811
    """Wherever its last line was cut off; what is there is not done again."""
    assert complete(prompts, out, *SAMPLED, *models).exit_code == 0
    held = out.read_bytes()
    ends = [index + 1 for index, byte in enumerate(held) if byte == ord("\n")]
    made = []
    line = many._line
    monkeypatch.setattr(many, "_line", lambda one, *rest: made.append((one.index, one.sample)) or line(one, *rest))
    for cut in (ends[4], ends[4] + 1, ends[5] - 1, ends[0] - 3, 0):
        out.write_bytes(held[:cut])
        whole_lines = held[: held.rfind(b"\n", 0, cut) + 1].splitlines()
        kept = [(one["index"], one["sample"]) for one in map(json.loads, whole_lines)]
        made.clear()
        result = complete(prompts, out, *SAMPLED, "--batch", "5", *models)  # the batch decides nothing
        assert result.exit_code == 0, result.output
        assert without_times(out) == whole
        assert sorted(made + kept) == [(one["index"], one["sample"]) for one in whole]


@pytest.mark.parametrize("fault", ["disk", "key"])
def test_what_was_finished_is_kept(models, prompts, out, whole, monkeypatch, fault):  # noqa: F811
    """On a full disk, which takes half of a line, and on Ctrl-C."""
    write, count = os.write, []

    def failing(file, data):
        count.append(len(data))
        if len(count) == 7:
            if fault == "key":
                raise KeyboardInterrupt
            return write(file, data[: len(data) // 2])
        if len(count) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(prompt_file.os, "write", failing)
        result = complete(prompts, out, *SAMPLED, *models)
    if fault == "disk":
        assert_error(
            result, f"cannot write {out}: No space left on device; 6 completions are kept, and the same command goes on"
        )
    else:
        assert result.exit_code == 130
        assert f"interrupted: 6 of 18 completions are in {out}; the same command goes on" in result.stderr
    assert len(lines(out)) == 6
    assert complete(prompts, out, *SAMPLED, *models).exit_code == 0
    assert without_times(out) == whole


def test_one_run_at_a_time(models, prompts, out, tmp_path):  # noqa: F811
    """The lock is the operating system's: a run that was killed holds none."""
    lock = tmp_path / "out.jsonl.lock"
    with FileLock(lock):
        assert_error(
            complete(prompts, out, *OPTIONS, *models), f"another run is writing {out}: wait until it has ended"
        )
        assert not out.exists()
    killed = "import filelock, os, sys; filelock.FileLock(sys.argv[1]).acquire(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", killed, str(lock)]).returncode == -9
    assert complete(prompts, out, *OPTIONS, *models).exit_code == 0
    with FileLock(lock, timeout=0):  # it was given back, as after an error
        pass
    assert_error(complete(prompts, out, *OPTIONS, "-n", "3", *models), "was begun with")
    with FileLock(lock, timeout=0):
        pass


def test_a_disk_that_is_full_from_the_start(models, prompts, out, monkeypatch):  # noqa: F811
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prompt_file, "write_text", full)
    result = complete(prompts, out, *OPTIONS, *models)
    assert_error(result, f"cannot write {out}: No space left on device; 0 completions are kept")


def test_other_settings_are_refused(models, prompts, out, tmp_path):  # noqa: F811
    options = [*OPTIONS, "--sample", "--seed", "3", *models]
    assert complete(prompts, out, *options).exit_code == 0
    held = out.read_bytes()
    for more, part in (
        (["--seed", "4"], "was begun with seed 3, and this run has seed 4"),
        (["--temperature", "0.5"], "was begun with temperature null, and this run has temperature 0.5"),
        (["-n", "13"], "max new tokens 12"),
        (["--num-samples", "3"], "num samples 1"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--stop", "x"], "stop"),
    ):
        assert_error(complete(prompts, out, *options, *more), part, "choose another file")
    prompts.write_text(prompts.read_text().replace("import os", "import sys"))
    assert_error(complete(prompts, out, *options), "other prompts")
    assert out.read_bytes() == held
    settings = out.with_name("out.jsonl.run.json")
    settings.write_text("[")
    assert_error(complete(prompts, out, *options), "cannot be read as settings", "remove it")
    settings.unlink()
    assert_error(complete(prompts, out, *options), "was not written by this command")
    assert out.read_bytes() == held


def test_other_weights_in_the_same_folder_are_refused(models, prompts, out, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "target"
    shutil.copytree(models[1], folder)
    options = [*OPTIONS, "--draft", models[3], "--device", "cpu"]
    assert complete(prompts, out, *options, "--target", str(folder)).exit_code == 0
    held = out.read_bytes()
    half = held[: held.index(b"\n") + 1]
    out.write_bytes(half)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    middle = len(whole) // 2
    weights.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert_error(complete(prompts, out, *options, "--target", str(folder)), "was begun with other weights (")
    assert out.read_bytes() == half
    weights.write_bytes(whole)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    for name in ("target", "./target", "link"):  # the same folder
        out.write_bytes(half)
        assert complete(prompts, out, *options, "--target", name).exit_code == 0
        assert [one["text"] for one in lines(out)] == [json.loads(line)["text"] for line in held.splitlines()]


def test_a_link_is_the_file_that_it_leads_to(models, prompts, out, whole, tmp_path, monkeypatch):  # noqa: F811
    """The same lock and settings by both names, and a run that is killed while it sorts loses nothing."""
    link = tmp_path / "link"
    link.symlink_to(out)

    def killed(path, data):
        assert path.resolve() != out, "the completions themselves were opened for writing"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        assert complete(prompts, link, *SAMPLED, *models).exit_code == 130
    assert link.is_symlink() and len(lines(out)) == len(whole)
    with FileLock(tmp_path / "out.jsonl.lock"):
        assert_error(complete(prompts, link, *SAMPLED, *models), f"another run is writing {out}")
    assert complete(prompts, out, *SAMPLED, *models).exit_code == 0 and without_times(out) == whole
    assert complete(prompts, link, *SAMPLED, *models).exit_code == 0 and link.is_symlink()
    assert not list(tmp_path.glob("link?*"))


@pytest.mark.parametrize("end", [".run.json", ".lock", ".part", ".run.json.part"])
def test_no_file_beside_the_completions_is_the_prompts(prompts, out, end):
    beside = out.with_name(out.name + end)
    held = prompts.read_bytes()
    beside.write_bytes(held)
    assert_error(complete(beside, out), f"--out and --prompts are the same file, {beside}: a run with --out {out}")
    if not end.endswith(".part"):
        assert_error(complete(prompts, out), f"{beside} ", "choose another file, or remove it")
    assert beside.read_bytes() == held and not out.exists()


# ---------------------------------------------------------------- bad input


BAD_FILES = [
    ("", "there are no prompts"),
    ("\n \n", "there are no prompts"),
    ('{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON: Expecting value at character 12"),
    ('{"prompt": "a"}\n\n["b"]\n', "line 3 is of type list"),
    ('{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no field 'prompt'; it has 'text'"),
    ('{"prompt": "a"}\n{"prompt": 3}\n', "'prompt' of line 2 must be text, got int"),
    (b'{"prompt": "\xff"}\n', "line 1 is not UTF-8 text"),
    ('{"prompt": "a", "id": 1}\n{"prompt": "b"}', "line 2 has no field 'id'"),
    (
        '{"prompt": "a", "id": 1}\n\n{"prompt": "b", "id": 2}\n{"prompt": "c", "id": 1}',
        "lines 1 and 4 both have the id 1",
    ),
    ('{"prompt": "a", "id": [1]}', "'id' of line 1 must be text or a whole number, got list"),
]


@pytest.mark.parametrize(("content", "part"), BAD_FILES, ids=[part[:30] for _, part in BAD_FILES])
def test_bad_files_of_prompts(tmp_path, out, monkeypatch, content, part):
    monkeypatch.setattr(generate, "load_decoder", lambda *_, **__: pytest.fail("a model was loaded"))
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_error(complete(path, out, *(["--id-field", "id"] if "id" in str(content) else [])), part)
    assert not out.exists()


def test_bad_places(tmp_path, prompts, out, monkeypatch):
    monkeypatch.setattr(generate, "load_decoder", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "bad.jsonl.gz").write_text("plain")
    os.link(prompts, tmp_path / "link.jsonl")
    for arguments, part in (
        ((prompts, tmp_path), "is a folder"),
        ((prompts, "/nowhere/x"), "does not exist"),
        ((prompts, "/proc/x"), "cannot write /proc/x"),
        ((prompts, "/dev/null"), "must be a regular file"),
        ((prompts, tmp_path / "link.jsonl"), "are the same file"),
        ((prompts, tmp_path / "x.gz"), "leave out .gz"),
        ((tmp_path / "no", out), "cannot read"),
        ((tmp_path, out), "is a folder"),
        ((tmp_path / "bad.jsonl.gz", out), "cannot read prompts"),
        ((prompts, out, "--text-field", "stats"), "--text-field stats is the name of another field"),
        ((prompts, out, "--id-field", "text"), "--id-field text is the name of another field"),
        ((prompts, out, "--json"), "both --json and --prompts"),
        ((prompts, out, "a prompt"), "both a prompt and --prompts"),
        ((prompts, out, "--batch", "17"), "16 rows (up to 64 in the mode 'autoregressive'), got 17"),
        ((prompts, out, "--num-samples", "0"), "--num-samples must be at least 1"),
        ((prompts, out, "--stop", ""), "--stop must not be empty"),
        ((prompts, out, "--draft", "x"), "add --target"),
    ):
        assert_error(complete(*arguments), part)
    assert_error(run("generate", "--prompts", str(prompts)), "add --out")
    for option in (
        ["--out", str(out)], ["--field", "x"], ["--id-field", "x"], ["--text-field", "x"], ["--num-samples", "2"],
        ["--stop", "x"], ["--batch", "3"], ["--token-ids"],
    ):  # fmt: skip
        assert_error(run("generate", "x", *option), f"{option[0]} belongs to a file of prompts: add --prompts")
    assert not out.exists()
    out.with_name("out.jsonl.run.json").write_text("{}")
    once = '{"index": 0, "sample": 0}\n'
    for content, number in (('{"index": 0}\n', 1), (once + once, 2)):
        out.write_text(content)
        assert_error(complete(prompts, out), f"line {number} of", "is not one that this command wrote")
