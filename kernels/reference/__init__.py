"""Every operation of a model pass in plain torch: what the torch backend runs, and the oracle for the kernels.

Letters: B batch, N nodes of one pass, M = B*N rows, S rows of a KV cache, H heads, D head size, V vocabulary, L prefix
length, R visible rows, C children of a node, d model width. Trees and sequences are plain Python: state/host.py.
"""

from stagedspec.kernels.reference.attention import kv_dtype, layer_views, move_rows, tree_attention
from stagedspec.kernels.reference.layers import (
    Linear,
    embed,
    fused_activation,
    head_dtype,
    linear_add,
    norm_linear,
    pack_head,
    pack_linear,
)
from stagedspec.kernels.reference.noise import Noise, NoiseAt, gumbel, gumbel_noise, philox
from stagedspec.kernels.reference.token_choice import (
    choose,
    choose_children,
    head_logits,
    lm_head_children,
    lm_head_choose,
    warp,
)

__all__ = [
    "Linear",
    "Noise",
    "NoiseAt",
    "choose",
    "choose_children",
    "embed",
    "fused_activation",
    "gumbel",
    "gumbel_noise",
    "head_dtype",
    "head_logits",
    "kv_dtype",
    "layer_views",
    "linear_add",
    "lm_head_children",
    "lm_head_choose",
    "move_rows",
    "norm_linear",
    "pack_head",
    "pack_linear",
    "philox",
    "tree_attention",
    "warp",
]
