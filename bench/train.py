"""The rate at which `stagedspec train` fits a preset's target, as a share of this machine's measured matrix rate.

    python bench/train.py [--preset gpt2-large] [--steps 30] [--micro-batch 32] [--out train.json]

The loop is the recipe's own (training/fit.py), on random tokens: the content does not change the speed. FLOPs are those
of `forward_flops`, three times (forward, gradients of inputs and of weights), nothing recomputed counted. The matrix
rate is that of an 8192 x 8192 x 8192 product in the dtype that training multiplies in (a small one in fp32 on a CPU).
"""

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from sides import clear_errors
from stagedspec.devices import resolve_device
from stagedspec.kernels.common.files import write_text
from stagedspec.training import recipe
from stagedspec.training.fit import cross_entropy, fit, sample_blocks


class _Enough(Exception):
    """Ends the loop after the wanted number of steps, before a checkpoint is written."""


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of one large product on random data: the median of ten, after three."""
    gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(13):
        start = time.perf_counter()
        a @ b
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[3:])


def training_rates(config: recipe.TrainConfig, device: torch.device, steps: int, micro_batch: int | None) -> list[dict]:
    """Collects the reports of the training loop: one for each step on a CPU, for every tenth on a GPU."""
    model = recipe.new_model(config, config.target).to(device)
    # At its whole depth, for as long as it takes.
    settings = replace(config.target_fit, checkpoint_seconds=1e9, seconds=None, shallow_layers=None)
    tokens = torch.randint(config.vocab_size, (1 << 20,), generator=torch.Generator().manual_seed(0))
    reports: list[dict] = []

    def report(values: dict) -> None:
        reports.append(values)
        print(json.dumps(values), file=sys.stderr, flush=True)
        if values["step"] >= steps:
            raise _Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        fit(
            model,
            settings,
            Path(folder),
            lambda step: sample_blocks(tokens, settings, step),
            cross_entropy,
            report,
            micro_batch=micro_batch,
        )
    return reports


@clear_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2-large", help=", ".join(recipe.PRESETS))
    parser.add_argument("--steps", type=int, default=30, help="on a GPU a multiple of 10; the first 10 warm up")
    parser.add_argument("--micro-batch", type=int, help="blocks a pass (default: the preset's)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    config = recipe.preset(options.preset)
    device = resolve_device(options.device)
    if options.steps < 2 or (device.type == "cuda" and options.steps < 20):
        raise ValueError(f"--steps must be at least 2, and 20 on a GPU, got {options.steps}")
    micro_batch = options.micro_batch or config.target_micro_batch
    roof = matrix_rate(device)
    reports = training_rates(config, device, options.steps, micro_batch)[1:]
    tflops = statistics.median(values["tflops"] for values in reports)
    result = {
        "preset": options.preset,
        "batch": config.target_fit.batch,
        "micro_batch": micro_batch or config.target_fit.batch,
        "block": config.target_fit.block,
        "tokens_per_second": statistics.median(values["tokens_per_second"] for values in reports),
        "tflops": tflops,
        "matrix_tflops": roof / 1e12,
        "share": tflops * 1e12 / roof,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        write_text(options.out, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
