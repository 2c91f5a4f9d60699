"""bench/paper.py and bench/acceptance.py on tiny random models: what they write, refuse, and go on from."""

import json
import re
from pathlib import Path

import acceptance
import paper
import pytest
import torch
from test_bench import folder, one_thread  # noqa: F401 (fixtures)

import figures
import machine
import report
import stagedspec
from sides import ASSISTED, LOOKUP, PLAIN, load, transformers_side
from stagedspec.tuning.compare import Run, Timed, compare, measure, speedups

NEW, SIDES = 10, [*stagedspec.MODES, PLAIN, ASSISTED, LOOKUP]
ROOFLINE = {
    "arithmetic": 1e11,
    "roofs": [{"name": "memory", "bytes_per_second": 1e10}],
    "passes": [
        {"model": model, "nodes": nodes, "seconds": 1e-3, "flops": 2e6 * nodes, "bytes": 4e6}
        for model in ("target", "draft")
        for nodes in (1, 8)
    ],
}


@pytest.fixture
def options(folder, tmp_path, monkeypatch) -> list[str]:  # noqa: F811
    monkeypatch.setattr(paper, "measure_roofline", lambda models: ROOFLINE)
    models = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--device", "cpu"]
    prompts = ["--prompts", str(folder / "prompts.jsonl.gz"), "--threads", "1", "--out", str(tmp_path / "out")]
    return [*models, *prompts, "--max-new-tokens", str(NEW)]


