"""Imports point one way, lazy ones included: no room imports one above it, and there are no circles."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {"stagedspec": ROOT / "stagedspec", "stagedspec.kernels": ROOT / "kernels"}

# From below. A file imports from its own row and from those before it.
LAYERS = (
    ("stagedspec.kernels.common", "stagedspec.kernels.philox", "stagedspec.values", "stagedspec.devices"),
    ("stagedspec.kernels",),
    ("stagedspec.models",),
    ("stagedspec.planning",),
    ("stagedspec.decoding",),
    ("stagedspec.decoder",),
    ("stagedspec.hf", "stagedspec.tuning", "stagedspec.check", "stagedspec.training"),
    ("stagedspec.cli",),
    ("stagedspec.__main__",),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in ROOTS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports, at its top or in a function; not what only type checkers see."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in MODULES else node.module for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found & MODULES.keys()


GRAPH = {name: imports(path) - {name} for name, path in MODULES.items()}


def layer(name: str) -> int:
    """The row of the longest prefix of a module's name."""
    rows = {prefix: row for row, prefixes in enumerate(LAYERS) for prefix in prefixes}
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next(rows[prefix] for prefix in prefixes if prefix in rows)


def test_no_room_imports_one_above():
    wrong = [
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if "stagedspec" not in (name, other) and layer(other) > layer(name)
    ]
    assert not wrong


def test_no_circles():
    left = {name: set(others) for name, others in GRAPH.items()}
    while free := [name for name, others in left.items() if not others]:
        left = {name: others - set(free) for name, others in left.items() if name not in free}
    assert not left


def test_no_module_is_imported_by_a_computed_name():
    """The graph cannot see such an import. `stagedspec` itself loads its public names when they are asked for."""
    found = [
        (name, ast.unparse(node))
        for name, path in MODULES.items()
        if name != "stagedspec"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        and not (node.args and isinstance(node.args[0], ast.Constant))
    ]
    assert not found


def test_the_graph_is_seen():
    """So that the two tests above cannot pass on nothing."""
    assert "stagedspec.decoding.engine" in GRAPH["stagedspec.decoding.generation"]
    assert "stagedspec.kernels.backends.triton_backend" in GRAPH["stagedspec.kernels.backends.select"]  # lazy
