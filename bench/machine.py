"""The machine that a benchmark runs on: names, versions, and its two measured roofs, bandwidth and arithmetic."""

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe(device: torch.device) -> dict:
    """Processor, cores, threads, system, and the GPU if the device is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    affinity = getattr(os, "sched_getaffinity", None)
    found = {
        "cpu": cpu,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def commit() -> str | None:
    """The commit of this tree: by git, else from a file COMMIT that came with a tree without git; None if unknown."""
    root = Path(__file__).parent.parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with contextlib.suppress(OSError):
        return (root / "COMMIT").read_text(encoding="utf-8").strip()
    return None


def versions() -> dict:
    """Versions of the packages used; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "stagedspec"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def header(script: str, arguments: list[str], device: torch.device) -> dict:
    """The header of every report: command, date, versions, machine."""
    return {
        "command": f"python bench/{script} {shlex.join(arguments)}".strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "versions": versions(),
        "machine": describe(device),
    }


def where(report: dict) -> str:
    """The machine, the versions and the date of a report, in one line."""
    found = report["machine"]
    place = found.get("gpu") or f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"
    packages = ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)
    at = f"; commit {report['commit']}" if report.get("commit") else ""
    return f"{place}; {packages}; {report['date']}{at}"


# ---------------------------------------------------------------- roofs


def read_bandwidth(size: int, device: torch.device, seconds: float = 2.0) -> float:
    """Highest measured bytes per second of reading `size` bytes, or of copying within that size.

    Copies count bytes read and written.
    """
    data = torch.zeros(max(1, size // 4), device=device)
    half = data.numel() // 2
    read = _best(lambda: data.sum(), device, seconds / 2)
    copy = _best(lambda: data[:half].copy_(data[-half:]), device, seconds / 2)
    return max(data.nbytes / read, 2 * half * 4 / copy)


def arithmetic(dtype: torch.dtype, device: torch.device, seconds: float = 1.5) -> float:
    """Floating-point operations per second of a large square matrix multiplication."""
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _best(lambda: a @ a, device, seconds)


def _best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Shortest time of as many runs as fit, at least three, after a warm-up: the machine undisturbed."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    end = time.perf_counter() + seconds
    times = [once() for _ in range(3)]
    while time.perf_counter() < end:
        times.append(once())
    return min(times)


def arguments_of(arguments: list[str] | None) -> list[str]:
    """The arguments given, or those of the command line."""
    return sys.argv[1:] if arguments is None else list(arguments)
