"""The head against fp64, its tokens against the reference's rule over its own logits."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import GPU, make_gpt2

from stagedspec.kernels import lm_head, reference
from stagedspec.kernels.backends.triton_backend import TritonBackend
from stagedspec.kernels.choose.op import AS_THEY_ARE, Maxima, Outputs, Parts, Sampling, groups_of, launch_children
from stagedspec.kernels.choose.scores import GROUP
from stagedspec.kernels.common.hopper import SHARED
from stagedspec.kernels.common.registry import Scratch
from stagedspec.kernels.lm_head import hopper
from stagedspec.kernels.state.host import GREEDY_SHARPNESS
from stagedspec.models.gpt2 import GPT2

WARPERS = {
    "greedy": {"greedy": True},
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.2, "top_k": 9},
    "top_p": {"top_p": 0.83},
    "min_p": {"min_p": 0.07},
    "all": {"temperature": 0.9, "top_k": 20, "top_p": 0.93, "min_p": 0.02},
}

# Rows, vocabulary, width, on a GPU alone: the interpreter would take hours. Each program of the head on Hopper takes
# several tiles of these, so that its ring comes round, with all of x beside it (768) and without (1280, 1600).
LARGE = [(64, 50257, 1280), (130, 50257, 768), (200, 25349, 1600)] if GPU else []


def warping(options):
    none = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    return None if options.get("greedy") else none | options


class Case:
    """Inputs of a head, and calls with poisoned outputs."""

    def __init__(self, device, dtype, rows, vocab_size, width, batch=1):
        generator = torch.Generator(device).manual_seed(rows + vocab_size)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.device, self.rows, self.vocab_size = device, rows, vocab_size
        self.x, self.weight, self.bias = normal(rows, width) * 2 + 0.5, normal(width), normal(width)
        self.head = normal(vocab_size, width) * (2.5 * width**-0.5)
        self.noise = torch.randn(rows, vocab_size, generator=generator, device=device)
        self.seeds = torch.full((batch,), 5, device=device)
        self.streams = torch.arange(batch, dtype=torch.int32, device=device)
        self.positions = torch.arange(rows, dtype=torch.int32, device=device).view(batch, -1)
        self.narrowed = None
        self.scratch = Scratch.of([lm_head.scratch_size(rows, vocab_size, width)], device)

    def narrow(self):
        """The head in 8 bits, and for the reference what is left of it."""
        self.narrowed = lm_head.to_eight_bits(self.head)
        self.head = lm_head.from_eight_bits(*self.narrowed, self.x.shape[1])
        return self

    def given(self, name):
        """The noise as the reference wants it."""
        rows = torch.arange(self.rows, device=self.device)[None]
        return None if name == "greedy" else reference.NoiseAt(self.noise[None], rows)

    def made(self):
        """The noise that kernels make, by the reference: [M, V]."""
        at = self.seeds, self.streams.long(), self.positions.long()
        return reference.gumbel_noise(*at, self.vocab_size).flatten(0, 1)

    def at(self, rows=slice(None)):
        self.scratch.partials.fill_(torch.nan)
        x, positions = self.x[rows].contiguous(), self.positions.flatten()[rows].view(len(self.seeds), -1)
        head = self.head if self.narrowed is None else self.narrowed[0]
        return x, self.weight, self.bias, 1e-5, head, self.seeds, self.streams, positions.contiguous()

    def rest(self):
        return {"scratch": self.scratch, "scales": None if self.narrowed is None else self.narrowed[1]}

    def choose(self, rows=slice(None), with_logits=True, **options):
        args = self.at(rows)
        out = torch.full((len(args[0]),), -1, dtype=torch.int32, device=self.device)
        logits = torch.full((len(out), self.vocab_size), torch.nan, device=self.device) if with_logits else None
        options |= self.rest()
        lm_head.lm_head_choose(*args, **options, logits=logits, out=out)
        assert not self.scratch.counters.any()
        return out, logits

    def children(self, count, rows=slice(None), **options):
        args = self.at(rows)
        tokens = torch.full((len(args[0]), count), -1, dtype=torch.int32, device=self.device)
        logprobs = torch.full(tokens.shape, torch.nan, device=self.device)
        options |= self.rest()
        lm_head.lm_head_topm(*args, **options, out_tokens=tokens, out_logprobs=logprobs)
        return tokens, logprobs


@pytest.mark.parametrize(
    ("rows", "vocab_size", "width"), [(1, 61, 24), (7, 257, 96), (17, 131, 70), (130, 61, 24), *LARGE]
)
def test_logits(rows, vocab_size, width, device, dtype, error_ratio):
    case = Case(device, dtype, rows, vocab_size, width)
    _, logits = case.choose(greedy=True)
    norm = F.layer_norm(case.x.double(), (width,), case.weight.double(), case.bias.double(), 1e-5)
    plain = F.layer_norm(case.x, (width,), case.weight, case.bias, 1e-5) @ case.head.T
    assert error_ratio(logits, plain, norm @ case.head.double().T) <= 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in WARPERS for shape in [(5, 257, 40), *LARGE]] + [("top_k", (130, 61, 24))],
    ids=str,
)
def test_choice(name, shape, device, dtype):
    """Exactly the rule over the kernel's own logits, on given noise."""
    case, options = Case(device, dtype, *shape), WARPERS[name]
    noise = None if options.get("greedy") else case.noise
    out, logits = case.choose(noise=noise, **options)
    assert torch.equal(out.long(), reference.choose(logits[None], warping(options), case.given(name))[0])
    again, _ = case.choose(with_logits=False, noise=noise, **options)
    assert torch.equal(again, out)


