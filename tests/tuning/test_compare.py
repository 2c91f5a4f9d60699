"""Sides that run next to each other."""

from stagedspec.tuning.compare import Run, measure


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


def test_time_ends_with_a_prompt():
    sides = {name: lambda prompt: Run([prompt]) for name in ("a", "b", "c")}
    assert [run.prompt for run in measure(sides, [5, 6, 7], until=0.0)] == [0, 0, 0]  # the first prompt, whole
