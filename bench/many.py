"""Times `Decoder.complete_many`: rows that are replaced when they end, beside batches that end as a whole.

    python bench/many.py [--prompts FILE.jsonl[.gz]] [--limit 96] [--max-new-tokens 128] [--stop TEXT] [--batch 16]

Completions end at the stop token or at their limit, so at very different lengths. Whole batches compute all their rows
until the last one has ended, as `generate` does; trimmed ones leave out rows that have ended; then the next prompts
replace them. All take prompts in order of length. The sides take turns on all prompts; a side whose tokens differ from
another's ends the run. See bench/README.md.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

import stagedspec
from random_models import SHAPES, save_random, shape_of
from sides import add_options, check_options, clear_errors, encode, load, run_command
from stagedspec.cli.output import empty_table, progress_bar
from stagedspec.tuning.prompts import read_prompts

KINDS = WHOLE, TRIMMED, _ = "whole", "trimmed", "replaced"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, limit=96, max_new_tokens=128)
    parser.add_argument("--modes", nargs="+", choices=stagedspec.MODES, default=["autoregressive", "staged"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="rows decoded together")
    parser.add_argument("--greedy", action="store_true", help="without it, top-k sampling at temperature 1")
    parser.add_argument("--stop", default="\n", help="text of the token that ends a completion (default: a line break)")
    parser.add_argument(
        "--random", choices=SHAPES, help="random weights of a GPT-2's shape, in place of a model, prompts and --stop"
    )
    parser.add_argument(
        "--mean", type=int, default=48, help="with --random: new tokens that completions would have without a limit"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each with a call of every side")
    parser.add_argument("--out", type=Path, help="write results as JSON")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return options


class Work(NamedTuple):
    """What all sides do. prompts: the longest first; settings: of `Decoder.complete_many`."""

    decoder: stagedspec.Decoder
    prompts: list[torch.Tensor]
    settings: dict[str, Any]


def work(options: argparse.Namespace) -> Work:
    """Loads model and prompts. Raises ValueError for a stop text that is not one token."""
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
    if not options.greedy:
        settings |= {"do_sample": True, "top_k": None if options.random else options.top_k}
    if options.random is None:
        models = load(options)
        stop = models.tokenizer.encode(options.stop, add_special_tokens=False)
        if len(stop) != 1:
            raise ValueError(f"--stop must be the text of one token, got {options.stop!r} of {len(stop)}")
        room = models.decoder.target.positions + 1 - options.max_new_tokens
        encoded, _ = encode(read_prompts(options.prompts), models.tokenizer, room, options.limit)
        prompts = [ids[0] for ids in encoded]
        return Work(models.decoder, sorted(prompts, key=len, reverse=True), settings | {"eos_token_id": stop})
    if options.threads:
        torch.set_num_threads(options.threads)
    shape, generator = shape_of(options.random), torch.Generator().manual_seed(options.seed)
    lengths = torch.randint(16, 65, (options.limit,), generator=generator).sort(descending=True)[0].tolist()
    prompts = [torch.randint(shape.vocab, (length,), generator=generator) for length in lengths]
    with tempfile.TemporaryDirectory(prefix="stagedspec-models-") as folder:
        save_random(shape, 1024, Path(folder), 0, torch.device("cpu"))
        decoder = stagedspec.Decoder.from_pretrained(
            folder, device=options.device, dtype=options.dtype, backend=options.backend
        )
    # Random weights choose nearly evenly: one of these tokens comes up once in `mean`.
    return Work(decoder, prompts, settings | {"eos_token_id": list(range(shape.vocab // options.mean))})


def bench(options: argparse.Namespace, console: Console) -> dict:
    """Runs the benchmark and prints its table. Raises ValueError where tokens differ."""
    decoder, prompts, settings = work(options)
    ops = decoder.target.ops
    refills = ops.replaces_rows
    seeds = [stagedspec.row_seed(options.seed, index) for index in range(len(prompts))]
    sides = [
        (mode, batch, kind)
        for mode, batch in itertools.product(options.modes, options.batch)
        for kind in (KINDS if refills and batch > 1 else KINDS[:1])
    ]

    def run(mode: str, batch: int, kind: str) -> list[list[int]]:
        together, tokens = batch if kind == TRIMMED else len(prompts), []
        ops.replaces_rows = refills and kind != WHOLE
        try:
            for start in range(0, len(prompts), together):
                part = slice(start, start + together)
                own = {} if options.greedy else {"seed": seeds[part]}
                found = decoder.complete_many(prompts[part], mode=mode, batch=batch, **settings, **own)
                tokens += [one.tokens for one in found]
        finally:
            ops.replaces_rows = refills
        return tokens

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
    for mode, batch, kind in sides:
        times = seconds[mode, batch, kind]
        over = {
            other: statistics.median(
                theirs / ours for theirs, ours in zip(seconds[mode, batch, other], times, strict=True)
            )
            for other in KINDS[: KINDS.index(kind)]
        }
        rows.append(
            {"mode": mode, "batch": batch, "rows": kind, "seconds": times,
             "tokens_per_second": tokens / statistics.median(times), "over": over}
        )  # fmt: skip
    quartiles = statistics.quantiles(lengths, n=4, method="inclusive")
    console.print(
        f"{len(expected)} completions of {lengths[0]} to {lengths[-1]} tokens, quartiles "
        f"{', '.join(f'{cut:.0f}' for cut in quartiles)}, {tokens} in all",
        highlight=False,
    )
    table = empty_table()
    for name in ("mode", "batch", "rows", "tokens/s", *(f"over {kind}" for kind in KINDS[:2])):
        table.add_column(name, justify="left" if name in ("mode", "rows") else "right")
    for row in rows:
        over = [f"{row['over'][kind]:.2f}x" if kind in row["over"] else "" for kind in KINDS[:2]]
        kind = row["rows"] if row["batch"] > 1 else ""
        table.add_row(row["mode"], str(row["batch"]), kind, f"{row['tokens_per_second']:.0f}", *over)
    console.print(table)
    return {"lengths": lengths, "sides": rows, "device": decoder.device, "backend": decoder.backend}


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    run_command("many.py", parse, bench, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
