"""`stagedspec tune`: finds the fastest launch settings of the kernels on the GPU at hand.

An operation that can be tuned asks `configs.config` for its settings at every launch. Its module has a function
`candidates` that lists the settings to try, the default first. PROBLEMS gives, for the shape of a model, the keys under
which settings are kept, their candidates, and the launches to time; the inputs come from workloads.py.

Only speed may change. Before a candidate is timed, its results are compared bit by bit with the default's at every
launch. A candidate that differs anywhere is refused; one that does not run is left out.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from types import ModuleType
from typing import Any, cast

import torch
from triton.errors import TritonError

from stagedspec.kernels import compact, ngram_lookup, verify_commit
from stagedspec.kernels.choose import op as choose
from stagedspec.kernels.common import launch_configs as configs
from stagedspec.kernels.common import progress
from stagedspec.kernels.common.compiling import compile_ahead
from stagedspec.kernels.common.registry import Scratch
from stagedspec.kernels.common.timing import time_run
from stagedspec.kernels.grow_tree import op as grow_tree
from stagedspec.kernels.linear import hopper as linear_hopper
from stagedspec.kernels.linear import op as linear
from stagedspec.kernels.lm_head import op as lm_head
from stagedspec.models.loading import read_checkpoint
from stagedspec.models.shapes import SIZES, ModelShape
from stagedspec.tuning import workloads
from stagedspec.tuning.workloads import CompactWorkload, HeadWorkload, TreeWorkload

GAIN = 0.02  # a candidate replaces the default only if it is faster by more than this: less is noise
NODES = (1, 16, 64)
LINEAR_NODES = (16, 32, 64, 128)
CHUNKS = (256, 512, 1024)  # passes over a prompt
CACHE = 128 << 20  # bytes, more than any GPU's L2
CONTEXT = 512
Timer = Callable[[Callable[[], object]], float]
UNFIT = (TritonError, RuntimeError, ValueError)  # of settings that take too much shared memory or do not compile


@dataclass(frozen=True)
class Launch:
    """One launch of an operation. run: what is timed; results: runs it from a fixed state and returns what it wrote."""

    run: Callable[[], object]
    results: Callable[[], list[torch.Tensor]]

    @classmethod
    def returning(cls, run: "Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]") -> "Launch":
        """A launch whose results are what it returns."""

        def results() -> list[torch.Tensor]:
            found = run()
            return [found] if isinstance(found, torch.Tensor) else list(found)

        return cls(run, results)


@dataclass(frozen=True)
class Problem:
    """An operation at the shape under which its settings are kept.

    candidates: settings, the default first. launches: makes the launches to time.
    """

    op: str
    shape: tuple[int, ...]
    candidates: list[dict[str, int]]
    launches: Callable[[], list[Launch]]


@dataclass
class Tuned:
    """Result of tuning one problem. times: microseconds of each launch, by the default and by the settings found."""

    op: str
    shape: tuple[int, ...]
    settings: dict[str, int]
    default: dict[str, int]
    times: tuple[list[float], list[float]]
    tried: int = 0
    refused: list[dict[str, int]] = field(default_factory=list)
    failed: list[dict[str, int]] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Geometric mean over the launches."""
        return _mean_ratio(*self.times)

    def as_dict(self) -> dict[str, Any]:
        shown = "op", "settings", "default", "tried", "refused", "failed"
        before, after = self.times
        return {name: getattr(self, name) for name in shown} | {
            "shape": configs.shape_name(self.shape),
            "default_us": before,
            "tuned_us": after,
            "speedup": self.speedup,
        }


def _mean_ratio(before: list[float], after: list[float]) -> float:
    return math.exp(sum(math.log(b / a) for b, a in zip(before, after, strict=True)) / len(before))


def replayed(run: Callable[[], object], count: int = 20) -> float:
    """Microseconds of one launch, measured by replaying a graph of `count` launches."""

    def every() -> None:
        for _ in range(count):
            run()

    return time_run(every, count).median


