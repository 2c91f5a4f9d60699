"""How long a pass takes: a model of four terms, fitted to measured passes of GPT-2 S, M, L and XL on a GPU.

    seconds = stages x a  +  bytes / b  +  nodes x stages x c  +  turns x d

A stage is a kernel that waits for the one ahead of it. Bytes are what a pass must read from memory: weights, and keys
and values of the prefix. A stage takes longer with more nodes: each of its programs reads and writes the rows of all of
them, and all programs run at once. Turns are blocks of a linear's inputs that find no room in shared memory beside the
weights and are fetched when another block is done with. a to d are fitted by least squares to relative errors. The test
of the model is what it says of a shape that it was not fitted to.

    python bench/step_model.py --out passes.json              # on a GPU: measures S to XL in bf16, a minute or two
    python bench/step_model.py --from passes.json             # fits again, anywhere
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch

from machine import arguments_of, header, where
from random_models import make_random
from report import markdown, update_readme
from sides import clear_errors
from stagedspec.devices import current_device, resolve_device, resolve_dtype
from stagedspec.kernels.backends.select import resolve
from stagedspec.kernels.common import registry
from stagedspec.kernels.common.files import write_text
from stagedspec.kernels.common.timing import Stopwatch
from stagedspec.models.gpt2 import GPT2
from stagedspec.models.shapes import SIZES, ModelShape
from stagedspec.planning import cost

SHAPES = ("S", "M", "L", "XL")
NODES = (1, 8, 16, 32, 64)
SHOWN = (1, 16, 64)  # of other GPUs; JSON has all
ROUNDS = 21
ROWS = 64  # of the weight, that a program of a linear takes


@dataclass(frozen=True)
class Pass:
    """A target's pass over a tree, up to the choice of its tokens. seconds: measured."""

    model: str
    nodes: int
    stages: int
    weight_bytes: int
    prefix_bytes: int
    seconds: float
    turns: int = 0  # of one program of each linear


# What each term counts; its coefficient is seconds a unit.
TERMS: dict[str, Callable[[Pass], float]] = {
    "stages": lambda one: one.stages,
    "bytes": lambda one: one.weight_bytes + one.prefix_bytes,
    "node stages": lambda one: one.nodes * one.stages,
    "turns": lambda one: one.turns,
    # Not in the model unless --terms names them. Inputs: of all programs of a linear together, through L2.
    "inputs": lambda one: one.nodes * one.weight_bytes / ROWS,
    "passes": lambda one: 1,
}
DEFAULT = ("stages", "bytes", "node stages", "turns")


# ---------------------------------------------------------------- measuring


def measure(name: str, shape: ModelShape, nodes: Sequence[int], device: torch.device, backend: str) -> list[Pass]:
    """Times a model's passes as the decoder runs them, as CUDA graphs on a GPU; all numbers of nodes in turn."""
    dtype = resolve_dtype("auto", device)
    ops = resolve(backend, device, [shape.head_size], dtype)
    model = GPT2(make_random(shape, shape.positions, 0, device), ops, device, dtype)
    prefix = 2 * shape.layers * min(cost.CONTEXT, shape.positions - 1) * shape.width * model.kv_dtype.itemsize
    parts = {count: cost.timed_pass(model, False, 1, count, False) for count in nodes}
    graphs = {count: ops.repeated(part) for count, part in parts.items()}
    times: dict[int, list[Stopwatch]] = {count: [] for count in nodes}
    with current_device(device):
        ops.prepare([(graph, ()) for graph in graphs.values()], device)
        for graph in graphs.values():
            graph()
        for _ in range(ROUNDS):
            for count, graph in graphs.items():
                times[count].append(Stopwatch(device))
                times[count][-1].start()
                graph()
                times[count][-1].stop()
        counts = {count: counted(part) for count, part in parts.items()}
    # Read at the end, so that the host is always ahead of the GPU.
    seconds = {count: statistics.median(watch.seconds for watch in watches) for count, watches in times.items()}
    return [
        Pass(name, count, counts[count][0], model.weight_bytes, prefix, seconds[count], counts[count][1])
        for count in nodes
    ]


