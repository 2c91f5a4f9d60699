"""Timing of kernels on a GPU: graph replays over more data than the cache holds, against measured roofs.

A case is what one layer of a model needs, repeated over all layers with weights and caches of their own, as in a real
pass: a kernel timed on one matrix would find it in L2. The replay of a CUDA graph takes the host out. Peers run the
same way in the same process, in turn with ours, and a ratio is printed only after the results were compared.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

WARMUP, REPEATS = 3, 21


@dataclass
class Case:
    """One benchmark. run: our side, over `layers` layers; peers: name to the same by others; byte_count: what a layer
    must move at the least; check: the error of our result over that of plain torch in the same dtype (at most 2 is
    right), or 0 for exact agreement; None where there is nothing to compare."""

    op: str
    model: str
    shape: dict[str, int]
    byte_count: int
    layers: int
    run: Callable[[], None]
    peers: dict[str, Callable[[], None]] = field(default_factory=dict)
    check: Callable[[], float] | None = None


@dataclass(frozen=True)
class Timing:
    """Microseconds a layer: median, and the 20th and 80th percentile of the replays."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Result:
    op: str
    model: str
    shape: dict[str, int]
    ours: Timing
    peers: dict[str, Timing | str]
    gigabytes_per_second: float
    share_of_roof: float
    error_ratio: float | None

    @property
    def matches(self) -> bool:
        return self.error_ratio is None or self.error_ratio <= 2.0

    def as_dict(self) -> dict:
        return asdict(self) | {"matches": self.matches}


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, read and written bytes counted: the roof of everything here."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    times = time_graph(lambda: target.copy_(source), 1)
    return 2 * source.numel() * 4 / (times.median * 1e-6)


def graph_of(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`run`, compiled and warmed up on a side stream, as a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def time_graph(run: Callable[[], None], layers: int, repeats: int = REPEATS) -> Timing:
    return time_graphs({"": graph_of(run)}, layers, repeats)[""]


def time_graphs(graphs: dict[str, torch.cuda.CUDAGraph], layers: int, repeats: int = REPEATS) -> dict[str, Timing]:
    """Replays all graphs in turn, `repeats` times."""
    marks = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(repeats):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            marks[name].append((begin, end))
    torch.cuda.synchronize()
    result = {}
    for name, pairs in marks.items():
        times = sorted(1e3 * begin.elapsed_time(end) / layers for begin, end in pairs)
        fifths = statistics.quantiles(times, n=5)
        result[name] = Timing(statistics.median(times), fifths[0], fifths[3])
    return result


def measure(case: Case, roof: float) -> Result:
    """Checks and times one case; a peer that cannot run is noted with its reason."""
    error = None if case.check is None else case.check()
    graphs, failed = {"ours": graph_of(case.run)}, {}
    for name, peer in case.peers.items():
        try:
            graphs[name] = graph_of(peer)
        except Exception as problem:  # a peer may not support the shape, in its own way
            failed[name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:80]}"
            torch.cuda.synchronize()
    times = time_graphs(graphs, case.layers)
    ours = times.pop("ours")
    achieved = case.byte_count / (ours.median * 1e-6)
    return Result(case.op, case.model, case.shape, ours, times | failed, achieved / 1e9, achieved / roof, error)


def error_ratio(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    """Our error against a reference in fp64 over that of plain torch in the same dtype."""
    ours_error, plain_error = ((got.double() - exact).norm() / exact.norm() for got in (ours, plain))
    return (ours_error / plain_error.clamp_min(1e-6)).item()


def table(results: list[Result]) -> str:
    """Markdown: a ratio above 1 means that ours is faster; none is printed where the results differ."""
    names = list(dict.fromkeys(name for result in results for name in result.peers))
    lines = ["| op | model | shape | ours, µs | GB/s | share of roof | error ratio | " + " | ".join(names) + " |"]
    lines.append("|---" * (7 + len(names)) + "|")
    for r in results:
        cells = [r.op, r.model, " ".join(f"{key}={value}" for key, value in r.shape.items())]
        cells += [f"{r.ours.median:.2f}", f"{r.gigabytes_per_second:.0f}", f"{r.share_of_roof:.0%}"]
        cells.append("-" if r.error_ratio is None else f"{r.error_ratio:.2f}")
        for name in names:
            peer = r.peers.get(name, "-")
            if isinstance(peer, Timing):
                ratio = f" ({peer.median / r.ours.median:.2f}x)" if r.matches else " (differs)"
                peer = f"{peer.median:.2f}{ratio}"
            cells.append(peer)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
