"""Trees that adapt with state on a device: any levels in any order give the tokens of plain decoding."""

import pytest
import torch
from early_starts import Settled
from helpers import check_cache, left_pad, make_draft, make_gpt2, oracle_generate, random_prompts, slow_but
from replay import Replay

from stagedspec import Decoder, Sampling, TreeConfig
from stagedspec.decoding.proposers import Step
from stagedspec.decoding.request import StagedOptions, validate
from stagedspec.kernels.backends.cuda_graph import Captured
from stagedspec.kernels.backends.triton_backend import TritonBackend
from stagedspec.kernels.common.timing import Stopwatch
from stagedspec.kernels.state import device as device_state
from stagedspec.kernels.state import host as host_state
from stagedspec.planning.adapt import OFF, WAITS, Controller, Level
from stagedspec.planning.cost import Model

SMALL = TreeConfig(nodes=2, depth=1, passes=1, width=1, children=3, prefetch=0)
FULL = TreeConfig(nodes=5, depth=3, passes=2, width=1, children=3, prefetch=1, prefetch_width=1)
VERIFY = (1.0,) * 6
LEVELS = (
    Level("off", OFF, 1.0, 1.0, VERIFY),
    Level("small", SMALL, 1.6, 1.2, VERIFY, 0.2, 0.2, 0.01),
    Level("full", FULL, 2.5, 1.4, VERIFY, 0.2, 0.2, 0.01),
)
NEW = 16
LONGEST = 2  # tokens of a reading in these tests, so that the draft often misses more


class Late(Stopwatch):
    """Stops when the next one does: what a step did is known after the launch of the next, as on a GPU."""

    stopped = 0

    def stop(self) -> None:
        super().stop()
        Late.stopped += 1
        self.number = Late.stopped

    @property
    def done(self) -> bool:
        return super().done and self.number < Late.stopped


class Erratic(Controller):
    """Every level after every other one, and longer stretches of plain steps; readings right before drafting alone.

    start: where in ORDER a generation begins; an odd one leaves the prompts unread.
    """

    ORDER = (0, 0, 1, 1, 2, 2, 0, 2, 1, 0, 0, 0)
    start = 0

    def __init__(self, levels, last=None):
        super().__init__(levels)
        self.made_levels, self.shown, self.told = [], [], []
        self.trial, self.chosen = 0, Erratic.ORDER[Erratic.start]

    def begin(self, prompt, new_tokens) -> bool:
        self.unread = prompt * (Erratic.start % 2)
        return not self.unread

    @property
    def due(self) -> bool:
        return (self.missed > 0 or self.unread > 0) and self.chosen > 0

    def launch(self) -> int:
        self.made_levels.append(super().launch())
        self.chosen = Erratic.ORDER[(Erratic.start + len(self.made_levels)) % len(Erratic.ORDER)]
        return self.made_levels[-1]

    def read(self, rows, *_) -> None:
        self.shown.append(rows)

    def step(self, made, nodes, passes, accepted, depths, left, seconds) -> None:
        self.told.append((made, accepted, depths, left))


@pytest.fixture(autouse=True)
def late(monkeypatch):
    monkeypatch.setattr("stagedspec.decoding.proposers.Stopwatch", Late)
    monkeypatch.setattr("stagedspec.decoding.proposers.WAITS", (1, LONGEST))
    monkeypatch.setattr(device_state, "UNREAD", LONGEST)


@pytest.fixture
def erratic(monkeypatch):
    monkeypatch.setattr("stagedspec.planning.planner.Controller", Erratic)


def make_decoder(device, target, draft, **options) -> Decoder:
    made = Decoder.from_pretrained(target, draft, device=device, dtype="float32", backend="triton", **options)
    made.planner._chosen |= {("staged", batch, sampled): LEVELS for batch in (1, 3) for sampled in (False, True)}
    return made


@pytest.fixture(scope="module")
def pair():
    target = make_gpt2(3, n_layer=1)
    return target, make_draft("good", target)


@pytest.fixture(scope="module")
def decoder(device, pair):
    return make_decoder(device, *pair)


