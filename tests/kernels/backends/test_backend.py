"""The Triton backend end to end: the same tokens as the torch backend, in every mode; what a step may not do."""

import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from early_starts import Settled
from helpers import DTYPES, make_gpt2
from replay import VIEWS, Replay
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import stagedspec.decoder
from stagedspec import Decoder, Sampling, TreeConfig
from stagedspec.decoding.request import StagedOptions, validate
from stagedspec.kernels import lm_head
from stagedspec.kernels.backends import select as backend
from stagedspec.kernels.backends.cuda_graph import Captured
from stagedspec.kernels.backends.triton_backend import TritonBackend, warping_settings
from stagedspec.kernels.common import registry
from stagedspec.models.gpt2 import GPT2, Cache, Reader
from stagedspec.planning import cost
from stagedspec.planning.profile import Tuning, fingerprint, pair_of
from stagedspec.tuning.trees import outcomes, tune

TREE = TreeConfig(nodes=6, depth=3, passes=2, width=1, children=3, prefetch=1, prefetch_width=1)
SAMPLINGS = {
    "greedy": {},
    "temperature": {"do_sample": True, "temperature": 0.9, "seed": 5},
    "top-k": {"do_sample": True, "top_k": 8, "seed": 3},
    "all-warpers": {"do_sample": True, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 4},
}


