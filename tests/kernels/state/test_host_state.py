"""Tree growth and verification against brute force on random drafts."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec.kernels.common.constants import CONTEXT_LOGPROB, TARGET
from stagedspec.kernels.state.host import (
    NEVER,
    Row,
    Sequences,
    Tree,
    Trees,
    ngram_guesses,
)
from stagedspec.kernels.state.host_growth import Growth
from stagedspec.models.ngram_fit import fit_table
from stagedspec.planning.tree import TreeConfig

CPU = torch.device("cpu")


class RandomDraft:
    """The log-probabilities of every path's children, decided by the path alone."""

    def __init__(self, seed: int, vocab_size: int, children: int):
        self.seed, self.vocab_size, self.children = seed, vocab_size, children

    def proposals(self, path: tuple[int, ...]) -> list[tuple[int, float]]:
        """The likeliest children of a path, as (token, log-probability)."""
        generator = random.Random(f"{self.seed} {path}")
        weights = torch.tensor([generator.gauss(0, 2) for _ in range(self.vocab_size)], dtype=torch.float64)
        top = weights.log_softmax(-1).topk(self.children)
        return list(zip(top.indices.tolist(), top.values.float().tolist(), strict=True))


def best_paths(draft: RandomDraft, root: tuple[int, ...], depth: int, count: int) -> set[tuple[int, ...]]:
    """Brute force: all paths below the root, best first."""
    found, level = [], [((), 0.0)]
    for _ in range(depth):
        level = [((*path, t), score + v) for path, score in level for t, v in draft.proposals(root + path)]
        found += level
    found.sort(key=lambda pair: -pair[1])
    return {path for path, _ in found[:count]}


class RandomNgram:
    """A table that is sometimes right."""

    def __init__(self, seed: int, vocab_size: int):
        self.seed, self.vocab_size = seed, vocab_size

    def successors_of(self, first, last):
        assert -1 <= first < self.vocab_size and 0 <= last < self.vocab_size
        generator = random.Random(f"{self.seed} {first} {last}")
        tokens = generator.sample(range(self.vocab_size), 3)
        return [(token, -0.5 - rank) for rank, token in enumerate(tokens)]


def grow(prompts, config, draft, table=None, noise=None):
    """Runs the passes the way a model would see them: only `Batch` tells which tokens each slot has above it."""
    sequences = Sequences(prompts, 50, [], CPU)
    growth = Growth(sequences, config, table, noise, torch.float32)
    tokens = [[] for _ in prompts]
    passes = 0
    for number in range(config.passes):
        batch = growth.batch(number)
        names, values = [], []
        for row, prompt in enumerate(prompts):
            tokens[row] += batch.tokens[row].tolist()
            prefix = len(prompt) - 2  # rows of the draft's cache that are valid
            assert batch.bias.shape == (
                len(prompts),
                1,
                batch.tokens.shape[1],
                config.slots + max(0, batch.bias.shape[-1] - config.slots),
            )
            names.append([])
            values.append([])
            for node in range(batch.tokens.shape[1]):
                seen = (batch.bias[row, 0, node] == 0).nonzero().flatten().tolist()
                above = [slot for slot in seen if slot < config.slots]
                assert [slot - config.slots for slot in seen if slot >= config.slots] == list(range(max(prefix, 0)))
                assert max(above) <= passes + node and len(tokens[row]) > max(above)  # itself at the latest
                path = tuple(tokens[row][slot] for slot in sorted(above))
                if len(prompt) == 1:
                    path = path if above[0] else ()  # only the catch-up slot sees itself at 0
                elif above[0] == 0:
                    assert path[0] == prompt[-2]
                    path = path[1:]
                depth, position = int(batch.depths[row, node]), batch.positions[row, node].item()
                assert position == max(len(prompt) - 1 + depth, 0)
                if path and depth >= 0 and path[0] == prompt[-1]:
                    assert len(path) == depth + 1
                pairs = draft.proposals(path)
                names[-1].append([token for token, _ in pairs])
                values[-1].append([value for _, value in pairs])
        passes += batch.tokens.shape[1]
        growth.record(torch.tensor(names), torch.tensor(values))
    assert passes == config.slots
    return growth.harvest()


