"""What holds for every operation that is registered: opcheck accepts it, and tensors on another device are refused."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pkgutil import walk_packages

import pytest
import torch
from early_starts import EarlyStarts, bits
from torch.utils._python_dispatch import TorchDispatchMode

import stagedspec.kernels
from stagedspec.kernels import choose, compact, embed, grow_tree, linear, lm_head, ngram_lookup
from stagedspec.kernels import tree_attention as attention
from stagedspec.kernels.common import registry
from stagedspec.kernels.common.registry import Scratch
from stagedspec.kernels.state import device as on_device
from stagedspec.tuning.workloads import TreeWorkload, katz_table

for module in walk_packages(stagedspec.kernels.__path__, "stagedspec.kernels."):
    import_module(module.name)
REGISTERED = {name.removeprefix("stagedspec::") for name in registry.LIBRARY._op_defs}

FUNCTIONS = ("row_stats", "linear_add", "norm_linear", "tree_attention", "compact", "embed", "choose",
             "lm_head_choose", "lm_head_topm", "ngram_lookup", "grow_pass", "harvest_tree",
             "verify_commit")  # fmt: skip
M, K, V = 2, 24, 61


def calls(device) -> dict[str, tuple]:
    """Every public function with arguments that it takes."""

    def floats(*shape):
        return torch.randn(shape, device=device)

    def ints(*shape, dtype=torch.int32):
        return torch.zeros(shape, dtype=dtype, device=device)

    sizes = linear.scratch_size(M, V, K), lm_head.scratch_size(M, V, K), (10_000, 4)
    scratch = Scratch.of(sizes, device)
    scratch.partials.zero_()
    stats, out = floats(M, linear.stat_tiles(K), 2), {"out": floats(M, V), "scratch": scratch}
    plain = {"x": floats(M, K), "weight": floats(V, K), "bias": floats(V)}
    at = {"seeds": ints(1, dtype=torch.int64), "streams": ints(1), "positions": ints(1, M), "noise": floats(M, V)}
    chosen = {"out": ints(M), "scratch": scratch}
    likely = {"out_tokens": ints(M, 3), "out_logprobs": floats(M, 3), "scratch": scratch}
    head = {"x": floats(M, K), "norm_weight": floats(K), "norm_bias": floats(K), "epsilon": 1e-5, "head": floats(V, K)}
    table = katz_table(V, device)
    moves = {"cache": floats(2, 1, 4, 2, 1, 4), "source": ints(1, 3), "target": ints(1, 3)}
    tables = {
        "token_table": floats(V, K),
        "position_table": floats(9, K),
        "tokens": ints(1, M),
        "positions": ints(1, M),
    }
    return {
        "row_stats": (linear.row_stats, {"x": floats(M, K), "stats": stats}),
        "linear_add": (linear.linear_add, plain | out | {"residual": floats(M, V), "stats": floats(M, 1, 2)}),
        "norm_linear": (
            linear.norm_linear,
            {"x": floats(M, K), "stats": stats, "epsilon": 1e-5, "activation": "gelu", **out}
            | {"layer": linear.Folded(floats(V, K), floats(V), floats(V))},
        ),
        "tree_attention": (
            attention.tree_attention,
            {"qkv": floats(M, 3 * 16), "cache": floats(1, 9, 2, 1, 16), "masks": ints(1, M, 1) + 1, "prefix": ints(1)}
            | {"first_bit": 0, "chunk": False, "tree_rows": 4, "scale": 0.25, "out": floats(M, 16), "scratch": scratch},
        ),
        "compact": (compact.compact, moves),
        "embed": (embed.embed, tables | {"out": floats(M, K), "stats": stats}),
        "choose": (choose.choose, {"logits": floats(M, V), **at, **chosen}),
        "lm_head_choose": (lm_head.lm_head_choose, head | at | chosen | {"logits": floats(M, V)}),
        "lm_head_topm": (lm_head.lm_head_topm, head | at | likely),
        "ngram_lookup": (
            ngram_lookup.ngram_lookup,
            {"contexts": ints(1, M, 2), "sequence": ints(1, 5), "lengths": ints(1) + 5, "table": table}
            | {"out_tokens": ints(1, M, 1 + table.successors), "out_logprobs": floats(1, M, 1 + table.successors)},
        ),
        **tree_calls(table, device),
    }


def tree_calls(table, device) -> dict[str, tuple]:
    """The last of each that growing a tree and committing a path of it makes."""
    found, names = {}, ("grow_pass", "harvest_tree", "verify_commit")

    def recorded(function):
        def call(*args):
            found[function.__name__] = function, dict(enumerate(args))
            return function(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in zip((grow_tree, grow_tree, on_device), names, strict=True):
            patch.setattr(module, name, recorded(getattr(module, name)))
        growing = TreeWorkload(8, 9, 1, table, device)
        trees = growing.passes()
        trees.verify_commit(growing.likely(trees))
    assert set(found) == set(names)
    return found


def run(function, arguments: dict) -> None:
    positional = {name: value for name, value in arguments.items() if isinstance(name, int)}
    function(*positional.values(), **{name: value for name, value in arguments.items() if name not in positional})


class Recorder(TorchDispatchMode):
    """Our operations that are called, and a copy of what with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stagedspec":
            self.calls.append((func, tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def known(device):
    return calls(device)


def test_every_operation_is_here(known):
    """An operation that is registered has a call here, so that it is checked below."""
    assert set(known) == set(FUNCTIONS)
    with Recorder() as recorder:
        for call in known.values():
            run(*call)
    assert {func.name().removeprefix("stagedspec::") for func, _ in recorder.calls} == REGISTERED


@pytest.mark.parametrize("name", FUNCTIONS)
def test_opcheck(name, known):
    with Recorder() as recorder:
        run(*known[name])
    for func, args in recorder.calls:
        torch.library.opcheck(func, args)


# What a kernel may read at once: it is there before a generation begins.
CONSTANT = {"weight", "sums", "bias", "norm_weight", "norm_bias", "head", "token_table", "position_table", "seeds",
            "streams", "keys", "rows", "table_tokens", "table_logprobs"}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kernel_waits_for_the_one_ahead(name, known, device, monkeypatch):
    """The same bits where kernels start early."""
    with Recorder() as recorder:
        run(*known[name])
    for func, args in recorder.calls:
        early, late = (tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args) for _ in range(2))
        memory, expected = ([x for x in given if isinstance(x, torch.Tensor)] for given in (early, late))
        if device.type == "cuda":
            func(*early)
        else:
            given = zip(func._schema.arguments, early, strict=True)
            ahead = [x for argument, x in given if isinstance(x, torch.Tensor) and argument.name not in CONSTANT]
            starts = EarlyStarts([x for x in memory if all(x is not one for one in ahead)], ahead)
            starts.run(lambda func=func, early=early: func(*early))
            assert starts.names
        with monkeypatch.context() as patch:
            patch.setattr(registry, "pdl", lambda arch: False)
            func(*late)
        assert all(torch.equal(bits(one), bits(other)) for one, other in zip(memory, expected, strict=True))


@pytest.mark.parametrize("arch", [0, 80, 89, 90, 100, 120])
def test_kernels_start_early_where_the_gpu_can(arch, monkeypatch):
    """From Hopper on. A launch that asks for it without a kernel that waits, or the other way round, is a race."""
    monkeypatch.setattr(registry, "architecture", lambda device: arch)
    monkeypatch.setattr(registry, "interpreted", lambda: arch == 0)
    options = registry.launch_options(torch.device("cpu"))
    assert options["PDL"] == options.get("launch_pdl", False) == (arch >= 90)
    assert options.get("enable_fp_fusion", False) is False


def one_elsewhere(value, name: str) -> Iterator[tuple[str, object]]:
    """`value` with one of its tensors on the meta device, each in turn; and that tensor's name."""
    if isinstance(value, torch.Tensor):
        yield name, value.to("meta")
    elif is_dataclass(value):
        for part in fields(value):
            for path, changed in one_elsewhere(getattr(value, part.name), f"{name}.{part.name}"):
                yield path, replace(value, **{part.name: changed})
    elif hasattr(value, "_fields"):  # a NamedTuple
        for part, held in value._asdict().items():
            for path, changed in one_elsewhere(held, f"{name}.{part}"):
                yield path, value._replace(**{part: changed})
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            for path, changed in one_elsewhere(part, f"{name}.{i}"):
                yield path, (*value[:i], changed, *value[i + 1 :])


# What an argument holds beside what the operation reads.
NOT_READ = {("tree_attention", "scratch.counters"), ("ngram_lookup", "table.keys"), ("grow_pass", "6.keys")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_elsewhere_are_refused(name, known):
    function, arguments = known[name]
    tried = 0
    for key, value in arguments.items():
        for path, changed in one_elsewhere(value, str(key)):
            if (name, path) in NOT_READ:
                continue
            with pytest.raises(ValueError, match=r"got meta|must be on meta|tensors on meta"):
                run(function, arguments | {key: changed})
                pytest.fail(f"{path} was taken")
            tried += 1
    assert tried > 1


def test_flat_arguments_become_records():
    def launch(x, scratch: Scratch, size: int, more: Scratch):
        calls.append((x, scratch, size, more))

    calls = []
    registry._with_records(launch, 6)(1, 2, 3, 4, 5, 6)
    assert calls == [(1, Scratch(2, 3), 4, Scratch(5, 6))] and calls[0][1].counters == 3
    with pytest.raises(TypeError, match=r"launch takes 6 flat arguments, its schema has 7"):
        registry._with_records(launch, 7)


KEYS = """
import sys
import triton
from stagedspec.kernels.choose.kernel import select_kernel
from stagedspec.kernels.common import registry
from stagedspec.kernels.grow_tree.pass_kernel import grow_pass_kernel
from stagedspec.kernels.lm_head.kernel import head_kernel
from stagedspec.kernels.ngram_lookup import ngram_lookup_kernel

kernels = [select_kernel, grow_pass_kernel, head_kernel, ngram_lookup_kernel]
for kernel in kernels[:: int(sys.argv[1])]:
    registry.key_functions(kernel.__module__)
    kernel.cache_key
print(*(kernel.cache_key for kernel in kernels))
"""


@pytest.mark.slow
def test_cache_keys_do_not_depend_on_what_ran_before():
    """Else a second process compiles again, with Triton 3.6, what the first one left in the cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    keys = [
        subprocess.run([sys.executable, "-c", KEYS, step], env=environment, capture_output=True, text=True, check=True)
        for step in ("1", "-1")
    ]
    assert keys[0].stdout == keys[1].stdout and len(keys[0].stdout.split()) == 4