def lines(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- paper.py


def test_paper_writes_tables_and_figures(options, tmp_path, capsys):
    assert paper.main(options) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    found = json.loads((out / "paper.json").read_text())
    assert found["identical"] and found["prompts"]["used"] == 2 and found["prompts"]["skipped"] == 1
    assert "1 skipped" in printed
    assert [sampling["sampling"] for sampling in found["compared"]] == ["greedy", "sample"]
    for sampling in found["compared"]:
        name = sampling["sampling"]
        sides = {side["name"]: side for side in sampling["sides"]}
        assert list(sides) == SIDES
        assert all(sides[mode]["identical"] for mode in stagedspec.MODES)
        assert all(side["new_tokens"] == 2 * NEW for side in sides.values())
        for side in (PLAIN, ASSISTED, LOOKUP):
            assert sides[side]["identical"] is (True if name == "greedy" else None)
            assert (sides[side]["speedup"] is None) == (name == "sample")
            assert (side in sampling["speedups"]) == (name == "greedy")
        table = {line["name"]: line for line in sampling["table_3"]}
        assert list(table) == SIDES and table["autoregressive"]["ratio"] == 1.0
        assert table["autoregressive"]["target_passes"] == NEW and table[PLAIN]["runs"] == 2
        # Of transformers the first token is left out, too.
        assert all(table[mode]["steps_per_second"] >= table[mode]["tokens_per_second"] for mode in stagedspec.MODES)
        assert all(line["seconds_to_first_token"] > 0 for line in table.values())
    text = (out / "paper.md").read_text()
    for part in ("Table 3", "Table 1", "0.31", "0.35", "350", "3.17x", "not comparable", "figure2.svg"):
        assert part in text
    assert {path.name for path in out.iterdir()} == {
        "runs.jsonl", "paper.json", "paper.md", "figure1.svg", "figure1.png", "figure2.svg", "figure2.png",
        "figure3.svg", "figure3.html",
    }  # fmt: skip


def test_paper_goes_on_after_an_interruption(options, tmp_path, monkeypatch, capsys):
    original, count = paper.our_side, [0]

    def failing(decoder, mode, settings):
        side = original(decoder, mode, settings)

        def run(ids):
            count[0] += 1
            if count[0] == 10:  # after the warm-ups, in the middle of the second prompt's round
                raise KeyboardInterrupt
            return side(ids)

        return run

    monkeypatch.setattr(paper, "our_side", failing)
    assert paper.main(options) == 130
    before = lines(tmp_path)
    assert 7 < len(before) < 14
    path = tmp_path / "out" / "runs.jsonl"
    path.write_text(path.read_text() + '{"key": "torn')
    monkeypatch.setattr(paper, "our_side", original)
    assert paper.main(options) == 0
    after = lines(tmp_path)
    # The finished round stands, the unfinished one ran whole again, the other sampling followed.
    assert after[: len(before)] == before
    assert len(after) == len(before) + 7 + 14
    assert f"{len(before)} runs were measured before" in capsys.readouterr().out
    first = (tmp_path / "out" / "paper.json").read_text()
    assert paper.main(options) == 0
    assert lines(tmp_path) == after
    same = json.loads((tmp_path / "out" / "paper.json").read_text())["compared"]
    assert same == json.loads(first)["compared"]


@pytest.mark.slow
def test_paper_measures_again_what_has_changed(options, tmp_path, folder):  # noqa: F811
    assert paper.main([*options, "--limit", "1"]) == 0
    assert len(lines(tmp_path)) == 14
    assert paper.main([*options, "--limit", "1", "--seed", "3"]) == 0
    assert len(lines(tmp_path)) == 28
    assert paper.main([*options, "--limit", "1", "--fresh"]) == 0  # replaces the runs of its own settings
    assert len(lines(tmp_path)) == 28
    assert paper.main([*options, "--limit", "2"]) == 0  # one more prompt: only that one is run
    assert len(lines(tmp_path)) == 42
    other = list(options)
    other[1] = str(folder / "draft")  # another target
    assert paper.main([*other, "--limit", "1"]) == 0
    assert len(lines(tmp_path)) == 56


@pytest.mark.parametrize("more", [[], ["--peer-prompts", "1"]], ids=["all", "peers on the first"])
def test_paper_gives_no_ratio_where_outputs_differ(options, tmp_path, monkeypatch, capsys, more):
    """Also where the side is right on the first prompt, and so beside transformers."""
    original, drawn = paper.our_side, {}

    def wrong(decoder, mode, settings):
        side = original(decoder, mode, settings)

        def run(ids):
            result, second = side(ids), decoder.tokenizer.decode(ids[0]).startswith("def")
            wrong = Run([result.tokens[0] ^ 1, *result.tokens[1:]], result.stats)
            return wrong if mode == "tree" and second else result

        return run

    def keep(panels, published, path):
        drawn.update(panels)
        return []

    monkeypatch.setattr(paper, "our_side", wrong)
    monkeypatch.setattr(figures, "speedups", keep)
    assert paper.main([*options, *more]) == 1
    assert "DIFFER" in capsys.readouterr().err
    for sides in drawn.values():
        assert "staged" in sides and "tree" not in sides
    table = (tmp_path / "out" / "paper.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| tree") and "differ" in line)
    assert "NO (1 differ)" in row and "x" not in row


def test_peers_on_some_prompts_and_a_budget_of_time(options, tmp_path):
    """Ours run on all prompts, then all sides on the first; when time is over no further prompt is begun; the next run
    goes on."""

    def compared() -> list[dict]:
        return json.loads((tmp_path / "out" / "paper.json").read_text())["compared"]

    few = [*options, "--peer-prompts", "1"]
    assert paper.main([*few, "--seconds", "1e-9"]) == 0
    assert [one["prompts"] for one in compared()] == [1, 1, 1, 1] and len(lines(tmp_path)) == 2 * (4 + 7)
    assert "(1 of them measured)" in (tmp_path / "out" / "paper.md").read_text()
    assert paper.main(few) == 0
    assert len(lines(tmp_path)) == 2 * (4 + 7) + 2 * 4
    titles = [f"{name}, {some} prompts" for some in ("2", "first 1") for name in ("greedy", "top-k 50, T=1")]
    assert [one["title"] for one in compared()] == titles
    for one in compared():
        runs = {line["name"]: line["runs"] for line in one["table_3"]}
        assert runs == (dict.fromkeys(SIDES, 1) if "first" in one["title"] else dict.fromkeys(stagedspec.MODES, 2))
    text = (tmp_path / "out" / "paper.md").read_text()
    assert all(text.count(f"| {title} ") == 2 for title in titles) and "taking turns" in text
    first = text[text.index("Table 1") : text.index("Table 2")]  # with every side, each once
    assert [line.split("|")[1].strip() for line in first.splitlines() if line.count("|") == 6][2:] == SIDES


