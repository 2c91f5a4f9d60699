"""bench/paper_gpu.py and bench/ablation.py: the stages of a run, its plan of time, what it leaves, and goes on from."""

import json
import re

import ablation
import paper_gpu
import pytest
import torch
from test_bench import folder, one_thread  # noqa: F401 (fixtures)

import report
from sides import load
from stagedspec import TreeConfig
from stagedspec.models.ngram_fit import fit_table


@pytest.fixture
def stages(monkeypatch):
    """Stages that take no time; the seconds that each was given, in order."""
    given = []

    def later(options):
        return {name: lambda seconds, name=name: given.append((name, seconds)) for name in paper_gpu.LATER}

    def train(options, minutes, report):
        given.append(("train", 0.0))
        report({"stage": "target", "step": 3, "steps": 9})

    monkeypatch.setattr(paper_gpu, "train", train)
    monkeypatch.setattr(paper_gpu, "later_stages", later)
    return given


def state_of(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / "state.json").read_text())


def command(tmp_path, *more: str) -> list[str]:
    return ["--out", str(tmp_path / "run"), "--device", "cpu", "--minutes", "10", *more]


def test_every_stage_gets_its_share_of_what_is_left(stages, tmp_path):
    assert paper_gpu.main(command(tmp_path)) == 0
    weights, left = dict(paper_gpu.LATER), 600.0
    assert [name for name, _ in stages] == ["train", *weights]
    for name, seconds in stages[1:]:
        assert seconds == pytest.approx(left * weights[name] / sum(weights.values()), rel=0.05)
        del weights[name]
    assert list(state_of(tmp_path)["done"]) == ["train", *paper_gpu.LATER]
    assert paper_gpu.main(command(tmp_path)) == 0 and len(stages) == 5  # done before
    # With more time all go on but training, which is over.
    assert paper_gpu.main([*command(tmp_path)[:-1], "20"]) == 0
    assert [name for name, _ in stages[5:]] == list(paper_gpu.LATER)


def test_a_run_that_is_ended_says_where_it_was_and_goes_on(stages, tmp_path, monkeypatch, capsys):
    def stopped(options, minutes, report):
        report({"stage": "target", "step": 3, "steps": 9, "loss": 2.5})
        raise paper_gpu.Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(paper_gpu, "train", stopped)
        assert paper_gpu.main(command(tmp_path)) == 130
    assert "stage target, step 3, steps 9, loss 2.5" in capsys.readouterr().out
    state = state_of(tmp_path)
    assert state["stage"] == "train" and state["done"] == {}
    path = tmp_path / "run" / "state.json"
    path.write_text(json.dumps(state | {"spent": 590.0}))
    # With more time, too, training keeps its plan: its learning rate follows that.
    monkeypatch.setattr(paper_gpu, "train", lambda options, minutes, report: stages.append(("train", minutes)))
    assert paper_gpu.main([*command(tmp_path)[:-1], "20"]) == 0 and stages[0] == ("train", 10.0)
    del stages[:]
    path.write_text(json.dumps(state | {"spent": 590.0}))
    assert paper_gpu.main(command(tmp_path)) == 0
    assert "goes on: it was in train after 590 s (stage target, step 3" in capsys.readouterr().out
    later = [seconds for name, seconds in stages if name != "train"]
    assert sum(later) < 30 and all(seconds >= paper_gpu.LEAST for seconds in later)


def test_a_stage_that_fails_loses_no_other(stages, tmp_path, monkeypatch, capsys):
    later = paper_gpu.later_stages

    def failing(options):
        def fail(seconds):
            raise RuntimeError("no\nroom")

        return later(options) | {"measure": fail}

    monkeypatch.setattr(paper_gpu, "later_stages", failing)
    assert paper_gpu.main(command(tmp_path)) == 1
    assert [name for name, _ in stages] == ["train", "tune", "ablation", "acceptance"]
    assert state_of(tmp_path)["failed"] == {"measure": "no room"}
    assert "measure failed: no room" in (tmp_path / "run" / "summary.md").read_text()
    monkeypatch.setattr(paper_gpu, "later_stages", later)
    assert paper_gpu.main(command(tmp_path)) == 0 and [name for name, _ in stages[4:]] == ["measure"]