@pytest.mark.parametrize("shape", [(5, 257, 40), (17, 1000, 64), *LARGE], ids=str)
@pytest.mark.parametrize("period", [1, 64])
def test_of_equal_logits_the_lowest_id_wins(shape, period, device, dtype):
    """Also where they are of different programs: the rows of the head repeat."""
    case = Case(device, dtype, *shape)
    case.head = case.head[torch.arange(shape[1], device=device) % period].contiguous()
    noise = torch.zeros_like(case.noise)
    for options in ({"greedy": True}, {"noise": noise}, {"noise": noise, "top_k": 200}):
        out, logits = case.choose(**options)
        assert torch.equal(logits[:, :period], logits[:, period : 2 * period])
        assert torch.equal(out.long(), logits[:, :period].argmax(-1)), options


def test_nothing_beyond_the_vocabulary_is_chosen(device, dtype):
    """The last token's logit is far the largest, and its noise rules it out; the places after it have no noise."""
    case = Case(device, dtype, 2, 61, 24)
    case.weight.zero_()
    case.head[-1] = 10 * case.bias
    case.noise[:, -1] = -1e4
    out, logits = case.choose(noise=case.noise)
    assert (logits.argmax(-1) == 60).all()
    assert torch.equal(out.long(), (logits + case.noise).argmax(-1))


@pytest.mark.parametrize("shape", [(6, 257, 40), *LARGE], ids=str)
@pytest.mark.parametrize("name", ["plain", "top_k", "top_p"])
def test_choice_by_counters(name, shape, device, dtype):
    """Made noise differs from the reference's by an ulp or two: as good a token, and another one hardly ever."""
    case, options = Case(device, dtype, *shape, batch=2), WARPERS[name]
    out, logits = case.choose(**options)
    scores = reference.warp(logits, **warping(options)) + case.made()
    best, wanted = scores.max(-1)
    assert (scores.gather(-1, out.long()[:, None])[:, 0] >= best - 1e-5).all()
    assert (out != wanted).sum() <= len(out) // 50


@pytest.mark.parametrize(
    ("shape", "count"), [((3, 257, 40), 6), ((4, 1003, 24), 12), *((s, 6) for s in LARGE)], ids=str
)
@pytest.mark.parametrize("name", WARPERS)
def test_children(name, shape, count, device, dtype):
    case, options = Case(device, dtype, *shape), WARPERS[name]
    _, logits = case.choose(greedy=True)
    more = {"sharpness": GREEDY_SHARPNESS} if name == "greedy" else {"noise": case.noise}
    tokens, logprobs = case.children(count, **more, **options)
    (expected,), (gains,) = reference.choose_children(logits[None], count, warping(options), case.given(name))
    known = gains.shape[-1]  # with top-k the reference gives no more than k
    assert (logprobs[:, known:] == float("-inf")).all()
    tokens, logprobs = tokens[:, :known], logprobs[:, :known]
    possible = gains.isfinite()
    assert torch.equal(logprobs.isfinite(), possible)
    assert torch.equal(tokens[possible].long(), expected[possible])
    torch.testing.assert_close(logprobs, gains, rtol=1e-5, atol=1e-4 if shape in LARGE else 2e-5)


