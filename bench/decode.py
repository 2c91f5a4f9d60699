"""Times the decoding modes side by side, beside transformers `generate`, prompt by prompt or in batches.

    python bench/decode.py [--prompts FILE.jsonl[.gz]] [--limit 32] [--max-new-tokens 128] [--sampling both]
                           [--batch 1 4 8 16]

The sides alternate on every prompt; all have the same weights and dtype. Every output is compared token by token with
the autoregressive mode's, and a side whose output differs gets no ratio. See bench/README.md.
"""

import argparse
import itertools
import sys
from pathlib import Path

import ctranslate2_peer
from ctranslate2_peer import ctranslate2_side
from rich.console import Console

import stagedspec
from sides import (
    BASELINE,
    PLAIN,
    add_options,
    batches,
    check_options,
    clear_errors,
    encode,
    load,
    measure,
    our_side,
    run_command,
    transformers_side,
)
from stagedspec.decoding.limits import MAX_BATCH
from stagedspec.tuning.compare import summarise, table
from stagedspec.tuning.prompts import read_prompts


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, limit=32, max_new_tokens=128)
    parser.add_argument("--modes", nargs="+", choices=stagedspec.MODES, default=list(stagedspec.MODES))
    parser.add_argument("--sampling", choices=("greedy", "sample", "both"), default="both")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts decoded together (default 1)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of every side on every prompt")
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--ctranslate2",
        action=argparse.BooleanOptionalAction,
        default=ctranslate2_peer.installed(),
        help="on a CPU in fp32; by default if it is installed",
    )
    parser.add_argument(
        "--random-draft", action="store_true", help="random weights in the draft: what a hopeless draft costs"
    )
    parser.add_argument("--out", type=Path, help="write results as JSON")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if max(options.batch) > MAX_BATCH:
        parser.error(f"--batch can be at most {MAX_BATCH}, got {max(options.batch)}")
    return options


def bench(options: argparse.Namespace, console: Console) -> dict:
    """Runs the benchmark. Returns the results. Raises ValueError for prompts or models that cannot be used."""
    prompts = read_prompts(options.prompts)
    models = load(options)
    room = models.target.config.n_positions - options.max_new_tokens
    encoded, skipped = encode(prompts, models.tokenizer, room, options.limit)
    console.print(f"{len(encoded)} prompts, {skipped} skipped: empty, or longer than {room} tokens", highlight=False)

    samplings = {
        "greedy": {"do_sample": False},
        "sample": {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k},
    }
    chosen = list(samplings) if options.sampling == "both" else [options.sampling]
    modes = [BASELINE, *(mode for mode in options.modes if mode != BASELINE)]
    results, same = {}, True
    for name, size in itertools.product(chosen, options.batch):
        settings = {"max_new_tokens": options.max_new_tokens, "seed": options.seed, **samplings[name]}
        made = {mode: our_side(models.decoder, mode, settings) for mode in modes}
        if options.transformers:
            made[PLAIN] = transformers_side(models, settings)
        peers = []
        if options.ctranslate2 and str(models.decoder.device) == "cpu" and options.dtype == "float32":
            peers = list(ctranslate2_peer.TYPES)
            made |= {peer: ctranslate2_side(models.target, settings, peer) for peer in peers}
        sides = {side: lambda batch, run=run: run(*batch) for side, run in made.items()}
        runs = measure(sides, batches(encoded, size), options.repeats, name)
        # Sampled, transformers draws other random numbers: its tokens are not expected to be ours.
        # Rounded to int8, the weights are others.
        other = {PLAIN, *peers} if name == "sample" else {ctranslate2_peer.INT8}
        rows = summarise(runs, list(sides), frozenset(other))
        same = same and all(row.identical is not False for row in rows)
        warped = f"top-k {options.top_k}, T={options.temperature:g}" if name == "sample" else ""
        title = f"{name} {warped}".rstrip()
        console.print(table(rows, f"{title}, {options.max_new_tokens} new tokens, batch {size}, {options.dtype}"))
        least = {side: ratio for side, ratio in _least(runs).items() if side not in other}
        worst = ", ".join(f"{side} {ratio:.2f}x" for side, ratio in least.items())
        console.print(f"least speed-up of a run: {worst}\n", highlight=False)
        results[name if size == 1 else f"{name}, batch {size}"] = {
            "batch": size,
            "least_speedup": least,
            "settings": settings,
            "sides": [row.as_dict() for row in rows],
            "runs": [
                {"side": t.side, "prompt": t.prompt, "new_tokens": len(t.run.tokens), "seconds": t.seconds}
                for t in runs
            ],
        }
    return {
        "prompts": {"file": options.prompts.name, "used": len(encoded), "skipped": skipped},
        "identical": same,
        "results": results,
        "device": models.decoder.device,
        "backend": models.decoder.backend,
    }


def _least(runs: list) -> dict[str, float]:
    """Lowest speed-up of each side over the baseline, among pairs of runs next to each other."""
    times: dict[str, list[float]] = {}
    for timed in runs:
        times.setdefault(timed.side, []).append(timed.seconds)
    base = times.pop(BASELINE)
    return {side: min(b / s for b, s in zip(base, seconds, strict=True)) for side, seconds in times.items()}


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    report = run_command("decode.py", parse, bench, arguments)
    return 0 if report["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
