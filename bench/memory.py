"""Memory over time: samples of this process and of a GPU, and the rule that decides whether it grows."""

import ctypes
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, median, quantiles

import torch

MIB = 2**20
LEAST_ALLOWANCE, ALLOWED_SHARE = 16 * MIB, 0.03
RULE = (
    "After the warm-up, memory grows if the median of the last fifth of the run is above that of the first fifth and a "
    "line fitted to all samples rises, both by more than the allowance: the largest of 16 MiB, 3% of the first fifth's "
    "median, and the interquartile range of the samples about the line."
)


# glibc keeps freed memory, the more the more threads there are; given back, what stays is in use.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def resident() -> int:
    """Resident bytes of this process, without memory that malloc keeps free. Raises OSError without /proc."""
    if _trim is not None:
        _trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def sample(device: torch.device) -> dict[str, int]:
    """Bytes by name: of the process, and on a GPU of tensors, of torch's cache, and in use by all processes."""
    found = {"host": resident()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "gpu_allocated": torch.cuda.memory_allocated(device),
            "gpu_reserved": torch.cuda.memory_reserved(device),
            "gpu_used": total - free,
        }
    return found


class Sampler(threading.Thread):
    """Samples every `interval` seconds until `stop`. seconds: of each sample, since the start; values: by name."""

    def __init__(self, device: torch.device, interval: float):
        super().__init__(daemon=True)
        self.device, self.interval = device, interval
        self.seconds: list[float] = []
        self.values: dict[str, list[int]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        begin = time.perf_counter()
        while True:
            self.seconds.append(time.perf_counter() - begin)
            for name, value in sample(self.device).items():
                self.values.setdefault(name, []).append(value)
            if self._ended.wait(self.interval):
                return

    def stop(self) -> None:
        self._ended.set()
        self.join()


@dataclass(frozen=True)
class Growth:
    """Bytes: medians of the first and the last fifth after the warm-up, rise of the line, and what is allowed."""

    first: float
    last: float
    rise: float
    allowance: float

    @property
    def grows(self) -> bool:
        return min(self.last - self.first, self.rise) > self.allowance

    def __str__(self) -> str:
        return (
            f"{self.first / MIB:.1f} to {self.last / MIB:.1f} MiB, line {self.rise / MIB:+.1f} MiB, "
            f"allowed {self.allowance / MIB:.1f} MiB: {'GROWS' if self.grows else 'flat'}"
        )


def growth(seconds: list[float], values: list[float], warm_up: float) -> Growth | None:
    """Applies RULE to the samples later than `warm_up` seconds; None if there are fewer than ten."""
    kept = [(second, value) for second, value in zip(seconds, values, strict=True) if second >= warm_up]
    if len(kept) < 10:
        return None
    times, sizes = [second for second, _ in kept], [float(value) for _, value in kept]
    fifth = len(sizes) // 5
    first, last = median(sizes[:fifth]), median(sizes[-fifth:])
    slope, start = linear_regression(times, sizes)
    low, _, high = quantiles([size - start - slope * second for second, size in kept], n=4)
    return Growth(first, last, slope * (times[-1] - times[0]), max(LEAST_ALLOWANCE, ALLOWED_SHARE * first, high - low))


def plot(seconds: list[float], values: dict[str, list[int]], warm_up: float, path: Path) -> None:
    """Memory over time, as SVG."""
    import figures

    looks = zip(values, ("#d55e00", "#0072b2", "#009e73", "#8a8f96"), ("-", "--", "-.", ":"), strict=False)
    with figures.plt.rc_context(figures.STYLE):
        figure, axes = figures.plt.subplots(figsize=(7, 3), layout="constrained")
        for name, colour, style in looks:
            sizes = [value / MIB for value in values[name]]
            axes.plot([second / 60 for second in seconds], sizes, style, color=colour, label=name.replace("_", " "))
        axes.axvline(warm_up / 60, color=figures.FAINT, linewidth=1, label="end of the warm-up")
        axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None), title="Memory of mixed generations")
        axes.legend(loc="lower right")
        figure.savefig(path, format="svg", metadata={"Date": None})
        figures.plt.close(figure)