def small(seed: int, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=61, n_positions=48, n_embd=24, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **changes
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def pair():
    """A target, and a draft that is close to it."""
    target, draft = small(1), small(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return target, draft


def decoders(pair, device, dtype="float32"):
    return [
        stagedspec.Decoder.from_pretrained(pair[0], draft=pair[1], device=device, dtype=dtype, backend=name, tree=TREE)
        for name in ("torch", "triton")
    ]


@pytest.fixture
def prompts():
    ids = torch.randint(1, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("mode", "sampling"),
    [
        *((mode, "greedy") for mode in ("autoregressive", "chain", "tree", "staged")),
        *((mode, "top-k") for mode in ("autoregressive", "chain", "tree", "staged")),
        ("tree", "temperature"),
        ("staged", "all-warpers"),
    ],
)
def test_same_tokens_as_torch(pair, prompts, device, mode, sampling):
    torch_side, triton_side = decoders(pair, device)
    options = {"max_new_tokens": 5, "eos_token_id": [], **SAMPLINGS[sampling]}
    ids, mask = (tensor.to(device) for tensor in prompts)
    expected = torch_side.generate(ids, mask, mode="autoregressive", **options)
    with Settled() as settled:
        assert torch.equal(triton_side.generate(ids, mask, mode=mode, **options), expected)
    assert settled.checked > 0
    stats = triton_side.last_stats
    assert stats.new_tokens == 10 and sum(stats.origins.values()) == 10
    if mode != "autoregressive":
        assert stats.tokens_per_step > 1.2 and stats.draft_passes == stats.steps * (TREE.for_mode(mode).passes)


def test_plain_batches_may_be_large(pair, device):
    """33 rows, of which each has the tokens that torch gives it alone; with a tree 17 are too many."""
    torch_side, triton_side = decoders(pair, device)
    ids = torch.randint(1, 61, (33, 1), generator=torch.Generator().manual_seed(2)).to(device)
    options = {"max_new_tokens": 2, "eos_token_id": [], "do_sample": True, "top_k": 20, "mode": "autoregressive"}
    found = triton_side.generate(ids, seed=list(range(33)), **options)
    for row in (0, 16, 32):
        assert torch.equal(found[row : row + 1], torch_side.generate(ids[row : row + 1], seed=[row], **options))
    with pytest.raises(ValueError, match="1 to 64 rows, got 65"):
        triton_side.generate(ids[:1].expand(65, -1), **options)
    with pytest.raises(ValueError, match=r"1 to 16 rows .*, got 17"):
        triton_side.generate(ids[:17], mode="tree")


def test_ends_where_torch_ends(pair, prompts, device):
    """At an end-of-sequence token, each row on its own."""
    torch_side, triton_side = decoders(pair, device)
    ids, mask = (tensor.to(device) for tensor in prompts)
    free = torch_side.generate(ids, mask, max_new_tokens=12, mode="autoregressive", eos_token_id=[])
    options = {"max_new_tokens": 12, "eos_token_id": [free[0, 8].item(), free[1, 6].item()], "pad_token_id": 0}
    expected = torch_side.generate(ids, mask, mode="autoregressive", **options)
    assert expected.shape[1] < free.shape[1]
    assert torch.equal(triton_side.generate(ids, mask, mode="staged", **options), expected)


class Calls(TorchDispatchMode):
    """Names of the operations that go through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", ["greedy", "top-k"])
def test_a_step_allocates_nothing_and_reads_nothing_back(pair, prompts, device, sampling):
    """After the first step only our operations run, and views of what is there already."""
    decoder = decoders(pair, device)[1]
    ids, mask = (tensor.to(device) for tensor in prompts)
    options = stagedspec.Sampling(**{k: v for k, v in SAMPLINGS[sampling].items() if k != "seed"})
    request = validate(
        decoder.context, StagedOptions("staged", 3, TREE), ids, mask, max_new_tokens=20, sampling=options
    )
    engine = decoder._start(request).engine
    with torch.inference_mode():
        engine.prefill(request)
        engine.step(TREE)
        with Calls() as calls:
            if device.type == "cuda":
                torch.cuda.synchronize()
                before = torch.cuda.memory_stats()["allocation.all.allocated"]
                torch.cuda.set_sync_debug_mode("error")
            try:
                engine.step(TREE)
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            if device.type == "cuda":
                assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    foreign = {name for name in calls.names if not name.startswith(("stagedspec.", *VIEWS))}
    assert not foreign
    assert any(name.startswith("stagedspec.tree_attention") for name in calls.names)


def test_stream_and_complete(pair, device):
    """Every step's tokens, once, although the host sees a device's state only in snapshots."""
    torch_side, triton_side = decoders(pair, device)
    prompt = torch.tensor([5, 6, 7])
    expected = torch_side.complete(prompt, 6, eos_token_id=[])
    chunks = list(triton_side.stream(prompt, 6, eos_token_id=[]))
    assert [token for chunk in chunks for token in chunk.tokens] == expected.tokens
    assert all(chunk.tokens and len(chunk.tokens) == len(chunk.origins) for chunk in chunks)
    assert triton_side.complete(prompt, 6, eos_token_id=[]).tokens == expected.tokens
    assert triton_side.last_stats.overhead is None and expected.stats.overhead is not None


class Records:
    """A streamer that notes what it is given."""

    def __init__(self):
        self.calls = []

    def put(self, tokens):
        self.calls.append(tokens.tolist())

    def end(self):
        self.calls.append("end")


def test_the_host_takes_part(pair, prompts, device):
    """Processors along the walk, criteria and streamers after it: call for call as on the torch backend."""
    ids, mask = (tensor.to(device) for tensor in prompts)
    found = []
    for decoder in decoders(pair, device):
        streamer, seen = Records(), []

        def penalise(ids, scores, seen=seen):
            seen.append(ids.tolist())
            return scores.scatter_add(1, ids, torch.full_like(scores, -1.5).gather(1, ids))

        def stop(ids, scores, seen=seen):
            return torch.tensor([len(seen) > 4 and row[-1] % 2 == 0 for row in ids.tolist()], device=ids.device)

        options = {"logits_processor": [penalise], "stopping_criteria": [stop], "streamer": streamer}
        tokens = decoder.generate(ids, mask, 8, do_sample=True, top_k=20, seed=3, eos_token_id=[60], **options)
        stats = decoder.last_stats
        found.append((tokens.tolist(), streamer.calls, seen, stats.steps, stats.draft_passes, stats.origins))
    assert found[0] == found[1]
    assert found[0][3] < len(found[0][1]) - 2  # a step took several tokens


def test_prompt_lookup(pair, device):
    torch_side, triton_side = (
        stagedspec.Decoder.from_pretrained(pair[0], device=device, dtype="float32", backend=name)
        for name in ("torch", "triton")
    )
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8], [0, 0, 0, 1, 2, 3, 1, 2]], device=device)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"eos_token_id": [], "prompt_lookup_num_tokens": 3}
    expected = torch_side.generate(ids, mask, 6, **options)
    with Settled() as settled:
        assert torch.equal(triton_side.generate(ids, mask, 6, **options), expected)
    assert settled.checked > 0
    theirs, ours = torch_side.last_stats, triton_side.last_stats
    assert (ours.steps, ours.origins, ours.accepted_per_depth) == (
        theirs.steps,
        theirs.origins,
        theirs.accepted_per_depth,
    )
    assert ours.mode == "lookup" and ours.draft_passes == 0
    triton_side.generate(ids[:1], max_new_tokens=1, prompt_lookup_num_tokens=100)  # deeper than its trees may be
    assert triton_side.last_stats.tree["depth"] == 30


def test_a_tree_by_the_cost_model(pair, prompts, device, monkeypatch):
    """Of the shapes that the backend can run, and kept apart from the torch backend's measurements."""
    monkeypatch.setattr("stagedspec.planning.cost._least_times", lambda model, runs, before: [1e-3] * len(runs))
    made = [
        stagedspec.Decoder.from_pretrained(*pair, device=device, dtype="float32", backend=name)
        for name in ("torch", "triton")
    ]
    assert fingerprint(made[0]) != fingerprint(made[1])
    for mode in ("chain", "tree", "staged"):
        tree = made[1].tree_for(mode)
        assert tree.nodes > 1 and tree.depth <= 30 and tree.pass_floor == 0.0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_logits_at_hand_are_those_that_are_chosen_by(pair, device, dtype, sampling):
    """Bit by bit, so that asking for scores changes no token."""
    ops = backend.resolve("triton", device)
    model = GPT2(pair[0], ops, device, dtype)
    hidden = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    sequences = ops.make_sequences([[1], [1]], 5, (), device)
    noise = ops.make_noise([7, 7], [0, 1], 61, 1, [40, 40], device)
    batch = ops.prefill_batch(torch.zeros(2, 5, dtype=torch.long, device=device), 3, dtype)
    noise.advance(sequences)
    warping = (
        None
        if sampling == "greedy"
        else Sampling(**{name: value for name, value in SAMPLINGS[sampling].items() if name != "seed"}).warping
    )
    kinds = None if warping is None else noise.at(batch)
    logits = model.logits(hidden)
    head = *model.final_norm, model.epsilon, model.head
    chosen = ops.lm_head_choose(hidden, *head, warping, kinds).clone()
    assert torch.equal(ops.choose(logits, warping, kinds), chosen)
    stored, out = torch.full_like(logits.view(10, 61), torch.nan), torch.empty(10, dtype=torch.int32, device=device)
    lm_head.lm_head_choose(
        hidden.view(10, 24), *model.final_norm, model.epsilon, model.head.weight, *ops._counters((2, 5), kinds, device),
        **warping_settings(warping), logits=stored, out=out,
        scratch=registry.Scratch.of([lm_head.scratch_size(10, 61, 24)], device),
    )  # fmt: skip
    assert torch.equal(stored, logits.view(10, 61)) and torch.equal(out.view(2, 5), chosen)


def test_buffers_are_those_of_the_longest_prompt(pair, device):
    decoder = decoders(pair, device)[1]
    held = set()
    for length in (7, 4, 5, 6):
        ids = torch.randint(1, 61, (1, length), generator=torch.Generator().manual_seed(length)).to(device)
        decoder.generate(ids, max_new_tokens=4)
        held.add(sum(buffer.numel() for buffer in decoder.target.ops.memory.buffers.values()))
    assert len(held) == 1


KINDS = {
    "autoregressive": {"mode": "autoregressive"},
    "staged": {"do_sample": True, "top_k": 8},
    "walk": {"do_sample": True, "repetition_penalty": 1.3},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_generations_of_a_kind_share_memory_and_graphs(pair, device, monkeypatch, kind):
    """Whatever the last one left behind: other prompts, lengths, chunks, seeds and ends."""
    monkeypatch.setattr("stagedspec.kernels.state.device.CHUNKS", (2, 4, 8))
    monkeypatch.setattr("stagedspec.kernels.state.device.CHUNK_COST", 1)
    parts, repeated = [], Replay if device.type == "cpu" else Captured
    monkeypatch.setattr(TritonBackend, "repeated", lambda ops, part: (parts.append(repeated(part, ops)), parts[-1])[1])
    options, draft, tree = {"mode": "staged", **KINDS[kind]}, pair[1], TREE
    if kind == "lookup":
        draft = tree = None
    torch_side, triton_side = (
        Decoder.from_pretrained(pair[0], draft=draft, device=device, dtype="float32", backend=name, tree=tree)
        for name in ("torch", "triton")
    )
    graphs, generator = [], torch.Generator().manual_seed(2)
    for seed, (lengths, new) in enumerate((([4, 1], 4), ([9, 5], 5), ([2, 3], 4))):
        ids = torch.randint(1, 61, (2, max(lengths)), generator=generator).to(device)
        mask = torch.tensor([[0] * (max(lengths) - length) + [1] * length for length in lengths], device=device)
        call = {"max_new_tokens": new, "seed": seed, "pad_token_id": 0, **options}
        free = torch_side.generate(ids, mask, eos_token_id=[], **call)
        ends = [free[0, -2].item(), *([] if seed else free[1, -2:].tolist())]  # row 0 at least ends early
        expected = torch_side.generate(ids, mask, eos_token_id=ends, **call)
        assert torch.equal(triton_side.generate(ids, mask, eos_token_id=ends, **call), expected)
        theirs, ours = torch_side.last_stats, triton_side.last_stats
        assert (ours.steps, ours.new_tokens, ours.seconds.keys()) == (theirs.steps, theirs.new_tokens, {"prefill"})
        assert ours.seconds["prefill"] < ours.total_seconds and ours.new_tokens < 2 * new
        assert len(triton_side.pool.kept) == 1
        graphs.append([part.graph for part in parts])
    readers = 4 if options["mode"] == "staged" and draft is not None else 2  # of each model and size of chunk
    assert len(parts) == readers + (2 if kind == "walk" else 1)
    for before, after in pairwise(graphs):
        assert all(one is None or one is other for one, other in zip(before, after, strict=False))
    assert sum(graph is None for graph in graphs[-1]) <= 2  # chunks that were read once, which Replay does not hold


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # fp32 takes the interpreter twice as long
def test_prompts_in_any_chunks(pair, device, dtype, monkeypatch, fixed_order):
    """The same keys and values bit by bit, a prompt alone, beside a longer one, and in chunks of any sizes."""
    ops = backend.resolve("triton", device)
    model = GPT2(pair[0], ops, device, dtype)
    prompts, found = [list(range(1, 36)), list(range(20, 36))], []
    for sizes, rows in (((16,), [0]), ((16, 32), [0, 1]), ((64,), [0])):
        monkeypatch.setattr("stagedspec.kernels.state.device.CHUNKS", (*sizes, 256))
        sequences = ops.make_sequences([prompts[row] for row in rows], 5, (), device)
        cache = Cache(model, len(rows), 4, sequences.capacity)
        cache.rows.fill_(torch.nan)
        with torch.inference_mode():
            Reader(model, cache, sequences, ops.repeated).read(34)
        found.append({row: cache.rows[:, place, 4 : 4 + len(prompts[row]) - 1] for place, row in enumerate(rows)})
    for other in found[1:]:
        for row, values in other.items():
            assert torch.equal(values, found[row][row]) and not values.isnan().any()


def test_what_is_kept_of_generations(pair, device, monkeypatch):
    """The last few, streams that were closed too, and no more memory than allowed."""
    monkeypatch.setattr("stagedspec.decoding.pool.KEPT", 4)
    decoder = decoders(pair, device)[1]
    ids = torch.tensor([[5, 6, 7]], device=device)

    def kept(**options):
        decoder.generate(ids, mode="autoregressive", **({"max_new_tokens": 1} | options))
        return list(decoder.pool.kept)

    with torch.inference_mode():
        (first,) = kept()
    assert kept() == [first]
    others = [kept(do_sample=True, temperature=value)[-1] for value in (0.5, 0.6, 0.7)]
    assert kept(do_sample=True, temperature=0.5) == [first, *others[1:], others[0]]
    assert kept(do_sample=True, temperature=0.8)[:-1] == [*others[1:], others[0]]
    stream = decoder.stream(ids, 9, mode="autoregressive", temperature=0.5, do_sample=True)
    next(stream)
    assert others[0] not in decoder.pool.kept
    stream.close()
    assert decoder.pool.kept[-1] is others[0]

    decoder.release()
    assert decoder.pool.kept == []
    (plain,) = kept()
    decoder.mark = lambda phase: nullcontext()
    assert kept() == [plain]
    decoder.mark, penalty = None, SimpleNamespace(penalise=lambda ids, scores: scores)
    walked = kept(logits_processor=[penalty.penalise])[-1]
    penalty = weakref.ref(penalty.__dict__.pop("penalise"))
    assert walked is not plain and penalty() is None
    models = decoder.models
    decoder.models = replace(
        models, ngram=object()
    )  # which plain decoding does not use, but a run of another table is another run
    assert kept()[:-1] == [plain, walked]
    before = list(decoder.pool.kept)
    stream = decoder.stream(ids, 9, mode="autoregressive", do_sample=True)
    next(stream)
    decoder.models = replace(models, draft=object())  # read again meanwhile: nothing can use the old draft's run
    stream.close()
    assert decoder.pool.kept == before
    decoder.models = models

    decoder.release()
    (small,) = kept()
    monkeypatch.setattr("stagedspec.decoding.pool.kept_bytes", lambda device: 2 * small.engine.nbytes)
    assert len(kept(do_sample=True)) == len(kept(do_sample=True, top_k=2)) == 2
    before = list(decoder.pool.kept)
    monkeypatch.setattr("stagedspec.decoding.pool.kept_bytes", lambda device: small.engine.nbytes - 1)
    assert kept() == before
    torch_side = decoders(pair, device)[0]
    torch_side.generate(ids, max_new_tokens=1)
    assert torch_side.pool.kept == []


def test_release_frees_the_buffers(pair, device):
    """Also while a stream is under way, whose next steps make their own."""
    decoder = decoders(pair, device)[1]
    ids = torch.tensor([[5, 6, 7]], device=device)
    expected = decoder.generate(ids, max_new_tokens=9)[0, 3:].tolist()
    assert decoder.target.ops.memory.buffers and decoder.target.ops.memory.scratch is not None
    decoder.release()
    assert not decoder.target.ops.memory.buffers and decoder.target.ops.memory.scratch is None
    found = []
    for chunk in decoder.stream(ids, 9):
        found += chunk.tokens
        decoder.release()
    assert found == expected
    assert decoder.generate(ids, max_new_tokens=9)[0, 3:].tolist() == expected


def test_a_part_is_prepared_again_after_a_release(pair, device):
    """Buffers made during a capture would lie in that graph's own memory, and be zeroed at each of its replays."""
    ops = decoders(pair, device)[1].target.ops
    part = ops.repeated(lambda: ops.memory.scratch_of((64, 8), torch.device(device)))
    ops.prepare([(part, ())], torch.device(device))
    assert part.prepared and ops.memory.scratch is not None
    ops.release()
    assert not part.prepared
    ops.prepare([(part, ())], torch.device(device))
    assert part.prepared and ops.memory.scratch is not None


def test_the_smallest_run_that_fits_is_used(pair, device):
    decoder = Decoder.from_pretrained(
        make_gpt2(n_positions=300, n_layer=1), device=device, dtype="float32", backend="triton"
    )
    ids = torch.tensor([[5, 6, 7]], device=device)
    end = decoder.generate(ids, max_new_tokens=1, mode="autoregressive")[0, -1].item()
    (short,) = decoder.pool.kept
    decoder.generate(ids, max_new_tokens=200, mode="autoregressive", eos_token_id=end)
    _, long = decoder.pool.kept
    assert (short.sequences.capacity, long.sequences.capacity) == (128, 256)
    decoder.generate(ids, max_new_tokens=1, mode="autoregressive")
    assert decoder.pool.kept == [long, short]


def test_idle_memory_makes_room(pair, device, monkeypatch):
    decoder = decoders(pair, device)[1]
    ids = torch.tensor([[5, 6, 7]], device=device)
    decoder.generate(ids, max_new_tokens=1, mode="autoregressive")
    real = stagedspec.decoding.pool.Generation

    def crowded(*arguments):
        if decoder.pool.kept:
            raise torch.OutOfMemoryError("no room")
        return real(*arguments)

    monkeypatch.setattr("stagedspec.decoding.pool.Generation", crowded)
    decoder.generate(ids, max_new_tokens=1, mode="autoregressive", do_sample=True)
    assert len(decoder.pool.kept) == 1


def test_refusals(pair, device, prompts):
    decoder = decoders(pair, device)[1]
    ids = prompts[0].to(device)
    deep = TreeConfig(nodes=40, depth=39, passes=39, width=1, children=1, prefetch=0)
    with pytest.raises(ValueError, match="at most 30 deep, got depth 39"):
        decoder.generate(ids, max_new_tokens=4, tree=deep)
    wide = TreeConfig(nodes=20, depth=3, passes=2, width=300, children=2, prefetch=0)
    with pytest.raises(ValueError, match="pass of this backend takes at most 256 nodes, got 300: the width 300 and 0"):
        decoder.generate(ids, max_new_tokens=4, tree=wide)
    many = TreeConfig(nodes=20, depth=8, passes=8, width=100, children=40, prefetch=0)
    with pytest.raises(ValueError, match="at most 16384 candidates on a GPU, got 702 draft evaluations with 40"):
        decoder.generate(ids, max_new_tokens=4, tree=many)


@pytest.mark.slow
def test_trees_are_tuned(device, monkeypatch):
    """The draft is measured as with plain torch, and the best trees that the kernels can grow are chosen; after the
    time given none are timed."""
    models = {"target": small(1), "draft": small(2), "device": device, "dtype": "float32"}
    both = [Decoder.from_pretrained(**models, backend=name) for name in ("torch", "triton")]
    for sampled in (False, True):
        found = [outcomes(decoder, [5, 6, 7], 3, sampled, seed=3) for decoder in both]
        assert found[0] == found[1] and len(found[0]) == 3
    monkeypatch.setattr(cost, "_least_times", lambda target, runs, before: [1e-3 * (1 + n) for n in range(len(runs))])
    monkeypatch.setattr("stagedspec.tuning.trees._timed", lambda *_: [])
    tuning = tune(both[1], [[5, 6, 7]], 3, seconds=0)
    assert {key[0] for key in tuning.trees} == {"chain", "tree", "staged"} and len(tuning.trees) == 6
    for (mode, batch, sampled), levels in tuning.trees.items():
        assert both[1].tree_for(mode, batch, do_sample=sampled) == levels[-1]
        assert levels[-1].depth <= both[1].target.ops.max_depth and not levels[-1].node_floor


def test_scratch_only_grows(device):
    """Else operations that need more of one part than of the other would take turns in making it anew."""
    ops = backend.resolve("triton", device)
    ops.memory.scratch_of((40, 1), device)
    held = ops.memory.scratch_of((1, 30), device)
    assert held.partials.numel() >= 40 and held.counters.numel() >= 30 and not held.counters.any()
    assert ops.memory.scratch_of((40, 30), device) is held


def test_a_buffer_is_shared_by_calls_of_one_kind(device):
    ops = backend.resolve("triton", device)
    held = ops.memory.buffer("norm_linear", (4, 6), torch.float32, device).fill_(1.0)
    assert ops.memory.buffer("norm_linear", (2, 6), torch.float32, device).data_ptr() == held.data_ptr()
    for op, rows, width, dtype in (
        ("embed", 4, 6, torch.float32),
        ("norm_linear", 5, 6, torch.float32),
        ("norm_linear", 4, 7, torch.float32),
        ("norm_linear", 4, 6, torch.float16),
    ):
        other = ops.memory.buffer(op, (rows, width), dtype, device).zero_()
        assert other.shape == (rows, width) and other.dtype == dtype
    assert (held == 1.0).all()


def test_trees_at_the_limits(device):
    """The first pass has two rows beside the guesses, however narrow the others are."""
    ops = backend.resolve("triton", device)
    for depth, guesses, problem in ((30, 254, ""), (31, 254, "at most 30 deep, got depth 31"), (30, 255, "got 257")):
        tree = TreeConfig(nodes=2, depth=depth, passes=1, width=1, children=1, prefetch=1, prefetch_width=guesses)
        with pytest.raises(ValueError, match=problem) if problem else nullcontext():
            ops.check_tree(tree)


def test_backend_resolution(device):
    import triton

    assert type(backend.resolve("torch", device)).__name__ == "TorchBackend"
    assert type(backend.resolve("triton", device, [64, 256])).__name__ == "TritonBackend"
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got 'cuda'"):
        backend.resolve("cuda", device)
    with pytest.raises(ValueError, match="heads can be at most 256 wide, the model's are 320; use 'auto' or 'torch'"):
        backend.resolve("triton", device, [64, 320])
    if device.type == "cpu":
        assert type(backend.resolve("auto", device)).__name__ == "TorchBackend"
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = False
            with pytest.raises(ValueError, match=r"backend 'triton' cannot run on cpu: .* TRITON_INTERPRET=1"):
                backend.resolve("triton", device)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as torch and the system describe it: what is there can be changed."""
    import triton

    (tmp_path / "Python.h").touch()
    machine = SimpleNamespace(capability=(9, 0), hip=None, programs={"gcc"}, headers=tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine.capability)
    monkeypatch.setattr(backend, "shutil", SimpleNamespace(which=lambda name: name in machine.programs))
    paths = SimpleNamespace(get_default_scheme=lambda: "posix_local", get_paths=lambda _: {"include": machine.headers})
    monkeypatch.setattr(backend, "sysconfig", paths)
    monkeypatch.setattr(backend.torch.version, "hip", None)
    monkeypatch.delenv("CC", raising=False)
    machine.name = lambda name="auto", **options: backend.resolve(name, torch.device("cuda", 0), **options).name
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        yield machine


def test_auto_is_triton_on_a_gpu(gpu, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.name() == gpu.name(head_sizes=[64, 128]) == "triton"
        gpu.programs = {"clang"}
        assert gpu.name() == "triton"
        gpu.programs = {"my-cc"}
        monkeypatch.setenv("CC", "my-cc")
        assert gpu.name() == "triton"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"capability": (7, 5)}, r"compute capability \(7, 5\), kernels need 8.0"),
        ({"programs": set()}, "a C compiler: install gcc or clang, or name one in CC"),
        ({"CC": ""}, "now ''"),
        ({"CC": "ccache gcc"}, "now 'ccache gcc'"),
        ({"headers": "nowhere"}, "nowhere has no Python.h"),
        ({"hip": "6.0"}, "for NVIDIA GPUs"),
        ({"head_sizes": [64, 257]}, "at most 256 wide"),
    ],
    ids=str,
)
def test_what_a_gpu_may_lack(gpu, monkeypatch, change, problem):
    """Forced it is refused; auto is torch, with a warning that says why."""
    options = {key: value for key, value in change.items() if key == "head_sizes"}
    if "CC" in change:
        monkeypatch.setenv("CC", change["CC"])
    if "hip" in change:
        monkeypatch.setattr(backend.torch.version, "hip", change["hip"])
    vars(gpu).update({key: value for key, value in change.items() if hasattr(gpu, key)})
    with pytest.raises(ValueError, match=problem):
        gpu.name("triton", **options)
    with pytest.warns(UserWarning, match=problem):
        assert gpu.name(**options) == "torch"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"capability": (8, 0)}, "it has .8, 0."),
        ({"capability": (10, 0)}, "it has .10, 0."),
        ({"head_sizes": [160, 64]}, "heads up to 128, not 160"),
    ],
)
def test_auto_leaves_alone_what_was_not_tried(gpu, change, problem):
    options = {key: value for key, value in change.items() if key == "head_sizes"}
    vars(gpu).update({key: value for key, value in change.items() if hasattr(gpu, key)})
    assert gpu.name("triton", **options) == "triton"
    with pytest.warns(UserWarning, match=problem):
        assert gpu.name(**options) == "torch"


def test_auto_does_not_interpret(gpu):
    import triton

    triton.knobs.runtime.interpret = True
    with pytest.warns(UserWarning, match="TRITON_INTERPRET is set"):
        assert gpu.name() == "torch"
    gpu.programs = set()  # nothing is built there
    assert gpu.name("triton") == "triton"


def test_heads_too_wide_are_refused_when_a_model_is_loaded(device):
    target, wide = small(1), make_gpt2(n_embd=320, n_head=1, n_layer=1)
    with pytest.raises(ValueError, match=rf"backend 'triton' cannot run on {device.type}.*: .* the model's are 320"):
        Decoder.from_pretrained(target, draft=wide, device=device, dtype="float32", backend="triton")
    decoder = Decoder.from_pretrained(target, device=device, dtype="float32", backend="triton")
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="can be at most 256 wide, the model's are 320; use backend='torch'"):
        decoder.generate(ids, max_new_tokens=2, assistant_model=wide)


def test_trees_tuned_for_another_backend_are_refused(tmp_path, device):
    """Deeper ones than the kernels can verify are, whoever chose them."""
    models = {"target": small(1), "draft": small(2), "device": device, "dtype": "float32"}
    torch_decoder = Decoder.from_pretrained(**models, backend="torch")
    deep = TreeConfig(nodes=41, depth=40, passes=40, width=1, children=1, prefetch=0)
    tuning = Tuning(pair_of(torch_decoder), trees={("chain", 1, False): [deep]})
    tuning.save(tmp_path / "tree.json")
    with pytest.raises(ValueError, match="backend"):
        Decoder.from_pretrained(**models, backend="triton", tree=tmp_path / "tree.json")
    decoder = Decoder.from_pretrained(**models, backend="triton")
    decoder.use(Tuning(pair_of(decoder), trees=tuning.trees))
    assert (torch_decoder.backend, decoder.backend) == ("torch", "triton")
    with pytest.raises(ValueError, match="can be at most 30 deep, got depth 40"):
        decoder.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, mode="chain")


def test_threads_take_turns(pair, device):
    """Two generations of one decoder at once: each as if it were alone."""
    decoder = Decoder.from_pretrained(*pair, device=device, dtype="float32", backend="triton", tree=TREE)
    prompts = [torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7, 6]])]
    alone = [decoder.generate(ids, max_new_tokens=5, eos_token_id=[]) for ids in prompts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda ids: decoder.generate(ids, max_new_tokens=5, eos_token_id=[]), prompts * 2))
    assert all(map(torch.equal, together, alone * 2))


def test_a_processor_may_force_a_token(pair, device):
    """By an infinite score; sampled, transformers takes it for an error, and so do we (test_invalid_choice.py)."""

    def force(ids, scores):
        scores = scores.clone()
        scores[:, 7] = float("inf")
        return scores

    decoder = Decoder.from_pretrained(*pair, device=device, dtype="float32", backend="triton", tree=TREE)
    options = {"max_new_tokens": 3, "eos_token_id": [], "logits_processor": [force]}
    assert decoder.generate(torch.tensor([[5, 6]]), **options)[0, 2:].tolist() == [7, 7, 7]


def test_a_top_k_beyond_everything_is_none(pair, device):
    decoder = Decoder.from_pretrained(*pair, device=device, dtype="float32", backend="triton", tree=TREE)
    options = {"do_sample": True, "seed": 1, "max_new_tokens": 4, "eos_token_id": []}
    ids = torch.tensor([[5, 6]])
    assert torch.equal(decoder.generate(ids, top_k=10**20, **options), decoder.generate(ids, top_k=0, **options))
