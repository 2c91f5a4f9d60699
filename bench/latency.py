"""Latency of a generation: loading, first use, cost of a call beyond its steps, time to first token, step time.

    python bench/latency.py [--random L --device cuda] [--modes staged tree] [--limit-seconds 240] [--out latency.json]

First use runs in processes of its own with their own cache folders. The other cases run in this process, all sides
with the same weights and dtype, taking turns. What has a goal comes first; no case starts after --limit-seconds, and
what was left out is named. See bench/README.md.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median, quantiles

import torch

import first_use
from first_use import COMPILED, PLAIN, SAMPLINGS, Ours, Theirs
from machine import arguments_of, header, where
from random_models import add_model_options, checkpoints
from report import markdown, update_readme
from sides import check_options, clear_errors
from stagedspec import MODES
from stagedspec.cli import early_checks
from stagedspec.cli.output import quiet_transformers
from stagedspec.devices import resolve_device, resolve_dtype
from stagedspec.kernels.common.files import write_text

LENGTHS = (128, 16, 900)  # the most usual prompt first
TIMED = [mode for mode in ("staged", "autoregressive", "tree", "chain") if mode in MODES]  # in order of interest
# Of a process's first use: what compiled code and what measured tuning it finds.
CACHES = {"cold": ("none", "none"), "warm": ("warm", "warm"), "untuned": ("warm", "none")}
LEAST_CHILD_SECONDS = 60  # a process that has started gets so long, even at the end of the budget


# ---------------------------------------------------------------- arithmetic


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "lower": low, "upper": high}


def step_and_fixed(few: list[tuple[float, int]], many: list[tuple[float, int]]) -> tuple[dict, dict]:
    """Seconds of a step, and seconds of a call beyond its steps, from calls of few and of many steps.

    few, many: (seconds, steps) of each repeat, made next to each other. A step is the slope between the two. Raises
    ValueError unless many are more steps than few.
    """
    pairs = list(zip(few, many, strict=True))
    if not pairs or any(steps >= more for (_, steps), (_, more) in pairs):
        raise ValueError(f"expected calls of few and of more steps, got {few} and {many}")
    slopes = [(slow - fast) / (more - steps) for (fast, steps), (slow, more) in pairs]
    step = median(slopes)
    return spread(slopes), spread([seconds - steps * step for seconds, steps in few])


# ---------------------------------------------------------------- calls in this process


class Loaded:
    """The models in this process, each loaded when first asked for."""

    def __init__(self, options: argparse.Namespace):
        self.options = options

    @cached_property
    def decoder(self):
        return first_use.load_decoder(self.options)

    @cached_property
    def model(self):
        return first_use.load_transformers(self.options)

    def side(self, name: str, sampling: str) -> Ours | Theirs:
        if name in MODES:
            return Ours(self.decoder, name, sampling)
        return Theirs(self.model, sampling, name == COMPILED)

    def prompt(self, length: int) -> torch.Tensor:
        return first_use.prompt(self.decoder.tokenizer, self.decoder.target.vocab_size, length)

    @property
    def device(self) -> torch.device:
        return self.decoder.device


def timed(call: Callable, device: torch.device) -> tuple[float, object]:
    first_use.synchronise(device)
    begin = time.perf_counter()
    result = call()
    first_use.synchronise(device)
    return time.perf_counter() - begin, result


def measure_calls(
    loaded: Loaded, names: list[str], sampling: str, length: int, counts: tuple[int, int], repeats: int
) -> list[dict]:
    """Times calls of few and of many new tokens and the first token of a stream. Sides take turns at running first."""
    ids, device = loaded.prompt(length), loaded.device
    sides = {name: loaded.side(name, sampling) for name in names}
    few, many = counts
    for side in sides.values():  # the longest first: memory kept of it serves the others
        side.generate(ids, many)
        side.generate(ids, few)
        side.first_token(ids, few)
    found = {name: {"few": [], "many": [], "first": [], "own": []} for name in names}
    tokens = {}
    for turn in range(repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            side, notes = sides[name], found[name]
            for kind, count in (("few", few), ("many", many)):
                seconds, (tokens[name], steps) = timed(partial(side.generate, ids, count), device)
                notes[kind].append((seconds, steps))
            notes["own"].append(side.own_first_token())
            notes["first"].append(side.first_token(ids, few))
    ours = [name for name in names if name in MODES]
    results = []
    for name, notes in found.items():
        step, fixed = step_and_fixed(notes["few"], notes["many"])
        own = None if None in notes["own"] else spread(notes["own"])
        results.append(
            {
                "side": name,
                "sampling": sampling,
                "prompt_tokens": length,
                "step_seconds": step,
                "fixed_seconds": fixed,
                "first_token_seconds": spread(notes["first"]),
                "first_token_seconds_by_stats": own,
                "tokens_per_step": many / notes["many"][-1][1],
                "calls": {"few": notes["few"], "many": notes["many"]},
                # transformers draws other random numbers, and sums in another order.
                "same_output": tokens[name] == tokens[ours[0]] if name in MODES else None,
            }
        )
    return results


# ---------------------------------------------------------------- first use, in processes of its own


def measure_first_use(
    options: argparse.Namespace, caches: Path, side: str, sampling: str, kind: str, seconds: float
) -> dict:
    """Runs first_use.py, in a process of its own, with the caches of `kind`. One that takes longer than `seconds` is
    ended and noted.

    The warm kinds use the folder of compiled code that the cold one of this side and sampling has filled.
    """
    folder = caches / f"{side}-{sampling}".replace(" ", "-")
    tuning = folder / ("untuned" if kind == "untuned" else "tuning")
    arguments = ["--side", side, "--sampling", sampling]
    for name in ("target", "draft", "ngram", "tree", "device", "dtype", "backend", "threads"):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name}", str(value)]
    arguments += ["--prompt-tokens", str(min(128, options.room)), "--new-tokens", str(min(options.tokens))]
    compiled, tuned = CACHES[kind]
    if side not in MODES or options.tree != "auto":
        tuned = "-"  # nothing is measured to choose a tree
    result = {"side": side, "sampling": sampling, "kind": kind, "compiled": compiled, "tuning": tuned}
    environment = first_use.cache_environment(folder / "compiled", tuning)
    found = first_use.in_a_process(arguments, environment, seconds)
    return result | ({"ended_after_seconds": seconds} if found is None else found)


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One measurement. run: returns the lines to add to `part` of the report."""

    name: str
    part: str
    run: Callable[[], list[dict]]


