"""A draft's likeliest children, from scores that are final: the top m of softmax(scores), and their logarithms.

scores [M, V] fp32, rows STRIDE apart, of which the head has written the largest of each group of 64 and the group's
mass. The m best tokens lie in the m best groups, so a program, one a row, reads m groups. What takes time is a chain of
reductions: they are of 32-bit integers, which a warp compares in one instruction.
"""

import triton
import triton.language as tl

from stagedspec.kernels.choose.scores import GROUP_SIZE, GROUP_UNIT, UNIT, order_key, value_of

MOST = 32  # children; `select_kernel` finds more in parts
NOTHING = tl.constexpr(-(2**31))  # below every key


@triton.jit
def _keys(values):
    """Integers in the order of the values; NOTHING for -inf."""
    keys = (order_key(values) ^ 0x80000000).to(tl.int32, bitcast=True)
    return tl.where(values > float("-inf"), keys, NOTHING)


@triton.jit
def _greatest(keys, names, count, LANES: tl.constexpr):
    """The `count` greatest keys [n] and their names, the lower name first among equal keys: [LANES], [LANES]; NOTHING
    where there are no more."""
    i_lane = tl.arange(0, LANES)
    best_keys = tl.full([LANES], NOTHING, tl.int32)
    best_names = tl.full([LANES], 0, tl.int32)
    for i in range(count):
        key = tl.max(keys, 0)
        name = tl.min(tl.where(keys == key, names, 0x7FFFFFFF), 0)
        best_keys = tl.where(i_lane == i, key, best_keys)
        best_names = tl.where(i_lane == i, name, best_names)
        keys = tl.where(names == name, NOTHING, keys)
    return best_keys, best_names


@triton.jit
def likeliest_kernel(
    p_scores, p_maxima, p_masses, p_out, p_logprobs, V: tl.constexpr, STRIDE: tl.constexpr, G: tl.constexpr,
    GROUPS: tl.constexpr, CHILDREN: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    inside = groups < G
    maxima = tl.load(p_maxima + i_row * G + groups, inside, float("-inf"))
    top = tl.max(maxima, 0)
    valid = (top > float("-inf")) & (top < float("inf"))  # else nothing can come up
    maxima = tl.where(valid, maxima, float("-inf"))
    top = tl.where(valid, top, 0.0)
    key, group = _greatest(_keys(maxima), groups, CHILDREN, LANES)
    group = tl.where(key != NOTHING, group, G)
    tokens = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]  # [LANES, 64]
    values = tl.load(p_scores + i_row.to(tl.int64) * STRIDE + tokens, tokens < V, float("-inf"))
    weights = tl.load(p_masses + i_row * G + groups, inside, 0).to(tl.float32) * (1.0 / GROUP_UNIT)
    weights *= tl.where(maxima > float("-inf"), tl.exp(maxima - top), 0.0)
    normaliser = tl.sum((weights * UNIT).to(tl.int64), 0).to(tl.float32) * (1.0 / UNIT)
    keys, names = tl.reshape(_keys(values), [LANES * GROUP_SIZE]), tl.reshape(tokens, [LANES * GROUP_SIZE])
    key, token = _greatest(keys, names, CHILDREN, LANES)
    value = value_of(key.to(tl.uint32, bitcast=True) ^ 0x80000000)
    possible = key != NOTHING
    i_child = tl.arange(0, LANES)
    at = i_row * CHILDREN + i_child
    logprob = tl.minimum(value - top - tl.log(normaliser), -1e-4)
    tl.store(p_out + at, tl.where(possible, token, 0), mask=i_child < CHILDREN)
    tl.store(p_logprobs + at, tl.where(possible, logprob, float("-inf")), mask=i_child < CHILDREN)


def constants(children: int, groups: int) -> dict[str, int]:
    """Tiles and warps, by the children of a row and the groups of the vocabulary."""
    tile = triton.next_power_of_2(groups)
    warps = min(max(1, tile // 256), 8)
    return {"GROUPS": tile, "CHILDREN": children, "LANES": triton.next_power_of_2(children), "num_warps": warps}
