"""The kernels of kernel.py as operations: launch settings, launchers, checks of arguments."""

from typing import NamedTuple

import torch
import triton

from stagedspec.kernels.choose import likeliest
from stagedspec.kernels.choose.kernel import scan_kernel, select_kernel
from stagedspec.kernels.choose.scores import GROUP, NOISES
from stagedspec.kernels.common.launch_configs import config
from stagedspec.kernels.common.registry import (
    Scratch,
    architecture,
    check_runs,
    check_tensor,
    launch_kernel,
    launch_options,
    most_registers,
    register,
)

SLICE = 2048  # tokens of one program of `scan`
BLOCK = 512  # candidates looked at together; half as many runs of WIDE
FEW = 128  # and four times as many: candidates that are compared with each other
TOGETHER = 32  # of them at a time
SPAN = 64  # groups compacted together; under top-p twice as many
WIDE = 4  # tokens in a row that are candidates together, where no threshold is searched for
WARPS = {"scan_warps": 4, "select_warps": 8}
SPILLING = (80, 89, 90, 100, 120)  # `select_kernel`'s, see `most_registers`


# ---------------------------------------------------------------- launchers


def groups_of(vocab_size: int) -> int:
    return -(-vocab_size // GROUP)


def warped(greedy: bool, top_k: int, top_p: float, min_p: float, vocab_size: int) -> bool:
    """Whether any warper but the temperature is on."""
    return not greedy and (0 < top_k < vocab_size or top_p < 1.0 or min_p > 0.0)


def rounded(count: int) -> int:
    """`count` rounded up to whole 128-byte lines of fp32: the size of a part of the scratch memory."""
    return -(-count // 32) * 32


class Parts:
    """Hands out consecutive parts of a scratch tensor of fp32."""

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
    return 3 * rounded(rows * groups) + 2 * rounded(rows * groups * GROUP), rows


class Sampling(NamedTuple):
    """How a token is chosen: the counters of the noise, and the warpers (shapes and ranges in `choose`)."""

    seeds: torch.Tensor
    streams: torch.Tensor
    positions: torch.Tensor
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    greedy: bool

    def warped(self, vocab_size: int) -> bool:
        return warped(self.greedy, self.top_k, self.top_p, self.min_p, vocab_size)

    def needs_masses(self, vocab_size: int) -> bool:
        """Whether the warpers need the masses of groups: top-p does, unless top-k has left few tokens."""
        return self.top_p < 1.0 and not 0 < self.top_k < vocab_size


class Scoring(NamedTuple):
    """How a kernel computes scores from logits: SCALING and its number, NOISE and the given noise, if there is any."""

    scaling: int
    scale: float
    noise_kind: int
    noise: torch.Tensor | None

    @classmethod
    def of(cls, sampling: Sampling, noise: torch.Tensor | None, sharpness: float = 1.0) -> "Scoring":
        kind = NOISES["none" if sampling.greedy else "made" if noise is None else "given"]
        scale = sharpness if sampling.greedy else sampling.temperature
        scaling = 0 if scale == 1.0 else 2 if sampling.greedy else 1
        return cls(scaling, scale, kind, noise)

    def without_noise(self) -> "Scoring":
        return Scoring(self.scaling, self.scale, NOISES["none"], None)


AS_THEY_ARE = Scoring(0, 1.0, NOISES["none"], None)  # logits that are scores already


class Maxima(NamedTuple):
    """Maxima in scratch memory. Where programs choose a token: the best score of each program, fp32, and its token,
    int32. Else the best score of each group of 64 tokens, fp32, and the group's probability mass, int32."""

    scores: torch.Tensor
    ids_or_masses: torch.Tensor

    @classmethod
    def take(cls, parts: Parts, count: int) -> "Maxima":
        return cls(parts.take(count), parts.take(count, torch.int32))


class Outputs(NamedTuple):
    """Outputs that a kernel computes from scores. choose: the best token of each row goes to `out`, written by the last
    program of the row (counters). Else it writes maxima of groups, for `launch_select`; masses: with their masses."""

    maxima: Maxima
    counters: torch.Tensor
    out: torch.Tensor
    choose: bool
    masses: bool


def candidates(shape: tuple[int], device: torch.device) -> list[dict[str, int]]:
    """Settings to try at the shape (V,), the default first."""
    default = {"slice": SLICE, "block": BLOCK, "span": SPAN} | WARPS
    others = [{"slice": size, "scan_warps": warps} for size in (1024, 2048, 4096) for warps in (2, 4, 8)]
    others += [{"block": 1024}]
    others += [{"span": span, "select_warps": warps} for span in (16, 32, 64) for warps in (4, 8, 16)]
    return [default, *(default | other for other in others if default | other != default)]


def _settings(vocab_size: int, device: torch.device) -> dict[str, int]:
    return config("choose", (vocab_size,), device, candidates)


def launch_select(
    logits: torch.Tensor,
    sampling: Sampling,
    scoring: Scoring,
    groups: Maxima,
    parts: Parts,
    out: torch.Tensor,
    logprobs: torch.Tensor | None = None,
) -> None:
    """`select_kernel` for every row of logits, which need not lie close together: the choice, or with logprobs the
    children. Without warpers logits already hold the final scores, noise included."""
    rows, vocab_size = logits.shape
    count, settings = groups_of(vocab_size), _settings(vocab_size, logits.device)
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    whole = not sampling.warped(vocab_size)
    if whole:  # also where greedy decoding ignores warpers
        scoring, top_k, top_p, min_p = AS_THEY_ARE, 0, 1.0, 0.0
    if top_k >= vocab_size:
        top_k = 0
    warps, span = settings["select_warps"], settings["span"] * (2 if top_p < 1.0 else 1)
    # Four at a time where rows are aligned for that. Thresholds take time with the number of candidates.
    wide = WIDE if logits.stride(0) % WIDE == 0 and top_k == 0 and logprobs is None else 1
    members = parts.take(rows * count, torch.int32)
    values, ids = parts.take(rows * count * GROUP), parts.take(rows * count * GROUP, torch.int32)
    launch_kernel(
        select_kernel,
        (rows,),
        logits, *groups, logits if scoring.noise is None else scoring.noise, sampling.seeds, sampling.streams,
        sampling.positions, members, values, ids, out, out if logprobs is None else logprobs,
        sampling.positions.shape[1], scoring.scale, top_p, min_p,
        V=vocab_size, STRIDE=logits.stride(0), G=count, GROUPS=triton.next_power_of_2(count), SCALING=scoring.scaling,
        NOISE=scoring.noise_kind, TOP_K=top_k, TOP_P=top_p < 1.0, MIN_P=min_p > 0.0,
        CHILDREN=0 if logprobs is None else out.shape[1], WHOLE=whole,
        BLOCK=min(settings["block"] // (2 if wide > 1 else 1), triton.next_power_of_2(vocab_size)),
        FEW=FEW, TOGETHER=TOGETHER, SPAN=min(span, triton.next_power_of_2(count)), WIDE=wide, LANES=32 * warps,
        num_warps=warps, maxnreg=most_registers(architecture(logits.device), warps, SPILLING),
        **launch_options(logits.device),
    )  # fmt: skip


def launch_children(
    logits: torch.Tensor,
    sampling: Sampling,
    scoring: Scoring,
    groups: Maxima,
    parts: Parts,
    out: torch.Tensor,
    logprobs: torch.Tensor,
) -> None:
    """The children of every row, arguments as of `launch_select`."""
    (rows, vocab_size), children = logits.shape, out.shape[1]
    if sampling.warped(vocab_size) or children > likeliest.MOST:
        launch_select(logits, sampling, scoring, groups, parts, out, logprobs)
        return
    count = groups_of(vocab_size)
    launch_kernel(
        likeliest.likeliest_kernel,
        (rows,),
        logits, *groups, out, logprobs, V=vocab_size, STRIDE=logits.stride(0), G=count,
        **likeliest.constants(children, count), **launch_options(logits.device),
    )  # fmt: skip


def _scan(logits: torch.Tensor, sampling: Sampling, scoring: Scoring, outputs: Outputs) -> None:
    rows, vocab_size = logits.shape
    settings = _settings(vocab_size, logits.device)
    size = min(settings["slice"], max(GROUP, triton.next_power_of_2(vocab_size)))
    slices = -(-vocab_size // size)
    launch_kernel(
        scan_kernel,
        (rows, slices),
        logits, logits if scoring.noise is None else scoring.noise, sampling.seeds, sampling.streams,
        sampling.positions, *outputs.maxima, *outputs.maxima, outputs.counters, outputs.out,
        sampling.positions.shape[1], scoring.scale, V=vocab_size, G=groups_of(vocab_size), T=size,
        SLICES=slices, SLICES_UP=triton.next_power_of_2(slices), SCALING=scoring.scaling, NOISE=scoring.noise_kind,
        CHOOSE=outputs.choose, MASSES=outputs.masses, num_warps=settings["scan_warps"],
        **launch_options(logits.device),
    )  # fmt: skip


def _launch_choose(
    logits: torch.Tensor, sampling: Sampling, noise: torch.Tensor | None, out: torch.Tensor, scratch: Scratch
) -> None:
    rows, vocab_size = logits.shape
    scoring, parts = Scoring.of(sampling, noise), Parts(scratch.partials)
    maxima = Maxima.take(parts, rows * groups_of(vocab_size))
    if not sampling.warped(vocab_size):
        _scan(logits, sampling, scoring, Outputs(maxima, scratch.counters, out, True, False))
        return
    outputs = Outputs(maxima, scratch.counters, out, False, sampling.needs_masses(vocab_size))
    _scan(logits, sampling, scoring.without_noise(), outputs)
    launch_select(logits, sampling, scoring, maxima, parts, out)


# `Sampling` in a schema.
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
    op: str,
    sampling: Sampling,
    noise: torch.Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
    scratch: Scratch,
    needed: tuple[int, int],
) -> None:
    """Checks of the arguments that all choosing operations share. shape: of the logits, (M, V); needed: the operation's
    `scratch_size`."""
    rows, vocab_size = shape
    seeds, streams, positions, temperature, top_k, top_p, min_p, _ = sampling
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


def check_children(
    op: str, shape: tuple[int, int], device: torch.device, out_tokens: torch.Tensor, out_logprobs: torch.Tensor
) -> None:
    rows, vocab_size = shape
    if out_tokens.dim() != 2 or not 1 <= out_tokens.shape[1] <= vocab_size:
        raise ValueError(
            f"{op}: out_tokens must be [M, m], m from 1 to the vocabulary {vocab_size}, got {list(out_tokens.shape)}"
        )
    check_tensor(op, "out_tokens", out_tokens, (rows, out_tokens.shape[1]), torch.int32, device)
    check_tensor(op, "out_logprobs", out_logprobs, tuple(out_tokens.shape), torch.float32, device)


def choose(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    streams: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    noise: torch.Tensor | None = None,
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    """The one token-choice rule (`reference.choose`): logits [M, V] fp32 -> out [M] int32.

    seeds [B] int64, streams [B] int32, positions [B, N] int32, the absolute position of the token each row chooses,
    M = B*N. top_k 0, top_p 1, min_p 0 leave a warper out; greedy leaves out all of them and the noise. noise: [M, V]
    fp32 in place of the counters' noise. -inf is never chosen. out is INVALID, -2, for a row with a NaN, without a
    finite logit or, when sampling, with +inf.

    Raises ValueError for a wrong shape, dtype, device or layout, a setting out of range, or too little scratch memory.
    """
    check_tensor("choose", "logits", logits, (None, None), torch.float32, logits.device)
    rows, vocab_size = logits.shape
    sampling = Sampling(seeds, streams, positions, temperature, top_k, top_p, min_p, greedy)
    needed = scratch_size(rows, vocab_size)
    check_sampling("choose", sampling, noise, (rows, vocab_size), logits.device, scratch, needed)
    check_tensor("choose", "out", out, (rows,), torch.int32, logits.device)
    check_runs(logits, "choose")
    _choose(logits, *sampling, noise, out, *scratch)