def compile_candidates(work: Iterable[tuple[Problem, list[Launch]]], device: torch.device) -> None:
    """Compiles the kernels of all candidates in parallel. What fails here fails again when it is tried."""

    def launched(problem: Problem, settings: dict[str, int], launches: list[Launch]) -> None:
        with configs.trying(problem.op, problem.shape, settings), suppress(*UNFIT):
            for launch in launches:
                launch.run()

    tries = (
        partial(launched, problem, settings, launches) for problem, launches in work for settings in problem.candidates
    )
    with suppress(*UNFIT):
        compile_ahead(tries, device)


def tune(
    problem: Problem, launches: list[Launch], timer: Timer = replayed, report: Callable[[], None] = lambda: None
) -> Tuned:
    """Finds the fastest candidate. launches: of the problem. report: called after each candidate."""
    default = problem.candidates[0]

    def times(settings: dict[str, int]) -> list[float]:
        with configs.trying(problem.op, problem.shape, settings):
            return [timer(launch.run) for launch in launches]

    def results(settings: dict[str, int]) -> list[list[torch.Tensor]]:
        with configs.trying(problem.op, problem.shape, settings):
            return [_snapshot(launch) for launch in launches]

    wanted, before = results(default), times(default)
    report()
    found = Tuned(problem.op, problem.shape, default, default, (before, before), tried=1)
    for settings in problem.candidates[1:]:
        try:
            same = all(map(_same, results(settings), wanted))
            after = times(settings) if same else []
        except UNFIT as error:
            if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
                raise
            found.failed.append(settings)
            same, after = True, []
        found.tried += 1
        if not same:
            found.refused.append(settings)
        elif after and _mean_ratio(before, after) > max(found.speedup, 1 + GAIN):
            found.settings, found.times = settings, (before, after)
        report()
    if found.settings is not default:  # once more: the default was the first, and the GPU may have been asleep
        found.times = times(default), times(found.settings)
        if found.speedup <= 1 + GAIN:
            found.settings, found.times = default, (found.times[0], found.times[0])
    return found


def _snapshot(launch: Launch) -> list[torch.Tensor]:
    """Bytes of the results, so that NaNs compare equal if their bits do."""
    return [result.clone().flatten().view(torch.uint8) for result in launch.results()]


def _same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def tune_all(
    ops: list[str],
    shapes: list[ModelShape],
    device: torch.device,
    report: Callable[[str, int, int], None] = lambda *_: None,
    timer: Timer = replayed,
    keep: Callable[[Tuned], None] = lambda _: None,
) -> list[Tuned]:
    """Tunes operations at the shapes of models; the kernels of an operation at one of them are compiled together.

    report: called with what is done, the number of candidates done and of all. keep: called with each result as soon
    as it is there, so that an interrupted run keeps what it found.
    """
    groups: list[tuple[str, list[Problem]]] = []
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for op, shape in itertools.product(ops, shapes):
        new = [problem for problem in PROBLEMS[op](shape, device) if (problem.op, problem.shape) not in seen]
        seen.update((problem.op, problem.shape) for problem in new)
        groups.append((op, new))
    total = sum(len(problem.candidates) for _, group in groups for problem in group)
    found: list[Tuned] = []
    done = 0

    def tell(what: str, count: int = 1) -> None:
        nonlocal done
        done += count
        report(what, done, total)

    for op, group in groups:
        work = [(problem, problem.launches()) for problem in group]

        def compiled(ready: int, count: int, op: str = op) -> None:
            tell(f"{op}: {ready} of {count} kernels compiled", 0)

        with progress.reporting(compiled):
            compile_candidates(work, device)
        for problem, launches in work:
            name = f"{problem.op} {configs.shape_name(problem.shape)}"
            found.append(tune(problem, launches, timer, partial(tell, name)))
            keep(found[-1])
    return found


