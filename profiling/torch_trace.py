"""Traces a few steps with the torch profiler: a Chrome trace, and each kernel's time beside the bytes it must move.

    python profiling/torch_trace.py [--shape L] [--backend triton] [--roof 3000] [--out trace.json] [--as-decoded]

Works on any device and backend. The steps are launched one kernel at a time, never as a CUDA graph, so that every
kernel belongs to a phase and an operation; --as-decoded traces them as they run, with kernels' names alone. Options of
step.py choose model, mode and tree. README.md says how to read the table.
"""

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

import stagedspec
from step import add_options, clear_errors, load, parse, steps  # which puts bench/ on the path

# isort: split
import machine

STEP, HOST, REPLAYED = "step", "(host)", "(of a CUDA graph)"
Place = tuple[str, ...]  # the ranges below a step's, outermost first: phase, operation


# ---------------------------------------------------------------- what is watched


class Watched:
    """A backend whose operations are ranges of the trace, annotated with the bytes that they must move.

    prefix: committed tokens of all sequences; moved: bytes by place.
    """

    def __init__(self, ops) -> None:
        self.ops, self.prefix, self.phase = ops, 0, ""
        self.moved: Counter[Place] = Counter()
        self.names = {STEP}

    def __getattr__(self, name: str):
        found = getattr(self.ops, name)
        return partial(self._run, name, found) if name in FLOORS else found

    def _run(self, name: str, operation: Callable, *arguments):
        shapes = ["x".join(map(str, layer.weight.shape)) for layer in arguments if hasattr(layer, "weight")]
        label = " ".join([name, *shapes])
        self.names.add(label)
        with record_function(label):
            result = operation(*arguments)
        self.moved[self.phase, label] += FLOORS[name](arguments, result, self.prefix)
        return result

    @contextmanager
    def mark(self, phase: str) -> Iterator[None]:
        """Marks a phase, as `Decoder.mark`."""
        self.phase = phase
        self.names.add(phase)
        with record_function(phase):
            yield


def size(value: object) -> int:
    """Bytes of a tensor, array, a layer's or head's weight, bias and scales, or a sequence of these; 0 for others."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.nbytes
    if hasattr(value, "weight"):
        return sum(size(getattr(value, name, None)) for name in ("weight", "bias", "scales"))
    return sum(map(size, value)) if isinstance(value, (tuple, list)) else 0


def everything(arguments: tuple, result: object, prefix: int) -> int:
    """Every tensor is read once and the result written."""
    return size(arguments) + size(result)


def prefix_and_nodes(arguments: tuple, result: torch.Tensor, prefix: int) -> int:
    """The committed keys and values are read once; the nodes' queries, keys and values too, and the result written."""
    qkv, view = arguments[:2]
    return size(qkv) + size(result) + prefix * (qkv.shape[1] - result.shape[1]) * view[0].element_size()


def rows_of_tables(arguments: tuple, result: torch.Tensor, prefix: int) -> int:
    """A row of each table is read for a row that is written."""
    return 3 * size(result) + size(arguments[2:])


def compiled_layers(arguments: tuple, result: object, prefix: int) -> int:
    """All layers are read once, a row of each table for a node, and the committed keys and values; hidden states are
    written."""
    weights, batch, cache = arguments[0].weights, arguments[1], arguments[2]
    layers = size((weights.norms, weights.products, weights.biases))
    hidden = batch.tokens.numel() * size(weights.tables[0][0])
    return layers + 3 * hidden + prefix * size(cache[:, 0, 0])


def compiled_head(arguments: tuple, result: object, prefix: int) -> int:
    """The head is read once, the hidden states too, and the logits written."""
    weights, hidden = arguments[0].weights, arguments[1]
    return size((weights.final, weights.head, hidden, result))


def compiled_pass(arguments: tuple, result: object, prefix: int) -> int:
    """Layers and head; tokens or children are written, and hidden states stay in the caches."""
    weights = arguments[0].weights
    return compiled_layers(arguments, result, prefix) + size((weights.final, weights.head, result))


def little(arguments: tuple, result: object, prefix: int) -> int:
    """A few rows, not worth counting."""
    return 0


