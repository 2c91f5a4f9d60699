"""Checks that a model object is a plain GPT-2, so that `GPT2` computes the same forward pass.

A model object can be changed in ways that its config and the names of its weights do not show: hooks, a replaced
forward or module, adapters, quantisation, dropout left on. Every module is therefore compared with the one in an
unchanged GPT-2 of the same config. Whatever changes the forward pass is refused by name, with a way out.
"""

import functools
import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import GPT2LMHeadModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

# Methods that the forward pass and transformers' generation loop call.
_METHODS = (
    "forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "_gelu_python",
    "_upcast_and_reordered_attn", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample",
    "_prefill",
)  # fmt: skip
# Wrappers from these modules do not change what a function computes: torch.compile, no_grad, autocast (but the dtype).
_AUTOCAST = "torch.amp.autocast_mode"
_TRANSPARENT = ("torch._dynamo", "torch.utils._contextlib", _AUTOCAST, "accelerate.utils.operations")
# Hooks of transformers that do not change the output: for output_attentions, and for training adapters.
_HARMLESS_HOOKS = ("output_capturing_hook", "make_inputs_require_grads")
# Attributes that the forward pass does not read.
_IDLE = {
    "training", "gradient_checkpointing", "p", "inplace", "name_or_path", "loss_type", "padding_idx", "sparse",
    "scale_grad_by_freq", "num_embeddings", "embedding_dim", "in_features", "out_features", "nx",
}  # fmt: skip
# Names that a subclass may redefine without changing the output; `_METHODS` are checked separately.
_OF_A_CLASS = frozenset(
    ("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__init__", "__repr__",
     "__firstlineno__", "__static_attributes__", "extra_repr", *_METHODS)
)  # fmt: skip
_VALUES = frozenset((int, float, bool, str, tuple, type(None)))
_REPLACEABLE = frozenset(("act", *_METHODS))

OWN_GENERATE = "use transformers' own generate, without stagedspec"  # the advice that ends most refusals
_OWN = f"or {OWN_GENERATE}"
_MERGE = f"merge adapters into the weights (merge_and_unload), load without quantisation, {_OWN}"
_HOOK = "remove the hook (its handle's remove(); torch.nn.utils has prune.remove and remove_weight_norm), " + _OWN
_ACCELERATE = (
    "load the model without offloading (device_map=None), or remove it, "
    f"accelerate.hooks.remove_hook_from_module(model, recurse=True), {_OWN}"
)


def check_plain(model: GPT2LMHeadModel, role: str) -> None:
    """Raises ValueError, naming the module, for a model whose forward pass is not that of its config and weights.

    role ("target", "draft") is for messages. Values of weights are not checked. Warns of a forward under autocast,
    whose dtype has no effect here.
    """
    for table in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        if hook := _harmful(table):
            raise ValueError(f"{role}: torch has a global forward hook ({hook}), which may change the output: {_HOOK}")
    _check_attention(model, role)
    with torch.device("meta"):
        plain = dict(GPT2LMHeadModel(model.config).named_modules(remove_duplicate=False))
    found = dict(nn.Module.named_modules(model, remove_duplicate=False))  # even if a subclass overrides it
    for name, module in found.items():
        if name not in plain:
            _refuse(role, f"has a module {name!r}", _MERGE)
        _check_module(module, plain[name], name, role)
    if missing := [name for name in plain if name not in found]:
        _refuse(role, f"has no module {missing[0]!r}", f"make the config say what the model is, {_OWN}")
    parameters = list(nn.Module.parameters(model))
    for kind in ("device", "dtype"):
        names = sorted({str(getattr(one, kind)).removeprefix("torch.") for one in parameters})
        if len(names) > 1:
            raise ValueError(f"{role}: the weights are of several {kind}s, {', '.join(names)}: use model.to({kind})")


def _refuse(role: str, what: str, instead: str) -> None:
    raise ValueError(f"{role}: the model {what}, unlike a plain GPT-2 of its config: {instead}")


def _check_attention(model: GPT2LMHeadModel, role: str) -> None:
    for name, functions in _attention(model).items():
        if not all(map(_of_libraries, functions)):
            _refuse(role, f"has an attention of its own, {name!r}", "use model.set_attn_implementation('sdpa')")


def _attention(model: GPT2LMHeadModel) -> dict[str, list[Callable]]:
    """The functions that compute attention and its masks, by the name of each kind that the model uses."""
    # A layer may have a config of its own.
    configs = [model.config, *(vars(module).get("config") for module in nn.Module.modules(model))]
    found = {}
    for name in {getattr(config, "_attn_implementation", None) or "eager" for config in configs if config is not None}:
        found[name] = [
            table[name] for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS) if name in table
        ]
        if name == "eager":
            found[name].append(modeling_gpt2.eager_attention_forward)
        found[name].append(modeling_gpt2.create_causal_mask)
    return found


