"""Times the kernels on a GPU beside their peers, at shapes of GPT-2 L and S.

    python bench/kernels/run.py [--op linears --op attention] [--model L] [--nodes 16 --nodes 64] [--full] [--out STEM]

Every case is checked against a reference before it is timed, and a ratio is printed only where the result was right.
Without options a few shapes of every operation; --full takes all of them. What has a goal comes first. Once --budget is
spent (420 seconds; inf for all of --full) no other case is started, and what was left out is named. Kernels and peers
that compile (FlexAttention, torch.compile) do so first, in processes of their own, for at most a third of the budget;
--no-compiled leaves those peers out. Writes STEM.json and STEM.md, anew with every case, and plots at the end, also
when interrupted. tables.py reads STEM.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.config
import triton
from harness import Case, copy_bandwidth, measure, table
from models import ALL, SOME, Choice
from tables import Report

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
OPS = (*FIRST, *(name for name in _FILES if name not in {*FIRST, "harness", "models", "run", "tables"}))
COMPILED = ("FlexAttention", "torch.compile")
PROCESS = 6 << 30  # bytes of GPU memory that a process may take which compiles
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


def compile_apart(todo: list[tuple[str, Choice]], compiled: bool, end: float) -> None:
    """Does every case once, untimed, in processes of their own, so that what Triton and torch compile is in their
    caches on disk. No case starts after the time `end`. A case that fails will say so when it is measured."""
    parts = [(op, replace(choice, nodes=(count,))) for op, choice in todo for count in choice.nodes]
    memory = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    processes = max(1, min(len(os.sched_getaffinity(0)), memory // PROCESS, len(parts)))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(do_once, op, part, compiled, end) for op, part in parts]
        try:
            for (op, part), done in zip(parts, waiting, strict=True):
                if done.exception():
                    print(f"not compiled ahead: {op} {part}: {done.exception()}"[:300], file=sys.stderr)
        except BaseException:  # an interrupt: the pool would wait for all of them
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def do_once(op: str, choice: Choice, compiled: bool, end: float) -> None:
    """Runs, checks and compares the cases once."""
    torch._inductor.config.compile_threads = 1  # the processes are the parallel part
    for case in cases(op, choice, compiled):
        if time.monotonic() >= end:
            return
        torch._dynamo.reset()
        for side in (case.check, case.run, *case.peers.values()):
            with suppress(Exception):
                if side is not None:
                    side()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


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
        report.plots()


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
        "command": shlex.join(["python", "bench/kernels/run.py", *sys.argv[1:]]),
    }
    print(json.dumps(machine), flush=True)
    stem = options.out or RESULTS / f"kernels-{slug(machine['gpu'])}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    report = Report(stem, machine)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what `timeout` sends: the plots are drawn even then
    # torch.compile would choose another folder once it has compiled, in each process at another time.
    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)
    todo = parts(options)
    compile_apart(todo, options.compiled, start + options.budget / 3)
    report.seconds["compiling ahead"] = time.monotonic() - start
    measure_all(todo, options.compiled, roof, start + options.budget, report)
    report.seconds["in all"] = time.monotonic() - start
    report.write()
    print("\n" + report.text())
    return 0 if all(result.matches is not False for result in report.results) else 1


if __name__ == "__main__":
    sys.exit(main())
