"""Control on the device against control on the host, step by step over whole generations."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stagedspec.kernels import control
from stagedspec.kernels import device as on_device
from stagedspec.kernels.reference import gumbel_noise
from stagedspec.ngram import fit_table
from stagedspec.tree import TreeConfig

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


def same_batch(ours: on_device.Batch, host: control.Batch, region: int, lengths: list[int], nodes: int) -> None:
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


def same_trees(ours: on_device.Trees, host: control.Trees) -> None:
    tokens, parents, depths, slots, origins = ours.tree.cpu().tolist()
    for row, tree in enumerate(host.trees):
        count = len(tree.tokens)
        for got, expected in (
            (tokens, tree.tokens),
            (parents, tree.parents),
            (depths, tree.depths),
            (slots, tree.slots),
            (origins, tree.origins),
        ):
            assert got[row][:count] == expected
        assert parents[row][count:] == [-1] * (ours.nodes - count)


def pairs(moves: torch.Tensor) -> list[list[tuple[int, int]]]:
    """The moves of each row, without the padding."""
    rows, positions = moves.cpu().tolist()
    result = []
    for row, where in zip(rows, positions, strict=True):
        assert [at for at, value in enumerate(row) if value < 0] == [at for at, value in enumerate(where) if value < 0]
        result.append([pair for pair in zip(row, where, strict=True) if pair[0] >= 0])
    return result


def pick(generator: random.Random, trees: control.Trees, nodes: int) -> torch.Tensor:
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
    host = control.Sequences(prompts, new_tokens, eos, torch.device("cpu"))
    ours = on_device.Sequences(prompts, new_tokens, eos, DEVICE)
    host_noise = noise = None
    if seed is not None:
        seeds = torch.tensor([seed + 2**40 * row for row in range(len(prompts))])
        streams = torch.tensor([row % 2 for row in range(len(prompts))], dtype=torch.int32)
        host_noise = HostNoise(seeds, streams.long(), lambda: host.lengths)
        noise = SimpleNamespace(seeds=seeds.to(DEVICE), streams=streams.to(DEVICE))
    growth = on_device.Growth(ours, config, None if table is None else table.to(DEVICE), noise)
    accepted = []
    for _ in range(steps):
        if config.passes:
            expected = control.Growth(host, config, table, host_noise, torch.float32)
            growth.begin()
            for number in range(config.passes):
                known = expected.select(number)
                expected.prefetch(known)
                growth.prefetch(growth.select(number))
                theirs, batch = expected.batch(), growth.batch()
                assert growth.start == batch.first_bit == expected.start
                same_batch(batch, theirs, config.slots, host.lengths, batch.nodes)
                names, values = proposals(generator, len(prompts), batch.nodes, min(config.children, VOCAB))
                expected.record(names, values)
                growth.record(names.int().to(DEVICE) if number else names.to(DEVICE), values.to(DEVICE))
            host_trees, trees = expected.harvest(), growth.harvest()
        else:
            host_trees, trees = control.Trees.roots(host), on_device.Trees.roots(ours)
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
    assert ours.accepted == {count: accepted.count(count) for count in set(accepted)}
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
    katz=st.booleans(),
    noisy=st.booleans(),
    eos=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    new_tokens=st.integers(1, 12),
)
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])  # shrinking would take an hour
def test_the_same_as_on_the_host(
    table, seed, lengths, depth, passes, width, children, prefetch, prefetch_width, floor, katz, noisy, eos, new_tokens
):
    generator = random.Random(seed)
    most = 1 + (1 + (passes - 1) * width) * children
    config = TreeConfig(
        generator.randint(2, most), depth, passes, width, children, prefetch, prefetch_width, node_floor=floor
    )
    prompts = [[generator.randrange(4) for _ in range(length)] for length in lengths]
    replay(prompts, new_tokens, eos, config, table if katz else None, seed if noisy else None, generator, steps=3)
