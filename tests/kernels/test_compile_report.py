"""Kernels compiled for real GPUs without one: no spills, within the chip's shared memory, with matrix instructions."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "profiling" / "compile_report.py"


def report(tmp_path, match: str, arch: int) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """In a process of its own: this one interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = tmp_path / "report.json"
    arguments = [sys.executable, SCRIPT, "--match", match, "--arch", str(arch), "--jobs", "1", "--out", out]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, env=environment, timeout=300)
    return done, json.loads(out.read_text()) if out.exists() else []


@pytest.mark.parametrize(
    ("match", "arch", "instruction"),
    [
        ("linear: l qkv 64", 90, "HGMMA"),
        ("linear: l down 16", 80, "HMMA"),
        ("linear_hopper: l down 64", 90, "HGMMA"),
        ("tree_attention: far-l-n64", 90, "HGMMA"),
        ("tree_attention: near-l-n64", 90, "HMMA"),
        ("tree_attention: near-l-n64", 80, "HMMA"),  # spills where the compiler decides on the registers,
        ("choose: select-children-50257", 90, ""),  # and so does this
        ("lm_head: head-greedy-50257x1280-r16", 90, "HGMMA"),
        ("lm_head_hopper: sampled-50257x1280-r64", 90, "HGMMA"),
        ("verify_commit", 90, ""),
    ],
)
def test_compiles_clean(tmp_path, match, arch, instruction):
    done, reports = report(tmp_path, match, arch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert reports and all(instruction in entry["matrix"] for entry in reports)
    assert all(entry["spilled"] == 0 and 0 < entry["registers"] <= 255 for entry in reports)


SUM = """
    UMOV UR22, UR37 ;
    UIADD3 UR18, UP1, {lower}, 0x20, URZ ;
    {between} ;
    UIADD3.X UR19, {upper}, -0x3ffffff0, URZ, UP1, !UPT ;
"""


@pytest.mark.parametrize(
    ("lower", "between", "upper", "expected"),
    [
        ("UR4", "ULEA UR27, UP0, UR38, UR16, 0x7", "UR4", True),
        ("UR4", "ULEA UR27, UP0, UR38, UR16, 0x7", "UR5", False),
        ("UR4", "UMOV UR4, URZ", "UR4", False),  # another number by then
        ("UR5", "UIADD3.64 UR4, UR8, 0x2, URZ", "UR5", False),
        ("UR4", "UISETP.GT.AND UP1, UPT, UR9, 0x5, UPT", "UR4", False),
    ],
)
def test_wrong_addresses_are_seen(lower, between, upper, expected):
    """What ptxas made of two products that shared a buffer, and sums that only look like it."""
    specification = importlib.util.spec_from_file_location("compile_report", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    code = SUM.format(lower=lower, between=between, upper=upper)
    assert module.miscompiled(code) is expected
    assert module.miscompiled(code.replace("UP1, UR4, 0x20", "UP1, UP2, UR4, 0x20")) is expected  # on Blackwell


def test_nothing_matches(tmp_path):
    done, _ = report(tmp_path, "no such kernel", 90)
    assert done.returncode == 2 and "no kernel's name contains" in done.stderr
