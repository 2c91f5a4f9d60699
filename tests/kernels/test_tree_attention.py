"""The reference walks each node's path in fp64, one node and head at a time."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from early_starts import EarlyStarts
from helpers import DTYPES, GPU
from hypothesis import given, settings
from hypothesis import strategies as st

from stagedspec.kernels import linear
from stagedspec.kernels.common import registry
from stagedspec.kernels.common.registry import Scratch
from stagedspec.kernels.common.timing import graph_of
from stagedspec.kernels.tree_attention import hopper, op, scratch_size, tree_attention

POISON = 1e4
# On a GPU also heads and a window as decoders have them, many splits of keys, and more programs than it has
# multiprocessors: the interpreter is too slow for that. 16-bit heads of 64 have a kernel of their own on Hopper.
SIZES, WINDOW, LONG, HEADS = ((32, 64), 32, 700, 20) if GPU else ((32,), 16, 150, 1)


@pytest.fixture(scope="module", autouse=True, params=SIZES, ids="size {}".format)
def size(request):
    """Of the heads, where a test does not say."""
    make.size = request.param


@dataclass
class Case:
    """Tokens of B sequences as K, V and Q at every cache row, and the masks of the nodes that a pass evaluates."""

    qkv: torch.Tensor  # [B, N, (H + 2*H_kv)*D]
    cache: torch.Tensor  # [B, S, 2, H_kv, D]
    masks: torch.Tensor  # [B, N, W]
    prefix: torch.Tensor  # [B]
    heads: int
    tree_rows: int
    first_bit: int = 0
    chunk: bool = False
    window: int = WINDOW

    @property
    def sizes(self):
        return *self.masks.shape[:2], self.heads, self.cache.shape[3], self.cache.shape[4]

    def run(self, cache=None):
        """Returns out [B, N, H, D] and the cache after."""
        cache = self.cache.clone() if cache is None else cache
        batch, nodes, heads, kv_heads, size = self.sizes
        device = self.qkv.device
        out = torch.full((batch * nodes, heads * size), torch.nan, dtype=self.qkv.dtype, device=device)
        need = scratch_size(batch, nodes, heads, kv_heads, size, cache.shape[1], self.tree_rows)
        scratch = Scratch.of([need], device)
        scratch.partials.fill_(torch.nan)
        tree_attention(
            self.qkv.flatten(0, 1),
            cache,
            self.masks,
            self.prefix,
            self.first_bit,
            self.chunk,
            self.tree_rows,
            size**-0.5,
            out,
            scratch,
            self.window,
        )
        return out.view(batch, nodes, heads, size), cache

    def split(self):
        """q [B, N, H, D], k and v [B, N, H_kv, D]."""
        batch, nodes, heads, kv_heads, size = self.sizes
        q, k, v = self.qkv.split((heads * size, kv_heads * size, kv_heads * size), -1)
        return q.view(batch, nodes, heads, size), *(x.reshape(batch, nodes, kv_heads, size) for x in (k, v))

    def plain(self):
        """torch's own attention in the same dtype, over all rows that anybody sees, with a mask."""
        q, k, v = self.split()
        batch, nodes, heads, kv_heads, size = self.sizes
        bits = 32 * self.masks.shape[2]
        rows = torch.cat((self.cache.new_zeros(batch, bits, 2, kv_heads, size), self.cache[:, self.tree_rows :]), 1)
        rows[:, : self.tree_rows] = self.cache[:, : self.tree_rows]
        rows[:, self.first_bit : self.first_bit + nodes] = torch.stack((k, v), 2)
        shifts = torch.arange(32, device=self.masks.device)
        tree = (self.masks[..., None] >> shifts & 1).flatten(2).bool()
        prefix = torch.arange(rows.shape[1] - bits, device=self.masks.device) < self.prefix[:, None, None]
        seen = torch.cat((tree, prefix.expand(-1, nodes, -1)), 2)
        seen &= (self.masks != 0).any(2, keepdim=True)  # an empty mask: the node takes no part
        rows = rows.masked_fill(~seen.any(1)[..., None, None, None], 0.0)
        q, k, v = (x.transpose(1, 2) for x in (q, rows[:, :, 0], rows[:, :, 1]))
        group = heads // kv_heads
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=size**-0.5)
        return out.transpose(1, 2).masked_fill(~seen.any(2)[..., None, None], 0.0)

    def reference(self):
        """Each node's path attended to densely in fp64, on the CPU: it takes thousands of small operations."""
        q, k, v = (x.cpu() for x in self.split())
        cache = self.cache.cpu()
        nodes, group = q.shape[1], self.heads // cache.shape[3]
        out = torch.zeros_like(q, dtype=torch.float64)
        for i_b, rows in enumerate(self.masks.tolist()):
            prefix = max(self.prefix[i_b].item(), 0)
            for i_node, words in enumerate(rows):
                bits = [32 * i + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1]
                if not bits:
                    continue
                path = [cache[i_b, self.tree_rows + t] for t in range(prefix)]
                for bit in bits:
                    own = 0 <= (node := bit - self.first_bit) < nodes
                    path.append(torch.stack((k[i_b, node], v[i_b, node])) if own else cache[i_b, bit])
                keys, values = torch.stack(path, 1).repeat_interleave(group, 2).double()  # [path, H, D]
                scores = (q[i_b, i_node].double() * keys).sum(-1) * q.shape[-1] ** -0.5
                out[i_b, i_node] = (scores.softmax(0)[..., None] * values).sum(0)
        return out.to(self.qkv.device)