def cases_of(options: argparse.Namespace, loaded: Loaded, caches: Path, deadline: float) -> list[Case]:
    """All cases, the most important first."""

    def first(side: str, sampling: str, *kinds: str) -> list[Case]:
        def run(kind: str) -> list[dict]:
            left = max(LEAST_CHILD_SECONDS, deadline - time.perf_counter())
            return [measure_first_use(options, caches, side, sampling, kind, left)]

        return [Case(f"first use, {side}, {sampling}, {kind}", "first_use", partial(run, kind)) for kind in kinds]

    def calls(names: list[str], sampling: str, length: int) -> Case:
        run = partial(measure_calls, loaded, names, sampling, length, options.tokens, options.repeats)
        return Case(f"calls, {', '.join(names)}, {sampling}, {length} tokens", "calls", run)

    # A decoder has no more than one side's calls in its kept memory by each sampling: one sampling after the other.
    modes = [mode for mode in TIMED if mode in options.modes]
    lengths = [length for length in options.lengths if length <= options.room]
    plain = [PLAIN] if options.transformers else []
    chosen = options.samplings
    found = [case for sampling in chosen for case in first(modes[0], sampling, "cold", "warm")]
    found += [calls([*modes, *plain], sampling, length) for sampling in chosen for length in lengths]
    if options.compiled and lengths:
        found.append(calls([modes[0], COMPILED], chosen[0], lengths[0]))
    found += [case for mode in modes[1:] for sampling in chosen for case in first(mode, sampling, "cold", "warm")]
    found += [case for side in plain for case in first(side, chosen[0], "cold")]
    if options.tree == "auto":
        found += first(modes[0], chosen[0], "untuned")
    if options.compiled:
        found += [calls([modes[0], COMPILED], sampling, length) for sampling in chosen for length in lengths][1:]
    found += [case for side in plain for sampling in chosen[1:] for case in first(side, sampling, "cold")]
    if options.compiled:
        found += [case for sampling in chosen for case in first(COMPILED, sampling, "cold")]
    return found