@pytest.mark.parametrize("warper", [{"top_k": 2}, {"top_p": 0.1}, {"min_p": 0.9}], ids=str)
def test_greedy_children_ignore_warpers(warper, device):
    case = Case(device, torch.float32, 3, 257, 40)
    for got, expected in zip(case.children(6, greedy=True, **warper), case.children(6, greedy=True), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(6, 257, 40), *LARGE], ids=str)
@pytest.mark.parametrize("name", ["plain", "top_k"])
def test_children_by_counters(name, shape, device, dtype):
    """The likeliest under the reference's noise, and as likely as that says."""
    case, options = Case(device, dtype, *shape, batch=2), WARPERS[name]
    _, logits = case.choose(greedy=True)
    tokens, logprobs = case.children(6, **options)
    exact = (reference.warp(logits, **warping(options)) + case.made()).double().log_softmax(-1).clamp(max=-1e-4)
    assert (tokens.sort().values.diff() > 0).all(), "a token twice"
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, tokens.long()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logprobs.double(), exact.topk(6).values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 70, 24), *LARGE], ids=str)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_rows_do_not_depend_on_each_other(name, shape, device, dtype, fixed_order):
    case, options = Case(device, dtype, *shape), WARPERS[name]
    whole = *case.choose(**options), *case.children(4, **options)
    for count in (1, 2, 7, 16, 33, 64):
        if count == shape[0]:
            continue
        last = slice(shape[0] - count, None)
        part = *case.choose(last, **options), *case.children(4, last, **options)
        assert all(torch.equal(some, every[last]) for some, every in zip(part, whole, strict=True)), count


@pytest.mark.parametrize("shape", [(6, 257, 24), *LARGE], ids=str)
@pytest.mark.parametrize("name", WARPERS)
def test_rows_of_a_batch_do_not_depend_on_each_other(name, shape, device, fixed_order):
    """Each warper finds its thresholds in its own way: the token, the children and their log-probabilities of a row are
    the same bits in a part of its sequence, without the other sequence, and beside rows that are something else."""
    case, options = Case(device, torch.float16, *shape, batch=2), WARPERS[name]
    nodes = case.rows // 2
    whole = *case.choose(**options), *case.children(5, **options)
    for sequence, first, last in ((0, nodes - 1, nodes), (1, 1, nodes)):
        part, rows = copy.copy(case), slice(sequence * nodes + first, sequence * nodes + last)
        part.seeds, part.streams = case.seeds[sequence:][:1].clone(), case.streams[sequence:][:1].clone()
        chosen = *part.choose(rows, **options), *part.children(5, rows, **options)
        assert all(torch.equal(some, every[rows]) for some, every in zip(chosen, whole, strict=True)), rows
    others, kept = copy.copy(case), torch.tensor([1, case.rows - 1], device=device)
    others.x = case.x.roll(1, 0) * 3
    others.x[kept] = case.x[kept]
    beside = *others.choose(**options), *others.children(5, **options)
    assert not torch.equal(beside[1], whole[1])
    assert all(torch.equal(some[kept], every[kept]) for some, every in zip(beside, whole, strict=True))


