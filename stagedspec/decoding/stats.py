"""Statistics of a generation: times, passes, acceptance, and which model first proposed each token."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

ORIGINS = ("target", "draft", "ngram")


# A range of a profiler's timeline, made from its name: torch.cuda.nvtx.range, torch.profiler.record_function.
Mark = Callable[[str], AbstractContextManager]


class Clock:
    """Wall-clock seconds per phase: `with clock("draft"): ...`. Phases do not nest; the device is not synchronised.

    phases: those to record, None for all. mark: marks every phase for a profiler, or None.
    """

    def __init__(self, phases: tuple[str, ...] | None = None, mark: Mark | None = None) -> None:
        self.phases, self.mark = phases, mark
        self.seconds: dict[str, float] = {}
        self._phase, self._start = "", 0.0

    def __call__(self, phase: str) -> "Clock":
        self._phase = phase
        return self

    def __enter__(self) -> None:
        if self.mark is not None:
            self._range = self.mark(self._phase)
            self._range.__enter__()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self.phases is None or self._phase in self.phases:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + time.perf_counter() - self._start
        if self.mark is not None:
            self._range.__exit__(*error)  # type: ignore[arg-type]


def marks_wanted() -> Mark | None:
    """NVTX ranges where the environment asks for them, STAGEDSPEC_NVTX=1. Raises ValueError where there are none."""
    wanted = os.environ.get("STAGEDSPEC_NVTX", "0")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"STAGEDSPEC_NVTX must be 1 (NVTX ranges), 0 or unset, got {wanted!r}")
    if wanted != "1":
        return None
    import torch

    if not torch.backends.cuda.is_built():
        raise ValueError("STAGEDSPEC_NVTX=1 asks for NVTX ranges, but this torch is built without CUDA: unset it")
    return torch.cuda.nvtx.range


@dataclass
class Stats:
    """Statistics of one generation over all its rows.

    tree: the settings used; adapted: where the tree adapted to the text, steps launched with each level (`tree` is the
    largest one), on a GPU perhaps one that the end came before. steps: times the target verified. row_steps: the same,
    counted for each row that was still running.
    new_tokens: tokens produced. accepted_per_depth[d]: row-steps that accepted a node of depth d + 1.
    origins: tokens by the model that first proposed them (Spector & Ré, Figure 3).
    seconds: wall-clock seconds by phase. total_seconds: of prefill and steps, compiling included, but neither what the
    call does before (reading its arguments, measuring passes, making buffers) nor the time of a stream's consumer.
    seconds_to_first_token: from the beginning of the call, all of that included, to the end of its first step, so it
    can be above total_seconds; None without a step.
    """

    mode: str
    tree: dict = field(default_factory=dict)
    adapted: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    row_steps: int = 0
    new_tokens: int = 0
    target_passes: int = 0
    draft_passes: int = 0
    accepted_per_depth: list[int] = field(default_factory=list)
    origins: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ORIGINS, 0))
    seconds: dict[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0
    seconds_to_first_token: float | None = None
    target_bytes: int = 0
    draft_bytes: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Mean accepted length of a row's step, the bonus token included."""
        return self.new_tokens / self.row_steps if self.row_steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.total_seconds if self.total_seconds else 0.0

    @property
    def weight_bytes_per_token(self) -> float:
        """Weight bytes read per token, relative to autoregressive decoding (Spector & Ré, Table 1)."""
        if not self.new_tokens or not self.target_bytes or not self.row_steps:
            return 0.0
        passes = self.target_passes + self.draft_passes * self.draft_bytes / self.target_bytes
        # A pass reads its weights once for all rows, in either mode: the batch cancels.
        return passes / self.steps * self.row_steps / self.new_tokens

    @property
    def overhead(self) -> float | None:
        """Share of the steps' time spent outside model passes; None where steps were not timed by phase."""
        if "target" not in self.seconds:
            return None
        steps = self.total_seconds - self.seconds.get("prefill", 0.0)
        models = self.seconds.get("target", 0.0) + self.seconds.get("draft", 0.0)
        return max(0.0, 1.0 - models / steps) if steps > 0 else 0.0

    def as_dict(self) -> dict:
        """Everything as JSON-able values, derived figures included."""
        derived = ("tokens_per_step", "tokens_per_second", "weight_bytes_per_token", "overhead")
        return dict(vars(self)) | {name: getattr(self, name) for name in derived}
