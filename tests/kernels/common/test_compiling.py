"""Compiling ahead, by Triton's real compiler for a GPU that is not there: the stand-in for its driver loads nothing."""

import os
import subprocess
import sys

import pytest

COMMON = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
torch.cuda.set_device = lambda device: None

from stagedspec.kernels.common import compiling, registry
from stagedspec.kernels.embed import _embed
from stagedspec.kernels.common.progress import reporting

loaded = compiling._loaded
compiling._loaded = lambda compile_kernel: compile_kernel()
gpu = torch.device("cuda", 0)

def part(width):
    tokens, table = torch.zeros(1, dtype=torch.int32), torch.zeros(4, width)
    def launch():
        registry.launch_kernel(
            _embed, (1,), tokens, tokens, table, table, table, table,
            V=4, P=4, D=width, TILES=triton.cdiv(width, 64), ROWS=64, num_warps=4, PDL=False, enable_fp_fusion=False,
        )
    return launch

def fail():
    raise ValueError("on purpose")

def cached():
    return [type(kernel).__name__ for kernel in _embed.device_caches[0][0].values()]

parts = [part(width) for width in range(64, 76)]
"""
PROGRAMS = {
    "once": """
assert compiling.compile_ahead(parts, gpu) == 12
assert compiling.compile_ahead(parts, gpu) == 0
assert cached() == ["CompiledKernel"] * 12
assert compiling.compile_ahead([], gpu) == compiling.compile_ahead([lambda: None], gpu) == 0
""",
    "interrupted": """
def progress(ready, total):
    assert total == 12
    raise KeyboardInterrupt

try:
    with reporting(progress):
        compiling.compile_ahead(parts, gpu)
    raise AssertionError("was not interrupted")
except KeyboardInterrupt:
    pass
done = len(cached())
assert 0 < done <= 12 and set(cached()) == {"CompiledKernel"}, cached()
assert compiling.compile_ahead(parts, gpu) == 12 - done
assert cached() == ["CompiledKernel"] * 12
""",
    "failed": """
try:
    compiling.compile_ahead([*parts[:3], fail], gpu)
    raise AssertionError("did not fail")
except ValueError as error:
    assert str(error) == "on purpose"
assert compiling.compile_ahead(parts, gpu) + len(cached()) >= 12
assert cached() == ["CompiledKernel"] * 12
""",
    "alike": """
# Launches that Triton compiles alike come to it once; those that it tells apart all come to it.
class Counted:
    src = ""
    def __init__(self): self.__module__, self.calls = _embed.__module__, 0
    def warmup(self, *arguments, **options):
        self.calls += 1
        return _embed.warmup(*arguments, **options)

counted, long = Counted(), torch.zeros(9, dtype=torch.int32)

def launch(tokens=long[:1], table=torch.zeros(4, 64), width=64, early=False):
    registry.launch_kernel(
        counted, (1,), tokens, long[:1], table, table, table, table,
        V=4, P=4, D=width, TILES=1, ROWS=64, num_warps=4, PDL=early, enable_fp_fusion=False,
    )

different = [{}, {"table": torch.zeros(260)[1:257].view(4, 64)}, {"table": torch.zeros(4, 64, dtype=torch.bfloat16)},
             {"tokens": long[:1].long()}, {"width": 48}, {"width": 1}, {"early": True}]
made = compiling.compile_ahead([lambda given=given: launch(**given) for given in different * 5], gpu)
assert counted.calls == len(different), counted.calls
assert made == len(cached()) == 7, (made, len(cached()))
""",
    "order": """
class Named:
    def __init__(self, name, src): self.__module__, self.name, self.src = _embed.__module__, name, src
    def warmup(self, *arguments, **options):
        order.append(self.name)

order, many, short, long = [], Named("many", "a long source"), Named("short", "a"), Named("long", "a source")
launches = [(many, 1), (many, 2), (short, 1), (many, 3), (long, 1)]
compiling.compile_ahead([lambda: [registry.launch_kernel(kernel, (1,), number) for kernel, number in launches]], gpu)
assert order == ["long", "short", "many", "many", "many"], order
""",
    "texts": """
class Kernel:
    run, asm = None, {"ttir": "a text", "cubin": b"code"}
kernel = Kernel()
assert loaded(lambda: kernel) is kernel and kernel.asm == {} and compiling._all_loaded == [kernel]
""",
    "hashes": """
import sys
from stagedspec.kernels.backends import select, triton_backend
compiling._hashing.clear()
registry._keyed.clear()
for _ in range(2):
    compiling.hash_sources(select._import_gluon)
assert len(compiling._hashing) == 1
compiling._hashing[0].join()
before = set(sys.modules)
# No module with a jitted function is missing: neither kernels, nor what they call.
from importlib import import_module
from pkgutil import walk_packages
import stagedspec.kernels
for found in walk_packages(stagedspec.kernels.__path__, "stagedspec.kernels."):
    values = vars(import_module(found.name)).values()
    jitted = [value for value in values if isinstance(value, triton.JITFunction) and value.__module__ == found.name]
    assert not jitted or (found.name in before and found.name in registry._keyed), found.name
""",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(3) as pool:
    made = list(pool.map(lambda _: compiling.compile_ahead(parts, gpu), range(3)))
assert sorted(made) == [0, 0, 12], made  # none is compiled by two
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_compiling_ahead(program, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMMON + PROGRAMS[program]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