def table(found: list[Tuned]) -> configs.Table:
    """Settings for `configs.write`. A default that was best is written too: it replaces an older entry."""
    result: configs.Table = {}
    for one in found:
        result.setdefault(one.op, {})[configs.shape_name(one.shape)] = one.settings
    return result


def shapes(models: list[str]) -> list[ModelShape]:
    """Shapes of the models named: S, M, L, XL, "embedded", hub ids and folders.

    Raises ValueError for a model that cannot be read.
    """
    found = []
    for model in models:
        if model == "embedded":
            found += [SIZES["target"], SIZES["draft"]]
        elif model in ("S", "M", "L", "XL"):
            found.append(SIZES[model])
        else:
            try:
                config = read_checkpoint(model, "model").config
            except ValueError as error:
                raise ValueError(f"{error}, or S, M, L, XL or embedded") from error
            inner = config.n_inner or None
            found.append(ModelShape(config.n_layer, config.n_embd, config.n_head, inner, vocab=config.vocab_size))
    return found


# ---------------------------------------------------------------- what there is to tune


def _head(shape: ModelShape, device: torch.device) -> Iterator[Problem]:
    def launches() -> list[Launch]:
        found = []
        for nodes in NODES:
            head = HeadWorkload(shape, 1, nodes, device)
            for sampling in ("greedy", "top-k"):
                found.append(Launch.returning(partial(head.choose, sampling)))
            found.append(Launch.returning(partial(head.children, "greedy")))
        return found

    if linear.by_hopper(workloads.dtype_of(device).itemsize, shape.width, device):
        return
    key = shape.vocab, shape.width
    yield Problem("lm_head", key, lm_head.candidates(key, device), launches)