def counted(part: Callable[[], object]) -> tuple[int, int]:
    """How many kernels of ours a part launches, and their turns, by a dry run."""
    turns: list[int] = []

    def count(_kernel: object, _grid: tuple, _arguments: tuple, options: dict) -> None:
        blocks = options["SPLIT_K"] // options["BLOCK_K"] if "WEIGHT_SLOTS" in options else 0  # of linear_hopper
        turns.append(max(0, blocks - options.get("SLOTS", 0)))

    def dry() -> None:
        registry.collector.set(count)
        part()

    copy_context().run(dry)
    return len(turns), sum(turns)


# ---------------------------------------------------------------- fitting


@dataclass(frozen=True)
class Model:
    """Seconds a unit of each term."""

    seconds: dict[str, float]

    @classmethod
    def fitted(cls, passes: Sequence[Pass], terms: Sequence[str] = DEFAULT) -> "Model":
        """Least squares of the relative errors. A term whose coefficient would be negative is left out: 0."""
        kept = list(terms)
        while kept:
            counts = numpy.array([[TERMS[term](one) / one.seconds for term in kept] for one in passes])
            scale = numpy.linalg.norm(counts, axis=0)
            scale[scale == 0] = 1  # a term that none of these passes has
            found = numpy.linalg.lstsq(counts / scale, numpy.ones(len(passes)), rcond=None)[0] / scale
            if found.min() >= 0:
                return cls(dict.fromkeys(terms, 0.0) | dict(zip(kept, found.tolist(), strict=True)))
            kept.pop(int((found * scale).argmin()))
        raise ValueError("no term explains these passes")

    def parts(self, one: Pass) -> dict[str, float]:
        """The seconds of each term."""
        return {term: value * TERMS[term](one) for term, value in self.seconds.items()}

    def predict(self, one: Pass) -> float:
        return sum(self.parts(one).values())

    def error(self, one: Pass) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predict(one) / one.seconds - 1


def left_out(passes: Sequence[Pass], terms: Sequence[str] = DEFAULT) -> dict[tuple[str, int], float]:
    """The error for every pass, by (model, nodes), of the model that was fitted to all other shapes."""
    names = list(dict.fromkeys(one.model for one in passes))
    if len(names) < 3:
        raise ValueError(f"leaving a shape out takes passes of at least three shapes, got {', '.join(names)}")
    models = {name: Model.fitted([one for one in passes if one.model != name], terms) for name in names}
    return {(one.model, one.nodes): models[one.model].error(one) for one in passes}


# ---------------------------------------------------------------- other GPUs


@dataclass(frozen=True)
class Gpu:
    """Published: bytes a second of memory; multiprocessors; their boost clock."""

    bandwidth: float
    multiprocessors: int
    clock: float

    def scaled(self, model: Model, measured: "Gpu") -> Model:
        """The model for this GPU.

        Assumed: a stage takes as long as on the measured one; memory gives the same share of its published rate; what
        a node adds to a stage, and a turn, take as many cycles; L2 gives every multiprocessor as many bytes a cycle.
        """
        factors = {"bytes": measured.bandwidth / self.bandwidth}
        factors |= dict.fromkeys(("node stages", "turns"), measured.clock / self.clock)
        factors["inputs"] = measured.multiprocessors * measured.clock / (self.multiprocessors * self.clock)
        return Model({term: value * factors.get(term, 1.0) for term, value in model.seconds.items()})


GPUS = {
    "NVIDIA H200": Gpu(4.8e12, 132, 1.98e9),
    "H100 SXM": Gpu(3.35e12, 132, 1.98e9),
    "A100 80GB SXM": Gpu(2.039e12, 108, 1.41e9),
    "RTX 4090": Gpu(1.008e12, 128, 2.52e9),
}


# ---------------------------------------------------------------- report


def report(passes: Sequence[Pass], gpu: str, terms: Sequence[str]) -> dict:
    """The fitted model, its errors, and what it predicts elsewhere, for JSON."""
    model, errors = Model.fitted(passes, terms), left_out(passes, terms)
    sizes = [abs(error) for error in errors.values()]
    rows = [
        {
            "model": one.model,
            "nodes": one.nodes,
            "measured_us": 1e6 * one.seconds,
            "parts_us": {term: 1e6 * part for term, part in model.parts(one).items()},
            "fitted_error": model.error(one),
            "left_out_error": errors[one.model, one.nodes],
        }
        for one in passes
    ]
    known = GPUS.get(gpu)
    scaled = {name: other.scaled(model, known) for name, other in GPUS.items()} if known else {}
    elsewhere = [
        {
            "model": one.model,
            "nodes": one.nodes,
            "us": {name: 1e6 * there.predict(one) for name, there in scaled.items()},
            "floor_us": {name: 1e6 * TERMS["bytes"](one) / GPUS[name].bandwidth for name in scaled},
        }
        for one in passes
    ]
    return {
        "seconds_a_unit": model.seconds,
        "left_out_error": {"mean": statistics.mean(sizes), "most": max(sizes)},
        "passes": rows,
        "other_gpus": elsewhere if known else [],
    }


