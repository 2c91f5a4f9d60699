"""Times `Decoder.complete_many`: rows that are replaced when they end, beside batches that end as a whole.

    python bench/many.py [--prompts FILE.jsonl[.gz]] [--limit 96] [--max-new-tokens 128] [--stop TEXT] [--batch 16]

Completions end at the stop token or at their limit, so at very different lengths. The sides take turns on all prompts;
a side whose tokens differ from another's ends the run. See bench/README.md.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console

import stagedspec
from sides import add_options, check_options, clear_errors, load, run_command
from stagedspec.cli.output import empty_table, progress_bar
from stagedspec.tuning.prompts import read_prompts


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, limit=96, max_new_tokens=128)
    parser.add_argument("--modes", nargs="+", choices=stagedspec.MODES, default=["autoregressive", "staged"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="rows decoded together")
    parser.add_argument("--greedy", action="store_true", help="without it, top-k sampling at temperature 1")
    parser.add_argument("--stop", default="\n", help="text of the token that ends a completion (default: a line break)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each with a call of every side")
    parser.add_argument("--out", type=Path, help="write results as JSON")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return options


def bench(options: argparse.Namespace, console: Console) -> dict:
    """Runs the benchmark and prints its table. Raises ValueError where tokens differ."""
    models = load(options)
    decoder, prompts = models.decoder, read_prompts(options.prompts)[: options.limit]
    stop = models.tokenizer.encode(options.stop, add_special_tokens=False)
    if len(stop) != 1:
        raise ValueError(f"--stop must be the text of one token, got {options.stop!r} of {len(stop)}")
    settings = {"max_new_tokens": options.max_new_tokens, "eos_token_id": stop, "seed": options.seed}
    if not options.greedy:
        settings |= {"do_sample": True, "top_k": options.top_k}
    ops = decoder.target.ops
    refills = ops.replaces_rows
    sides = [
        (mode, batch, refilled)
        for mode, batch in itertools.product(options.modes, options.batch)
        for refilled in ((False, True) if refills and batch > 1 else (False,))
    ]

    def run(mode: str, batch: int, refilled: bool) -> list[list[int]]:
        ops.replaces_rows = refilled
        try:
            return [one.tokens for one in decoder.complete_many(prompts, mode=mode, batch=batch, **settings)]
        finally:
            ops.replaces_rows = refills

    seconds: dict[tuple, list[float]] = {side: [] for side in sides}
    expected: list[list[int]] = []
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("rounds", total=(1 + options.repeats) * len(sides))
        for turn in range(1 + options.repeats):  # the first warms up
            for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                begin = time.perf_counter()
                found = run(*side)
                if turn:
                    seconds[side].append(time.perf_counter() - begin)
                expected = expected or found
                if found != expected:
                    raise ValueError(f"{side}: the tokens differ from those of {sides[0]}")
                progress.advance(task)
                progress.refresh()
    lengths = sorted(map(len, expected))
    tokens = sum(lengths)
    rows = []
    for mode, batch, refilled in sides:
        times = seconds[mode, batch, refilled]
        fixed = seconds[mode, batch, False]
        gain = statistics.median(theirs / ours for theirs, ours in zip(fixed, times, strict=True))
        rows.append(
            {"mode": mode, "batch": batch, "replaced": refilled, "seconds": times,
             "tokens_per_second": tokens / statistics.median(times), "over_whole_batches": gain if refilled else None}
        )  # fmt: skip
    quartiles = statistics.quantiles(lengths, n=4, method="inclusive")
    console.print(
        f"{len(expected)} completions of {lengths[0]} to {lengths[-1]} tokens, quartiles "
        f"{', '.join(f'{cut:.0f}' for cut in quartiles)}, {tokens} in all",
        highlight=False,
    )
    table = empty_table()
    for name in ("mode", "batch", "rows", "tokens/s", "over whole batches"):
        table.add_column(name, justify="left" if name in ("mode", "rows") else "right")
    for row in rows:
        gain = "" if row["over_whole_batches"] is None else f"{row['over_whole_batches']:.2f}x"
        kind = "" if row["batch"] == 1 else "replaced" if row["replaced"] else "whole batches"
        table.add_row(row["mode"], str(row["batch"]), kind, f"{row['tokens_per_second']:.0f}", gain)
    console.print(table)
    return {"lengths": lengths, "sides": rows, "device": decoder.device, "backend": decoder.backend}


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    run_command("many.py", parse, bench, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