def _check_module(module: nn.Module, plain: nn.Module, name: str, role: str) -> None:
    """Compares one module with the one of an unchanged model. name: where it is in the model."""
    place = f"{name!r}" if name else "the model itself"
    if isinstance(plain, nn.Dropout) and type(module) is nn.Identity:
        plain = module  # never active here anyway
    if not isinstance(module, type(plain)) or nn.utils.parametrize.is_parametrized(module):
        own, wanted = (f"{type(one).__module__}.{type(one).__qualname__}" for one in (module, plain))
        _refuse(role, f"has {own} in place of {wanted} at {place}", _way_out(module))
    for table in (module._forward_hooks, module._forward_pre_hooks):
        if hook := _harmful(table):
            _refuse(role, f"has a forward hook ({hook}) at {place}", _HOOK)
    for method in _METHODS:
        _check_method(module, plain, method, place, role)
    compiled = module._compiled_call_impl  # what Module.compile() leaves
    if compiled is not None and not _module_of(compiled).startswith("torch."):
        _refuse(role, f"has a _compiled_call_impl of its own at {place}", f"use Module.compile(), {_OWN}")
    tables = plain._parameters.keys() | plain._modules.keys()
    if hidden := sorted(vars(module).keys() & tables) + sorted(module._buffers.keys() & tables):
        _refuse(role, f"has an attribute {hidden[0]!r} over the part of that name at {place}", f"remove it, {_OWN}")
    if changed := _redefined(module, plain, bool(name)):
        _refuse(role, f"has a {changed} of its own at {place}", f"use the model as transformers makes it, {_OWN}")
    for key, value in vars(plain).items():
        if key[0] != "_" and key not in _IDLE and _comparable(value):
            own = vars(module).get(key, value)
            if _content(own) != _content(value):
                _refuse(role, f"has {key}={own!r} at {place}, where the config says {value!r}", "make the two agree")
    _check_parameters(module, plain, name, role)
    if module.training and vars(module).get("gradient_checkpointing"):  # it drops the cache, and with it other bits
        raise ValueError(
            f"{role}: gradient checkpointing is on at {place}, in training mode, where transformers decodes without "
            "its cache: call model.eval() first"
        )
    active = isinstance(module, nn.Dropout) or hasattr(module, "attn_dropout")  # attention reads its own mode
    if module.training and active and cast(nn.Dropout, getattr(module, "attn_dropout", module)).p > 0:
        raise ValueError(
            f"{role}: {place} is in training mode, where dropout changes what the model says: call model.eval() first"
        )


def _check_parameters(module: nn.Module, plain: nn.Module, name: str, role: str) -> None:
    own, wanted = ({key: one for key, one in part._parameters.items() if one is not None} for part in (module, plain))
    for key in sorted(own.keys() ^ wanted.keys()):
        _refuse(role, f"has {'a' if key in own else 'no'} parameter '{name}.{key}'", _MERGE)
    for key, parameter in own.items():
        place = f"'{name}.{key}'"
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            kind = f"{type(parameter).__name__} of {str(parameter.dtype).removeprefix('torch.')}"
            _refuse(role, f"has a {kind} at {place}", _MERGE)
        if parameter.layout is not torch.strided:
            _refuse(role, f"has a sparse parameter {place}", f"make it dense (to_dense), {_OWN}")
        if parameter.shape != wanted[key].shape:
            _refuse(
                role, f"has a parameter {place} of shape {list(parameter.shape)}, not {list(wanted[key].shape)}",
                "make the config say what the model is (resize_token_embeddings does)",
            )  # fmt: skip
        if parameter.is_meta:
            raise ValueError(
                f"{role}: {place} is on the meta device and holds no values: load the model without offloading and "
                "with device_map=None, or give the checkpoint's folder"
            )


def _check_method(module: nn.Module, plain: nn.Module, method: str, place: str, role: str) -> None:
    """The method must be transformers' or torch's own, whether of the class or set on the object."""
    expected = getattr(type(plain), method, None)
    used = vars(module).get(method, getattr(type(module), method, None))
    if used is None:
        return
    if "_hf_hook" in vars(module):
        _refuse(role, f"has a hook of accelerate at {place}", _ACCELERATE)
    inner, autocast = _unwrapped(used, module)
    if inner is not expected or not _of_libraries(expected):
        _refuse(role, f"has a {method} of its own at {place}", f"use the model as transformers makes it, {_OWN}")
    if autocast:
        warnings.warn(
            f"{role}: the forward at {place} runs under autocast; here the model is decoded in the decoder's dtype, so "
            "that tokens whose logits nearly tie may differ",
            stacklevel=2,
        )


