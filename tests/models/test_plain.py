"""A model object is a plain GPT-2, and decoded as transformers decodes it, or refused by name, at both entry points."""

import copy
import functools
import re
import warnings
from functools import partial

import pytest
import torch
from helpers import make_gpt2, random_prompts, slow_but
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AttentionInterface, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

from stagedspec import Decoder, TreeConfig
from stagedspec.hf import custom_generate
from stagedspec.models.plain_gpt2 import check_plain

on_cpu = partial(Decoder.from_pretrained, device="cpu")
IDS = torch.tensor(random_prompts([5], seed=3))
NEW, TREE = 12, TreeConfig()


class Shifted(GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.flip(-1)
        return out


class Called(GPT2LMHeadModel):
    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        out.logits = out.logits.flip(-1)
        return out


class OtherInputs(GPT2LMHeadModel):
    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs)


class OtherMLP(modeling_gpt2.GPT2MLP):
    def forward(self, hidden_states):
        return -super().forward(hidden_states)


class Named(GPT2LMHeadModel):
    """Adds, and overrides nothing that a forward pass goes through."""

    def note(self):
        return "mine"

    def num_parameters(self, *args, **kwargs):
        return 0


class Adapted(nn.Module):
    """What adapters look like."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(24, 2)

    def forward(self, x):
        return self.base_layer(x)


def wrapped(forward):
    @functools.wraps(forward)
    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits.flip(-1)
        return out

    return changed


def put(path, value):
    """Replaces an attribute of a module of the model."""

    def change(model):
        *names, last = path.split(".")
        module = functools.reduce(getattr, names, model)
        setattr(module, last, value(getattr(module, last)) if callable(value) else value)

    return change


def at(path, act):
    return lambda model: act(model.get_submodule(path))


def become(path, kind):
    return lambda model: setattr(model.get_submodule(path), "__class__", kind)


def derive(path, **members):
    """A subclass of a module's class that defines members."""
    return at(path, lambda one: setattr(one, "__class__", type("Own", (type(one),), members)))


def output_capturing_hook(module, inputs, output):
    """Named like a hook of transformers' that changes nothing."""
    return -output


def own_attention(model, layer=None):
    AttentionInterface.register("of-a-test", lambda *args, **kwargs: None)
    config = model.config
    if layer is not None:
        config = model.transformer.h[layer].attn.config = copy.deepcopy(config)
    config._attn_implementation_internal = "of-a-test"


def to_nan(model):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 2] = torch.nan


