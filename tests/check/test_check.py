"""`stagedspec check`: what it finds, what it records, and what "auto" makes of the record; logits of two decoders."""

import json
import re
import warnings
from contextvars import copy_context
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_draft, make_gpt2, random_prompts
from triton.errors import TritonError
from typer.testing import CliRunner

from stagedspec import Decoder, TreeConfig, check
from stagedspec.check import kernels as check_kernels
from stagedspec.check import suite
from stagedspec.check import trees as check_trees
from stagedspec.check.logits import compare_logits, logits_function
from stagedspec.cli import app
from stagedspec.kernels import choose, compact, embed, grow_tree, linear, lm_head
from stagedspec.kernels import tree_attention as attention
from stagedspec.kernels.backends import select as backend
from stagedspec.kernels.backends.triton_backend import WINDOW
from stagedspec.kernels.common import launch_configs as configs
from stagedspec.kernels.common import registry, trusted
from stagedspec.kernels.state import device
from stagedspec.tuning import workloads

TREE = TreeConfig(nodes=4, depth=2, passes=2, width=1, children=3, prefetch=1, prefetch_width=1)
PROMPTS = [[1, 2, 3], [5, 6]]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Few rows, a small tree and few tokens: the interpreter is slow. A cache folder without records."""
    for module, values in (
        (suite, {"TREE": TREE, "NEW_TOKENS": 3, "_prompts": lambda decoder: PROMPTS}),
        (check_kernels, {"ROWS": (1, 3), "WIDE_ROWS": (1, 3, 17), "CONTEXT": 20}),
        (check_trees, {"CONTEXT": 20, "LENGTHS": (5, 3)}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def decoder(device):
    target = make_gpt2(0, n_layer=1, n_head=2)
    return Decoder.from_pretrained(
        target, draft=make_draft("good", target), backend="triton", device=device, dtype="float32"
    )


# ---------------------------------------------------------------- the whole of it


def command(*arguments: str):
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.mark.slow
def test_the_command_checks_everything_and_records_it(decoder, fixed_order, monkeypatch, tmp_path):
    monkeypatch.setattr("stagedspec.cli.check.load_decoder", lambda *_, **__: decoder)
    # Some of the samplings: the interpreter takes a minute for all of them.
    monkeypatch.setattr(
        suite, "SAMPLINGS", {name: suite.SAMPLINGS[name] for name in suite.SAMPLINGS if "top-k" in name}
    )
    monkeypatch.setattr(suite, "WARPINGS", ("greedy", "top-p"))
    shown = command("--out", str(tmp_path / "records"), "--device", str(decoder.device), "--json")
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    assert report["passed"] and all(result["passed"] for result in report["checks"])
    names = {result["name"] for result in report["checks"]}
    assert len(names) == len(report["checks"]) == 28 + 1 + 4
    assert {"target: tree attention", "draft: head, children, top-p", "verification and commit"} < names
    assert {"target: logits of passes", "decoding: staged, top-k 50"} < names
    setup = trusted.Setup.of(decoder.device)
    assert report["saved"] == str(trusted.file_of(setup, tmp_path / "records"))
    assert trusted.missing(setup, 12, torch.float32, tmp_path / "records") == ""


def canned(passed: bool):
    return lambda *_, **__: [check.Result("a kernel", "3x4", passed, "a remark")]


def test_a_failure_ends_the_trust(decoder, monkeypatch, tmp_path):
    monkeypatch.setattr("stagedspec.cli.check.load_decoder", lambda *_, **__: decoder)
    folder, options = tmp_path / "records", ["--out", str(tmp_path / "records"), "--device", str(decoder.device)]
    monkeypatch.setattr(check, "check", canned(True))
    shown = command(*options)
    assert shown.exit_code == 0 and "All 1 checks passed" in shown.output and len(list(folder.iterdir())) == 1
    monkeypatch.setattr(check, "check", canned(False))
    shown = command(*options)
    assert shown.exit_code == 1 and "1 of 1 checks FAILED" in shown.output and "a remark" in shown.output
    assert list(folder.iterdir()) == []


def test_nothing_is_recorded_of_some_modes_nor_of_the_interpreter(decoder, monkeypatch, tmp_path):
    monkeypatch.setattr("stagedspec.cli.check.load_decoder", lambda *_, **__: decoder)
    monkeypatch.setattr(check, "check", canned(True))
    shown = command("--out", str(tmp_path / "records"), "--device", str(decoder.device), "--mode", "chain")
    assert shown.exit_code == 0 and "nothing was recorded" in shown.output and not (tmp_path / "records").exists()
    if decoder.device.type == "cpu":
        shown = command("--device", "cpu")
        assert "nothing was recorded" in shown.output and not trusted.default_folder().exists()


def test_errors_are_one_line_and_leave_nothing_behind(decoder, monkeypatch, tmp_path):
    import triton

    def crowded(*_, **__):
        raise torch.OutOfMemoryError("no room for 3 GiB")

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        cpu = command("--device", "cpu")
    place = str(decoder.device)
    (tmp_path / "file").touch()
    shown = {
        "kernels are checked on a GPU, but the device is cpu": cpu,
        "mode must be one of autoregressive, chain, tree, staged, got 'trees'": command("--mode", "trees"),
        "--device must be auto, cpu, or a GPU": command("--device", "gpu"),
        "--out must be a folder": command("--out", str(tmp_path / "file"), "--device", place),
    }
    with monkeypatch.context() as loading:
        for name in ("default", "from_pretrained"):
            loading.setattr(Decoder, name, crowded)
        shown["too little GPU memory for the models: no room"] = command("--device", place)
    monkeypatch.setattr("stagedspec.cli.check.load_decoder", lambda *_, **__: decoder)
    monkeypatch.setattr(check_kernels, "check_embed", crowded)
    shown["too little GPU memory for the check: no room"] = command("--device", place)
    for message, result in shown.items():
        assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1
    assert not trusted.default_folder().exists()


def test_a_decoder_that_cannot_be_checked(decoder, device):
    with pytest.raises(ValueError, match="got a decoder of backend 'torch'"):
        check.check(Decoder.from_pretrained(make_gpt2(0), backend="torch", device=device))
    with pytest.raises(ValueError, match="mode 'chain' needs a draft model"):
        check.check(Decoder.from_pretrained(make_gpt2(0), backend="triton", device=device), ["chain"])
    for prompts in ([], [[1]], [[1, 2], [3] * 48]):
        with pytest.raises(ValueError, match="prompts must have from 2 to 47 tokens"):
            check.check(decoder, prompts=prompts)


# ---------------------------------------------------------------- what it finds


def kernel_cases(decoder) -> dict[str, suite.Case]:
    table = workloads.katz_table(decoder.target.vocab_size, decoder.device)
    return {case.name: case for case in suite._kernel_cases(decoder.target, decoder.draft, table, suite.TREE)}


def last(name, index):
    """Damages one number of an output."""

    def damage(args, kwargs):
        out = kwargs[name] if name else args[index]
        out = out.batch if isinstance(out, grow_tree.Inputs) else out
        out.view(-1)[-1] += 1

    return damage


def one_row(args, kwargs):
    """A pass of one row is computed a little differently."""
    if len(args[0]) == 1:
        args[4].mul_(1 + 1e-6)


def one_node(args, kwargs):
    if args[2].shape[1] == 1:
        args[8].mul_(1 + 1e-6)


def wide_chunk(args, kwargs):
    if args[5] and args[2].shape[1] > WINDOW:
        args[8].mul_(-3)


def short_chunk(args, kwargs):
    if args[5] and args[2].shape[1] <= WINDOW:
        args[8].mul_(1 + 1e-6)


BROKEN = {
    "embed": (embed, "embed", last(None, 4), "target: embedding", "sum of both embeddings"),
    "qkv": (linear, "norm_linear", last(None, 5), "target: norm + qkv", "error .* times that of plain torch"),
    "up": (linear, "norm_linear", last(None, 5), "draft: norm + up + activation", "times that of plain torch"),
    "projection": (linear, "linear_add", last(None, 4), "draft: projection + residual", "times that of plain torch"),
    "sums": (linear, "linear_add", last(None, 5), "target: down + residual", "statistics of the rows"),
    "row": (linear, "linear_add", one_row, "target: down + residual", "bits differ between passes of 1 and 17 rows"),
    "attention": (attention, "tree_attention", last(None, 8), "target: tree attention", "times that of plain torch"),
    "prompt": (attention, "tree_attention", wide_chunk, "target: prompt attention", "times that of plain torch"),
    "chunk": (
        attention,
        "tree_attention",
        short_chunk,
        "draft: prompt attention",
        "chunks of 16 and 39 tokens",
    ),
    "append": (attention, "tree_attention", lambda args, _: args[1][:, 0].add_(1), "target: tree attention", "KV rows"),
    "node": (attention, "tree_attention", one_node, "draft: tree attention", "between passes of 1 and 3 nodes"),
    "logits": (lm_head, "lm_head_choose", last("logits", 0), "target: head, logits", "times that of plain torch"),
    "choice": (lm_head, "lm_head_choose", last("out", 0), "target: head, choice, greedy", "chosen token"),
    "sampled": (lm_head, "lm_head_choose", last("out", 0), "target: head, choice, top-k", "chosen token"),
    "children": (lm_head, "lm_head_topm", last("out_logprobs", 0), "draft: head, children, greedy", "probabilities"),
    "rule": (choose, "choose", last("out", 0), "choice among logits, greedy", "chosen token"),
    "compact": (compact, "compact", lambda args, _: args[0][0, 0, 0].add_(1), "draft: KV rows moved", "cache"),
    "look-up": (workloads, "ngram_lookup", last(None, 5), "n-gram look-up", "what follows"),
    "growth": (grow_tree, "grow_pass", last(None, 8), "tree growth, greedy", "inputs of draft pass 0"),
    "batch": (grow_tree, "harvest_tree", last(None, 7), "tree growth, greedy", "inputs of the target's pass"),
    "harvest": (grow_tree, "harvest_tree", last(None, 6), "tree growth, sampled", "finished tree differs"),
    "verify": (device, "verify_commit", last(None, 4), "verification and commit", "number of accepted tokens"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_is_found_and_named(decoder, fixed_order, monkeypatch, broken):
    module, name, damage, case, remark = BROKEN[broken]
    real = getattr(module, name)

    def wrong(*args, **kwargs):
        real(*args, **kwargs)
        if name != "lm_head_choose" or kwargs.get("logits") is None or broken == "logits":
            damage(args, kwargs)

    found = kernel_cases(decoder)[case]
    monkeypatch.setattr(module, name, wrong)
    result = suite._run(found)
    assert result.name == case and not result.passed
    assert re.search(remark, result.remark), result.remark


@pytest.mark.parametrize(
    ("error", "remark"),
    [
        (TritonError("does not compile\nat line 3"), "does not run: TritonError: at line 3"),
        (RuntimeError("no kernel image"), "does not run: RuntimeError: no kernel image"),
        (torch.AcceleratorError("an illegal access"), "the GPU reported an error: AcceleratorError: an illegal access"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_kernel_that_does_not_run_has_failed(error, remark):
    def run():
        raise error

    assert suite._run(suite.Case("a kernel", "3x4", run)) == check.Result("a kernel", "3x4", False, remark)


def test_nothing_runs_after_an_error_of_the_gpu(decoder, monkeypatch):
    def run():
        raise torch.AcceleratorError("an illegal access")

    monkeypatch.setattr(suite, "_kernel_cases", lambda *_: [suite.Case(name, "", run) for name in "ab"])
    assert [result.name for result in check.check(decoder)] == ["a"]


@pytest.mark.parametrize(
    "name", ["target: down + residual", "draft: tree attention", "target: head, choice, top-k", "n-gram look-up"]
)
def test_a_dry_run_meets_all_kernels(decoder, name):
    """So that they are compiled in parallel before the first check."""
    case = kernel_cases(decoder)[name]

    def launched(dry: bool) -> set:
        found = set()

        def collect(kernel, grid, arguments, options):
            found.add((kernel.__name__, *sorted(options.items())))
            if not dry:
                kernel[grid](*arguments, **options)

        def run():
            registry.collector.set(collect)
            return suite._run(case).passed

        assert copy_context().run(run) != dry
        return found

    assert launched(True) == launched(False) != set()


def test_other_tokens_are_found():
    """A mode that gives another token in a batch, and only there."""

    def generate(ids, mask, max_new_tokens, mode, **options):
        new = torch.arange(max_new_tokens).expand(len(ids), -1).clone()
        if mode == "tree" and len(ids) > 1:
            new[1, 2] = 9
        return torch.cat((ids, new), 1)

    fake = SimpleNamespace(
        generate=generate, target=SimpleNamespace(positions=48), last_stats=SimpleNamespace(tokens_per_step=2.0)
    )
    results = [suite._run(case) for case in suite._decoding_cases(fake, ["chain", "tree"], PROMPTS)]
    assert [result.passed for result in results] == [True, True, False] * 2
    assert results[0].remark == "same tokens, 2.00 a step"
    assert results[2].name == "decoding: tree, greedy"
    assert results[2].remark == "prompt 1 in a batch of 2: new token 2 is another one"


# ---------------------------------------------------------------- the record

SETUP = trusted.Setup("NVIDIA Some GPU", "550.54", "2.13.0", "3.9.0", "0123abcd")


def test_a_record_holds_for_its_heads_and_dtypes(tmp_path):
    assert trusted.missing(SETUP, folder=tmp_path) == "it has not been checked"
    path = trusted.write(SETUP, [64], torch.bfloat16, tmp_path / "new")
    assert path == tmp_path / "new" / "nvidia-some-gpu.json" and [path] == list(path.parent.iterdir())
    trusted.write(SETUP, [64, 80], torch.float16, tmp_path / "new")

    def missing(*arguments):
        return trusted.missing(SETUP, *arguments, folder=tmp_path / "new")

    assert missing() == missing(64) == missing(64, torch.bfloat16) == missing(80, torch.float16) == ""
    assert missing(None, torch.bfloat16) == ""
    assert missing(32) == "it was checked with heads of 64, 80, not 32"
    assert missing(64, torch.float32) == "it was checked in bfloat16, float16, not float32"
    assert missing(80, torch.bfloat16) == "it was checked in float16, not bfloat16"
    trusted.forget(SETUP, tmp_path / "new")
    trusted.forget(SETUP, tmp_path / "new")
    assert missing() == "it has not been checked"


@pytest.mark.parametrize("name", ["gpu", "driver", "torch", "triton", "kernels"])
def test_any_change_ends_the_trust(tmp_path, name):
    """And the next check starts from nothing."""
    trusted.write(SETUP, [64], torch.bfloat16, tmp_path)
    value = "NVIDIA some-gpu" if name == "gpu" else "other"  # GPUs of one file name
    changed = trusted.Setup(**(vars(SETUP) | {name: value}))
    assert trusted.missing(changed, 64, folder=tmp_path) == (
        f"it was checked with {name} {getattr(SETUP, name)}, now {value}"
    )
    trusted.write(changed, [80], torch.bfloat16, tmp_path)
    assert trusted.missing(changed, 80, folder=tmp_path) == ""
    assert trusted.missing(changed, 64, folder=tmp_path) == "it was checked with heads of 80, not 64"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\xff", '{"format": "stagedspec trusted GPU 0"}'])
def test_a_damaged_record_is_ignored_with_a_warning(tmp_path, text):
    path = trusted.write(SETUP, [64], torch.bfloat16, tmp_path)
    path.write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match=r"nvidia-some-gpu.json is damaged and ignored .* `stagedspec check`"):
        assert trusted.missing(SETUP, 64, folder=tmp_path) == "it has not been checked"
    with pytest.warns(UserWarning, match="damaged"):
        trusted.write(SETUP, [64], torch.bfloat16, tmp_path)
    assert trusted.missing(SETUP, 64, folder=tmp_path) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"setup": {"gpu": "NVIDIA Some GPU"}},
        {"setup": vars(SETUP) | {"driver": 550}},
        {"checked": [64]},
        {"checked": {}},
        {"checked": {"64": []}},
        {"checked": {"64": "bfloat16"}},
        {"checked": {"64": [16]}},
    ],
    ids=str,
)
def test_values_of_the_wrong_type_are_damage(tmp_path, change):
    path = trusted.write(SETUP, [64], torch.bfloat16, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.warns(UserWarning, match="damaged"):
        assert trusted.missing(SETUP, 64, folder=tmp_path) == "it has not been checked"


def test_writing_fails_whole(tmp_path, monkeypatch):
    before = trusted.write(SETUP, [64], torch.bfloat16, tmp_path).read_text()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("stagedspec.kernels.common.files.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        trusted.write(SETUP, [80], torch.bfloat16, tmp_path)
    assert [path.read_text() for path in tmp_path.glob("*")] == [before]


def test_the_setup_is_that_of_the_device(device, monkeypatch, tmp_path):
    setup = trusted.Setup.of(device)
    assert setup.torch == torch.__version__ and setup.triton and setup.driver and len(setup.kernels) == 16
    assert setup == trusted.Setup.of(device)
    version = tmp_path / "version"
    monkeypatch.setattr(trusted, "Path", lambda _: version)
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\nGCC version: 12.2")
    assert trusted._driver() == "535.104.05"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build")
    assert trusted._driver() == "570.86.15"


def test_tuned_settings_are_part_of_the_setup(device, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    setups = [trusted.Setup.of(device)]
    for tile in (1, 2):
        configs.write(configs.user_file(setups[0].gpu), setups[0].gpu, {"an operation": {"8x4": {"tile": tile}}})
        setups.append(trusted.Setup.of(device))
    assert len({setup.kernels for setup in setups}) == 3
    assert len({replace(setup, kernels="") for setup in setups}) == 1


@pytest.fixture
def gpu(monkeypatch):
    """An Ada GPU as torch describes it, whose kernels nobody has tried."""
    import triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(backend.torch.version, "hip", None)
    monkeypatch.setattr(backend, "_cannot_build", lambda: "")
    monkeypatch.setattr(trusted.Setup, "of", lambda device: SETUP)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        yield torch.device("cuda", 0)


def test_auto_trusts_a_gpu_that_has_been_checked(gpu, monkeypatch):
    hint = r"\(8, 9\), and it has not been checked; `stagedspec check` with your models makes 'auto' trust this GPU"
    with pytest.warns(UserWarning, match=hint):
        assert backend.resolve("auto", gpu).name == "torch"
    trusted.write(SETUP, [64], torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.resolve("auto", gpu).name == "triton"  # before the models are loaded
        assert backend.resolve("auto", gpu, [64]).name == "triton"
        assert backend.resolve("auto", gpu, [64], torch.bfloat16).name == "triton"
    for arguments, problem in (
        (([80],), "heads of 64, not 80"),
        (([64, 48],), "heads of 64, not 48"),
        (([64], torch.float32), "in bfloat16, not float32"),
    ):
        with pytest.warns(UserWarning, match=problem):
            assert backend.resolve("auto", gpu, *arguments).name == "torch"
    newer = trusted.Setup(**(vars(SETUP) | {"driver": "560.1"}))
    monkeypatch.setattr(trusted.Setup, "of", lambda device: newer)
    with pytest.warns(UserWarning, match=r"checked with driver 550.54, now 560.1; `stagedspec check`"):
        assert backend.resolve("auto", gpu, [64]).name == "torch"
    trusted.file_of(SETUP).write_text("{")
    with pytest.warns(UserWarning) as shown:
        assert backend.resolve("auto", gpu, [64]).name == "torch"
    damaged, untrusted = (str(warning.message) for warning in shown)
    assert "is damaged and ignored" in damaged and "it has not been checked" in untrusted


def test_without_a_home_folder(gpu, decoder, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(trusted, "cache_folder", no_home)
    with pytest.warns(UserWarning, match="it has not been checked"):
        assert backend.resolve("auto", gpu).name == "torch"
    there = SimpleNamespace(device=gpu, target=decoder.target, draft=None)
    with pytest.raises(ValueError, match=r"cannot be kept: Could not determine .* with --out"):
        check.record(there, canned(True)())


# ---------------------------------------------------------------- logits of two decoders


@pytest.fixture(scope="module")
def model():
    return make_gpt2(0)


def test_the_same_bits_however_many_tokens_a_pass_takes(model):
    ours = Decoder.from_pretrained(model, backend="torch", device="cpu", dtype="float32")
    found = compare_logits(ours, ours, random_prompts([9, 30]), tokens_per_pass=(1, 5), positions=16)
    assert found.identical and found.positions == 8 + 16 and str(found) == "the same bits at 24 positions"
    assert compare_logits(ours, ours, random_prompts([40]), (3, 64), 100).positions == 39
    numbers = (np.int64(3), torch.tensor(5)), np.uint8(4)
    assert compare_logits(ours, ours, random_prompts([3]), *numbers).positions == 2


@pytest.mark.parametrize("kind", ["decoder", "transformers"])
def test_nothing_is_left_of_the_prompt_before(kind):
    model = make_gpt2(1)
    side = model if kind == "transformers" else Decoder.from_pretrained(model, device="cpu", dtype="float32")
    first, second = random_prompts([9, 9])
    used = logits_function(side)
    used(first[:6], first[6:])
    for prefix in (second, second[:-1]):  # as long as what was read, and shorter
        torch.testing.assert_close(used(prefix, [3]), logits_function(side)(prefix, [3]))
        used([], first)


def test_logits_against_transformers(model):
    ours = Decoder.from_pretrained(model, backend="torch", device="cpu", dtype="float32")
    found = compare_logits(ours, model, random_prompts([30]), (5, 5))
    assert found.largest < 1e-4 and found.changed == 0
    other = compare_logits(ours, make_gpt2(3), random_prompts([30]))
    assert other.largest > 0.1 and other.differing == 16 and other.changed > 0


def exact(prefix, new):
    """Logits [M, 7] that follow from the tokens up to each position."""
    sums = torch.tensor(prefix + new).cumsum(0)[len(prefix) :]
    return torch.sin(sums[:, None] * torch.arange(1, 8))


def test_the_first_position_that_differs():
    def wrong(prefix, new):
        logits = exact(prefix, new)
        for at, _ in enumerate(new):
            if len(new) > 1 and len(prefix) + at == 3:
                logits[at, 0] += 1e-3
            if len(new) > 1 and len(prefix) + at == 5:
                logits[at, 2] += 50
        return logits

    prompts = [[1, 2], [4, 1, 5, 2, 6, 3, 1]]
    assert compare_logits(exact, exact, prompts).identical
    assert compare_logits(wrong, wrong, prompts, (1, 1)).identical
    found = compare_logits(wrong, wrong, prompts, (1, 3))
    assert (found.positions, found.differing, found.changed) == (7, 2, 1)
    assert (found.first_differing, found.first_changed) == ((1, 3), (1, 5))
    assert found.largest == pytest.approx(50)
    assert str(found) == (
        "bits differ at 2 of 7 positions, first at position 3 of prompt 1, by at most 50; the likeliest token differs "
        "at 1, first at position 5 of prompt 1"
    )
    small = compare_logits(wrong, exact, [prompts[1][:5]], (3, 1))
    assert not small.identical and str(small).endswith("by at most 0.001; the likeliest token is the same")


def test_calls_go_on_from_each_other():
    """A function with a KV cache sees prefixes that grow by the tokens of the call before."""
    calls = []

    def logits(prefix, new):
        calls.append((prefix, new))
        return exact(prefix, new)

    compare_logits(logits, exact, [[1, 2, 3, 4, 5, 6]], (2, 1), 5)
    assert calls == [([1], [2, 3]), ([1, 2, 3], [4, 5]), ([1, 2, 3, 4, 5], [6])]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(value):
    def broken(prefix, new):
        return exact(prefix, new).fill_(value)

    assert compare_logits(broken, broken, [[1, 2, 3]]).identical
    assert compare_logits(broken, exact, [[1, 2, 3]]).largest == float("inf")


def test_dtypes_may_differ():
    def wide(prefix, new):
        return exact(prefix, new).double()

    assert compare_logits(exact, wide, [[1, 2, 3]]).identical
    assert not compare_logits(exact, lambda *tokens: exact(*tokens).half(), [[1, 2, 3]]).identical


def test_bad_arguments_of_compare_logits(model):
    prompts = [[1, 2, 3]]
    for arguments, message in (
        ((exact, exact, []), "prompts must be of at least 2 tokens each"),
        ((exact, exact, [[1]]), r"got the lengths \[1\]"),
        ((exact, exact, prompts, (1, 0)), "tokens_per_pass must be two whole numbers"),
        ((exact, exact, prompts, (1, 2), 0), "positions must be a whole number of at least 1, got 0"),
        ((exact, "gpt2", prompts), "expected a Decoder, .* got str"),
        ((exact, lambda prefix, new: exact(prefix, new)[0], prompts), r"must be a tensor \[2, V\], got \[7\]"),
        ((exact, lambda prefix, new: None, prompts), "got NoneType"),
        ((exact, lambda prefix, new: exact(prefix, new)[:, 1:], prompts), "one vocabulary, got 7 and 6"),
        ((exact, Decoder.from_pretrained(model, device="cpu"), [[1] * 50]), "at most 48 tokens, got"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_logits(*arguments)