@pytest.fixture(scope="module")
def reference(device, pair):
    """Plain decoding of the torch backend, which is much faster than the interpreter."""
    made = Decoder.from_pretrained(pair[0], device=device, dtype="float32", backend="torch")

    def generate(ids, mask, new_tokens, **options):
        return made.generate(ids, mask, new_tokens, mode="autoregressive", **options)

    return generate


def inputs(lengths, device, seed=21):
    return [tensor.to(device) for tensor in left_pad(random_prompts(lengths, seed=seed))]


CASES = {
    "greedy-one": ({}, [5], 0),
    "greedy-ragged": ({}, [7, 1, 12], 3),
    "sampled-one": ({"do_sample": True, "top_k": 9, "seed": 8}, [5], 7),
    "sampled-ragged": ({"do_sample": True, "top_k": 9, "seed": 8}, [7, 1, 12], 2),
    "seeds-ragged": ({"do_sample": True, "temperature": 1.3, "seed": [3, 4, 5]}, [2, 9, 4], 5),
}


@pytest.mark.parametrize("case", slow_but(["greedy-one", "sampled-ragged"], CASES))
def test_same_tokens_as_plain_decoding(decoder, reference, pair, device, erratic, case):
    options, lengths, Erratic.start = CASES[case]
    ids, mask = inputs(lengths, device)
    plain = reference(ids, mask, NEW, eos_token_id=[], **options)
    if not options:
        assert torch.equal(plain.cpu(), oracle_generate(pair[0], ids.cpu(), mask.cpu(), NEW))
    with Settled() as settled:
        assert torch.equal(decoder.generate(ids, mask, NEW, eos_token_id=[], **options), plain)
    assert settled.checked > 0
    controller = decoder.planner._controllers["staged", len(lengths), "do_sample" in options]
    pairs = set(zip(controller.made_levels, controller.made_levels[1:], strict=False))
    assert len(pairs) >= 6 and controller.shown


