"""The head of kernel.py and hopper.py as operations: launch settings, launchers, checks of arguments."""

from typing import NamedTuple

import torch
import triton

from stagedspec.kernels.choose.op import (
    SAMPLING,
    Maxima,
    Outputs,
    Parts,
    Sampling,
    Scoring,
    check_children,
    check_sampling,
    groups_of,
    launch_children,
    launch_select,
    rounded,
)
from stagedspec.kernels.choose.scores import GROUP
from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    FLOATS,
    Scratch,
    architecture,
    by_hopper,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    most_registers,
    register,
)
from stagedspec.kernels.lm_head import eight_bits
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
        size = max(size, 3 * rounded(groups) + 3 * groups * GROUP)
    return _norm_elements(rows, width) + size, -(-rows // 16)


def _through_memory(parts: Parts, rows: int, vocab_size: int) -> torch.Tensor:
    """Room for logits [M, V]. Every row starts with a memory line: an odd vocabulary's would be written in halves."""
    return parts.take(rows * groups_of(vocab_size) * GROUP).view(rows, -1)[:, :vocab_size]


class HeadInputs(NamedTuple):
    """Inputs of the logits: hidden states x [M, d], the final LayerNorm, the head's weight [V, d], and the scales [V]
    of its rows where it has 8 bits."""

    x: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    epsilon: float
    head: torch.Tensor
    scales: torch.Tensor | None


def _normed(parts: Parts, inputs: HeadInputs) -> torch.Tensor:
    """Room for LayerNorm(x), of the head's dtype, or in fp16, which 8 bits become with the fewest instructions."""
    elements, dtype = inputs.x.numel(), inputs.x.dtype if inputs.scales is None else torch.float16
    return parts.take(elements)[: -(-elements * dtype.itemsize // 4)].view(dtype)


def _head(
    inputs: HeadInputs,
    normed: torch.Tensor,
    sampling: Sampling,
    scoring: Scoring,
    logits: torch.Tensor,
    store: int,
    outputs: Outputs,
) -> None:
    """The final LayerNorm, then the head's kernel. store: STORE of `head_kernel`; logits: any tensor where it is 0."""
    x, norm_weight, norm_bias, epsilon, head, scales = inputs
    (rows, width), vocab_size = x.shape, head.shape[0]
    options = launch_options(x.device)
    launch_kernel(
        norm_kernel,
        (rows,),
        x, norm_weight, norm_bias, normed, epsilon, K=width, BLOCK=triton.next_power_of_2(width), num_warps=4,
        **options,
    )  # fmt: skip
    if by_hopper(x.element_size(), width, x.device):
        from stagedspec.kernels.lm_head import hopper  # Gluon takes a while to import

        return hopper.launch(normed.view(rows, width), head, scales, sampling, scoring, logits, store, outputs)
    settings = _settings(vocab_size, width, x.device)
    tile, block = settings["tile"], min(ROWS, max(16, triton.next_power_of_2(rows)))
    programs = min(-(-vocab_size // tile), settings["programs"], PROGRAMS)
    warps = settings["warps"] * (2 if block > 32 else 1)
    launch_kernel(
        head_kernel,
        (programs, -(-rows // block)),
        normed, head, x if scoring.noise is None else scoring.noise, sampling.seeds, sampling.streams,
        sampling.positions, logits, *outputs.maxima, *outputs.maxima, outputs.counters, outputs.out,
        rows, sampling.positions.shape[1], scoring.scale, V=vocab_size, STRIDE=logits.stride(0), K=width,
        G=groups_of(vocab_size), T=tile, R=block, BLOCK_K=block_k(width, head.dtype), SCALING=scoring.scaling,
        NOISE=scoring.noise_kind, CHOOSE=outputs.choose, STORE=store, MASSES=outputs.masses, num_warps=warps,
        num_stages=settings["stages"], maxnreg=most_registers(architecture(x.device), warps, SPILLING), **options,
    )  # fmt: skip


def _launch_choose(
    inputs: HeadInputs,
    sampling: Sampling,
    noise: torch.Tensor | None,
    logits: torch.Tensor | None,
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    rows, vocab_size = inputs.x.shape[0], inputs.head.shape[0]
    scoring, parts = Scoring.of(sampling, noise), Parts(scratch.partials)
    normed = _normed(parts, inputs)
    if not sampling.warped(vocab_size):
        best = Maxima.take(parts, PROGRAMS * rows)
        outputs = Outputs(best, scratch.counters, out, True, False)
        store, logits = (0, best.scores) if logits is None else (1, logits)
        _head(inputs, normed, sampling, scoring, logits, store, outputs)
        return
    groups = Maxima.take(parts, rows * groups_of(vocab_size))
    if logits is None:
        logits = _through_memory(parts, rows, vocab_size)
    outputs = Outputs(groups, scratch.counters, out, False, sampling.needs_masses(vocab_size))
    _head(inputs, normed, sampling, scoring.without_noise(), logits, 1, outputs)
    launch_select(logits, sampling, scoring, groups, parts, out)


def _launch_topm(
    inputs: HeadInputs,
    sampling: Sampling,
    sharpness: float,
    noise: torch.Tensor | None,
    out_tokens: torch.Tensor,
    out_logprobs: torch.Tensor,
    scratch: Scratch,
) -> None:
    rows, vocab_size = inputs.x.shape[0], inputs.head.shape[0]
    scoring, parts = Scoring.of(sampling, noise, sharpness), Parts(scratch.partials)
    normed = _normed(parts, inputs)
    groups = Maxima.take(parts, rows * groups_of(vocab_size))
    logits = _through_memory(parts, rows, vocab_size)
    if sampling.warped(vocab_size):
        outputs = Outputs(groups, scratch.counters, out_tokens, False, sampling.needs_masses(vocab_size))
        _head(inputs, normed, sampling, scoring.without_noise(), logits, 1, outputs)
    else:
        outputs = Outputs(groups, scratch.counters, out_tokens, False, True)
        _head(inputs, normed, sampling, scoring, logits, 2, outputs)
    launch_children(logits, sampling, scoring, groups, parts, out_tokens, out_logprobs)


# `HeadInputs` in a schema.
_HEAD = "Tensor x, Tensor norm_weight, Tensor norm_bias, float epsilon, Tensor head, Tensor? scales"

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


def eight_bits_run(dtype: torch.dtype, width: int, device: torch.device) -> bool:
    """Whether a head for x [M, width] of the dtype may be given as `to_eight_bits` returns it."""
    return by_hopper(dtype.itemsize, width, device)


def _check(op: str, inputs: HeadInputs) -> None:
    x, norm_weight, norm_bias, _, head, scales = inputs
    check_tensor(op, "x", x, (None, None), FLOATS, x.device)
    check_tensor(op, "norm_weight", norm_weight, (x.shape[1],), FLOATS, x.device)
    check_tensor(op, "norm_bias", norm_bias, (x.shape[1],), FLOATS, x.device)
    width = x.shape[1]
    if scales is None:
        check_tensor(op, "head", head, (None, width), x.dtype, x.device)
        return
    if not eight_bits_run(x.dtype, width, x.device):
        raise ValueError(
            f"{op}: heads in 8 bits run on Hopper, for x of 16 bits and a width that is a multiple of 8, got {x.dtype} "
            f"of width {width} on {x.device}; leave the head as it is, without scales"
        )
    check_tensor(op, "head", head, (None, width + -width % eight_bits.BLOCK), eight_bits.EIGHT_BITS, x.device)
    check_tensor(op, "scales", scales, (head.shape[0],), torch.float32, x.device)


def lm_head_choose(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    epsilon: float,
    head: torch.Tensor,
    seeds: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    noise: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    """One token a node: x [M, d] (hidden states before the final norm), head [V, d] of x's dtype -> out [M] int32.

    head, scales: in place of the head in x's dtype what `to_eight_bits` made of it, where `eight_bits_run`.
    norm_weight, norm_bias [d], epsilon: of the final LayerNorm. seeds [B] int64 and streams [B] int32: counters of the
    noise of each sequence; positions [B, N] int32: the absolute position of the token that each row chooses, M = B*N.
    temperature, top_k (0: none), top_p (1: none), min_p (0: none): as in transformers; greedy: no warping, no noise.
    noise: [M, V] fp32 in place of the counters' noise, or None. logits: [M, V] fp32 to fill, or None. scratch: of
    `scratch_size`, or more.

    Raises ValueError for a wrong shape, dtype, device or layout, a setting out of range, or too little scratch memory.
    """
    op, inputs = "lm_head_choose", HeadInputs(x, norm_weight, norm_bias, epsilon, head, scales)
    _check(op, inputs)
    rows, vocab_size = shape = x.shape[0], head.shape[0]
    sampling = Sampling(seeds, streams, positions, temperature, top_k, top_p, min_p, greedy)
    needed = scratch_size(rows, vocab_size, x.shape[1], sampling.warped(vocab_size))
    check_sampling(op, sampling, noise, shape, x.device, scratch, needed)
    check_tensor(op, "out", out, (rows,), torch.int32, x.device)
    if logits is not None:
        check_tensor(op, "logits", logits, (rows, vocab_size), torch.float32, x.device)
    check_runs(x, op)
    _choose(*inputs, *sampling, noise, logits, out, *scratch)


def lm_head_topm(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    epsilon: float,
    head: torch.Tensor,
    seeds: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    sharpness: float = 1.0,
    noise: torch.Tensor | None = None,
    out_tokens: torch.Tensor,
    out_logprobs: torch.Tensor,
    scratch: Scratch,
) -> None:
    """The draft's m likeliest children a node: out_tokens [M, m] int32, out_logprobs [M, m] fp32, best first, at most
    -1e-4, -inf (and token 0) where fewer than m tokens can come up (`reference.choose_children`).

    The other arguments and the errors are those of `lm_head_choose`; sharpness multiplies the logits when greedy.
    """
    op, inputs = "lm_head_topm", HeadInputs(x, norm_weight, norm_bias, epsilon, head, scales)
    _check(op, inputs)
    shape = x.shape[0], head.shape[0]
    sampling = Sampling(seeds, streams, positions, temperature, top_k, top_p, min_p, greedy)
    check_sampling(op, sampling, noise, shape, x.device, scratch, scratch_size(*shape, x.shape[1]))
    check_children(op, shape, x.device, out_tokens, out_logprobs)
    check_runs(x, op)
    _topm(*inputs, *sampling, sharpness, noise, out_tokens, out_logprobs, *scratch)