def paths_of(tree) -> list[tuple[int, ...]]:
    """Token paths of the nodes below the root; checks that parents come first and everything agrees."""
    root, *others = tree.nodes
    assert root.parent == 0 and root.depth == 0 and root.mask == 1
    paths = [()]
    for index, node in enumerate(others, 1):
        above = tree.nodes[node.parent]
        assert node.parent < index and node.depth == above.depth + 1
        assert node.mask == above.mask | 1 << index
        assert tree.children[node.parent, node.token] == index
        paths.append((*paths[node.parent], node.token))
    assert len(set(paths)) == len(paths)  # siblings are distinct
    return paths[1:]


class RandomNoise:
    def of(self, row, depths, tokens):
        return [
            random.Random(f"{row} {depth} {token}").gauss(0, 1) for depth, token in zip(depths, tokens, strict=True)
        ]


@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    nodes=st.integers(2, 8),
    depth=st.integers(1, 5),
    width=st.integers(1, 3),
    children=st.integers(1, 4),
    prefetch=st.integers(0, 3),
    prefetch_width=st.integers(1, 3),
    katz=st.booleans(),
    noisy=st.booleans(),
)
@settings(max_examples=120)
def test_the_tree_is_the_best_one(seed, lengths, nodes, depth, width, children, prefetch, prefetch_width, katz, noisy):
    """With a pass a node, whatever draft² guesses: exactly the nodes that brute force finds."""
    size = 5
    draft = RandomDraft(seed, size, children)
    generator = random.Random(seed)
    prompts = [[generator.randrange(size) for _ in range(length)] for length in lengths]
    config = TreeConfig(nodes, depth, nodes, width, children, prefetch, prefetch_width)
    trees = grow(prompts, config, draft, RandomNgram(seed, size) if katz else None, RandomNoise() if noisy else None)
    for prompt, tree in zip(prompts, trees.trees, strict=True):
        found = paths_of(tree)
        assert tree.nodes[0].token == prompt[-1]
        assert set(found) == best_paths(draft, (prompt[-1],), depth, nodes - 1)


@given(seed=st.integers(0, 10**6), passes=st.integers(1, 4), prefetch=st.integers(0, 2), width=st.integers(1, 2))
@settings(max_examples=60)
def test_few_passes_still_give_a_tree(seed, passes, prefetch, width):
    config = TreeConfig(1 + 2 * (1 + (passes - 1) * width), 4, passes, width, 2, prefetch, 2)
    draft = RandomDraft(seed, 4, 2)
    trees = grow([[1, 2, 1, 2, 1], [3]], config, draft, RandomNgram(seed, 4))
    for root, tree in zip((1, 3), trees.trees, strict=True):
        every = best_paths(draft, (root,), 4, 10**6)
        found = paths_of(tree)
        assert len(found) <= config.nodes - 1 and set(found) <= every


