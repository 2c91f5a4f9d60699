"""Code shared by the two Nsight scripts: runs step.py under a tool, and checks that the tool can run."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

STEP = Path(__file__).with_name("step.py")


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    parser.epilog = "All other options are step.py's: --shape L --mode staged ...; --backend is triton unless given"
    parser.add_argument("--out", type=Path, default=Path(out), help=f"the report (default {out})")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")


def run(
    parser: argparse.ArgumentParser, dry: bool, flags: list[str], rest: list[str], after: list[str], phases: bool
) -> int:
    """Runs step.py under a tool, then a command that prints the report; the exit status of the first that fails.

    phases: whether the step's phases are NVTX ranges. Exits with status 2 where the tool or a GPU is missing.
    """
    if not any(word.startswith("--backend") for word in rest):
        rest = [*rest, "--backend", "triton"]  # its kernels are what the tools are for
    command = [*flags, sys.executable, str(STEP), *rest]
    switch = {"STAGEDSPEC_NVTX": "1" if phases else "0"}
    if dry:
        print(*(f"{name}={value}" for name, value in switch.items()), shlex.join(command))
        print(shlex.join(after))
        return 0
    problem = missing(flags[0])
    if problem:
        parser.exit(2, f"error: {problem}; profiling/torch_trace.py needs neither {flags[0]} nor a GPU\n")
    return subprocess.call(command, env=os.environ | switch) or subprocess.call(after)


def missing(tool: str) -> str:
    """What a tool lacks to profile a step, or an empty text."""
    if shutil.which(tool) is None:
        return f"{tool} is not on the PATH: it comes with the CUDA toolkit and with NVIDIA's Nsight packages"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA GPU"
