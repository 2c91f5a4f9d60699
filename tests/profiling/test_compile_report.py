"""Kernels compiled for real GPUs without one: no spills, within the chip's shared memory, with matrix instructions, and
quickly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compile_report
import pytest

SCRIPT = Path(__file__).parents[2] / "profiling" / "compile_report.py"


def report(tmp_path, arch: int, *matches: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """In a process of its own: this one interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = tmp_path / "report.json"
    arguments = [sys.executable, SCRIPT, "--arch", str(arch), "--jobs", "1", "--out", out]
    arguments += [word for match in matches for word in ("--match", match)]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, env=environment, timeout=300)
    return done, json.loads(out.read_text()) if out.exists() else []


# What is compiled, and the matrix instructions it must become. Beside the shapes of GPT-2 L on Hopper there is, for
# every architecture, what has spilled on it, most of it where the compiler decides on the registers.
CASES = {
    80: {
        "linear: l down 16": "HMMA",
        "tree_attention: near-l-n64": "HMMA",
        "choose: select-top_k-50257": "",
    },
    89: {"choose: select-children-50257": ""},
    90: {
        "linear: l qkv 64": "HGMMA",
        "linear_hopper: l down 64": "HGMMA",
        "tree_attention: far-l-n64": "HGMMA",
        "tree_attention: near-l-n64": "HMMA",
        "tree_attention_hopper: l-n64": "HMMA",
        "choose: select-children-50257": "",
        "lm_head: head-greedy-50257x1280-r16": "HGMMA",
        "lm_head_hopper: sampled-50257x1280-r64": "HGMMA",
        "verify_commit: N=64": "",
        # Compilation took over 10 s where it unrolled what a tree's settings say.
        "grow_tree: grow_pass levels=8": "",
        "grow_tree: grow_pass levels=28": "",
        "grow_tree: harvest_tree candidates=16384": "",
        # The widest that a TreeConfig may ask for.
        "grow_tree: grow_pass guesses=126": "",
        "grow_tree: grow_pass options=4096": "",
        "grow_tree: grow_pass width=128": "",
        "grow_tree: harvest_tree children=4096": "",
        "tree_attention: near-l-rows1024": "HMMA",
    },
    100: {
        "lm_head: head-topm-2048x96-r64": "UTCHMMA",
        "grow_tree: grow_pass N=256": "",
        "tree_attention: far-l-n256": "UTCHMMA",
    },
    120: {"lm_head: head-logits-2048x96-r16": "HMMA", "linear: m projection 16": "HMMA"},
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", CASES)
def test_compiles_clean(tmp_path, arch):
    done, reports = report(tmp_path, arch, *CASES[arch])
    assert done.returncode == 0, done.stdout + done.stderr
    assert {entry["name"] for entry in reports} == set(CASES[arch])
    for entry in reports:
        assert CASES[arch][entry["name"]] in entry["matrix"], entry
        assert entry["spilled"] == 0 and 0 < entry["registers"] <= 255, entry
        # The exit status says that none took over 10 s; the slowest needs about 2.
        assert entry["seconds"] > 0 and entry["problem"] == "", entry


@pytest.mark.parametrize("op", compile_report.CASES)
def test_cases_are_complete(op):
    """Every argument of a kernel is in the signature, no case comes twice, and what multiplies matrices says so."""
    cases = compile_report.CASES[op](90)
    assert cases and len({case.name for case in cases}) == len(cases)
    for case in cases:
        constants = {name for name, kind in case.signature.items() if kind == "constexpr"} | set(case.constexprs)
        assert {*case.signature, *constants} == set(case.kernel.arg_names)
        assert case.constexprs.keys() >= constants
        multiplies = op.startswith(("linear", "lm_head", "tree_attention")) and not case.name.startswith("norm")
        assert case.matrix or not multiplies


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
    code = SUM.format(lower=lower, between=between, upper=upper)
    on_blackwell = code.replace("UP1, UR4, 0x20", "UP1, UP2, UR4, 0x20")
    assert compile_report.miscompiled(code) is compile_report.miscompiled(on_blackwell) is expected


@pytest.mark.parametrize(("spilled", "problem"), [(16, ""), (17, "spills registers")])
def test_only_what_a_case_allows_may_be_spilled(spilled, problem):
    case = compile_report.CompileCase("spilling", None, {}, {}, spills=16)
    report = compile_report.Report("spilling", 90, registers=128, spilled=spilled)
    assert compile_report.find_problem(case, report, "") == problem


@pytest.mark.parametrize(("seconds", "problem"), [(9.9, ""), (12.3, "takes 12 s to compile, at most 10 are allowed")])
def test_a_slow_compilation_is_a_problem(seconds, problem):
    case = compile_report.CompileCase("slow", None, {}, {})
    report = compile_report.Report("slow", 90, registers=32, seconds=seconds)
    assert compile_report.find_problem(case, report, "") == problem


@pytest.mark.slow
def test_nothing_matches(tmp_path):
    done, _ = report(tmp_path, 90, "no such kernel")
    assert done.returncode == 2 and "no kernel's name contains" in done.stderr
