"""Times work on a GPU by events and CUDA graphs, the host by a clock; and a step's overheads beyond its passes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARMUP, REPEATS = 3, 21


@dataclass(frozen=True)
class Overheads:
    """Seconds that decoding takes beyond the models' passes, for the cost model: a step, a node of its tree, its
    drafting, a draft pass, and a row of that pass."""

    step: float
    node: float
    drafting: float
    draft_pass: float
    row: float


class Stopwatch:
    """Seconds between `start` and `stop`, by the GPU's clock on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        on_gpu = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._times = [0.0, 0.0]  # where there are no events

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, index: int) -> None:
        if self.device.type == "cuda":
            self._events[index].record(torch.cuda.current_stream(self.device))
        else:
            self._times[index] = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether the device has come to `stop`, which must have been called; does not wait."""
        return self.device.type != "cuda" or self._events[1].query()

    @property
    def seconds(self) -> float:
        """Seconds between both; waits for `stop`."""
        if self.device.type != "cuda":
            return self._times[1] - self._times[0]
        begin, end = self._events
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Timing:
    """Microseconds a launch: median, and the 20th and 80th percentile of the replays."""

    median: float
    p20: float
    p80: float


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
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


def time_graphs(graphs: dict[str, torch.cuda.CUDAGraph], launches: int, repeats: int = REPEATS) -> dict[str, Timing]:
    """Replays all graphs in turn, `repeats` times; each does its work `launches` times."""
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
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
        times = sorted(1e3 * begin.elapsed_time(end) / launches for begin, end in pairs)
        fifths = statistics.quantiles(times, n=5)
        result[name] = Timing(statistics.median(times), fifths[0], fifths[3])
    return result


def time_run(run: Callable[[], object], launches: int = 1, repeats: int = REPEATS) -> Timing:
    return time_graphs({"": graph_of(run)}, launches, repeats)[""]
