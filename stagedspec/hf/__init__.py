"""At home beside transformers: `Decoder.generate` with all of its arguments, and `custom_generate` for its models.

    out = hf_model.generate(**inputs, custom_generate=stagedspec.hf.custom_generate(draft="distilgpt2"))

Arguments mean what they mean to transformers. Through `custom_generate` transformers reads them. `Decoder.generate`
makes numbers Python's own and checks them; where they say no more than how long and how to sample, that is all. Else
transformers makes logits processors and stopping criteria of them, which are translated here.
`stagedspec.decoding.settings` has the table of all settings.

Three things are refused or different, always by name: settings of other algorithms (beams, ...); what only the model's
own forward pass could give (attentions, hidden states, the cache); and sampled tokens, which are drawn from the
same distribution as transformers' by other random numbers.
"""

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
from stagedspec.decoding import prepared
from stagedspec.decoding.callbacks import ended
from stagedspec.decoding.decoder_cache import assisted, cached, forget
from stagedspec.decoding.output import StagedOutput
from stagedspec.decoding.settings import refuse_arguments, refuse_settings
from stagedspec.decoding.stats import Stats
from stagedspec.devices import DTYPES
from stagedspec.models.loading import read_checkpoint
from stagedspec.models.ngram import KatzTable
from stagedspec.planning.tree import MODES, TreeConfig

__all__ = ["StagedOutput", "custom_generate", "decoder_for", "forget"]


class custom_generate:
    """For `GPT2LMHeadModel.generate(..., custom_generate=stagedspec.hf.custom_generate(draft=...))`.

    draft: a GPT2LMHeadModel, folder or hub id of the same vocabulary; left out, generate's `assistant_model`, and with
    neither `mode="autoregressive"` or `prompt_lookup_num_tokens` must be given. ngram: a KatzTable or its path.
    mode, tree, seed: as in `Decoder.generate`. A single `generate` takes mode, tree and seed too.
    streamer: an alternative to generate's own. Functions of your own may lie between generate and this object, and may
    call it from another thread.

    Everything is made at the first call and kept for as long as the model lives, whether this object is kept or made
    anew for every call. Decoding runs on the model's device in its dtype, with a copy of its weights. As with
    `Decoder.from_pretrained`, a model that has changed since (weights, in place or not; hooks, modules, modes) is
    checked and read again, so that every call decodes with all weights as they are then. Only single values that are
    written through `.data` or outside of torch can go unnoticed: then call `forget(model)`; until then all weights stay
    those read before.

    Not honoured by transformers itself on this way: `stop_strings`, because `generate` does not hand on its
    `tokenizer`; give `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.

    `last_stats` tells what the last call cost. Raises ValueError at the call for what is not supported.
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
        began = time.time()
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
            seed = self.seed if seed is None else seed
            call = prepared.translate(
                decoder, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs,
                self.mode if mode is None else mode,
                seed,
                self.tree if tree is None else tree,
                streamer, began,
            )  # fmt: skip
            output = decoder.decode(call)
        self.last_stats = decoder.last_stats
        return output


_DROPPED = (
    "streamer",
    "assistant_model",
    "assistant_tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "synced_gpus",
)


def _dropped_arguments(config: GenerationConfig, input_ids: torch.Tensor) -> dict[str, Any]:
    """What transformers' `generate` was given and does not hand on: the streamer, the assistant model, what is refused.

    Without a look at its frame a streamer given to `generate` would see the prompt and then nothing, and whoever reads
    from it would wait forever. Any functions may lie between the two, and a function may call from another thread: then
    it is the `generate` that made this config or this prompt.

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
    """The variables of the calls of transformers' `generate` in a stack that were given a custom_generate, the
    innermost first."""
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

    Decoders with different drafts share the target's weights; those of the last KEPT_DRAFTS drafts are kept, each for
    as long as its draft lives.

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
        decoder = assisted(decoder, str(draft) if isinstance(draft, Path) else draft, table, "draft")
    decoder.follow()
    return decoder


@lru_cache(maxsize=8)
def _load_table(location: str) -> KatzTable:
    return KatzTable.load(location)