def text(found: dict, gpu: str) -> str:
    unit, error = found["seconds_a_unit"], found["left_out_error"]
    rate = {term: 1e-12 / value for term, value in unit.items() if term in ("bytes", "inputs") and value}
    share = (
        f", {1e12 * rate['bytes'] / GPUS[gpu].bandwidth:.0%} of the published rate"
        if gpu in GPUS and "bytes" in rate
        else ""
    )
    facts = [
        f"a stage: {1e6 * unit['stages']:.2f} µs" if "stages" in unit else "",
        f"memory: {rate['bytes']:.2f} TB/s{share}" if "bytes" in rate else "",
        f"a node adds to a stage: {1e9 * unit['node stages']:.1f} ns" if "node stages" in unit else "",
        f"a turn: {1e9 * unit['turns']:.0f} ns" if "turns" in unit else "",
        f"inputs through L2: {rate['inputs']:.2f} TB/s" if "inputs" in rate else "",
        f"error for a shape left out: {error['mean']:.1%} on average, {error['most']:.1%} at most",
    ]
    rows = [
        [
            f"{one['model']}, {one['nodes']}",
            f"{one['measured_us']:.0f}",
            *(f"{part:.0f}" for part in one["parts_us"].values()),
            f"{one['fitted_error']:+.1%}",
            f"{one['left_out_error']:+.1%}",
        ]
        for one in found["passes"]
    ]
    tables = [markdown(["model, nodes", "measured, µs", *unit, "error, fitted", "error, shape left out"], rows)]
    if found["other_gpus"]:
        names = list(found["other_gpus"][0]["us"])
        rows = [
            [
                f"{one['model']}, {one['nodes']}",
                *(f"{one['us'][name]:.0f} ({one['floor_us'][name]:.0f})" for name in names),
            ]
            for one in found["other_gpus"]
            if one["nodes"] in SHOWN
        ]
        tables.append(markdown(["µs a pass (its bytes at the published rate)", *names], rows))
    return "\n\n".join(["\n".join(f"- {fact}" for fact in facts if fact), *tables])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="shapes to measure")
    parser.add_argument("--nodes", nargs="+", type=int, default=list(NODES))
    parser.add_argument("--from", type=Path, dest="source", help="fit to the passes of this file, measure nothing")
    parser.add_argument("--terms", nargs="+", choices=TERMS, default=list(DEFAULT), help="terms of the model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, help="JSON: the measured passes, the model and its predictions")
    parser.add_argument("--update-readme", action="store_true", help="write the tables into bench/README.md")
    options = parser.parse_args(arguments)
    if min(options.nodes) < 1:
        parser.error(f"--nodes must be positive, got {min(options.nodes)}")
    return options


def measured(options: argparse.Namespace, arguments: list[str]) -> dict:
    device = resolve_device(options.device)
    passes: list[Pass] = []
    for name in options.shape:
        passes += measure(name, SIZES[name], options.nodes, device, options.backend)
        print(name, *(f"{one.nodes}: {1e6 * one.seconds:.0f} µs" for one in passes if one.model == name), flush=True)
    return header("step_model.py", arguments, device) | {"measured": [asdict(one) for one in passes]}


@clear_errors
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.source is None:
        result = measured(options, arguments_of(arguments))
    else:
        result = json.loads(options.source.read_text(encoding="utf-8"))
    if options.out:  # before the fit, which may be refused
        write_text(options.out, json.dumps(result, indent=1))
    gpu = result["machine"].get("gpu", "")
    result["model"] = report([Pass(**one) for one in result["measured"]], gpu, options.terms)
    shown = f"`{result['command']}`: {where(result)}\n\n{text(result['model'], gpu)}"
    print(shown)
    if options.update_readme:
        update_readme("step model", shown, [])
    if options.out:
        write_text(options.out, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
