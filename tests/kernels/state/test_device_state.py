"""State on the device against state on the host, step by step over whole generations."""

import math
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stagedspec.kernels import grow_tree
from stagedspec.kernels.reference import gumbel_noise
from stagedspec.kernels.state import device as device_state
from stagedspec.kernels.state import host as host_state
from stagedspec.kernels.state import host_growth
from stagedspec.models.ngram_fit import fit_table
from stagedspec.planning.tree import TreeConfig

pytestmark = pytest.mark.interpreted

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
VOCAB = 11


class HostNoise:
    """The noise of single tokens, by the reference."""

    def __init__(self, seeds: torch.Tensor, streams: torch.Tensor, lengths):
        self.seeds, self.streams, self.lengths = seeds, streams, lengths

    def of(self, row, depths, tokens):
        positions = torch.tensor([[self.lengths()[row] + depth for depth in depths]])
        noise = gumbel_noise(self.seeds[row : row + 1], self.streams[row : row + 1], positions, VOCAB)
        return noise[0, torch.arange(len(tokens)), torch.tensor(tokens)].tolist()


def proposals(generator: random.Random, rows: int, slots: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random children: distinct tokens, descending log-probabilities. Multiples of 1/16: exact sums and many ties."""
    names = [[generator.sample(range(VOCAB), count) for _ in range(slots)] for _ in range(rows)]
    values = [
        [sorted((-generator.randint(1, 48) / 16 for _ in range(count)), reverse=True) for _ in range(slots)]
        for _ in range(rows)
    ]
    if generator.random() < 0.2:
        values[0][-1][-1] = -math.inf
    return torch.tensor(names), torch.tensor(values)


def same_batch(ours: device_state.Batch, host: host_state.Batch, region: int, lengths: list[int], nodes: int) -> None:
    """The device's pass over `nodes` nodes says what the host's does; what it has beyond is filler."""
    assert ours.tokens[:, :nodes].tolist() == host.tokens.tolist()
    assert ours.positions[:, :nodes].tolist() == host.positions.tolist()
    noise = [[max(n + depth, 0) for depth in row] for n, row in zip(lengths, host.depths, strict=True)]
    assert ours.noise_positions[:, :nodes].tolist() == noise
    visible = host.bias[:, 0] == 0
    masks = ours.masks.cpu()
    bits = torch.stack([masks[..., bit // 32] >> (bit % 32) & 1 for bit in range(masks.shape[2] * 32)], -1)
    assert bits[:, :nodes, :region].bool().equal(visible[..., :region])
    assert not bits[..., ours.nodes if nodes < ours.nodes else region :].any()
    assert ours.prefix.tolist() == visible[:, 0, region:].sum(-1).tolist()


def same_trees(ours: device_state.Trees, host: host_state.Trees) -> None:
    fields = ours.tree.cpu()
    for row, tree in enumerate(host.trees):
        count = len(tree.nodes)
        assert fields[:, row, :count].tolist() == tree.device_fields
        assert fields[1, row, count:].tolist() == [-1] * (ours.nodes - count)


def pairs(moves: torch.Tensor) -> list[list[tuple[int, int]]]:
    """The moves of each row, without the padding."""
    rows, positions = moves.cpu().tolist()
    result = []
    for row, where in zip(rows, positions, strict=True):
        assert [at for at, value in enumerate(row) if value < 0] == [at for at, value in enumerate(where) if value < 0]
        result.append([pair for pair in zip(row, where, strict=True) if pair[0] >= 0])
    return result


def pick(generator: random.Random, trees: host_state.Trees, nodes: int) -> torch.Tensor:
    """What a target might choose: often a child of the node."""
    chosen = []
    for tree in trees.trees:
        chosen.append([])
        for node in range(nodes):
            below = [token for parent, token in tree.children if parent == node]
            chosen[-1].append(
                generator.choice(below) if below and generator.random() < 0.8 else generator.randrange(VOCAB)
            )
    return torch.tensor(chosen)


def replay(prompts, new_tokens, eos, config: TreeConfig, table, seed: int | None, generator: random.Random, steps: int):
    """Runs both side by side and compares everything they say. Returns both sequences."""
    host = host_state.Sequences(prompts, new_tokens, eos, torch.device("cpu"))
    ours = device_state.Sequences(prompts, new_tokens, eos, DEVICE)
    host_noise = noise = None
    if seed is not None:
        seeds = torch.tensor([seed + 2**40 * row for row in range(len(prompts))])
        streams = torch.tensor([row % 2 for row in range(len(prompts))], dtype=torch.int32)
        host_noise = HostNoise(seeds, streams.long(), lambda: host.lengths)
        noise = SimpleNamespace(seeds=seeds.to(DEVICE), streams=streams.to(DEVICE))
    growth = device_state.Growth(ours, config, None if table is None else table.to(DEVICE), noise)
    accepted = []
    for _ in range(steps):
        if config.passes:
            for row in host.rows:
                row.caught_up = False  # steps of one shape always read the catch-up token
            expected = host_growth.Growth(host, config, table, host_noise, torch.float32)
            growth.begin()
            for number in range(config.passes):
                theirs, batch = expected.batch(number), growth.batch(number)
                assert growth.start == batch.first_bit == expected.start
                same_batch(batch, theirs, config.slots, host.lengths, batch.nodes)
                names, values = proposals(generator, len(prompts), batch.nodes, min(config.children, VOCAB))
                expected.record(names, values)
                growth.record(names.int().to(DEVICE) if number else names.to(DEVICE), values.to(DEVICE))
            host_trees, trees = expected.harvest(), growth.harvest()
        else:
            host_trees, trees = host_state.Trees.roots(host), device_state.Trees.roots(ours)
            for tree in host_trees.trees:
                tree.nodes = [
                    tree.nodes[0]._replace(slot=1)
                ]  # that no draft has evaluated these roots, the host alone wants to know
        same_trees(trees, host_trees)
        same_batch(trees.batch(), host_trees.batch(torch.float32), host_trees.nodes, host.lengths, host_trees.nodes)
        chosen = pick(generator, host_trees, config.nodes)
        host_moves = host_trees.verify_commit(chosen[:, : host_trees.nodes])
        moves = trees.verify_commit(chosen.to(DEVICE))
        ours.publish()
        assert moves.accepted.tolist() == host_moves.accepted
        accepted += [count for count in host_moves.accepted if count >= 0]
        assert pairs(moves.target_rows(0)) == host_moves.target_rows(0)
        assert pairs(moves.draft_rows()) == host_moves.draft_rows()
        for row, snapshot in zip(host.rows, ours.rows, strict=True):
            assert (row.tokens, row.origins, row.limit, row.running) == tuple(snapshot)
        assert ours.state.active.item() == sum(row.running for row in host.rows)
        assert ours.finished == host.finished  # `rows` has waited for the device
    assert sum(ours.accepted, Counter()) == Counter(accepted) and ours.accepted == host.accepted
    return host, ours


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(0)
    return fit_table([torch.randint(VOCAB, (400,), generator=generator)], VOCAB, successors=3, max_contexts=50)


@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    depth=st.integers(1, 5),
    passes=st.integers(1, 3),
    width=st.integers(1, 3),
    children=st.integers(1, 4),
    prefetch=st.integers(0, 2),
    prefetch_width=st.integers(1, 3),
    floor=st.sampled_from([0.0, 0.01]),
    context=st.booleans(),
    katz=st.booleans(),
    noisy=st.booleans(),
    eos=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    new_tokens=st.integers(1, 12),
)
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])  # shrinking would take an hour
def test_the_same_as_on_the_host(
    table, seed, lengths, depth, passes, width, children, prefetch, prefetch_width, floor, context, katz, noisy, eos,
    new_tokens,
):  # fmt: skip
    generator = random.Random(seed)
    most = 1 + (1 + (passes - 1) * width) * children
    shape = depth, passes, width, children, prefetch, prefetch_width
    config = TreeConfig(generator.randint(2, most), *shape, node_floor=floor, context=context)
    prompts = [[generator.randrange(4) for _ in range(length)] for length in lengths]
    replay(prompts, new_tokens, eos, config, table if katz else None, seed if noisy else None, generator, steps=3)


@pytest.mark.parametrize(
    "config",
    [
        TreeConfig(nodes=1, depth=0, passes=0, children=1, prefetch=0),
        TreeConfig(nodes=40, depth=6, passes=4, width=6, children=4, prefetch=2, prefetch_width=3),
        TreeConfig(nodes=5, depth=4, passes=4, width=1, children=1, prefetch=0),
        TreeConfig(nodes=12, depth=5, passes=2, width=2, children=4, prefetch=2, prefetch_width=2, context=False),
        TreeConfig(nodes=30, depth=2, passes=2, width=4, children=16, prefetch=1, prefetch_width=5),
        TreeConfig(nodes=13, depth=10, passes=2, width=2, children=4, prefetch=8, prefetch_width=1),
        TreeConfig(nodes=4, depth=30, passes=1, width=1, children=3, prefetch=28, prefetch_width=1),
        TreeConfig(nodes=6, depth=3, passes=1, width=200, children=8, prefetch=0, prefetch_width=10**6),
        TreeConfig(nodes=150, depth=6, passes=3, width=20, children=130, prefetch=1, prefetch_width=18),
    ],
    ids=[
        "autoregressive",
        "two-words",
        "chain",
        "table-alone",
        "more-children-than-tokens",
        "8-levels",
        "28-levels",
        "widths-of-no-use",
        "in-several-tiles",
    ],
)
def test_shapes_of_their_own(table, config):
    generator = random.Random(3)
    prompts = [[1, 2, 1, 2, 1], [3]]
    host, _ = replay(prompts, 30, [], config, table, 5, generator, steps=2)
    assert all(len(row.origins) >= 2 for row in host.rows)


@pytest.mark.parametrize("seed", range(3))
def test_nodes_exactly_as_likely_as_the_floor_are_left_out(table, seed):
    """Scores are multiples of 1/16, and so is the floor's logarithm: there are ties."""
    floor = math.exp(-1.5)
    assert math.log(floor) == -1.5
    config = TreeConfig(
        nodes=20, depth=4, passes=3, width=3, children=4, prefetch=1, prefetch_width=2, node_floor=floor
    )
    host, _ = replay([[1, 2, 1, 2, 1], [3]], 30, [], config, table, None, random.Random(seed), steps=2)
    growth = host_growth.Growth(host, TreeConfig(4, 1, 1, 1, 3, 0, node_floor=floor), None, None, torch.float32)
    batch = growth.batch(0)
    values = torch.tensor([-1.0, -1.5, -1.5625]).expand(*batch.tokens.shape, -1)
    growth.record(torch.tensor([4, 5, 6]).expand_as(values), values)
    assert all(len(tree.nodes) == 2 for tree in growth.harvest().trees)


def test_no_step_after_the_last_changes_anything(table):
    config = TreeConfig(nodes=4, depth=2, passes=1, width=1, children=3, prefetch=1, prefetch_width=1)
    host, ours = replay([[1, 2, 3], [4, 5]], 2, [], config, table, None, random.Random(1), steps=4)
    assert host.finished and ours.finished
    assert [len(row.origins) for row in ours.rows] == [2, 2]


def test_finished_with_the_last_row():
    """A row that is stopped twice counts once."""
    ours = device_state.Sequences([[1, 2], [3]], 5, [], DEVICE)
    for index, finished in ((0, False), (0, False), (1, True)):
        ours.stop(index, 2)
        ours.publish()
        assert [row.running for row in ours.rows] == [False, not finished]  # waits for the device
        assert ours.finished == finished


# ---------------------------------------------------------------- verification alone


def random_tree(generator: random.Random, kind: str, nodes: int) -> host_state.Tree:
    tree = host_state.Tree.root(generator.randrange(VOCAB))
    for node in range(1, nodes):
        parent = {"chain": node - 1, "star": 0, "random": generator.randrange(node)}[kind]
        used = {token for above, token in tree.children if above == parent}
        token = generator.choice([token for token in range(2 * nodes) if token not in used])
        tree.add(token, parent, generator.randint(-1, 30), generator.randint(1, 2))
    return tree


def load(trees: device_state.Trees, host: list[host_state.Tree]) -> None:
    """Puts host trees where `harvest` would; garbage first, so that nothing else is read."""
    trees.tree.fill_(10**6)
    trees.tree[1].fill_(-1)
    trees.inputs.masks.fill_(1)
    for row, tree in enumerate(host):
        trees.tree[:, row, : len(tree.nodes)] = torch.tensor(tree.device_fields, dtype=torch.int32)
        for node, (*_, mask) in enumerate(tree.nodes):
            words = [mask >> 32 * word & 0xFFFFFFFF for word in range(trees.inputs.masks.shape[2])]
            words = [word - 2**32 if word >= 2**31 else word for word in words]
            trees.inputs.masks[row, node] = torch.tensor(words, dtype=torch.int32)


@pytest.mark.parametrize("kind", ["chain", "star", "random"])
@pytest.mark.parametrize("nodes", [2, 33, 64])
def test_walks(kind, nodes):
    generator = random.Random(nodes)
    for eos, new_tokens in (([], 100), ([3, 1], 100), ([*range(-12, -2), 3], 100), ([], 3), ([], [2, 1, 9, 3])):
        prompts = [[7] * (row + 1) for row in range(4)]
        ours = device_state.Sequences(prompts, new_tokens, eos, DEVICE)
        host = host_state.Sequences(prompts, new_tokens, eos, torch.device("cpu"))
        host.rows[3].running = False
        ours.state.running[3] = 0
        ours.state.active.sub_(1)
        host_trees = host_state.Trees(host, [random_tree(generator, kind, nodes - row % 2) for row in range(4)], nodes)
        settings = SimpleNamespace(nodes=nodes, depth=nodes, slots=1, children=1)
        trees = device_state.Trees(ours, settings, None)
        load(trees, host_trees.trees)
        trees.moves.target.fill_(10**6)
        trees.moves.draft.fill_(10**6)
        chosen = pick(generator, host_trees, nodes)
        unchosen = torch.tensor([[node and generator.random() < 0.1 for node in range(nodes)] for _ in prompts])
        chosen[unchosen.bool()] = -1  # nodes not to be stepped to
        expected, moves = host_trees.verify_commit(chosen), trees.verify_commit(chosen.int().to(DEVICE))
        assert moves.accepted.tolist() == expected.accepted
        assert pairs(moves.target_rows()) == expected.target_rows(0)
        assert pairs(moves.draft_rows()) == expected.draft_rows()
        for row, snapshot in zip(host.rows, ours.rows, strict=True):
            assert (row.tokens, row.origins, row.running) == (snapshot.tokens, snapshot.origins, snapshot.running)
        assert ours.state.active.item() == sum(row.running for row in host.rows)


def test_nodes_that_a_chain_lacks_are_never_accepted():
    """Not where the token is chosen that fills them, 0."""
    ours = device_state.Sequences([[5, 6, 7, 5, 6], [1]], 9, [], DEVICE)
    trees = device_state.Trees.lookup(ours, 3)
    assert trees.children == [{(0, 7): 1, (1, 5): 2, (2, 6): 3}, {}]
    moves = trees.verify_commit(torch.zeros(2, 4, dtype=torch.int32, device=DEVICE))
    assert moves.accepted.tolist() == [0, 0]
    assert [row.tokens for row in ours.rows] == [[5, 6, 7, 5, 6, 0], [1, 0]]


# ---------------------------------------------------------------- what a step may not do


class OurOperationsAlone(TorchDispatchMode):
    """Fails on any operation that is not one of our kernels: whatever allocates or reads back is one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace == "stagedspec", f"{func} in a step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("count", "place"), [(1, 0), (8, 7), (9, 0), (9, 8), (17, 8), (17, 16)])
def test_any_of_many_ends(count, place):
    """More end-of-sequence tokens than the kernel looks at together."""
    eos = list(range(20, 20 + count))
    eos[place] = 8
    ours = device_state.Sequences([[4, 6], [4, 6]], 9, eos, DEVICE)
    trees, tree = device_state.Trees(ours, SimpleNamespace(nodes=4, depth=3), None), host_state.Tree.root(6, 1)
    for node, token in enumerate((7, 8, 9)):
        tree.add(token, node, node, 1)
    trees.load([tree, tree])
    trees.verify_commit(torch.tensor([[7, 8, 9, 1], [7, 5, 1, 1]], dtype=torch.int32, device=DEVICE))
    ours.publish()
    assert [row.tokens[2:] for row in ours.rows] == [[7, 8], [7, 5]]
    assert [row.running for row in ours.rows] == [False, True]


def test_a_step_neither_allocates_nor_reads_back(table):
    config = TreeConfig(nodes=6, depth=3, passes=2, width=2, children=3, prefetch=1, prefetch_width=2)
    ours = device_state.Sequences([[1, 2, 3], [4]], 20, [5], DEVICE)
    noise = SimpleNamespace(seeds=torch.tensor([1, 2], device=DEVICE), streams=torch.tensor([0, 1], device=DEVICE))
    growth = device_state.Growth(ours, config, table.to(DEVICE), noise)
    proposed = [
        tuple(tensor.to(DEVICE) for tensor in proposals(random.Random(number), 2, size, 3))
        for number, size in enumerate((4, 4))
    ]
    chosen = torch.zeros(2, 6, dtype=torch.int32, device=DEVICE)

    def step():
        growth.begin()
        for number, (tokens, logprobs) in enumerate(proposed):
            growth.batch(number)
            growth.record(tokens, logprobs)
        trees = growth.harvest()
        trees.batch()
        moves = trees.verify_commit(chosen)
        moves.target_rows(), moves.draft_rows()
        device_state.Trees.roots(ours).verify_commit(roots)

    roots = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    step()  # compiles, and makes the trees of plain decoding
    if GPU:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
    try:
        with OurOperationsAlone():
            step()
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
    if GPU:
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_opcheck(table):
    config = TreeConfig(nodes=4, depth=2, passes=2, width=1, children=2, prefetch=1, prefetch_width=1)
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "stagedspec":
                calls.append((func, [x.clone() if isinstance(x, torch.Tensor) else x for x in args]))
            return func(*args, **(kwargs or {}))

    with Recorder():
        replay([[1, 2, 1]], 5, [], config, table, 1, random.Random(0), steps=1)
    assert {func.name() for func, _ in calls} == {
        "stagedspec::grow_pass",
        "stagedspec::harvest_tree",
        "stagedspec::verify_commit",
    }
    for func, args in calls[1:]:
        torch.library.opcheck(func, tuple(args))


# ---------------------------------------------------------------- errors


def test_errors(table):
    config = TreeConfig(nodes=4, depth=2, passes=2, width=1, children=2, prefetch=0)
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        device_state.Sequences([[1], []], 5, [], DEVICE)
    for none in (0, [3, 0]):
        with pytest.raises(ValueError, match="new_tokens must be at least 1, got "):
            device_state.Sequences([[1], [1, 2]], none, [], DEVICE)
    sequences = device_state.Sequences([[1, 2], [3]], 5, [], DEVICE)
    growth = device_state.Growth(sequences, config, None, None)
    with pytest.raises(ValueError, match="names must be a tensor, got NoneType"):
        growth.batch(1)
    good = torch.zeros(2, 2, 2, dtype=torch.int32, device=DEVICE), torch.zeros(2, 2, 2, device=DEVICE)
    growth.record(good[0][:1], good[1])
    with pytest.raises(ValueError, match=r"names must have the shape \[2, 2, any\], got \[1, 2, 2\]"):
        growth.batch(1)
    growth.record(good[0].float(), good[1])
    with pytest.raises(ValueError, match=r"names must be torch\.int32 or torch\.int64, got torch\.float32"):
        growth.batch(1)
    growth.record(good[0].expand(2, 2, 2).transpose(0, 1), good[1])
    with pytest.raises(ValueError, match="names must be contiguous"):
        growth.batch(1)
    wide = torch.zeros(2, 2, 3, device=DEVICE)
    growth.record(wide.int(), wide)
    with pytest.raises(ValueError, match="names must hold 1 to 2 children, got 3"):
        growth.batch(1)
    growth.record(*good)
    growth.batch(1)
    with pytest.raises(ValueError, match="a step has the passes 0 to 1, got 2"):
        growth.batch(2)
    with pytest.raises(ValueError, match=r"tree must have the shape \[5, 2, 3\], got \[5, 2, 4\]"):
        growth.trees.verify_commit(torch.zeros(2, 3, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match=r"chosen must be torch\.int32 or torch\.int64"):
        growth.trees.verify_commit(torch.zeros(2, 4, device=DEVICE))
    noise = SimpleNamespace(seeds=torch.zeros(2, device=DEVICE), streams=torch.zeros(2, device=DEVICE))
    with pytest.raises(ValueError, match=r"seeds must be torch\.int64"):
        device_state.Growth(sequences, config, None, noise).batch(0)
    guessing = TreeConfig(nodes=2, depth=2, passes=1, width=5000, children=1, prefetch=1)
    with pytest.raises(ValueError, match="at most 4096 options a level on a GPU, got a table of 3 successors"):
        device_state.Growth(sequences, guessing, table.to(DEVICE), None).batch(0)
    most = replace(guessing, width=1024)  # times 4: a table's 3 successors and the context n-gram's
    grow_tree.check_options("tree", most, table)
    huge = replace(table, vocab_size=2**21).to(DEVICE)
    with pytest.raises(ValueError, match="the vocabulary may have at most 2097151 tokens, got 2097152"):
        device_state.Growth(sequences, config, huge, None).batch(0)
    grow_tree.check_candidates("tree", TreeConfig(nodes=2, depth=2, passes=74, width=14, children=16, prefetch=0))
    large = TreeConfig(nodes=2, depth=2, passes=100, width=10, children=17, prefetch=0)
    with pytest.raises(ValueError, match="at most 16384 candidates on a GPU, got 992 draft evaluations"):
        device_state.Growth(sequences, large, None, None).batch(0)
