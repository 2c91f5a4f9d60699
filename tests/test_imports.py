"""Imports point one way, lazy ones and those for type checkers included: no room imports one above it, and there are
no circles."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {"stagedspec": ROOT / "stagedspec", "stagedspec.kernels": ROOT / "kernels"}

# From below. A file imports from its own row and from those before it.
LAYERS = (
    ("stagedspec.kernels.common", "stagedspec.kernels.philox", "stagedspec.values", "stagedspec.devices"),
    (
        "stagedspec.kernels.choose",
        "stagedspec.kernels.compact",
        "stagedspec.kernels.embed",
        "stagedspec.kernels.linear",
        "stagedspec.kernels.ngram_lookup",
        "stagedspec.kernels.tree_attention",
    ),
    ("stagedspec.kernels.grow_tree", "stagedspec.kernels.lm_head"),
    ("stagedspec.kernels.verify_commit",),
    ("stagedspec.kernels.state",),
    ("stagedspec.kernels.reference",),
    ("stagedspec.kernels.compiled",),
    ("stagedspec.kernels.backends", "stagedspec.kernels"),
    ("stagedspec.models",),
    ("stagedspec.planning",),
    ("stagedspec.decoding",),
    ("stagedspec.decoder",),
    ("stagedspec.hf", "stagedspec.ray", "stagedspec.tuning", "stagedspec.check", "stagedspec.training"),
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
    """The package's modules that a file imports: at its top, in a function, or under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in MODULES else node.module for name in names)
    return found & MODULES.keys()


GRAPH = {name: imports(path) - {name} for name, path in MODULES.items()}


ROWS = {room: row for row, rooms in enumerate(LAYERS) for room in rooms}


def room(name: str) -> str:
    """The room of LAYERS that a module lies in: the longest prefix of its name."""
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next(prefix for prefix in prefixes if prefix in ROWS)


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    """The names of a graph that lie on a circle or lead to one."""
    left = {name: set(others) for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others]:
        left = {name: others - set(free) for name, others in left.items() if name not in free}
    return set(left)


def test_no_room_imports_one_above():
    wrong = [
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if "stagedspec" not in (name, other) and ROWS[room(other)] > ROWS[room(name)]
    ]
    assert not wrong


def test_no_circles():
    assert not in_circles(GRAPH)


def test_rooms_of_a_row_form_no_circle():
    rooms: dict[str, set[str]] = {name: set() for name in ROWS}
    for name, others in GRAPH.items():
        if name != "stagedspec":
            rooms[room(name)] |= {room(other) for other in others - {"stagedspec"}} - {room(name)}
    assert not in_circles(rooms)


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
    """So that the tests above cannot pass on nothing."""
    assert "stagedspec.decoding.engine" in GRAPH["stagedspec.decoding.generation"]
    assert "stagedspec.kernels.backends.triton_backend" in GRAPH["stagedspec.kernels.backends.select"]  # lazy
    assert (
        "stagedspec.kernels.compiled.model" in GRAPH["stagedspec.kernels.backends.torch_backend"]
    )  # for type checkers
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}
