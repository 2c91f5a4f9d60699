"""What a first generation waits for: compiling in parallel, chunks of prompts, warm_up, the time to the first token."""

import itertools
import logging
import time
from concurrent.futures import Future
from contextvars import copy_context

import pytest
import torch
from helpers import GPU, make_draft, make_gpt2, slow_but

from stagedspec import Decoder, TreeConfig
from stagedspec.decoding.generation import Generation
from stagedspec.decoding.request import StagedOptions
from stagedspec.kernels.common import compiling, registry
from stagedspec.kernels.common.progress import reporting
from stagedspec.kernels.state import device
from stagedspec.planning.adapt import OFF, Controller, Level

PLACE = "cuda" if GPU else "cpu"
TREE = TreeConfig(nodes=4, depth=2, passes=2, width=1, children=2, prefetch=1, prefetch_width=1)


@pytest.fixture
def decoder() -> Decoder:
    target = make_gpt2(n_layer=1)
    draft = make_draft("good", target)
    return Decoder.from_pretrained(target, draft, device=PLACE, dtype="float32", backend="triton", tree=TREE)


# ---------------------------------------------------------------- a dry run finds what will be launched


SAMPLINGS = {
    "greedy": {},
    "top-k": {"do_sample": True, "top_k": 8},
    "all-warpers": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "penalty": {"repetition_penalty": 1.3},
}


class EveryLevel(Controller):
    """Each level in turn, so that the draft reads what it has missed."""

    def __init__(self, levels, last=None):
        super().__init__(levels)
        self.trial, self.chosen = 0, 0

    def launch(self) -> int:
        made = super().launch()
        self._choose()
        return made

    def _choose(self) -> None:
        self.chosen = (self.chosen + 1) % len(self.known)


@pytest.mark.parametrize("sampling", slow_but(["greedy"], SAMPLINGS))
@pytest.mark.parametrize("mode", slow_but(["autoregressive"], ["autoregressive", "staged", "adaptive"]))
def test_everything_is_compiled_ahead(decoder, monkeypatch, mode, sampling):
    """Every kernel that a generation launches, with all that it is compiled for, was launched by the dry run before."""
    if mode == "adaptive":
        monkeypatch.setattr("stagedspec.planning.planner.Controller", EveryLevel)
        verify, small = (1.0,) * 5, TreeConfig(nodes=2, depth=1, passes=1, width=1, children=2, prefetch=0)
        levels = tuple(Level(str(tree.nodes), tree, 1.0, 1.0, verify, 0.1, 0.1) for tree in (OFF, small, TREE))
        decoder.planner.fixed, mode = None, "staged"
        decoder.planner._chosen |= {("staged", 1, sampled): levels for sampled in (False, True)}
    ahead, later, real = set(), set(), registry.launch_kernel
    monkeypatch.setattr(compiling, "compile_ahead", lambda parts, place: recorded(parts, ahead))

    def recorded(parts, found) -> int:
        def collect(kernel, grid, arguments, options):
            found.add((kernel.fn.__name__, *sorted((name, str(value)) for name, value in options.items())))

        def run():
            registry.collector.set(collect)
            for part in parts:
                part()

        copy_context().run(run)
        return 0

    def launched(kernel, grid, arguments, options):
        later.add((kernel.fn.__name__, *sorted((name, str(value)) for name, value in options.items())))
        kernel[grid](*arguments, **options)

    ids = torch.randint(1, 61, (1, 20), generator=torch.Generator().manual_seed(0)).to(PLACE)
    call = decoder._read(ids, None, 8, StagedOptions(mode, 3), dict(SAMPLINGS[sampling]))
    run = decoder._start(call.request, call.callbacks)

    def generate():
        registry.collector.set(launched)
        for _ in run.steps():
            pass

    copy_context().run(generate)
    host = {"verify_commit_kernel", "_compact", "scan_kernel", "select_kernel"} if sampling == "penalty" else set()
    assert later and {one for one in later - ahead if one[0] not in host} == set()
    assert real is registry.launch_kernel


def test_waiting_is_reported(caplog, monkeypatch):
    monkeypatch.setattr(compiling, "PATIENCE", 0.0)
    done, seen = [Future(), Future()], []
    with reporting(lambda ready, total: seen.append((ready, total))):
        for future in done:
            future.set_result(None)
        compiling._watch(done)
    assert seen == [(1, 2), (2, 2)] and not caplog.records
    slow = Future()
    monkeypatch.setattr(compiling, "as_completed", lambda futures: iter(futures))
    with caplog.at_level(logging.WARNING, "stagedspec"):
        compiling._watch([slow])
    assert [record.getMessage() for record in caplog.records] == [
        "compiling GPU kernels, 1 in all; later processes find them in Triton's cache"
    ]


