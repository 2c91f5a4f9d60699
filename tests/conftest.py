"""Small random models and helpers that several test files share. The oracle everywhere is transformers."""

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="stagedspec-tests-")  # nor leave anything in the user's cache

import numpy
import pytest
import torch
from hypothesis import settings

# Before anything imports triton, as transformers does: its own functions are interpreted or not from then on.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._pytree import tree_map_only
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from triton.runtime import interpreter

torch.set_num_threads(1)
# The interpreter works out for every sum whether it overflows, a quarter of its time, and without `debug` tells nobody.
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

VOCAB, POSITIONS = 61, 48

# Changes to GPT2Config that change the forward pass.
CONFIGS = {
    "gelu_new": {},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "quick_gelu": {"activation_function": "quick_gelu"},
    "tanh": {"activation_function": "tanh"},
    "n_inner-odd": {"n_inner": 37},
    "unscaled": {"scale_attn_weights": False},
    "scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "epsilon": {"layer_norm_epsilon": 0.3},
    "untied-one-head": {"tie_word_embeddings": False, "n_head": 1, "n_embd": 20},
    "heads-6-vocabulary-even": {"n_head": 6, "vocab_size": 50, "n_layer": 1},
}


def make_gpt2(seed: int = 0, **changes) -> GPT2LMHeadModel:
    """A GPT-2 of random weights, large enough that its logits are far apart."""
    options = {
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    model = GPT2LMHeadModel._from_config(GPT2Config(**(options | changes)), attn_implementation="eager")
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1: give them values that matter
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif ".ln_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def make_draft(kind: str, target: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """ "good": the target with noise; "random": another small model; "adversarial": prefers what the target likes
    least; "target": the target itself."""
    if kind == "target":
        return target
    if kind == "random":
        return make_gpt2(99, vocab_size=target.config.vocab_size, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    draft = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if kind == "good":
            for parameter in draft.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std(correction=0), alpha=0.06)
        else:
            draft.lm_head.weight = torch.nn.Parameter(-target.lm_head.weight.detach())
            draft.config.tie_word_embeddings = False
    return draft


def left_pad(prompts: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [B, longest]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def random_prompts(lengths: list[int], vocab_size: int = VOCAB, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def byte_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    """One token a byte: characters beyond ASCII are split over several tokens."""
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


ROUNDING = 1e-5  # of small models' logits in fp32, beside the largest one: measured are at most 8e-7


def oracle_generate(model: GPT2LMHeadModel, ids, mask, new: int, **options) -> torch.Tensor:
    """transformers' own greedy `generate`, where its best two tokens lie further apart than fp32 rounds: only then must
    another order of sums, on a GPU above all, give the same tokens."""
    tokens, gaps = oracle_gaps(model, ids, mask, new, **options)
    assert gaps.min() > ROUNDING, f"the oracle's best tokens are within rounding, {gaps.min():.1e}: take another seed"
    return tokens


def oracle_gaps(model: GPT2LMHeadModel, ids, mask, new: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own greedy `generate`, and of each row the least gap between its best two logits, over the largest
    of all."""
    options |= {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)
    logits = torch.stack(output.logits)
    best, second = logits.topk(2).values.unbind(-1)
    return output.sequences, (best - second).amin(0) / logits.abs().max()


@pytest.fixture(scope="session")
def target() -> GPT2LMHeadModel:
    return make_gpt2(0)


@pytest.fixture(scope="session")
def drafts(target) -> dict[str, GPT2LMHeadModel]:
    return {kind: make_draft(kind, target) for kind in ("good", "random", "adversarial", "target")}


# ---------------------------------------------------------------- decoders: on a CPU, and on a GPU where there is one

GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Place:
    """Where a test's decoders run, and through which backend. Its oracle stays where it is: transformers on a CPU."""

    device: str
    backend: str

    def decoder(self, target: GPT2LMHeadModel, draft=None, ngram=None, **options):
        """A `Decoder` there, in fp32 unless told otherwise."""
        from stagedspec import Decoder

        known = {"device": self.device, "backend": self.backend, "dtype": "float32"}
        return Decoder.from_pretrained(target, draft=draft, ngram=ngram, **(known | options))

    def generate(self, model: GPT2LMHeadModel, *inputs, **options):
        """`model.generate` there: with all tensors, and the results' back again."""
        if self.device == "cpu":
            return model.generate(*inputs, **options)
        inputs, options = tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), (inputs, options))
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, _copy(model, self.device).generate(*inputs, **options))


@cache
def _copy(model: GPT2LMHeadModel, device: str) -> GPT2LMHeadModel:
    return copy.deepcopy(model).to(device)


PLACES = {"torch-cpu": Place("cpu", "torch")} | ({"triton-gpu": Place("cuda", "triton")} if GPU else {})


@pytest.fixture(scope="session", params=PLACES)
def place(request) -> Place:
    return PLACES[request.param]


@pytest.fixture(scope="session")
def make_decoder(place):
    return place.decoder


# ---------------------------------------------------------------- kernels: on a GPU, else in Triton's interpreter

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def error_ratio() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], float]:
    """Our error against an fp64 reference over that of plain torch in the same low precision (at least 1e-6)."""

    def ratio(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
        scale = exact.norm().item()
        error, allowed = ((got.double() - exact).norm().item() / scale for got in (ours, plain))
        return error / max(allowed, 1e-6)

    return ratio


@pytest.fixture
def fixed_order(monkeypatch) -> None:
    """The interpreter multiplies with numpy, whose order of summation depends on how many columns there are: from here
    on it is one, the order of the inner dimension. On a GPU nothing changes."""

    def matmul(a: numpy.ndarray, b: numpy.ndarray, dtype=None) -> numpy.ndarray:
        out = numpy.zeros((a.shape[0], b.shape[1]), dtype or a.dtype)
        for column, row in zip(a.T.astype(out.dtype), b.astype(out.dtype), strict=True):
            out += column[:, None] * row
        return out

    if not GPU:
        monkeypatch.setattr(numpy, "matmul", matmul)