@pytest.mark.parametrize("count", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("size", [5, 61, 64, 65, 200, 4097])
def test_children_of_scores_at_the_edges(size, count, device):
    """The lowest ids of equal scores, across groups of 64 too; -0 equals 0; nothing where nothing can come up."""
    if count > size:
        return
    inf, nan = float("inf"), float("nan")
    random = torch.randn(size, generator=torch.Generator().manual_seed(size))
    rows = {name: torch.full((size,), -inf) for name in ("none", "one", "three")}
    rows["one"][-1], rows["three"][[0, size // 2, size - 1]] = 0.5, torch.tensor([1.0, 2.0, 1.0])
    rows |= {"equal": torch.zeros(size), "zeros": torch.zeros(size) * random.sign(), "two values": random.sign()}
    rows |= {"ends": -torch.arange(size).remainder(64).float(), "random": random, "rounded": (random * 2).round()}
    for name, value in (("nan", nan), ("inf", inf)):
        rows[name] = random.clone()
        rows[name][size // 3] = value
    scores = torch.stack([*rows.values()])
    groups, whole = groups_of(size), F.pad(scores, (0, -size % GROUP), value=-inf).view(len(rows), -1, GROUP)
    maxima = torch.where(whole.isnan(), inf, whole).amax(2)
    masses = ((whole - maxima[..., None]).exp().nan_to_num() * 2**24 + 0.5).int().sum(2, dtype=torch.int32)
    given = [tensor.contiguous().to(device) for tensor in (scores, maxima, masses)]
    tokens = torch.full((len(rows), count), -9, dtype=torch.int32, device=device)
    logprobs = torch.full((len(rows), count), nan, device=device)
    scratch = torch.empty(3 * len(rows) * (groups + size + 64) * 64, device=device)
    one = torch.zeros(1, 1, dtype=torch.int32, device=device)
    sampling = Sampling(one, one, one, 1.0, 0, 1.0, 0.0, greedy=True)
    launch_children(given[0], sampling, AS_THEY_ARE, Maxima(*given[1:]), Parts(scratch), tokens, logprobs)
    for name, row, found, values in zip(rows, scores, tokens.tolist(), logprobs, strict=True):
        possible = [] if name in ("nan", "inf") else [i for i in range(size) if row[i] > -inf]
        best = sorted(possible, key=lambda i: (-row[i], i))[:count]
        assert found == best + [0] * (count - len(best)), name
        assert values.isfinite().sum() == len(best), name
        if best:
            expected = row.double().log_softmax(0)[best].clamp(max=-1e-4)
            torch.testing.assert_close(values[: len(best)].double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_eight_bits():
    """Each weight is the nearest that its type and its row's scale allow; a row of zeros stays one."""
    head = torch.randn(5, 300, dtype=torch.float64) * torch.tensor([[1e-3], [1.0], [0.0], [40.0], [7.0]])
    narrowed, scales = lm_head.to_eight_bits(head)
    assert narrowed.shape == (5, 384) and scales.shape == (5,) and scales.dtype == torch.float32
    left = lm_head.from_eight_bits(narrowed, scales, 300)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[values.isfinite()]
    for row, kept, scale in zip(head, left, scales, strict=True):
        nearest = (row[:, None] - values * scale.double()).abs().amin(1)
        assert ((row - kept).abs() <= nearest + 1e-6 * row.abs()).all()
        torch.testing.assert_close(kept.abs().amax(), row.abs().amax().float())


@pytest.mark.parametrize("shape", [(6, 257, 24), *LARGE, *((rows, 50257, 1024) for rows in (1, 8, 16) if GPU)], ids=str)
def test_head_in_eight_bits(shape, device, error_ratio):
    """As any head, of the weights that are left; refused where no kernel takes it."""
    case = Case(device, torch.bfloat16, *shape)
    if not lm_head.eight_bits_run(case.x.dtype, shape[2], device):
        with pytest.raises(ValueError, match=r"heads in 8 bits run on Hopper, .* leave the head as it is"):
            case.narrow().choose()
        return
    case.narrow()
    _, logits = case.choose(greedy=True)
    norm = F.layer_norm(case.x.double(), shape[2:], case.weight.double(), case.bias.double(), 1e-5)
    plain = F.layer_norm(case.x, shape[2:], case.weight, case.bias, 1e-5) @ case.head.to(case.x.dtype).T
    assert error_ratio(logits, plain, norm @ case.head.double().T) <= 2
    assert torch.equal(case.choose(greedy=True)[0].long(), logits.argmax(-1))
    exact = (logits + case.made()).double().log_softmax(-1).clamp(max=-1e-4)
    made = tokens, logprobs = case.children(5)
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, tokens.long()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logprobs.double(), exact.topk(5).values, rtol=1e-5, atol=1e-4)
    part = case.children(5, slice(-1, None))
    assert all(torch.equal(some, every[-1:]) for some, every in zip(part, made, strict=True))


def test_a_drafts_head_has_eight_bits_where_they_run(monkeypatch):
    ops, head, cpu = TritonBackend(), torch.randn(7, 24).half(), torch.device("cpu")
    for invariant, runs, dtype in ((True, True, None), (False, False, None), (False, True, torch.float8_e4m3fn)):
        monkeypatch.setattr(lm_head, "eight_bits_run", lambda *shape, runs=runs: runs)
        kept = ops.pack_head(head, invariant)
        assert kept.weight.dtype == ops.head_dtype(head.dtype, 24, cpu, invariant) == (dtype or head.dtype)
        assert (kept.scales is None) is (dtype is None)
        model = GPT2(make_gpt2(vocab_size=67), ops, cpu, torch.float16, invariant=invariant)
        inner = 4 * model.config.n_embd
        layers = model.config.n_layer * (4 * model.config.n_embd + 2 * inner) * model.config.n_embd
        assert model.weight_bytes == 2 * layers + 67 * model.config.n_embd * (2 if dtype is None else 1)


def test_opcheck(device):
    case = Case(device, torch.float32, 2, 61, 24)
    args, scratch = (*case.at()[:5], None, *case.at()[5:]), case.scratch
    scratch.partials.zero_()
    out, logits = torch.zeros(2, dtype=torch.int32, device=device), torch.zeros(2, 61, device=device)
    rest = (0.9, 5, 1.0, 0.0, False)
    for given in (None, logits):
        call = (*args, *rest, None, given, out, scratch.partials, scratch.counters)
        torch.library.opcheck(torch.ops.stagedspec.lm_head_choose.default, call)
    tokens, logprobs = torch.zeros(2, 3, dtype=torch.int32, device=device), torch.zeros(2, 3, device=device)
    call = (*args, *rest, 1.0, None, tokens, logprobs, scratch.partials, scratch.counters)
    torch.library.opcheck(torch.ops.stagedspec.lm_head_topm.default, call)


def test_errors(device):
    case = Case(device, torch.float32, 2, 61, 24)
    with pytest.raises(ValueError, match=r"head must have the shape \[any, 24\], got \[61, 23\]"):
        case.head = case.head[:, :23].contiguous()
        case.choose()
    case = Case(device, torch.float32, 2, 61, 24)
    case.head = case.head.half()
    with pytest.raises(ValueError, match=r"head must be torch.float32, got torch.float16"):
        case.choose()
    case = Case(device, torch.float32, 2, 61, 24)
    with pytest.raises(ValueError, match="m from 1 to the vocabulary 61"):
        case.children(62)
    with pytest.raises(ValueError, match="noise must have the shape"):
        case.choose(noise=case.noise[:, :3].contiguous())
    case = Case(device, torch.float32, 2, 1003, 24)
    case.scratch = Scratch.of([lm_head.scratch_size(2, 1003, 24, through_memory=False)], device)
    with pytest.raises(ValueError, match="scratch"):
        case.choose(top_k=5)


def test_hopper_has_room():
    """A ring of a few slots at least, beside x or with its blocks, whatever the width and the number of rows."""
    for width in range(8, 7681, 8):
        for count, noisy, itemsize in itertools.product((1, 9, 20, 200), (False, True), (1, 2)):
            chosen = hopper.settings(count, width, noisy, itemsize=itemsize)
            tokens, slots = chosen["TOKENS"], chosen["SLOTS"]
            most = hopper.TOKENS // 2 if itemsize == 1 else hopper.TOKENS
            assert tokens >= max(8, min(count, most))  # the matrix instructions take 8 at least
            assert slots >= (hopper.RING if chosen["PROGRAMS"] == 1 else hopper.SHORT_RING)
            x = -(-width // chosen["BLOCK_K"]) if chosen["STAYS"] else slots
            noise = hopper.ROWS * tokens * 2 if noisy else 0
            taken = (slots * hopper.ROWS * itemsize + x * tokens * 2) * chosen["BLOCK_K"] + slots * 8 + noise
            assert (taken + hopper.RESERVED) * chosen["PROGRAMS"] <= SHARED + hopper.RESERVED


@pytest.mark.parametrize(("x_from", "head_from"), [(1, 0), (0, 1)])
def test_hopper_refuses_views(x_from, head_from, monkeypatch):
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 1)
    x = torch.zeros(65, dtype=torch.bfloat16)[x_from:][:64].view(1, 64)
    head = torch.zeros(16 * 64 + 1, dtype=torch.bfloat16)[head_from:][: 16 * 64].view(16, 64)
    one, many = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 64)
    sampling = Sampling(one, one, one, 1.0, 0, 1.0, 0.0, greedy=True)
    with pytest.raises(ValueError, match="must start at a multiple of 16 bytes"):
        hopper.launch(x, head, None, sampling, AS_THEY_ARE, many, 0, Outputs(Maxima(many, one), one, one, True, False))
