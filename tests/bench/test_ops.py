"""The microbenchmarks of `make bench`: every case runs, once."""

import subprocess
import sys
from pathlib import Path

OPS = Path(__file__).resolve().parents[2] / "bench" / "ops.py"


def test_every_case_runs(tmp_path):
    command = [sys.executable, "-m", "pytest", str(OPS), "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