def test_speeds_by_hand():
    def timed(side: str, seconds: float, stats: dict, prompt: int = 0) -> Timed:
        return Timed(side, prompt, 0, Run([1, 2, 3, 4], stats), seconds)

    passes = {"target_passes": 2, "draft_passes": 4, "weight_bytes_per_token": 0.5}
    ours = {"seconds": {"prefill": 1.0}, "total_seconds": 3.0, "seconds_to_first_token": 1.5}
    runs = [timed("autoregressive", 8.0, passes | ours), timed("tree", 4.0, passes | ours)]
    peer = passes | {"seconds_to_first_token": 1.0}
    runs += [timed("peer", 7.0, peer), timed("autoregressive", 9.0, passes | ours, 1)]
    tree, peer = (paper.speeds(runs, side, 100, 400.0) for side in ("tree", "peer"))
    assert (tree["tokens_per_second"], tree["ratio"], tree["steps_per_second"]) == (1.0, 2.0, 2.0)
    assert (tree["bytes_per_second"], tree["share"], tree["seconds_to_first_token"]) == (100.0, 0.25, 1.5)
    assert (peer["ratio"], peer["steps_per_second"], peer["runs"]) == (8 / 7, 0.5, 1)


def test_paper_without_a_draft(options, tmp_path):
    at = options.index("--draft")
    assert paper.main(options[:at] + options[at + 2 :]) == 0
    found = json.loads((tmp_path / "out" / "paper.json").read_text())
    assert [side["name"] for side in found["compared"][0]["sides"]] == ["autoregressive", PLAIN, LOOKUP]


@pytest.mark.parametrize("script", [paper, acceptance])
@pytest.mark.parametrize("content", [None, "", "{}", '{"prompt": ""}'], ids=["missing", "empty", "no field", "no text"])
def test_prompts_that_cannot_be_used(options, tmp_path, capsys, script, content):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    assert script.main([*options, "--prompts", str(path)]) == 2
    error = capsys.readouterr().err
    assert "prompts.jsonl" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("script", [paper, acceptance])
def test_prompts_all_too_long(options, capsys, script):
    assert script.main([*options, "--max-new-tokens", "62"]) == 2
    assert "none of the 3 prompts" in capsys.readouterr().err


def test_transformers_passes_are_counted(options):
    """Alone, a pass a token; with an assistant, its passes weigh what its weights do."""
    models = load(paper.parse(options))
    settings = {"do_sample": False, "max_new_tokens": NEW, "seed": 0}
    ids = torch.tensor([models.tokenizer.encode("import os\n")])
    plain = transformers_side(models, settings)(ids).stats
    assert plain.pop("seconds_to_first_token") > 0
    assert plain == {"steps": NEW, "target_passes": NEW, "draft_passes": 0, "weight_bytes_per_token": 1.0}
    assisted = transformers_side(models, settings, ASSISTED)(ids)
    steps, drafted = assisted.stats["target_passes"], assisted.stats["draft_passes"]
    assert 0 < steps <= NEW and drafted > 0
    ratio = models.decoder.draft.weight_bytes / models.decoder.target.weight_bytes
    assert assisted.stats["weight_bytes_per_token"] == pytest.approx((steps + drafted * ratio) / NEW)


