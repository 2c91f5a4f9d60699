"""Functions of kernel files that are no kernels have annotations: there mypy is told not to ask for them.

See [tool.mypy.overrides] in pyproject.toml.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"triton.jit", "gluon.jit"}


def functions() -> list[tuple[str, ast.FunctionDef, bool]]:
    """All functions in kernels/: file and name, definition, and whether it is in Triton's or Gluon's language."""
    found = []
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                decorators = {ast.unparse(one).split("(")[0] for one in node.decorator_list}
                found.append((f"{path.relative_to(ROOT)}: {node.name}", node, bool(decorators & KERNELS)))
    return found


def annotated(function: ast.FunctionDef) -> bool:
    """Whether mypy's disallow_untyped_defs is content."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    named = [one for one in named if one.arg not in ("self", "cls")]
    named += [one for one in (given.vararg, given.kwarg) if one is not None]
    returns = function.returns is not None or (function.name == "__init__" and bool(named))
    return returns and all(one.annotation is not None for one in named)


def test_host_functions_are_annotated():
    assert not [name for name, function, kernel in functions() if not kernel and not annotated(function)]


def test_kernels_are_told_apart():
    """So that the test above cannot pass on nothing."""
    names = {name.split(": ")[1]: kernel for name, _, kernel in functions()}
    assert names["scan_kernel"] and names["grow_pass_kernel"] and not names["launch_select"]
