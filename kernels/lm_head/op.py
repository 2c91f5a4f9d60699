"""The head of kernel.py and hopper.py as operations: launch settings, launchers, checks of arguments."""

import torch
import triton

from stagedspec.kernels.choose.op import (
    SAMPLING,
    Parts,
    check_children,
    check_sampling,
    groups_of,
    launch_select,
    noise_kind,
    rounded,
    scaling,
    warped,
)
from stagedspec.kernels.choose.scores import GROUP
from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    FLOATS,
    architecture,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    most_registers,
    register,
)
from stagedspec.kernels.linear.op import by_hopper
from stagedspec.kernels.lm_head.kernel import head_kernel, norm_kernel

ROWS = 64  # most rows of one program: with noise and masses 128 spill
PROGRAMS = 512  # most programs along the vocabulary
SPILLING = (89, 100, 120)  # `head_kernel`'s, see `most_registers`


def candidates(shape: tuple[int, int], device: torch.device) -> list[dict[str, int]]:
    """Settings to try at the shape (V, d), the default first: rows of a tile, warps, stages, most programs."""
    if device.type != "cuda":
        return [{"tile": 64, "warps": 4, "stages": 2, "programs": 3}]
    count = torch.cuda.get_device_properties(device).multi_processor_count
    settings = [
        {"tile": tile, "warps": warps, "stages": stages, "programs": waves * count}
        for tile, warps, stages in ((128, 4, 4), (128, 4, 3), (128, 8, 4), (64, 4, 4), (64, 4, 6))
        for waves in (2, 1, 3)
    ]
    return sorted(settings, key=lambda setting: setting["tile"] != default_tile(architecture(device)))


def default_tile(arch: int) -> int:
    """Tokens of the vocabulary that a program takes at a time. 128 spill on consumer Blackwell."""
    return 64 if arch == 120 else 128


def _settings(vocab_size: int, width: int, device: torch.device) -> dict[str, int]:
    return config("lm_head", (vocab_size, width), device, candidates)


def block_k(width: int, dtype: torch.dtype) -> int:
    """The step along K, by the weight's shape alone."""
    return min(64 if dtype.itemsize < 4 else 32, max(16, triton.next_power_of_2(width)))


def _norm_elements(rows: int, width: int) -> int:
    return rounded(rows * width)  # fp32 or less each


