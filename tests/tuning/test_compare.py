"""Sides that run next to each other."""

from stagedspec.tuning.compare import Run, measure, summarise


def test_sides_take_turns_from_prompt_to_prompt_and_from_repeat_to_repeat():
    """Each side is first as often as any other, so that a machine that warms up favours none."""
    order: list[str] = []

    def side(name: str):
        def run(prompt: int) -> Run:
            order.append(name)
            return Run([prompt])

        return run

    runs = measure({name: side(name) for name in "abc"}, [7, 8], repeats=3)
    assert "".join(order) == "abcbca" + "bcacab" + "cababc"
    assert [(run.repeat, run.prompt, run.side) for run in runs] == [
        (at // 6, at // 3 % 2, name) for at, name in enumerate(order)
    ]
    assert all(run.run.tokens == [7 + run.prompt] for run in runs)


def test_sides_that_run_on_some_prompts():
    """Their ratios are to the baseline's runs on the same prompts."""
    calls = []

    def side(name):
        return lambda prompt: calls.append((name, prompt)) or Run([prompt])

    sides = {name: side(name) for name in ("a", "b", "c")}
    runs = measure(sides, [5, 6, 7], first={"b": 1, "c": 2})
    assert sorted(calls) == [("a", 5), ("a", 6), ("a", 7), ("b", 5), ("c", 5), ("c", 6)]
    rows = summarise(runs, list(sides))
    assert [row.new_tokens for row in rows] == [3, 1, 2] and all(row.identical for row in rows)
    assert [run.prompt for run in measure(sides, [5, 6, 7], until=0.0)] == [0, 0, 0]  # the first prompt, whole