@pytest.mark.parametrize(
    "more", [["--minutes", "0"], ["--preset", "huge"], ["--prompts", "nowhere.jsonl"], ["--limit", "-1"]], ids=str
)
def test_bad_input_is_refused_before_training(stages, tmp_path, more, capsys):
    try:
        assert paper_gpu.main([*command(tmp_path), *more]) == 2
    except SystemExit as error:
        assert error.code == 2
    assert not (tmp_path / "run").exists() and more[0].strip("-")[:5] in capsys.readouterr().err


@pytest.mark.slow
def test_all_of_it(tmp_path, monkeypatch):
    """From the sources to the figures, with few trees and in no more time than the stages cannot do without."""
    monkeypatch.setattr(ablation, "NODES", (16, 24, 32))
    monkeypatch.setattr(ablation, "PASSES", (2,))
    monkeypatch.setattr(ablation, "STAGED_PASSES", (2,))
    monkeypatch.setattr("stagedspec.tuning.trees.FINALISTS", 1)
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "import os\\n"}\n{"prompt": "def f(x):\\n"}\n')
    more = [
        "--peer-prompts",
        "1",
        "--preset",
        "tiny",
        "--minutes",
        "0.1",
        "--max-new-tokens",
        "8",
        "--prompts",
        str(prompts),
    ]
    assert paper_gpu.main([*command(tmp_path), *more]) == 0
    run = tmp_path / "run"
    text = (run / "summary.md").read_text()
    for part in (
        "| target ",
        "| draft ",
        "Trees: predicted",
        "Table 3",
        "staged gain alone",
        "staged over tree",
        "coupled less",
        "commit",
    ):
        assert part in text
    assert str(tmp_path) not in text
    for figure in ("paper/figure1.svg", "paper/figure2.svg", "paper/figure3.svg", "acceptance/acceptance.svg"):
        assert (run / figure).exists() and figure in text
    assert json.loads((run / "paper" / "paper.json").read_text())["identical"]

    readme = tmp_path / "bench" / "README.md"  # what the run left becomes a part of it, with its figures
    readme.parent.mkdir()
    readme.write_text("<!-- paper-gpu: begin -->\n<!-- paper-gpu: end -->\n")
    monkeypatch.setattr(report, "README", readme)
    assert paper_gpu.main(["--out", str(run), "--update-readme"]) == 0
    text = readme.read_text()
    figures = re.findall(r"\((figures/[^)]+)\)", text)
    assert "figures/paper-gpu-ablation.svg" in figures and all((readme.parent / path).is_file() for path in figures)
    assert "**Table 3**" in text and not re.search("^#", text, re.MULTILINE)


def test_a_readme_of_a_run_that_is_not_there(tmp_path, capsys):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "import os"}\n')
    (tmp_path / "run").mkdir()
    more = ["--prompts", str(prompts), "--update-readme"]
    assert paper_gpu.main(["--out", str(tmp_path / "run"), *more]) == 2
    assert "state.json does not exist" in capsys.readouterr().err and not any((tmp_path / "run").iterdir())


def test_every_commit_that_worked_on_a_run(stages, tmp_path, monkeypatch):
    """What an earlier one trained is not made again."""
    for name in ("aaa", "bbb", None, "bbb"):
        monkeypatch.setattr(paper_gpu, "commit", lambda name=name: name)
        assert paper_gpu.main(command(tmp_path)) == 0
    assert "\n\ncommit aaa, bbb; " in (tmp_path / "run" / "summary.md").read_text()


# ---------------------------------------------------------------- ablation.py


@pytest.fixture
def options(folder, tmp_path) -> list[str]:  # noqa: F811
    models = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--device", "cpu"]
    prompts = ["--prompts", str(folder / "prompts.jsonl.gz"), "--threads", "1", "--out", str(tmp_path / "out")]
    return [*models, *prompts, "--max-new-tokens", "8"]


def test_trees_of_an_ablation():
    base = TreeConfig(12, 4, 2, 2, 4, 1, 1, node_floor=0.03, pass_floor=0.5)
    tree = ablation.shaped(base, 30, nodes=32, passes=3, prefetch=4)
    assert tree == TreeConfig(32, 15, 3, 2, 8, 4, 1)
    assert ablation.shaped(base, 30) == TreeConfig(12, 4, 2, 2, 8, 1, 1)
    assert ablation.shaped(base, 9, prefetch=8).depth == 9
    with pytest.raises(ValueError, match="fewer than nodes"):
        ablation.shaped(base, 30, nodes=64, passes=1)