# ---------------------------------------------------------------- chunks of prompts


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_chunks_cover_prompts_and_fit(rows):
    for count in range(2100):
        # A sequence has room for a multiple of TOKENS tokens, and for one more than are read.
        room = -(-(count + 1) // device.TOKENS) * device.TOKENS
        sizes = [size for size in device.CHUNKS if size * rows <= device.CHUNKS[-1] and size <= room]
        chunks = device.cheapest(count, sizes, room)
        assert chunks == sorted(chunks, reverse=True) and set(chunks) <= set(sizes)
        assert sum(chunks) >= count and (not chunks or sum(chunks[:-1]) < count)
        assert sum(chunks) <= room


def test_chunks_are_the_cheapest():
    sizes = [16, 32, 64]

    def cost(chunks):
        return sum(chunks) + device.CHUNK_COST * len(chunks)

    for count in range(1, 150):
        every = (
            chunks
            for number in range(1, 6)
            for chunks in itertools.combinations_with_replacement(sizes, number)
            if sum(chunks) >= count
        )
        assert cost(device.cheapest(count, sizes, 192)) == min(map(cost, every))


# ---------------------------------------------------------------- warm_up


@pytest.mark.slow
def test_warm_up_serves_the_first_generation(decoder):
    ids = torch.tensor([[5, 6, 7, 8]], device=PLACE)
    expected = decoder.generate(ids, max_new_tokens=6, mode="autoregressive")
    decoder.release()
    steps = []
    made = decoder.warm_up(["staged"], [{}], progress=lambda *step: steps.append(step))
    (run,) = decoder.pool.kept
    assert run.sequences.capacity == 128  # all of the model's 48 positions
    assert torch.equal(decoder.generate(ids, max_new_tokens=6, mode="staged"), expected)
    assert decoder.pool.kept == [run]
    if GPU:
        assert bool(steps) == bool(made)  # an earlier test of this process may have compiled all
        assert all(name == "staged, greedy" and 0 < ready <= total for name, ready, total in steps)


def test_warm_up_of_all_that_a_decoder_has(decoder):
    decoder.warm_up(tokens=8)
    assert {run.request.rows[0].limit for run in decoder.pool.kept} == {8}
    kinds = {(run.request.mode, run.request.sampling.do_sample) for run in decoder.pool.kept}
    assert kinds == set(itertools.product(("autoregressive", "chain", "tree", "staged"), (False, True)))
    alone = Decoder.from_pretrained(make_gpt2(n_layer=1), device=PLACE, dtype="float32", backend="triton")
    alone.warm_up(samplings=[{"do_sample": True, "top_p": 0.9}], batch=[1, 2], tokens=8)
    assert [(run.request.mode, len(run.sequences)) for run in alone.pool.kept] == [
        ("autoregressive", 1),
        ("autoregressive", 2),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modes": ["stagged"]}, "modes must be among autoregressive, chain, tree, staged, got 'stagged'"),
        ({"modes": "staged"}, "warm_up needs a list of modes"),
        ({"modes": []}, "warm_up needs a list of modes"),
        ({"samplings": []}, "warm_up needs a list of samplings"),
        ({"samplings": ["greedy"]}, "samplings must be dicts of options of generate, got 'greedy'"),
        ({"samplings": [{"do_sample": True, "temperature": -1.0}]}, "temperature"),
        (
            {"samplings": [{"repetition_penalty": 1.3}]},
            "samplings may hold do_sample, min_p, temperature, top_k, top_p, got",
        ),
        ({"samplings": [{"prompt_lookup_num_tokens": 3}]}, "samplings may hold"),
        ({"batch": 0}, "batch must be whole numbers of at least 1, got 0"),
        ({"batch": [1, True]}, "batch must be whole numbers of at least 1, got True"),
        ({"batch": 17}, r"1 to 16 rows \(up to 64 .*\), got 17"),
        ({"batch": []}, "warm_up needs a list of batch"),
        ({"batch": 1.5}, "batch must be whole numbers of at least 1, got 1.5"),
        ({"batch": None}, "batch must be whole numbers of at least 1, got None"),
        ({"modes": 5}, "warm_up needs a list of modes, with one at least, got 5"),
        ({"tokens": 1}, "tokens must be a whole number from 2 to the model's 48 positions, got 1"),
        ({"tokens": 49}, "to the model's 48 positions, got 49"),
        ({"tokens": 8.0}, "tokens must be a whole number"),
    ],
)
def test_warm_up_refuses(decoder, change, message):
    with pytest.raises(ValueError, match=message):
        decoder.warm_up(**change)
    assert decoder.pool.kept == []


def test_warm_up_needs_kernels():
    plain = Decoder.from_pretrained(make_gpt2(n_layer=1), device="cpu", backend="torch")
    with pytest.raises(ValueError, match="this decoder runs on cpu with backend 'torch', which has none to compile"):
        plain.warm_up()


def test_all_is_checked_before_any_of_it_is_made():
    alone = Decoder.from_pretrained(make_gpt2(n_layer=1), device=PLACE, dtype="float32", backend="triton")
    with pytest.raises(ValueError, match="mode 'staged' needs a draft model"):
        alone.warm_up(["autoregressive", "staged"], tokens=8)
    assert alone.pool.kept == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore"),
        RuntimeError("Triton Error [CUDA]: out of memory. Tried to allocate 3 GiB."),  # loading a kernel
    ],
)
def test_warm_up_without_memory(decoder, monkeypatch, error):
    def full(generation):
        raise error

    monkeypatch.setattr(Generation, "warm_up", full)
    with pytest.raises(
        ValueError, match=r"too little GPU memory to make staged, greedy ready .*Tried to allocate 3 GiB"
    ):
        decoder.warm_up(["staged"])
    assert decoder.pool.kept == []


# ---------------------------------------------------------------- the first token


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_seconds_to_the_first_token(backend):
    target = make_gpt2(n_layer=1)
    decoder = Decoder.from_pretrained(target, device=PLACE, dtype="float32", backend=backend)
    ids = torch.tensor([[5, 6, 7]], device=PLACE)
    for _ in range(2):  # the second one uses the first one's memory
        begin = time.perf_counter()
        decoder.generate(ids, max_new_tokens=3, mode="autoregressive", eos_token_id=[])
        stats = decoder.last_stats
        assert 0 < stats.seconds_to_first_token <= time.perf_counter() - begin
        assert stats.as_dict()["seconds_to_first_token"] == stats.seconds_to_first_token
    call = decoder._read(ids, None, 3, StagedOptions("autoregressive", 0), {})
    assert decoder._start(call.request).stats().seconds_to_first_token is None
