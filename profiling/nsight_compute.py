"""Profiles launches of one kernel in a step with Nsight Compute, down to the lines of its source.

    python profiling/nsight_compute.py --kernel _linear_hopper --phase target --shape L

Writes a report for ncu-ui (page Source: counters beside each line of Python and of SASS) and prints its details. The
step is launched kernel by kernel, so that --phase can tell the target's launches from the draft's.
"""

import argparse
import re
import sys

import nsight

# What a memory-bound kernel is read by: see README.md.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats", "SourceCounters")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    nsight.add_options(parser, "step.ncu-rep")
    parser.add_argument("--kernel", required=True, help="the kernel's name, as torch_trace.py lists it")
    parser.add_argument("--phase", help="only launches of this phase: target, draft, grow, verify, commit, ngram")
    parser.add_argument("--skip", type=int, default=0, help="launches to let pass first (default 0)")
    parser.add_argument("--count", type=int, default=1, help="launches to profile (default 1)")
    parser.add_argument("--section", action="append", help=f"default: {', '.join(SECTIONS)}")
    parser.add_argument(
        "--clock-control",
        choices=("base", "none"),
        default="base",
        help="base: the GPU at its base clock, repeatable; none: at the clock it decodes at (default base)",
    )
    options, rest = parser.parse_known_args(arguments)
    flags = ["ncu", "--profile-from-start", "off", "--kernel-name", f"regex:^{re.escape(options.kernel)}$"]
    if options.phase:
        flags += ["--nvtx", "--nvtx-include", f"{options.phase}/"]
    flags += ["--launch-skip", str(options.skip), "--launch-count", str(options.count)]
    for section in options.section or SECTIONS:
        flags += ["--section", section]
    flags += ["--import-source", "yes", "--clock-control", options.clock_control]
    flags += ["--force-overwrite", "--export", str(options.out)]
    after = ["ncu", "--import", str(options.out), "--page", "details"]
    return nsight.run(parser, options.dry_run, flags, rest, after, phases=True)


if __name__ == "__main__":
    sys.exit(main())
