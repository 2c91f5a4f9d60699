"""Small random models, places to run them, and what else several test files use. The oracle everywhere is transformers.

Import it before triton: it chooses the interpreter where there is no GPU.
"""

import atexit
import copy
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="stagedspec-tests-")  # nor leave anything in the user's cache
# All processes of a run keep what Numba compiled in the first one's folder: compiling it takes half a minute.
os.environ.setdefault("NUMBA_CACHE_DIR", os.environ["XDG_CACHE_HOME"] + "/numba")
# Processes that tests start have one core, as each process of pytest-xdist has. Tests of threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Before anything imports triton, as transformers does: its own functions are interpreted or not from then on.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._pytree import tree_map_only
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from triton import language as tl
from triton.runtime import interpreter

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
torch.set_num_threads(1)
# The interpreter works out for every sum whether it overflows, a quarter of its time, and without `debug` tells nobody.
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
_patch_lang = interpreter._patch_lang


def _patch_lang_once(function):
    """The interpreter patches triton.language at each launch, and again whenever a kernel calls a function. That is a
    quarter of its time, and changes nothing where both modules are patched: their functions are no builtins then."""
    unpatched = tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load)
    return _patch_lang(function) if unpatched else interpreter._LangPatchScope()


interpreter._patch_lang = _patch_lang_once
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


def slow_but(quick: Collection, cases: Iterable) -> list:
    """Parameters of a test: those that are not among `quick` are marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


# ---------------------------------------------------------------- references


def transformers_warp(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """In the order and under the conditions of transformers' `_get_logits_processor`."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None and top_k != 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, logits.clone())


def g_test(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The p-value of counts under expected probabilities. Cells that expect less than five draws are put together."""
    total = counts.sum()
    assert counts[expected == 0].sum() == 0, "drew what cannot come up"
    expected = expected * total
    rare = expected < 5
    if expected[rare].sum() >= 5:
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    else:
        counts, expected = counts[~rare], expected[~rare]
    seen = counts > 0
    g = 2 * (counts[seen] * (counts[seen] / expected[seen]).log()).sum() + 2 * (expected.sum() - counts.sum())
    freedom = torch.tensor(float(len(counts) - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, g.clamp(min=0) / 2)) if freedom > 0 else 1.0


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


# ---------------------------------------------------------------- kernels: on a GPU, else in Triton's interpreter

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])


def check_cache(model, tokens: list[int], cache, index: int) -> None:
    """Row `index` of a KV cache holds what a model of transformers makes of these tokens."""
    with torch.no_grad():
        past = model(torch.tensor([tokens]), use_cache=True).past_key_values
    rows = cache.rows[:, index, cache.tree_rows : cache.tree_rows + len(tokens)].cpu()  # [layers, L, 2, H, D]
    for layer, ours in zip(past.layers, rows, strict=True):
        for which, theirs in enumerate((layer.keys, layer.values)):
            torch.testing.assert_close(ours[:, which].float(), theirs[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
