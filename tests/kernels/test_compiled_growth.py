"""The compiled growth of trees against the one in Python, which makes the same trees."""

import random

import numba
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec.kernels.backends.torch_backend import TorchBackend
from stagedspec.kernels.compiled import growth as compiled_growth
from stagedspec.kernels.reference.noise import Noise
from stagedspec.kernels.state import host_growth
from stagedspec.kernels.state.host import Sequences
from stagedspec.models.ngram_fit import fit_table
from stagedspec.planning.tree import TreeConfig

CPU = torch.device("cpu")
VOCAB = 7
TABLE = fit_table([torch.randint(VOCAB, (300,), generator=torch.Generator().manual_seed(0))], VOCAB, successors=3)
FLOORS = st.sampled_from([0.0, 0.01, 0.2])


@st.composite
def trees(draw):
    passes, width, children = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    most = (1 + (passes - 1) * width) * children
    return TreeConfig(
        nodes=draw(st.integers(2, most + 1)), depth=draw(st.integers(1, 6)), passes=passes, width=width,
        children=children, prefetch=draw(st.integers(0, 3)), prefetch_width=draw(st.integers(1, 3)),
        node_floor=draw(FLOORS), pass_floor=draw(FLOORS), context=draw(st.booleans()),
    )  # fmt: skip


def proposals(generator: random.Random, rows: int, slots: int, children: int):
    """Children that are often tied, and often what an n-gram guesses."""
    tokens = [[generator.sample(range(VOCAB), children) for _ in range(slots)] for _ in range(rows)]
    values = [
        [sorted((-generator.randint(1, 9) / 8 for _ in range(children)), reverse=True) for _ in range(slots)]
        for _ in range(rows)
    ]
    return torch.tensor(tokens), torch.tensor(values)


def same_pass(ours, theirs) -> None:
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.positions, theirs.positions)
    assert ours.depths.tolist() == theirs.depths.tolist() and ours.prefixes == theirs.prefixes
    assert torch.equal(ours.bias, theirs.bias)


def run(config, lengths, seed, table, sampled, steps) -> list:
    """Several steps with both, each from what the other has not touched; returns the sizes of the trees."""
    generator = random.Random(seed)
    prompts = [[generator.randrange(VOCAB) for _ in range(length)] for length in lengths]
    sequences = Sequences(prompts, 20, [], CPU)
    noise = None
    if sampled:
        limits = [row.limit for row in sequences.rows]
        noise = Noise(
            [seed + 1] * len(prompts), list(range(len(prompts))), VOCAB, config.depth + 1, limits, CPU, past=3
        )
    made = None
    sizes = []
    for step in range(steps):
        if noise is not None:
            noise.advance(sequences)
        if made is None:
            arguments = sequences, config, table, noise, torch.float32
            made = compiled_growth.Growth(*arguments), host_growth.Growth(*arguments)
        ours, theirs = made
        for growth in made:
            growth.begin()
        for number in range(config.passes):
            assert ours.pays() == theirs.pays() or number == 0
            same_pass(ours.batch(number), theirs.batch(number))
            assert ours.start == theirs.start and ours.caught_up == theirs.caught_up
            slots = len(theirs.rows[0].slots) - theirs.start
            proposed = proposals(generator, len(prompts), slots, min(config.children, VOCAB))
            for growth in made:
                growth.record(*proposed)
            if not theirs.pays() and generator.random() < 0.5:
                break
        found, expected = ours.harvest(), theirs.harvest()
        assert found.trees == expected.trees
        assert (found.nodes, found.caught_up) == (expected.nodes, expected.caught_up)
        sizes += [len(tree.nodes) for tree in found.trees]
        chosen = torch.randint(VOCAB, (len(prompts), found.nodes), generator=torch.Generator().manual_seed(step))
        for row, tree in enumerate(expected.trees):  # often a path of the tree
            for (node, token), _ in tree.children.items():
                if generator.random() < 0.6:
                    chosen[row, node] = token
        found.verify_commit(chosen)
        if step == 2:
            sequences.stop(0, len(sequences.rows[0].tokens))
        if step == 3:  # another text in the place of the row that has ended
            prompt = [generator.randrange(VOCAB) for _ in range(lengths[0] // 2 + 1)]
            sequences.replace(0, prompt, 15)
            if noise is not None:
                noise.replace(0, seed + 9, 0, len(prompt), len(prompt) + 15)
        sequences.roots_only = step == 1
    return sizes


@given(
    config=trees(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 10**6),
    katz=st.booleans(), sampled=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_the_same_trees_as_in_python(config, lengths, seed, katz, sampled):
    run(config, lengths, seed, TABLE if katz else None, sampled, steps=5)


def test_a_tree_of_many_slots():
    """More than a machine word has bits."""
    config = TreeConfig(nodes=200, depth=9, passes=12, width=8, children=6, prefetch=2, prefetch_width=3)
    assert config.slots > 128
    sizes = run(config, [5, 30], 1, TABLE, True, steps=3)
    assert max(sizes) == 200


def test_no_tree_after_a_pass_that_chose_nothing():
    config = TreeConfig(nodes=6, depth=3, passes=2, width=2, children=3, prefetch=1, prefetch_width=2)
    assert set(run(config, [4], 3, None, False, steps=3)[1:2]) != {1}
    assert run(config, [4], 3, None, False, steps=3)[2] == 1  # `roots_only` after step 1


def test_it_is_what_a_cpu_uses(monkeypatch):
    sequences = Sequences([[1, 2]], 5, [], CPU)
    config = TreeConfig(nodes=2, depth=1, passes=1, width=1, children=1, prefetch=0)
    arguments = sequences, config, None, None, torch.float32
    assert isinstance(TorchBackend().make_growth(*arguments), compiled_growth.Growth)
    sequences.device = torch.device("meta")
    assert isinstance(TorchBackend().make_growth(*arguments), host_growth.Growth)


@numba.njit
def row_of(table, first, last):
    return compiled_growth._row_of(table, first, last)


def test_rows_of_the_table():
    """Of a vocabulary as large as GPT-2's, whose keys wrap around when they are hashed."""
    generator = torch.Generator().manual_seed(1)
    fitted = fit_table([torch.randint(50257, (4000,), generator=generator)], 50257, successors=2, max_contexts=1000)
    table = compiled_growth.Successors.of(fitted)
    contexts = [divmod(key, 50257) for key in fitted.keys[:-1].tolist()[::7]]
    assert len(contexts) > 100 and max(first for first, _ in contexts) > 10000
    contexts += [(-1, 0), (-1, 50256), (50256, 50256), (0, 0), (7, 50000)]
    for first, last in contexts:
        tokens, _ = fitted.lookup(torch.tensor([first, last]))
        assert table.tokens[row_of(table, first, last)].tolist() == tokens.tolist()
