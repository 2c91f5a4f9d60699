"""Times the kernels on a GPU beside their peers, at the shapes of GPT-2 L and S.

    python bench/kernels/run.py [--op linears --op attention] [--model L] [--nodes 16 --nodes 64] [--out kernels.json]

Every case is checked against a reference before it is timed, and a ratio is printed only where the result was right.
Peers that compile (FlexAttention, torch.compile) take most of the time: --no-compiled leaves them out.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import torch
import triton
from harness import Case, Result, copy_bandwidth, measure, table

OPS = {"linears": "linears", "attention": "attention"}
COMPILED = ("FlexAttention", "torch.compile")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for op in options.op or OPS:
        choice = {"names": tuple(options.model)} if options.model else {}
        if options.nodes:
            choice["nodes"] = tuple(options.nodes)
        if options.context and op == "attention":
            choice["contexts"] = tuple(options.context)
        for case in import_module(OPS[op]).cases(**choice):
            if not options.compiled:
                case.peers = {name: peer for name, peer in case.peers.items() if name not in COMPILED}
            yield case


def plot(results: list[Result], roof: float, path: Path) -> None:
    """GB/s by number of nodes, a line an operation, under the measured roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        extra = "".join(f" {key}={value}" for key, value in result.shape.items() if key != "N")
        name = f"{result.model} {result.op}{extra}"
        lines.setdefault(name, []).append((result.shape["N"], result.gigabytes_per_second))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.axhline(roof / 1e9, color="grey", linestyle="--", label="measured copy")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="nodes of a pass", ylabel="GB/s", ylim=(0, None))
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--model", action="append", choices=("L", "S"))
    parser.add_argument("--nodes", action="append", type=int)
    parser.add_argument("--context", action="append", type=int)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="write results as JSON, and a plot beside it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: these benchmarks need a GPU; `make bench` runs those that make sense on a CPU", file=sys.stderr)
        return 2
    roof = copy_bandwidth()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_per_s": roof / 1e9,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "command": "python " + " ".join(sys.argv),
    }
    print(json.dumps(machine), flush=True)
    results = []
    for case in cases(options):
        results.append(measure(case, roof))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        if options.out:
            data = {"machine": machine, "results": [result.as_dict() for result in results]}
            options.out.write_text(json.dumps(data, indent=1), encoding="utf-8")
    print("\n" + table(results))
    if options.out:
        plot(results, roof, options.out.with_suffix(".png"))
    return 0 if all(result.matches for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
