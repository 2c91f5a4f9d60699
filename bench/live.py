"""Cost for a call of noticing that the caller's model object has changed, without a generation.

    python bench/live.py [--layers 4 --width 384 --vocabulary 2048] [--device cpu] [--threads 1] [--repeats 15]

A model of random weights; medians and quartiles of milliseconds. `target` and `draft` are what every call looks at;
`check` is what follows only where something has changed; `all values` is what reading every weight would cost instead.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import quantiles

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from machine import arguments_of, header, where
from stagedspec.cli.output import quiet_transformers
from stagedspec.models.gpt2 import finite
from stagedspec.models.plain_gpt2 import check_plain, fingerprint


def sides(model: GPT2LMHeadModel) -> dict[str, Callable[[], object]]:
    return {
        "target": lambda: fingerprint(model, sampled=True),
        "draft": lambda: fingerprint(model, sampled=False),
        "check": lambda: check_plain(model, "target"),
        "all values": lambda: [finite(one) for one in model.parameters()],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    quiet_transformers()
    sizes = {"n_layer": options.layers, "n_embd": options.width, "n_head": max(1, options.width // 64)}
    config = GPT2Config(**sizes, vocab_size=options.vocabulary, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval().to(options.device)
    report = header("live.py", arguments_of(arguments), torch.device(options.device))
    print(f"{report['command']}: {model.num_parameters() / 1e6:.1f}M parameters; {where(report)}")
    measured: dict[str, list[float]] = {name: [] for name in sides(model)}
    for _ in range(options.repeats):
        for name, run in sides(model).items():  # all in turn: a busy moment must not fall on one alone
            begin = time.perf_counter()
            run()
            measured[name].append(1e3 * (time.perf_counter() - begin))
    for name, times in measured.items():
        low, middle, high = quantiles(times, n=4)
        print(f"{name:12} {middle:8.2f} ms ({low:.2f} to {high:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
