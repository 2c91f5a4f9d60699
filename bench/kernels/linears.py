"""Skinny linears: the four of a layer in a row, over all layers' own weights, and each of them alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, error_ratio
from models import DEVICE, MODELS, Choice, randn

from stagedspec.kernels import linear
from stagedspec.kernels.common.registry import Scratch
from stagedspec.models.shapes import ModelShape

EPSILON = 1e-5


@dataclass(frozen=True)
class _Layer:
    norm: tuple[torch.Tensor, torch.Tensor]
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    folded: dict[str, linear.Folded]


def _sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each linear."""
    d = shape.width
    return {"qkv": (3 * d, d), "projection": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}


def _layers(shape: ModelShape) -> list[_Layer]:
    return [_layer(shape) for _ in range(shape.layers)]


def _layer(shape: ModelShape) -> _Layer:
    norm = randn(shape.width, scale=0.1) + 1, randn(shape.width, scale=0.1)
    weights = {name: (randn(*size, scale=size[1] ** -0.5), randn(size[0])) for name, size in _sizes(shape).items()}
    return _Layer(norm, weights, {name: linear.Folded.of(*norm, *weights[name]) for name in ("qkv", "up")})


class _Ours:
    def __init__(self, shape: ModelShape, rows: int):
        sizes = _sizes(shape).values()
        self.stats, self.stats_out = torch.empty(2, rows, linear.stat_tiles(shape.width), 2, device=DEVICE)
        self.scratch = Scratch.of([linear.scratch_size(rows, *size) for size in sizes], DEVICE)
        self.out = {name: randn(rows, size[0]) for name, size in _sizes(shape).items()}

    def __call__(self, name: str, layer: _Layer, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out = self.out[name]
        if name in ("qkv", "up"):
            activation = "gelu_new" if name == "up" else "none"
            linear.norm_linear(x, self.stats, EPSILON, layer.folded[name], activation, out, self.scratch)
        else:
            linear.linear_add(x, *layer.weights[name], residual, out, self.stats_out, self.scratch)
        return out


def _plain(name: str, layer: _Layer, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return _fusion(x, residual, *layer.norm, *layer.weights[name], name in ("qkv", "up"), name == "up")


def _fusion(x, residual, norm_weight, norm_bias, weight, bias, norm: bool, gelu: bool) -> torch.Tensor:
    if norm:
        y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPSILON), weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y
    return residual + F.linear(x, weight, bias)


def cases(choice: Choice) -> Iterator[Case]:
    compiled = torch.compile(_fusion, dynamic=False)

    def by_inductor(name: str, layer: _Layer, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return compiled(x, residual, *layer.norm, *layer.weights[name], name in ("qkv", "up"), name == "up")

    def matrix_only(name: str, layer: _Layer, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *layer.weights[name])

    for model in choice.model:
        shape = MODELS[model]
        layers = _layers(shape)
        for rows in choice.nodes:
            # The residual stream is the input of all but the down-projection.
            inputs = {"down": randn(rows, 4 * shape.width)}
            x = randn(rows, shape.width)
            for group in (tuple(_sizes(shape)), *((name,) for name in _sizes(shape))):
                ours = _Ours(shape, rows)
                linear.row_stats(x, ours.stats)

                def run(side: Callable, group=group, x=x, inputs=inputs, layers=layers) -> None:
                    for layer in layers:
                        for name in group:
                            side(name, layer, inputs.get(name, x), x)

                def check(ours=ours, group=group, x=x, inputs=inputs, layer=layers[0]) -> float:
                    ratios = []
                    for name in group:
                        exact = _plain(name, _double(layer), inputs.get(name, x).double(), x.double())
                        plain = _plain(name, layer, inputs.get(name, x), x)
                        ratios.append(error_ratio(ours(name, layer, inputs.get(name, x), x), plain, exact))
                    return max(ratios)

                weights = sum(layers[0].weights[name][0].nbytes for name in group)
                yield Case(
                    "linears" if len(group) > 1 else group[0],
                    model,
                    {"N": rows},
                    weights,
                    shape.layers,
                    partial(run, ours),
                    {
                        "torch eager": partial(run, _plain),
                        "cuBLAS alone": partial(run, matrix_only),
                        "torch.compile": partial(run, by_inductor),
                    },
                    check,
                )


def _double(layer: _Layer) -> _Layer:
    return _Layer(
        tuple(part.double() for part in layer.norm),
        {name: (weight.double(), bias.double()) for name, (weight, bias) in layer.weights.items()},
        {},
    )