def words_of(masks, words):
    """Masks as Python integers to int32 words [B, N, W]."""
    flat = [[[mask >> 32 * i & 0xFFFFFFFF for i in range(words)] for mask in row] for row in masks]
    return torch.tensor(flat, dtype=torch.int64).to(torch.int32)


def masks_of(parents):
    """Masks of a tree whose parents come first; the root's parent is -1."""
    masks = []
    for node, parent in enumerate(parents):
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << node)
    return masks


def make(
    device, dtype, masks, prefix, positions=300, tree_rows=None, heads=2, kv_heads=2, size=None, first_bit=0, seed=0
):
    """Masks [B][N] as integers. Rows of the cache that nobody may read are poisoned, half with NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch, nodes = len(masks), len(masks[0])
    size = size or make.size
    tree_rows = first_bit + nodes if tree_rows is None else tree_rows
    cache = torch.randn(batch, tree_rows + positions, 2, kv_heads, size, generator=generator)
    for i_b, count in enumerate(prefix):
        cache[i_b, tree_rows + max(count, 0) :] = torch.nan if i_b % 2 else POISON
        cache[i_b, first_bit:tree_rows] = POISON if i_b % 2 else torch.nan
    return Case(
        torch.randn(batch, nodes, (heads + 2 * kv_heads) * size, generator=generator).to(device, dtype),
        cache.to(device, dtype),
        words_of(masks, (tree_rows + 31) // 32).to(device),
        torch.tensor(prefix, dtype=torch.int32, device=device),
        heads,
        tree_rows,
        first_bit,
    )


def check(case, error_ratio):
    """The result by the error rule, the appended rows exactly, and no other row touched."""
    out, cache = case.run()
    assert error_ratio(out, case.plain(), case.reference()) <= 2
    expected = case.cache.clone()
    nodes = case.masks.shape[1]
    expected[:, case.first_bit : case.first_bit + nodes] = torch.stack(case.split()[1:], 2)
    assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))


CHAIN = list(range(-1, 11))
STAR = [-1] + [0] * 20
MIXED = [-1, 0, 0, 1, 1, 2, 5, 6, 6, 3, 9, 10, 0, 12, 13, 7, 4]
BINARY, TERNARY = (
    [-1] + [(node - 1) // children for node in range(1, count)] for children, count in ((2, 31), (3, 40))
)
TREES = {"one": [-1], "chain": CHAIN, "star": STAR, "mixed": MIXED, "binary": BINARY, "ternary": TERNARY}


@pytest.mark.parametrize("parents", TREES.values(), ids=TREES)
@pytest.mark.parametrize("prefix", [0, LONG])
def test_trees(device, dtype, error_ratio, parents, prefix):
    check(make(device, dtype, [masks_of(parents)], [prefix], positions=LONG), error_ratio)


@pytest.mark.parametrize("size", [40, 64, 80, 128, 33])
def test_head_sizes(device, dtype, error_ratio, size):
    check(make(device, dtype, [masks_of(MIXED)], [150], 150, heads=1, kv_heads=1, size=size), error_ratio)


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (3, 1)])
def test_grouped_heads_and_ragged_prefixes(device, dtype, error_ratio, heads, kv_heads):
    tree = masks_of(MIXED)
    case = make(device, dtype, [tree] * 3, [0, 140, 17], 150, heads=heads, kv_heads=kv_heads)
    check(case, error_ratio)


def test_draft_passes(device, dtype, error_ratio):
    """Row 0 is the catch-up token; the second pass reads the rows of the first from the cache."""
    masks = [0b1, 0b11, 0b111, 0b1011, 0b10111, 0b101011]
    case = make(device, dtype, [masks[4:], masks[4:]], [30, 0], first_bit=4, tree_rows=40)
    check(case, error_ratio)
    check(replace(case, window=32), error_ratio)


def test_no_committed_row_and_no_catch_up(device, dtype, error_ratio):
    """With one token the draft's prefix is -1 and the root sees itself alone."""
    case = make(device, dtype, [[0b01, 0b10, 0b110]], [-1])
    out, _ = case.run()
    assert torch.equal(out[0, 1], case.split()[2][0, 1])
    assert error_ratio(out, case.plain(), case.reference()) <= 2


