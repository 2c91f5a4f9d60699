"""Embedding and linear layers in plain torch, with the LayerNorm, activation or residual addition around them.

A row's result should not depend on which other rows are in the batch. On a CPU the target's linear layers keep that
bitwise: oneDNN's pre-packed matrix multiply uses one instruction sequence per row from some number of rows on, which
`pack_linear` finds by trying (plain `torch.addmm` switches algorithm below four rows).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

# oneDNN's fused epilogues: the name and the algorithm of `mkldnn::_linear_pointwise`.
_FUSED: dict[str | Callable, tuple[str, str]] = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
}


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] and bias [out] in the layout in which the backend multiplies fastest.

    rows: multiplies of fewer rows are filled up to this number, from which on a row's bits are always the same; 0: no
    such number was found, and every row is multiplied alone.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed: bool
    dtype: torch.dtype
    rows: int = 1


def pack_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    invariant: bool,
    norm: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Linear:
    """Prepares weight [out, in] and bias [out] once, at load. norm: the LayerNorm before it, which others fold in.

    On a CPU the weight is reordered for oneDNN, in fp32 whatever its dtype (exact: half is a subset of fp32).
    invariant=False gives that up where a plain multiply is faster: for a small draft, whose numerics are free,
    oneDNN's 50 microseconds a call would cost more than the arithmetic.
    """
    dtype = weight.dtype
    small = weight.numel() < 1 << 18
    if not invariant and small and weight.device.type == "cpu":
        # As GPT-2 stores all but its head, [in, out]: MKL multiplies a few rows by it up to twice as fast.
        weight = weight.float().t().contiguous().t()
        return Linear(weight, None if bias is None else bias.float(), False, dtype)
    if weight.device.type != "cpu":
        return Linear(weight, bias, False, dtype)
    weight, bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    packed = torch.backends.mkldnn.is_available()
    if packed:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    layer = Linear(weight, bias, packed, dtype)
    return replace(layer, rows=_invariant_rows(layer)) if invariant else layer


def pack_head(weight: torch.Tensor, invariant: bool) -> Linear:
    return pack_linear(weight, None, invariant)


def head_dtype(dtype: torch.dtype, width: int, device: torch.device, invariant: bool) -> torch.dtype:
    """As computed."""
    return dtype


_TRIED = (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 32, 48, 64)
_known_rows: dict[tuple, int] = {}


def _invariant_rows(layer: Linear) -> int:
    """`Linear.rows`, found by trying once for every shape of weight.

    On AVX-512 oneDNN multiplies one row by a weight of more than 1024 columns in another order than two rows.
    """
    key = (*layer.weight.shape, layer.packed)
    if key not in _known_rows:
        generator = torch.Generator("cpu").manual_seed(0)
        distinct = torch.randn(4, layer.weight.shape[1], generator=generator, device="cpu", dtype=torch.float32)
        results = {count: _linear(distinct.repeat(16, 1)[:count], layer, "none") for count in _TRIED}

        def agree(least: int) -> bool:
            alone = torch.cat([_linear(row.repeat(least, 1), layer, "none")[:1] for row in distinct.split(1)])
            expected = alone.repeat(16, 1)
            return all(torch.equal(y, expected[: len(y)]) for count, y in results.items() if count >= least)

        _known_rows[key] = next(filter(agree, (1, 2, 4, 8)), 0)
    return _known_rows[key]


def _in_rows(multiply: Callable[..., torch.Tensor], layer: Linear, *inputs: torch.Tensor) -> torch.Tensor:
    """multiply(*inputs), inputs [M, ...], in the number of rows that gives every row the same bits (`Linear.rows`)."""
    count = len(inputs[0])
    if count >= layer.rows > 0:
        return multiply(*inputs)
    if layer.rows == 0:
        return torch.cat([multiply(*rows) for rows in zip(*(x.split(1) for x in inputs), strict=True)])
    return multiply(*(F.pad(x, (0, 0, 0, layer.rows - count)) for x in inputs))[:count]


def _linear(x: torch.Tensor, layer: Linear, activation: str | Callable) -> torch.Tensor:
    if layer.rows == 1:
        return _multiply(x, layer, activation)
    return _in_rows(lambda x: _multiply(x, layer, activation), layer, x)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in dtype. `Tensor.to` takes 2.5 microseconds to find that there is nothing to do, a dozen times a layer."""
    return x if x.dtype == dtype else x.to(dtype)


def _multiply(x: torch.Tensor, layer: Linear, activation: str | Callable) -> torch.Tensor:
    fused = _FUSED.get(activation)
    name, algorithm = fused or _FUSED["none"]
    if layer.packed:
        multiply = torch.ops.mkldnn._linear_pointwise.default
        y = cast(multiply(x.float(), layer.weight, layer.bias, name, [], algorithm), layer.dtype)
    else:
        y = cast(F.linear(cast(x, layer.weight.dtype), layer.weight, layer.bias), layer.dtype)
        if name == "relu":
            y = F.relu(y)
        elif name == "gelu":
            y = F.gelu(y, approximate=algorithm)
    return y if fused else activation(y)  # type: ignore[operator]  # a name is always one of `_FUSED`


def fused_activation(name: str) -> bool:
    """Whether `norm_linear` knows the activation by name; others are passed as callables."""
    return name in _FUSED


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    epsilon: float,
    layer: Linear,
    activation: str | Callable = "none",
) -> torch.Tensor:
    """activation(LayerNorm(x) @ weight.T + bias): x [M, d] -> [M, out]."""
    return _linear(torch.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, epsilon), layer, activation)


def linear_add(x: torch.Tensor, layer: Linear, residual: torch.Tensor) -> torch.Tensor:
    """residual + x @ weight.T + bias: x [M, in], residual [M, out] -> [M, out]."""
    if layer.packed and layer.dtype == torch.float32:

        def multiply(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, layer.weight, layer.bias, "add")

        return _in_rows(multiply, layer, x, residual)
    return residual + _linear(x, layer, "none")


def embed(
    token_table: torch.Tensor, position_table: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Token plus position embedding: tokens, positions [B, N] -> [M, d]. Positions past the table use its last row."""
    positions = positions.clamp(0, position_table.shape[0] - 1)
    return torch.embedding(token_table, tokens).add_(torch.embedding(position_table, positions)).flatten(0, 1)
