"""Whatever state of torch the caller, or another library, has set: the same tokens, and the state is left as it was."""

import contextlib
import warnings

import pytest
import torch
from helpers import POSITIONS, VOCAB, left_pad, make_draft, make_gpt2, random_prompts, slow_but
from torch.nn.attention import SDPBackend, sdpa_kernel

from stagedspec import Decoder, TreeConfig
from stagedspec.hf import custom_generate
from stagedspec.models.ngram_fit import fit_table

IDS, MASK = left_pad(random_prompts([6, 3], seed=71))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic(**options):
    torch.use_deterministic_algorithms(True, **options)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "none": contextlib.nullcontext,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "device-meta": lambda: torch.device("meta"),  # whatever is made there by mistake has no values
    "default-device-meta": lambda: default_device("meta"),
    "default-device-cpu": lambda: default_device("cpu"),
    "autocast-bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast-float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast-of-a-gpu": lambda: torch.autocast("cuda", torch.bfloat16),
    "deterministic": deterministic,
    "deterministic-warns": lambda: deterministic(warn_only=True),
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "grad": torch.enable_grad,
    "anomaly": torch.autograd.detect_anomaly,
    "math-attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "flash-attention": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
}


def favour(ids, scores):
    """A processor of the user's that changes what it is given."""
    scores[:, 7] += 0.5
    return scores


CALLS = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 3},
    "warped": {"do_sample": True, "seed": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "processed": {"logits_processor": [favour], "repetition_penalty": 1.2},
    "criterion": {"stopping_criteria": [lambda ids, scores: ids[:, -1] % 5 == 0]},
    "scores": {"do_sample": True, "seed": 3, "return_dict_in_generate": True, "output_scores": True},
}


def made(model, draft, dtype="float32"):
    """A decoder with a draft and a table."""
    generator = torch.Generator("cpu").manual_seed(1)
    table = fit_table([torch.randint(VOCAB, (400,), generator=generator, device="cpu")], VOCAB)
    return Decoder.from_pretrained(model, draft, table, device="cpu", dtype=dtype, tree=TreeConfig())


@pytest.fixture(scope="module")
def models():
    target = make_gpt2(0)
    return target, make_draft("good", target)


def tokens(decoder, options, new=16):
    output = decoder.generate(IDS, MASK, new, **options)
    return output if isinstance(output, torch.Tensor) else output.sequences


def state():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    )


@pytest.fixture(scope="module")
def plain(models):
    """A decoder that knows no other state than torch's own."""
    return made(*models)


@pytest.fixture(scope="module")
def expected(models, plain):
    """What it gives of CALLS."""
    found = {call: tokens(plain, options) for call, options in CALLS.items()}
    assert torch.equal(found["greedy"], models[0].generate(IDS, attention_mask=MASK, max_new_tokens=16))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", slow_but(["called", "made"], ["called", "made", "made-and-called"]))
@pytest.mark.parametrize("name", STATES)
def test_the_same_tokens(models, expected, name, where):
    """Set while a decoder is made, while it is called, or both."""
    inside, outside = STATES[name], contextlib.nullcontext
    with (outside if where == "called" else inside)():
        decoder = made(*models)
    for call, options in CALLS.items():
        with (outside if where == "made" else inside)():
            before = state()
            found = tokens(decoder, options)
            assert state() == before
        assert torch.equal(found, expected[call]), call
    assert torch.equal(tokens(decoder, {}), expected["greedy"])  # the state has left nothing behind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STATES)
def test_custom_generate_and_streams(models, plain, name):
    target, draft = models
    options = {"max_new_tokens": 16, "attention_mask": MASK, "do_sample": True, "seed": 3, "top_k": 20}
    expected, alone = plain.generate(IDS, **options), plain.generate(IDS[:1], max_new_tokens=16)
    with STATES[name]():
        found = target.generate(IDS, custom_generate=custom_generate(draft, tree=TreeConfig()), **options)
        streamed = [token for chunk in plain.stream(IDS[:1], 16) for token in chunk.tokens]
        inner = []
        for chunk in plain.stream(IDS[:1], 16):
            inner += chunk.tokens
            assert (torch.ones(1, device="cpu") @ torch.ones(1, device="cpu")).item() == 1
            assert torch.is_inference_mode_enabled() == (name == "inference")
    assert torch.equal(found, expected) and streamed == inner == alone[0, 6:].tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["float64", "bfloat16", "device-meta", "autocast-bfloat16", "deterministic", "inference"]
)
def test_the_kernels(name):
    """Without a GPU in their interpreter, which is slow: a very small model, and two steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = make_gpt2(0, n_layer=1, n_embd=16, n_head=1, vocab_size=16)
    tree = TreeConfig(3, 2, 1, prefetch=0)
    options = {"do_sample": True, "seed": 3, "top_p": 0.9, "stopping_criteria": [lambda ids, scores: ids[:, -1] == 5]}
    ids = torch.tensor([[1, 2, 3]])
    plain = Decoder.from_pretrained(target, target, device=device, dtype="float32", backend="torch", tree=tree)
    expected = plain.generate(ids, None, 4, **options)
    with STATES[name]():
        decoder = Decoder.from_pretrained(target, target, device=device, dtype="float32", backend="triton", tree=tree)
        assert torch.equal(decoder.generate(ids, None, 4, **options), expected)
    assert torch.equal(decoder.generate(ids, None, 4, **options), expected)  # on what that generation left


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["float64", "device-meta", "autocast-bfloat16", "deterministic", "inference"])
def test_trees_of_the_cost_model(models, name):
    """What measures and chooses trees, and the trees that follow the text."""
    expected = tokens(made(*models), CALLS["sampled"], new=POSITIONS - 6)
    with STATES[name]():
        decoder = Decoder.from_pretrained(*models, device="cpu", dtype="float32")
        assert torch.equal(tokens(decoder, CALLS["sampled"], new=POSITIONS - 6), expected)


def test_autocast_is_told(models):
    decoder = made(*models)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match=r"autocast has no effect .*float32"):
        decoder.generate(IDS, MASK, 4)
    half = made(*models, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):  # the dtype it computes in anyway
            half.generate(IDS, MASK, 4)
        with torch.autocast("cpu", enabled=False):
            decoder.generate(IDS, MASK, 4)


def test_seeds_come_from_the_generator_of_the_cpu(models):
    """Wherever tensors are made by default."""
    decoder = made(*models)
    torch.manual_seed(5)
    expected = decoder.generate(IDS, MASK, 8, do_sample=True)
    torch.manual_seed(5)
    with torch.device("meta"):
        assert torch.equal(decoder.generate(IDS, MASK, 8, do_sample=True), expected)
