"""Compiles every kernel for real GPUs, without one, and reports registers, spills, instructions and seconds.

    python profiling/compile_report.py [--arch 80 --arch 90] [--match tree_attention] [--out report.json]

For each kernel at the shapes of GPT-2 S, M, L, XL and of the embedded models (compile_cases.py):

    registers            of a thread
    shared, bytes        shared memory of a block
    spilled              bytes of a thread's registers that the compiler keeps in memory instead
    matrix instructions  how many, by kind
    128-bit loads        global loads of 128 bits
    seconds              CPU time of the compilation, the assembler included; nothing is taken from the compile cache

The exit status is 1 if a kernel spills (more than its case allows), takes more shared memory than the chip has, is a
matrix multiply without matrix instructions, takes more than 10 seconds to compile, or shows the miscompilation
described at `miscompiled`. Seconds are CPU time because a busy machine changes it little. Needs Triton's own compiler,
not its interpreter: TRITON_INTERPRET must not be set.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from compile_cases import CASES, CompileCase
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from stagedspec.kernels.common.files import write_text
from stagedspec.kernels.common.registry import FUSION, SHARED_LIMIT, pdl

SECONDS_LIMIT = 10.0  # a user waits for every kernel that is compiled for the first time
# The columns of the table, as the docstring explains them.
LEGEND = textwrap.dedent(next(part for part in __doc__.split("\n\n") if part.startswith("    registers")))
MATRIX = re.compile(r"\b(UTCHMMA|UTCQMMA|HGMMA|HMMA|DMMA|IMMA)\b")


@dataclass(frozen=True)
class Report:
    """What became of one case on one architecture. error: why it did not compile, else empty."""

    name: str
    arch: int
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    matrix: str = ""
    wide_loads: int = 0
    seconds: float = 0.0
    problem: str = ""


def cases(matches: list[str], arch: int) -> list[tuple[str, int, int]]:
    """(operation, index of the case, architecture) of every case whose name contains one of `matches`."""
    return [
        (op, index, arch)
        for op, of_op in CASES.items()
        for index, case in enumerate(of_op(arch))
        if any(match in label(op, case) for match in matches)
    ]


def label(op: str, case: CompileCase) -> str:
    """ "linear: l qkv 16"."""
    return f"{op}: {case.name}"


def compile_case(job: tuple[str, int, int]) -> Report:
    """Compiles case `index` of an operation for one architecture."""
    op, index, arch = job
    case = CASES[op](arch)[index]
    constants = dict(case.constexprs)
    if "PDL" in constants:
        constants["PDL"] = pdl(arch)
    names = list(case.signature)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    signature = {name: "constexpr" if name in case.constexprs else kind for name, kind in case.signature.items()}
    kind = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = kind(fn=case.kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": FUSION}
    options["maxnreg"] = case.maxnreg
    name = label(op, case)
    start = cpu_seconds()
    try:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True  # the time of an empty cache
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # the compiler raises its own and MLIR's kinds
        return Report(name, arch, problem=f"does not compile: {str(error).strip().splitlines()[-1][:100]}")
    seconds = cpu_seconds() - start
    usage, code = _dump(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))
    # A cubin of Blackwell's addresses its tensor memory by UTC... instructions; their operands are not in registers.
    matrix = Counter(found.group(1) for found in MATRIX.finditer(code))
    local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    spilled = stack + local * 4 if local else 0  # ptxas leaves frames of 8 bytes that nothing touches
    report = Report(
        name,
        arch,
        registers,
        compiled.metadata.shared,
        spilled,
        " ".join(f"{count} {kind}" for kind, count in matrix.most_common()),
        len(re.findall(r"(?:LDGSTS|LDG)\.[\w.]*128", code)),
        round(seconds, 2),
    )
    return Report(**asdict(report) | {"problem": find_problem(case, report, code)})


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended: the assembler is one."""
    return sum(os.times()[:4])


