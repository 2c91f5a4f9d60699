"""The kernels of kernel.py as operations: launch settings, launchers, checks of arguments."""

import torch
import triton

from stagedspec.kernels.choose.kernel import scan_kernel, select_kernel
from stagedspec.kernels.choose.scores import GROUP, NOISES
from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    architecture,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    most_registers,
    register,
)

SLICE = 2048  # tokens of one program of `scan`
BLOCK = 256  # candidates looked at together
FEW = 128  # and four times as many: candidates that are compared with each other
TOGETHER = 32  # of them at a time
SPAN = 64  # groups compacted together
WARPS = {"scan_warps": 4, "select_warps": 8}
SPILLING = (80, 89, 90, 100, 120)  # `select_kernel`'s, see `most_registers`


# ---------------------------------------------------------------- launchers


def groups_of(vocab_size: int) -> int:
    return -(-vocab_size // GROUP)


def warped(greedy: bool, top_k: int, top_p: float, min_p: float, vocab_size: int) -> bool:
    """Whether any warper but the temperature is on."""
    return not greedy and (0 < top_k < vocab_size or top_p < 1.0 or min_p > 0.0)


def rounded(count: int) -> int:
    """Elements of a part of the scratch memory: whole 128-byte lines."""
    return -(-count // 32) * 32


class Parts:
    """Cuts one after the other off a scratch tensor of fp32."""

    def __init__(self, partials: torch.Tensor):
        self.partials, self.start = partials, 0

    def take(self, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`count` 32-bit elements, or as many bytes seen as dtype."""
        part = self.partials[self.start : self.start + count]
        if part.numel() < count:
            raise RuntimeError(f"scratch memory of {self.partials.numel()} elements ends before {self.start + count}")
        self.start += rounded(count)
        return part.view(dtype)


def scratch_size(rows: int, vocab_size: int) -> tuple[int, int]:
    """Partials and counters for M rows."""
    groups = groups_of(vocab_size)
    return 3 * rounded(rows * groups) + 2 * rounded(rows * vocab_size), rows


def scaling(greedy: bool, temperature: float, sharpness: float = 1.0) -> tuple[int, float]:
    """SCALING of the kernels and its number."""
    if greedy:
        return (2, sharpness) if sharpness != 1.0 else (0, 1.0)
    return (1, temperature) if temperature != 1.0 else (0, 1.0)


def noise_kind(greedy: bool, noise: torch.Tensor | None) -> int:
    return NOISES["none" if greedy else "made" if noise is None else "given"]


def candidates(shape: tuple[int], device: torch.device) -> list[dict[str, int]]:
    """Settings to try at the shape (V,), the default first."""
    default = {"slice": SLICE, "block": BLOCK, "span": SPAN} | WARPS
    others = [{"slice": size, "scan_warps": warps} for size in (1024, 2048, 4096) for warps in (2, 4, 8)]
    others += [{"block": 512}]
    others += [{"span": span, "select_warps": warps} for span in (16, 32, 64) for warps in (4, 8, 16)]
    return [default, *(default | other for other in others if default | other != default)]


def _settings(vocab_size: int, device: torch.device) -> dict[str, int]:
    return config("choose", (vocab_size,), device, candidates)


def launch_select(
    logits, maxima, masses, parts, noise, seeds, streams, positions, scale, top_k, top_p, min_p, kind, out, logprobs,
    whole
):  # fmt: skip
    """`select_kernel` for every row of logits, which need not lie close together; scale: (SCALING, number); kind:
    NOISE; whole: logits already hold the final scores, noise
    included, and no warpers apply."""
    rows, vocab_size = logits.shape
    groups, settings = groups_of(vocab_size), _settings(vocab_size, logits.device)
    warps = settings["select_warps"]
    members = parts.take(rows * groups, torch.int32)
    values, ids = parts.take(rows * vocab_size), parts.take(rows * vocab_size, torch.int32)
    launch_kernel(
        select_kernel,
        (rows,),
        logits, maxima, masses, logits if noise is None else noise, seeds, streams, positions, members, values, ids,
        out, out if logprobs is None else logprobs, positions.shape[1], scale[1], top_p, min_p, V=vocab_size,
        STRIDE=logits.stride(0), G=groups, GROUPS=triton.next_power_of_2(groups), SCALING=scale[0], NOISE=kind,
        TOP_K=top_k if 0 < top_k < vocab_size else 0, TOP_P=top_p < 1.0, MIN_P=min_p > 0.0,
        CHILDREN=0 if logprobs is None else out.shape[1], WHOLE=whole,
        BLOCK=min(settings["block"], triton.next_power_of_2(vocab_size)),
        FEW=FEW, TOGETHER=TOGETHER, SPAN=min(settings["span"], triton.next_power_of_2(groups)),
        num_warps=warps, maxnreg=most_registers(architecture(logits.device), warps, SPILLING),
        **launch_options(logits.device),
    )  # fmt: skip


def _scan(logits, noise, seeds, streams, positions, maxima, masses, best, ids, counters, out, scale, kind,
          choose, need_masses):  # fmt: skip
    rows, vocab_size = logits.shape
    settings = _settings(vocab_size, logits.device)
    size = min(settings["slice"], max(GROUP, triton.next_power_of_2(vocab_size)))
    slices = -(-vocab_size // size)
    launch_kernel(
        scan_kernel,
        (rows, slices),
        logits, logits if noise is None else noise, seeds, streams, positions, maxima, masses, best, ids,
        counters, out, positions.shape[1], scale[1], V=vocab_size, G=groups_of(vocab_size), T=size, SLICES=slices,
        SLICES_UP=triton.next_power_of_2(slices), SCALING=scale[0], NOISE=kind, CHOOSE=choose, MASSES=need_masses,
        num_warps=settings["scan_warps"], **launch_options(logits.device),
    )  # fmt: skip


def _launch_choose(
    logits, seeds, streams, positions, temperature, top_k, top_p, min_p, greedy, noise, out, partials, counters
):
    rows, vocab_size = logits.shape
    scale, kind = scaling(greedy, temperature), noise_kind(greedy, noise)
    parts = Parts(partials)
    groups = rows * groups_of(vocab_size)
    maxima, masses = parts.take(groups), parts.take(groups, torch.int32)
    if not warped(greedy, top_k, top_p, min_p, vocab_size):
        _scan(logits, noise, seeds, streams, positions, maxima, masses, maxima, masses, counters, out, scale,
              kind, True, False)  # fmt: skip
        return
    need = top_p < 1.0 and not 0 < top_k < vocab_size
    _scan(logits, None, seeds, streams, positions, maxima, masses, maxima, masses, counters, out, scale, 0,
          False, need)  # fmt: skip
    launch_select(logits, maxima, masses, parts, noise, seeds, streams, positions, scale, top_k, top_p, min_p, kind,
                  out, None, False)  # fmt: skip


SAMPLING = (
    "Tensor seeds, Tensor streams, Tensor positions, "
    "float temperature, int top_k, float top_p, float min_p, bool greedy"
)

_choose = register(
    f"choose(Tensor logits, {SAMPLING}, Tensor? noise, Tensor(a!) out, Tensor(b!) partials, Tensor(c!) counters) -> ()",
    _launch_choose,
)


# ---------------------------------------------------------------- public functions


def check_sampling(
    op, rows, vocab_size, device, seeds, streams, positions, temperature, top_k, top_p, min_p, noise, scratch, needed
):
    """Checks of the arguments that all choosing operations share; `needed`: their `scratch_size`."""
    if positions.dim() != 2 or positions.numel() != rows:
        raise ValueError(f"{op}: positions must be [B, N] with B * N = {rows} rows, got {list(positions.shape)}")
    batch = positions.shape[0]
    check_tensor(op, "positions", positions, (batch, rows // batch), torch.int32, device)
    check_tensor(op, "seeds", seeds, (batch,), torch.int64, device)
    check_tensor(op, "streams", streams, (batch,), torch.int32, device)
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"{op}: top_k must be at least 0 (0: none), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1] (1: none), got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{op}: min_p must be in [0, 1] (0: none), got {min_p}")
    if noise is not None:
        check_tensor(op, "noise", noise, (rows, vocab_size), torch.float32, device)
    check_tensor(op, "scratch.partials", scratch.partials, (None,), torch.float32, device)
    check_tensor(op, "scratch.counters", scratch.counters, (None,), torch.int32, device)
    got = scratch.partials.numel(), scratch.counters.numel()
    if got[0] < needed[0] or got[1] < needed[1]:
        raise ValueError(f"{op}: scratch must hold (partials, counters) of {needed}, got {got}; see scratch_size")


def check_children(op, rows, vocab_size, device, out_tokens, out_logprobs):
    if out_tokens.dim() != 2 or not 1 <= out_tokens.shape[1] <= vocab_size:
        raise ValueError(
            f"{op}: out_tokens must be [M, m], m from 1 to the vocabulary {vocab_size}, got {list(out_tokens.shape)}"
        )
    check_tensor(op, "out_tokens", out_tokens, (rows, out_tokens.shape[1]), torch.int32, device)
    check_tensor(op, "out_logprobs", out_logprobs, tuple(out_tokens.shape), torch.float32, device)


def choose(
    logits, seeds, streams, positions, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, greedy=False, noise=None, out,
    scratch,
):  # fmt: skip
    """The one token-choice rule (`reference.choose`): logits [M, V] fp32 -> out [M] int32.

    seeds [B] int64, streams [B] int32, positions [B, N] int32, the absolute position of the token each row chooses,
    M = B*N. top_k 0, top_p 1, min_p 0 leave a warper out; greedy leaves out all of them and the noise. noise: [M, V]
    fp32 in place of the counters' noise. -inf is never chosen. out is INVALID, -2, for a row with a NaN, without a
    finite logit or, when sampling, with +inf.

    Raises ValueError for a wrong shape, dtype, device or layout, a setting out of range, or too little scratch memory.
    """
    check_tensor("choose", "logits", logits, (None, None), torch.float32, logits.device)
    rows, vocab_size = logits.shape
    check_sampling(
        "choose", rows, vocab_size, logits.device, seeds, streams, positions, temperature, top_k, top_p, min_p, noise,
        scratch, scratch_size(rows, vocab_size),
    )  # fmt: skip
    check_tensor("choose", "out", out, (rows,), torch.int32, logits.device)
    check_runs(logits, "choose")
    _choose(
        logits, seeds, streams, positions, temperature, top_k, top_p, min_p, greedy, noise, out, scratch.partials,
        scratch.counters,
    )  # fmt: skip