def test_roofs_are_measured(options, monkeypatch):
    monkeypatch.undo()
    device = torch.device("cpu")
    assert machine.read_bandwidth(1 << 20, device, 0.02) > 0
    assert machine.arithmetic(torch.float32, device, 0.0) > 0
    monkeypatch.setattr(paper, "read_bandwidth", lambda size, device: float(size))
    monkeypatch.setattr(paper, "arithmetic", lambda dtype, device: 1.0)
    models = load(paper.parse(options))
    found = paper.measure_roofline(models)
    assert [entry["nodes"] for entry in found["passes"]] == [1, 8, 16, 32, 64] * 2
    target = models.decoder.target
    assert found["passes"][1]["flops"] == 2 * 8 * target.weight_bytes // 4
    assert found["roofs"][1]["bytes_per_second"] == target.weight_bytes + models.decoder.draft.weight_bytes


# ---------------------------------------------------------------- acceptance.py


def test_acceptance_writes_a_table_and_goes_on(options, tmp_path, monkeypatch, capsys):
    few = [*options, "--draws", "2", "--temperatures", "0.5", "1.5"]
    assert acceptance.main(few) == 0
    out = tmp_path / "out"
    found = json.loads((out / "acceptance.json").read_text())
    assert [entry["temperature"] for entry in found["temperatures"]] == [0.5, 1.5]
    for entry in found["temperatures"]:
        for points in entry["rules"].values():
            means = [point["mean"] for point in points]
            assert means == sorted(means) and all(p["low"] <= p["mean"] <= p["high"] for p in points)
        # With one child the two rejections are the same rule and draw the same.
        assert entry["rules"]["recursive"][0] == entry["rules"]["multi-round"][0]
    assert (out / "acceptance.svg").exists() and (out / "acceptance.md").read_text().count("\n| 1.5") == 4

    measured = acceptance.measure
    temperatures = []
    monkeypatch.setattr(acceptance, "measure", lambda *a: temperatures.append(a[2]) or measured(*a))
    assert acceptance.main([*few[:-2], "0.5", "1.5", "1.0"]) == 0
    assert temperatures == [1.0]


def test_acceptance_is_of_the_texts_own_distributions(options):
    """Against transformers' own logits, warped by hand."""
    models = load(acceptance.parse(options))
    text = torch.tensor(models.tokenizer.encode("def read(path):\n    with open(path) as file:\n"))
    p, q = acceptance.distributions(models, text, 4, {"temperature": 0.7, "top_k": 5})
    with torch.no_grad():
        logits = models.target(text[None]).logits[0, 3:-1] / 0.7
    expected = logits.topk(5, -1).values.softmax(-1)
    assert torch.allclose(p.sort(-1, descending=True).values[:, :5], expected, atol=1e-6)
    assert p.shape == q.shape and len(p) == len(text) - 4
    assert torch.allclose(q.sum(-1), torch.ones(len(q)))
    # A token is the same column of both: of the models' common tokens the sum of the smaller probabilities.
    with torch.no_grad():
        theirs = models.draft(text[None]).logits[0, 3:-1] / 0.7
    whole = [
        torch.zeros_like(x).scatter(-1, x.topk(5, -1).indices, x.topk(5, -1).values.softmax(-1))
        for x in (logits, theirs)
    ]
    assert torch.allclose(torch.minimum(p, q).sum(-1), torch.minimum(*whole).sum(-1), atol=1e-6)


def test_texts_are_what_the_decoder_writes_for_each_prompt(options):
    """Batches are padded; the texts are not."""
    models = load(acceptance.parse(options))
    prompts = [torch.tensor([models.tokenizer.encode(text)]) for text in ("import os\n", "def read(path):\n")]
    sampling = {"temperature": 0.8, "top_k": 20}
    for row, (prompt, text) in enumerate(zip(prompts, acceptance.write(models, prompts, 6, sampling, 5), strict=True)):
        assert text[: prompt.shape[1]].tolist() == prompt[0].tolist() and len(text) == prompt.shape[1] + 6
        # Row b of a batch is stream b: only row 0 can be had alone.
        if row == 0:
            settings = {"mode": "autoregressive", "do_sample": True, "seed": 5, "eos_token_id": []}
            alone = models.decoder.generate(prompt, max_new_tokens=6, **settings, **sampling)
            assert alone[0].tolist() == text.tolist()


