"""Whole passes of GPT-2 L with kernels replaced: what the experiments beside this file measure by."""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench/, where it is not run from

Case = tuple[int, int, int]  # sequences, nodes of each, tokens before them


def compare(
    sides: Mapping[str, Callable[[], AbstractContextManager[None]]], cases: Sequence[Case], rounds: int = 31
) -> dict[str, dict[str, float]]:
    """Microseconds of captured passes in bf16 up to the choice of tokens, by case and side: medians, sides alternating.

    sides: each a context in which its kernels take the place of today's.
    """
    from random_models import make_random
    from stagedspec.kernels.backends.select import resolve
    from stagedspec.kernels.common.timing import Stopwatch
    from stagedspec.models.gpt2 import GPT2
    from stagedspec.models.shapes import SIZES
    from stagedspec.planning import cost

    device, shape = torch.device("cuda", 0), SIZES["L"]
    torch.cuda.set_device(device)
    ops = resolve("triton", device, [shape.head_size], torch.bfloat16)
    model = GPT2(make_random(shape, shape.positions, 0, device), ops, device, torch.bfloat16)
    graphs, times = {}, {}
    for side, context in sides.items():
        with context():
            for batch, nodes, length in cases:
                cost.CONTEXT = length
                key = side, f"B={batch} N={nodes} L={length}"
                graphs[key], times[key] = ops.repeated(cost.timed_pass(model, False, batch, nodes, False)), []
            own = [graph for (of, _), graph in graphs.items() if of == side]
            ops.prepare([(graph, ()) for graph in own], device)
            for graph in own:
                graph()
    for _ in range(rounds):
        for key, graph in graphs.items():
            times[key].append(Stopwatch(device))
            times[key][-1].start()
            graph()
            times[key][-1].stop()
    found: dict[str, dict[str, float]] = {}
    for (side, case), watches in times.items():
        found.setdefault(case, {})[side] = round(1e6 * statistics.median(watch.seconds for watch in watches), 1)
    return found


def report(found: Mapping[str, Mapping[str, float]], out: Path | None) -> None:
    """Prints what `compare` found, and writes it as JSON."""
    for case, sides in found.items():
        print(case)
        for side, microseconds in sides.items():
            print(f"  {microseconds:8.1f}  {side}")
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