def _redefined(module: nn.Module, plain: nn.Module, part: bool) -> str | None:
    """The first name that a subclass redefines and that may change the output, or None.

    part: whether the module is a part of the model. There any name of the unchanged class counts, such as `__iter__` or
    `weight`; in the whole model only parameters and modules do: methods such as save_pretrained compute nothing.
    """
    tables = plain._parameters.keys() | plain._buffers.keys() | plain._modules.keys()
    for cls in type(module).__mro__[: type(module).__mro__.index(type(plain))]:
        for name in vars(cls).keys() - _OF_A_CLASS:
            if name in tables or (part and hasattr(type(plain), name)):
                return name
    return None


def _unwrapped(function: Callable, module: nn.Module) -> tuple[Callable | None, bool]:
    """The function inside transparent wrappers, None if one is bound to another object; and whether one is autocast."""
    autocast = False
    while True:
        if getattr(function, "__self__", module) is not module:
            return None, autocast
        inner = getattr(function, "_torchdynamo_orig_callable", getattr(function, "__wrapped__", None))
        source = _module_of(function)
        if inner is None or not source.startswith(_TRANSPARENT):
            return getattr(function, "__func__", function), autocast
        autocast |= source == _AUTOCAST
        function = inner


def _module_of(function: Callable) -> str:
    """Name of the module that holds a function's code, which functools.wraps does not change (unlike `__module__`)."""
    code = getattr(function, "__func__", function)
    return str(getattr(code, "__globals__", {}).get("__name__") or getattr(type(code), "__module__", ""))


def _of_libraries(function: Callable | None) -> bool:
    """Whether a function and all that it wraps come from torch and transformers."""
    while function is not None:
        function = getattr(function, "func", function)  # of a partial
        if _module_of(function).split(".")[0] not in ("torch", "transformers", "builtins"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _harmful(hooks: dict) -> str | None:
    """The name of the first hook that may change an output."""
    for hook in hooks.values():
        name = getattr(hook, "__qualname__", type(hook).__name__)
        if name.split(".")[-1] not in _HARMLESS_HOOKS or not _of_libraries(hook):
            return name
    return None


def _way_out(module: nn.Module) -> str:
    if hasattr(module, "_orig_mod"):
        return "put the module inside the compiled one, ._orig_mod, in its place"
    if nn.utils.parametrize.is_parametrized(module):
        return f"use torch.nn.utils.parametrize.remove_parametrizations, {_OWN}"
    return f"{_MERGE}; what the config can say (activation_function), say there"


def _comparable(value: object) -> bool:
    return type(value) in _VALUES or (callable(value) and not isinstance(value, (type, nn.Module)))


def _content(value: object) -> object:
    """What to compare of an attribute: of a partial its parts, of a method its function."""
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return getattr(value, "__func__", value)


# ---------------------------------------------------------------- changes


def fingerprint(model: GPT2LMHeadModel, sampled: bool) -> tuple:
    """A value that differs after the forward pass or a weight has changed: hooks, modes, attributes; a parameter that
    was replaced, moved, or written to in place (an optimizer's step, `load_state_dict`).

    Writing through `.data` does not change a parameter's version. sampled: also compare a row, a column and the
    diagonal of every matrix and the whole of every vector, which shows writes to a whole parameter, row or column.
    Comparing all weights would take as long as decoding a token.
    """
    everywhere = [*torch_module._global_forward_hooks, *torch_module._global_forward_pre_hooks]
    attention = [(name, list(map(id, functions))) for name, functions in _attention(model).items()]
    classes = {type(module) for module in nn.Module.modules(model)}
    parts = [attention, everywhere, [(id(one), id(one.forward), id(one.__call__)) for one in classes]]
    for module in nn.Module.modules(model):
        own = vars(module)
        replaced = [id(own[name]) for name in own.keys() & _REPLACEABLE]
        hooks = [*own["_forward_hooks"], *own["_forward_pre_hooks"]]
        values = [value for value in own.values() if type(value) in _VALUES]
        parts.append((id(module), values, hooks, replaced))
    parameters = list(nn.Module.parameters(model))
    parts += [(one.data_ptr(), one.dtype, 0 if one.is_inference() else one._version) for one in parameters]
    if sampled and not any(one.is_meta for one in parameters):
        with torch.no_grad():
            values = [
                part
                for one in parameters
                for part in ((one[0], one[:, 0], one.diagonal()) if one.dim() > 1 else (one,))
            ]
            by_kind: dict[tuple, list[torch.Tensor]] = {(one.dtype, one.device): [] for one in values}
            for one in values:
                by_kind[one.dtype, one.device].append(one)
            parts += [torch.cat(group).view(torch.uint8).cpu().numpy().tobytes() for group in by_kind.values()]
    return tuple(parts)
