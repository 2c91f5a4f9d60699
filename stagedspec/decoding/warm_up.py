"""Warms up a decoder: compiles kernels, measures pass times and captures CUDA graphs before the first generation."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from stagedspec.decoding.arguments import read
from stagedspec.decoding.limits import check_batch
from stagedspec.decoding.pool import GenerationPool
from stagedspec.decoding.request import Call, CallContext, StagedOptions
from stagedspec.decoding.stats import Mark
from stagedspec.devices import out_of_memory
from stagedspec.kernels.common.progress import reporting
from stagedspec.planning.tree import MODES, TreeConfig
from stagedspec.values import plain, whole

GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 50}
CHOICES = {"do_sample", "temperature", "top_k", "top_p", "min_p"}
Progress = Callable[[str, int, int], None]  # (what is being made ready, kernels that are ready, all of its kernels)


def warm_up(
    context: CallContext,
    pool: GenerationPool,
    mark: Mark | None,
    modes: Sequence[str] | None = None,
    samplings: Sequence[dict] = (GREEDY, SAMPLED),
    batch: int | Sequence[int] = 1,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Fills `pool`. See `Decoder.warm_up`."""
    models, planner = context.models, context.planner
    if not models.target.ops.compiles_kernels:
        raise ValueError(
            f"warm_up prepares GPU kernels, but this decoder runs on {models.device} with backend "
            f"{models.backend!r}, which has none to compile. On a GPU choose backend 'triton', or run `stagedspec "
            "check` so that 'auto' does"
        )
    room = models.target.positions
    given_tokens, tokens = tokens, room if tokens is None else whole(tokens)
    if tokens is None or not 2 <= tokens <= room:
        raise ValueError(f"tokens must be a whole number from 2 to the model's {room} positions, got {given_tokens!r}")
    if modes is None:
        modes = MODES if models.draft is not None else MODES[:1]
    sizes = plain(batch)
    sizes = sizes if isinstance(sizes, Iterable) else [sizes]
    lists = {}
    for name, values in {"modes": modes, "samplings": samplings, "batch": sizes}.items():
        lists[name] = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
        if not lists[name]:
            raise ValueError(f"warm_up needs a list of {name}, with one at least, got {values!r}")
    wanted = [(mode, one, size) for size in lists["batch"] for one in lists["samplings"] for mode in lists["modes"]]
    for mode, sampling, size in wanted:  # all is checked before any of it is made
        if mode not in MODES:
            raise ValueError(f"modes must be among {', '.join(MODES)}, got {mode!r}")
        planner.tree_for(mode, tree=planner.fixed or TreeConfig())  # one is there, and measures nothing
        _read(context, "autoregressive", sampling, size, tokens)
        check_batch(int(size), mode)
    made = 0
    for mode, sampling, size in wanted:
        name = f"{mode}, {'sampled' if sampling.get('do_sample') else 'greedy'}" + (f", batch {size}" * (size > 1))
        report = None if progress is None else lambda ready, total, name=name: progress(name, ready, total)
        try:
            with reporting(report):
                call = _read(context, mode, sampling, size, tokens)
                generation = pool.take(models, call.request, call.callbacks, mark)
                made += generation.warm_up()
                pool.give(generation, models)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            pool.release(models)
            raise ValueError(
                f"too little GPU memory to make {name} ready for {tokens} tokens: free some, or ask for fewer tokens "
                f"or a smaller batch ({str(error).splitlines()[0]})"
            ) from None
    return made


def _read(context: CallContext, mode: str, sampling: dict, batch: int, tokens: int) -> Call:
    """A call of this kind with the shortest prompt."""
    size = whole(batch)
    if size is None or size < 1:
        raise ValueError(f"batch must be whole numbers of at least 1, got {batch!r}")
    if not isinstance(sampling, dict):
        raise ValueError(f"samplings must be dicts of options of generate, got {sampling!r}")
    if not sampling.keys() <= CHOICES:
        raise ValueError(f"samplings may hold {', '.join(sorted(CHOICES))}, got {sampling!r}")
    prompt = torch.zeros(size, 1, dtype=torch.long, device="cpu")
    options = StagedOptions(mode, seed=0)
    return read(context, prompt, torch.ones_like(prompt), tokens - 1, options, dict(sampling), time.perf_counter())