MLP, ATTENTION = "transformer.h.1.mlp", "transformer.h.0.attn"
REFUSED = {
    "hook": (at("lm_head", lambda one: one.register_forward_hook(lambda *_: None)), "forward hook .*'lm_head'.*remove"),
    "hook-on-all": (lambda m: m.register_forward_hook(lambda *_: None), "forward hook .*the model itself.*remove"),
    "pre-hook": (at(MLP, lambda one: one.register_forward_pre_hook(lambda *_: None)), f"forward hook .*'{MLP}'"),
    "hook-of-a-harmless-name": (
        at("lm_head", lambda one: one.register_forward_hook(output_capturing_hook)),
        "forward hook .*output_capturing_hook",
    ),
    "forward-of-a-subclass": (become("", Shifted), "forward of its own at the model itself"),
    "call-of-a-subclass": (become("", Called), "__call__ of its own"),
    "inputs-of-a-subclass": (become("", OtherInputs), "prepare_inputs_for_generation of its own"),
    "forward-of-a-layers-subclass": (become(MLP, OtherMLP), f"forward of its own at '{MLP}'"),
    "forward-set": (put(f"{MLP}.forward", lambda forward: lambda x: -forward(x)), f"forward of its own at '{MLP}'"),
    "forward-wrapped": (put("forward", wrapped), "forward of its own"),
    "forward-wrapped-and-compiled": (put("forward", lambda f: torch.compile(wrapped(f))), "forward of its own"),
    "forward-of-another-model": (
        lambda m: setattr(m, "forward", copy.deepcopy(m).forward),
        "forward of its own",
    ),
    "activation": (put(f"{MLP}.act", lambda _: nn.ReLU()), "ReLU in place of .*NewGELUActivation.*activation_function"),
    "adapter": (put(f"{MLP}.c_fc", Adapted), f"Adapted in place of .*Conv1D at '{MLP}.c_fc'.*merge_and_unload"),
    "head-with-a-bias": (put("lm_head", lambda _: nn.Linear(24, 61)), "a parameter 'lm_head.bias'"),
    "norm-without-bias": (
        put("transformer.ln_f", lambda _: nn.LayerNorm(24, bias=False)),
        "no parameter '.*ln_f.bias'",
    ),
    "another-norm": (put("transformer.ln_f", lambda _: nn.RMSNorm(24)), "RMSNorm in place of .*LayerNorm"),
    "quantised": (
        put("lm_head", lambda _: torch.ao.nn.quantized.dynamic.Linear(24, 61)),
        "quantized.* in place of .*without quantisation",
    ),
    "weight-norm": (at(f"{MLP}.c_fc", parametrizations.weight_norm), "Parametrized.*remove_parametrizations"),
    "old-weight-norm": (at(f"{MLP}.c_fc", nn.utils.weight_norm), "WeightNorm.*remove_weight_norm"),
    "pruned": (at("lm_head", lambda one: prune.l1_unstructured(one, "weight", 0.3)), "L1Unstructured.*prune.remove"),
    "compiled-block": (
        lambda m: m.transformer.h.__setitem__(0, torch.compile(m.transformer.h[0])),
        r"OptimizedModule in place of .*GPT2Block.*\._orig_mod",
    ),
    "dropout": (at(f"{ATTENTION}.resid_dropout", nn.Module.train), r"training mode.*model.eval\(\)"),
    "dropout-of-attention": (put(f"{ATTENTION}.training", True), rf"'{ATTENTION}' is in training mode.*eval\(\)"),
    "all-training": (nn.Module.train, r"training mode, where dropout .*model.eval\(\)"),
    "epsilon": (put("transformer.ln_f.eps", 0.5), "eps=0.5 at 'transformer.ln_f', where the config says 1e-05"),
    "scaling": (put(f"{ATTENTION}.scaling", 3.0), "scaling=3.0"),
    "longest-norm": (put("transformer.wte.max_norm", 0.1), "max_norm=0.1"),
    "layers-swapped": (put("transformer.h", lambda h: nn.ModuleList([h[1], h[0]])), "layer_idx=1"),
    "layer-gone": (put("transformer.h", lambda h: nn.ModuleList([h[0]])), "no module 'transformer.h.1'"),
    "another-module": (lambda m: m.add_module("value_head", nn.Linear(2, 2)), "has a module 'value_head'"),
    "attention": (own_attention, "attention of its own, 'of-a-test'.*set_attn_implementation"),
    "attention-of-one-layer": (lambda m: own_attention(m, 1), "attention of its own, 'of-a-test'"),
    "positions": (
        put("transformer.wpe", lambda _: nn.Embedding(80, 24)),
        r"wpe.weight' of shape \[80, 24\], not \[48,",
    ),
    "vocabulary": (put("config.vocab_size", 50), r"wte.weight' of shape \[61, 24\], not \[50, 24\]"),
    "weight-as-a-property": (
        derive(f"{MLP}.c_fc", weight=property(lambda one: -one._parameters["weight"])),
        f"a weight of its own at '{MLP}.c_fc'",
    ),
    "buffer-for-a-bias": (
        at("lm_head", lambda one: (delattr(one, "bias"), one.register_buffer("bias", torch.ones(61)))),
        "attribute 'bias' over the part of that name at 'lm_head'",
    ),
    "weight-hidden": (
        at(f"{MLP}.c_fc", lambda one: vars(one).update(weight=one.weight * 2)),
        "attribute 'weight' over",
    ),
    "layer-hidden": (at("transformer", lambda one: vars(one).update(ln_f=nn.Identity())), "attribute 'ln_f' over"),
    "activation-hidden": (at(MLP, lambda one: vars(one).update(act=nn.ReLU())), "attribute 'act' over"),
    "sparse": (
        at("lm_head", lambda one: setattr(one, "weight", nn.Parameter(one.weight.detach().to_sparse()))),
        "sparse parameter 'lm_head.weight'.*to_dense",
    ),
    "call-compiled-by-hand": (
        put(f"{MLP}._compiled_call_impl", lambda _: lambda x: x),
        "_compiled_call_impl of its own",
    ),
    "layers-in-another-order": (
        derive("transformer.h", __iter__=lambda one: reversed([*one._modules.values()])),
        "a __iter__ of its own at 'transformer.h'",
    ),
    "checkpointing": (
        lambda m: (m.gradient_checkpointing_enable(), m.train()),
        "gradient checkpointing is on at 'transformer.*, in training mode.*model.eval",
    ),
    "accelerate": (
        at(MLP, lambda one: setattr(one, "_hf_hook", object())),
        f"a hook of accelerate at '{MLP}'.*device_map=None.*remove_hook_from_module",
    ),
    "whole-numbers": (
        put("lm_head.weight", lambda weight: nn.Parameter(weight.long(), requires_grad=False)),
        "has a Parameter of int64 at 'lm_head.weight'.*without quantisation",
    ),
    "meta": (lambda m: m.to("meta"), "wte.weight' is on the meta device.*folder"),
    "offloaded": (at(MLP, lambda one: one.to("meta")), f"'{MLP}.c_fc.weight' is on the meta device"),
    "dtypes": (at("transformer.ln_f", nn.Module.double), r"several dtypes, float32, float64: use model.to\(dtype\)"),
    "not-finite": (to_nan, f"'{MLP}.c_proj.weight' holds values that are not finite"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    change, message = REFUSED[name]
    model, good = make_gpt2(0), make_gpt2(1)
    change(model)
    ways = {
        "target": [
            lambda: on_cpu(model, good),
            lambda: good.__class__.generate(model, IDS, max_new_tokens=2, custom_generate=custom_generate(good)),
        ],
        "draft": [
            lambda: on_cpu(good, model),
            lambda: on_cpu(good).generate(IDS, max_new_tokens=2, assistant_model=model),
            lambda: good.generate(IDS, max_new_tokens=2, custom_generate=custom_generate(model)),
            lambda: good.generate(IDS, max_new_tokens=2, assistant_model=model, custom_generate=custom_generate()),
        ],
    }
    for role, calls in ways.items():
        for call in calls:
            if name == "vocabulary" and role == "draft":
                message = "wte.weight' of shape"
            with pytest.raises(ValueError, match=f"(?s)^{role}|^assistant_model") as refusal:
                call()
            assert re.search(message, str(refusal.value), re.DOTALL), (role, str(refusal.value))


HARMLESS = {
    "subclass": become("", Named),
    "compiled-forward": put("forward", lambda forward: torch.compile(forward, backend="eager")),
    "compiled": lambda m: m.compile(backend="eager"),
    "no-grad": put("forward", lambda forward: torch.no_grad()(forward)),
    "no-dropout": put("transformer.drop", lambda _: nn.Identity()),
    "outputs-captured": lambda m: m(IDS, output_attentions=True, output_hidden_states=True),
    "gradients-of-inputs": lambda m: m.enable_input_require_grads(),
    "checkpointing": lambda m: m.gradient_checkpointing_enable(),
    "eager": lambda m: m.set_attn_implementation("eager"),
    "backward-hook": at(MLP, lambda one: one.register_full_backward_hook(lambda *_: None)),
    "buffer": lambda m: m.register_buffer("counts", torch.zeros(3)),
    "head-of-its-own": put("lm_head.weight", lambda weight: nn.Parameter(weight.detach().flip(0))),
    "dropout-of-nothing": lambda m: (
        [setattr(one, "p", 0.0) for one in m.modules() if isinstance(one, nn.Dropout)] and m.train()
    ),
    "renamed": lambda m: setattr(m, "name_or_path", "mine"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", slow_but(HARMLESS.keys() - {"compiled-forward", "compiled"}, HARMLESS)
)  # torch.compile is slow
def test_harmless_changes_are_let_through(name):
    model, draft = make_gpt2(0), make_gpt2(1)
    HARMLESS[name](model)
    with torch.no_grad():
        expected = model.generate(IDS, max_new_tokens=NEW, do_sample=False)
    for tree in ({"mode": "autoregressive"}, {"tree": TREE}):
        ours = model.generate(IDS, max_new_tokens=NEW, custom_generate=custom_generate(draft, **tree))
        assert torch.equal(ours, expected)
        assert torch.equal(on_cpu(model, draft).generate(IDS, max_new_tokens=NEW, **tree), expected)


def test_autocast_is_told():
    """Its dtype is not followed."""
    model = make_gpt2(0)
    expected = model.generate(IDS, max_new_tokens=NEW)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with pytest.warns(UserWarning, match="target: the forward at the model itself runs under autocast"):
        decoder = on_cpu(model)
    assert torch.equal(decoder.generate(IDS, max_new_tokens=NEW, mode="autoregressive"), expected)


def test_a_class_that_was_changed_for_all(monkeypatch):
    model, forward = make_gpt2(0), modeling_gpt2.GPT2MLP.forward
    monkeypatch.setattr(modeling_gpt2.GPT2MLP, "forward", lambda self, x: -forward(self, x))
    with pytest.raises(ValueError, match=r"forward of its own at 'transformer.h.0.mlp'"):
        check_plain(model, "target")


@pytest.mark.parametrize(
    "register", [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook]
)
def test_global_hooks(register):
    model = make_gpt2(0)
    decoder = on_cpu(model)
    handle = register(lambda *_: None)
    try:
        with pytest.raises(ValueError, match=r"global forward hook .*remove"):
            on_cpu(model)
        with pytest.raises(ValueError, match=r"global forward hook .*remove"):  # that has come since
            decoder.generate(IDS, max_new_tokens=2, mode="autoregressive")
    finally:
        handle.remove()
    check_plain(model, "target")


def test_plain_models_of_all_kinds_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (
            make_gpt2(0),
            make_gpt2(0).half(),
            make_gpt2(0, tie_word_embeddings=False),
            copy.deepcopy(make_gpt2(0)),
        ):
            check_plain(model, "target")


class Wrapper(nn.Module):
    """What DataParallel, PEFT and others do with a model."""

    def __init__(self, model, name):
        super().__init__()
        setattr(self, name, model)

    def __getattr__(self, name):
        if name == "merge_and_unload" and "base_model" in self._modules:
            return lambda: self.base_model
        return super().__getattr__(name)


def test_wrapped_models_name_the_way_out():
    model = make_gpt2(0)
    wrappers = {
        r"OptimizedModule: give the model inside the compiled one, \._orig_mod": torch.compile(make_gpt2(1)),
        r"Wrapper: merge the adapter .*merge_and_unload\(\)": Wrapper(make_gpt2(1), "base_model"),
        r"Wrapper: give the model inside, \.module": Wrapper(make_gpt2(1), "module"),
    }
    for message, wrapper in wrappers.items():
        calls = [
            lambda wrapper=wrapper: on_cpu(wrapper),
            lambda wrapper=wrapper: on_cpu(model, wrapper),
            lambda wrapper=wrapper: on_cpu(model).generate(IDS, assistant_model=wrapper),
            lambda wrapper=wrapper: model.generate(IDS, custom_generate=custom_generate(wrapper)),
            lambda wrapper=wrapper: model.generate(IDS, assistant_model=wrapper, custom_generate=custom_generate()),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.parametrize("role", ["target", "draft"])
def test_values_beyond_a_dtype(role):
    """fp32 values that fp16 does not hold would become infinite."""
    models = {"target": make_gpt2(0), "draft": make_gpt2(1)}
    with torch.no_grad():
        models[role].transformer.h[0].mlp.c_fc.weight[1, 1] = 1e5
    with pytest.raises(
        ValueError, match=f"{role}: .*c_fc.weight' holds values beyond the range of float16, 65504: use"
    ):
        on_cpu(**models, dtype="float16")
    on_cpu(**models, dtype="bfloat16")


@pytest.mark.parametrize("name", ["eager_attention_forward", "create_causal_mask"])
def test_functions_of_transformers_that_were_replaced(monkeypatch, name):
    """At once, and after a decoder was made."""
    model = make_gpt2(0)
    decoder = Decoder.from_pretrained(model, device="cpu")
    monkeypatch.setattr(modeling_gpt2, name, lambda *args, **options: None)
    for call in (
        lambda: check_plain(model, "target"),
        lambda: decoder.generate(torch.tensor([[1]]), max_new_tokens=2, mode="autoregressive"),
    ):
        with pytest.raises(ValueError, match="attention of its own, 'eager'"):
            call()


def test_an_eager_attention_that_was_registered(monkeypatch):
    model = make_gpt2(0)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "eager", lambda *args, **options: None)
    with pytest.raises(ValueError, match="attention of its own, 'eager'"):
        check_plain(model, "target")


def test_a_class_that_is_changed_after_a_decoder_was_made(monkeypatch):
    model = make_gpt2(0)
    decoder = Decoder.from_pretrained(model, device="cpu")
    monkeypatch.setattr(modeling_gpt2.GPT2MLP, "forward", lambda self, x: x)
    with pytest.raises(ValueError, match="forward of its own"):
        decoder.generate(torch.tensor([[1]]), max_new_tokens=2, mode="autoregressive")


def test_a_model_that_reads_arguments_by_itself():
    """Through its own generate that counts; a decoder cannot know of it."""

    class Own(GPT2LMHeadModel):
        def _get_logits_processor(self, *args, **options):
            return super()._get_logits_processor(*args, **options)

    model = make_gpt2(0)
    model.__class__ = Own
    decoder = Decoder.from_pretrained(model, device="cpu")
    with pytest.raises(ValueError, match=r"_get_logits_processor of its own.*custom_generate"):
        decoder.generate(torch.tensor([[1]]), max_new_tokens=2, mode="autoregressive")
    found = model.generate(
        torch.tensor([[1]]), max_new_tokens=4, custom_generate=custom_generate(mode="autoregressive"), do_sample=False
    )
    assert torch.equal(found, model.generate(torch.tensor([[1]]), max_new_tokens=4, do_sample=False))
