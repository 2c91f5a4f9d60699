"""The model of a pass's time: what it recovers, where it must fail, what it says of other GPUs, and what is counted."""

import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from helpers import GPU

import step_model
from stagedspec.models.shapes import SIZES, ModelShape
from step_model import GPUS, Model, Pass, left_out

STAGE, BANDWIDTH, NODE, TURN = 1.6e-6, 4.0e12, 20e-9, 0.2e-6


def made(name: str, nodes: int) -> Pass:
    """A pass that takes what the formula says, computed here from the model's shape."""
    shape = SIZES[name]
    stages = 6 * shape.layers + 3
    weights = 2 * (12 * shape.layers * shape.width**2 + shape.vocab * shape.width)
    prefix = 2 * 2 * shape.layers * 128 * shape.width
    turns = 48 * nodes if name == "XL" else 36 * max(0, nodes - 16) if name == "L" else 0
    seconds = stages * STAGE + (weights + prefix) / BANDWIDTH + nodes * stages * NODE + turns * TURN
    return Pass(name, nodes, stages, weights, prefix, seconds, turns)


@pytest.fixture
def passes() -> list[Pass]:
    return [made(name, nodes) for name in ("S", "M", "L", "XL") for nodes in (1, 8, 16, 32, 64)]


def test_recovers_what_made_the_times(passes):
    found = Model.fitted(passes).seconds
    assert found["stages"] == pytest.approx(STAGE, rel=1e-6)
    assert 1 / found["bytes"] == pytest.approx(BANDWIDTH, rel=1e-6)
    assert found["node stages"] == pytest.approx(NODE, rel=1e-6)
    assert found["turns"] == pytest.approx(TURN, rel=1e-6)
    assert max(map(abs, left_out(passes).values())) < 1e-6
    assert made("L", 1).seconds == pytest.approx(0.77e-3, rel=0.05)  # of the right size: as measured on an H200


def test_noise_of_measurements_stays_noise(passes):
    generator = random.Random(0)
    noisy = [replace(one, seconds=one.seconds * generator.uniform(0.98, 1.02)) for one in passes]
    assert 0.001 < max(map(abs, left_out(noisy).values())) < 0.05


def test_a_shape_that_is_different_shows_only_when_it_is_left_out(passes):
    """Few parameters bend to twenty passes, but not to those of a shape that they have not seen."""
    odd = [replace(one, seconds=2 * one.seconds) if one.model == "M" else one for one in passes]
    errors = left_out(odd)
    assert all(errors["M", nodes] == pytest.approx(-0.5, abs=1e-6) for nodes in (1, 64))
    fitted = Model.fitted(odd)
    assert max(abs(fitted.error(one)) for one in odd) < 0.47


def test_a_term_that_would_be_negative_is_left_out(passes):
    """More nodes in less time: the term of the nodes cannot explain it."""
    falling = [replace(one, seconds=made(one.model, 1).seconds * (1 - one.nodes / 1000)) for one in passes]
    found = Model.fitted(falling).seconds
    assert found["node stages"] == 0 and found["stages"] > 0 and found["bytes"] > 0


def test_other_gpus(passes):
    """By hand: GPT-2 L's pass of 32 nodes on each."""
    model, one = Model.fitted(passes), made("L", 32)
    stages, memory = one.stages * STAGE, (one.weight_bytes + one.prefix_bytes) / BANDWIDTH
    cycles = 32 * one.stages * NODE + one.turns * TURN
    for name, wanted in (
        ("NVIDIA H200", stages + memory + cycles),
        ("H100 SXM", stages + memory * 4.8 / 3.35 + cycles),
        ("A100 80GB SXM", stages + memory * 4.8 / 2.039 + cycles * 1.98 / 1.41),
        ("RTX 4090", stages + memory * 4.8 / 1.008 + cycles * 1.98 / 2.52),
    ):
        assert GPUS[name].scaled(model, GPUS["NVIDIA H200"]).predict(one) == pytest.approx(wanted, rel=1e-6), name


@pytest.fixture
def file(passes, tmp_path):
    content = {
        "command": "python bench/step_model.py", "date": "today", "versions": {},
        "machine": {"gpu": "NVIDIA H200"}, "measured": [asdict(one) for one in passes],
    }  # fmt: skip
    path = tmp_path / "passes.json"
    path.write_text(json.dumps(content))
    return path


def test_fits_a_file(file, tmp_path, capsys, monkeypatch):
    out, written = tmp_path / "out.json", []
    monkeypatch.setattr(step_model, "update_readme", lambda *given: written.append(given))
    assert step_model.main(["--from", str(file), "--out", str(out), "--update-readme"]) == 0
    shown = capsys.readouterr().out
    assert "a stage: 1.60 µs" in shown and "memory: 4.00 TB/s, 83% of the published rate" in shown
    assert shown.count("| L, 16 ") == 2 and "RTX 4090" in shown
    assert written == [("step model", shown.strip(), [])]
    found = json.loads(out.read_text())
    assert found["model"]["left_out_error"]["most"] < 1e-6 and len(found["measured"]) == 20
    assert step_model.main(["--from", str(out)]) == 0  # what it wrote, it reads


def test_an_unknown_gpu_has_no_other(file, capsys):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"machine": {"gpu": "NVIDIA Other"}}))
    assert step_model.main(["--from", str(file)]) == 0
    assert "RTX 4090" not in capsys.readouterr().out


def test_two_shapes_are_too_few(file, capsys):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"measured": content["measured"][:10]}))
    assert step_model.main(["--from", str(file)]) == 2
    assert "at least three shapes, got S, M" in capsys.readouterr().err


@pytest.mark.interpreted
def test_measures_what_a_pass_launches(monkeypatch):
    monkeypatch.setattr(step_model, "ROUNDS", 2)
    shape = ModelShape(2, 32, 2, vocab=300, positions=256)
    device = torch.device("cuda", 0) if GPU else torch.device("cpu")
    one, five = step_model.measure("tiny", shape, (1, 5), device, "triton")
    # Embedding; qkv, attention's two, projection, up, down of each layer; the head's norm, scores and choice.
    assert one.stages == five.stages and one.stages - 1 - 6 * shape.layers in (1, 2, 3)
    itemsize = 2 if GPU else 4
    assert one.weight_bytes == itemsize * (12 * 2 * 32**2 + 300 * 32)
    assert one.prefix_bytes == itemsize * 2 * 2 * 128 * 32
    assert one.turns == five.turns == 0  # all inputs have room
    assert (one.nodes, five.nodes) == (1, 5) and min(one.seconds, five.seconds) > 0