def bench(options: argparse.Namespace, report: dict, deadline: float) -> None:
    """Runs the cases, adds their results to the report, and writes it after each one."""
    loaded = Loaded(options)
    report |= {"first_use": [], "calls": [], "left_out": []}
    report["left_out"] += [
        f"prompts of {length} tokens: the target has room for {options.room}"
        for length in options.lengths
        if length > options.room
    ]
    with tempfile.TemporaryDirectory(prefix="stagedspec-caches-") as caches:
        for case in cases_of(options, loaded, Path(caches), deadline):
            if time.perf_counter() > deadline:
                report["left_out"].append(case.name)
                continue
            begin = time.perf_counter()
            report[case.part] += case.run()
            print(f"{case.name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            write(report, options.out)
    check_first_tokens(report["first_use"])
    write(report, options.out)


def check_first_tokens(found: list[dict]) -> None:
    """Marks for each process whether its tokens equal those of the first one with the same sampling."""
    expected = {}
    for line in found:
        if "tokens" in line and line["side"] in MODES:
            line["same_output"] = line["tokens"] == expected.setdefault(line["sampling"], line["tokens"])


def write(report: dict, out: Path | None) -> None:
    if out is not None:
        write_text(out, json.dumps(report, indent=1) + "\n")


# ---------------------------------------------------------------- tables


def milliseconds(found: dict | None) -> str:
    """Median and quartiles."""
    if found is None:
        return "-"
    return f"{1e3 * found['median']:.2f} ({1e3 * found['lower']:.2f} to {1e3 * found['upper']:.2f})"


def first_use_table(found: list[dict]) -> str:
    headings = ["first use", "sampling", "compiled code", "tuning", "import, s", "load, s", "first call, s",
                "second call, s", "same tokens"]  # fmt: skip
    names = ("import_seconds", "load_seconds", "first_seconds", "second_seconds")
    rows = []
    for line in found:
        if "ended_after_seconds" in line:
            times = ["-", "-", f"ended after {line['ended_after_seconds']:.0f}", "-"]
        else:
            times = [f"{line[name]:.2f}" for name in names]
        same = {True: "yes", False: "NO", None: "-"}[line.get("same_output")]
        rows.append([line["side"], line["sampling"], line["compiled"], line["tuning"], *times, same])
    return markdown(headings, rows)


def calls_table(found: list[dict], sampling: str) -> str:
    headings = [sampling, "prompt", "beyond its steps, ms", "first token, ms", "step, ms", "tokens/step", "same tokens"]
    rows = []
    for line in found:
        if line["sampling"] == sampling:
            times = (line[name] for name in ("fixed_seconds", "first_token_seconds", "step_seconds"))
            same = {True: "yes", False: "NO", None: "-"}[line["same_output"]]
            rows.append(
                [line["side"], str(line["prompt_tokens"]), *map(milliseconds, times), f"{line['tokens_per_step']:.2f}",
                 same]
            )  # fmt: skip
    return markdown(headings, rows)


def summary(report: dict) -> str:
    """The part of bench/README.md that this script writes."""
    settings = report["settings"]
    few, many = settings["tokens"]
    parts = [
        f"`{report['command']}`  \n{where(report)}  \n{settings['models']}; batch 1, {settings['dtype']}, backend "
        f"{settings['backend']}; {settings['repeats']} repeats of {few} and {many} new tokens."
    ]
    if report["first_use"]:
        parts.append(first_use_table(report["first_use"]))
    for sampling in SAMPLINGS:
        if any(line["sampling"] == sampling for line in report["calls"]):
            parts.append(calls_table(report["calls"], sampling))
    if report["left_out"]:
        parts.append("Left out:\n\n" + "\n".join(f"- {name}" for name in report["left_out"]))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--samplings", nargs="+", choices=SAMPLINGS, default=list(SAMPLINGS))
    parser.add_argument("--tree", default="auto", help=f"auto, or numbers: {','.join(first_use.TREE_FIELDS)}")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(LENGTHS), help="prompt tokens (default 128 16 900)"
    )
    parser.add_argument(
        "--tokens", nargs=2, type=int, default=(16, 80), metavar=("FEW", "MANY"), help="new tokens (default 16 80)"
    )
    parser.add_argument("--repeats", type=int, help="(default 5; on a CPU 3)")
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=None,
        help="transformers with a static cache and torch.compile (default: on a GPU)",
    )  # fmt: skip
    parser.add_argument("--limit-seconds", type=float, help="no case starts later (default 240; on a CPU 120)")
    parser.add_argument("--out", type=Path, help="write results as JSON, after every case")
    parser.add_argument("--update-readme", action="store_true", help="also write bench/README.md")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return options