def test_staged_over_tree_by_hand():
    speeds = {"autoregressive": 1.0, "tree, 16 nodes, 2 passes": 2.0, "staged, 16 nodes, 2 passes": 3.0}
    speeds |= {"tree, 16 nodes, 4 passes": 2.5, "staged, 16 nodes, 4 passes": 2.0, "tree, 32 nodes, 2 passes": 4.0}
    lines = [{"name": name, "tokens_per_second": speed, "tokens_per_step": 1.0} for name, speed in speeds.items()]
    table = [[cell.strip() for cell in line.split("|")[1:6]] for line in ablation.gain_table(lines).splitlines()[2:]]
    assert table == [
        ["16", "2", "2", "3", "1.50x"],
        ["16", "4", "2", "2", "0.80x"],
        ["16", "best", "2", "3", "1.20x"],
    ]


def test_ablation_writes_tables_and_a_figure_and_goes_on(options, folder, tmp_path, monkeypatch):  # noqa: F811
    assert ablation.main([*options, "--seconds", "1e-9"]) == 0
    out = tmp_path / "out"
    assert list(json.loads((out / "ablation.json").read_text())["groups"]) == ["staged"]
    assert ablation.main([*options, "--drafts", str(folder / "draft")]) == 0
    assert ablation.main(options) == 0
    found = json.loads((out / "ablation.json").read_text())
    assert list(found["groups"]) == ["staged", "n-gram", "nodes", "shape"] and found["identical"]
    for group, lines in found["groups"].items():
        assert [line["name"] for line in lines].count("autoregressive") == 1, group
        assert all(line["tokens_per_step"] >= 1 and line["step_seconds"] > 0 for line in lines)
    names = {line["name"]: line for line in found["groups"]["shape"]}
    assert names["prefetch 0"]["tree"]["prefetch"] == 0 and names["width 4"]["tree"]["width"] == 4
    assert (out / "ablation.svg").exists() and "staged over tree" in (out / "ablation.md").read_text()

    monkeypatch.setattr(ablation, "measured", None)  # all is there
    assert ablation.main(options) == 0


def test_each_variant_is_what_its_name_says(options, tmp_path):
    bare = load(ablation.parse(options))
    table = fit_table([torch.arange(100) % 7], bare.decoder.target.vocab_size)
    table.save(tmp_path / "ngram.safetensors")
    models = load(ablation.parse([*options, "--ngram", str(tmp_path / "ngram.safetensors")]))
    found = ablation.groups(models, TreeConfig(12, 4, 2, 2, 4, 1, 1), {})
    assert list(found["n-gram"]) == ["Katz table and context", "Katz table alone", "context alone", "none"]
    assert list(ablation.groups(bare, TreeConfig(), {})["n-gram"]) == ["context alone", "none"]  # there is no table
    for name, variant in found["nodes"].items():
        nodes, passes = (int(part.split()[0]) for part in name.split(", "))
        assert (variant.tree.nodes, variant.tree.passes) == (nodes, passes)
    smallest = ablation.groups(models, TreeConfig(8, 2, 1, 1, 8, 1, 1), {})["staged"]
    for nodes, passes in ((16, 2), (16, 4), (32, 4), (64, 4)):
        assert {f"{mode}, {nodes} nodes, {passes} passes" for mode in ("tree", "staged")} <= smallest.keys()
    assert not found["n-gram"]["Katz table alone"].tree.context and found["n-gram"]["none"].tree.context
    assert found["n-gram"]["context alone"].decoder.ngram is None and found["n-gram"]["none"].tree.prefetch == 0
    sizes = [len(variants) for _, _, variants in ablation.parts(found)]
    assert max(sizes) == ablation.TOGETHER and sum(sizes) == sum(map(len, found.values()))
    ids = torch.tensor([[1, 2, 3]])
    variant = found["staged"]["tree, 16 nodes, 2 passes"]
    run = ablation.side(variant.decoder, variant.tree, 4)(ids)
    assert run.stats["tree"]["nodes"] == 16 and run.stats["tree"]["prefetch"] == 0
