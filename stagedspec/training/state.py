"""Optimizers of a model in training, and its state by name: weights and moments, in files and in a deeper model.

A checkpoint is safetensors (weights, moments) plus JSON (step, progress, settings): nothing pickled.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.optim import AdamW, Muon, Optimizer
from transformers import GPT2LMHeadModel

from stagedspec.kernels.common.files import replacing

CHECKPOINT = "checkpoint.safetensors"
OPTIMIZERS = ("adamw", "muon")
_LAYER = re.compile(r"(.*\btransformer\.h\.)(\d+)(\..*)")
# What a layer adds to the residual stream is linear in these.
_OUTPUTS = ("c_proj.weight", "c_proj.bias")


def make_optimizers(model: GPT2LMHeadModel, kind: str, learning_rate: float, weight_decay: float) -> list[Optimizer]:
    """AdamW for all parameters; with kind "muon", Muon (arXiv 2502.16982) for the matrices of the layers.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both. Biases, norms and
    positions of one dimension are not decayed.
    """
    layers = {id(p) for p in model.transformer.h.parameters()}
    matrices = [p for p in model.parameters() if kind == "muon" and p.dim() == 2 and id(p) in layers]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    decays = {True: weight_decay, False: 0.0}
    groups = [{"params": [p for p in others if (p.dim() >= 2) is w], "weight_decay": d} for w, d in decays.items()]
    found: list[Optimizer] = [AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    if matrices:
        found.append(Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw"))
    return found


# ---------------------------------------------------------------- state by name


def state_of(model: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> dict[str, torch.Tensor]:
    """Weights as "weight.<parameter>" and moments as "<moment>.<parameter>": the tensors themselves."""
    found = {}
    for name, parameter in model.named_parameters():
        found[f"weight.{name}"] = parameter.detach()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{key}.{name}"] = value.detach()
    return found


@torch.no_grad()
def load_state(model: GPT2LMHeadModel, optimizers: Sequence[Optimizer], state: Mapping[str, torch.Tensor]) -> None:
    """Copies what `state_of` gave into a model and optimizers. Raises ValueError if it is another model's."""
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for full, value in state.items():
        key, name = full.split(".", 1)
        moments.setdefault(name, {})[key] = value
    for name, parameter in model.named_parameters():
        kept = moments.get(name, {})
        weight = kept.pop("weight", None)
        if weight is None or weight.shape != parameter.shape:
            raise ValueError(f"it belongs to a model of another shape (at {name})")
        parameter.copy_(weight)
        for optimizer in optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                # A fused optimizer wants all of it, the step too, beside the parameter.
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in kept.items()}


def deeper(state: Mapping[str, torch.Tensor], layers: int, depth: int) -> dict[str, torch.Tensor]:
    """State of a model of `layers` layers as that of one of `depth`: every layer is repeated, its copies side by side.

    Copies add nothing to the residual stream at first: what they multiply their results with is zero. So the deeper
    model computes the same function, and the loss does not jump. Moments are repeated whole. (Measured beside other
    ways: stagedspec/README.md.) Layers of the result are new tensors, the rest is that of `state`.
    """
    found = {}
    for full, value in state.items():
        match = _LAYER.fullmatch(full)
        if match is None:
            found[full] = value
            continue
        before, layer, after = match[1], int(match[2]), match[3]
        copies = [index for index in range(depth) if index * layers // depth == layer]
        for index in copies:
            adds_nothing = index != copies[0] and full.startswith("weight.") and after.endswith(_OUTPUTS)
            found[f"{before}{index}{after}"] = torch.zeros_like(value) if adds_nothing else value.clone()
    return found


# ---------------------------------------------------------------- checkpoints


class Position(NamedTuple):
    """Where a run stands: steps done, seconds spent, the part of its budget that is spent (1: finished), and layers
    that the model had."""

    step: int = 0
    seconds: float = 0.0
    progress: float = 0.0
    layers: int = 0


def save(folder: Path, state: Mapping[str, torch.Tensor], settings: Mapping, position: Position) -> None:
    """Writes the checkpoint of a folder in one go: a killed run leaves the last whole one."""
    metadata = {name: json.dumps(value) for name, value in position._asdict().items()}
    with replacing(folder / CHECKPOINT) as part:
        save_file(
            {name: value.contiguous() for name, value in state.items()},
            part,
            metadata=metadata | {"config": json.dumps(settings)},
        )


def position_of(folder: Path) -> Position:
    """Of the checkpoint in `folder`; the beginning if there is none. Raises ValueError if it is damaged."""
    path = folder / CHECKPOINT
    return _read(path)[0] if path.exists() else Position()


def restore(
    folder: Path,
    settings: Mapping,
    free: frozenset[str],
    load: Callable[[dict[str, torch.Tensor], Position], None],
) -> Position:
    """Hands the tensors of the folder's checkpoint to `load`; returns where it stood, the beginning if there is none.

    settings: must be those it was written with, but for the names in `free`. Raises ValueError if they are not, or if
    it is damaged or another model's.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return Position()
    position, stored = _read(path)
    for key, wanted in settings.items():
        if key not in free and stored.get(key) != wanted:
            raise ValueError(
                f"{path} was written with {key}={stored.get(key)}, not {wanted}: remove the folder or use the "
                "same settings"
            )
    try:
        load(load_file(path), position)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: remove the folder") from None
    return position


def _read(path: Path) -> tuple[Position, dict]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to train again") from error
    if not {"config", *Position._fields} <= metadata.keys():
        raise ValueError(f"{path} is no checkpoint of this trainer; remove it to train again")
    return Position(*(json.loads(metadata[name]) for name in Position._fields)), json.loads(metadata["config"])