def check(options: argparse.Namespace) -> None:
    """Fills in defaults. Raises ValueError for options that do not fit together."""
    named = (options.target, options.draft, options.ngram) if options.random is None else (None, None, None)
    early_checks.check_models(*named, options.device, options.dtype, options.backend)
    device = resolve_device(options.device)
    first_use.parse_tree(options.tree)
    early_checks.check_at_least(0, limit_seconds=options.limit_seconds)
    few, many = options.tokens
    if not 1 <= few < many:
        raise ValueError(f"--tokens must be a small and a larger number of new tokens, got {few} {many}")
    if min(options.lengths) < 1:
        raise ValueError(f"--lengths must be positive, got {min(options.lengths)}")
    if options.out is not None:
        early_checks.check_output(options.out, "--out")
    on_cpu = device.type == "cpu"
    if options.limit_seconds is None:
        options.limit_seconds = 120 if on_cpu else 240
    if options.repeats is None:
        options.repeats = 3 if on_cpu else 5
    if options.compiled is None:
        options.compiled = options.transformers and not on_cpu


def models_of(options: argparse.Namespace) -> str:
    """Description of the models."""
    if options.random is not None:
        default = "2x96" if options.random == "embedded" else "8x512"
        return f"random weights of shape {options.random}, draft {options.draft_shape or default}"
    return "the embedded models" if options.target is None else f"`{options.target}`"


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    begin = time.perf_counter()
    arguments = arguments_of(arguments)
    options = parse(arguments)
    check(options)
    quiet_transformers()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, models = resolve_device(options.device), models_of(options)
    with checkpoints(options, device) as (options.target, options.draft, options.ngram):
        if options.draft is None:
            options.modes = ["autoregressive"]
        options.room = first_use.positions(options.target) - max(options.tokens)
        report = header("latency.py", arguments, device) | {
            "settings": {
                "models": models,
                "tokens": list(options.tokens),
                "repeats": options.repeats,
                "dtype": str(resolve_dtype(options.dtype, device)).removeprefix("torch."),
                "backend": options.backend,
                "tree": options.tree,
                "limit_seconds": options.limit_seconds,
            }
        }
        bench(options, report, begin + options.limit_seconds)
    text = summary(report)
    print(text)
    if options.update_readme:
        update_readme("latency", text, [])
    same = all(line.get("same_output") is not False for line in report["first_use"] + report["calls"])
    if not same:
        print("OUTPUTS of our modes DIFFER: this is a bug, please report it", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
