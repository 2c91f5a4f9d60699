"""Wrong options are refused before torch, transformers or a model is loaded."""

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from test_cli import assert_error, models, one_thread, run, run_json  # noqa: F401 (fixtures)

from stagedspec import decoder
from stagedspec.cli import app, early_checks, generate, tune_tree
from stagedspec.kernels.backends import select as backend
from stagedspec.models import embedded
from stagedspec.training import recipe

TARGET = str(embedded.TARGET)
FILE, FOLDER = __file__, str(embedded.TARGET.parent)

REFUSED = [
    ("generate x -n -3", "--max-new-tokens must be at least 1, got -3"),
    ("generate x --temperature 0", "--temperature must be a finite number above 0"),
    ("generate x --sample --temperature nan", "--temperature must be"),
    ("generate x --sample --top-k -1", "--top-k must be"),
    ("generate x --sample --top-p -2", "--top-p must be"),
    ("generate x --sample --min-p -0.5", "--min-p must be"),
    ("generate x --top-k 5", "add --sample"),
    ("generate x --seed 99999999999999999999", "--seed must be an integer of 64 bits"),
    ("generate x --tree banana", "--tree must be a file, one that `stagedspec tune-tree` wrote: cannot read banana"),
    (f"generate x --tree {FOLDER}", "is a folder"),
    (f"generate x --tree {FILE}", "is no JSON"),
    (f"generate x --tree {FILE} --nodes 3", "leave out --nodes, or --tree"),
    ("generate x --nodes 0", "tree nodes must be a whole number of at least 1, got 0"),
    ("generate x --nodes 40 --passes 1", "propose at most"),
    ("generate x --target /nowhere", "target: no checkpoint folder at '/nowhere'"),
    (f"generate x --target {FILE}", "is a file; expected a folder"),
    (f"generate x --target {FOLDER}", "has no config.json"),
    ("generate x --target none/such", "the model hub cannot be reached"),
    ("generate x --target", None),
    (f"generate x --target {TARGET} --draft /nowhere", "draft: no checkpoint folder at '/nowhere'"),
    (f"generate x --target {TARGET}", "staged: a mode that drafts needs a draft model: add --draft, or choose"),
    (f"demo --target {TARGET}", "chain, tree, staged: a mode that drafts needs a draft model: add --draft"),
    (f"tune-tree --target {TARGET}", "needs a draft model"),
    ("generate x --draft some", "add --target"),
    (f"generate x --target {TARGET} --ngram /nowhere", "--ngram must be a file"),
    ("generate x --device tpu", "--device must be auto, cpu, or a GPU such as cuda or cuda:1, got 'tpu'"),
    ("generate x --device cpu:7", "--device must be"),
    ("generate x --dtype int8", "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    ("generate x --backend jax", "--backend must be one of auto, torch, triton, got 'jax'"),
    ("generate x --mode fast", None),
    ("generate x --save-html /nowhere/x.html", "the folder /nowhere does not exist"),
    (f"generate x --save-html {FOLDER}", "is a folder"),
    ("generate x --save-html /proc/x.html", "cannot write /proc/x.html"),
    ("generate --file /nowhere", "no such file: /nowhere"),
    ("generate --prompts /nowhere --out x", "--prompts must be a file, JSON lines: cannot read /nowhere"),
    (f"generate --prompts {FILE} --out x", "line 1 is no JSON"),
    (f"generate --prompts {FILE}", "add --out"),
    (f"generate x --prompts {FILE} --out x", "both a prompt and --prompts"),
    (f"generate --prompts {FILE} --out x --batch 17", "a batch must have 1 to 16 rows"),
    ("demo --max-new-tokens 0", "--max-new-tokens must be at least 1, got 0"),
    ("demo --seed 99999999999999999999", "--seed must be"),
    ("demo --device x", "--device must be"),
    ("fit-ngram --out /proc/x", "cannot write /proc/x"),
    (f"fit-ngram --out {FOLDER}", "is a folder"),
    ("fit-ngram --out x --tokens 0", "--tokens must be at least 1, got 0"),
    ("fit-ngram --out x --batch -1", "--batch must be at least 1, got -1"),
    ("fit-ngram --out x --temperature 0", "--temperature must be"),
    ("fit-ngram --out x --text /nowhere", "cannot read /nowhere"),
    ("fit-ngram --out x --draft /nowhere", "draft: no checkpoint folder at '/nowhere'"),
    ("fit-ngram --out x --tokenizer y", "add --text"),
    (f"fit-ngram --out x --work-dir {FILE}", "--work-dir must be a folder"),
    ("tune-tree --out /nowhere/x", "the folder /nowhere does not exist"),
    ("tune-tree --prompts /nowhere", "cannot read /nowhere"),
    (f"tune-tree --prompts {FILE}", "must hold JSON lines"),
    ("tune-tree -n 3", None),
    ("warm-up --tokens 1", "--tokens must be at least 2, got 1"),
    ("warm-up --no-greedy --no-sample", "nothing to prepare"),
    ("warm-up --top-p -3", "--top-p must be"),
    ("tune --op softmax", "--op must be one of linear, lm_head"),
    ("tune --model /nowhere", "/nowhere"),
    ("tune --device x", "--device must be"),
    ("check --mode x", "--mode must be one of"),
    (f"check --out {FILE}", "--out must be a folder"),
    ("train --out x --preset huge", "--preset must be one of embedded, embedded-cpu, tiny, gpt2-large, got 'huge'"),
    (f"train --out {FILE}", "--out must be a folder"),
    ("train --out x --source nowhere", "source 'nowhere' is neither 'stdlib', a folder, nor an installed package"),
    ("train --out x --seed 99999999999999999999999", "--seed must be an integer of 64 bits"),
    ("train --out x --vocab-size 5", "--vocab-size must be at least 257, got 5"),
    ("train --out x --evaluate-every 0", "--evaluate-every must be at least 1, got 0"),
    ("generate x -n 513", "--max-new-tokens can be at most 512, the target's n_positions, got 513"),
    ("demo --max-new-tokens 100000", "--max-new-tokens can be at most 512"),
    (f"tune-tree -n 100000 --target {TARGET} --draft {TARGET}", "--max-new-tokens can be at most 512"),
    ("warm-up --device cpu", "prepares GPU kernels, but the device is cpu"),
    ("warm-up --backend torch", "backend torch has none"),
    ("tune --device cpu", "tuned on a GPU, but the device is cpu"),
    ("generate x --sample --temperature 0", "for greedy decoding leave out --sample, got 0"),
    ("'def f'", "stagedspec generate 'def f'"),
    ("def f", "stagedspec generate 'def f'"),
    ("genrate x", "Did you mean 'generate'"),
]

ALL = """
import json, shlex, sys
from typer.testing import CliRunner
from stagedspec.cli import app
for line in json.load(sys.stdin):
    result = CliRunner().invoke(app, shlex.split(line))
    heavy = {"torch", "triton", "transformers"} & set(sys.modules)
    print(json.dumps([result.exit_code, result.stderr, sorted(heavy)]))
"""


def test_wrong_options_are_refused_before_anything_is_imported(tmp_path):
    import json

    given = json.dumps([line for line, _ in REFUSED])
    done = subprocess.run(
        [sys.executable, "-c", ALL], input=given, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    for (line, part), answer in zip(REFUSED, done.stdout.splitlines(), strict=True):
        status, said, heavy = json.loads(answer)
        assert (status, heavy) == (2, []), line
        assert part is None or part in " ".join(said.replace("│", " ").split()), (line, said)
        assert not said.startswith("error: ") or len(said.splitlines()) == 1, line
    assert not list(tmp_path.iterdir())  # trying whether a file can be written leaves none


@pytest.mark.parametrize("arguments", ["generate x --backend triton", "warm-up", "warm-up --backend torch"])
def test_no_model_is_loaded_for_a_backend_that_cannot_run(monkeypatch, arguments):
    monkeypatch.setattr(decoder.Decoder, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(backend, "_triton_problem", lambda *_: "no GPU here")
    assert_error(run(*arguments.split(), "--device", "cpu"), "GPU")


def test_the_words_are_the_library_s():
    from stagedspec.tuning import kernels as tune_kernels

    assert set(early_checks.PRESETS) == set(recipe.PRESETS) and list(early_checks.OPERATIONS) == list(
        tune_kernels.PROBLEMS
    )
    assert isinstance(app, typer.Typer)


def test_parts_of_a_target_need_a_target():
    for parts in (("draft", None), (None, Path("table.safetensors"))):
        with pytest.raises(ValueError, match="belong to a target: add --target"):
            early_checks.check_models(None, *parts, "cpu", "auto", "torch")


def test_only_modes_that_draft_need_a_draft():
    options = {"draft": None, "ngram": None, "device": "cpu", "dtype": "auto", "backend": "torch"}
    early_checks.check_models(str(embedded.TARGET), **options, modes=("autoregressive",))
    with pytest.raises(ValueError, match=r"^chain, tree: a mode that drafts needs a draft model: add --draft$"):
        early_checks.check_models(str(embedded.TARGET), **options, modes=("autoregressive", "chain", "tree"))


@pytest.mark.parametrize("device", ["cpu:1", "cuda:", "gpu", "cuda:1x"])
def test_devices_that_do_not_exist(device):
    with pytest.raises(ValueError, match=f"--device must be .*, got '{device}'"):
        early_checks.check_device(device)
    early_checks.check_device("cpu:0")


def test_what_is_no_file_is_not_opened(tmp_path):
    """Opening a pipe consumes what it holds, or waits; a socket cannot be opened at all."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        early_checks.check_output(path, "--out")
        early_checks.check_input(path, "--prompts", "text")


def test_outputs_that_can_be_written(tmp_path):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new", "/dev/null"):
        early_checks.check_output(tmp_path / name, "--out")
    early_checks.check_output(tmp_path / "a" / "b" / "new", "--out", make_folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "old"


# ---------------------------------------------------------------- lengths that the model has room for


def test_generate_makes_as_many_tokens_as_there_is_room_for(models):  # noqa: F811
    prompt = "import os\n" * 30
    out = run_json("generate", prompt, *models)
    assert 1 <= out["settings"]["max_new_tokens"] < 128
    assert_error(run("generate", prompt, "-n", "128", *models), "n_positions", "at most")
    assert_error(run("generate", prompt * 9, *models), "n_positions", "shorten the prompt")
    assert run_json("generate", "x", *models)["settings"]["max_new_tokens"] == 128


def test_new_tokens_at_most_as_many_as_positions():
    early_checks.check_new_tokens(None, 512)  # the embedded target's
    with pytest.raises(ValueError, match=r"--max-new-tokens can be at most 512, .* got 513"):
        early_checks.check_new_tokens(None, 513)


class Row(dict):
    def __init__(self, predicted, measured, mode="tree", sampled=False):
        super().__init__(predicted_speedup=predicted, measured_speedup=measured, mode=mode, sampled=sampled, batch=1)


def test_predictions_that_are_far_off_are_told():
    fine = [Row(2.0, 1.5), Row(1.0, 1.0), Row(3.0, None), Row(1.2, 2.0)]
    assert tune_tree._far_from_predicted(fine) == []
    found = tune_tree._far_from_predicted([*fine, Row(3.91, 1.11, "staged"), Row(1.0, 2.5, "chain", True)])
    assert found == ["staged, 1 rows: 3.91x predicted, 1.11x measured", "chain, sampled, 1 rows: 1.00x predicted, 2.50x measured"]  # fmt: skip  # noqa: E501


def test_statistics_end_at_the_last_depth_that_was_reached(capsys):
    generate._print_stats({"accepted_per_depth": [5, 0, 2] + [0] * 30, "adapted": {}, "overhead": None, "steps": 0})
    said = " ".join(capsys.readouterr().err.split())
    assert said == "accepted per depth 5, 0, 2 steps 0"


@pytest.mark.parametrize(
    ("given", "longest", "new"), [([], 20, 20), (["-n", "8"], 32, 8), (["-n", "20"], 20, 20)], ids=["usual", "8", "20"]
)
def test_tune_tree_cuts_prompts_to_make_room(tmp_path, monkeypatch, given, longest, new):
    folder = small_model(tmp_path)
    seen = []
    monkeypatch.setattr("stagedspec.tuning.trees.tune", lambda *arguments: seen.append(arguments) or refuse())
    assert_error(run("tune-tree", "--target", folder, "--draft", folder, "--device", "cpu", *given), "seen")
    _, prompts, new_tokens, *_ = seen[0]
    assert (max(map(len, prompts)), new_tokens) == (longest, new)


def test_tune_tree_without_room(tmp_path):
    folder = small_model(tmp_path)
    refused = run("tune-tree", "--target", folder, "--draft", folder, "--device", "cpu", "-n", "21")
    assert_error(refused, "room for 20 new tokens, got 21; lower --max-new-tokens")


def refuse():
    raise ValueError("seen")


def small_model(folder) -> str:
    """A model of 40 positions with a tokenizer of bytes."""
    from helpers import byte_tokenizer, make_gpt2
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    make_gpt2(0, n_layer=1, n_positions=40, vocab_size=len(alphabet)).save_pretrained(folder)
    byte_tokenizer(alphabet).save_pretrained(folder)
    return str(folder)


def test_measuring_says_so_in_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("stagedspec.planning.cost.BUDGET", 0.001)
    folder = small_model(tmp_path / "model")

    def said(batch: int, do_sample: bool = False) -> list[str]:
        caplog.clear()
        made = decoder.Decoder.from_pretrained(folder, draft=folder, device="cpu")
        for mode in ("chain", "staged", "staged"):
            made.tree_for(mode, batch, do_sample=do_sample)
        return [record.message for record in caplog.records]

    line = "measuring model passes to choose token trees"
    assert said(1) == [f"{line} (greedy, batch 1): a few seconds, kept for later"] and said(1) == []
    assert said(3) == [f"{line} (greedy, batch 3): a few seconds, kept for later"] and said(1, True) == [
        f"{line} (sampled, batch 1): a few seconds, kept for later"
    ]


def test_no_gpu_by_torchs_version_alone(tmp_path, monkeypatch):
    """What torch was built for stands in a file that can be read in no time; a driver may be missing all the same."""
    seen = []

    def there(version: str, driver: bool) -> bool:
        (tmp_path / "version.py").write_text(version, encoding="utf-8")
        monkeypatch.setattr(
            early_checks, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        )

        def load(name):
            seen.append(name)
            if not driver:
                raise OSError(name)

        monkeypatch.setattr(early_checks.ctypes, "CDLL", load)
        early_checks.no_gpu.cache_clear()
        return early_checks.no_gpu()

    none = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
    cuda = none.replace("cuda: Optional[str] = None", "cuda: Optional[str] = '13.0'")
    try:
        assert there(none, driver=True) and not seen
        assert there(cuda, driver=False) == (sys.platform == "linux")
        assert not there(cuda, driver=True)
        assert not there(none.replace("hip: Optional[str] = None", "hip = '6.4'"), driver=False)  # torch looks itself
        monkeypatch.setattr(early_checks, "find_spec", lambda name: None)
        early_checks.no_gpu.cache_clear()
        assert not early_checks.no_gpu()
    finally:
        early_checks.no_gpu.cache_clear()
