"""Traces whole steps with Nsight Systems: what runs when, and where the GPU waits.

    python profiling/nsight_systems.py --steps 1 --shape L [--phases]

As it decodes, a step of the Triton backend is one CUDA graph, whose kernels are traced one by one but belong to no
phase. --phases launches them from the host instead: then each lies in its phase's NVTX range, with the host's gaps.
"""

import argparse
import sys

import nsight


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    nsight.add_options(parser, "step.nsys-rep")
    parser.add_argument("--phases", action="store_true", help="NVTX ranges of the step's phases, and no CUDA graph")
    options, rest = parser.parse_known_args(arguments)
    flags = ["nsys", "profile", "--trace", "cuda,nvtx", "--sample", "none", "--cpuctxsw", "none"]
    flags += ["--capture-range", "cudaProfilerApi", "--capture-range-end", "stop", "--cuda-graph-trace", "node"]
    flags += ["--force-overwrite", "true", "--output", str(options.out)]
    reports = "cuda_gpu_kern_sum,nvtx_gpu_proj_sum" if options.phases else "cuda_gpu_kern_sum"
    after = ["nsys", "stats", "--force-export", "true", "--report", reports, str(options.out)]
    return nsight.run(parser, options.dry_run, flags, rest, after, options.phases)


if __name__ == "__main__":
    sys.exit(main())