def test_guesses_save_passes():
    """A table that always names the draft's own favourite lets one pass see a whole path."""

    class Certain:
        def proposals(self, path):
            return [((path[-1] + 1) % 7 if path else 0, -0.01), (6, -5.0)]

    oracle = SimpleNamespace(successors_of=lambda first, last: [((last + 1) % 7, -0.1)])
    config = TreeConfig(nodes=5, depth=4, passes=1, width=1, children=4, prefetch=3, prefetch_width=1)
    (tree,) = grow([[5, 0]], config, Certain(), oracle).trees
    assert paths_of(tree) == [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    assert [["target", "draft", "ngram"][node.origin] for node in tree.nodes] == [
        "target",
        "ngram",
        "ngram",
        "ngram",
        "draft",
    ]
    wrong = SimpleNamespace(successors_of=lambda first, last: [((last + 2) % 6, -0.1)])
    (tree,) = grow([[5, 0]], config, Certain(), wrong).trees
    assert sorted(paths_of(tree)) == [(1,), (6,)]  # guesses that the draft does not confirm never enter
    # 5, 0 was followed by 1, 2 before: the text itself guesses right, unless the tree leaves it out.
    wrong = SimpleNamespace(successors_of=lambda first, last: [((last + 2) % 6, -1.0)])
    text = [5, 0, 1, 2, 3, 5, 0]
    (tree,) = grow([text], config, Certain(), wrong).trees
    assert (1, 2, 3) in paths_of(tree)
    (tree,) = grow([text], replace(config, context=False), Certain(), wrong).trees
    assert sorted(paths_of(tree)) == [(1,), (6,)]


# ---------------------------------------------------------------- n-grams


@given(st.lists(st.integers(0, 2), min_size=1, max_size=25), st.lists(st.integers(0, 2), max_size=25))
@settings(max_examples=100)
def test_context_ngram_is_the_latest_occurrence(prompt, more):
    row = Row(list(prompt), 100)
    for token in more:
        row.append(token, TARGET)
    tokens = prompt + more
    assert row.tokens == tokens and row.origins == [TARGET] * len(more)
    for a in range(3):
        for b in range(3):
            expected = None
            for end in range(len(tokens) - 1, 1, -1):
                if (tokens[end - 2], tokens[end - 1]) == (a, b):
                    expected = tokens[end]
                    break
            assert row.follower.get((a, b)) == expected


def test_a_token_is_guessed_once():
    table = SimpleNamespace(successors_of=lambda first, last: [(7, -1.0), (5, -2.0)])
    assert ngram_guesses({(1, 2): 5}, table, 1, 2) == [(5, CONTEXT_LOGPROB), (7, -1.0)]
    assert ngram_guesses({(1, 2): 5}, None, 1, 2) == [(5, CONTEXT_LOGPROB)]
    assert ngram_guesses({}, table, 1, 2) == [(7, -1.0), (5, -2.0)]


def test_successors_on_the_host_are_those_of_lookup():
    generator = torch.Generator().manual_seed(0)
    table = fit_table([torch.randint(11, (400,), generator=generator)], 11, successors=4, max_contexts=50)
    for first in range(-1, 11):
        for last in range(11):
            tokens, logprobs = table.lookup(torch.tensor([first, last]))
            assert table.successors_of(first, last) == list(zip(tokens.tolist(), logprobs.tolist(), strict=True))


# ---------------------------------------------------------------- verification


def naive_walk(children, picks, node=0):
    """Token and node of each accepted step, by recursion; the last pick is the bonus token."""
    following = children.get(node, {}).get(picks[node])
    return [(picks[node], following)] + (naive_walk(children, picks, following) if following is not None else [])


@st.composite
def verifications(draw):
    nodes = draw(st.integers(1, 12))
    parents = [0] + [draw(st.integers(0, node - 1)) for node in range(1, nodes)]
    tree, children = Tree.root(0), {}
    for node in range(1, nodes):
        siblings = children.setdefault(parents[node], {})
        token = draw(st.sampled_from([t for t in range(13) if t not in siblings]))
        siblings[token] = tree.add(token, parents[node], draw(st.integers(-1, 9)), draw(st.integers(1, 2)))
    picks = []
    for node in range(nodes):
        favoured = list(children.get(node, {}))
        picks.append(draw(st.sampled_from(favoured) if favoured and draw(st.integers(0, 3)) else st.integers(0, 12)))
    return tree, children, picks


@given(st.lists(verifications(), min_size=1, max_size=3), st.integers(1, 6), st.lists(st.integers(0, 12), max_size=1))
@settings(max_examples=150)
def test_walk_against_recursion(rows, limit, eos):
    prompts = [[7] * (index + 1) for index in range(len(rows))]
    sequences = Sequences(prompts, limit, eos, CPU)
    stopped = sequences.rows[-1] if len(rows) == 3 else None
    if stopped:
        stopped.running = False
    most = max(len(picks) for _, _, picks in rows)
    chosen = torch.tensor([picks + [0] * (most - len(picks)) for _, _, picks in rows])
    moves = Trees(sequences, [tree for tree, _, _ in rows], most).verify_commit(chosen)
    for index, ((tree, children, picks), row, prompt) in enumerate(zip(rows, sequences.rows, prompts, strict=True)):
        if row is stopped:
            assert row.tokens == prompt and moves.rows[index].path == [] and moves.accepted[index] == -1
            continue
        walk = naive_walk(children, picks)
        ended = next((at + 1 for at, (token, _) in enumerate(walk) if token in eos), None)
        taken = walk[: min(ended or len(walk), limit)]
        assert row.tokens == prompt + [token for token, _ in taken]
        assert row.origins == [TARGET if node is None else tree.nodes[node].origin for _, node in taken]
        assert row.running == (ended is None and len(walk) < limit)
        assert moves.accepted[index] == sum(node is not None for _, node in taken)
        if row.running:
            path = [0] + [node for _, node in walk[:-1]]
            assert [node for node, _ in moves.rows[index].path] == path
            assert moves.target_rows(0)[index] == [(node, len(prompt) - 1 + at) for at, node in enumerate(path)]
            catch_up = [(0, len(prompt) - 2)] if len(prompt) > 1 else []
            slots = [(tree.nodes[node].slot, len(prompt) - 1 + at) for at, node in enumerate(path)]
            slots = [(slot, position) for slot, position in slots if slot >= 0]
            assert moves.draft_rows()[index] == catch_up + slots
        else:
            assert moves.rows[index].path == [] and moves.target_rows(0)[index] == moves.draft_rows()[index] == []


def test_rows_that_have_stopped_count_for_nothing():
    """Neither does their draft need to catch up, nor is a step counted in which no row runs."""
    sequences = Sequences([[1, 2], [3, 4]], 9, [], CPU)
    sequences.rows[1].caught_up = True
    config = TreeConfig(nodes=2, depth=1, passes=1, width=1, children=1, prefetch=0)
    starts = []
    for stopped in ((), (0,), (0, 1)):
        for index in stopped:
            sequences.stop(index, 2)
        starts.append(Growth(sequences, config, None, None, torch.float32).start)
    assert starts == [0, 1, 0]
    Trees.roots(sequences).verify_commit(torch.tensor([[5], [5]]))
    assert sequences.steps == 0 and sequences.lengths == [2, 2]


def test_target_pass_of_rows_with_fewer_nodes():
    sequences = Sequences([[1, 2, 3], [4]], 9, [], CPU)
    big, small = Tree.root(3), Tree.root(4)
    a = big.add(5, 0, -1, 1)
    big.add(6, a, -1, 1)
    batch = Trees(sequences, [big, small], 4).batch(torch.float32)
    assert batch.tokens.tolist() == [[3, 5, 6, 0], [4, 0, 0, 0]]
    assert batch.positions.tolist() == [[2, 3, 4, 2], [0, 0, 0, 0]]
    visible = (batch.bias[:, 0] == 0).int().tolist()
    assert visible[0][:3] == [[1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1]]
    assert visible[1][0] == [1, 0, 0, 0, 0, 0]
    assert set(batch.bias.flatten().tolist()) == {0.0, NEVER}
    assert all(any(node) for row in visible for node in row)  # a fully masked node would be NaN


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("mode", ["chain", "tree", "staged"])
def test_settings_of_a_mode(mode):
    config = TreeConfig(nodes=9, depth=4, passes=3, width=2, children=4, prefetch=2, prefetch_width=3).for_mode(mode)
    expected = {
        "chain": TreeConfig(nodes=5, depth=4, passes=4, width=1, children=1, prefetch=0, prefetch_width=2),
        "tree": TreeConfig(nodes=9, depth=4, passes=3, width=2, children=4, prefetch=0, prefetch_width=3),
        "staged": TreeConfig(nodes=9, depth=4, passes=3, width=2, children=4, prefetch=2, prefetch_width=3),
    }[mode]
    assert config == expected
    assert config.slots == {"chain": 2 + 3, "tree": 2 + 2 * 2, "staged": 2 + 2 * 2 + 3 * 6}[mode]
