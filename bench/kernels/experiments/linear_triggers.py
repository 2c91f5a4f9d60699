"""When a linear on Hopper lets the next kernel start: today at its beginning. To be tried; see ../NOTES.md.

    python bench/kernels/experiments/linear_triggers.py --out FILE

The next kernel's programs fetch their weights as soon as they start, while this one's weights, x or keys are still on
their way; and those that find no shared memory start late. Moments: 0 the beginning, 1 when the copies of the weights
are under way, 2 when the kernel ahead has ended, 3 when the copies of x are under way. The results are the same.

Each linear's moment alone, and all at once; the kernel is today's source with the call moved.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

from passes import compare, report

from stagedspec.kernels.linear import hopper

LINEARS = {"qkv": (3840, 1280), "projection": (1280, 1280), "up": (5120, 1280), "down": (1280, 5120)}  # of GPT-2 L
CALL = "cuda.gdc_launch_dependents()"
TODAY = f"    if PDL:\n        {CALL}\n"
# A line of the kernel before which a moment is, and its indentation.
BEFORE = {
    0: "    for i in range(WEIGHT_SLOTS):\n        mbarrier.expect(weight_there",
    1: "    # [GROUPS, ROWS]\n",
    2: "    for i in range(SLOTS):\n        copy(x,",
    3: "    tokens = i_token + gl.arange(0, TOKENS, OF_TOKEN)\n",
}


def moved(folder: Path) -> ModuleType:
    """linear/hopper.py with a constant MOMENT more."""
    source = Path(hopper.__file__).read_text(encoding="utf-8")
    assert source.count(TODAY) == 1 and all(source.count(line) == 1 for line in BEFORE.values())
    source = source.replace(TODAY, "").replace(
        "    PDL: gl.constexpr,\n", "    PDL: gl.constexpr,\n    MOMENT: gl.constexpr,\n", 1
    )
    for moment, line in BEFORE.items():
        source = source.replace(line, f"    if PDL and MOMENT == {moment}:\n        {CALL}\n{line}")
    path = folder / "hopper_moved.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("stagedspec.kernels.linear.hopper_moved", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def moments(module: ModuleType, chosen: Mapping[tuple[int, int], int]) -> Iterator[None]:
    """Linears of shapes (outputs, inputs) start the next kernel at these moments, others at 0."""
    launch = hopper.launch_kernel

    def replaced(kernel: object, grid: tuple[int, ...], *given: object, **options: int) -> None:
        moment = chosen.get((options["OUT"], options["K"]), 0)
        launch(module._linear_hopper, grid, *given, MOMENT=moment, **options)

    hopper.launch_kernel = replaced
    try:
        yield
    finally:
        hopper.launch_kernel = launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the passes' microseconds as JSON")
    options = parser.parse_args()
    choices = {"today": {}} | {f"all at {moment}": dict.fromkeys(LINEARS.values(), moment) for moment in (1, 2, 3)}
    choices |= {f"{name} at {moment}": {shape: moment} for name, shape in LINEARS.items() for moment in (1, 2, 3)}
    with tempfile.TemporaryDirectory() as folder:
        module = moved(Path(folder))
        sides = {name: partial(moments, module, chosen) for name, chosen in choices.items()}
        report(compare(sides, [(1, 1, 128), (1, 16, 128), (1, 16, 448), (1, 64, 256), (16, 1, 256)]), options.out)


if __name__ == "__main__":
    main()
