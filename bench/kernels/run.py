"""Times the kernels on a GPU beside their peers, at shapes of GPT-2 L and S.

    python bench/kernels/run.py [--op linears --op attention] [--model L] [--nodes 16 --nodes 64] [--full] [--out STEM]

Every case is checked against a reference before it is timed, and a ratio is printed only where the result was right.
Without options a few shapes of every operation; --full takes all of them. What has a goal comes first. Once --budget is
spent (420 seconds; inf for all of --full) no other case is started, and what was left out is named. Peers that compile
(FlexAttention, torch.compile) take most of the time: --no-compiled leaves them out. Writes STEM.json and STEM.md, anew
with every case, and a plot of each operation at the end, also when interrupted.
"""

import argparse
import json
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import torch
import triton
from harness import Case, Result, Timing, copy_bandwidth, measure, table
from models import ALL, SOME, Choice

from stagedspec.kernels.common.files import write_text
from stagedspec.kernels.common.launch_configs import slug

# What has a goal, and is measured first: time may not suffice for all.
FIRST = {
    "linears": {"nodes": (16, 64)},
    "attention": {"nodes": (64,), "context": (512, 1024)},
    "head": {"nodes": (64,)},
    "ngram": {},
    "grow": {},
}
# An operation has a file in this folder.
_FILES = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
OPS = (*FIRST, *(name for name in _FILES if name not in {*FIRST, "harness", "models", "run"}))
COMPILED = ("FlexAttention", "torch.compile")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def parts(options: argparse.Namespace) -> list[tuple[str, Choice]]:
    """Operations and their shapes, in the order in which they are measured."""
    choice = ALL if options.full else SOME
    given = {part.name: getattr(options, part.name) for part in fields(Choice)}
    choice = replace(choice, **{name: tuple(values) for name, values in given.items() if values})
    early, late = [], []
    for op in options.op or OPS:
        first, rest = choice.split(**FIRST[op]) if op in FIRST else (None, [choice])
        early.append((op, first))
        late += [(op, part) for part in rest]
    return [(op, part) for op, part in early + late if part and all(vars(part).values())]


def cases(op: str, choice: Choice, compiled: bool) -> Iterator[Case]:
    for case in import_module(op).cases(choice):
        if not compiled:
            case.peers = {name: peer for name, peer in case.peers.items() if name not in COMPILED}
        yield case


@dataclass
class Report:
    """Results, written one by one, so that an interrupted run leaves what it has measured."""

    stem: Path
    machine: dict
    results: list[Result] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def by_op(self) -> dict[str, list[Result]]:
        groups: dict[str, list[Result]] = {}
        for result in self.results:
            groups.setdefault(result.op, []).append(result)
        return groups

    def write(self) -> None:
        results = [result.as_dict() for result in self.results]
        data = {"machine": self.machine, "results": results, "left_out": self.left_out}
        write_text(self.stem.with_name(f"{self.stem.name}.json"), json.dumps(data, indent=1))
        write_text(self.stem.with_name(f"{self.stem.name}.md"), self.text())

    def text(self) -> str:
        tables = [f"## {op}\n\n{table(group)}\n" for op, group in self.by_op().items()]
        left_out = ["Left out, since the run ended before:\n", *(f"- {part}" for part in self.left_out), ""]
        return "\n".join([f"`{json.dumps(self.machine)}`\n", *tables, *(left_out if self.left_out else [])])

    def plot(self) -> None:
        for op, group in self.by_op().items():
            plot(op, group, self.stem.with_name(f"{self.stem.name}-{slug(op)}.png"))


def measure_all(todo: list[tuple[str, Choice]], compiled: bool, roof: float, end: float, report: Report) -> None:
    """Measures the cases in order. No case starts after the time `end`."""
    try:
        for index, (op, choice) in enumerate(todo):
            report.left_out = [f"{op}: {choice}" for op, choice in todo[index:]]
            if time.monotonic() >= end:
                return
            for case in cases(op, choice, compiled):
                if time.monotonic() >= end:
                    return
                report.results.append(measure(case, roof))
                report.left_out[0] = f"{op}: {choice}, after {case.op} {case.shape}"
                print(table(report.results[-1:]).splitlines()[-1], flush=True)
                report.write()
        report.left_out = []
    finally:
        report.write()
        report.plot()


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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--model", action="append", choices=ALL.model)
    parser.add_argument("--nodes", action="append", type=int)
    parser.add_argument("--context", action="append", type=int)
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--full", action="store_true", help="all shapes")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no case is started; inf: none")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="where to write, without suffix; default: bench/results/kernels-GPU")
    return parser.parse_args(arguments)


def main() -> int:
    start, options = time.monotonic(), parse()
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
    report = Report(stem, machine)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what `timeout` sends: the plots are drawn even then
    measure_all(parts(options), options.compiled, roof, start + options.budget, report)
    print("\n" + report.text())
    return 0 if all(result.matches is not False for result in report.results) else 1


if __name__ == "__main__":
    sys.exit(main())
