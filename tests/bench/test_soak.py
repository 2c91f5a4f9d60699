"""The soak: its calls, its comparison and memory rule on planted faults, and short runs on tiny models."""

import json
import random
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import memory
import soak
import soak_calls
from stagedspec import MODES, Decoder

MIB = memory.MIB
TEXT = list(range(61)) * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target and a draft of random weights, without tokenizers."""
    folder = tmp_path_factory.mktemp("soak")
    for seed, (name, width) in enumerate({"target": 32, "draft": 16}.items()):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=61, n_positions=48, n_embd=width, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def flat_memory(monkeypatch):
    """A few seconds are too short to judge memory."""
    monkeypatch.setattr(memory, "resident", lambda: 100 * MIB)


def run(folder, *arguments: str) -> int:
    models = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--device", "cpu"]
    return soak.main([*models, "--threads", "1", "--calls", "12", *arguments])


def calls(count: int = 400) -> list[soak_calls.Call]:
    return [soak_calls.draw(7, index, TEXT, 61, 48) for index in range(count)]


# ---------------------------------------------------------------- calls


def test_calls_are_repeatable_and_of_every_kind():
    found = calls()
    assert found == calls()
    assert {call.kind for call in found} == set(soak_calls.KINDS)
    assert {1, 2, 16} <= {len(call.prompts) for call in found}
    assert any(len(set(map(len, call.prompts))) > 1 for call in found)  # ragged
    assert {name for call in found for name in call.sampling} == {"do_sample", "temperature", "top_k", "top_p", "min_p"}
    for call in found:
        longest = max(map(len, call.prompts))
        assert longest >= 1 and (longest + call.new_tokens > 48) == (call.kind == "too long")


# ---------------------------------------------------------------- comparison


def test_the_comparison_finds_a_planted_token():
    call = replace(calls()[0], kind="plain")
    expected = [[1, 2, 3], [4, 5, 6]]
    assert soak_calls.difference(call, expected, [[1, 2, 3], [4, 5, 6]]) is None
    assert "row 1, new token 2" in soak_calls.difference(call, expected, [[1, 2, 3], [4, 5, 7]])
    assert "row 0, new token 2" in soak_calls.difference(call, expected, [[1, 2], [4, 5, 6]])
    assert "2 rows" in soak_calls.difference(call, expected, [[1, 2, 3]])
    assert "PlannedError" in soak_calls.difference(call, "PlannedError", expected)


def test_a_closed_stream_is_a_beginning():
    call = replace(calls()[0], kind="closed stream", stop_at=2)
    assert soak_calls.difference(call, [[1, 2, 3]], [[1, 2]]) is None
    assert soak_calls.difference(call, [[1]], [[1]]) is None  # ended before it was to be closed
    assert "new token 1" in soak_calls.difference(call, [[1, 2, 3]], [[1]])
    assert "new token 1" in soak_calls.difference(call, [[1, 2, 3]], [[1, 9]])
    assert "new token 1" in soak_calls.difference(call, [[1]], [[1, 2]])


# ---------------------------------------------------------------- memory


def series(slope: float, noise: float, count: int = 270) -> tuple[list[float], list[float]]:
    """Ten minutes of samples around 1 GiB; the first minute climbs, as a warm-up does."""
    rng = random.Random(3)
    seconds = [600 * index / count for index in range(count)]
    climb = [min(second, 55) * 5 * MIB for second in seconds]
    return seconds, [
        1024 * MIB + early + slope * second + rng.gauss(0, noise) for second, early in zip(seconds, climb, strict=True)
    ]


@pytest.mark.parametrize("noise", [0, 5 * MIB, 100 * MIB])
def test_noise_is_flat(noise):
    assert not memory.growth(*series(0, noise), 60).grows
    assert not memory.growth(*series(-0.5 * MIB, noise), 60).grows


@pytest.mark.parametrize("noise", [0, 5 * MIB])
def test_growth_is_found(noise):
    found = memory.growth(*series(0.15 * MIB, noise), 60)  # 81 MiB in nine minutes, where 3% of the level is 39
    assert found.grows and "GROWS" in str(found)


def test_one_high_moment_is_no_growth():
    seconds, values = series(0, MIB)
    values[-10:] = [4096 * MIB] * 10  # a single large batch at the end
    assert not memory.growth(seconds, values, 60).grows


def test_few_samples_are_not_judged():
    assert memory.growth(list(range(9)), [1.0] * 9, 0) is None


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_short_run(folder, tmp_path, capsys, flat_memory):
    out, plot = tmp_path / "soak.json", tmp_path / "memory.svg"
    code = run(folder, "--minutes", "0.05", "--workers", "2", "--out", str(out), "--plot", str(plot))
    report = json.loads(out.read_text(encoding="utf-8"))
    assert (code, report["problems"], report["grows"]) == (0, [], [])
    assert report["tokens"] >= report["generations"] > 0
    assert report["memory"]["host"]["first"] == 100 * MIB
    assert "<svg" in plot.read_text(encoding="utf-8")
    assert "generations" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_that_grows_fails_a_run(folder, tmp_path, capsys, monkeypatch):
    size = [100 * MIB]

    def resident():
        size[0] += 10 * MIB
        return size[0]

    monkeypatch.setattr(memory, "resident", resident)
    assert run(folder, "--minutes", "0.03", "--workers", "1") == 1
    assert "GROWS" in capsys.readouterr().out


def kind_index(kind: str) -> int:
    """The first call of the seed 0 that is of this kind."""
    return next(i for i in range(40) if soak_calls.draw(0, i, TEXT, 61, 48).kind == kind)


def test_one_call_alone(folder, capsys):
    index = kind_index("two streams")
    assert run(folder, "--only", str(index)) == 0
    printed = capsys.readouterr().out
    assert f"call {index}: two streams, prompts of" in printed and "0 problems" in printed


@pytest.fixture(scope="module")
def shared(folder) -> soak.Soak:
    options = soak.parse(["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--device", "cpu"])
    return soak.Soak(*soak.decoders_of(options), 0, 40)


@pytest.mark.parametrize("kind", soak_calls.KINDS)
def test_every_kind_of_call(shared, kind):
    soak.repeat(shared, kind_index(kind))
    assert not shared.problems
    modes = {mode for decoder in shared.decoders.values() for mode in soak_calls.modes_of(decoder)}
    assert {name for name in shared.made if name.startswith(kind)} == {f"{kind}, {mode}" for mode in modes}


def test_a_wrong_token_fails_a_run(folder, capsys, monkeypatch):
    decode = Decoder.decode

    def wrong(self, call):
        output = decode(self, call)
        if call.request.mode == "tree":
            output[0, -1] += 1
        return output

    monkeypatch.setattr(Decoder, "decode", wrong)
    index = kind_index("plain")
    assert run(folder, "--only", str(index)) == 1
    problems = capsys.readouterr().err
    assert problems.count("DIFFERENT OUTPUT") == 2  # of both decoders that have a draft
    assert f"mode 'tree', --seed 0 --only {index}" in problems and f"call {index}: plain" in problems
    assert all(f"mode {mode!r}" not in problems for mode in MODES if mode != "tree")


def test_an_unplanned_error_fails_a_run(folder, capsys, monkeypatch):
    def fails(self, call):
        if call.request.mode == "chain":
            raise RuntimeError("planted")
        return decode(self, call)

    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", fails)
    assert run(folder, "--only", str(kind_index("plain"))) == 1
    assert "RuntimeError: planted" in capsys.readouterr().err


def test_a_call_that_never_ends_fails_a_run(monkeypatch, flat_memory):
    monkeypatch.setattr(soak, "STUCK_SECONDS", 0.05)
    ended, never = threading.Event(), threading.Event()
    stuck = SimpleNamespace(ended=ended, problems=[], work=lambda number: never.wait())
    soak.soak_for(stuck, 0.2, 0.05, 1, torch.device("cpu"))
    never.set()
    assert "did not end" in stuck.problems[0]


def test_memory_is_nearly_full_in_turn(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share))
    shared = SimpleNamespace(tight=False)
    squeeze = soak.Squeeze(shared, torch.device("cuda"))
    for seconds in (0, 59, 60, 70, 76, 91):
        squeeze.at(seconds, 60)
    squeeze.close()
    assert limits == [0.2, 1.0, 0.2, 1.0]  # the models' 100, and half of the 200 that calls took at most


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--workers", "0"], "--workers"),
        (["--out", "/none/such/file.json"], "--out"),
        (["--plot", "/none/such/file.svg"], "--plot"),
        (["--random", "S", "--draft", "x"], "--random"),
    ],
)
def test_options_that_cannot_be(capsys, arguments, part):
    assert soak.main(["--device", "cpu", *arguments]) == 2
    assert part in capsys.readouterr().err
