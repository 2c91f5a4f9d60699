"""Times the kernels on a GPU beside their peers, at shapes of GPT-2 L and S.

    python bench/kernels/run.py [--op linears --op attention] [--model L] [--nodes 16 --nodes 64] [--full] [--out STEM]

Every case is checked against a reference before it is timed, and a ratio is printed only where the result was right.
Without options a few shapes of every operation, in minutes; --full takes all of them. Peers that compile
(FlexAttention, torch.compile) take most of the time: --no-compiled leaves them out. Writes STEM.json, STEM.md and a
plot of each operation.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import torch
import triton
from harness import Case, Result, Timing, copy_bandwidth, measure, table
from models import ALL, SOME, Choice

from stagedspec.kernels.configs import slug

OPS = ("linears", "attention", "head", "choose", "ngram", "grow", "verify", "compact", "embed")
COMPILED = ("FlexAttention", "torch.compile")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    choice = ALL if options.full else SOME
    given = {part.name: getattr(options, part.name) for part in fields(Choice)}
    choice = replace(choice, **{name: tuple(values) for name, values in given.items() if values})
    for op in options.op or OPS:
        for case in import_module(op).cases(choice):
            if not options.compiled:
                case.peers = {name: peer for name, peer in case.peers.items() if name not in COMPILED}
            yield case


def plot(op: str, results: list[Result], path: Path) -> None:
    """Microseconds by number of nodes: ours, and the peers of the same shapes in the same colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for result in results:
        name = " ".join([result.model, *(f"{key}={value}" for key, value in result.shape.items() if key != "N")])
        for side, timing in {"ours": result.ours, **result.peers}.items():
            if isinstance(timing, Timing):
                lines.setdefault(name, {}).setdefault(side, []).append((result.shape["N"], timing.median))
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for i_line, (name, sides) in enumerate(lines.items()):
        for i_side, (side, points) in enumerate(sides.items()):
            label = f"{side}, {name}" if i_line == 0 or side == "ours" else None
            style = {"color": f"C{i_line % 10}", "linestyle": ("-", "--", ":", "-.")[min(i_side, 3)], "label": label}
            axes.plot(*zip(*sorted(points), strict=True), marker="o" if side == "ours" else "", **style)
    axes.set_xscale("log", base=2)
    axes.set(title=op, xlabel="nodes of a pass", ylabel="µs", yscale="log")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--model", action="append", choices=ALL.model)
    parser.add_argument("--nodes", action="append", type=int)
    parser.add_argument("--context", action="append", type=int)
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--full", action="store_true", help="all shapes")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="where to write, without suffix; default: bench/results/kernels-GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: these benchmarks need a GPU; `make bench` runs those that make sense on a CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
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
    stem = options.out or RESULTS / f"kernels-{slug(machine['gpu'])}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for case in cases(options):
        results.append(measure(case, roof))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        data = {"machine": machine, "results": [result.as_dict() for result in results]}
        stem.with_name(f"{stem.name}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    by_op: dict[str, list[Result]] = {}
    for result in results:
        by_op.setdefault(result.op, []).append(result)
    parts = [f"## {op}\n\n{table(group)}\n" for op, group in by_op.items()]
    text = "\n".join([f"`{json.dumps(machine)}`\n", *parts])
    stem.with_name(f"{stem.name}.md").write_text(text, encoding="utf-8")
    for op, group in by_op.items():
        plot(op, group, stem.with_name(f"{stem.name}-{slug(op)}.png"))
    print("\n" + text)
    return 0 if all(result.matches is not False for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
