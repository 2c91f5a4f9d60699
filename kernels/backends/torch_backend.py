"""The torch backend: every operation in plain torch, with a generation's state on the host (kernels/state/host.py)."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from stagedspec.kernels import reference
from stagedspec.kernels.common.inputs import ModelConfig, NgramTable, TreeSettings
from stagedspec.kernels.common.timing import Overheads
from stagedspec.kernels.state import host, host_growth

if TYPE_CHECKING:  # they need Numba
    from stagedspec.kernels.compiled import growth, noise
    from stagedspec.kernels.compiled.model import CompiledModel


@cache
def _has_numba() -> bool:
    """False for a Python that Numba does not support yet, or with a GPU's packages alone."""
    try:
        import llvmlite  # noqa: F401
        import numba  # noqa: F401
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("numba", "llvmlite"):
            raise
        return False
    return True


@cache
def _compiled_growth() -> "type[growth.Growth] | None":
    """The growth of trees, compiled; None without Numba, or where compiling fails."""
    if not _has_numba():
        return None
    from stagedspec.kernels.compiled import build, growth

    return growth.Growth if build.succeeds(growth.try_out, "trees") else None


@cache
def _compiled_noise() -> "type[noise.Noise] | None":
    """The noise of token choice, compiled; None without Numba, or where compiling fails."""
    if not _has_numba():
        return None
    from stagedspec.kernels.compiled import build, noise

    return noise.Noise if build.succeeds(noise.try_out, "noise") else None


class TorchBackend:
    """Satisfies `interface.Backend`, which documents every member, and `AdaptiveBackend` and `ModelCompiler`.

    Stateless: one object could serve any number of decoders.
    """

    name = "torch"
    max_depth = 256
    max_head_size = 1 << 30  # any
    lock: AbstractContextManager[Any] = nullcontext()  # nothing is shared between steps
    # Measured from the times by phase of generations on two shared cores. Most of it is host work, which matters for
    # small models. Draft passes after the first find the caches warm, which makes up for part of their host work. Where
    # trees grow in Python, without Numba or for a GPU, steps take up to 0.3 ms longer than these say.
    overheads = Overheads(step=2e-4, node=0.0, drafting=6e-5, draft_pass=0.0, row=2e-5)
    # Sizes close together cost nothing here, and with more sizes one busy moment spoils fewer measurements.
    timed_rows: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64)

    skips_passes = True
    adapts_trees = True
    replaces_rows = True
    keeps_generations = False
    times_phases = True
    compiles_kernels = False

    # ------------------------------------------------------------ running steps

    def check_tree(self, tree: TreeSettings, table: NgramTable | None = None) -> None:
        """Every `TreeConfig` can be grown and verified here."""

    def repeated(self, part: Callable) -> Callable:
        return part

    def prepare(self, calls: Iterable[tuple[Callable, tuple]], device: torch.device) -> int:
        return 0  # there is nothing to compile

    def seconds(self, run: Callable[[], object], device: torch.device) -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    def release(self) -> None:
        """No buffers are kept between calls."""

    # ------------------------------------------------------------ state

    def make_sequences(
        self,
        prompts: list[list[int]],
        new_tokens: int | Sequence[int],
        eos: Sequence[int],
        device: torch.device,
        most: int = 1,
    ) -> host.Sequences:
        return host.Sequences(prompts, new_tokens, eos, device)

    def make_noise(
        self,
        seeds: list[int],
        streams: list[int],
        vocab_size: int,
        reach: int,
        limits: list[int],
        device: torch.device,
        past: int = 0,
    ) -> reference.Noise:
        kind = _compiled_noise() if device.type == "cpu" else None
        return (kind or reference.Noise)(seeds, streams, vocab_size, reach, limits, device, past)

    def make_growth(
        self,
        sequences: host.Sequences,
        config: TreeSettings,
        table: NgramTable | None,
        noise: reference.Noise | None,
        dtype: torch.dtype,
    ) -> "host_growth.Growth | growth.Growth":
        kind = _compiled_growth() if sequences.device.type == "cpu" else None
        return (kind or host_growth.Growth)(sequences, config, table, noise, dtype)

    def unread_pass(self, sequences: host.Sequences, count: int, tree_rows: int, dtype: torch.dtype) -> host.Unread:
        return host.Unread.before_last(sequences, count, tree_rows, dtype)

    def timed_batch(self, tokens: torch.Tensor, context: int, kv_dtype: torch.dtype) -> tuple[host.Batch, int]:
        return host.prefill_batch(tokens, context, kv_dtype), 0

    # ------------------------------------------------------------ models compiled as a whole

    def compile_model(
        self, config: ModelConfig, weights: Mapping[str, torch.Tensor], scales: list[float]
    ) -> "CompiledModel | None":
        """A `CompiledModel`. None, too, where Numba is missing."""
        if not _has_numba():
            return None
        from stagedspec.kernels.compiled.model import CompiledModel

        return CompiledModel.of(config, weights, scales)

    def compiled_forward(
        self, model: "CompiledModel", batch: host.Batch, rows: torch.Tensor, tree_rows: int, write: int, first: int
    ) -> torch.Tensor:
        return model.forward(batch, rows, tree_rows, write, first)

    def compiled_logits(self, model: "CompiledModel", hidden: torch.Tensor) -> torch.Tensor:
        return model.logits(hidden)

    def compiled_choose(
        self, model: "CompiledModel", batch: host.Batch, rows: torch.Tensor, tree_rows: int, write: int, first: int,
        warping: dict | None, noise: reference.NoiseAt | None,
    ) -> torch.Tensor:  # fmt: skip
        return model.choose(batch, rows, tree_rows, write, first, warping, noise)

    def compiled_children(
        self, model: "CompiledModel", batch: host.Batch, rows: torch.Tensor, tree_rows: int, write: int, first: int,
        count: int, warping: dict | None, noise: reference.NoiseAt | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        return model.children(batch, rows, tree_rows, write, first, count, warping, noise)

    # ------------------------------------------------------------ operations
    # The functions themselves: a method around each would be one more call in Python, five times a layer.

    report = staticmethod(host.Report.of)
    root_trees = staticmethod(host.Trees.roots)
    lookup_trees = staticmethod(host.Trees.lookup)
    prefill_batch = staticmethod(host.prefill_batch)
    kv_dtype = staticmethod(reference.kv_dtype)
    head_dtype = staticmethod(reference.head_dtype)
    pack_linear = staticmethod(reference.pack_linear)
    pack_head = staticmethod(reference.pack_head)
    fused_activation = staticmethod(reference.fused_activation)
    embed = staticmethod(reference.embed)
    norm_linear = staticmethod(reference.norm_linear)
    linear_add = staticmethod(reference.linear_add)
    layer_views = staticmethod(reference.layer_views)
    tree_attention = staticmethod(reference.tree_attention)
    head_logits = staticmethod(reference.head_logits)
    choose = staticmethod(reference.choose)
    warp = staticmethod(reference.warp)
    lm_head_choose = staticmethod(reference.lm_head_choose)
    lm_head_children = staticmethod(reference.lm_head_children)
    move_rows = staticmethod(reference.move_rows)