FLOORS = {
    "norm_linear": everything,
    "linear_add": everything,
    "head_logits": everything,
    "lm_head_choose": everything,
    "lm_head_children": everything,
    "tree_attention": prefix_and_nodes,
    "embed": rows_of_tables,
    "compiled_forward": compiled_layers,
    "compiled_logits": compiled_head,
    "compiled_choose": compiled_pass,
    "compiled_children": compiled_pass,
    "choose": everything,
    "move_rows": little,
}


# ---------------------------------------------------------------- reading the profile


@dataclass
class Row:
    """One operation in a step: kernel names to (launches, µs), and the bytes that it must move."""

    place: Place
    kernels: dict[str, tuple[float, float]]
    moved: float = 0.0

    @property
    def launches(self) -> float:
        return sum(count for count, _ in self.kernels.values())

    @property
    def microseconds(self) -> float:
        return sum(time for _, time in self.kernels.values())


@dataclass(frozen=True)
class Launch:
    """A kernel's run on the GPU, in µs. operation: the id of the event that launched it, of none in a CUDA graph."""

    operation: int
    name: str
    start: float
    end: float


def launches(profile: torch.profiler.profile, ranges: set[str]) -> list[Launch]:
    """The kernels that ran on the GPU, without our ranges, which the profiler lists there too."""
    return [
        Launch(event.linked_correlation_id(), event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3)
        for event in profile.profiler.kineto_results.events()
        if event.device_type() != DeviceType.CPU and event.name() not in ranges
    ]


def own_times(runs: list[Launch]) -> dict[int, list[tuple[str, float]]]:
    """The kernels of each operation, and the µs of each on the GPU.

    A kernel may start while the one ahead still runs (programmatic dependent launch), and then waits for it: its own
    time begins when the one ahead has ended. So no moment counts twice.
    """
    found: dict[int, list[tuple[str, float]]] = defaultdict(list)
    before = 0.0
    for run in sorted(runs, key=lambda run: run.end):
        found[run.operation].append((run.name, run.end - max(run.start, before)))
        before = run.end
    return found