def test_acceptance_says_where_ours_is_worse():
    def measured(gap: float) -> dict:
        base = torch.linspace(0.4, 0.6, 20, dtype=torch.float64)[:, None].expand(-1, 4)
        rules = {"coupled": base + gap, "recursive": base, "multi-round": base - 0.1, "top-m": base - 0.2}
        accepted = {name: values.tolist() for name, values in rules.items()}
        return {"temperature": 1.0, "accepted": accepted, "distance": 0.3, "entropy": 1.0}

    worse, better, even = (acceptance.summarise(measured(gap)) for gap in (-0.05, 0.05, 0.0))
    assert [p["mean"] for p in worse["difference"]] == pytest.approx([-0.05] * 4)
    assert all(p["high"] == pytest.approx(-0.05) for p in worse["difference"])  # the same on every prompt
    for entry, verdict, best in ((worse, "ours worse", 2), (better, "ours better", 1), (even, "no difference", 1)):
        for line in acceptance.table([entry]).splitlines()[2:]:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert verdict in cells[-1] and cells[1 + best].startswith("*")


def test_intervals_cover_the_mean():
    """Of 200 samples of 40 normal numbers, nearly 95% of the intervals hold the true mean."""
    values = torch.randn(40, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = acceptance.interval(values)
    covered = sum(point["low"] <= 0 <= point["high"] for point in points) / 200
    assert 0.88 <= covered <= 0.99


# ---------------------------------------------------------------- what they share


def test_finished_rounds_are_taken_over():
    calls = []

    def side(name: str):
        return lambda prompt: calls.append((name, prompt)) or Run([prompt], {"steps": 1})

    sides = {"a": side("a"), "b": side("b")}
    done = {(0, 1): [Timed("a", 1, 0, Run([7]), 2.0), Timed("b", 1, 0, Run([7]), 0.5)]}
    noted = []
    runs = measure(sides, [0, 1, 2], on_run=noted.append, done=done)
    assert {prompt for _, prompt in calls} == {0, 2} and len(noted) == 4 and len(runs) == 6
    assert speedups(runs, "b", "a")[1] == 4.0
    assert compare(sides, [0, 1, 2], done=done)[0].new_tokens == 3


def test_speedups_are_by_prompt_and_none_where_outputs_differ():
    def timed(side: str, prompt: int, repeat: int, seconds: float, token: int = 0) -> Timed:
        return Timed(side, prompt, repeat, Run([token]), seconds)

    runs = [timed("a", 0, 0, 4.0), timed("b", 0, 0, 2.0), timed("a", 0, 1, 4.0), timed("b", 0, 1, 1.0)]
    runs += [timed("a", 1, 0, 1.0), timed("b", 1, 0, 1.0), timed("a", 1, 1, 1.0), timed("b", 1, 1, 1.0, token=5)]
    assert speedups(runs, "b", "a") == [3.0, None]


def test_readme_is_written_between_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
    (tmp_path / "a.svg").write_text("<svg/>")
    report.update_readme("x", "new\n", [tmp_path / "a.svg"], readme)
    assert readme.read_text() == "before\n<!-- x: begin -->\nnew\n<!-- x: end -->\nafter\n"
    assert (tmp_path / "figures" / "a.svg").exists()
    for text in ("", "<!-- x: begin -->", "<!-- x: end --><!-- x: begin -->"):
        with pytest.raises(ValueError, match="expected the marks"):
            report.replace_between(text, "x", "new")


def test_the_readme_has_the_marks():
    text = report.README.read_text(encoding="utf-8")
    for name in ("paper", "paper-gpu", "ablation", "acceptance"):
        report.replace_between(text, name, "")
    for figure in re.findall(r"\((figures/[^)]+)\)", text):
        assert (report.README.parent / figure).is_file(), figure


def test_markdown_lines_up():
    table = report.markdown(["name", "x"], [["a", "1.00"], ["longer", "-"]])
    assert table.splitlines() == ["| name   |    x |", "| ------ | ---: |", "| a      | 1.00 |", "| longer |    - |"]
