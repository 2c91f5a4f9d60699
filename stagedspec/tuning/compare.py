"""Decoders side by side on the same prompts: the demo's table and `bench/decode.py`.

All sides run each prompt in turn, in rotating order, so that a machine that slows down or warms up affects all of them.
A speed-up is the median of the ratios of pairs that ran next to each other. A side whose tokens differ from the
baseline's gets none.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

Prompt = TypeVar("Prompt")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Run:
    """One generation: the new tokens, and its statistics as from `Stats.as_dict()`, or none."""

    tokens: list[int]
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Result of one side over all prompts and repeats. A value that the side does not have is None.

    tokens_per_second: new tokens over the whole call's time, prefill included; the median over prompts and repeats.
    total_tokens_per_second: all new tokens over all time.
    speedup: the median of the paired ratios of time to the baseline's; None where outputs differ or cannot be compared.
    identical: whether every output equals the baseline's, token by token; None if they were not compared.
    differing: the number of outputs that differ.
    tokens_per_step: mean of accepted tokens plus the bonus token.
    weight_bytes_per_token: relative to autoregressive decoding.
    overhead: fraction of a step's time outside model passes.
    """

    name: str
    tokens_per_second: float
    total_tokens_per_second: float
    speedup: float | None
    identical: bool | None
    differing: int
    new_tokens: int
    seconds: float
    steps: int | None
    tokens_per_step: float | None
    target_passes: int | None
    draft_passes: int | None
    weight_bytes_per_token: float | None
    overhead: float | None

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Timed:
    """A run with its wall-clock seconds, the side's name, the index of the prompt and the repeat."""

    side: str
    prompt: int
    repeat: int
    run: Run
    seconds: float


def compare(
    sides: Mapping[str, Callable[[Prompt], Run]],
    prompts: Sequence[Prompt],
    repeats: int = 1,
    incomparable: frozenset[str] = frozenset(),
    on_run: Callable[[Timed], None] | None = None,
    done: Mapping[tuple[int, int], Sequence[Timed]] | None = None,
) -> list[Row]:
    """Runs every side on every prompt, `repeats` times. Returns a row for each side; the first one is the baseline.

    sides: name to a function from a prompt to its Run; the caller warms them up.
    incomparable: sides whose tokens are not expected to equal the baseline's (another random number generator).
    on_run: called after each run.
    done: earlier runs by (repeat, index of the prompt), one of each side, which ran next to each other. They are reused
    and not reported to on_run.

    Raises ValueError without sides or prompts, or if repeats is not positive.
    """
    runs = measure(sides, prompts, repeats, on_run, done)
    return summarise(runs, list(sides), incomparable)


def measure(
    sides: Mapping[str, Callable[[Prompt], Run]],
    prompts: Sequence[Prompt],
    repeats: int = 1,
    on_run: Callable[[Timed], None] | None = None,
    done: Mapping[tuple[int, int], Sequence[Timed]] | None = None,
    until: float = math.inf,
) -> list[Timed]:
    """The runs for `compare`, in order; arguments as there.

    until: a time of `time.perf_counter` after which no further prompt is begun, from the second on.
    """
    if not sides or not prompts or repeats < 1:
        raise ValueError(
            f"expected at least one side, one prompt and one repeat; got {len(sides)}, {len(prompts)} and {repeats}"
        )
    runs: list[Timed] = []
    for repeat in range(repeats):
        for index, prompt in enumerate(prompts):
            if done and (repeat, index) in done:
                runs.extend(done[repeat, index])
                continue
            if runs and time.perf_counter() > until:
                return runs
            names = list(sides)
            shift = (index + repeat) % len(names)
            for name in names[shift:] + names[:shift]:
                started = time.perf_counter()
                run = sides[name](prompt)
                runs.append(Timed(name, index, repeat, run, time.perf_counter() - started))
                if on_run is not None:
                    on_run(runs[-1])
    return runs


