"""Overhead of transformers' arguments and of `custom_generate` over the plain `Decoder.generate`, at batch 1.

    python bench/entrance.py [--limit 16] [--max-new-tokens 64] [--repeats 3] [--mode staged] [--threads 1]

Three ways to the same tokens, with the same weights and tree, taking turns on every prompt: the plain call, the same
call with a `generation_config`, and `GPT2LMHeadModel.generate` with `stagedspec.hf.custom_generate`. The cost is the
median of the paired ratios of time, less one. See bench/README.md.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from transformers import GenerationConfig, GPT2LMHeadModel

from machine import arguments_of, header, where
from sides import HERE, clear_errors, encode
from stagedspec import Decoder
from stagedspec.cli.output import quiet_transformers
from stagedspec.hf import custom_generate
from stagedspec.models import embedded
from stagedspec.tuning.prompts import read_prompts

BOUND = 0.03


def ways(mode: str, new: int, device: str) -> tuple[dict, object]:
    """The sides, functions from ids [1, L] to tokens [1, L + new], the plain one first; and the tokenizer."""
    decoder = Decoder.default(device=device)
    model = GPT2LMHeadModel.from_pretrained(embedded.TARGET, dtype=decoder.target.dtype).to(decoder.device)
    # Every side the tree that the cost model chose for one of them: it must not differ by a measurement's noise.
    tree = decoder.tree_for(mode)
    options = {"max_new_tokens": new, "pad_token_id": 0}
    config = GenerationConfig(**options, eos_token_id=[model.config.vocab_size - 1])
    eos = config.eos_token_id
    generator = custom_generate(embedded.DRAFT, embedded.NGRAM, mode, tree)
    return {
        "plain": lambda ids: decoder.generate(ids, mode=mode, tree=tree, eos_token_id=eos, **options),
        "generation_config": lambda ids: decoder.generate(ids, mode=mode, tree=tree, generation_config=config),
        "custom_generate": lambda ids: model.generate(ids, generation_config=config, custom_generate=generator),
    }, decoder.tokenizer


def measure(sides: dict, prompts: list[torch.Tensor], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side for all prompts and repeats, in the same order. The sides take turns at running first.

    Raises ValueError if a side's tokens differ from the first one's.
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for side in sides.values():
        side(prompts[0])
    for turn in range(repeats * len(prompts)):
        ids, tokens = prompts[turn % len(prompts)], {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            tokens[name] = sides[name](ids).tolist()
            seconds[name].append(time.perf_counter() - begin)
        for name in names[1:]:
            if tokens[name] != tokens[names[0]]:
                raise ValueError(f"{name} gave other tokens than {names[0]} on prompt {turn % len(prompts)}")
    return seconds


def costs(seconds: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """Relative extra time of each side over the first one: lower quartile, median and upper quartile."""
    base, *others = seconds
    found = {}
    for name in others:
        ratios = [mine / plain - 1 for mine, plain in zip(seconds[name], seconds[base], strict=True)]
        found[name] = tuple(quantiles(ratios, n=4)) if len(ratios) > 1 else (ratios[0],) * 3
    return found


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mode", default="staged")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    quiet_transformers()
    sides, tokenizer = ways(options.mode, options.max_new_tokens, options.device)
    prompts, _ = encode(read_prompts(options.prompts), tokenizer, 256, options.limit)
    seconds = measure(sides, prompts, options.repeats)
    count = len(seconds["plain"])
    report = header("entrance.py", arguments_of(arguments), torch.device(options.device))
    print(f"{report['command']}: {count} pairs of {options.max_new_tokens} new tokens, {options.mode}; {where(report)}")
    print(f"{'plain':20} {1e3 * median(seconds['plain']):8.1f} ms a call")
    worst = 0.0
    for name, (low, middle, high) in costs(seconds).items():
        print(
            f"{name:20} {1e3 * median(seconds[name]):8.1f} ms a call, costs {middle:+.2%} ({low:+.2%} to {high:+.2%})"
        )
        worst = max(worst, middle)
    print(f"the bound is {BOUND:.0%}: {'kept' if worst <= BOUND else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