def test_nodes_that_see_nothing_get_zeros(device, dtype, error_ratio):
    case = make(device, dtype, [[1, 0, 0b101, 0], [0, 0, 0, 0]], [140, 3])
    check(case, error_ratio)
    out, _ = case.run()
    assert not out[0, [1, 3]].any() and not out[1].any()


def test_as_many_nodes_as_a_pass_may_have(device, error_ratio):
    dtype = torch.float16
    parents = [-1] + [max(node - 20, 0) for node in range(1, op.MAX_NODES)]
    check(make(device, dtype, [masks_of(parents)], [133], heads=HEADS, kv_heads=HEADS), error_ratio)


def test_a_layer_of_a_cache(device, dtype):
    """The cache may be a slice of all layers."""
    case = make(device, dtype, [masks_of(MIXED)], [40])
    layers = torch.full((3, *case.cache.shape), torch.nan, device=device, dtype=dtype)
    layers[1] = case.cache
    out, _ = case.run(layers[1])
    assert torch.equal(out, case.run()[0])
    assert layers[[0, 2]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=8)
@given(st.data())
def test_random_trees(device, dtype, error_ratio, data):
    draw = data.draw
    nodes, batch, first_bit = draw(st.integers(1, 40)), draw(st.integers(1, 2)), draw(st.integers(0, 3))
    trees = []
    for _ in range(batch):
        parents, depths = [-1], [0]
        for node in range(1, first_bit + nodes):
            parent = draw(st.integers(0, node - 1).filter(lambda p: depths[p] < WINDOW - 2))  # noqa: B023
            parents.append(parent)
            depths.append(depths[parent] + 1)
        trees.append(masks_of(parents)[first_bit:])
    prefix = draw(st.lists(st.integers(0, 160), min_size=batch, max_size=batch))
    heads, kv_heads = draw(st.sampled_from([(2, 2), (3, 1), (4, 2)]))
    case = make(device, dtype, trees, prefix, 160, heads=heads, kv_heads=kv_heads, first_bit=first_bit)
    check(case, error_ratio)