def summarise(runs: Sequence[Timed], names: Sequence[str], incomparable: frozenset[str] = frozenset()) -> list[Row]:
    """Returns a row for each name, in that order; the first is the baseline, which has run whatever another has."""
    by_side: dict[str, dict[tuple[int, int], tuple[Run, float]]] = {name: {} for name in names}
    for timed in sorted(runs, key=lambda timed: (timed.repeat, timed.prompt)):
        if timed.side in by_side:
            by_side[timed.side][timed.repeat, timed.prompt] = timed.run, timed.seconds
    baseline = by_side[names[0]]
    return [
        _row(name, list(found.values()), [baseline[place] for place in found], name not in incomparable)
        for name, found in by_side.items()
    ]


def speedups(runs: Sequence[Timed], name: str, baseline: str) -> list[float | None]:
    """For each prompt, the median over repeats of the baseline's time divided by that of the side `name`.

    None for a prompt where any output differs.
    """
    ours = {(timed.prompt, timed.repeat): timed for timed in runs if timed.side == name}
    theirs = {(timed.prompt, timed.repeat): timed for timed in runs if timed.side == baseline}
    ratios: dict[int, list[float | None]] = {}
    for key in sorted(ours):
        same = ours[key].run.tokens == theirs[key].run.tokens
        ratios.setdefault(key[0], []).append(theirs[key].seconds / ours[key].seconds if same else None)
    return [None if values is None else median(values) for values in map(_complete, ratios.values())]


def _complete(values: Iterable[Value | None]) -> list[Value] | None:
    """The values, or None if one of them is missing."""
    found = []
    for value in values:
        if value is None:
            return None
        found.append(value)
    return found


def _row(name: str, runs: list[tuple[Run, float]], baseline: list[tuple[Run, float]], comparable: bool) -> Row:
    pairs = list(zip(runs, baseline, strict=True))
    differing = sum(run.tokens != base.tokens for (run, _), (base, _) in pairs) if comparable else 0
    identical = differing == 0 if comparable else None
    ratios = [base_seconds / seconds for (_, seconds), (_, base_seconds) in pairs]
    tokens = sum(len(run.tokens) for run, _ in runs)
    seconds = sum(seconds for _, seconds in runs)
    steps = _total(runs, "steps")
    return Row(
        name=name,
        tokens_per_second=median(len(run.tokens) / seconds for run, seconds in runs),
        total_tokens_per_second=tokens / seconds,
        speedup=median(ratios) if identical else None,
        identical=identical,
        differing=differing,
        new_tokens=tokens,
        seconds=seconds,
        steps=steps,
        tokens_per_step=tokens / steps if steps else None,
        target_passes=_total(runs, "target_passes"),
        draft_passes=_total(runs, "draft_passes"),
        weight_bytes_per_token=_mean(runs, "weight_bytes_per_token"),
        overhead=_mean(runs, "overhead"),
    )


def _total(runs: list[tuple[Run, float]], key: str) -> int | None:
    values = _complete(run.stats.get(key) for run, _ in runs)
    return None if values is None else sum(values)


def _mean(runs: list[tuple[Run, float]], key: str) -> float | None:
    """The mean over runs, weighted by their new tokens."""
    values = _complete(run.stats.get(key) for run, _ in runs)
    weights = [len(run.tokens) for run, _ in runs]
    if values is None or not sum(weights):
        return None
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def table(rows: list[Row], title: str) -> "Table":
    """The rows as a rich Table that fits 80 columns; the first is the baseline."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    result.add_column("\nmode", no_wrap=True)
    for heading in ("tokens\n/s", "speed-\nup", "tokens\n/step", "target\npasses", "draft\npasses"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("rel.\nbytes", "over-\nhead"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("same\noutput", no_wrap=True)
    outputs = {None: "-", True: "yes"}
    for row in rows:
        result.add_row(
            row.name,
            f"{row.tokens_per_second:.{0 if row.tokens_per_second >= 100 else 1}f}",
            _shown(row.speedup, ".2f", "x"),
            _shown(row.tokens_per_step, ".2f"),
            _shown(row.target_passes, "d"),
            _shown(row.draft_passes, "d"),
            _shown(row.weight_bytes_per_token, ".2f"),
            _shown(None if row.overhead is None else 100 * row.overhead, ".0f", "%"),
            outputs.get(row.identical, f"NO ({row.differing})"),
        )
    return result


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