def miscompiled(code: str) -> bool:
    """Whether a matrix instruction gets a wrong address in shared memory from ptxas, as that of CUDA 12.8 makes.

    An address is 64 bits in a pair of registers: the sum's lower half adds to the one register, its upper half to the
    other. Where the descriptor of a second product is derived from a first one's of another swizzle, both halves add to
    the same register, and what it holds is something else. A register that was written in between is another number.
    """
    lower: dict[str, str] = {}  # carry -> the register that was added to, while neither has been written again
    for name, operands in re.findall(r"\b([A-Z][\w.]*) (U[RP]\w+, [^;]+);", code):
        first, *rest = operands.rstrip().split(", ")
        carries = []  # one on Hopper, two on Blackwell
        while name.startswith("UIADD3") and rest and re.fullmatch(r"UP\d", rest[0]):
            carries.append(rest.pop(0))
        if name == "UIADD3.X" and len(rest) > 3 and "0x" in rest[1] and lower.get(rest[3]) == rest[0]:
            return True
        written = {first, *carries} | ({rest[0]} if rest and rest[0].startswith("UP") else set())
        if ".64" in name or "WIDE" in name:
            written.add(re.sub(r"\d+", lambda number: str(int(number[0]) + 1), first))
        lower = {carry: register for carry, register in lower.items() if written.isdisjoint((carry, register))}
        if name == "UIADD3" and carries and len(rest) > 1 and "0x" in rest[1]:
            lower |= dict.fromkeys(carries, rest[0])
    return False


def find_problem(case: CompileCase, report: Report, code: str) -> str:
    """What is wrong with a case that compiled, empty if nothing is."""
    if miscompiled(code):
        return "is miscompiled: wrong addresses in shared memory"
    if report.spilled > case.spills:
        return "spills registers"
    if report.shared > SHARED_LIMIT[report.arch]:
        return f"takes {report.shared} bytes of shared memory, the chip has {SHARED_LIMIT[report.arch]}"
    if case.matrix and not report.matrix:
        return "has no matrix instructions"
    if report.seconds > SECONDS_LIMIT:
        return f"takes {report.seconds:.0f} s to compile, at most {SECONDS_LIMIT:.0f} are allowed"
    return ""


def _dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the disassembler that Triton uses (TRITON_CUOBJDUMP_PATH, else its own)."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )


def table(reports: list[Report]) -> str:
    """Markdown."""
    lines = ["| kernel | sm | registers | shared, bytes | spilled | matrix instructions | 128-bit loads | seconds | |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for r in reports:
        found = (r.registers, r.shared, r.spilled, r.matrix or "-", r.wide_loads, f"{r.seconds:.2f}")
        cells = (r.name, r.arch, *found, r.problem or "ok")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def show_progress(done: int, total: int, report: Report) -> None:
    """Writes to stderr how far the report is: on a terminal one line that changes, else a line for every tenth part."""
    if sys.stderr.isatty():
        print(f"\r\033[K{done}/{total} {report.name} (sm_{report.arch})", end="" if done < total else "\n",
              file=sys.stderr, flush=True)  # fmt: skip
    elif done * 10 // total > (done - 1) * 10 // total:
        print(f"{done} of {total} kernels", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=SHARED_LIMIT, help="default: all")
    parser.add_argument("--match", action="append", help="only kernels whose name contains this; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("error: TRITON_INTERPRET is set: unset it, the interpreter compiles nothing", file=sys.stderr)
        return 2
    jobs = [job for arch in options.arch or SHARED_LIMIT for job in cases(options.match or [""], arch)]
    if not jobs:
        print(f"error: no kernel's name contains {' or '.join(map(repr, options.match))}", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        reports = []
        for report in pool.map(compile_case, jobs):
            reports.append(report)
            show_progress(len(reports), len(jobs), report)
    print(f"{table(reports)}\n\n{LEGEND}")
    if options.out:
        write_text(options.out, json.dumps([asdict(report) for report in reports], indent=1))
    bad = [report for report in reports if report.problem]
    print(f"\n{len(reports)} kernels compiled with triton {triton.__version__}, {len(bad)} with a problem")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