def read(events, runs: list[Launch], watched: Watched, count: int) -> list[Row]:
    """The rows of `count` steps, the longest first.

    events: of the profiler. A GPU's kernels belong where they were launched, those of a CUDA graph nowhere; without a
    GPU (no runs) the kernels are torch's operations, without those that they call.
    """
    found: dict[Place, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    launched = own_times(runs)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        if not runs:
            times = [(HOST if event.name in watched.names else event.name, event.self_cpu_time_total)]
        else:
            times = launched.pop(event.id, ()) if event.kernels else ()
        ranges = _ranges(event, watched.names)
        for name, microseconds in times if ranges[:1] == [STEP] else ():
            found[tuple(ranges[1:])][name].append(microseconds)
    for name, microseconds in chain.from_iterable(launched.values()):
        found[REPLAYED,][name].append(microseconds)
    rows = [
        Row(
            place,
            {name: (len(times) / count, sum(times) / count) for name, times in kernels.items()},
            watched.moved[place] / count,
        )
        for place, kernels in found.items()
    ]
    return sorted(rows, key=lambda row: -row.microseconds)


def _ranges(event, names: set[str]) -> list[str]:
    """The names of the ranges that an event lies in, itself included, outermost first."""
    found = []
    while event is not None:
        if event.name in names:
            found.append(event.name)
        event = event.cpu_parent
    return found[::-1]


def table(rows: list[Row], roof: float, least: float = 0.03) -> str:
    """Markdown. Kernels are listed below an operation of several, if they take `least` of the step's time."""
    step = total(rows)
    lines = ["| phase, operation | kernel | launches | µs | of all | must move, MB | GB/s | of roof |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for row in [*rows, step]:
        kernels = sorted(row.kernels.items(), key=lambda item: -item[1][1])
        name = _short(kernels[0][0]) if len(kernels) == 1 else f"{len(kernels)} kernels"
        cells = [", ".join(row.place) or "-", name, *_times(row.launches, row.microseconds, step)]
        speed = row.moved / max(row.microseconds, 1e-9) * 1e6
        cells += [f"{row.moved / 1e6:.2f}", f"{speed / 1e9:.0f}", f"{speed / roof:.0%}"] if row.moved else ["-"] * 3
        lines.append(f"| {' | '.join(cells)} |")
        for kernel, (launches, microseconds) in kernels if len(kernels) > 1 and row is not step else ():
            if microseconds >= least * step.microseconds:
                cells = ["", _short(kernel), *_times(launches, microseconds, step), "", "", ""]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def total(rows: list[Row]) -> Row:
    """Sum over a step."""
    kernels = {(*row.place, name): cost for row in rows for name, cost in row.kernels.items()}
    return Row(("all",), kernels, sum(row.moved for row in rows))


def _times(launches: float, microseconds: float, step: Row) -> tuple[str, str, str]:
    return f"{launches:g}", f"{microseconds:.1f}", f"{microseconds / max(step.microseconds, 1e-9):.1%}"


def _short(name: str, most: int = 48) -> str:
    """Shortens the name of a kernel: C++ kernels carry all their template arguments."""
    name = name.removeprefix("void ").replace("|", "/")
    return name if len(name) <= most else name[: most - 1] + "…"


# ---------------------------------------------------------------- the script


def seconds_as_decoded(decoder: stagedspec.Decoder, options: argparse.Namespace) -> float:
    """Wall-clock seconds of a step without the profiler."""
    times = [time.perf_counter() for _ in steps(decoder, options)]
    return (times[-1] - times[0]) / options.steps


def trace(decoder: stagedspec.Decoder, options: argparse.Namespace) -> tuple[torch.profiler.profile, Watched]:
    """Profiles the steps. The decoder stays instrumented afterwards."""
    watched = Watched(decoder.target.ops)
    if not options.as_decoded:
        decoder.mark = watched.mark
        for model in (decoder.target, decoder.draft):
            if model is not None:
                model.ops = watched
    activities = [torch.profiler.ProfilerActivity.CPU]
    if decoder.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    generation = steps(decoder, options, record_function)
    run = next(generation)
    watched.moved.clear()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        while run is not None:
            watched.prefix = sum(len(row.tokens) for row in run.sequences.rows)
            run = next(generation, None)
    return profile, watched


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    arguments = machine.arguments_of(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--roof", type=float, help="memory bandwidth, GB/s; default: measured by reading and copying")
    parser.add_argument("--as-decoded", action="store_true", help="trace CUDA graphs: no phases, no bytes")
    parser.add_argument("--out", type=Path, default=Path("trace.json"), help="the Chrome trace (default trace.json)")
    options = parse(parser, arguments)
    if not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out: the folder {options.out.parent} does not exist")
    if options.roof is not None and not options.roof > 0:
        raise ValueError(f"--roof must be positive, in GB/s, got {options.roof}")
    decoder = load(options)
    if decoder.mark is not None:
        raise ValueError("STAGEDSPEC_NVTX is set: unset it, the torch profiler has ranges of its own")
    unwatched = seconds_as_decoded(decoder, options)
    profile, watched = trace(decoder, options)
    profile.export_chrome_trace(str(options.out))
    rows = read(profile.events(), launches(profile, watched.names), watched, options.steps)
    step = total(rows)
    roof = options.roof * 1e9 if options.roof else machine.read_bandwidth(_buffer(step, decoder.device), decoder.device)
    how = "stated" if options.roof else "measured"
    print(f"{table(rows, roof)}\n")
    print(f"a step as decoded: {unwatched * 1e6:.0f} µs; its kernels as traced: {step.microseconds:.0f} µs")
    if step.moved:
        print(f"floor: {step.moved / 1e6:.1f} MB / {roof / 1e9:.0f} GB/s ({how}) = {step.moved / roof * 1e6:.0f} µs")
    print(f"trace: {options.out}")
    report = machine.header("torch_trace.py", arguments, decoder.device)
    print(f"{report['command'].replace('bench/', 'profiling/', 1)}\n{machine.where(report)}")
    return 0


def _buffer(step: Row, device: torch.device) -> int:
    """Bytes for measuring the roof: more than a GPU's cache; on a CPU, whose caches differ, those that a step moves."""
    return 1 << 31 if device.type == "cuda" else max(int(step.moved), 1 << 20)


if __name__ == "__main__":
    sys.exit(main())
