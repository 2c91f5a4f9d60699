"""Timing of kernels on a GPU: graph replays over more data than the cache holds, against measured roofs.

A case does its work `launches` times in one replay of a CUDA graph, which takes the host out. What reads weights or
caches does so over all layers of a model, with weights and caches of their own, as in a real pass: a kernel timed on
one matrix would find it in L2. Peers run the same way in the same process, in turn with ours, and a ratio is printed
only after the results were compared. Peers that compile start every case with no compiled code: past a limit (eight
graphs of a function) torch.compile would run eager without a word, and the ratio would be to something else.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch._dynamo

from stagedspec.kernels.common.timing import REPEATS, Timing, graph_of, time_graphs

SMALL = 20  # launches in a replay of what takes microseconds and has no layers


@dataclass
class Case:
    """One benchmark.

    run: our side, which makes `launches` launches. peers: the same by others, by name. byte_count: bytes that a launch
    must move at least; 0 if they do not limit it. check: returns the error of our result divided by that of plain torch
    in the same dtype (right if at most 2), or 0 for exact agreement and infinity for none; None if there is nothing to
    compare. goal: microseconds that a launch may take, or may take beyond the peer named by `beyond`, whose work it
    includes.
    """

    op: str
    model: str
    shape: dict[str, int | str]
    byte_count: int
    launches: int
    run: Callable[[], None]
    peers: dict[str, Callable[[], None]] = field(default_factory=dict)
    check: Callable[[], float] | None = None
    goal: float | None = None
    beyond: str | None = None


@dataclass(frozen=True)
class Result:
    op: str
    model: str
    shape: dict[str, int | str]
    ours: Timing
    peers: dict[str, Timing | str]
    gigabytes_per_second: float
    share_of_roof: float
    error_ratio: float | None
    goal: float | None
    beyond: str | None

    @property
    def matches(self) -> bool | None:
        """Whether the result was right; None if it was not checked."""
        return None if self.error_ratio is None else self.error_ratio <= 2.0

    @property
    def measured(self) -> float:
        """What the goal is about."""
        return self.ours.median - (self.peers[self.beyond].median if self.beyond else 0.0)

    def as_dict(self) -> dict:
        return asdict(self) | {"matches": self.matches}


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large device-to-device copy: the roof of all operations here.

    Not in a graph: a copy that was captured runs at two thirds of the rate (on an H200: 2.7 against 4.1 TB/s).
    """
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.nbytes / statistics.median(times)


def again(run: Callable[[], object], count: int = SMALL) -> Callable[[], None]:
    """`run`, `count` times over."""

    def every() -> None:
        for _ in range(count):
            run()

    return every


def absent() -> None:
    """A placeholder for a peer that is not installed."""
    raise ImportError("not installed")


def measure(case: Case, roof: float) -> Result:
    """Checks and times one case; a peer that cannot run is noted with its reason."""
    error = None if case.check is None else case.check()
    graphs, failed = {"ours": graph_of(case.run)}, {}
    torch._dynamo.reset()
    for name, peer in case.peers.items():
        try:
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                graphs[name] = graph_of(peer)
        except Exception as problem:  # a peer may not support the shape, in its own way
            failed[name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:80]}"
            torch.cuda.synchronize()
    times = time_graphs(graphs, case.launches)
    ours = times.pop("ours")
    achieved = case.byte_count / (ours.median * 1e-6)
    return Result(
        case.op, case.model, case.shape, ours, times | failed, achieved / 1e9, achieved / roof, error,
        case.goal, case.beyond,
    )  # fmt: skip


def error_ratio(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    """Our error against a reference in fp64 over that of plain torch in the same dtype."""
    ours_error, plain_error = ((got.double() - exact).norm() / exact.norm() for got in (ours, plain))
    return (ours_error / plain_error.clamp_min(1e-6)).item()


def exact(*pairs: tuple[object, object]) -> float:
    """0 if the first of every pair equals the second, infinity if not: what `Case.check` returns."""
    return 0.0 if all(got == wanted for got, wanted in pairs) else float("inf")


def table(results: list[Result]) -> str:
    """A Markdown table. A ratio above 1 means that ours is faster; there is none if the results differ."""
    names = list(dict.fromkeys(name for result in results for name in result.peers))
    heads = ["op", "model", "shape", "ours, µs", "goal", "GB/s", "share of roof", "error ratio", *names]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in results:
        cells = [r.op, r.model, " ".join(f"{key}={value}" for key, value in r.shape.items()), f"{r.ours.median:.2f}"]
        cells.append(_goal(r))
        moved = r.gigabytes_per_second > 0
        cells += [f"{r.gigabytes_per_second:.0f}", f"{r.share_of_roof:.0%}"] if moved else ["-", "-"]
        cells.append("-" if r.error_ratio is None else "exact" if r.error_ratio == 0 else f"{r.error_ratio:.2f}")
        for name in names:
            peer = r.peers.get(name, "-")
            if isinstance(peer, Timing):
                ratio = {True: f" ({peer.median / r.ours.median:.2f}x)", False: " (differs)", None: ""}[r.matches]
                peer = f"{peer.median:.2f}{ratio}"
            cells.append(peer)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _goal(result: Result) -> str:
    if result.goal is None:
        return "-"
    if isinstance(result.peers.get(result.beyond), str):
        return "not measured"
    beyond = f" {result.measured:.1f} beyond {result.beyond}," if result.beyond else ""
    return f"{result.goal:g}:{beyond} {'met' if result.measured <= result.goal else 'missed'}"