# ---------------------------------------------------------------- the same bits


def committed(case, path):
    """The first of the tree's nodes `path` committed: the case of what is left when they are in the prefix."""
    cache = case.cache.clone()
    _, k, v = case.split()
    start = case.prefix[0].item()
    for depth, node in enumerate(path):
        cache[:, case.tree_rows + start + depth] = torch.stack((k[:, node], v[:, node]), 1)
    return replace(case, cache=cache, prefix=case.prefix + len(path))


@pytest.mark.parametrize("prefix", [0, 5, LONG - 10])
def test_committed_or_in_the_tree(device, dtype, fixed_order, prefix):
    """Node 5 of a chain, with 0 to 5 of its ancestors committed, evaluated alone."""
    parents = CHAIN[:6]
    whole = make(device, dtype, [masks_of(parents)], [prefix], LONG)
    expected = whole.run()[0][:, 5]
    for count in range(1, 6):
        after = committed(whole, range(count))
        masks = masks_of(range(-1, 5 - count))
        after = replace(after, qkv=after.qkv[:, count:].contiguous(), masks=words_of([masks], 1).to(device))
        assert torch.equal(after.run()[0][:, -1], expected), count


@pytest.fixture(scope="module")
def wholes():
    return {}


@pytest.fixture
def whole(wholes, device, dtype, fixed_order):
    """A case of two trees of 64 nodes, its result and the cache after."""
    key = dtype, make.size
    if key not in wholes:
        parents = [-1] + [node - 1 if node % 8 else node // 2 for node in range(1, 64)]
        case = make(device, dtype, [masks_of(parents)] * 2, [10, LONG], LONG + 10, heads=HEADS, kv_heads=HEADS)
        wholes[key] = case, *case.run()
    return wholes[key]


@pytest.mark.parametrize("count", [1, 2, 7, 16, 33, 64])
def test_alone_or_beside_others(device, dtype, fixed_order, whole, count):
    """Nodes of a tree of 64 come out the same from a pass of the last `count` nodes, of one sequence or both."""
    whole, expected, cache = whole
    first = 64 - count
    for rows in (slice(0, 1), slice(0, 2)):
        part = replace(
            whole,
            qkv=whole.qkv[rows, first:].contiguous(),
            masks=whole.masks[rows, first:].contiguous(),
            cache=cache[rows].contiguous(),
            prefix=whole.prefix[rows].contiguous(),
            first_bit=first,
        )
        assert torch.equal(part.run()[0], expected[rows, first:])


@pytest.mark.parametrize("nodes, group", [(1, 1), (4, 2), (64, 1)] if GPU else [(1, 1), (9, 2)])
def test_alone_or_in_a_batch(device, dtype, fixed_order, nodes, group):
    """Sequences of a batch, each with the bits that it has alone: prefixes at the edges of the window and of blocks of
    far keys. On Hopper the launches differ by whether a program loads ahead, with 8 queries and with 16."""
    edges = (WINDOW - 1, WINDOW, 256, 256 + WINDOW, 257 + WINDOW) if GPU else (WINDOW,)
    prefix = [-1, 0, *edges, LONG]
    parents = [-1] + [node - 1 if node % 8 else node // 2 for node in range(1, nodes)]
    masks = [masks_of(parents)] * len(prefix)
    case = make(device, dtype, masks, prefix, LONG, heads=HEADS * group, kv_heads=HEADS)
    together, after = case.run()
    for row in range(len(prefix)):
        parts = {name: getattr(case, name)[row : row + 1].contiguous() for name in ("qkv", "cache", "masks", "prefix")}
        alone, cache = replace(case, **parts).run()
        assert torch.equal(alone[0], together[row]), prefix[row]
        assert torch.equal(cache[0].nan_to_num(7.0), after[row].nan_to_num(7.0)), prefix[row]


def test_prompts_in_any_chunks(device, dtype, fixed_order):
    """A prompt in chunks of any sizes, down to single tokens: the same bits and the same keys and values, which are
    those of plain attention as far as the dtype goes. What lies beyond the prompt is NaN."""
    length, tree_rows, batch, heads, kv_heads, size = 150, 4, 2, 4, 2, 40
    case = make(device, dtype, [[0] * length] * batch, [0] * batch, length, tree_rows, heads, kv_heads, size)
    case.cache[:] = torch.nan

    def read(sizes):
        outs, cache, start = [], case.cache.clone(), 0
        for nodes in sizes:
            chunk = replace(
                case,
                qkv=case.qkv[:, start : start + nodes].contiguous(),
                masks=torch.zeros(batch, nodes, -(-nodes // 32), dtype=torch.int32, device=device),  # not read
                prefix=torch.full_like(case.prefix, start),
                chunk=True,
            )
            out, cache = chunk.run(cache)
            outs.append(out)
            start += nodes
        assert start == length
        return torch.cat(outs, 1), cache

    whole, cache = read([length])
    for sizes in ([70, 70, 10], [1] * 20 + [64, 66], [33, 16, 101], [128, 22]):
        out, rows = read(sizes)
        assert torch.equal(out, whole), sizes
        assert torch.equal(rows[:, tree_rows:], cache[:, tree_rows:]), sizes
    q, k, v = case.qkv.view(batch, length, -1, size).split((heads, kv_heads, kv_heads), 2)
    assert torch.equal(cache[:, tree_rows:, 0], k) and torch.equal(cache[:, tree_rows:, 1], v)

    def plain(kind):
        parts = [part.to(kind).transpose(1, 2) for part in (q, k, v)]
        parts[1:] = [part.repeat_interleave(heads // kv_heads, 1) for part in parts[1:]]
        scores = (parts[0] @ parts[1].mT) * size**-0.5
        scores = scores.masked_fill(torch.ones(length, length, device=device).triu(1).bool(), float("-inf"))
        return (scores.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2).double()

    exact, same = plain(torch.float64), plain(dtype)
    ours = whole.view(exact.shape).double()
    assert (ours - exact).abs().max() <= 2 * (same - exact).abs().max() + 1e-6


# meanwhile: on Hopper, the next kernel may start when this one does.
@pytest.mark.parametrize("meanwhile", [False, True] if GPU else [False])
@pytest.mark.parametrize("settled", [True, False])
def test_kernels_that_start_early_wait_for_what_they_read(device, fixed_order, monkeypatch, settled, meanwhile):
    """Layers of linear and attention that share their buffers: the same bits as one after the other. On a GPU over and
    over, in a graph, where every kernel starts before the one ahead has ended; else as early as it could. Not settled:
    some far rows of the prefix are those of a prompt that is read just before."""
    layers, size, heads, times = 4, make.size, 2, 100 if device.type == "cuda" else 1
    dtype = torch.float16
    width = heads * size
    case = make(device, dtype, [masks_of(MIXED)], [150], 150, heads=heads, kv_heads=heads, size=size)
    nodes = case.masks.shape[1]
    if meanwhile:
        monkeypatch.setattr(hopper, "MULTIPROCESSORS", heads * -(-nodes // 8))
        assert hopper.settings(nodes, heads)["STARTS"] == 0
    generator = torch.Generator().manual_seed(1)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    weights = [(randn(3 * width, width, scale=width**-0.5), randn(3 * width)) for _ in range(layers)]
    gain, shift = randn(width), randn(width)
    folded = [linear.Folded.of(gain, shift, *pair) for pair in weights]
    start = [case.cache.nan_to_num().clone() for _ in range(layers)]
    x, inputs, caches = randn(nodes, width), randn(times, nodes, width), [cache.clone() for cache in start]
    qkv, out = torch.empty_like(case.qkv[0]), torch.empty_like(x)
    stats = torch.empty(nodes, linear.stat_tiles(width), 2, device=device)
    need = scratch_size(1, nodes, heads, heads, size, case.cache.shape[1], case.tree_rows)
    scratch = Scratch.of([need, linear.scratch_size(nodes, 3 * width, width)], device)

    def step():
        hidden = x
        for layer, cache in zip(folded, caches, strict=True):
            linear.row_stats(hidden, stats)
            linear.norm_linear(hidden, stats, 1e-5, layer, "none", qkv, scratch)
            rest = case.tree_rows, size**-0.5, out, scratch, WINDOW, settled
            if not settled:
                tree_attention(qkv, cache, case.masks, case.prefix - 64, 0, True, *rest)
            tree_attention(qkv, cache, case.masks, case.prefix, 0, False, *rest)
            hidden = out

    def results(run):
        found = []
        for values in inputs:
            x.copy_(values)
            for cache, fresh in zip(caches, start, strict=True):
                cache.copy_(fresh)
            run()
            found.append((out.clone(), [cache.clone() for cache in caches]))
        return found

    if device.type == "cuda":
        early = results(graph_of(step).replay)
    else:
        starts = EarlyStarts((qkv, out, stats, scratch.partials, scratch.counters, *caches))
        early = results(lambda: starts.run(step))
        prompt = [] if settled else ["_attend_prompt"]
        assert starts.names == ["_row_stats", "_linear", *prompt, "_attend_far", "_attend_near"] * layers
    monkeypatch.setattr(registry, "pdl", lambda arch: False)
    for (got, appended), (expected, cached) in zip(early, results(step), strict=True):
        assert torch.equal(got, expected) and all(map(torch.equal, appended, cached))


# ---------------------------------------------------------------- interface


@pytest.mark.parametrize(
    "size, itemsize, window, arch, expected",
    [(64, 2, 32, 90, True), (64, 2, 32, 80, False), (64, 2, 32, 100, False), (64, 2, 16, 90, False),
     (64, 4, 32, 90, False), (32, 2, 32, 90, False), (128, 2, 32, 90, False)],
)  # fmt: skip
def test_where_the_kernel_for_hopper_runs(monkeypatch, size, itemsize, window, arch, expected):
    """Wherever it can: nobody would see by the results that it does not."""
    monkeypatch.setattr(op, "architecture", lambda device: arch)
    assert op.in_one_launch(size, itemsize, window, torch.device("cpu")) is expected


@pytest.mark.parametrize(
    "queries, groups, rows, ahead, starts, alone",
    [(1, 20, 8, True, 2, True), (7, 20, 8, True, 2, True), (9, 20, 8, True, 1, False), (16, 20, 8, True, 1, False),
     (32, 20, 8, True, 0, False), (1, 80, 8, True, 0, False), (64, 20, 16, True, 0, False),
     (256, 20, 16, False, 2, False), (1, 160, 8, False, 2, False), (9, 160, 16, False, 2, False)],
)  # fmt: skip
def test_settings_of_the_kernel_for_hopper(queries, groups, rows, ahead, starts, alone):
    """Small tiles where every program has a multiprocessor; two programs on each where there are more. The next kernel
    starts at once where one program on each takes more than half of them, and late where there are few queries."""
    chosen = {"ROWS": rows, "AHEAD": ahead, "STARTS": starts, "ALONE": alone, "maxnreg": None if ahead else 128}
    assert hopper.settings(queries, groups) == chosen


def arguments(device):
    case = make(device, torch.float32, [masks_of(MIXED)], [40], 60, size=32)
    batch, nodes, heads, kv_heads, size = case.sizes
    need = scratch_size(batch, nodes, heads, kv_heads, size, case.cache.shape[1], case.tree_rows)
    return {
        "qkv": case.qkv.flatten(0, 1),
        "cache": case.cache.nan_to_num(),
        "masks": case.masks,
        "prefix": case.prefix,
        "first_bit": 0,
        "chunk": False,
        "tree_rows": case.tree_rows,
        "scale": 0.1,
        "out": torch.empty(nodes, heads * size, device=device),
        "scratch": Scratch.of([need], device),
    }


def test_views_that_wide_loads_cannot_read_are_refused(device):
    given = arguments(device)
    odd = torch.zeros(given["qkv"].numel() + 1, device=device)[1:].view_as(given["qkv"])
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        tree_attention(**given | {"qkv": odd})


def test_opcheck(device):
    given = arguments(device)
    scratch, scale = given.pop("scratch"), given.pop("scale")
    values = list(given.values())
    torch.library.opcheck(op._op, (*values[:-1], WINDOW, False, scale, values[-1], scratch.partials))


@pytest.mark.parametrize("itemsize", [2, 4])
def test_scratch_has_room_for_every_split(itemsize):
    batch, nodes, heads, kv_heads, tree_rows = 2, 17, 6, 3, 40
    for size in (16, 33, 64, 80, 128, 256):
        for positions in (1, 64, 65, 1000):
            splits = -(-positions // op.tree_tiles(size, itemsize, op.WINDOW)["SPLIT"])
            parts = batch * splits * nodes * heads  # of each the weighted values, a maximum and a sum
            given = scratch_size(batch, nodes, heads, kv_heads, size, tree_rows + positions, tree_rows)
            assert given[0] >= parts * (size + 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.zeros(17, 191)}, r"qkv must have the shape \[17, 192\]"),
        ({"qkv": torch.zeros(17, 192, dtype=torch.float64)}, "qkv must be"),
        ({"cache": torch.zeros(1, 317, 2, 2, 32, dtype=torch.float16)}, "cache must be torch.float32"),
        ({"cache": torch.zeros(1, 317, 2, 32, 2).mT}, "cache must be contiguous"),
        ({"masks": torch.zeros(2, 17, 1, dtype=torch.int32)}, r"masks must have the shape \[1, any, any\]"),
        ({"masks": torch.zeros(1, 17, 1)}, "masks must be torch.int32"),
        ({"masks": torch.zeros(1, 17, 0, dtype=torch.int32)}, "masks must have 1 words"),
        ({"tree_rows": 40, "first_bit": 20}, "masks must have 2 words a node, got 1"),
        (
            {"masks": torch.zeros(1, 257, 9, dtype=torch.int32), "out": torch.zeros(257, 64)},
            "1 to 256 nodes, got masks",
        ),
        ({"prefix": torch.zeros(1, dtype=torch.int64)}, "prefix must be torch.int32"),
        ({"out": torch.zeros(17, 60)}, "out must have"),
        ({"first_bit": 1}, "inside the 17 tree rows, got 17 nodes from row 1 on"),
        ({"first_bit": -1}, "inside the 17 tree rows, got 17 nodes from row -1 on"),
        ({"chunk": True, "first_bit": 1}, "a chunk of a prompt must have first_bit 0"),
        ({"chunk": True, "tree_rows": 70}, "fit into the cache's 7 rows"),
        ({"tree_rows": 400}, "tree_rows must be"),
        ({"window": 24}, "window must be a power of two"),
        ({"scratch": Scratch(torch.zeros(5), torch.zeros(5, dtype=torch.int32))}, "see scratch_size"),
    ],
)
def test_errors_name_what_was_expected(device, change, message):
    change = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    if "scratch" in change:
        scratch = change["scratch"]
        change["scratch"] = Scratch(scratch.partials.to(device), scratch.counters.to(device))
    with pytest.raises(ValueError, match=message):
        tree_attention(**arguments(device) | change)
