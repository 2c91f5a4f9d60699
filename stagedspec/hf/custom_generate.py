"""The object for transformers' `generate(custom_generate=...)`, and the decoders made for its models."""

import inspect
import sys
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import GenerationConfig, GPT2LMHeadModel, LogitsProcessorList, StoppingCriteriaList

from stagedspec.decoder import Decoder
from stagedspec.decoding.callbacks import ended
from stagedspec.decoding.decoder_cache import cached
from stagedspec.decoding.output import StagedOutput
from stagedspec.decoding.prepared import Prepared, translate
from stagedspec.decoding.request import StagedOptions
from stagedspec.decoding.settings import refuse_arguments, refuse_settings
from stagedspec.decoding.stats import Stats
from stagedspec.devices import DTYPES
from stagedspec.models.loading import read_checkpoint
from stagedspec.models.ngram import KatzTable
from stagedspec.planning.tree import MODES, TreeConfig


class custom_generate:
    """Staged speculative decoding for `GPT2LMHeadModel.generate(..., custom_generate=custom_generate(draft=...))`.

    draft: a GPT2LMHeadModel, folder or hub id of the same vocabulary. None takes generate's `assistant_model`; without
    that either, `mode="autoregressive"` or `prompt_lookup_num_tokens` must be given.
    ngram: a KatzTable or its path, None for the context n-gram alone.
    mode, tree, seed: as in `Decoder.generate`. One call of `generate` takes mode, tree and seed too, which go first.
    backend: as in `Decoder.from_pretrained`.
    streamer: used where generate is given none.

    Your own functions may stand between `generate` and this object, and may call it from another thread.

    The first call makes a decoder, which is cached for as long as the model lives, so that this object may be made anew
    for every call. It decodes on the model's device in its dtype, with a copy of its weights. As with
    `Decoder.from_pretrained`, a model that has changed since (weights, in place or not; hooks, modules, modes) is
    checked and read again, so that every call decodes with all weights as they are then. Only single values that are
    written through `.data` or outside of torch can go unnoticed: then call `forget(model)`; until then all weights stay
    those read before.

    `stop_strings` does not work here, because transformers does not pass on the `tokenizer` given to `generate`: use
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.

    last_stats: statistics of the last call. Raises ValueError at the call for what is not supported.
    """

    def __init__(
        self,
        draft: str | Path | GPT2LMHeadModel | None = None,
        ngram: str | Path | KatzTable | None = None,
        mode: str = "staged",
        tree: TreeConfig | None = None,
        seed: int | Sequence[int] | None = None,
        backend: str = "auto",
        streamer: Any = None,
        **called: Any,
    ):
        if called:
            raise ValueError(
                f"custom_generate takes no {min(called)}: give generate an object, custom_generate=custom_generate(...)"
            )
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(
                f"streamer must have put and end, as transformers' streamers do, got {type(streamer).__name__}"
            )
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.draft, self.ngram, self.mode, self.tree = draft, ngram, mode, tree
        self.seed, self.backend, self.streamer = seed, backend, streamer
        self.last_stats: Stats | None = None

    def __call__(
        self,
        model: GPT2LMHeadModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        mode: str | None = None,
        tree: TreeConfig | None = None,
        seed: int | Sequence[int] | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor | StagedOutput:
        began = time.perf_counter()
        dropped = _dropped_arguments(generation_config, input_ids)
        streamer = dropped["streamer"]
        own = streamer is None and self.streamer is not None
        streamer = self.streamer if own else streamer
        with ended(streamer):
            if own:
                streamer.put(input_ids.cpu())
            refuse_settings(vars(generation_config))
            refuse_arguments(dropped)
            draft, assistant = self.draft, dropped["assistant_model"]
            if draft is None:
                draft = assistant
            elif assistant is not None and assistant is not draft:
                raise ValueError(
                    "custom_generate has draft= and generate has another assistant_model=: give one of the two"
                )
            decoder = decoder_for(model, draft, self.ngram, self.backend)
            options = StagedOptions(
                self.mode if mode is None else mode,
                self.seed if seed is None else seed,
                self.tree if tree is None else tree,
            )
            prepared = Prepared(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
            output = decoder.decode(translate(decoder.context, options, prepared, streamer, began))
        self.last_stats = decoder.last_stats
        return output


# Arguments of transformers' `generate` that it does not pass on to a custom one.
_DROPPED = (
    "streamer",
    "assistant_model",
    "assistant_tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "synced_gpus",
)


def _dropped_arguments(config: GenerationConfig, input_ids: torch.Tensor) -> dict[str, Any]:
    """The arguments in `_DROPPED`, read from the stack frame of the `generate` that is calling.

    Without them a streamer given to `generate` would be shown the prompt and nothing else, and its reader would wait
    forever. Where `generate` is not on this thread's stack, it is the one on another thread's that made this config or
    this prompt.

    Raises ValueError where no `generate` is found.
    """
    known = next(_calls_of_generate(sys._getframe(2)), None)
    if known is None:
        others = [call for frame in sys._current_frames().values() for call in _calls_of_generate(frame)]
        same = [call for call in others if call.get("generation_config") is config]
        same += [call for call in others if call.get("input_ids") is input_ids]
        known = next(iter(same), None)
    if known is None:
        raise ValueError(
            "custom_generate was called, but not by the generate of a transformers model, so that a streamer or an "
            "assistant_model given there would be lost: give it to generate(..., custom_generate=...), or call "
            "Decoder.generate"
        )
    return {name: known.get(name) for name in _DROPPED}


_GENERATE = inspect.unwrap(GPT2LMHeadModel.generate).__code__


def _calls_of_generate(frame: FrameType | None) -> Iterator[dict[str, Any]]:
    """Local variables of the calls of `generate` with a custom_generate on a stack, the innermost call first."""
    while frame is not None:
        if frame.f_code is _GENERATE:
            known = frame.f_locals
            if known["custom_generate"] is not None:
                yield known
        frame = frame.f_back


def decoder_for(
    model: GPT2LMHeadModel,
    draft: str | Path | GPT2LMHeadModel | None = None,
    ngram: str | Path | KatzTable | None = None,
    backend: str = "auto",
) -> Decoder:
    """The decoder of a model as it is now: made at the first call, its weights read again when they have changed.

    Arguments as of `custom_generate`. Decoders with different drafts share the target's weights; those of the last
    KEPT_DRAFTS drafts are cached, each for as long as its draft lives.

    Raises ValueError for a model that this package would decode differently from transformers.
    """
    table = _load_table(str(ngram)) if isinstance(ngram, (str, Path)) else ngram
    if table is not None and not isinstance(table, KatzTable):
        raise ValueError(f"ngram must be a path or a KatzTable, got {type(table).__name__}")

    def make() -> Decoder:
        read_checkpoint(model, "target")  # for its messages, before those about the device
        if model.dtype not in DTYPES.values():
            raise ValueError(
                f"target: the model computes in {str(model.dtype).removeprefix('torch.')}, expected "
                f"{', '.join(DTYPES)}: call model.float()"
            )
        return Decoder.from_pretrained(model, device=model.device, dtype=model.dtype, backend=backend)

    setup = getattr(model, "device", None), getattr(model, "dtype", None), model.config.vocab_size
    decoder = cached(model, backend, setup, make)
    if draft is not None:
        decoder = decoder.assisted(str(draft) if isinstance(draft, Path) else draft, table, "draft")
    decoder.follow()
    return decoder


@lru_cache(maxsize=8)
def _load_table(location: str) -> KatzTable:
    return KatzTable.load(location)