def scratch_size(rows: int, vocab_size: int, width: int, through_memory: bool = True) -> tuple[int, int]:
    """Partials and counters for M rows of either operation. through_memory: whether logits pass through memory, as they
    do for children and under warpers; `lm_head_choose` without any needs much less."""
    size = 2 * rounded(PROGRAMS * rows)
    if through_memory:
        groups = rows * groups_of(vocab_size)
        size = max(size, 3 * rounded(groups) + groups * GROUP + 2 * rounded(rows * vocab_size))
    return _norm_elements(rows, width) + size, -(-rows // 16)


def _through_memory(parts: Parts, rows: int, vocab_size: int) -> torch.Tensor:
    """Room for logits [M, V]. Every row starts with a memory line: an odd vocabulary's would be written in halves."""
    return parts.take(rows * groups_of(vocab_size) * GROUP).view(rows, -1)[:, :vocab_size]


def _head(x, norm_weight, norm_bias, epsilon, head, noise, seeds, streams, positions, logits, maxima, masses, best, ids,
          counters, out, normed, scale, kind, choose, store, need_masses):  # fmt: skip
    (rows, width), vocab_size = x.shape, head.shape[0]
    options = launch_options(x.device)
    launch_kernel(
        norm_kernel,
        (rows,),
        x, norm_weight, norm_bias, normed, epsilon, K=width, BLOCK=triton.next_power_of_2(width), num_warps=4,
        **options,
    )  # fmt: skip
    if by_hopper(head.element_size(), width, x.device):
        from stagedspec.kernels.lm_head import hopper  # Gluon takes a while to import

        return hopper.launch(
            normed.view(rows, width), head, noise, seeds, streams, positions, logits, maxima, masses, best, ids,
            counters, out, scale, kind, choose, store, need_masses,
        )  # fmt: skip
    settings = _settings(vocab_size, width, x.device)
    tile, block = settings["tile"], min(ROWS, max(16, triton.next_power_of_2(rows)))
    programs = min(-(-vocab_size // tile), settings["programs"], PROGRAMS)
    warps = settings["warps"] * (2 if block > 32 else 1)
    launch_kernel(
        head_kernel,
        (programs, -(-rows // block)),
        normed, head, x if noise is None else noise, seeds, streams, positions, logits, maxima, masses, best, ids,
        counters, out, rows, positions.shape[1], scale[1], V=vocab_size, STRIDE=logits.stride(0), K=width,
        G=groups_of(vocab_size), T=tile, R=block, BLOCK_K=block_k(width, head.dtype), SCALING=scale[0], NOISE=kind,
        CHOOSE=choose, STORE=store, MASSES=need_masses, num_warps=warps, num_stages=settings["stages"],
        maxnreg=most_registers(architecture(x.device), warps, SPILLING), **options,
    )  # fmt: skip


def _launch_choose(
    x, norm_weight, norm_bias, epsilon, head, seeds, streams, positions, temperature, top_k, top_p, min_p, greedy,
    noise, logits, out, partials, counters,
):  # fmt: skip
    rows, vocab_size = x.shape[0], head.shape[0]
    scale, kind = scaling(greedy, temperature), noise_kind(greedy, noise)
    parts = Parts(partials)
    normed = parts.take(rows * x.shape[1])[: -(-rows * x.shape[1] * head.dtype.itemsize // 4)].view(head.dtype)
    norm = x, norm_weight, norm_bias, epsilon, head
    if not warped(greedy, top_k, top_p, min_p, vocab_size):
        best, ids = parts.take(PROGRAMS * rows), parts.take(PROGRAMS * rows, torch.int32)
        _head(*norm, noise, seeds, streams, positions, best if logits is None else logits, best, ids, best, ids,
              counters, out, normed, scale, kind, True, int(logits is not None), False)  # fmt: skip
        return
    groups = rows * groups_of(vocab_size)
    maxima, masses = parts.take(groups), parts.take(groups, torch.int32)
    if logits is None:
        logits = _through_memory(parts, rows, vocab_size)
    need = top_p < 1.0 and not 0 < top_k < vocab_size
    _head(*norm, None, seeds, streams, positions, logits, maxima, masses, maxima, masses, counters, out, normed,
          scale, 0, False, 1, need)  # fmt: skip
    launch_select(logits, maxima, masses, parts, noise, seeds, streams, positions, scale, top_k, top_p, min_p, kind,
                  out, None, False)  # fmt: skip


def _launch_topm(
    x, norm_weight, norm_bias, epsilon, head, seeds, streams, positions, temperature, top_k, top_p, min_p, greedy,
    sharpness, noise, out_tokens, out_logprobs, partials, counters,
):  # fmt: skip
    rows, vocab_size = x.shape[0], head.shape[0]
    scale, kind = scaling(greedy, temperature, sharpness), noise_kind(greedy, noise)
    parts = Parts(partials)
    normed = parts.take(rows * x.shape[1])[: -(-rows * x.shape[1] * head.dtype.itemsize // 4)].view(head.dtype)
    groups = rows * groups_of(vocab_size)
    maxima, masses = parts.take(groups), parts.take(groups, torch.int32)
    logits = _through_memory(parts, rows, vocab_size)
    whole = not warped(greedy, top_k, top_p, min_p, vocab_size)
    need = whole or (top_p < 1.0 and not 0 < top_k < vocab_size)
    _head(x, norm_weight, norm_bias, epsilon, head, noise, seeds, streams, positions, logits, maxima, masses, maxima,
          masses, counters, out_tokens, normed, scale, kind if whole else 0, False, 2 if whole else 1,
          need)  # fmt: skip
    if whole:
        scale, kind, noise = (0, 1.0), 0, None
    launch_select(logits, maxima, masses, parts, noise, seeds, streams, positions, scale, top_k, top_p, min_p, kind,
                  out_tokens, out_logprobs, whole)  # fmt: skip


_HEAD = "Tensor x, Tensor norm_weight, Tensor norm_bias, float epsilon, Tensor head"

_choose = register(
    f"lm_head_choose({_HEAD}, {SAMPLING}, Tensor? noise, Tensor(a!)? logits, Tensor(b!) out, Tensor(c!) partials, "
    "Tensor(d!) counters) -> ()",
    _launch_choose,
)
_topm = register(
    f"lm_head_topm({_HEAD}, {SAMPLING}, float sharpness, Tensor? noise, Tensor(a!) out_tokens, "
    "Tensor(b!) out_logprobs, Tensor(c!) partials, Tensor(d!) counters) -> ()",
    _launch_topm,
)


# ---------------------------------------------------------------- public functions


def _check(op, x, norm_weight, norm_bias, head):
    check_tensor(op, "x", x, (None, None), FLOATS, x.device)
    check_tensor(op, "norm_weight", norm_weight, (x.shape[1],), FLOATS, x.device)
    check_tensor(op, "norm_bias", norm_bias, (x.shape[1],), FLOATS, x.device)
    check_tensor(op, "head", head, (None, x.shape[1]), x.dtype, x.device)


def lm_head_choose(
    x, norm_weight, norm_bias, epsilon, head, seeds, streams, positions, *, temperature=1.0, top_k=0, top_p=1.0,
    min_p=0.0, greedy=False, noise=None, logits=None, out, scratch,
):  # fmt: skip
    """One token a node: x [M, d] (hidden states before the final norm), head [V, d] of x's dtype -> out [M] int32.

    norm_weight, norm_bias [d], epsilon: of the final LayerNorm. seeds [B] int64 and streams [B] int32: counters of the
    noise of each sequence; positions [B, N] int32: the absolute position of the token that each row chooses, M = B*N.
    temperature, top_k (0: none), top_p (1: none), min_p (0: none): as in transformers; greedy: no warping, no noise.
    noise: [M, V] fp32 in place of the counters' noise, or None. logits: [M, V] fp32 to fill, or None. scratch: of
    `scratch_size`, or more.

    Raises ValueError for a wrong shape, dtype, device or layout, a setting out of range, or too little scratch memory.
    """
    op = "lm_head_choose"
    _check(op, x, norm_weight, norm_bias, head)
    rows, vocab_size = x.shape[0], head.shape[0]
    through_memory = warped(greedy, top_k, top_p, min_p, vocab_size)
    check_sampling(op, rows, vocab_size, x.device, seeds, streams, positions, temperature, top_k, top_p, min_p, noise,
                   scratch, scratch_size(rows, vocab_size, x.shape[1], through_memory))  # fmt: skip
    check_tensor(op, "out", out, (rows,), torch.int32, x.device)
    if logits is not None:
        check_tensor(op, "logits", logits, (rows, vocab_size), torch.float32, x.device)
    check_runs(x, op)
    _choose(x, norm_weight, norm_bias, epsilon, head, seeds, streams, positions, temperature, top_k, top_p, min_p,
            greedy, noise, logits, out, scratch.partials, scratch.counters)  # fmt: skip


def lm_head_topm(
    x, norm_weight, norm_bias, epsilon, head, seeds, streams, positions, *, temperature=1.0, top_k=0, top_p=1.0,
    min_p=0.0, greedy=False, sharpness=1.0, noise=None, out_tokens, out_logprobs, scratch,
):  # fmt: skip
    """The draft's m likeliest children a node: out_tokens [M, m] int32, out_logprobs [M, m] fp32, best first, at most
    -1e-4, -inf (and token 0) where fewer than m tokens can come up (`reference.choose_children`).

    The other arguments and the errors are those of `lm_head_choose`; sharpness multiplies the logits when greedy.
    """
    op = "lm_head_topm"
    _check(op, x, norm_weight, norm_bias, head)
    rows, vocab_size = x.shape[0], head.shape[0]
    check_sampling(op, rows, vocab_size, x.device, seeds, streams, positions, temperature, top_k, top_p, min_p, noise,
                   scratch, scratch_size(rows, vocab_size, x.shape[1]))  # fmt: skip
    check_children(op, rows, vocab_size, x.device, out_tokens, out_logprobs)
    check_runs(x, op)
    _topm(x, norm_weight, norm_bias, epsilon, head, seeds, streams, positions, temperature, top_k, top_p, min_p, greedy,
          sharpness, noise, out_tokens, out_logprobs, scratch.partials, scratch.counters)  # fmt: skip