def _linear(shape: ModelShape, device: torch.device) -> Iterator[Problem]:
    width, mlp = shape.width, shape.mlp
    dtype = workloads.dtype_of(device)
    for outputs, inputs in ((3 * width, width), (width, width), (mlp, width), (width, mlp)):
        if linear.by_hopper(dtype.itemsize, inputs, device):
            op, module = "linear_hopper", cast(ModuleType, linear_hopper)
            counts = {linear_hopper.padded(count): count for count in (*LINEAR_NODES, *CHUNKS)}
            keys: dict[tuple[int, ...], int] = {(rows, outputs, inputs): count for rows, count in counts.items()}
        else:
            op, module, size = "linear", linear, dtype.itemsize
            counts = {linear.token_tile(count, size): count for count in LINEAR_NODES}
            keys = {(size, tile, outputs, inputs): count for tile, count in counts.items()}

        @cache
        def weights(outputs: int = outputs, inputs: int = inputs) -> list[torch.Tensor]:
            """More than fit in a cache, as the layers of a model are."""
            made = min(shape.layers, 1 + (CACHE >> 1) // (outputs * inputs))
            return [workloads.randn(outputs, inputs, device=device, scale=inputs**-0.5) for _ in range(made)]

        for key, count in keys.items():

            def launches(
                outputs: int = outputs, inputs: int = inputs, count: int = count, weights: Callable = weights
            ) -> list[Launch]:
                outs = workloads.randn(len(weights()), count, outputs, device=device).unbind()
                layers = list(zip(weights(), outs, strict=True))
                x = workloads.randn(count, inputs, device=device)
                residual = workloads.randn(count, outputs, device=device)
                bias = workloads.randn(outputs, device=device)
                stats = torch.empty(count, linear.stat_tiles(outputs), 2, device=device)
                scratch = Scratch.of([linear.scratch_size(count, outputs, inputs)], device)

                def run() -> None:
                    for weight, out in layers:
                        linear.linear_add(x, weight, bias, residual, out, stats, scratch)

                def results() -> list[torch.Tensor]:
                    run()
                    return [stats, *(out for _, out in layers)]

                return [Launch(run, results)]

            yield Problem(op, key, module.candidates(key, device), launches)


def _choose(shape: ModelShape, device: torch.device) -> Iterator[Problem]:
    def launches() -> list[Launch]:
        found = []
        for nodes in NODES:
            rule = workloads.ChooseWorkload(shape.vocab, 1, nodes, device)
            for sampling in ("greedy", "top-k", "top-p"):
                found.append(Launch.returning(partial(rule.choose, sampling)))
        return found

    yield Problem("choose", (shape.vocab,), choose.candidates((shape.vocab,), device), launches)


def _compact(shape: ModelShape, device: torch.device) -> Iterator[Problem]:
    def launches() -> list[Launch]:
        found = []
        for count in (2, 13):
            moving = CompactWorkload(shape, 1, 64, CONTEXT, count, device)

            def results(moving: CompactWorkload = moving) -> list[torch.Tensor]:
                moving.compact()
                return [moving.cache]

            found.append(Launch(moving.compact, results))
        return found

    key = (2 * shape.width,)
    yield Problem("compact", key, compact.candidates(key, device), launches)


def _lookup(shape: ModelShape, device: torch.device) -> Iterator[Problem]:
    table = workloads.katz_table(shape.vocab, device)

    def launches() -> list[Launch]:
        found = []
        for nodes in NODES:
            lookup = workloads.LookupWorkload(nodes, CONTEXT, 1, table, device)
            found.append(Launch.returning(lookup.lookup))
        return found

    key = (table.successors,)
    yield Problem("ngram_lookup", key, ngram_lookup.candidates(key, device), launches)


def _grow(op: str, shape: ModelShape, device: torch.device) -> Iterator[Problem]:
    """Trees depend on the model only by its vocabulary. Trees with the same tile of candidates share settings."""
    by_tile: dict[int, list[int]] = {}
    for nodes in NODES[1:]:
        by_tile.setdefault(grow_tree.tile(op, workloads.tree_config(nodes)), []).append(nodes)
    for size, trees in by_tile.items():

        def launches(trees: list[int] = trees) -> list[Launch]:
            found = []
            for nodes in trees:
                growing = TreeWorkload(nodes, CONTEXT, 1, workloads.katz_table(shape.vocab, device), device)
                run = partial(growing.passes, harvest=False) if op == "grow_pass" else growing.growth.harvest

                def results(growing: TreeWorkload = growing) -> list[torch.Tensor]:
                    for tensor in growing.growth.state:
                        tensor.zero_()
                    trees = growing.passes()
                    return [trees.tree, trees.inputs.packed, trees.inputs.masks, *growing.growth.state]

                growing.passes()
                found.append(Launch(run, results))
            return found

        yield Problem(op, (size,), grow_tree.candidates(op, (size,), device), launches)


def _verify(shape: ModelShape, device: torch.device) -> Iterator[Problem]:
    for nodes in NODES:

        def launches(nodes: int = nodes) -> list[Launch]:
            growing = TreeWorkload(nodes, CONTEXT, 1, workloads.katz_table(shape.vocab, device), device, room=16384)
            trees = growing.passes()
            chosen = growing.likely(trees)
            state = growing.sequences.state
            start = [tensor.clone() for tensor in state]

            def results() -> list[torch.Tensor]:
                for tensor, value in zip(state, start, strict=True):
                    tensor.copy_(value)
                moves = trees.verify_commit(chosen)
                return [moves.accepted, moves.target, moves.draft, *state]

            return [Launch(lambda: trees.verify_commit(chosen), results)]

        yield Problem("verify_commit", (nodes,), verify_commit.candidates((nodes,), device), launches)


PROBLEMS: dict[str, Callable[[ModelShape, torch.device], Iterator[Problem]]] = {
    "linear": _linear,
    "lm_head": _head,
    "choose": _choose,
    "compact": _compact,
    "ngram_lookup": _lookup,
    "grow_pass": partial(_grow, "grow_pass"),
    "harvest_tree": partial(_grow, "harvest_tree"),
    "verify_commit": _verify,
}
