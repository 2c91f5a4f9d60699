"""Both backends offer what interface.py says, with signatures that take the engine's calls."""

import inspect

import pytest
import torch

from stagedspec.kernels.backends import interface
from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.kernels.backends.triton_backend import TritonBackend
from stagedspec.planning.tree import TreeConfig

CPU = torch.device("cpu")
TREE = TreeConfig(nodes=4, depth=2, passes=2, width=1, children=2, prefetch=1, prefetch_width=1)
BACKENDS = {"torch": TorchBackend, "triton": TritonBackend}


def members(protocol) -> dict[str, object]:
    """The public members of a protocol, inherited ones too: functions, properties, or types of attributes."""
    found: dict[str, object] = {}
    for base in protocol.__mro__:
        if base.__module__ == interface.__name__:
            found |= inspect.get_annotations(base) | vars(base)
    return {name: kind for name, kind in found.items() if not name.startswith("_")}


def problems(found: object, protocol) -> list[str]:
    """What an object lacks of a protocol: members, and methods that do not take every call that the protocol allows."""
    wrong = []
    for name, wanted in members(protocol).items():
        own = inspect.getattr_static(found, name, members)
        if own is members:
            wrong.append(f"no {name}")
        elif inspect.isfunction(wanted):
            theirs = inspect.signature(getattr(found, name)).parameters
            ours = dict(list(inspect.signature(wanted).parameters.items())[1:])  # without self
            missing = ours.keys() - theirs.keys()
            more = [key for key in theirs.keys() - ours.keys() if theirs[key].default is inspect.Parameter.empty]
            order = list(theirs)[: len(ours)] != list(ours)
            strict = [key for key in ours.keys() & theirs.keys() if ours[key].default is not inspect.Parameter.empty]
            strict = [key for key in strict if theirs[key].default is inspect.Parameter.empty]
            if missing or more or order or strict:
                wrong.append(f"{name}({', '.join(theirs)}) for {name}({', '.join(ours)})")
    return wrong


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]()


def test_backends_offer_every_member(backend):
    assert problems(backend, interface.Backend) == []
    assert (problems(backend, interface.AdaptiveBackend) == []) == backend.adapts_trees
    assert (problems(backend, interface.CompilingBackend) == []) == backend.compiles_kernels
    assert (problems(backend, interface.ModelCompiler) == []) == (backend.name == "torch")
    part = backend.repeated(print)
    assert part is print or problems(part, interface.Captured) == []


def test_state_offers_every_member(backend, device):
    """Sequences, noise, growth, trees, moves and batches, as a generation makes them."""
    kept, adapts = backend.keeps_generations, backend.adapts_trees
    place = device if backend.name == "triton" else CPU
    sequences = backend.make_sequences([[3, 1, 2], [5, 4]], 4, (), place, most=3)
    noise = backend.make_noise([1, 2], [0, 1], 11, 3, [7, 6], place)
    growth = backend.make_growth(sequences, TREE, None, noise, torch.float32)
    wanted = interface.ReusableSequences if kept else interface.Sequences
    assert problems(sequences, wanted) == problems(growth, interface.Growth) == []
    assert problems(noise, interface.ReusableNoise if kept else interface.Noise) == []
    assert (problems(sequences, interface.ReplaceableSequences) == []) == backend.replaces_rows
    assert (problems(noise, interface.ReplaceableNoise) == []) == backend.replaces_rows
    assert all(problems(row, interface.Row) == [] for row in sequences.rows)
    noise.advance(sequences)
    growth.begin()
    for number in range(TREE.passes):
        batch = growth.batch(number)
        assert problems(batch, interface.Batch) == []
        assert problems(noise.at(batch), interface.NoiseAt) == []
        rows = batch.tokens.shape[1]
        names = torch.arange(2, device=place).expand(2, rows, 2).contiguous()
        growth.record(names, torch.full((2, rows, 2), -0.5, device=place))
    for trees in (growth.harvest(), backend.root_trees(sequences), backend.lookup_trees(sequences, 2)):
        assert problems(trees, interface.Trees) == []
        assert problems(trees.batch(torch.float32), interface.Batch) == []
        moves = trees.verify_commit(torch.zeros(2, trees.nodes, dtype=torch.int32, device=place))
        assert problems(moves, interface.Moves) == []
        assert not adapts or problems(backend.report(trees, moves), interface.Report) == []
    if adapts:
        assert problems(backend.unread_pass(sequences, 1, 4, torch.float32), interface.Unread) == []


def without(name: str) -> object:
    """A torch backend that lacks a member."""
    kept = {key: value for key, value in vars(TorchBackend).items() if key not in (name, "__dict__", "__weakref__")}
    return type("Lacking", (), kept)()


@pytest.mark.parametrize("name", sorted(members(interface.Backend)))
def test_a_missing_member_is_seen(name):
    assert problems(without(name), interface.Backend) == [f"no {name}"]


@pytest.mark.parametrize(
    "changed",
    [
        lambda self, layer, x, residual: x,  # another order
        lambda self, x, layer: x,  # one argument less
        lambda self, x, layer, residual, scale: x,  # one more that must be given
        lambda self, x, layer, rest: x,  # another name
    ],
)
def test_another_signature_is_seen(changed):
    other = type("Other", (TorchBackend,), {"linear_add": changed})()
    assert len(problems(other, interface.Backend)) == 1
    optional = type(
        "Optional", (TorchBackend,), {"prefill_batch": lambda self, tokens, start, kv_dtype, more=1: None}
    )()
    assert problems(optional, interface.Backend) == []
    required = type("Required", (TorchBackend,), {"check_tree": lambda self, tree, table: None})()
    assert problems(required, interface.Backend) == ["check_tree(tree, table) for check_tree(tree, table)"]