@pytest.mark.parametrize("late_end", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_that_end_early(decoder, reference, device, erratic, late_end):
    ids, mask = inputs([3, 8, 1], device, seed=6)
    free = reference(ids, mask, 14, eos_token_id=[])[:, 8:]
    eos = [free[1, 0].item(), free[2, 9].item()] if late_end else [free[0, 4].item()]
    options, Erratic.start = {"eos_token_id": eos, "pad_token_id": 60}, 2 + late_end
    plain = reference(ids, mask, 14, **options)
    assert torch.equal(decoder.generate(ids, mask, 14, **options), plain)
    told = decoder.planner._controllers["staged", 3, False].told
    assert any(-1 in accepted for made, accepted, *_ in told if made)


def test_the_host_takes_part(decoder, reference, device, erratic):
    """Processors choose along the walk: the parts of a step are captured one by one, for each tree."""
    ids, mask = inputs([6, 2, 4], device)
    options = {"repetition_penalty": 1.4, "eos_token_id": [], "do_sample": True, "seed": 2}
    plain = reference(ids, mask, 8, **options)
    Erratic.start = 1
    with Settled() as settled:
        assert torch.equal(decoder.generate(ids, mask, 8, **options), plain)
    assert settled.checked > 0
    assert set(decoder.planner._controllers["staged", 3, True].made_levels) == {0, 1, 2}


@pytest.mark.parametrize("lengths", slow_but([[1, 9, 3]], [[6], [1, 9, 3]]), ids=["one", "ragged"])
def test_the_drafts_cache_after_it_was_left_out(decoder, pair, device, erratic, lengths):
    """Whenever the draft is in step again its cache is what transformers computes for the same tokens."""
    ids, mask = inputs(lengths, device, seed=14)
    checked, reads, missed = 0, 0, 0
    for Erratic.start in (8,):
        options = StagedOptions("staged", 3)
        sampling = Sampling(do_sample=True)
        run = decoder._start(validate(decoder.context, options, ids, mask, max_new_tokens=13, sampling=sampling))
        cascade = run.engine.proposer
        for _ in run.steps():
            if cascade.controller.missed or cascade.controller.unread:
                missed = max(missed, cascade.controller.missed)
                continue
            for index, row in enumerate(run.sequences.rows):
                known = len(row.tokens) - 2
                if not row.running or known < 1:
                    continue
                check_cache(pair[1], row.tokens[:known], cascade.cache, index)
                checked += 1
        reads += len(cascade.controller.shown)
    assert checked > 2 and reads >= 1 and missed > LONGEST


def test_what_the_draft_made_of_tokens_that_it_has_missed(pair, device, monkeypatch):
    """As transformers ranks them, for running rows and for as many tokens as were written without it."""

    class Once(Erratic):
        @property
        def due(self) -> bool:
            self.chosen = 0
            return self.missed == LONGEST

    monkeypatch.setattr("stagedspec.planning.planner.Controller", Once)
    Erratic.start = 0
    draft = make_draft("good", pair[0])
    decoder = make_decoder(device, pair[0], draft)
    ids, mask = inputs([7, 1, 9], device)
    run = decoder._start(
        validate(decoder.context, StagedOptions("staged", 3), ids, mask, max_new_tokens=4, sampling=Sampling())
    )
    for _ in run.steps():
        pass
    (shown,) = run.engine.proposer.controller.shown
    for row, prompt, ranks in zip(run.sequences.rows, run.request.prompts, shown, strict=True):
        end, expected = len(prompt) + LONGEST - 2, []
        for at in range(max(0, end - LONGEST), end):
            best = draft(torch.tensor([row.tokens[: at + 1]])).logits[0, -1].topk(3).indices.tolist()
            expected.append(best.index(row.tokens[at + 1]) if row.tokens[at + 1] in best else -1)
        assert [rank for rank, _ in ranks] == expected
        assert all(score < 0 for _, score in ranks)


def test_results_come_in_order_and_one_step_late(decoder, device, erratic):
    """Each step is told once, with what the rows gained by it; none waits for a result of the step before it."""
    ids, mask = inputs([5, 3, 4], device)
    Erratic.start = 1
    run = decoder._start(
        validate(decoder.context, StagedOptions("staged", 3), ids, mask, max_new_tokens=12, sampling=Sampling())
    )
    controller = run.engine.proposer.controller
    lengths = [[len(prompt) for prompt in run.request.prompts]]
    for number, _ in enumerate(run.steps(), 1):
        # A GPU may still be at the step before.
        assert number - 2 <= len(controller.told) <= number - 1 and len(controller.made_levels) == number
        lengths.append([len(row.tokens) for row in run.sequences.rows])
    limits = [row.limit for row in run.sequences.rows]
    assert len(controller.told) >= number - 1
    for before, after, made, told in zip(lengths, lengths[1:], controller.made_levels, controller.told, strict=False):
        assert told[0] == made
        if made:
            _, accepted, depths, left = told
            assert all(0 < depth <= LEVELS[made].tree.depth for depth in depths)
            for row, taken in enumerate(accepted):
                if taken >= 0 and after[row] < limits[row]:
                    assert taken == after[row] - before[row] - 1 and left[row] == limits[row] - before[row]


class Frozen(Replay):
    """Returns what the first call did, as a graph does."""

    def __call__(self, *given):
        value = super().__call__(*given)
        if isinstance(value, Step):
            self.value = self.value or value
            assert all(one is other for one, other in zip(self.value[1:], value[1:], strict=True))
            return self.value
        return value


def test_graphs_of_every_level_share_state_and_serve_the_next_generation(pair, reference, device, erratic, monkeypatch):
    parts, repeated = [], Frozen if device.type == "cpu" else Captured
    monkeypatch.setattr(TritonBackend, "repeated", lambda ops, part: (parts.append(repeated(part, ops)), parts[-1])[1])
    decoder = make_decoder(device, *pair)
    for Erratic.start, length in ((2, 5), (3, 9)):
        ids, mask = inputs([length], device, seed=length)
        options = {"do_sample": True, "top_k": 8, "seed": length, "eos_token_id": []}
        plain = reference(ids, mask, 14, **options)
        assert torch.equal(decoder.generate(ids, mask, 14, **options), plain)
        assert len([run for run in decoder.pool.kept if run.request.mode == "staged"]) == 1
    (run,) = [run for run in decoder.pool.kept if run.request.mode == "staged"]
    assert run.engine.proposer.controller is decoder.planner._controllers["staged", 1, True]
    assert {tree: step.graph is not None for tree, step in run._steps.items()} == dict.fromkeys(
        (OFF, SMALL, FULL), True
    )


def test_warm_up_makes_every_level_ready(pair, device, reference, erratic):
    decoder = make_decoder(device, *pair)
    decoder.warm_up(["staged"], [{}], tokens=20)
    (run,) = decoder.pool.kept
    assert run._steps.keys() == {OFF, SMALL, FULL} and run.engine.proposer.controller is None
    assert device.type == "cpu" or all(step.graph is not None for step in run._steps.values())
    ids, mask = inputs([5], device)
    Erratic.start = 3
    assert torch.equal(decoder.generate(ids, mask, 8, eos_token_id=[]), reference(ids, mask, 8, eos_token_id=[]))
    assert decoder.pool.kept == [run]


def test_a_hopeless_draft_is_left_out(device, pair, reference, monkeypatch):
    """The controller itself, at the prices of LEVELS: results that come late end drafting as well."""

    class Untimed(Controller):
        def step(self, made, nodes, passes, accepted, depths, left, seconds) -> None:
            super().step(made, nodes, passes, accepted, depths, left)

    monkeypatch.setattr("stagedspec.planning.planner.Controller", Untimed)
    decoder = make_decoder(device, pair[0], make_draft("adversarial", pair[0]))
    ids, mask = inputs([12], device, seed=3)
    plain = reference(ids, mask, 24, eos_token_id=[])
    assert torch.equal(decoder.generate(ids, mask, 24, eos_token_id=[]), plain)
    assert decoder.last_stats.adapted["off"] >= 14


# ---------------------------------------------------------------- single parts


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_unread_as_on_the_host(device, count):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [7, 8], [9], [4, 4, 3, 2, 9]]
    ours = device_state.Sequences(prompts, 9, [], device)
    ours.stop(3, 5)
    found = device_state.Unread.before_last(ours, count, 40)
    theirs = host_state.Unread.before_last(
        host_state.Sequences(prompts, 9, [], torch.device("cpu")), count, 40, torch.float32
    )
    for row in range(3):
        own = found.counted[row].tolist()
        expected = theirs.counted[row].tolist()
        fields = ((found.batch.tokens, theirs.batch.tokens), (found.batch.positions, theirs.batch.positions),
                  (found.following, theirs.following))  # fmt: skip
        for device_side, host_side in fields:
            ours_row = [value for value, counts in zip(device_side[row].tolist(), own, strict=True) if counts]
            assert ours_row == [
                value for value, counts in zip(host_side[row].tolist(), expected, strict=False) if counts
            ]
    assert not found.counted[3].any()
    assert found.batch.positions.tolist() == [
        [max(len(prompt) - 2 - LONGEST, 0) + slot for slot in range(LONGEST)] for prompt in prompts
    ]
    assert (found.write, found.first, found.moves) == (40, 40, None)


def test_no_more_is_read_than_a_pass_holds(device, monkeypatch):
    monkeypatch.undo()
    assert max(WAITS) <= device_state.UNREAD
    sequences = device_state.Sequences([[1, 2, 3]], 9, [], device)
    with pytest.raises(ValueError, match="reads at most 32 tokens of each row, got 33"):
        device_state.Unread.before_last(sequences, 33, 40)


def test_few_trees_without_floors(decoder):
    """Each has kernels and a CUDA graph of its own, and verifies all of its nodes."""

    class Times:
        together = 64
        target_pass = draft_pass = staticmethod(lambda batch, nodes, sampled: 1e-3 + 1e-6 * nodes)

    trees = Model(Times(), 1, False, ops=decoder.target.ops).levels("staged")
    assert len(trees) == 2 and trees[0].nodes <= trees[1].nodes / 4
    assert all(tree.node_floor == tree.pass_floor == 0.0 for tree in trees)
